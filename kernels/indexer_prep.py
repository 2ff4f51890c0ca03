"""What the indexer does to its queries, gates and keys between the projections and the scores.

    q' = rope(q_j)        w'_j = w_j head_scale softmax_scale                       plain cache
    q', s_j = fp8(rope(q_j) Hm)    w'_j = w_j head_scale s_j softmax_scale          fp8 cache
    key = rope(LayerNorm(k)), written to the paged cache, rotated by Hm and quantised if that is fp8

RoPE turns the first 2 * cos.shape[1] of the D dims and leaves the rest: half-split for DeepSeek,
interleaved for GLM. Hm is the Hadamard matrix, fp8 one power-of-two scale a row. The norm and the
rotation round to the inputs' dtype, the Hadamard product to bf16. Called by the indexer.
"""

import functools
from collections.abc import Callable
from importlib.util import find_spec

import torch
from torch import Tensor

from minidsv.kernels.constants import PAGE_SIZE
from minidsv.kernels.index_cache import fp8_page_bytes, rotate_quantize, set_index_k_buffer
from minidsv.kernels.norm import layer_norm_ref
from minidsv.kernels.pdl import PdlMode, triton_mode
from minidsv.kernels.rope import apply_rope_ref, assert_angles


def apply_q_scale_and_softmax_scale(
    weights: Tensor, q_scale: Tensor, softmax_scale: float
) -> Tensor:
    """Fold q's FP8 scales into the gates: [T, H], [T, H, 1] -> [T, H] (SGLang PR 23965)."""
    return (weights.unsqueeze(-1) * q_scale * softmax_scale).squeeze(-1)


@functools.cache
def folding(device_type: str) -> Callable[[Tensor, Tensor, float], Tensor]:
    """apply_q_scale_and_softmax_scale as the references run it: compiled on CUDA, as the seed has
    it, where torch can compile."""
    if device_type != "cuda" or find_spec("triton") is None:
        return apply_q_scale_and_softmax_scale
    return torch.compile(apply_q_scale_and_softmax_scale, dynamic=True)


@torch.inference_mode()
def warm_up_folding(heads: int, softmax_scale: float, device: torch.device) -> None:
    """Compile what any number of tokens needs: one, and more."""
    for tokens in (1, 2):
        weights = torch.ones(tokens, heads, device=device)
        folding(device.type)(weights, weights.unsqueeze(-1), softmax_scale)


