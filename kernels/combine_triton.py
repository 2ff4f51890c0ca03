"""Triton kernels that sum the splits of `sparse_mla`, and multiply the sum with W_UV at once.

    latent[t, h] = sum_s 2^lse[t, s, h] partial[t, s, h] / sum_s 2^lse[t, s, h]
    out[t, h]    = w_uv[h] latent[t, h]

The splits of one head are summed again for each BLOCK_N of its outputs (they come from L2), BLOCK_K
columns at a time; the weights of the first, for a lone token all, are loaded before the wait.
"""

import itertools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from minidsv.kernels.launch import KernelSpec, Row, pdl_begin, pdl_end
from minidsv.kernels.launch_config import launch_config
from minidsv.kernels.pdl import PdlMode
from minidsv.kernels.sparse_mla_triton import EMPTY
from minidsv.kernels.tile import Tile
from minidsv.kernels.tiles_attention import SPLITS, VALUES


@triton.jit
def _shares(lse, tokens, m, head, heads, splits, SPLIT: tl.constexpr):
    """What the splits of each token count, fp32 [SPLIT, len(tokens)]; SPLIT >= splits."""
    s = tl.arange(0, SPLIT)[:, None]
    row = (tokens[None, :] * splits + s) * heads + head
    log = tl.load(lse + row, mask=(tokens[None, :] < m) & (s < splits), other=EMPTY)
    weight = tl.exp2(log - tl.max(log, 0)[None, :])
    return weight / tl.sum(weight, 0)[None, :]


@triton.jit
def _sum_splits(partial, shares, tokens, m, head, heads, splits, c, C: tl.constexpr):
    """Columns c of the latents of one head, fp32 [len(tokens), len(c)].

    The splits come first, so that a thread holds all of its values'.
    """
    s = tl.arange(0, shares.shape[0])
    if tokens.shape[0] == 1:  # in two dimensions, as the weights that it meets
        row = (tl.max(tokens, 0) * splits + s) * heads + head
        at = row[:, None] * C + c[None, :]
        values = tl.load(partial + at, mask=s[:, None] < splits, other=0.0).to(tl.float32)
        latent = tl.sum(values * shares, 0)[None, :]
    else:
        t, s = tokens[None, :, None], s[:, None, None]
        at = ((t * splits + s) * heads + head) * C + c[None, None, :]
        values = tl.load(partial + at, mask=(t < m) & (s < splits), other=0.0).to(tl.float32)
        latent = tl.sum(values * shares[:, :, None], 0)
    return latent


@triton.jit(do_not_specialize=["heads", "splits"])
def _combine_splits_kernel(
    partial, lse, out, heads, splits, SPLIT: tl.constexpr, C: tl.constexpr, PDL: tl.constexpr
):  # fmt: skip
    head, c = tl.program_id(0), tl.arange(0, C)
    token = tl.program_id(1).to(tl.int64) + tl.arange(0, 1)
    tokens = tl.num_programs(1)
    pdl_begin(PDL)
    shares = _shares(lse, token, tokens, head, heads, splits, SPLIT)
    latent = _sum_splits(partial, shares, token, tokens, head, heads, splits, c, C)
    at = (token * heads + head)[:, None] * C + c[None, :]
    tl.store(out + at, latent.to(out.dtype.element_ty))
    pdl_end(PDL)


@triton.jit
def _multiply(tile, latent):
    """[len(latent), rows of the tile] products in fp32; a lone token's on CUDA cores."""
    latent = latent.to(tile.dtype)
    if latent.shape[0] == 1:
        y = tl.sum(tile.to(tl.float32) * latent.to(tl.float32), 1)[None, :]
    else:
        y = tl.trans(tl.dot(tile, tl.trans(latent)))
    return y


