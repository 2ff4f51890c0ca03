"""Triton kernel under `absorb_q` and `absorb_v`: one small GEMM a head, y^T = w x^T.

One program computes BLOCK_N outputs of one head for BLOCK_M tokens. Of few tokens its first BLOCK_K
columns of weights, most often all of them, are loaded before the wait; of many tokens, all columns
go through one pipeline, in less shared memory.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from minidsv.kernels import tiles_gemm
from minidsv.kernels.launch import KernelSpec, Row, pdl_begin, pdl_end
from minidsv.kernels.launch_config import launch_config
from minidsv.kernels.pdl import PdlMode
from minidsv.kernels.tile import Tile

MANY = tl.constexpr(64)  # tokens


@triton.jit
def load_weights(
    w, block, n, k_size, w_row, w_column, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr
):  # fmt: skip
    """The first BLOCK_K columns of a block of rows; w points to the head's."""
    rows, k = (block * BLOCK_N + tl.arange(0, BLOCK_N))[:, None], tl.arange(0, BLOCK_K)[None, :]
    return tl.load(w + rows * w_row + k * w_column, mask=(rows < n) & (k < k_size), other=0.0)


@triton.jit
def multiply_block(
    tile, w, x, out, block, token, m, n, k_size, x_token, out_token, w_row, w_column,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A block of one head's outputs, of the tokens from `token` on; w, x and out point to the
    head's. `tile` holds the first columns of the weights."""
    rows = (block * BLOCK_N + tl.arange(0, BLOCK_N))[:, None]
    tokens = (token + tl.arange(0, BLOCK_M))[:, None]
    k = tl.arange(0, BLOCK_K)[None, :]
    w += rows * w_row + k * w_column
    x += tokens.to(tl.int64) * x_token + k
    values = tl.load(x, mask=(tokens < m) & (k < k_size), other=0.0)
    total = tl.dot(tile, tl.trans(values))
    for k0 in range(BLOCK_K, k_size, BLOCK_K):
        tile = tl.load(w + k0 * w_column, mask=(rows < n) & (k < k_size - k0), other=0.0)
        values = tl.load(x + k0, mask=(tokens < m) & (k < k_size - k0), other=0.0)
        total = tl.dot(tile, tl.trans(values), total)
    at = tokens.to(tl.int64) * out_token + tl.trans(rows)
    y = tl.trans(total).to(out.dtype.element_ty)
    tl.store(out + at, y, mask=(tokens < m) & (tl.trans(rows) < n))


@triton.jit
def _multiply_many(
    w, x, out, block, token, m, n, k_size, x_token, out_token, w_row, w_column,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """`multiply_block` from the first column on, y = x w^T."""
    rows = (block * BLOCK_N + tl.arange(0, BLOCK_N))[:, None]
    t = tl.arange(0, BLOCK_M)[:, None]
    k = tl.arange(0, BLOCK_K)[None, :]
    w += rows * w_row + k * w_column
    x += token.to(tl.int64) * x_token + tl.minimum(t, m - 1 - token) * x_token + k
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for k0 in range(0, k_size, BLOCK_K):
        tile = tl.load(w + k0 * w_column, mask=(rows < n) & (k < k_size - k0), other=0.0)
        values = tl.load(x + k0, mask=k < k_size - k0, other=0.0)
        total = tl.dot(values, tl.trans(tile), total)
    out += token.to(tl.int64) * out_token
    mask = (t < m - token) & (tl.trans(rows) < n)
    tl.store(out + t * out_token + tl.trans(rows), total.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=("m",))
def _absorb_kernel(
    x, w, out, m, n, k_size, x_token, x_head, w_head, w_row, w_column,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    block, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    token, out_token = tl.program_id(2) * BLOCK_M, tl.num_programs(1) * n
    w += head * w_head
    x += head * x_head
    out += head * n
    if BLOCK_M < MANY:
        if PDL == "prefetch":
            tile = load_weights(w, block, n, k_size, w_row, w_column, BLOCK_N, BLOCK_K)
        pdl_begin(PDL)
        if PDL != "prefetch":
            tile = load_weights(w, block, n, k_size, w_row, w_column, BLOCK_N, BLOCK_K)
        multiply_block(
            tile, w, x, out, block, token, m, n, k_size, x_token, out_token, w_row, w_column,
            BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
    else:
        pdl_begin(PDL, LATE=True)
        _multiply_many(
            w, x, out, block, token, m, n, k_size, x_token, out_token, w_row, w_column,
            BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
    pdl_end(PDL, LATE=BLOCK_M >= MANY)


def _rows() -> tuple[Row, ...]:
    """W_UK is read along its outputs, W_UV along what is summed."""
    short, long, many = tiles_gemm.ABSORB_SHORT, tiles_gemm.ABSORB_LONG, tiles_gemm.ABSORB_MANY
    launches = []
    w_uk: tuple[str | int, str | int] = 1, "i32:16"
    w_uv: tuple[str | int, str | int] = "i32:16", 1
    for (row, column), tiles in ((w_uk, (short, *many)), (w_uv, (short, long, *many))):
        arguments: dict[str, str | int | float] = dict.fromkeys(("x", "w", "out"), "*bf16:16")
        arguments |= {"w_row": row, "w_column": column}
        arguments |= {"m": "i32", "n": "i32:16", "k_size": "i32:16"}
        arguments |= dict.fromkeys(("x_token", "x_head", "w_head"), "i32:16")
        for t in tiles:
            sizes = {"BLOCK_M": t.block_m, "BLOCK_N": t.block_n, "BLOCK_K": t.block_k}
            launches.append(Row({**arguments, **sizes}, t.num_warps, t.num_stages))
    return tuple(launches)


ABSORB = KernelSpec(_absorb_kernel, _rows(), frozenset({"w"}), fp_fusion=True)
SPECS = (ABSORB,)


def multiply_heads(x: Tensor, weight: Tensor, mode: PdlMode) -> Tensor:
    """x [T, H, K], weight [H, N, K], any strides -> [T, H, N]."""
    tile = launch_config("absorb", len(x), (weight.shape[2],))
    return multiply_heads_in(tile, x, weight, mode)


def multiply_heads_in(tile: Tile, x: Tensor, weight: Tensor, mode: PdlMode) -> Tensor:
    """The same in a given tile."""
    assert x.stride(2) == 1, f"x strides {x.stride()}: want contiguous rows"
    m, (heads, n, k) = len(x), weight.shape
    out = torch.empty(m, heads, n, dtype=x.dtype, device=x.device)
    args = {"x": x, "w": weight, "out": out, "m": m, "n": n, "k_size": k}
    args |= {"x_token": x.stride(0), "x_head": x.stride(1)}
    args |= dict(zip(("w_head", "w_row", "w_column"), weight.stride(), strict=True))
    args |= {"BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "BLOCK_K": tile.block_k}
    grid = -(-n // tile.block_n), heads, -(-m // tile.block_m)
    ABSORB.launch(grid, mode, args, tile.num_warps, tile.num_stages)
    return out
