"""Triton kernel under `sparse_mla`: attention over gathered rows, of each split of a token's slots
(combine_triton sums them).

One program of `_sparse_mla_kernel` attends BLOCK_H heads of one token to one split of its slots,
BLOCK_N rows at a time; one load of a row serves scores and values. Rows and weights are multiplied
in the query's dtype (f16 for an e4m3 query), in which an e4m3 row without scales is exact; the fp8
row's values times their scales are rounded (bf16: of the scales' first 16 bits). Plain rows of the
next steps are kept in shared memory; 8-bit ones are loaded to registers while the tensor cores
multiply. Nothing is constant over a replay: every access follows the wait.
"""

import itertools
from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from minidsv.kernels.launch import KernelSpec, Row, pdl_ahead, pdl_begin, pdl_end
from minidsv.kernels.launch_config import launch_config
from minidsv.kernels.pdl import PdlMode
from minidsv.kernels.tile import Tile
from minidsv.kernels.tiles_attention import NARROW, WIDE

EMPTY = tl.constexpr(-1e30)  # log2 of a sum without terms; finite, so no inf - inf arises
ROOM = tl.constexpr(2.0**32)  # `_scaled` rows are that much smaller


@triton.jit
def _load_rows(row, slot, c, ROW: tl.constexpr):
    """Values `c` of rows `slot` (-1: zeros): [N, C]."""
    at = slot[:, None].to(tl.int64) * ROW + c[None, :]
    return tl.load(row + at, mask=slot[:, None] >= 0, other=0.0)


