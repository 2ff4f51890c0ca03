"""Triton kernels of the router's GEMM, alone and after the norm that it reads through.

gemv   few tokens: a program holds its rows of the weight in registers, all of K, loaded before
       the wait, and multiplies one block of tokens after the other on CUDA cores
gemm   more: tensor cores, tiles of tokens and experts

With the norm a program sees all of its tokens' x + residual, so it sums the squares beside the
products, divides at the end, and writes its share of the columns of the sum and the normed sum.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import cdiv, next_power_of_2

from minidsv.kernels.launch import KernelSpec, Row, pdl_begin, pdl_end
from minidsv.kernels.launch_config import launch_config
from minidsv.kernels.norm import PreNorm
from minidsv.kernels.pdl import PdlMode
from minidsv.kernels.tile import Tile
from minidsv.kernels.tiles_moe import GEMV_TOKENS, NORM_ROUTER_TILES, ROUTER_TILES


@triton.jit(do_not_specialize=("tokens", "experts"))
def _router_gemv_kernel(
    x, weight, out, tokens, experts, hidden,
    BN: tl.constexpr, BM: tl.constexpr, BLOCK_K: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    n = (tl.program_id(0) * BN + tl.arange(0, BN))[None, :]
    m, k = tl.arange(0, BM)[:, None], tl.arange(0, BLOCK_K)[None, None, :]  # [BM, BN, BLOCK_K]
    rows = weight + n.to(tl.int64)[:, :, None] * hidden + k
    there = (n < experts)[:, :, None] & (k < hidden)
    if PDL == "prefetch":
        w = tl.load(rows, mask=there, other=0.0)
        pdl_begin(PDL)
    else:
        pdl_begin(PDL)
        w = tl.load(rows, mask=there, other=0.0)
    w = w.to(tl.float32)
    for start in range(0, tokens, BM):
        token = (start + m).to(tl.int64)
        inside = (token < tokens)[:, :, None] & (k < hidden)
        row = tl.load(x + token[:, :, None] * hidden + k, mask=inside, other=0.0).to(tl.float32)
        logits = tl.sum(row * w, 2).to(out.dtype.element_ty)
        tl.store(out + token * experts + n, logits, mask=(token < tokens) & (n < experts))
    pdl_end(PDL)


@triton.jit(do_not_specialize=("tokens", "experts"))
def _router_gemm_kernel(
    x, weight, out, tokens, experts, hidden,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    m = tl.program_id(1) * BM + tl.arange(0, BM)
    n, k = tl.program_id(0) * BN + tl.arange(0, BN), tl.arange(0, BK)
    rows = weight + tl.minimum(n, experts - 1).to(tl.int64)[:, None] * hidden
    pdl_begin(PDL)
    lines = x + tl.minimum(m, tokens - 1).to(tl.int64)[:, None] * hidden
    acc = tl.zeros((BM, BN), dtype=tl.float32)
    for start in range(0, hidden, BK):
        inside = (start + k < hidden)[None, :]
        a = tl.load(lines + (start + k)[None, :], mask=inside, other=0.0)
        w = tl.load(rows + (start + k)[None, :], mask=inside, other=0.0)
        acc = tl.dot(a, tl.trans(w), acc, input_precision="ieee")
    tl.store(
        out + m.to(tl.int64)[:, None] * experts + n[None, :],
        acc.to(out.dtype.element_ty),
        mask=(m < tokens)[:, None] & (n < experts)[None, :],
    )
    pdl_end(PDL)


@triton.jit
def _sum_of(x, residual, at, mask):
    """x + residual in fp32, not rounded."""
    left = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
    return left + tl.load(residual + at, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _store_share(
    x, residual, gain, normed, total, token, tokens, hidden, rstd, SHARE: tl.constexpr
):  # fmt: skip
    """A program's SHARE columns of the tokens' sum and normed sum; token and rstd [BM, 1]."""
    column = tl.program_id(0) * SHARE + tl.arange(0, SHARE)[None, :]
    at = token.to(tl.int64) * hidden + column
    mask = (token < tokens) & (column < hidden)
    wide = _sum_of(x, residual, at, mask)
    g = tl.load(gain + column, mask=column < hidden, other=0.0)
    tl.store(total + at, wide.to(total.dtype.element_ty), mask=mask)
    tl.store(normed + at, (wide * rstd * g).to(normed.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=("tokens", "experts"))
def _norm_router_gemv_kernel(
    x, residual, gain, weight, out, normed, total, tokens, experts, hidden, eps,
    BN: tl.constexpr, BM: tl.constexpr, BLOCK_K: tl.constexpr, SHARE: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    n = (tl.program_id(0) * BN + tl.arange(0, BN))[None, :]
    m, k = tl.arange(0, BM)[:, None], tl.arange(0, BLOCK_K)[None, None, :]  # [BM, BN, BLOCK_K]
    rows = weight + n.to(tl.int64)[:, :, None] * hidden + k
    there = (n < experts)[:, :, None] & (k < hidden)
    gains = gain + n[:, :, None] * 0 + k  # in w's shape, and so in its layout
    if PDL == "prefetch":
        w = tl.load(rows, mask=there, other=0.0)
        g = tl.load(gains, mask=there, other=0.0)
        pdl_begin(PDL)
    else:
        pdl_begin(PDL)
        w = tl.load(rows, mask=there, other=0.0)
        g = tl.load(gains, mask=there, other=0.0)
    w = w.to(tl.float32) * g
    for start in range(0, tokens, BM):
        token = (start + m).to(tl.int64)
        inside = (token < tokens)[:, :, None] & (k < hidden)
        wide = _sum_of(x, residual, token[:, :, None] * hidden + k, inside)
        rstd = tl.rsqrt(tl.sum(wide * wide, 2) / hidden + eps)  # [BM, 1]
        logits = tl.sum(wide * w, 2) * rstd
        tl.store(out + token * experts + n, logits, mask=(token < tokens) & (n < experts))
        _store_share(x, residual, gain, normed, total, token, tokens, hidden, rstd, SHARE)
    pdl_end(PDL)


@triton.jit(do_not_specialize=("tokens", "experts"))
def _norm_router_gemm_kernel(
    x, residual, gain, weight, out, normed, total, tokens, experts, hidden, eps,
    BN: tl.constexpr, BM: tl.constexpr, KS: tl.constexpr, SHARE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Each warp multiplies its own 128 columns of a step; their sums meet at the end."""
    part, k = tl.arange(0, KS)[:, None, None], tl.arange(0, 128)[None, None, :]
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    token = tl.program_id(1) * BM + tl.arange(0, BM)
    rows = weight + tl.minimum(n, experts - 1)[None, :, None] * hidden + part * 128 + k
    lines = tl.minimum(token, tokens - 1)[None, :, None] * hidden + part * 128 + k
    pdl_begin(PDL)
    squares, sums = tl.zeros((KS, BM, 128), tl.float32), tl.zeros((KS, BM, BN), tl.float32)
    for start in range(0, hidden, KS * 128):
        inside = part * 128 + k < hidden - start
        wide = _sum_of(x, residual, lines + start, inside)
        g = tl.load(gain + start + part * 128 + k, mask=inside, other=0.0)
        w = tl.load(rows + start, mask=inside, other=0.0)
        squares += wide * wide
        scaled = (wide * g).to(w.dtype)
        sums = tl.dot(scaled, tl.permute(w, (0, 2, 1)), sums, input_precision="ieee")
    rstd = tl.rsqrt(tl.sum(tl.sum(squares, 2), 0) / hidden + eps)[:, None]
    token, n = token[:, None], n[None, :]
    mask = (token < tokens) & (n < experts)
    tl.store(out + token * experts + n, tl.sum(sums, 0) * rstd, mask=mask)
    _store_share(x, residual, gain, normed, total, token, tokens, hidden, rstd, SHARE)
    pdl_end(PDL)


