"""Triton kernels under `select_topk` and `all_slots`.

A program keeps up to 32768 scores of a row in registers and narrows a bracket [low, high) until
the K-th best score is known:

    count(x >= low) >= K > count(x >= high)      done when the first is K, or low and high neighbour

Two pivots a round. They interpolate the bracket's ends, half a standard error of the rank to either
side, as long as that halves the scores in the bracket, and cut the fp32 numbers in it (as ordered
integers) in three otherwise: about 5 rounds for smooth scores, at most some 25 for any. What is
chosen depends on the counts alone, so it is exact: all scores from `high` on, and of those in the
bracket the first by position. One prefix sum gives every chosen score its place.

Longer rows are thinned first: each chunk's K best, in their order, then the same over those, as
often as it takes. Chunks but the last hold K survivors each, so the length of what is left follows
from seq_lens. Nothing is constant over a replay, so every access follows the wait.
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from minidsv.kernels.constants import PAGE_SIZE
from minidsv.kernels.launch import KernelSpec, Row, pdl_begin, pdl_end
from minidsv.kernels.launch_config import launch_config
from minidsv.kernels.pdl import PdlMode
from minidsv.kernels.tile import Tile
from minidsv.kernels.tiles_indexer import SELECT_BLOCKS

LOWEST = tl.constexpr(-2139095041)  # _order(-inf)
BEYOND = tl.constexpr(2139095041)  # _order(inf) + 1: a NaN, which no score reaches


@triton.jit
def _order(x):
    """fp32 -> int32 of the same order; -0.0 lies just below 0.0."""
    bits = x.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _value(order):
    return (order ^ ((order >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _finite(x):
    return tl.abs(x) < float("inf")


@triton.jit
def _first_pivots(x, n, k):
    """Two values about the K-th best of n normally distributed scores, and their deviation."""
    seen = tl.where(x == x, x, 0.0)
    mean = tl.sum(seen, 0) / n
    deviation = tl.sqrt(tl.maximum(tl.sum(seen * seen, 0) / n - mean * mean, 0.0))
    quantile = mean + deviation * tl.log(tl.maximum(n - k, 1) / k.to(tl.float32)) / 1.702
    return quantile - 0.15 * deviation, quantile + 0.15 * deviation, deviation


@triton.jit
def _next_pivots(low, high, over, m, deviation, halved, rounds):
    """Of a bracket with m scores, `over` more than wanted from `low` on."""
    bottom, top = _value(low), _value(high)
    third = ((high - low).to(tl.uint32) // 3).to(tl.int32)
    a, b = _value(low + third), _value(high - third)
    step = deviation * rounds
    if _finite(bottom) & _finite(top):
        if halved:
            share = over / m.to(tl.float32)
            margin = (0.5 * tl.sqrt(m * share * (1 - share)) + 0.25) / m
            a = bottom + (top - bottom) * (share - margin)
            b = bottom + (top - bottom) * (share + margin)
    elif (rounds < 3) & _finite(bottom):
        a, b = bottom + 0.5 * step, bottom + 2 * step
    elif (rounds < 3) & _finite(top):
        a, b = top - 2 * step, top - 0.5 * step
    return a, b


@triton.jit
def _bracket(x, n, k):
    """low, high as ordered integers and count(x >= high), for n scores, the rest of x NaN."""
    low, high = tl.full((), LOWEST, tl.int32), tl.full((), BEYOND, tl.int32)
    from_low, from_high = n, n * 0
    a, b, deviation = _first_pivots(x, n, k)
    rounds = n * 0
    while (from_low > k) & (high != low + 1):
        rounds += 1
        first = tl.where(a == a, _order(a), low)
        first = tl.minimum(tl.maximum(first, low + 1), high - 1)
        second = tl.minimum(tl.maximum(_order(b), first), high - 1)
        pair = tl.where(x >= _value(first), 1, 0) + tl.where(x >= _value(second), 65536, 0)
        counts = tl.sum(pair, 0)
        from_first, from_second = counts & 0xFFFF, (counts >> 16) & 0xFFFF
        before = from_low - from_high
        if from_second >= k:
            low, from_low = second, from_second
        elif from_first >= k:
            low, from_low, high, from_high = first, from_first, second, from_second
        else:
            high, from_high = first, from_first
        m = from_low - from_high
        a, b = _next_pivots(low, high, from_low - k, m, deviation, 2 * m <= before, rounds)
    return low, high, from_high


@triton.jit
def _choose(x, n, k):
    """Each score's place among the k best, -1 if it is not; n scores, the rest of x NaN."""
    low, high, above = _bracket(x, n, k)
    surely = x >= _value(high)
    perhaps = (x >= _value(low)) & ~surely
    ones = tl.where(surely, 1, 0) + tl.where(perhaps, 65536, 0)
    before = tl.cumsum(ones, 0) - ones
    ties = (before >> 16) & 0xFFFF
    chosen = surely | (perhaps & (ties < k - above))
    return tl.where(chosen, (before & 0xFFFF) + tl.minimum(ties, k - above), -1)


