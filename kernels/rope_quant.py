"""Queries and keys of MLA, rotated and quantised to e4m3 over one scalar scale each: what attention
over the flat FP8 cache reads.

    q8_nope = e4m3(q_nope / q_scale)    q8_pe = e4m3(rope(q_pe) / q_scale)    k likewise, k_scale

Interleaved RoPE; fp32 throughout, one rounding, saturated at 448. Backends: `triton`, our kernel;
`flashinfer`, its op of this name (0.6.12), the one whose `enable_pdl` SGLang PR 23965 sets. They
may differ by one e4m3 step where FlashInfer contracts or multiplies by the reciprocal scale.
"""

from typing import Literal

import torch
from torch import Tensor

from minidsv.kernels.pdl import PdlMode, triton_mode
from minidsv.kernels.quant import E4M3_MAX
from minidsv.kernels.rope import apply_rope_ref, assert_angles

RopeQuantBackend = Literal["triton", "flashinfer"]
Quartet = tuple[Tensor, Tensor, Tensor, Tensor]  # q8_nope, q8_pe, k8_nope, k8_pe


def mla_rope_quantize_fp8_ref(
    q_nope: Tensor,
    q_pe: Tensor,
    k_nope: Tensor,
    k_pe: Tensor,
    cos: Tensor,
    sin: Tensor,
    q_scale: float = 1.0,
    k_scale: float = 1.0,
) -> Quartet:
    """mla_rope_quantize_fp8 in PyTorch."""
    q_turned = apply_rope_ref(q_pe.float(), cos, sin, interleaved=True)
    k_turned = apply_rope_ref(k_pe.float(), cos, sin, interleaved=True)
    return (
        _quantize(q_nope, q_scale),
        _quantize(q_turned, q_scale),
        _quantize(k_nope, k_scale),
        _quantize(k_turned, k_scale),
    )


def _quantize(x: Tensor, scale: float) -> Tensor:
    return (x.float() / scale).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)


def mla_rope_quantize_fp8(
    q_nope: Tensor,
    q_pe: Tensor,
    k_nope: Tensor,
    k_pe: Tensor,
    cos: Tensor,
    sin: Tensor,
    q_scale: float = 1.0,
    k_scale: float = 1.0,
    backend: RopeQuantBackend = "triton",
    pdl: PdlMode | None = None,
) -> Quartet:
    """q_nope [T, H, C], q_pe [T, H, r], k_nope [T, C], k_pe [T, r] -> the same shapes in e4m3.

    Last axes contiguous, other strides free; cos and sin fp32 [T, r / 2]. `pdl`: None runs the
    reference, a mode `backend`'s kernel in that mode (CPU tensors: the reference).
    """
    assert backend in ("triton", "flashinfer"), f"backend {backend!r}: triton or flashinfer"
    tokens, heads, c, r = *q_nope.shape, q_pe.shape[-1]
    for name, x, shape in (
        ("q_pe", q_pe, (tokens, heads, r)),
        ("k_nope", k_nope, (tokens, c)),
        ("k_pe", k_pe, (tokens, r)),
    ):
        assert x.shape == shape, f"{name} {tuple(x.shape)} is not {shape}"
        assert x.dtype == q_nope.dtype, f"{name} {x.dtype}, q_nope {q_nope.dtype}"
    assert_angles(q_pe, cos, sin, r)
    mode = triton_mode(q_nope, pdl)
    if mode is None:
        return mla_rope_quantize_fp8_ref(q_nope, q_pe, k_nope, k_pe, cos, sin, q_scale, k_scale)
    if backend == "flashinfer":
        return _flashinfer(q_nope, q_pe, k_nope, k_pe, cos, sin, q_scale, k_scale, mode)
    from minidsv.kernels.rope_quant_triton import rope_quantize

    return rope_quantize(q_nope, q_pe, k_nope, k_pe, cos, sin, q_scale, k_scale, mode)


def _flashinfer(
    q_nope: Tensor,
    q_pe: Tensor,
    k_nope: Tensor,
    k_pe: Tensor,
    cos: Tensor,
    sin: Tensor,
    q_scale: float,
    k_scale: float,
    mode: PdlMode,
) -> Quartet:
    """Its cache has a row of cos, then sin, a position: here a row a token; its scales multiply."""
    from flashinfer.rope import mla_rope_quantize_fp8 as flashinfer_op

    tokens = torch.arange(len(cos), device=cos.device, dtype=torch.int32)
    q8_pe, k8_pe, q8_nope, k8_nope = flashinfer_op(
        q_rope=q_pe,
        k_rope=k_pe,
        q_nope=q_nope,
        k_nope=k_nope,
        cos_sin_cache=torch.cat((cos, sin), -1),
        pos_ids=tokens,
        is_neox=False,
        quantize_dtype=torch.float8_e4m3fn,
        quant_scale_q=1.0 / q_scale,
        quant_scale_kv=1.0 / k_scale,
        enable_pdl=mode != "off",
    )
    return q8_nope, q8_pe, k8_nope, k8_pe


def mla_rope_quantize_fp8_cost(
    tokens: int, heads: int, c: int, r: int, itemsize: int = 2
) -> tuple[int, int]:
    """Bytes (inputs, e4m3 results, cos and sin) and FLOPs."""
    values = tokens * (heads + 1) * (c + r)
    return values * (itemsize + 1) + 4 * tokens * r, values + 3 * tokens * (heads + 1) * r