def _gemm_row(tile: Tile, out: str, block_k: int) -> Row:
    sizes = {"BM": tile.block_m, "BN": tile.block_n}
    sizes["BLOCK_K" if tile.block_k == 1 else "BK"] = block_k
    types: dict[str, str | int | float] = {
        "x": "*bf16:16", "weight": "*bf16:16", "out": f"*{out}:16", "tokens": "i32",
        "experts": "i32", "hidden": "i32:16",
    }  # fmt: skip
    return Row(types | sizes, tile.num_warps, tile.num_stages)


HIDDEN_BLOCKS = (8192, 2048, 256)  # powers of two over the models' hidden sizes

GEMV = KernelSpec(
    _router_gemv_kernel,
    tuple(
        _gemm_row(tile, out, block)
        for out in ("fp32", "bf16")
        for tile in ROUTER_TILES
        if tile.block_k == 1
        for block in HIDDEN_BLOCKS
    ),
    frozenset(("weight",)),
    fp_fusion=True,
)
GEMM = KernelSpec(
    _router_gemm_kernel,
    tuple(
        _gemm_row(tile, out, tile.block_k)
        for out in ("fp32", "bf16")
        for tile in ROUTER_TILES
        if tile.block_k > 1
    ),
    frozenset(("weight",)),
    fp_fusion=True,
)