@triton.jit
def _load_scores(scores, offsets, within, n):
    """Scores with NaN as -inf, and NaN from the n-th on."""
    x = tl.load(scores + offsets, mask=within, other=0.0)
    x = tl.where(x == x, x, float("-inf"))
    return tl.where(offsets < n, x, float("nan"))


@triton.jit
def _survivors(n, k, CHUNK: tl.constexpr, LEVELS: tl.constexpr):
    """Length of a row of n scores after thinning."""
    for _ in tl.static_range(LEVELS):
        n = n // CHUNK * k + tl.minimum(n % CHUNK, k)
    return n


@triton.jit(do_not_specialize=["k"], do_not_specialize_on_alignment=["seq_lens"])
def _thin_kernel(
    scores, positions, scores_out, positions_out, seq_lens, k, stride, stride_out,
    CHUNK: tl.constexpr, LEVELS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One chunk's k best, in their order; `positions` are those of `scores` from level 1 on."""
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    offsets = tl.arange(0, CHUNK)
    pdl_begin(PDL)
    n = _survivors(tl.load(seq_lens + row).to(tl.int32), k, CHUNK, LEVELS) - chunk * CHUNK
    if n > 0:
        n = tl.minimum(n, CHUNK)
        start = row * stride + chunk * CHUNK
        x = _load_scores(scores + start, offsets, offsets < n, n)
        place = _choose(x, n, k)
        chosen, out = place >= 0, row * stride_out + chunk * k + place
        tl.store(scores_out + out, x, mask=chosen)
        where = chunk * CHUNK + offsets
        if LEVELS > 0:
            where = tl.load(positions + start + offsets, mask=chosen, other=0)
        tl.store(positions_out + out, where, mask=chosen)
    pdl_end(PDL)


@triton.jit(
    do_not_specialize=["k", "columns", "pages"],
    do_not_specialize_on_alignment=["seq_lens", "block_table", "request_index"],
)
def _select_kernel(
    slots, scores, positions, seq_lens, block_table, request_index, k, columns, stride, pages,
    BLOCK: tl.constexpr, CHUNK: tl.constexpr, LEVELS: tl.constexpr, PAGE: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """The slots of a row's k best of at most `columns` <= BLOCK scores, then -1."""
    row = tl.program_id(0).to(tl.int64)
    offsets = tl.arange(0, BLOCK)
    pdl_begin(PDL)
    request = tl.load(request_index + row).to(tl.int64)
    n = _survivors(tl.load(seq_lens + row).to(tl.int32), k, CHUNK, LEVELS)
    x = _load_scores(scores + row * stride, offsets, offsets < columns, n)
    place = _choose(x, n, k)
    chosen, out = place >= 0, row * k + place
    where = offsets
    if LEVELS > 0:
        where = tl.load(positions + row * stride + offsets, mask=chosen, other=0)
    page = tl.load(block_table + request * pages + where // PAGE, mask=chosen, other=0)
    tl.store(slots + out, page.to(tl.int64) * PAGE + where % PAGE, mask=chosen)
    tl.store(slots + row * k + offsets, -1, mask=(offsets >= n) & (offsets < k))
    pdl_end(PDL)


@triton.jit(
    do_not_specialize=["width", "pages"],
    do_not_specialize_on_alignment=["seq_lens", "block_table", "request_index"],
)
def _all_slots_kernel(
    slots, seq_lens, block_table, request_index, width, pages,
    BLOCK: tl.constexpr, PAGE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    where = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    pdl_begin(PDL)
    n = tl.load(seq_lens + row)
    request = tl.load(request_index + row).to(tl.int64)
    page = tl.load(block_table + request * pages + where // PAGE, mask=where < n, other=0)
    slot = tl.where(where < n, page.to(tl.int64) * PAGE + where % PAGE, -1)
    tl.store(slots + row * width + where, slot, mask=where < width)
    pdl_end(PDL)


@dataclass(frozen=True)
class Scores:
    """What is left of the rows: fp32 [T, columns], positions int32 of the same shape, levels."""

    values: Tensor
    positions: Tensor
    levels: int = 0


_SCORES = {
    "scores": "*fp32:16", "positions": "*i32:16", "seq_lens": "*i64", "k": "i32", "stride": "i32:16"
}  # fmt: skip
_TABLES = {"request_index": "*i64", "pages": "i32", "PAGE": PAGE_SIZE}


def _select_row(block: int, chunk: int = 0, levels: int = 0, table: str = "*i64") -> Row:
    more = {"slots": "*i64:16", "block_table": table, "columns": "i32"}
    sizes = {"BLOCK": block, "CHUNK": chunk, "LEVELS": levels}
    return Row(_SCORES | _TABLES | more | sizes, SELECT_BLOCKS[block])


def _thin_row(chunk: int, level: int) -> Row:
    more = {"scores_out": "*fp32:16", "positions_out": "*i32:16", "stride_out": "i32:16"}
    return Row(_SCORES | more | {"CHUNK": chunk, "LEVELS": level}, SELECT_BLOCKS[chunk])


_THINNED = ((8192, 1), (16384, 1), (16384, 2))  # chunk, levels
SELECT = KernelSpec(
    _select_kernel,
    (
        *(_select_row(block) for block in SELECT_BLOCKS),
        *(_select_row(b, *thinned) for b in SELECT_BLOCKS for thinned in _THINNED),
        _select_row(4096, table="*i32"),
    ),
)
THIN = KernelSpec(_thin_kernel, tuple(_thin_row(c, levels - 1) for c, levels in _THINNED))
ALL_SLOTS = KernelSpec(
    _all_slots_kernel,
    tuple(
        Row(
            {"slots": "*i64:16", "seq_lens": "*i64", "block_table": table, "width": "i32"}
            | _TABLES
            | {"BLOCK": 1024}
        )
        for table in ("*i64", "*i32")
    ),
)
SPECS = (THIN, SELECT, ALL_SLOTS)


def _thin(left: Scores, tile: Tile, seq_lens: Tensor, k: int, mode: PdlMode) -> Scores:
    """Keep each chunk's k best: [T, columns] -> [T, chunks * k]."""
    rows, columns = left.values.shape
    chunks = -(-columns // tile.block_n)
    values = left.values.new_empty(rows, chunks * k)
    positions = torch.empty_like(values, dtype=torch.int32)
    args = {
        "scores": left.values,
        "positions": left.positions,
        "scores_out": values,
        "positions_out": positions,
        "seq_lens": seq_lens,
        "k": k,
        "stride": left.values.stride(0),
        "stride_out": values.stride(0),
        "CHUNK": tile.block_n,
        "LEVELS": left.levels,
    }
    THIN.launch((rows, chunks), mode, args, tile.num_warps)
    return Scores(values, positions, left.levels + 1)


def select(
    logits: Tensor,
    seq_lens: Tensor,
    k: int,
    block_table: Tensor,
    request_index: Tensor,
    mode: PdlMode,
) -> Tensor:
    """logits [T, S] -> slots int64 [T, k]; k at most half a chunk where rows have to be thinned."""
    assert logits.stride(1) == 1, f"logits strides {logits.stride()}: want contiguous rows"
    thin = launch_config("thin_topk", len(logits), (logits.shape[1], k))
    left = Scores(logits, logits.view(torch.int32))
    while left.values.shape[1] > thin.block_n:
        assert 2 * k <= thin.block_n, f"k {k} is above {thin.block_n // 2}"
        left = _thin(left, thin, seq_lens, k, mode)
    rows, columns = left.values.shape
    assert k <= thin.block_n, f"k {k} is above {thin.block_n}"
    tile = launch_config("select_topk", rows, (columns, k))
    slots = torch.empty(rows, k, dtype=torch.int64, device=logits.device)
    args = {
        "slots": slots,
        "scores": left.values,
        "positions": left.positions,
        "k": k,
        "columns": columns,
        "stride": left.values.stride(0),
        "BLOCK": tile.block_n,
        "LEVELS": left.levels,
        "CHUNK": thin.block_n if left.levels else 0,
    }
    SELECT.launch((rows,), mode, args | _rows(seq_lens, block_table, request_index), tile.num_warps)
    return slots


def _rows(seq_lens: Tensor, block_table: Tensor, request_index: Tensor) -> dict[str, Any]:
    for name, x in (("seq_lens", seq_lens), ("request_index", request_index)):
        assert x.is_contiguous(), f"{name} has stride {x.stride()}"
    assert block_table.stride(1) == 1, f"block_table strides {block_table.stride()}"
    return {
        "seq_lens": seq_lens,
        "block_table": block_table,
        "request_index": request_index,
        "pages": block_table.stride(0),
        "PAGE": PAGE_SIZE,
    }


def write_all_slots(
    seq_lens: Tensor, block_table: Tensor, request_index: Tensor, width: int, mode: PdlMode
) -> Tensor:
    """slots int64 [T, width]."""
    rows = len(seq_lens)
    tile = launch_config("all_slots", rows, ())
    slots = torch.empty(rows, width, dtype=torch.int64, device=seq_lens.device)
    args = {"slots": slots, "width": width, "BLOCK": tile.block_n}
    grid = (rows, -(-width // tile.block_n))
    args |= _rows(seq_lens, block_table, request_index)
    ALL_SLOTS.launch(grid, mode, args, tile.num_warps)
    return slots
