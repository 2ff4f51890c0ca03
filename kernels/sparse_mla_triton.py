"""Triton kernel under `sparse_mla`: attention over gathered rows, of each split of a token's slots
(combine_triton sums them).

One program attends BLOCK_H heads of one token to one split of its slots,
BLOCK_N rows at a time; one load of a row serves scores and values. Rows stay 8-bit until they are
in shared memory, then become f16 (exact). The fp8 row's scales: with s the largest of a row's four,

    k = k8 * (s_g / s) in f16,  score = (q . k) * s + q_pe . k_pe,  w = exp2(score + log2 s - top)
    out = sum w k / sum (w / s)

so no value leaves f16's range however rows differ. Nothing is constant over a replay: every access
follows the wait.
"""

import itertools
from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from minidsv.kernels.launch import KernelSpec, Row, pdl_begin, pdl_end
from minidsv.kernels.launch_config import launch_config
from minidsv.kernels.pdl import PdlMode
from minidsv.kernels.tile import Tile
from minidsv.kernels.tiles_attention import NARROW, WIDE

EMPTY = tl.constexpr(-1e30)  # log2 of a sum without terms; finite, so no inf - inf arises
F16_MAX = tl.constexpr(65504.0)


@triton.jit
def _load_rows(row, slot, c, ROW: tl.constexpr):
    """Values `c` of rows `slot` (-1: zeros): [N, C]."""
    at = slot[:, None].to(tl.int64) * ROW + c[None, :]
    return tl.load(row + at, mask=slot[:, None] >= 0, other=0.0)