def _norm_row(tile: Tile, **more: int) -> Row:
    types: dict[str, str | int | float] = {
        "x": "*bf16:16", "residual": "*bf16:16", "gain": "*fp32:16", "weight": "*bf16:16",
        "out": "*fp32:16", "normed": "*bf16:16", "total": "*bf16:16", "tokens": "i32",
        "experts": "i32", "hidden": "i32:16", "eps": "fp32", **_norm_sizes(tile),
    }  # fmt: skip
    return Row(types | more, tile.num_warps, tile.num_stages)


def _norm_sizes(tile: Tile) -> dict[str, int]:
    """Columns to write: enough for the models' numbers of experts to share out."""
    sizes = {"BM": tile.block_m, "BN": tile.block_n, "SHARE": tile.block_k}
    return sizes | ({"KS": tile.split} if tile.split > 1 else {})


NORM_GEMV = KernelSpec(
    _norm_router_gemv_kernel,
    tuple(
        _norm_row(tile, BLOCK_K=block)
        for tile in NORM_ROUTER_TILES
        if tile.split == 1
        for block in HIDDEN_BLOCKS
    ),
    frozenset(("weight", "gain")),
    fp_fusion=True,
)
NORM_GEMM = KernelSpec(
    _norm_router_gemm_kernel,
    tuple(_norm_row(tile) for tile in NORM_ROUTER_TILES if tile.split > 1),
    frozenset(("weight", "gain")),
    fp_fusion=True,
)
SPECS = (GEMV, GEMM, NORM_GEMV, NORM_GEMM)


def multiply(x: Tensor, weight: Tensor, out_dtype: torch.dtype, mode: PdlMode) -> Tensor:
    """x [T, hidden], weight [E, hidden] -> [T, E]."""
    for name, tensor in (("x", x), ("weight", weight)):
        assert tensor.is_contiguous(), f"{name} strides {tensor.stride()}"
    assert x.dtype == weight.dtype, f"x {x.dtype}, weight {weight.dtype}"
    (tokens, hidden), experts = x.shape, len(weight)
    out = torch.empty((tokens, experts), dtype=out_dtype, device=x.device)
    tile = launch_config("router_gemm", tokens, (hidden, experts))
    args: dict[str, Any] = {"x": x, "weight": weight, "out": out}
    args |= {"tokens": tokens, "experts": experts, "hidden": hidden}
    args |= {"BM": tile.block_m, "BN": tile.block_n}
    columns = cdiv(experts, tile.block_n)
    if tokens <= GEMV_TOKENS:
        grid: tuple[int, ...] = (columns if tokens else 0,)
        args["BLOCK_K"] = next_power_of_2(hidden)
        GEMV.launch(grid, mode, args, tile.num_warps, tile.num_stages)
    else:
        grid = (columns, cdiv(tokens, tile.block_m))
        GEMM.launch(grid, mode, args | {"BK": tile.block_k}, tile.num_warps, tile.num_stages)
    return out


def norm_multiply(x: PreNorm, weight: Tensor, mode: PdlMode) -> tuple[Tensor, Tensor, Tensor]:
    """(logits fp32 [T, E], the normed sum and the sum [T, hidden]) of weight [E, hidden]."""
    out, residual = x.out, x.residual
    assert out is not None, "no block before: nothing to add"
    for name, tensor in (("out", out), ("residual", residual), ("weight", weight)):
        assert tensor.is_contiguous(), f"{name} strides {tensor.stride()}"
        assert tensor.dtype == residual.dtype, f"{name} {tensor.dtype}, residual {residual.dtype}"
    (tokens, hidden), experts = residual.shape, len(weight)
    logits = torch.empty((tokens, experts), dtype=torch.float32, device=weight.device)
    normed, total = torch.empty_like(residual), torch.empty_like(residual)
    tile = launch_config("norm_router_gemm", tokens, (hidden, experts))
    args: dict[str, Any] = {
        "x": out, "residual": residual, "gain": x.gain, "weight": weight, "out": logits,
        "normed": normed, "total": total, "tokens": tokens, "experts": experts, "hidden": hidden,
        "eps": x.eps, **_norm_sizes(tile),
    }  # fmt: skip
    programs = max(cdiv(experts, tile.block_n), cdiv(hidden, tile.block_k))
    if tile.split > 1:
        grid: tuple[int, ...] = (programs, cdiv(tokens, tile.block_m))
        NORM_GEMM.launch(grid, mode, args, tile.num_warps, tile.num_stages)
    else:
        args["BLOCK_K"] = next_power_of_2(hidden)
        grid = (programs if tokens else 0,)
        NORM_GEMV.launch(grid, mode, args, tile.num_warps, tile.num_stages)
    return logits, normed, total
