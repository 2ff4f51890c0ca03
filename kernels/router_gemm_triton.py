"""Triton kernels of one token's product with the router, alone and after the norm before it.

A program holds its rows of the weight in registers, all of K, loaded before the wait, and
multiplies on CUDA cores. With the norm it sees all of x + residual, so it sums the squares beside
the products, divides at the end, and writes its share of the columns of the sum and the normed sum.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import cdiv, next_power_of_2

from minidsv.kernels.launch import KernelSpec, Row, pdl_begin, pdl_end
from minidsv.kernels.norm import PreNorm
from minidsv.kernels.pdl import PdlMode
from minidsv.kernels.tile import Tile
from minidsv.kernels.tiles_moe import NORM_ROUTER_TILE, ROUTER_TILE


@triton.jit(do_not_specialize=("experts",))
def _router_gemv_kernel(
    x, weight, out, experts, hidden, BN: tl.constexpr, BLOCK_K: tl.constexpr, PDL: tl.constexpr
):  # fmt: skip
    n, k = tl.program_id(0) * BN + tl.arange(0, BN), tl.arange(0, BLOCK_K)[None, :]
    rows = weight + n.to(tl.int64)[:, None] * hidden + k
    there = (n < experts)[:, None] & (k < hidden)
    if PDL == "prefetch":
        w = tl.load(rows, mask=there, other=0.0)
        pdl_begin(PDL)
    else:
        pdl_begin(PDL)
        w = tl.load(rows, mask=there, other=0.0)
    row = tl.load(x + k, mask=k < hidden, other=0.0).to(tl.float32)
    logits = tl.sum(row * w.to(tl.float32), 1)
    tl.store(out + n, logits.to(out.dtype.element_ty), mask=n < experts)
    pdl_end(PDL)


@triton.jit
def _sum_of(x, residual, at, mask):
    """x + residual in fp32, not rounded."""
    left = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
    return left + tl.load(residual + at, mask=mask, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=("experts",))
def _norm_router_gemv_kernel(
    x, residual, gain, weight, out, normed, total, experts, hidden, eps,
    BN: tl.constexpr, BLOCK_K: tl.constexpr, SHARE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """A program stores SHARE columns of the sum and the normed sum."""
    n, k = tl.program_id(0) * BN + tl.arange(0, BN), tl.arange(0, BLOCK_K)[None, :]
    rows = weight + n.to(tl.int64)[:, None] * hidden + k
    there = (n < experts)[:, None] & (k < hidden)
    gains = gain + n[:, None] * 0 + k  # in w's shape, and so in its layout
    if PDL == "prefetch":
        w = tl.load(rows, mask=there, other=0.0)
        g = tl.load(gains, mask=there, other=0.0)
        pdl_begin(PDL)
    else:
        pdl_begin(PDL)
        w = tl.load(rows, mask=there, other=0.0)
        g = tl.load(gains, mask=there, other=0.0)
    wide = _sum_of(x, residual, k, k < hidden)
    rstd = tl.rsqrt(tl.sum(wide * wide) / hidden + eps)
    logits = tl.sum(wide * (w.to(tl.float32) * g), 1) * rstd
    tl.store(out + n, logits, mask=n < experts)
    column = tl.program_id(0) * SHARE + tl.arange(0, SHARE)
    share = _sum_of(x, residual, column, column < hidden)
    g_share = tl.load(gain + column, mask=column < hidden, other=0.0)
    tl.store(total + column, share.to(total.dtype.element_ty), mask=column < hidden)
    y = share * rstd * g_share
    tl.store(normed + column, y.to(normed.dtype.element_ty), mask=column < hidden)
    pdl_end(PDL)


HIDDEN_BLOCKS = (8192, 2048, 256)  # powers of two over the models' hidden sizes


def _rows(tile: Tile, types: dict[str, str | int | float]) -> tuple[Row, ...]:
    arguments = types | {"weight": "*bf16:16", "experts": "i32", "hidden": "i32:16"}
    return tuple(
        Row({**arguments, **_sizes(tile), "BLOCK_K": block}, tile.num_warps, tile.num_stages)
        for block in HIDDEN_BLOCKS
    )


def _sizes(tile: Tile) -> dict[str, int]:
    """With the norm, block_k columns to write: the models' experts are enough to share them out."""
    return {"BN": tile.block_n} | ({"SHARE": tile.block_k} if tile.block_k > 1 else {})


GEMV = KernelSpec(
    _router_gemv_kernel,
    tuple(
        row
        for out in ("fp32", "bf16")
        for row in _rows(ROUTER_TILE, {"x": "*bf16:16", "out": f"*{out}:16"})
    ),
    frozenset(("weight",)),
    fp_fusion=True,
)
NORM_GEMV = KernelSpec(
    _norm_router_gemv_kernel,
    _rows(
        NORM_ROUTER_TILE,
        {
            "x": "*bf16:16", "residual": "*bf16:16", "gain": "*fp32:16", "out": "*fp32:16",
            "normed": "*bf16:16", "total": "*bf16:16", "eps": "fp32",
        },
    ),
    frozenset(("weight", "gain")),
    fp_fusion=True,
)  # fmt: skip
SPECS = (GEMV, NORM_GEMV)


def multiply(x: Tensor, weight: Tensor, out_dtype: torch.dtype, mode: PdlMode) -> Tensor:
    """x [1, hidden], weight [E, hidden] -> [1, E]."""
    for name, tensor in (("x", x), ("weight", weight)):
        assert tensor.is_contiguous(), f"{name} strides {tensor.stride()}"
    assert x.dtype == weight.dtype, f"x {x.dtype}, weight {weight.dtype}"
    experts, hidden = weight.shape
    out = torch.empty((1, experts), dtype=out_dtype, device=x.device)
    tile = ROUTER_TILE
    args: dict[str, Any] = {"x": x, "weight": weight, "out": out}
    args |= {"experts": experts, "hidden": hidden, "BLOCK_K": next_power_of_2(hidden)}
    grid = (cdiv(experts, tile.block_n),)
    GEMV.launch(grid, mode, args | _sizes(tile), tile.num_warps, tile.num_stages)
    return out


def norm_multiply(x: PreNorm, weight: Tensor, mode: PdlMode) -> tuple[Tensor, Tensor, Tensor]:
    """(logits fp32 [1, E], the normed sum and the sum [1, hidden]) of weight [E, hidden]."""
    out, residual = x.out, x.residual
    assert out is not None, "no block before: nothing to add"
    for name, tensor in (("out", out), ("residual", residual), ("weight", weight)):
        assert tensor.is_contiguous(), f"{name} strides {tensor.stride()}"
        assert tensor.dtype == residual.dtype, f"{name} {tensor.dtype}, residual {residual.dtype}"
    experts, hidden = weight.shape
    logits = torch.empty((1, experts), dtype=torch.float32, device=weight.device)
    normed, total = torch.empty_like(residual), torch.empty_like(residual)
    tile = NORM_ROUTER_TILE
    args: dict[str, Any] = {
        "x": out, "residual": residual, "gain": x.gain, "weight": weight, "out": logits,
        "normed": normed, "total": total, "experts": experts, "hidden": hidden, "eps": x.eps,
        "BLOCK_K": next_power_of_2(hidden), **_sizes(tile),
    }  # fmt: skip
    grid = (max(cdiv(experts, tile.block_n), cdiv(hidden, tile.block_k)),)
    NORM_GEMV.launch(grid, mode, args, tile.num_warps, tile.num_stages)
    return logits, normed, total
