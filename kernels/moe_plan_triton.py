"""Triton kernels around the expert GEMMs: who computes what, and the sum of a token's experts.

    prepare   order [T * k]: slots (token * k + choice) by expert, then by slot
              plan [tiles, 3]: expert, begin, end of at most BT entries of `order`; unused tiles
              are empty
    combine   out[t] = sum_j weights[t, j] y[t * k + j] + y[T * k + t]

Every expert has a program, which counts all choices itself: no atomics, no sort, one launch.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import cdiv, next_power_of_2

from minidsv.kernels.launch import KernelSpec, Row, pdl_begin, pdl_end
from minidsv.kernels.pdl import PdlMode

COMBINE_BLOCK = 512


@triton.jit(do_not_specialize=("slots", "tiles", "experts"))
def _prepare_kernel(
    ids, order, plan, slots, tiles, experts,
    BINS: tl.constexpr, CHUNK: tl.constexpr, BT: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Entries of `order` and tiles of one expert; the last one's program empties unused tiles."""
    expert = tl.program_id(0)
    bins, c = tl.arange(0, BINS), tl.arange(0, CHUNK)
    pdl_begin(PDL)
    counts = tl.zeros((BINS,), dtype=tl.int32)
    for start in range(0, slots, CHUNK):
        chosen = tl.load(ids + start + c, mask=start + c < slots, other=0).to(tl.int32)
        counts += tl.histogram(chosen, BINS)
    counts -= tl.where(bins == 0, tl.cdiv(slots, CHUNK) * CHUNK - slots, 0)  # behind the slots
    begin = tl.sum(tl.where(bins < expert, counts, 0))
    tile = tl.sum(tl.where(bins < expert, (counts + BT - 1) // BT, 0))
    end = begin + tl.sum(tl.where(bins == expert, counts, 0))
    filled = begin
    for start in range(0, slots, CHUNK):
        chosen = tl.load(ids + start + c, mask=start + c < slots, other=-1).to(tl.int32)
        mine = (chosen == expert).to(tl.int32)
        tl.store(order + filled + tl.cumsum(mine, 0) - 1, start + c, mask=mine == 1)
        filled += tl.sum(mine)
    for at in range(begin, end, BT):
        tl.store(plan + tile * 3, expert)
        tl.store(plan + tile * 3 + 1, at)
        tl.store(plan + tile * 3 + 2, tl.minimum(at + BT, end))
        tile += 1
    if expert == experts - 1:
        for start in range(tile * 3, tiles * 3, CHUNK):
            tl.store(plan + start + c, c * 0, mask=start + c < tiles * 3)
    pdl_end(PDL)


@triton.jit(do_not_specialize=("tokens",))
def _combine_kernel(
    y, weights, out, tokens, hidden,
    K: tl.constexpr, SHARED: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    j, n = tl.arange(0, BLOCK_K), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    chosen, inside = j < K, n < hidden
    pdl_begin(PDL)
    weight = tl.load(weights + token * K + j, mask=chosen, other=0.0)
    rows = y + (token * K + j)[:, None] * hidden + n[None, :]
    part = tl.load(rows, mask=chosen[:, None] & inside[None, :], other=0.0).to(tl.float32)
    total = tl.sum(part * weight[:, None], 0)
    if SHARED:
        total += tl.load(y + (tokens * K + token) * hidden + n, mask=inside).to(tl.float32)
    tl.store(out + token * hidden + n, total.to(out.dtype.element_ty), mask=inside)
    pdl_end(PDL)


def _prepare_row(bins: int, chunk: int, bt: int) -> Row:
    pointers = {"ids": "*i64:16", "order": "*i32:16", "plan": "*i32:16"}
    sizes = {"slots": "i32", "tiles": "i32", "experts": "i32"}
    return Row({**pointers, **sizes, "BINS": bins, "CHUNK": chunk, "BT": bt})


PLAN_TILES = (8, 16, 32, 64, 128)
PREPARE = KernelSpec(
    _prepare_kernel,
    tuple(
        _prepare_row(bins, chunk, bt)
        for bins in (256, 64, 8)
        for chunk in (512, 2048)
        for bt in PLAN_TILES
    ),
)
COMBINE = KernelSpec(
    _combine_kernel,
    tuple(
        Row(
            {
                "y": "*bf16:16", "weights": "*fp32:16", "out": "*bf16:16", "tokens": "i32",
                "hidden": "i32:16", "K": k, "SHARED": shared, "BLOCK_K": next_power_of_2(k),
                "BLOCK": COMBINE_BLOCK,
            }
        )
        for k in (8, 6, 2)
        for shared in (1, 0)
    ),
)  # fmt: skip
SPECS = (PREPARE, COMBINE)


def max_tiles(slots: int, experts: int, bt: int) -> int:
    """Most tiles of `bt` slots that any choice of experts needs."""
    named = min(slots, experts)
    return named + (slots - named) // bt


def prepare(ids: Tensor, experts: int, bt: int, mode: PdlMode) -> tuple[Tensor, Tensor]:
    """(plan, order) of ids [T, k]."""
    slots = ids.numel()
    tiles = max_tiles(slots, experts, bt)
    plan = torch.empty((tiles, 3), dtype=torch.int32, device=ids.device)
    order = torch.empty(slots, dtype=torch.int32, device=ids.device)
    args: dict[str, Any] = {
        "ids": ids, "order": order, "plan": plan, "slots": slots, "tiles": tiles,
        "experts": experts, "BINS": max(2, next_power_of_2(experts)),
        "CHUNK": 512 if slots <= 512 else 2048, "BT": bt,
    }  # fmt: skip
    PREPARE.launch((experts,), mode, args)
    return plan, order


def combine(y: Tensor, weights: Tensor, tokens: int, shared: bool, mode: PdlMode) -> Tensor:
    """y [T * k (+ T), hidden], weights [T, k] -> [T, hidden] in y's dtype."""
    k, hidden = weights.shape[1], y.shape[1]
    out = torch.empty((tokens, hidden), dtype=y.dtype, device=y.device)
    args: dict[str, Any] = {
        "y": y, "weights": weights, "out": out, "tokens": tokens, "hidden": hidden, "K": k,
        "SHARED": int(shared), "BLOCK_K": next_power_of_2(k), "BLOCK": COMBINE_BLOCK,
    }  # fmt: skip
    COMBINE.launch((tokens, cdiv(hidden, COMBINE_BLOCK)), mode, args)
    return out
