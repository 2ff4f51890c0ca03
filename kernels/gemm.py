"""Linear layers: y[t, o] = sum_i x[t, i] w[o, i], summed in fp32 and rounded once to the output.

    BF16 weights    as they are
    FP8 weights     w[o, i] = w8[o, i] * scale[o // 128, i // 128]; x is not quantised (W8A16), or
                    in groups of 128 a token where `activations` says so (W8A8)

`linear` is one projection (o_proj; with fp32 output lm_head, the small gates and the router of more
than one token), `fused_linear` up to four of the same x in one launch, or two where programs share
the sums, `normed_linear` the same of a norm that is still to be applied, which for one token takes
no launch of its own:

    w rms_norm(h) = (w (h gain)) / sqrt(mean(h^2) + eps)        h = out + residual

`fused_a_gemm` is its use at the head of an attention layer (the "fused A GEMM" of TensorRT-LLM and
SGLang, with the indexer's projections). Called by every layer. Kernels: gemv_triton (one token),
gemm_triton (the others), parts_triton (sums that programs shared), gemm_fp8_triton (W8A8).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from minidsv.kernels.norm import PreNorm, assert_pre_norm, pre_norm
from minidsv.kernels.pdl import PdlMode, triton_mode
from minidsv.kernels.quant import (
    Activations,
    block_scale_shape,
    dequantize_fp8_blocks,
    is_quantised,
    rounded_to_fp8,
)

MAX_SEGMENTS = 4
WEIGHT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True)
class Segment:
    """One projection: weight [out, in], block scales if e4m3, the output's dtype (None: x's)."""

    weight: Tensor
    scale: Tensor | None = None
    out_dtype: torch.dtype | None = None


def linear_ref(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    activations: Activations = "none",
) -> Tensor:
    """The projection in PyTorch."""
    out_dtype = out_dtype or x.dtype
    if scale is not None:
        x = rounded_to_fp8(x, activations)
        return F.linear(x.float(), dequantize_fp8_blocks(weight, scale)).to(out_dtype)
    if out_dtype == x.dtype == weight.dtype:
        return F.linear(x, weight)
    return F.linear(x.float(), weight.float()).to(out_dtype)


def _assert_segment(x: Tensor, segment: Segment) -> None:
    weight, scale = segment.weight, segment.scale
    assert x.dim() == 2, f"x {tuple(x.shape)} is not [T, in]"
    assert weight.dim() == 2, f"weight {tuple(weight.shape)} is not [out, in]"
    assert weight.shape[1] == x.shape[1], f"x {tuple(x.shape)}, weight {tuple(weight.shape)}"
    if scale is None:
        assert weight.dtype in WEIGHT_DTYPES, f"weight {weight.dtype} without scales"
        same = weight.dtype == x.dtype or segment.out_dtype == torch.float32
        assert same, f"x {x.dtype}, weight {weight.dtype}: one dtype, or fp32 out"
    else:
        assert weight.dtype == torch.float8_e4m3fn, f"weight {weight.dtype} with scales"
        want = block_scale_shape(weight.shape[0], weight.shape[1])
        assert tuple(scale.shape) == want, f"scale {tuple(scale.shape)} is not {want}"
        assert scale.dtype == torch.float32, f"scale {scale.dtype} is not float32"


def _assert_segments(x: Tensor, segments: Sequence[Segment]) -> None:
    assert 1 <= len(segments) <= MAX_SEGMENTS, f"{len(segments)} segments: 1 to {MAX_SEGMENTS}"
    for segment in segments:
        _assert_segment(x, segment)


def linear(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    pdl: PdlMode | None = None,
    activations: Activations = "none",
) -> Tensor:
    """x [T, in], weight [out, in], scale [ceil(out/128), ceil(in/128)] if e4m3 -> [T, out].

    `out_dtype` None is x's; float32 keeps the accumulator (lm_head, the router, the indexer's
    gate). `pdl`: None runs the reference, a mode the Triton kernel in that mode. `activations`:
    what an FP8 weight is multiplied with.
    """
    return fused_linear(x, (Segment(weight, scale, out_dtype),), pdl, activations)[0]


def fused_linear(
    x: Tensor,
    segments: Sequence[Segment],
    pdl: PdlMode | None = None,
    activations: Activations = "none",
) -> list[Tensor]:
    """Up to 4 projections of one x [T, in] -> one [T, out] each, in order."""
    _assert_segments(x, segments)
    mode = triton_mode(x, pdl)
    if mode is None:
        return [linear_ref(x, s.weight, s.scale, s.out_dtype, activations) for s in segments]
    if is_quantised(activations, x.shape[1]):
        return _fused_fp8(x, segments, activations == "fp8_ue8m0", mode)
    from minidsv.kernels.linear_triton import project

    return project(x, segments, mode)[0]


def _fused_fp8(x: Tensor, segments: Sequence[Segment], ue8m0: bool, mode: PdlMode) -> list[Tensor]:
    """FP8 weights in one launch, and the others, whose x stays as it is, in one of their own."""
    from minidsv.kernels.gemm_fp8_triton import project_fp8
    from minidsv.kernels.linear_triton import project

    fp8 = [s for s in segments if s.scale is not None]
    others = [s for s in segments if s.scale is None]
    ours = iter(project_fp8(x, fp8, ue8m0, mode) if fp8 else ())
    theirs = iter(project(x, others, mode)[0] if others else ())
    return [next(theirs if s.scale is None else ours) for s in segments]


def normed_linear(
    x: PreNorm,
    segments: Sequence[Segment],
    pdl: PdlMode | None = None,
    activations: Activations = "none",
) -> tuple[list[Tensor], Tensor]:
    """fused_linear of the norm of x [T, in] -> (one [T, out] each, the next block's residual).

    The Triton kernels round x * gain to x's dtype, or nothing, instead of the norm.
    """
    assert_pre_norm(x)
    _assert_segments(x.residual, segments)
    mode = triton_mode(x.residual, pdl)
    if mode is None or is_quantised(activations, x.residual.shape[1]):
        normed, residual = pre_norm(x, mode)
        return fused_linear(normed, segments, mode, activations), residual
    from minidsv.kernels.linear_triton import project

    return project(x.residual, segments, mode, x)


def fused_a_gemm(
    x: PreNorm,
    q_a: Segment,
    kv_a: Segment,
    wk: Segment | None,
    weights_proj: Tensor | None,
    pdl: PdlMode | None = None,
    activations: Activations = "none",
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor]:
    """Everything that an attention layer projects from the norm of x [T, hidden].

    q_a [q_lora, hidden], kv_a [kv_lora + rope, hidden], the indexer's wk [128, hidden] and
    weights_proj [index heads, hidden], both None in a layer that owns no indexer -> the four
    outputs in that order, weights_proj's in fp32, and the next block's residual.
    """
    segments = [q_a, kv_a]
    if wk is not None:
        segments.append(wk)
    if weights_proj is not None:
        segments.append(Segment(weights_proj, out_dtype=torch.float32))
    projected, residual = normed_linear(x, segments, pdl, activations)
    outputs = iter(projected)
    return (
        next(outputs),
        next(outputs),
        None if wk is None else next(outputs),
        None if weights_proj is None else next(outputs),
        residual,
    )


def fused_linear_cost(tokens: int, segments: Sequence[Segment]) -> tuple[int, int]:
    """(compulsory bytes: weights, scales, x and outputs once; FLOPs) with bf16 activations."""
    hidden = segments[0].weight.shape[1]
    nbytes, outputs = tokens * hidden * 2, 0
    for s in segments:
        rows = s.weight.shape[0]
        nbytes += s.weight.nbytes + (0 if s.scale is None else s.scale.nbytes)
        nbytes += tokens * rows * (s.out_dtype or torch.bfloat16).itemsize
        outputs += rows
    return nbytes, 2 * tokens * hidden * outputs


def normed_linear_cost(
    tokens: int, segments: Sequence[Segment], adds: bool = True
) -> tuple[int, int]:
    """fused_linear_cost and the gain; where the norm `adds`, the block's output and the sum too."""
    nbytes, flops = fused_linear_cost(tokens, segments)
    hidden = segments[0].weight.shape[1]
    moved = 2 * 2 * tokens * hidden if adds else 0
    return nbytes + 4 * hidden + moved, flops + 4 * tokens * hidden
