"""Triton GEMV under `fused_linear` for one token: weights stream once through the CUDA cores.

One program owns BLOCK_N rows of one projection. A thread holds the same eight columns of every row
of a [BLOCK_N, BLOCK_K] tile, so x is read once a tile and no thread talks to another before the
end; sums of eight products are scaled (FP8: the row block's scale of their 128 columns) and added
up in fp32. The first tile is loaded before the wait.

With NORM the weights multiply rms_norm(x + update) instead of x. As every program reads all of x,
each sums its squares on the way, multiplies the gain to x and the rest of the norm to its outputs;
between them they store x + update to `total`. Without, update, total and gain stand for x.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from minidsv.kernels.launch import KernelSpec, pdl_begin, pdl_end
from minidsv.kernels.norm import PreNorm
from minidsv.kernels.segments_triton import (
    WEIGHTS,
    has_type,
    launch_rows,
    locate,
    select,
    store,
)
from minidsv.kernels.tile import Tile


@triton.jit
def _weights(w, row, n, k_size, k0, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """[BLOCK_N, BLOCK_K] of w from (row, k0) on, 0 outside; eight a thread, as x has them."""
    r = tl.arange(0, BLOCK_N)[:, None]
    k = k0 + tl.arange(0, BLOCK_K)[None, :]
    pointers = w + row.to(tl.int64) * k_size + (r * k_size + k)
    mask = (row + r < n) & (k < k_size)
    return tl.load(tl.max_contiguous(pointers, [1, 8]), mask=mask, other=0.0)


@triton.jit
def _operand(x, norm, k, end, turn, NORM: tl.constexpr):
    """x at the columns k < end; with NORM the fp32 of x + update times the gain. Beside it the
    squares of the sum.

    `norm` is (update, total, gain, 1 to add or 0). The program whose `turn` it is stores the sum.
    """
    values = tl.load(x + k, mask=k < end, other=0.0)
    squares = 0.0
    if NORM:
        update, total, gain, added = norm
        wide = values.to(tl.float32)
        wide += tl.load(update + k, mask=k < end * added, other=0.0).to(tl.float32)
        mine = (turn % tl.num_programs(0) == tl.program_id(0)).to(tl.int32)
        tl.store(total + k, wide.to(total.dtype.element_ty), mask=k < end * added * mine)
        squares = wide * wide
        values = wide * tl.load(gain + k, mask=k < end, other=0.0)
    return values, squares


@triton.jit
def _products(
    weights, scale, x, norm, k_size, k0,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """[BLOCK_N, BLOCK_K / 8] sums of eight products; `scale` is the row block's. With NORM also
    [BLOCK_K / 8] sums of eight squares, else 0."""
    k = k0 + tl.arange(0, BLOCK_K)
    values, squares = _operand(x, norm, k, k_size, k0 // BLOCK_K, NORM)
    products = weights.to(tl.float32) * values.to(tl.float32)[None, :]
    sums = tl.sum(tl.reshape(products, [BLOCK_N, BLOCK_K // 8, 8]), 2)
    if weights.dtype == tl.float8e4nv:
        at = k0 + tl.arange(0, BLOCK_K // 8) * 8
        sums *= tl.load(scale + at // 128, mask=at < k_size, other=0.0)[None, :]
    if NORM:
        squares = tl.sum(tl.reshape(squares, [BLOCK_K // 8, 8]), 1)
    return sums, squares


@triton.jit
def _rows(
    tile, w, s, x, norm, eps, row, n, k_size,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """[BLOCK_N] outputs; `tile` holds the first BLOCK_K columns."""
    scale = s + (row // 128) * tl.cdiv(k_size, 128)
    total, squares = _products(tile, scale, x, norm, k_size, 0, BLOCK_N, BLOCK_K, NORM)
    for k0 in range(BLOCK_K, k_size, BLOCK_K):
        tile = _weights(w, row, n, k_size, k0, BLOCK_N, BLOCK_K)
        sums, more = _products(tile, scale, x, norm, k_size, k0, BLOCK_N, BLOCK_K, NORM)
        total += sums
        if NORM:
            squares += more
    y = tl.sum(total, 1)
    return y * tl.rsqrt(tl.sum(squares) / k_size + eps) if NORM else y


@triton.jit(do_not_specialize=("n0", "n1", "n2", "n3", "added"))
def _gemv_kernel(
    x, w0, w1, w2, w3, s0, s1, s2, s3, o0, o1, o2, o3, n0, n1, n2, n3, k_size,
    update, total, gain, added, eps,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, OTHER_N: tl.constexpr, NORM: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    MIXED: tl.constexpr = w0.dtype != w3.dtype
    slot, n, row = locate(tl.program_id(0), w0, w1, w2, w3, n0, n1, n2, n3, BLOCK_N, OTHER_N)
    w = select(slot, w0, w1, w2, w3, w0)
    s = select(slot, s0, s1, s2, s3, s0)
    main = has_type(slot, w0, w1, w2, w3, w0)
    readable = tl.where(main, n, 0)  # nothing is read for a program of the other type
    norm = (update, total, gain, added)
    if PDL == "prefetch":
        tile = _weights(w, row, readable, k_size, 0, BLOCK_N, BLOCK_K)
        if MIXED:
            w_other = select(slot, w0, w1, w2, w3, w3)
            other = _weights(w_other, row, n - readable, k_size, 0, OTHER_N, BLOCK_K)
    pdl_begin(PDL)
    if PDL != "prefetch":
        tile = _weights(w, row, readable, k_size, 0, BLOCK_N, BLOCK_K)
        if MIXED:
            w_other = select(slot, w0, w1, w2, w3, w3)
            other = _weights(w_other, row, n - readable, k_size, 0, OTHER_N, BLOCK_K)
    if main:
        y = _rows(tile, w, s, x, norm, eps, row, n, k_size, BLOCK_N, BLOCK_K, NORM)
        at = row + tl.arange(0, BLOCK_N)
        store(slot, o0, o1, o2, o3, at, y, at < n)
    elif MIXED:
        s_other = select(slot, s0, s1, s2, s3, s3)
        z = _rows(other, w_other, s_other, x, norm, eps, row, n, k_size, OTHER_N, BLOCK_K, NORM)
        at_other = row + tl.arange(0, OTHER_N)
        store(slot, o0, o1, o2, o3, at_other, z, at_other < n)
    pdl_end(PDL)


def sizes(tile: Tile) -> dict[str, int]:
    """The kernel's constants; a program has half as many rows of a wider second type."""
    return {
        "BLOCK_N": tile.block_n,
        "BLOCK_K": tile.block_k,
        "OTHER_N": max(1, tile.block_n // 2),
    }


def norm_arguments(x: Tensor, norm: PreNorm | None) -> tuple[dict[str, Any], Tensor]:
    """(the arguments of the norm of x, which is norm.residual; x or the sum, which is new)."""
    if norm is None:
        return {"update": x, "total": x, "gain": x, "added": 0, "eps": 0.0, "NORM": False}, x
    added = norm.out is not None
    update = x if norm.out is None else norm.out
    assert update.stride() == x.stride(), f"x strides {x.stride()}, update {update.stride()}"
    total = torch.empty(x.shape, dtype=x.dtype, device=x.device) if added else x
    args = {"update": update, "total": total, "gain": norm.gain, "added": int(added)}
    return args | {"eps": norm.eps, "NORM": True}, total


def _spec(size: int) -> KernelSpec:
    """Of weights of `size` bytes."""
    rows = launch_rows(size, lambda tiles: (tiles.gemv,), sizes)
    return KernelSpec(_gemv_kernel, rows, WEIGHTS, fp_fusion=True)


GEMV = {1: _spec(1), 2: _spec(2)}
SPECS = tuple(GEMV.values())
