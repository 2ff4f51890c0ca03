"""Triton GEMM under `fused_linear` with FP8 activations: e4m3 by e4m3 on the tensor cores.

    y[t, o] = sum_b xs[t, b] s[o // 128, b] sum_{k in block b} x8[t, k] w8[o, k]

Tokens are the tensor cores' M side, so that a thread owns few of their scales. A program multiplies
a tile of tokens with two tiles of rows: both sums of a block of 128 columns are scaled into fp32
totals before the next block's, for which few registers are left. Columns are whole blocks.
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import cdiv

from minidsv.kernels.gemm import Segment
from minidsv.kernels.launch import KernelSpec, Row, pdl_begin, pdl_end
from minidsv.kernels.pdl import PdlMode
from minidsv.kernels.quant_triton import quantize_groups
from minidsv.kernels.segments_triton import Arguments, locate, select, slots, store, tiles
from minidsv.kernels.tiles_gemm import FP8_LINEAR, TOKEN_TILES


@triton.jit
def grouped(program, token_tiles, row_tiles, GROUP: tl.constexpr):
    """(tile of tokens, tile of rows): programs that run together share up to GROUP of the former,
    and the rows, which then come from L2."""
    group, within = program // (GROUP * row_tiles), program % (GROUP * row_tiles)
    height = tl.minimum(token_tiles - group * GROUP, GROUP)
    return group * GROUP + within % height, within // height


@triton.jit
def _add_scaled(total, sums, scale, AT_ONCE: tl.constexpr):
    """total + sums * scale[:, None]; AT_ONCE: before the next product is begun, not when the
    compiler likes, which may need more registers than there are."""
    if AT_ONCE:
        return tl.inline_asm_elementwise(
            "fma.rn.f32 $0, $1, $2, $3;", "=f,f,f,f",
            [sums, tl.broadcast_to(scale[:, None], sums.shape), total],
            dtype=tl.float32, is_pure=False, pack=1,
        )  # fmt: skip
    return total + sums * scale[:, None]


@triton.jit
def pair(
    x, xs, w0, w1, s0, s1, blocks,
    BT: tl.constexpr, ROWS: tl.constexpr, AT_ONCE: tl.constexpr = False,
):  # fmt: skip
    """x [BT] and w0, w1 [ROWS] point to rows of `blocks` blocks, xs [BT] and the scalars s0, s1 to
    the scales of the first -> both products, fp32 [BT, ROWS]."""
    k = tl.arange(0, 128)[None, :]
    x, w0, w1 = x[:, None] + k, w0[:, None] + k, w1[:, None] + k
    total0, total1 = tl.zeros((BT, ROWS), tl.float32), tl.zeros((BT, ROWS), tl.float32)
    for block in range(blocks):
        token, rows0, rows1 = tl.load(x), tl.load(w0), tl.load(w1)
        scale = tl.load(xs + block)
        sums0 = tl.dot(token, tl.trans(rows0))
        total0 = _add_scaled(total0, sums0, scale * tl.load(s0 + block), AT_ONCE)
        sums1 = tl.dot(token, tl.trans(rows1))
        total1 = _add_scaled(total1, sums1, scale * tl.load(s1 + block), AT_ONCE)
        x, w0, w1 = x + 128, w0 + 128, w1 + 128
    return total0, total1


@triton.jit(do_not_specialize=("m", "n0", "n1", "n2", "n3"))
def _linear_fp8_kernel(
    x, xs, w0, w1, w2, w3, s0, s1, s2, s3, o0, o1, o2, o3, n0, n1, n2, n3, m, k_size,
    BT: tl.constexpr, ROWS: tl.constexpr, GROUP: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    token_tiles = tl.cdiv(m, BT)
    tile, rows = grouped(tl.program_id(0), token_tiles, tl.num_programs(0) // token_tiles, GROUP)
    slot, n, row = locate(rows, w0, w1, w2, w3, n0, n1, n2, n3, 2 * ROWS, 2 * ROWS)
    w, s = select(slot, w0, w1, w2, w3, w0), select(slot, s0, s1, s2, s3, s0)
    blocks = k_size // 128
    token = tile * BT + tl.arange(0, BT)
    at = tl.minimum(token, m - 1).to(tl.int64)
    line = row + tl.arange(0, ROWS)
    low = w + tl.minimum(line, n - 1).to(tl.int64) * k_size
    high = w + tl.minimum(line + ROWS, n - 1).to(tl.int64) * k_size
    scale = s + row // 128 * blocks
    other = s + tl.minimum(row + ROWS, n - 1) // 128 * blocks
    pdl_begin(PDL)
    y, z = pair(x + at * k_size, xs + at * blocks, low, high, scale, other, blocks, BT, ROWS)
    out = token.to(tl.int64)[:, None] * n + line[None, :]
    store(slot, o0, o1, o2, o3, out, y, (token < m)[:, None] & (line < n)[None, :])
    store(slot, o0, o1, o2, o3, out + ROWS, z, (token < m)[:, None] & (line < n - ROWS)[None, :])
    pdl_end(PDL)


_SIZES = {"BT": FP8_LINEAR.block_m, "ROWS": FP8_LINEAR.block_n // 2, "GROUP": TOKEN_TILES}


def _rows() -> tuple[Row, ...]:
    arguments: Arguments = {"x": "*fp8e4nv:16", "xs": "*fp32:16", "m": "i32", "k_size": "i32:16"}
    for slot in range(4):
        arguments |= {f"w{slot}": "*fp8e4nv:16", f"s{slot}": "*fp32:16"}
        arguments |= {f"o{slot}": "*bf16:16", f"n{slot}": "i32"}
    return (Row(arguments | _SIZES, FP8_LINEAR.num_warps, FP8_LINEAR.num_stages),)


LINEAR_FP8 = KernelSpec(_linear_fp8_kernel, _rows(), fp_fusion=True)
SPECS = (LINEAR_FP8,)


def project_fp8(x: Tensor, segments: Sequence[Segment], ue8m0: bool, mode: PdlMode) -> list[Tensor]:
    """x [T, in], whole blocks of it, through each FP8 segment -> [T, out] each."""
    codes, scales = quantize_groups(x, 128, ue8m0, mode)
    outputs = [
        torch.empty(len(x), len(s.weight), dtype=s.out_dtype or x.dtype, device=x.device)
        for s in segments
    ]
    for s in segments:
        assert s.weight.is_contiguous(), f"weight strides {s.weight.stride()}: want contiguous"
        assert s.scale is not None, "a weight without scales"
        assert s.scale.is_contiguous(), f"scale strides {s.scale.stride()}: want contiguous"
    args: dict[str, Any] = slots(segments, outputs) | _SIZES
    args |= {"x": codes, "xs": scales, "m": len(x), "k_size": x.shape[1]}
    tile = FP8_LINEAR
    grid = (cdiv(len(x), tile.block_m) * tiles(args, tile.block_n, tile.block_n),)
    LINEAR_FP8.launch(grid, mode, args, tile.num_warps, tile.num_stages)
    return outputs
