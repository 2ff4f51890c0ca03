"""The per-head products of absorbed MLA: W_UK moves queries into latent space, W_UV values out.

    absorb_q    q_latent[t, h] = q_nope[t, h] w_uk[h]        [T, H, n] x [H, n, C] -> [T, H, C]
    absorb_v    out[t, h] = w_uv[h] latent[t, h]             [T, H, C] x [H, v, C] -> [T, H * v]

w_uk and w_uv are views of kv_b_proj [H, n + v, C], BF16. Sums in fp32, rounded once. Called by MLA
around the sparse attention. DeepSeek-V2 report (arXiv 2405.04434), section 2.1.
"""

import torch
from torch import Tensor

from minidsv.kernels.pdl import PdlMode, triton_mode


def absorb_q_ref(q_nope: Tensor, w_uk: Tensor) -> Tensor:
    return torch.einsum("thn,hnc->thc", q_nope, w_uk)


def absorb_v_ref(latent: Tensor, w_uv: Tensor) -> Tensor:
    return torch.einsum("thc,hvc->thv", latent, w_uv).flatten(1)


def assert_heads(name: str, x: Tensor, weight: Tensor, axis: int) -> None:
    """x [T, H, K] against weight [H, *, *] whose `axis` is K."""
    assert x.dim() == weight.dim() == 3, f"{name} {tuple(x.shape)}, weight {tuple(weight.shape)}"
    assert x.shape[1:] == (weight.shape[0], weight.shape[axis]), (
        f"{name} {tuple(x.shape)} is not [T, {weight.shape[0]}, {weight.shape[axis]}]"
    )
    assert weight.stride(2) == 1, f"weight strides {weight.stride()}: want contiguous rows"


def _assert_dtype(name: str, x: Tensor, weight: Tensor) -> None:
    assert x.dtype == weight.dtype, f"{name} {x.dtype}, weight {weight.dtype}"


def absorb_q(q_nope: Tensor, w_uk: Tensor, pdl: PdlMode | None = None) -> Tensor:
    """q_nope [T, H, n] (any view with contiguous rows), w_uk [H, n, C] -> [T, H, C]."""
    assert_heads("q_nope", q_nope, w_uk, 1)
    _assert_dtype("q_nope", q_nope, w_uk)
    mode = triton_mode(q_nope, pdl)
    if mode is None:
        return absorb_q_ref(q_nope, w_uk)
    from minidsv.kernels.absorb_triton import multiply_heads

    return multiply_heads(q_nope, w_uk.transpose(1, 2), mode)


def absorb_v(latent: Tensor, w_uv: Tensor, pdl: PdlMode | None = None) -> Tensor:
    """latent [T, H, C], w_uv [H, v, C] -> [T, H * v]."""
    assert_heads("latent", latent, w_uv, 2)
    _assert_dtype("latent", latent, w_uv)
    mode = triton_mode(latent, pdl)
    if mode is None:
        return absorb_v_ref(latent, w_uv)
    from minidsv.kernels.absorb_triton import multiply_heads

    return multiply_heads(latent, w_uv, mode).flatten(1)


def absorb_cost(tokens: int, heads: int, k: int, n: int) -> tuple[int, int]:
    """(compulsory bytes, FLOPs) of a product with `heads` bf16 weights of k x n."""
    return 2 * heads * (k * n + tokens * (k + n)), 2 * tokens * heads * k * n