@triton.jit
def _load_words(row, slot, C: tl.constexpr, ROW: tl.constexpr, GROUPED: tl.constexpr):
    """Latents of e4m3 rows `slot` (-1: zeros) in words of four, as registers hold them best, by
    pieces of 64 values [C / 64, N, 16], and their scales [N, C / 128] (the slots if flat).

    The hint ranks the axes: a warp takes eight rows of a piece, so that its stores into the
    swizzled operand of warpgroup mma fall into different banks.
    """
    at = slot[None, :, None].to(tl.int64) * (ROW // 4) + tl.arange(0, C // 64)[:, None, None] * 16
    at = tl.max_contiguous(at + tl.arange(0, 16)[None, None, :], [1, 2, 4])
    word = row.to(tl.pointer_type(tl.int32))
    latent = tl.load(word + at, mask=slot[None, :, None] >= 0, other=0)
    scale = slot
    if GROUPED:
        scales = row.to(tl.pointer_type(tl.float32)) + C // 4
        scale = _load_rows(scales, slot, tl.arange(0, C // 128), ROW // 4)
    return latent, scale


@triton.jit
def _byte(word, i: tl.constexpr):
    """Byte i, an e4m3, as f16 (exact)."""
    return (word >> (8 * i)).to(tl.uint8).to(tl.float8e4nv, bitcast=True).to(tl.float16)


@triton.jit
def _by_piece(x):
    """bf16 [N, G] in both halves of words, each twice: [2 * G, N, 1]."""
    pair = x.to(tl.uint16, bitcast=True).to(tl.uint32) * 0x10001
    twice = tl.permute(tl.join(pair, pair), (1, 2, 0))
    return tl.reshape(twice, (2 * x.shape[1], x.shape[0]))[:, :, None]  # so that it moves nothing


@triton.jit
def _scaled(word, scale):
    """The bytes of words [C / 64, N, 16] over ROOM, times their scales [N, C / 128], as bf16.

    The bits move as in `gemm_triton.as_operand`, to numbers 2^120 too small. The scale makes up for
    2^88 of it, so that it may be as large as 2^39; a value times its two parts is rounded once.
    """
    scale *= 2.0**88
    high = scale.to(tl.bfloat16)
    low = (scale - high.to(tl.float32)).to(tl.bfloat16)
    return tl.inline_asm_elementwise(
        """{ .reg .b32 a, b, c, d, z; mov.b32 z, 0x80008000;
        prmt.b32 a, $4, 0, 0x9180; prmt.b32 b, $4, 0, 0xB3A2;
        shl.b32 a, a, 4; and.b32 a, a, 0x87F087F0; shl.b32 b, b, 4; and.b32 b, b, 0x87F087F0;
        fma.rn.bf16x2 c, a, $6, z; fma.rn.bf16x2 d, b, $6, z;
        fma.rn.bf16x2 a, a, $5, c; fma.rn.bf16x2 b, b, $5, d;
        mov.b32 {$0, $1}, a; mov.b32 {$2, $3}, b; }""",
        "=h,=h,=h,=h,r,r,r", [word, _by_piece(high), _by_piece(low)],
        dtype=(tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16), is_pure=True, pack=1,
    )  # fmt: skip


@triton.jit
def _latents(word, scale, C: tl.constexpr, GROUPED: tl.constexpr, T: tl.constexpr):
    """Words of e4m3 rows as values of type T [N, C]; grouped ones in bf16 over ROOM."""
    N: tl.constexpr = word.shape[1]
    BITS: tl.constexpr = GROUPED and T.is_bf16()
    if BITS:
        b0, b1, b2, b3 = _scaled(word, scale)
    else:
        b0, b1, b2, b3 = _byte(word, 0), _byte(word, 1), _byte(word, 2), _byte(word, 3)
    k = tl.join(tl.join(b0, b2), tl.join(b1, b3))
    k = tl.permute(tl.reshape(k, (C // 64, N, 64)), (1, 0, 2))
    if GROUPED and not BITS:
        k = tl.reshape(k, (N, C // 128, 128)).to(tl.float32) * scale[:, :, None]
    return tl.reshape(k.to(T), (N, C))


@triton.jit
def _load_rope(row, slot, C: tl.constexpr, r, ROW: tl.constexpr, GROUPED: tl.constexpr):
    """The rope part of rows `slot` (-1: zeros): [N, R]."""
    if GROUPED:  # bf16 behind the scales; ROW counts bytes
        rope = row.to(tl.pointer_type(tl.bfloat16)) + (C + C // 32) // 2
        k_pe = _load_rows(rope, slot, r, ROW // 2)
    else:
        k_pe = _load_rows(row + C, slot, r, ROW)
    return k_pe


@triton.jit
def _reload(q, scratch, at, mask):
    """q through memory that this program owns: Triton keeps a left operand of warpgroup mma in
    shared memory, not in registers, only if it was loaded."""
    tl.store(scratch + at, q, mask=mask)
    tl.debug_barrier()
    return tl.load(scratch + at, mask=mask, other=0.0)


@triton.jit
def _in_thread(p):
    """Of p [H, N], sums that need no other thread: [H, 2, 8] of warpgroup mma, else [H, 1, N]."""
    H: tl.constexpr = p.shape[0]
    N: tl.constexpr = p.shape[1]
    return tl.sum(tl.reshape(p, (H, 2, N // 16, 8)), 2) if H >= 64 else tl.reshape(p, (H, 1, N))


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
    factor, value_scale, heads, topk, split_keys,
    q_token, q_head, pe_token, pe_head, indices_token,
    C: tl.constexpr, R: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_N: tl.constexpr,
    GROUPED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    E4M3: tl.constexpr = latent.dtype.element_ty.is_fp8()
    ROW: tl.constexpr = C + C // 32 + 2 * R if GROUPED else C + R
    T: tl.constexpr = tl.float16 if q_pe.dtype.element_ty.is_fp8() else q_pe.dtype.element_ty
    group, split, token = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    h = group * BLOCK_H + tl.arange(0, BLOCK_H)
    c, r, n = tl.arange(0, C), tl.arange(0, R), tl.arange(0, BLOCK_N)
    first = split * split_keys
    region = (token * tl.num_programs(1) + split) * heads  # this token's and split's rows of out
    indices += token * indices_token
    real = h[:, None] < heads
    if tl.num_programs(2) == 1:
        pdl_ahead(PDL)
    pdl_begin(PDL, LATE=True)
    limit = tl.minimum(first + split_keys, topk)
    slot = tl.load(indices + first + n, mask=first + n < limit, other=-1).to(tl.int32)
    q = tl.load(q_latent + token * q_token + h[:, None] * q_head + c[None, :], mask=real, other=0.0)
    qr = tl.load(q_pe + token * pe_token + h[:, None] * pe_head + r[None, :], mask=real, other=0.0)
    if E4M3:
        words, scale = _load_words(latent, slot, C, ROW, GROUPED)
    last = limit
    if split_keys > BLOCK_N:
        last = _last_named(indices, first, limit, 512)
    if q.dtype.is_fp8():
        own: tl.constexpr = C * (
            out.dtype.element_ty.primitive_bitwidth // 16
        )  # a row of 16 bits a value
        scratch = out.to(tl.pointer_type(T)) + region * own
        qr = qr.to(T)
        q = q.to(T)
        if BLOCK_H >= 64:
            q = _reload(q, scratch, h[:, None] * own + c[None, :], real)
    room: tl.constexpr = ROOM if GROUPED and T.is_bf16() else 1.0
    latent_factor = factor * room
    top = tl.full([BLOCK_H], EMPTY, tl.float32)
    total = _in_thread(tl.zeros([BLOCK_H, BLOCK_N], tl.float32))
    acc = tl.zeros([BLOCK_H, C], tl.float32)
    for start in range(first, last, BLOCK_N):
        k = _latents(words, scale, C, GROUPED, T) if E4M3 else _load_rows(latent, slot, c, ROW)
        bias = tl.where(slot >= 0, 0.0, float("-inf"))
        x = tl.dot(q, k.T)
        k_pe = _load_rope(latent, slot, C, r, ROW, GROUPED)  # beside the product
        x_pe = tl.dot(qr, k_pe.to(T).T)
        ahead = start + BLOCK_N + n
        slot = tl.load(indices + ahead, mask=ahead < limit, other=-1).to(tl.int32)
        x = x * latent_factor + x_pe * factor  # a plain sum would become one dot, in two layouts
        if heads > 0:  # always; without a branch both warpgroups would compute all scores
            x += bias[None, :]
        new_top = tl.maximum(top, tl.max(x, 1))
        alpha = tl.exp2(top - new_top)
        p = tl.exp2(x - new_top[:, None])
        total = total * alpha[:, None, None] + _in_thread(p)
        acc = tl.dot(p.to(T), k, acc * alpha[:, None])
        if E4M3:
            words, scale = _load_words(latent, slot, C, ROW, GROUPED)  # beside the product
        top = new_top
        group = tl.minimum(group, heads)  # itself; see below
    total = tl.sum(tl.sum(total, 2), 1)
    h = group * BLOCK_H + tl.arange(0, BLOCK_H)  # again, so that no address is held over the loop
    acc *= (value_scale * room / tl.where(total > 0, total, 1.0))[:, None]
    log = tl.where(total > 0, top + tl.log2(total), EMPTY)
    tl.store(lse + region + h, log, mask=h < heads)
    at = (region + h)[:, None] * C + c[None, :]
    tl.store(out + at, acc.to(out.dtype.element_ty), mask=h[:, None] < heads)
    pdl_end(PDL, LATE=True)


LOG2_E = 1.4426950408889634
DIMS = ((512, 64), (128, 64))  # C and r: DeepSeek-V3.2 and GLM-5; the bundled model
LATENTS = {"bf16": "bf16", "fp8": "fp8e4nv", "flat": "fp8e4nv"}  # row layout -> pointee
QUERIES = {"bf16": "bf16", "fp8": "bf16", "flat": "fp8e4nv"}  # as the engine launches them


def constants(layout: str, tile: Tile, c: int, r: int) -> dict[str, int]:
    """Constexpr arguments."""
    return {
        "C": c, "R": r, "BLOCK_H": tile.block_m, "BLOCK_N": tile.block_n,
        "GROUPED": layout == "fp8",
    }  # fmt: skip


def sparse_row(layout: str, tile: Tile, c: int, r: int, query: str) -> Row:
    """The launch on `layout` rows."""
    pointers = {
        "q_latent": query, "q_pe": query, "latent": LATENTS[layout], "indices": "i64",
        "out": "bf16", "lse": "fp32",
    }  # fmt: skip
    arguments: dict[str, str | int | float] = {n: f"*{t}:16" for n, t in pointers.items()}
    arguments |= dict.fromkeys(("factor", "value_scale"), "fp32")
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
