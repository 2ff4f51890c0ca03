"""Triton kernels of the MLPs for few tokens: gate_up, then down with the sum over the experts.

A tile of weights is [ROWS, KS, 128]: each warp multiplies its own 128 columns (gate_up, and the
shared expert's down) or its own expert (down), so that few rows a program fill the device, and the
warps' sums meet once, at the end. A program of down owns ROWS of `hidden` and all tokens. It walks
over the shared expert and then KS routed ones at a time in one loop, whose loads run ahead from an
expert into the next: all programs read as much, and nothing is left to be summed up. Which experts
are named by whom gate_up finds out itself, and lists for down.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import cdiv, next_power_of_2

from minidsv.kernels.gemm_triton import as_operand
from minidsv.kernels.launch import KernelSpec, Row, pdl_begin, pdl_end
from minidsv.kernels.launch_config import launch_config
from minidsv.kernels.mlp_triton import (
    Weights,
    as_held,
    down_arguments,
    gate_up_arguments,
    prefetch,
    swiglu,
    weight_types,
)
from minidsv.kernels.pdl import PdlMode
from minidsv.kernels.tile import Tile
from minidsv.kernels.tiles_moe import FEW_DOWN, FEW_GATE_UP, FEW_TOKENS


@triton.jit
def _multiply(total, w, x, scale):
    """total [KS, ROWS, BT] + w [ROWS, KS, 128] x [BT, KS, 128], FP8 times scale [KS, 1, 1]."""
    x = tl.permute(x, (1, 2, 0))
    if w.dtype == tl.float8e4nv:
        total += tl.dot(as_operand(tl.permute(w, (1, 0, 2)), x, False), x) * scale
    else:
        total = tl.dot(tl.permute(w, (1, 0, 2)), x, total, input_precision="ieee")
    return total


@triton.jit
def _tile(ids, weights, tile, tokens, top_k, BT: tl.constexpr, BLOCK_K: tl.constexpr):
    """(the number of experts named, entry and shares [BT] of the tile-th of them).

    They come in the order in which the slots (token * k + choice) name them first. An entry is
    expert << BT | the tokens' bits, 0 where there is none; shares are its weights.
    """
    SLOTS: tl.constexpr = BT * BLOCK_K
    t, j, i = tl.arange(0, BT), tl.arange(0, BLOCK_K)[None, :], tl.arange(0, SLOTS)
    slots = tokens * top_k
    named = tl.load(ids + i, mask=i < slots, other=-1).to(tl.int32)
    again = tl.load(ids + i[None, :], mask=i[None, :] < slots, other=-1).to(tl.int32)
    first = tl.min(tl.where(named[:, None] == again, i[None, :], SLOTS), 1)
    leads = ((first == i) & (i < slots)).to(tl.int32)
    mine = (leads == 1) & (tl.cumsum(leads, 0) == tile + 1)
    expert = tl.max(tl.where(mine, named, -1), 0)
    at, inside = t[:, None] * top_k + j, (t < tokens)[:, None] & (j < top_k)
    hit = tl.load(ids + at, mask=inside, other=-2).to(tl.int32) == expert
    shares = tl.sum(tl.where(hit, tl.load(weights + at, mask=inside, other=0.0), 0.0), 1)
    bits = tl.sum(tl.max(hit.to(tl.int32), 1) << t, 0)
    return tl.sum(leads, 0), tl.where(expert >= 0, (expert << BT) | bits, 0), shares


@triton.jit(do_not_specialize=("tokens", "top_k", "tiles"))
def _few_gate_up_kernel(
    x, h, shared_h, ids, weights, entries, shares, weight, scale, shared_weight, shared_scale,
    tokens, top_k, tiles, hidden, inner, shared_inner,
    ROWS: tl.constexpr, BT: tl.constexpr, KS: tl.constexpr, BLOCK_K: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """A program: ROWS of gate and the same of up. A tile's first one lists it for down."""
    fp8: tl.constexpr = weight.dtype.element_ty == tl.float8e4nv
    program, t = tl.program_id(0), tl.arange(0, BT)
    part, k = tl.arange(0, KS)[None, :, None], tl.arange(0, 128)[None, None, :]
    leader = tl.arange(0, KS)[:, None, None]  # the same, as sums lie
    shared_programs = tl.cdiv(shared_inner, ROWS)
    shared = program < shared_programs
    if PDL == "prefetch":
        r = tl.arange(0, ROWS * 2)
        line = tl.minimum(program * ROWS + r % ROWS, shared_inner - 1) + r // ROWS * shared_inner
        prefetch(shared_weight + line.to(tl.int64) * hidden, hidden, shared.to(tl.int32), 4)
    pdl_begin(PDL)
    routed, blocks = program - shared_programs, tl.cdiv(inner, ROWS)
    tile = tl.where(shared, 0, routed // blocks)
    block = tl.where(shared, program, routed % blocks)
    entry = 0
    if shared == 0:
        count, entry, share = _tile(ids, weights, tile, tokens, top_k, BT, BLOCK_K)
        if block == 0:
            tl.store(entries, count, mask=tile == 0)
            tl.store(entries + 1 + tile, entry)
            tl.store(shares + tile * BT + t, share)
    if shared | (entry > 0):
        width = tl.where(shared, shared_inner, inner)
        expert = (entry >> BT).to(tl.int64)
        mine = (t < tl.where(shared, tokens, 0)) | (((entry >> t) & 1) == 1)
        base = tl.where(shared, shared_weight, weight + expert * 2 * inner * hidden)
        row = tl.minimum(block * ROWS + tl.arange(0, ROWS), width - 1).to(tl.int64)
        gate_w = base + row[:, None, None] * hidden
        up_w = gate_w + width.to(tl.int64) * hidden
        source = x + t[:, None, None] * hidden
        k_blocks = tl.cdiv(hidden, 128)
        half = tl.cdiv(width, 128) * k_blocks  # gate's scales, and as many of up
        s = tl.where(shared, shared_scale, scale + expert * 2 * half)
        s += block * ROWS // 128 * k_blocks + leader
        gate, up = tl.zeros((KS, ROWS, BT), tl.float32), tl.zeros((KS, ROWS, BT), tl.float32)
        gate_s, up_s = tl.zeros((KS, 1, 1), tl.float32), tl.zeros((KS, 1, 1), tl.float32)
        if fp8:
            gate_s = tl.load(s, mask=leader < k_blocks, other=0.0)
            up_s = tl.load(s + half, mask=leader < k_blocks, other=0.0)
        for start in range(0, k_blocks, KS):
            at = (start + part) * 128 + k
            gate_tile = tl.load(gate_w + at, mask=at < hidden, other=0.0)
            up_tile = tl.load(up_w + at, mask=at < hidden, other=0.0)
            mask = mine[:, None, None] & (at < hidden)
            values = tl.load(source + at, mask=mask, other=0.0)
            next_gate_s, next_up_s = gate_s, up_s
            if fp8:
                inside = start + KS + leader < k_blocks
                next_gate_s = tl.load(s + start + KS, mask=inside, other=0.0)
                next_up_s = tl.load(s + half + start + KS, mask=inside, other=0.0)
            gate = _multiply(gate, gate_tile, values, gate_s)
            up = _multiply(up, up_tile, values, up_s)
            gate_s, up_s = next_gate_s, next_up_s
        value = tl.trans(swiglu(tl.sum(gate, 0), tl.sum(up, 0), h)).to(h.dtype.element_ty)
        column = block * ROWS + tl.arange(0, ROWS)
        lines = tl.where(shared, shared_h, h + tile.to(tl.int64) * BT * inner)
        mask = mine[:, None] & (column < width)[None, :]
        tl.store(lines + t[:, None] * width + column[None, :], value, mask=mask)
    pdl_end(PDL)


@triton.jit
def _entry(entries, turn, count, part):
    """Entries that the parts have in a turn; 0 for none, and before the first turn."""
    d = turn * part.shape[0] * part.shape[1] + part
    return tl.load(entries + 1 + d, mask=(d >= 0) & (d < count), other=0)


@triton.jit
def _scale(
    scale, shared_scale, entries, turn, step, count, stride, shared_blocks,
    KS: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """[KS, 1, 1] scales of the tile of a turn and step."""
    leader = tl.arange(0, KS)[:, None, None]
    entry = _entry(entries, turn, count, leader)
    block = step * KS + leader
    pointers = tl.where(
        turn < 0, shared_scale + block, scale + (entry >> BT).to(tl.int64) * stride + step
    )
    inside = (block < tl.where(turn < 0, shared_blocks, 0)) | (entry > 0)
    return tl.load(pointers, mask=inside, other=0.0)


@triton.jit
def _shares(y, entries, shares, turn, count):
    """y [KS, ROWS, BT] of a turn's experts times their weights; 0 of tokens that have others."""
    KS: tl.constexpr = y.shape[0]
    BT: tl.constexpr = y.shape[2]
    leader, t = tl.arange(0, KS)[:, None, None], tl.arange(0, BT)[None, None, :]
    mine = ((_entry(entries, turn, count, leader) >> t) & 1) == 1
    share = tl.load(shares + (turn * KS + leader) * BT + t, mask=mine, other=0.0)
    return tl.where(mine, y * share, 0.0)


@triton.jit(do_not_specialize=("tokens", "tiles"))
def _few_down_kernel(
    h, shared_h, out, entries, shares, weight, scale, shared_weight, shared_scale,
    tokens, tiles, hidden, inner, shared_inner,
    ROWS: tl.constexpr, BT: tl.constexpr, KS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """`turn` counts KS experts at a time from 0, the shared one is -1; `step` its blocks of K."""
    fp8: tl.constexpr = weight.dtype.element_ty == tl.float8e4nv
    part, k = tl.arange(0, KS)[None, :, None], tl.arange(0, 128)[None, None, :]
    first, t = tl.program_id(0).to(tl.int64) * ROWS, tl.arange(0, BT)
    r = tl.minimum(tl.arange(0, ROWS), hidden - 1 - first.to(tl.int32))
    blocks, shared_blocks = tl.cdiv(inner, 128), tl.cdiv(shared_inner, 128)
    shared_steps = tl.cdiv(shared_blocks, KS)
    stride = blocks * tl.cdiv(hidden, 128)  # of an expert's scales
    scale += first // 128 * blocks
    shared_scale += first // 128 * shared_blocks
    if PDL == "prefetch":
        wanted = (shared_inner > 0).to(tl.int32)
        prefetch(shared_weight + (first + r) * shared_inner, shared_inner, wanted, 8)
    r, rows = r[:, None, None], t[:, None, None]
    pdl_begin(PDL)
    count = tl.load(entries, mask=tiles > 0, other=0)
    turn, step = tl.where(shared_steps > 0, -1, 0), 0
    entry = _entry(entries, turn, count, part)
    factor = tl.zeros((KS, 1, 1), tl.float32)
    if fp8:
        factor = _scale(
            scale, shared_scale, entries, turn, step, count, stride, shared_blocks, KS, BT
        )
    sums = tl.zeros((KS, ROWS, BT), tl.float32)
    total, shared_total = sums, sums
    for _ in range(shared_steps + tl.cdiv(count, KS) * blocks):
        shared = turn < 0
        width = tl.where(shared, shared_inner, inner)
        at = tl.where(shared, step * KS + part, step) * 128 + k
        expert = (entry >> BT).to(tl.int64)
        base = tl.where(shared, shared_weight, weight + expert * hidden * inner)
        # 128 in a row: not seen through the choice of a pointer
        source = tl.max_contiguous(base + first * width + (r * width + at), [1, 1, 128])
        inside = (at < width) & (entry > tl.where(shared, -1, 0))
        tile = tl.load(tl.multiple_of(source, [1, 1, 16]), mask=inside, other=0.0)
        lines = tl.where(shared, shared_h, h + (turn * KS + part).to(tl.int64) * BT * inner)
        mine = (rows < tl.where(shared, tokens, 0)) | (((entry >> rows) & 1) == 1)
        source = tl.max_contiguous(lines + (rows * width + at), [1, 1, 128])
        inside = mine & (at < width)
        values = tl.load(tl.multiple_of(source, [1, 1, 16]), mask=inside, other=0.0)
        last = step == tl.where(shared, shared_steps, blocks) - 1
        done = turn
        step = tl.where(last, 0, step + 1)
        turn += last.to(tl.int32)
        entry = _entry(entries, turn, count, part)
        following = factor
        if fp8:
            following = _scale(
                scale, shared_scale, entries, turn, step, count, stride, shared_blocks, KS, BT
            )
        sums = _multiply(sums, tile, values, factor)
        factor = following
        if last:
            if shared:
                shared_total = sums
            else:
                total += _shares(as_held(sums, out), entries, shares, done, count)
            sums = tl.zeros((KS, ROWS, BT), tl.float32)
    y = tl.trans(tl.sum(total, 0) + as_held(tl.sum(shared_total, 0), out))
    column = first + tl.arange(0, ROWS)
    inside = (t < tokens)[:, None] & (column < hidden)[None, :]
    tl.store(out + t[:, None] * hidden + column[None, :], y.to(out.dtype.element_ty), mask=inside)
    pdl_end(PDL)


TOP_K_BLOCKS = (8, 2)  # powers of two over the models' numbers of experts a token


def _row(size: int, tile: Tile, **more: str | int) -> Row:
    """Of weights of `size` bytes."""
    types: dict[str, str | int | float] = {
        "h": "*bf16:16", "shared_h": "*bf16:16", "entries": "*i32:16", "shares": "*fp32:16",
        "tokens": "i32", "tiles": "i32", "hidden": "i32:16", "inner": "i32:16",
        "shared_inner": "i32:16",
    }  # fmt: skip
    types |= weight_types(size == 1) | _sizes(tile) | more
    return Row(types, tile.num_warps, tile.num_stages)


def _sizes(tile: Tile) -> dict[str, int]:
    return {"ROWS": tile.block_n, "BT": tile.block_m, "KS": tile.split}


_CONSTANT = frozenset(("shared_weight", "shared_scale"))
_GATE_UP: dict[str, str | int] = {
    "x": "*bf16:16", "ids": "*i64:16", "weights": "*fp32:16", "top_k": "i32",
}  # fmt: skip
GATE_UP = KernelSpec(
    _few_gate_up_kernel,
    tuple(
        _row(size, tile, **_GATE_UP, BLOCK_K=block)
        for size, tiles in FEW_GATE_UP.items()
        for tile in tiles
        for block in TOP_K_BLOCKS
    ),
    _CONSTANT,
    fp_fusion=True,
)
DOWN = KernelSpec(
    _few_down_kernel,
    tuple(_row(size, tile, out="*bf16:16") for size, tiles in FEW_DOWN.items() for tile in tiles),
    _CONSTANT,
    fp_fusion=True,
)
SPECS = (GATE_UP, DOWN)


def few(
    x: Tensor, weights: Tensor, ids: Tensor, routed: Weights, shared: Weights | None, mode: PdlMode
) -> Tensor:
    """x [T, hidden], weights and ids [T, k], T at most FEW_TOKENS -> [T, hidden]."""
    (tokens, hidden), top_k, device = x.shape, ids.shape[1], x.device
    tiles = min(ids.numel(), len(routed.down)) if top_k else 0
    shared_inner = shared.inner if shared else 0
    shared, out = shared or routed, torch.empty_like(x)
    args: dict[str, Any] = {
        "h": x.new_empty(tiles * FEW_TOKENS, routed.inner),
        "shared_h": x.new_empty(tokens, shared_inner),
        "entries": torch.empty(1 + tiles, dtype=torch.int32, device=device),
        "shares": torch.empty((tiles, FEW_TOKENS), dtype=torch.float32, device=device),
        "tokens": tokens, "tiles": tiles, "hidden": hidden, "inner": routed.inner,
        "shared_inner": shared_inner,
    }  # fmt: skip
    dims = (1 if routed.down_scale is not None else 2, hidden)
    tile = launch_config("few_gate_up", tokens, dims)
    up = args | gate_up_arguments(routed, shared) | _sizes(tile)
    up |= {"x": x, "ids": ids, "weights": weights, "top_k": top_k}
    up["BLOCK_K"] = max(TOP_K_BLOCKS[-1], next_power_of_2(top_k))
    programs = cdiv(shared_inner, tile.block_n) + cdiv(routed.inner, tile.block_n) * tiles
    GATE_UP.launch((programs if tokens else 0,), mode, up, tile.num_warps, tile.num_stages)
    tile = launch_config("few_down", tokens, dims)
    down = args | down_arguments(routed, shared) | _sizes(tile) | {"out": out}
    grid = (cdiv(hidden, tile.block_n) if tokens else 0,)
    DOWN.launch(grid, mode, down, tile.num_warps, tile.num_stages)
    return out
