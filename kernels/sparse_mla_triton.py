"""Triton kernels under `sparse_mla`: attention over gathered rows, then the sum of the splits.

One program of `_sparse_mla_kernel` attends BLOCK_H heads of one token to one split of its slots,
BLOCK_N rows at a time; one load of a row serves scores and values. Rows stay 8-bit until they are
in shared memory, then become f16 (exact). The fp8 row's scales: with s the largest of a row's four,

    k = k8 * (s_g / s) in f16,  score = (q . k) * s + q_pe . k_pe,  w = exp2(score + log2 s - top)
    out = sum w k / sum (w / s)

so no value leaves f16's range however rows differ. Nothing is constant over a replay: every access
follows the wait.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from minidsv.kernels.launch import KernelSpec, Row, pdl_begin, pdl_end
from minidsv.kernels.launch_config import Tile, launch_config
from minidsv.kernels.pdl import PdlMode

EMPTY = tl.constexpr(-1e30)  # log2 of a sum without terms; finite, so no inf - inf arises
F16_MAX = tl.constexpr(65504.0)


@triton.jit
def _gather(latent, rope, slot, c, r, ROW: tl.constexpr, ROPE_ROW: tl.constexpr,
            ROPE_AT: tl.constexpr):  # fmt: skip
    """Rows `slot` [N] (-1: zeros): k [N, C], k_pe [N, R]."""
    at, valid = slot[:, None].to(tl.int64), slot[:, None] >= 0
    k = tl.load(latent + at * ROW + c[None, :], mask=valid, other=0.0)
    k_pe = tl.load(rope + at * ROPE_ROW + ROPE_AT + r[None, :], mask=valid, other=0.0)
    return k, k_pe


@triton.jit
def _scale_groups(k8, scale, C: tl.constexpr):
    """k8 [N, C] over each row's largest scale, f16, and that scale [N]; scale [N, C / 128]."""
    largest = tl.max(scale, 1)
    largest = tl.where(largest > 0, largest, 1.0)
    ratio = (scale * (1.0 / largest)[:, None]).to(tl.float16)
    k = tl.reshape(k8.to(tl.float16), (k8.shape[0], C // 128, 128)) * ratio[:, :, None]
    return tl.reshape(k, (k8.shape[0], C)), largest


@triton.jit
def _to_f16(x):
    return tl.clamp(x.to(tl.float32), -F16_MAX, F16_MAX).to(tl.float16)


@triton.jit
def _reload_f16(q, scratch, at, mask):
    """q through memory that this program owns: Triton keeps a left operand of warpgroup mma in
    shared memory, not in registers, only if it was loaded."""
    tl.store(scratch + at, q, mask=mask)
    tl.debug_barrier()
    return tl.load(scratch + at, mask=mask, other=0.0)


@triton.jit(do_not_specialize=["heads", "topk", "indices_token"])
def _sparse_mla_kernel(
    q_latent, q_pe, latent, scales, rope, indices, out, lse,
    factor, value_scale, heads, topk, split_keys,
    q_token, q_head, pe_token, pe_head, indices_token,
    C: tl.constexpr, R: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_N: tl.constexpr,
    GROUPED: tl.constexpr, FINAL: tl.constexpr, CARRY: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    F16: tl.constexpr = latent.dtype.element_ty.is_fp8()
    ROW: tl.constexpr = C + C // 32 + 2 * R if GROUPED else C + R
    ROPE_ROW: tl.constexpr = ROW // 2 if GROUPED else ROW
    ROPE_AT: tl.constexpr = (C + C // 32) // 2 if GROUPED else C
    h = tl.program_id(0) * BLOCK_H + tl.arange(0, BLOCK_H)
    split, token = tl.program_id(1), tl.program_id(2).to(tl.int64)
    c, r, n = tl.arange(0, C), tl.arange(0, R), tl.arange(0, BLOCK_N)
    g = tl.arange(0, C // 128)
    real = h[:, None] < heads
    first = split * split_keys
    last = tl.minimum(first + split_keys, topk)
    indices += token * indices_token
    pdl_begin(PDL)
    q = tl.load(q_latent + token * q_token + h[:, None] * q_head + c[None, :], mask=real, other=0.0)
    qr = tl.load(q_pe + token * pe_token + h[:, None] * pe_head + r[None, :], mask=real, other=0.0)
    if F16:
        q = _to_f16(q)
        if not GROUPED:
            qr = _to_f16(qr)
        if BLOCK_H >= 64:
            own: tl.constexpr = C if FINAL else 2 * C  # a row of `out` in f16 elements
            scratch = out.to(tl.pointer_type(tl.float16))
            scratch += (token * tl.num_programs(1) + split) * heads * own
            q = _reload_f16(q, scratch, h[:, None] * own + c[None, :], real)
    top = tl.full([BLOCK_H], EMPTY, tl.float32)
    group = tl.program_id(0)
    total = tl.zeros([BLOCK_H], tl.float32)
    acc = tl.zeros([BLOCK_H, C], tl.float32)
    slot = tl.load(indices + first + n, mask=first + n < last, other=-1).to(tl.int32)
    for start in range(first, last, BLOCK_N):
        if not CARRY:
            slot = tl.load(indices + start + n, mask=start + n < last, other=-1).to(tl.int32)
        k, k_pe = _gather(latent, rope, slot, c, r, ROW, ROPE_ROW, ROPE_AT)
        valid = slot >= 0
        if GROUPED:
            at = slot[:, None].to(tl.int64) * (ROW // 4) + C // 4 + g[None, :]
            scale = tl.load(scales + at, mask=valid[:, None], other=0.0)
            k, row_scale = _scale_groups(k, scale, C)
            if BLOCK_H >= 64:  # exact; an operand that is not as it was loaded needs fewer buffers
                k_pe *= 2.0
        elif F16:
            k, k_pe = k.to(tl.float16), k_pe.to(tl.float16)
        if CARRY:
            ahead = start + BLOCK_N + n
            slot = tl.load(indices + ahead, mask=ahead < last, other=-1).to(tl.int32)
        x = tl.dot(q, k.T)
        x_pe = tl.dot(qr, k_pe.to(qr.dtype).T) * (
            factor * 0.5 if GROUPED and BLOCK_H >= 64 else factor
        )
        if GROUPED:
            x = x * (row_scale * factor)[None, :] + (x_pe + tl.log2(row_scale)[None, :])
        else:
            x = x * factor + x_pe
        if heads > 0:  # always; without a branch both warpgroups would compute all scores
            x = tl.where(valid[None, :], x, float("-inf"))
        new_top = tl.maximum(top, tl.max(x, 1))
        alpha = tl.exp2(top - new_top)
        p = tl.exp2(x - new_top[:, None])
        weight = p * (1.0 / row_scale)[None, :] if GROUPED else p
        total = total * alpha + tl.sum(weight, 1)
        acc = tl.dot(p.to(k.dtype), k, acc * alpha[:, None])
        top = new_top
        group = tl.minimum(group, heads)
    h = group * BLOCK_H + tl.arange(0, BLOCK_H)
    real = h[:, None] < heads
    row = (token * tl.num_programs(1) + split) * heads + h
    acc *= (value_scale / tl.where(total > 0, total, 1.0))[:, None]
    if not FINAL:
        tl.store(lse + row, tl.where(total > 0, top + tl.log2(total), EMPTY), mask=h < heads)
    tl.store(out + row[:, None] * C + c[None, :], acc.to(out.dtype.element_ty), mask=real)
    pdl_end(PDL)


@triton.jit(do_not_specialize=["heads"])
def _combine_splits_kernel(
    partial, lse, out, heads, SPLIT: tl.constexpr, C: tl.constexpr, PDL: tl.constexpr
):  # fmt: skip
    """out[token, head] = sum_s 2^lse_s partial_s / sum_s 2^lse_s."""
    head, token = tl.program_id(0), tl.program_id(1).to(tl.int64)
    s, c = tl.arange(0, SPLIT), tl.arange(0, C)
    row = (token * SPLIT + s) * heads + head
    pdl_begin(PDL)
    log = tl.load(lse + row)
    values = tl.load(partial + row[:, None] * C + c[None, :])
    weight = tl.exp2(log - tl.max(log, 0))
    result = tl.sum(values * (weight / tl.sum(weight, 0))[:, None], 0)
    tl.store(out + (token * heads + head) * C + c, result.to(out.dtype.element_ty))
    pdl_end(PDL)


LOG2_E = 1.4426950408889634
DIMS = ((512, 64), (128, 64))  # C and r: DeepSeek-V3.2 and GLM-5; the bundled model
LATENTS = {"bf16": "bf16", "fp8": "fp8e4nv", "flat": "fp8e4nv"}


def sparse_row(layout: str, tile: Tile, c: int, r: int, query: str = "bf16") -> Row:
    """The launch on `layout` rows: split 1 writes bf16, more write fp32 partials."""
    latent = LATENTS[layout]
    pointers = {
        "q_latent": query, "q_pe": query, "latent": latent,
        "scales": "fp32", "rope": "bf16" if layout == "fp8" else latent,
        "indices": "i64", "out": "bf16" if tile.split == 1 else "fp32", "lse": "fp32",
    }  # fmt: skip
    strides = ("split_keys", "q_token", "q_head", "pe_token", "pe_head")
    arguments: dict[str, str | int | float] = {n: f"*{t}:16" for n, t in pointers.items()}
    arguments |= {"factor": "fp32", "value_scale": "fp32", "heads": "i32", "topk": "i32"}
    arguments |= {"indices_token": "i32"} | dict.fromkeys(strides, "i32:16")
    return Row(arguments | constants(layout, tile, c, r), tile.num_warps, tile.num_stages)


def constants(layout: str, tile: Tile, c: int, r: int) -> dict[str, int]:
    return {
        "C": c, "R": r, "BLOCK_H": tile.block_m, "BLOCK_N": tile.block_n,
        "GROUPED": layout == "fp8", "FINAL": tile.split == 1, "CARRY": layout != "bf16",
    }  # fmt: skip


def combine_row(split: int, c: int) -> Row:
    arguments = {"partial": "*fp32:16", "lse": "*fp32:16", "out": "*bf16:16", "heads": "i32"}
    return Row(arguments | {"SPLIT": split, "C": c})


SPARSE = KernelSpec(
    _sparse_mla_kernel,
    tuple(
        sparse_row(layout, Tile(m, n, 1, split, warps, stages), c, r)
        for layout in LATENTS
        for m, n, warps, stages in ((16, 64, 8, 3),)
        for split in (1, 2)
        for c, r in DIMS
    ),
    min_capability=89,
    fp_fusion=True,
)
COMBINE = KernelSpec(
    _combine_splits_kernel, tuple(combine_row(s, c) for s in (2, 4, 8, 16, 32) for c, _ in DIMS)
)
SPECS = (SPARSE, COMBINE)


def _layout(kv_buffer: Tensor) -> str:
    """Name of the rows in the tiles' tables; fp32 and fp16 (the interpreter) run as bf16."""
    return {torch.uint8: "fp8", torch.float8_e4m3fn: "flat"}.get(kv_buffer.dtype, "bf16")


def _fields(kv_buffer: Tensor) -> dict[str, Tensor]:
    """The buffer through one pointer a field's type."""
    if kv_buffer.dtype != torch.uint8:
        return {"latent": kv_buffer, "scales": kv_buffer, "rope": kv_buffer}
    return {
        "latent": kv_buffer.view(torch.float8_e4m3fn),
        "scales": kv_buffer.view(torch.float32),
        "rope": kv_buffer.view(torch.bfloat16),
    }


def attend(
    q_latent: Tensor, q_pe: Tensor, kv_buffer: Tensor, topk_indices: Tensor, out: Tensor,
    score_scale: float, value_scale: float, mode: PdlMode,
) -> None:  # fmt: skip
    """out [T, H, C] = attention; `score_scale` holds the scales of query and keys."""
    (tokens, heads, c), topk = q_latent.shape, topk_indices.shape[1]
    layout = _layout(kv_buffer)
    tile = launch_config(f"sparse_mla_{layout}", tokens, (heads, topk))
    steps = -(-topk // (tile.split * tile.block_n))
    shape = (tokens, tile.split, heads)
    final = tile.split == 1
    lse = torch.empty(shape, dtype=torch.float32, device=out.device)
    partial = out if final else torch.empty((*shape, c), dtype=torch.float32, device=out.device)
    args: dict[str, Any] = {
        "q_latent": q_latent, "q_pe": q_pe, "indices": topk_indices, "out": partial, "lse": lse,
        "factor": score_scale * LOG2_E, "value_scale": value_scale,
        "heads": heads, "topk": topk, "split_keys": steps * tile.block_n,
        "q_token": q_latent.stride(0), "q_head": q_latent.stride(1),
        "pe_token": q_pe.stride(0), "pe_head": q_pe.stride(1),
        "indices_token": topk_indices.stride(0),
    }  # fmt: skip
    args |= _fields(kv_buffer) | constants(layout, tile, c, q_pe.shape[2])
    grid = (-(-heads // tile.block_m), tile.split, tokens)
    SPARSE.launch(grid, mode, args, tile.num_warps, tile.num_stages)
    if not final:
        combine = {"partial": partial, "lse": lse, "out": out, "heads": heads}
        COMBINE.launch((heads, tokens), mode, combine | {"SPLIT": tile.split, "C": c})
