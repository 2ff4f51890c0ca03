"""Triton kernel under `quant.per_token_group_quant_fp8`, and the casts that other kernels share."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import cdiv

from minidsv.kernels.constants import FP8_BLOCK
from minidsv.kernels.launch import KernelSpec, Row, pdl_begin, pdl_end
from minidsv.kernels.launch_config import launch_config
from minidsv.kernels.pdl import PdlMode
from minidsv.kernels.quant import AMAX_FLOOR, E4M3_MAX
from minidsv.kernels.tiles_small import TABLES


@triton.jit
def to_e4m3(x, MAX: tl.constexpr):
    """Saturated at MAX; NaN stays."""
    return tl.clamp(x, -MAX, MAX, tl.PropagateNan.ALL).to(tl.float8e4nv)


@triton.jit
def divide(x, scale):
    """x / scale, correctly rounded, with one division a scale instead of one a value.

    Markstein: so is a quotient by a correctly rounded reciprocal, corrected once by its remainder.
    A zero keeps its sign and an overflow its infinity.
    """
    inverse = tl.div_rn(1.0, scale)
    q = x * inverse
    exact = tl.fma(tl.fma(-q, scale, x), inverse, q)
    return tl.where((q != 0.0) & (tl.abs(q) < 1e30), exact, q)


@triton.jit
def fp8_scale(amax, UE8M0: tl.constexpr, MAX: tl.constexpr, FLOOR: tl.constexpr):
    """The scale of a group whose largest |x| is amax; UE8M0 rounds it up to 2^k."""
    scale = tl.maximum(amax, FLOOR) * (1.0 / MAX)
    if UE8M0:
        bits = scale.to(tl.int32, bitcast=True)
        scale = ((bits + 0x7FFFFF) & 0x7F800000).to(tl.float32, bitcast=True)
    return scale


@triton.jit(do_not_specialize=["GROUPS"])
def _quantize_groups_kernel(
    x, out, scales, x_stride, GROUPS,
    GROUP: tl.constexpr, BG: tl.constexpr, UE8M0: tl.constexpr,
    MAX: tl.constexpr, FLOOR: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    g = tl.program_id(1) * BG + tl.arange(0, BG)
    at = g[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    inside = (g < GROUPS)[:, None]
    pdl_begin(PDL)
    wide = tl.load(x + token * x_stride + at, mask=inside, other=0.0).to(tl.float32)
    scale = fp8_scale(tl.max(tl.abs(wide), 1), UE8M0, MAX, FLOOR)
    q = to_e4m3(divide(wide, scale[:, None]), MAX)
    tl.store(out + token * GROUPS * GROUP + at, q, mask=inside)
    tl.store(scales + token * GROUPS + g, scale, mask=g < GROUPS)
    pdl_end(PDL)


FP8_LIMITS: dict[str, str | int | float] = {"MAX": E4M3_MAX, "FLOOR": AMAX_FLOOR}


def _rows() -> tuple[Row, ...]:
    arguments = {"x": "*bf16:16", "out": "*fp8e4nv:16", "scales": "*fp32:16"} | FP8_LIMITS
    arguments |= {"x_stride": "i32:16", "GROUPS": "i32", "GROUP": FP8_BLOCK}
    return tuple(
        Row(arguments | {"BG": tile.block_m, "UE8M0": ue8m0}, tile.num_warps)
        for tile in TABLES["quantize_groups"]
        for ue8m0 in (False, True)
    )


QUANTIZE_GROUPS = KernelSpec(_quantize_groups_kernel, _rows())
SPECS = (QUANTIZE_GROUPS,)


def quantize_groups(
    x: Tensor, group_size: int, ue8m0: bool, mode: PdlMode
) -> tuple[Tensor, Tensor]:
    """x [T, D], last axis contiguous -> e4m3 [T, D], fp32 [T, D / group_size]."""
    assert x.dim() == 2, f"x {tuple(x.shape)} is not [T, D]"
    assert x.stride(1) == 1, f"x strides {x.stride()}: want contiguous rows"
    assert group_size & (group_size - 1) == 0, f"group_size {group_size} is not a power of two"
    tokens, groups = x.shape[0], x.shape[1] // group_size
    out = torch.empty(x.shape, dtype=torch.float8_e4m3fn, device=x.device)
    scales = torch.empty((tokens, groups), dtype=torch.float32, device=x.device)
    tile = launch_config("quantize_groups", tokens, (groups,))
    args: dict[str, Any] = {
        "x": x,
        "out": out,
        "scales": scales,
        "x_stride": x.stride(0),
        "GROUPS": groups,
    }
    args |= {"GROUP": group_size, "BG": tile.block_m, "UE8M0": ue8m0} | FP8_LIMITS
    QUANTIZE_GROUPS.launch((tokens, cdiv(groups, tile.block_m)), mode, args, tile.num_warps)
    return out, scales