def _rope_first(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    turned, rest = x.split((2 * cos.shape[1], x.shape[-1] - 2 * cos.shape[1]), -1)
    return torch.cat((apply_rope_ref(turned, cos, sin, interleaved), rest), -1)


def index_q_prep_ref(
    q: Tensor,
    gate: Tensor,
    cos: Tensor,
    sin: Tensor,
    interleaved: bool,
    softmax_scale: float,
    head_scale: float,
    fp8: bool,
    fold: Callable[[Tensor, Tensor, float], Tensor] = apply_q_scale_and_softmax_scale,
) -> tuple[Tensor, Tensor]:
    """index_q_prep in PyTorch."""
    q, gate = _rope_first(q, cos, sin, interleaved), gate * head_scale
    if not fp8:
        return q, gate * softmax_scale
    q, q_scale = rotate_quantize(q)
    return q, fold(gate, q_scale, softmax_scale)


def index_k_write_ref(
    buffer: Tensor,
    loc: Tensor,
    k: Tensor,
    gain: Tensor,
    bias: Tensor,
    eps: float,
    cos: Tensor,
    sin: Tensor,
    interleaved: bool,
) -> None:
    """index_k_write in PyTorch."""
    k = layer_norm_ref(k, gain, bias, eps)
    set_index_k_buffer(buffer, loc, _rope_first(k, cos, sin, interleaved))


def index_q_prep(
    q: Tensor,
    gate: Tensor,
    cos: Tensor,
    sin: Tensor,
    interleaved: bool,
    softmax_scale: float,
    head_scale: float,
    fp8: bool,
    pdl: PdlMode | None = None,
) -> tuple[Tensor, Tensor]:
    """q [T, H, D], gate fp32 [T, H] -> (e4m3 or q's dtype [T, H, D], weights fp32 [T, H]).

    cos, sin fp32 [T, rope dims / 2]; D is a power of two if fp8. Rows of q and gate may have any
    stride. `pdl`: None runs the reference, a mode the Triton kernel in that mode.
    """
    assert gate.shape == q.shape[:2], f"gate {tuple(gate.shape)}, q {tuple(q.shape)}"
    assert gate.dtype == torch.float32, f"gate {gate.dtype} is not fp32"
    assert_angles(q, cos, sin, 2 * cos.shape[-1])
    assert 2 * cos.shape[-1] <= q.shape[-1], f"cos {tuple(cos.shape)}, q {tuple(q.shape)}"
    mode = triton_mode(q, pdl)
    if mode is None:
        fold = folding(q.device.type)
        return index_q_prep_ref(
            q, gate, cos, sin, interleaved, softmax_scale, head_scale, fp8, fold
        )
    from minidsv.kernels import indexer_prep_triton

    return indexer_prep_triton.index_q_prep(
        q, gate, cos, sin, interleaved, softmax_scale, head_scale, fp8, mode
    )


def index_k_write(
    buffer: Tensor,
    loc: Tensor,
    k: Tensor,
    gain: Tensor,
    bias: Tensor,
    eps: float,
    cos: Tensor,
    sin: Tensor,
    interleaved: bool,
    pdl: PdlMode | None = None,
) -> None:
    """Write the keys of k [T, D] (rows of any stride) to slots loc [T] of the index cache.

    buffer as index_cache.py has it: [pages, 64, D], or uint8 [pages, 64 * (D + 4)]; gain and bias
    [D] fp32; cos, sin fp32 [T, rope dims / 2]. `pdl`: None runs the reference, a mode the kernel.
    """
    dim = k.shape[-1]
    assert loc.shape == k.shape[:1], f"loc {tuple(loc.shape)}, k {tuple(k.shape)}"
    assert loc.dtype in (torch.int32, torch.int64), f"loc {loc.dtype} is not int32 or int64"
    page = (fp8_page_bytes(dim),) if buffer.dtype == torch.uint8 else (PAGE_SIZE, dim)
    assert buffer.shape[1:] == page, f"buffer {tuple(buffer.shape)} is not [pages, *{page}]"
    assert buffer.is_contiguous(), f"buffer strides {buffer.stride()}: want contiguous pages"
    for name, vector in (("gain", gain), ("bias", bias)):
        assert vector.shape == (dim,), f"{name} {tuple(vector.shape)} is not [{dim}]"
    assert_angles(k, cos, sin, 2 * cos.shape[-1])
    mode = triton_mode(buffer, pdl)
    if mode is None:
        return index_k_write_ref(buffer, loc, k, gain, bias, eps, cos, sin, interleaved)
    from minidsv.kernels import indexer_prep_triton

    return indexer_prep_triton.index_k_write(
        buffer, loc, k, gain, bias, eps, cos, sin, interleaved, mode
    )


def index_q_prep_cost(
    tokens: int, heads: int, dim: int, rope_dim: int, fp8: bool, itemsize: int = 2
) -> tuple[int, int]:
    """Bytes (q, its result, gates twice, cos and sin) and FLOPs (a fast Hadamard transform's)."""
    rows = tokens * heads
    moved = rows * (dim * (itemsize + (1 if fp8 else itemsize)) + 8) + 4 * tokens * rope_dim
    return moved, rows * (3 * rope_dim + (dim * (dim.bit_length() + 1) if fp8 else 0))


def index_k_write_cost(
    tokens: int, dim: int, rope_dim: int, fp8: bool, itemsize: int = 2
) -> tuple[int, int]:
    """Bytes (k, the key written, gain and bias, loc, cos and sin) and FLOPs."""
    written = dim + 4 if fp8 else dim * itemsize
    flops = 7 * dim + 3 * rope_dim + (dim * (dim.bit_length() + 1) if fp8 else 0)
    return tokens * (dim * itemsize + written + 8 + 4 * rope_dim) + 8 * dim, tokens * flops
