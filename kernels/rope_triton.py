"""Triton kernels under `rope`, and the functions that other kernels rotate their tiles with.

cos and sin change with every step, so nothing is touched before the wait but `inv_freq`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import cdiv, next_power_of_2

from minidsv.kernels.launch import KernelSpec, Row, pdl_begin, pdl_end
from minidsv.kernels.launch_config import launch_config
from minidsv.kernels.pdl import PdlMode
from minidsv.kernels.tiles_small import TABLES

TWO_OVER_PI = tl.constexpr(0.6366197723675814)
PIO2_HIGH = tl.constexpr(1.57079637050628662109375)  # pi / 2 as the sum of three fp32
PIO2_MIDDLE = tl.constexpr(-4.37113900018624283e-8)
PIO2_LOW = tl.constexpr(-1.71512451e-15)


@triton.jit
def cos_sin(angle):
    """cos and sin of fp32 angles in [0, 2^22], within 2 ulp of 1.

    Triton's own call a libdevice function whose slow path spills. Cody and Waite's reduction: the
    first product is exact in the fused multiply-add. Taylor polynomials suffice on |r| <= pi / 4.
    """
    turns = tl.floor(angle * TWO_OVER_PI + 0.5)
    r = tl.fma(turns, -PIO2_HIGH, angle)
    r = tl.fma(turns, -PIO2_MIDDLE, r)
    r = tl.fma(turns, -PIO2_LOW, r)
    z = r * r
    s = tl.fma(z, tl.fma(z, tl.fma(z, 2.7557319e-6, -1.9841270e-4), 8.3333333e-3), -1.6666667e-1)
    s = tl.fma(s * z, r, r)
    c = tl.fma(z, tl.fma(z, tl.fma(z, -2.7557319e-7, 2.4801587e-5), -1.3888889e-3), 4.1666667e-2)
    c = tl.fma(z * z, c, tl.fma(z, -0.5, 1.0))
    quadrant = turns.to(tl.int32) & 3
    swap = (quadrant & 1) == 1
    cos = tl.where(swap, s, c)
    sin = tl.where(swap, c, s)
    cos = tl.where((quadrant == 1) | (quadrant == 2), -cos, cos)
    return cos, tl.where(quadrant >= 2, -sin, sin)


@triton.jit
def turn(a, b, cos, sin):
    """Rotate pairs (a, b); fp32."""
    return a * cos - b * sin, a * sin + b * cos


@triton.jit
def load_pairs(rows, inside, HALF: tl.constexpr, BLOCK: tl.constexpr, INTERLEAVED: tl.constexpr):
    """First and second of each pair, [N, BLOCK] (HALF of them real), from pointers `rows` [N, 1].

    One wide load if interleaved, two otherwise; `inside` [N, 1] masks rows.
    """
    i = tl.arange(0, BLOCK)[None, :]
    if INTERLEAVED:
        j = tl.arange(0, 2 * BLOCK)[None, :]
        whole = tl.load(rows + j, mask=inside & (j < 2 * HALF), other=0.0)
        a, b = tl.split(tl.reshape(whole, (rows.shape[0], BLOCK, 2)))
    else:
        a = tl.load(rows + i, mask=inside & (i < HALF), other=0.0)
        b = tl.load(rows + HALF + i, mask=inside & (i < HALF), other=0.0)
    return a, b


@triton.jit
def store_pairs(
    rows, inside, a, b, HALF: tl.constexpr, BLOCK: tl.constexpr, INTERLEAVED: tl.constexpr
):  # fmt: skip
    """The inverse of `load_pairs`; casts to the rows' dtype."""
    dtype: tl.constexpr = rows.dtype.element_ty
    i = tl.arange(0, BLOCK)[None, :]
    if INTERLEAVED:
        j = tl.arange(0, 2 * BLOCK)[None, :]
        whole = tl.reshape(tl.join(a.to(dtype), b.to(dtype)), (rows.shape[0], 2 * BLOCK))
        tl.store(rows + j, whole, mask=inside & (j < 2 * HALF))
    else:
        tl.store(rows + i, a.to(dtype), mask=inside & (i < HALF))
        tl.store(rows + HALF + i, b.to(dtype), mask=inside & (i < HALF))


@triton.jit
def load_angles(table, row, HALF: tl.constexpr, BLOCK: tl.constexpr):
    """cos or sin, [1, BLOCK], of token `row` (int64)."""
    i = tl.arange(0, BLOCK)[None, :]
    return tl.load(table + row * HALF + i, mask=i < HALF, other=0.0)