@triton.jit(do_not_specialize=["m", "splits"])
def _combine_values_kernel(
    partial, lse, w, out, m, n, splits, w_head, w_row,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SPLIT: tl.constexpr,
    C: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    head, heads = tl.program_id(1).to(tl.int64), tl.num_programs(1)
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    tokens = tl.program_id(2) * BLOCK_M + tl.arange(0, BLOCK_M).to(tl.int64)
    c = tl.arange(0, BLOCK_K)
    w += head * w_head + rows[:, None] * w_row + c[None, :]
    if PDL == "prefetch":
        tile = tl.load(w, mask=rows[:, None] < n, other=0.0)
    pdl_begin(PDL)
    if PDL != "prefetch":
        tile = tl.load(w, mask=rows[:, None] < n, other=0.0)
    shares = _shares(lse, tokens, m, head, heads, splits, SPLIT)
    latent = _sum_splits(partial, shares, tokens, m, head, heads, splits, c, C)
    y = _multiply(tile, latent)
    for k0 in range(BLOCK_K, C, BLOCK_K):
        tile = tl.load(w + k0, mask=rows[:, None] < n, other=0.0)
        latent = _sum_splits(partial, shares, tokens, m, head, heads, splits, k0 + c, C)
        y += _multiply(tile, latent)
    at = (tokens[:, None] * heads + head) * n + rows[None, :]
    inside = (tokens < m)[:, None] & (rows < n)[None, :]
    tl.store(out + at, y.to(out.dtype.element_ty), mask=inside)
    pdl_end(PDL)


WIDTHS = (512, 128)  # C: DeepSeek-V3.2 and GLM-5; the bundled model


def _sizes(tile: Tile, c: int) -> dict[str, int]:
    sizes = {"BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "BLOCK_K": min(c, tile.block_k)}
    return sizes | {"SPLIT": tile.split, "C": c}


def _splits_rows() -> tuple[Row, ...]:
    arguments: dict[str, str | int | float] = dict.fromkeys(("partial", "out"), "*bf16:16")
    arguments |= {"lse": "*fp32:16", "heads": "i32", "splits": "i32"}
    return tuple(Row(arguments | {"SPLIT": SPLITS[-1], "C": c}) for c in WIDTHS)


def _values_rows() -> tuple[Row, ...]:
    arguments: dict[str, str | int | float] = dict.fromkeys(("partial", "w", "out"), "*bf16:16")
    arguments |= {"lse": "*fp32:16", "m": "i32", "splits": "i32"}
    arguments |= dict.fromkeys(("n", "w_head", "w_row"), "i32:16")
    return tuple(
        Row(arguments | _sizes(t, c), t.num_warps, t.num_stages)
        for t, c in itertools.product(VALUES, WIDTHS)
    )


COMBINE = KernelSpec(_combine_splits_kernel, _splits_rows())
COMBINE_VALUES = KernelSpec(
    _combine_values_kernel, _values_rows(), frozenset({"w"}), fp_fusion=True
)
SPECS = (COMBINE, COMBINE_VALUES)


def combine(partial: Tensor, lse: Tensor, mode: PdlMode) -> Tensor:
    """partial [T, S, H, C], lse fp32 [T, S, H] -> [T, H, C]."""
    tokens, splits, heads, c = partial.shape
    out = torch.empty(tokens, heads, c, dtype=partial.dtype, device=partial.device)
    args: dict[str, Any] = {"partial": partial, "lse": lse, "out": out, "heads": heads}
    args |= {"splits": splits, "SPLIT": SPLITS[-1], "C": c}
    COMBINE.launch((heads, tokens), mode, args)
    return out


def combine_values(partial: Tensor, lse: Tensor, w_uv: Tensor, mode: PdlMode) -> Tensor:
    """The same times w_uv [H, v, C] -> [T, H, v]."""
    (tokens, splits, heads, c), n = partial.shape, w_uv.shape[1]
    out = torch.empty(tokens, heads, n, dtype=partial.dtype, device=partial.device)
    tile = launch_config("combine_values", tokens, (splits,))
    args: dict[str, Any] = {"partial": partial, "lse": lse, "w": w_uv, "out": out, "m": tokens}
    args |= {"n": n, "splits": splits, "w_head": w_uv.stride(0), "w_row": w_uv.stride(1)}
    grid = -(-n // tile.block_n), heads, -(-tokens // tile.block_m)
    args |= _sizes(tile, c)
    COMBINE_VALUES.launch(grid, mode, args, tile.num_warps, tile.num_stages)
    return out