@triton.jit
def _load_pieces(row, slot, C: tl.constexpr, ROW: tl.constexpr):
    """The same by pieces of 64 values: [C / 64, N, 64].

    The hint ranks the axes: a warp takes eight rows of a piece, so that its stores of f16 into the
    swizzled operand of warpgroup mma fall into different banks.
    """
    at = slot[None, :, None].to(tl.int64) * ROW + tl.arange(0, C // 64)[:, None, None] * 64
    at = tl.max_contiguous(at + tl.arange(0, 64)[None, None, :], [1, 2, 16])
    return tl.load(row + at, mask=slot[None, :, None] >= 0, other=0.0)


@triton.jit
def _load_f16(row, slot, c, C: tl.constexpr, ROW: tl.constexpr, WGMMA: tl.constexpr):
    """The latents of e4m3 rows as f16 [N, C]."""
    if WGMMA:
        k = tl.permute(_load_pieces(row, slot, C, ROW).to(tl.float16), (1, 0, 2))
        k = tl.reshape(k, (slot.shape[0], C))
    else:
        k = _load_rows(row, slot, c, ROW).to(tl.float16)
    return k


@triton.jit
def _load_grouped(row, slot, c, r, C: tl.constexpr, R: tl.constexpr, WGMMA: tl.constexpr):
    """fp8 rows `slot` (-1: zeros) as operands: k f16 [N, C] over each row's largest scale [N],
    k_pe bf16 [N, R]; `row` points to e4m3."""
    ROW: tl.constexpr = C + C // 32 + 2 * R
    k8 = _load_f16(row, slot, c, C, ROW, WGMMA)
    rope = row.to(tl.pointer_type(tl.bfloat16)) + (C + C // 32) // 2
    k_pe = _load_rows(rope, slot, r, ROW // 2)
    scales = row.to(tl.pointer_type(tl.float32)) + C // 4
    scale = _load_rows(scales, slot, tl.arange(0, C // 128), ROW // 4)
    largest = tl.max(scale, 1)
    largest = tl.where(largest > 0, largest, 1.0)
    ratio = (scale * (1.0 / largest)[:, None]).to(tl.float16)
    k = tl.reshape(k8, (slot.shape[0], C // 128, 128)) * ratio[:, :, None]
    return tl.reshape(k, (slot.shape[0], C)), k_pe, largest


@triton.jit
def _load_plain(row, slot, c, r, C: tl.constexpr, R: tl.constexpr, WGMMA: tl.constexpr):
    """Rows `slot` (-1: zeros) of one dtype as operands: k [N, C], k_pe [N, R]; e4m3 as f16."""
    k_pe = _load_rows(row + C, slot, r, C + R)
    if row.dtype.element_ty.is_fp8():
        k, k_pe = _load_f16(row, slot, c, C, C + R, WGMMA), k_pe.to(tl.float16)
    else:
        k = _load_rows(row, slot, c, C + R)
    return k, k_pe


@triton.jit
def _to_f16(x):
    """Saturated; NaN stays."""
    return tl.clamp(x.to(tl.float32), -F16_MAX, F16_MAX, tl.PropagateNan.ALL).to(tl.float16)


@triton.jit
def _reload(q, scratch, at, mask):
    """q through memory that this program owns: Triton keeps a left operand of warpgroup mma in
    shared memory, not in registers, only if it was loaded."""
    tl.store(scratch + at, q, mask=mask)
    tl.debug_barrier()
    return tl.load(scratch + at, mask=mask, other=0.0)


@triton.jit
def _last_named(indices, first, last, SCAN: tl.constexpr):
    """One past the last slot >= 0 of indices[first:last]; `first` if there is none."""
    end, stop = first, last
    while stop > first:
        at = stop - SCAN + tl.arange(0, SCAN)
        slot = tl.load(indices + at, mask=at >= first, other=-1)
        end = tl.max(tl.where(slot >= 0, at + 1, first))
        stop = tl.where(end > first, first, stop - SCAN)
    return end


@triton.jit(do_not_specialize=["heads", "topk", "indices_token"])
def _sparse_mla_kernel(
    q_latent, q_pe, latent, indices, out, lse,
    factor, rope_factor, value_scale, heads, topk, split_keys,
    q_token, q_head, pe_token, pe_head, indices_token,
    C: tl.constexpr, R: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_N: tl.constexpr,
    GROUPED: tl.constexpr, CARRY: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    F16: tl.constexpr = latent.dtype.element_ty.is_fp8()
    WGMMA: tl.constexpr = BLOCK_H >= 64
    group, split, token = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    h = group * BLOCK_H + tl.arange(0, BLOCK_H)
    c, r, n = tl.arange(0, C), tl.arange(0, R), tl.arange(0, BLOCK_N)
    first = split * split_keys
    region = (token * tl.num_programs(1) + split) * heads  # this token's and split's rows of out
    indices += token * indices_token
    real = h[:, None] < heads
    pdl_begin(PDL)
    q = tl.load(q_latent + token * q_token + h[:, None] * q_head + c[None, :], mask=real, other=0.0)
    qr = tl.load(q_pe + token * pe_token + h[:, None] * pe_head + r[None, :], mask=real, other=0.0)
    limit = tl.minimum(first + split_keys, topk)
    slot = tl.load(indices + first + n, mask=first + n < limit, other=-1).to(tl.int32)
    last = _last_named(indices, first, limit, 512)
    if F16:
        q = _to_f16(q)
        qr = qr if GROUPED else _to_f16(qr)
        if WGMMA:
            own: tl.constexpr = C * (out.dtype.element_ty.primitive_bitwidth // 16)  # a row in f16
            scratch = out.to(tl.pointer_type(tl.float16)) + region * own
            q = _reload(q, scratch, h[:, None] * own + c[None, :], real)
    top = tl.full([BLOCK_H], EMPTY, tl.float32)
    total = tl.zeros([BLOCK_H], tl.float32)
    acc = tl.zeros([BLOCK_H, C], tl.float32)
    for start in range(first, last, BLOCK_N):
        if not CARRY:
            slot = tl.load(indices + start + n, mask=start + n < limit, other=-1).to(tl.int32)
        bias = tl.where(slot >= 0, 0.0, float("-inf"))
        if GROUPED:
            k, k_pe, row_scale = _load_grouped(latent, slot, c, r, C, R, WGMMA)
            bias += tl.log2(row_scale)
            if WGMMA:  # exact, and undone by rope_factor: a changed operand needs fewer buffers
                k_pe = (k_pe.to(tl.float32) * 2.0).to(k_pe.dtype)
        else:
            k, k_pe = _load_plain(latent, slot, c, r, C, R, WGMMA)
        if CARRY:
            ahead = start + BLOCK_N + n
            slot = tl.load(indices + ahead, mask=ahead < limit, other=-1).to(tl.int32)
        x = tl.dot(q, k.T)
        x_pe = tl.dot(qr, k_pe.to(qr.dtype).T)
        if GROUPED:
            x *= row_scale[None, :]
        x = x * factor + x_pe * rope_factor
        if heads > 0:  # always; without a branch both warpgroups would compute all scores
            x += bias[None, :]
        new_top = tl.maximum(top, tl.max(x, 1))
        alpha = tl.exp2(top - new_top)
        p = tl.exp2(x - new_top[:, None])
        total = total * alpha + tl.sum(p / row_scale[None, :] if GROUPED else p, 1)
        acc = tl.dot(p.to(k.dtype), k, acc * alpha[:, None])
        top = new_top
        group = tl.minimum(group, heads)  # itself; see below
    h = group * BLOCK_H + tl.arange(0, BLOCK_H)  # again, so that no address is held over the loop
    acc *= (value_scale / tl.where(total > 0, total, 1.0))[:, None]
    log = tl.where(total > 0, top + tl.log2(total), EMPTY)
    tl.store(lse + region + h, log, mask=h < heads)
    at = (region + h)[:, None] * C + c[None, :]
    tl.store(out + at, acc.to(out.dtype.element_ty), mask=h[:, None] < heads)
    pdl_end(PDL)


LOG2_E = 1.4426950408889634
DIMS = ((512, 64), (128, 64))  # C and r: DeepSeek-V3.2 and GLM-5; the bundled model
LATENTS = {"bf16": "bf16", "fp8": "fp8e4nv", "flat": "fp8e4nv"}  # row layout -> pointee
QUERIES = {"bf16": "bf16", "fp8": "bf16", "flat": "fp8e4nv"}  # as the engine launches them


def constants(layout: str, tile: Tile, c: int, r: int) -> dict[str, int]:
    """Constexpr arguments; rows that a dot takes as loaded are pipelined with their indices."""
    return {
        "C": c, "R": r, "BLOCK_H": tile.block_m, "BLOCK_N": tile.block_n,
        "GROUPED": layout == "fp8", "CARRY": layout != "bf16",
    }  # fmt: skip


def sparse_row(layout: str, tile: Tile, c: int, r: int, query: str) -> Row:
    """The launch on `layout` rows."""
    pointers = {
        "q_latent": query, "q_pe": query, "latent": LATENTS[layout], "indices": "i64",
        "out": "bf16", "lse": "fp32",
    }  # fmt: skip
    arguments: dict[str, str | int | float] = {n: f"*{t}:16" for n, t in pointers.items()}
    arguments |= dict.fromkeys(("factor", "rope_factor", "value_scale"), "fp32")
    arguments |= dict.fromkeys(("heads", "topk", "indices_token"), "i32")
    strides = ("split_keys", "q_token", "q_head", "pe_token", "pe_head")
    arguments |= dict.fromkeys(strides, "i32:16")
    return Row(arguments | constants(layout, tile, c, r), tile.num_warps, tile.num_stages)


def _rows() -> Iterator[Row]:
    """Narrow tiles for each model; wide ones for those with 64 heads, none of them the bundled."""
    for layout, (c, r) in itertools.product(LATENTS, DIMS):
        for tiles in (NARROW, WIDE) if c == 512 else (NARROW,):
            yield sparse_row(layout, tiles[layout], c, r, QUERIES[layout])


SPARSE = KernelSpec(_sparse_mla_kernel, tuple(_rows()), fp_fusion=True)
SPECS = (SPARSE,)


def _layout(kv_buffer: Tensor) -> str:
    """Name of the rows in the tiles' tables; fp32 and fp16 (the interpreter) run as bf16."""
    return {torch.uint8: "fp8", torch.float8_e4m3fn: "flat"}.get(kv_buffer.dtype, "bf16")


def _assert_sizes(c: int, r: int) -> None:
    for name, size, least in (("C", c, 128), ("r", r, 16)):
        assert size in (least << i for i in range(8)), (
            f"{name} {size}: the kernel wants a power of two from {least} on"
        )


def attend(
    q_latent: Tensor, q_pe: Tensor, kv_buffer: Tensor, topk_indices: Tensor,
    out_dtype: torch.dtype, score_scale: float, value_scale: float, mode: PdlMode,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Attention of each split: (partial [T, S, H, C], log2 of their sums of weights [T, S, H]).

    `score_scale` holds the scales of query and keys.
    """
    (tokens, heads, c), topk = q_latent.shape, topk_indices.shape[1]
    _assert_sizes(c, q_pe.shape[2])
    layout = _layout(kv_buffer)
    tile = launch_config(f"sparse_mla_{layout}", tokens, (heads, topk))
    factor = score_scale * LOG2_E
    shape, device = (tokens, tile.split, heads), q_latent.device
    lse = torch.empty(shape, dtype=torch.float32, device=device)
    partial = torch.empty((*shape, c), dtype=out_dtype, device=device)
    args: dict[str, Any] = {
        "q_latent": q_latent, "q_pe": q_pe, "indices": topk_indices, "out": partial, "lse": lse,
        "latent": kv_buffer.view(torch.float8_e4m3fn) if layout == "fp8" else kv_buffer,
        "factor": factor, "value_scale": value_scale,
        "rope_factor": factor * 0.5 if layout == "fp8" and tile.block_m >= 64 else factor,
        "heads": heads, "topk": topk,
        "split_keys": -(-topk // (tile.split * tile.block_n)) * tile.block_n,
        "q_token": q_latent.stride(0), "q_head": q_latent.stride(1),
        "pe_token": q_pe.stride(0), "pe_head": q_pe.stride(1),
        "indices_token": topk_indices.stride(0),
    }  # fmt: skip
    args |= constants(layout, tile, c, q_pe.shape[2])
    grid = (-(-heads // tile.block_m), tile.split, tokens)
    SPARSE.launch(grid, mode, args, tile.num_warps, tile.num_stages)
    return partial, lse