@triton.jit
def rotate(
    rows, out, inside, cos, sin, token,
    HALF: tl.constexpr, BLOCK: tl.constexpr, INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """Rows of one token (int64), from pointers [N, 1] to pointers [N, 1]."""
    c = load_angles(cos, token, HALF, BLOCK)
    s = load_angles(sin, token, HALF, BLOCK)
    a, b = load_pairs(rows, inside, HALF, BLOCK, INTERLEAVED)
    a, b = turn(a.to(tl.float32), b.to(tl.float32), c, s)
    store_pairs(out, inside, a, b, HALF, BLOCK, INTERLEAVED)


@triton.jit(do_not_specialize=["H"])
def _apply_rope_kernel(
    x, cos, sin, out, token_stride, head_stride, H,
    HALF: tl.constexpr, BLOCK: tl.constexpr, BH: tl.constexpr, INTERLEAVED: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    h = (tl.program_id(1) * BH + tl.arange(0, BH))[:, None]
    pdl_begin(PDL)
    rows = x + token * token_stride + h.to(tl.int64) * head_stride
    to = out + (token * H + h) * (2 * HALF)
    rotate(rows, to, h < H, cos, sin, token, HALF, BLOCK, INTERLEAVED)
    pdl_end(PDL)


@triton.jit(do_not_specialize=["T"])
def _cos_sin_kernel(
    positions, inv_freq, cos, sin, scale, T,
    HALF: tl.constexpr, BLOCK: tl.constexpr, BT: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    t = (tl.program_id(0) * BT + tl.arange(0, BT))[:, None]
    i = tl.arange(0, BLOCK)[None, :]
    if PDL == "prefetch":
        freq = tl.load(inv_freq + i, mask=i < HALF, other=0.0)
    pdl_begin(PDL)
    position = tl.load(positions + t, mask=t < T, other=0)
    if PDL != "prefetch":
        freq = tl.load(inv_freq + i, mask=i < HALF, other=0.0)
    c, s = cos_sin(position.to(tl.float32) * freq)
    at = t.to(tl.int64) * HALF + i
    inside = (t < T) & (i < HALF)
    tl.store(cos + at, c * scale, mask=inside)
    tl.store(sin + at, s * scale, mask=inside)
    pdl_end(PDL)


def _rope_rows() -> tuple[Row, ...]:
    arguments: dict[str, str | int | float] = dict.fromkeys(("x", "out"), "*bf16:16")
    arguments |= dict.fromkeys(("cos", "sin"), "*fp32:16")
    arguments |= {"token_stride": "i32:16", "head_stride": "i32:16", "H": "i32"}
    arguments |= {"HALF": 32, "BLOCK": 32}
    return tuple(
        Row(arguments | {"BH": tile.block_m, "INTERLEAVED": interleaved}, tile.num_warps)
        for tile in TABLES["apply_rope"]
        for interleaved in (True, False)
    )


def _cos_sin_rows() -> tuple[Row, ...]:
    arguments: dict[str, str | int | float] = dict.fromkeys(("cos", "sin", "inv_freq"), "*fp32:16")
    arguments |= {"scale": "fp32", "T": "i32", "HALF": 32, "BLOCK": 32}
    return tuple(
        Row(arguments | {"positions": f"*{ids}:16", "BT": tile.block_m}, tile.num_warps)
        for ids in ("i64", "i32")
        for tile in TABLES["rope_cos_sin"]
    )


APPLY_ROPE = KernelSpec(_apply_rope_kernel, _rope_rows())
COS_SIN = KernelSpec(_cos_sin_kernel, _cos_sin_rows(), frozenset({"inv_freq"}))
SPECS = (APPLY_ROPE, COS_SIN)


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, mode: PdlMode) -> Tensor:
    """x [T, D] or [T, H, D], last axis contiguous -> contiguous."""
    heads = x.unsqueeze(1) if x.dim() == 2 else x
    assert x.stride(-1) == 1, f"x strides {x.stride()}: want the last axis contiguous"
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    tokens, num_heads, dim = heads.shape
    tile = launch_config("apply_rope", tokens, (num_heads, dim))
    args = {"x": x, "cos": cos, "sin": sin, "out": out, "H": num_heads, "BH": tile.block_m}
    args |= {"token_stride": heads.stride(0), "head_stride": heads.stride(1)}
    args |= {"HALF": dim // 2, "BLOCK": next_power_of_2(dim // 2), "INTERLEAVED": interleaved}
    APPLY_ROPE.launch((tokens, cdiv(num_heads, tile.block_m)), mode, args, tile.num_warps)
    return out


def rope_cos_sin(
    positions: Tensor, inv_freq: Tensor, scale: float, mode: PdlMode
) -> tuple[Tensor, Tensor]:
    """positions [T], inv_freq fp32 [D / 2]."""
    assert positions.is_contiguous(), f"positions have stride {positions.stride()}"
    tokens, half = len(positions), len(inv_freq)
    cos, sin = (
        torch.empty((tokens, half), dtype=torch.float32, device=positions.device) for _ in range(2)
    )
    tile = launch_config("rope_cos_sin", tokens, (half,))
    args = {"positions": positions, "inv_freq": inv_freq, "cos": cos, "sin": sin, "scale": scale}
    args |= {"T": tokens, "HALF": half, "BLOCK": next_power_of_2(half), "BT": tile.block_m}
    COS_SIN.launch((cdiv(tokens, tile.block_m),), mode, args, tile.num_warps)
    return cos, sin
