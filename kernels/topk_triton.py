"""Triton kernels under `select_topk` and `all_slots`.

A program keeps up to 8192 scores of a row in registers (`topk_search_triton`). Longer rows are
thinned first: each chunk's K best, in their order, then the same over those, as often as it takes.
Chunks but the last hold K survivors each, so the length of what is left follows from seq_lens.
Pointers to scores are taken as unaligned: then loads, scans and scattered stores share one layout,
32 neighbours a warp, and nothing moves through shared memory in between. Nothing is constant over a
replay, so every access follows the wait.
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
from minidsv.kernels.tiles_indexer import ALL_SLOTS_TILE, CHUNK, SELECT_WARPS
from minidsv.kernels.topk_search_triton import choose


@triton.jit
def _load_scores(scores, where, within, n):
    """Scores with NaN as -inf, and -inf from the n-th on."""
    x = tl.maximum(tl.load(scores + where, mask=within, other=0.0), float("-inf"))
    return tl.where(where < n, x, float("-inf"))


@triton.jit
def _survivors(n, k, levels, CHUNK: tl.constexpr):
    """Length of a row of n scores after thinning `levels` times."""
    for _ in range(levels):
        n = n // CHUNK * k + tl.minimum(n % CHUNK, k)
    return n


@triton.jit(
    do_not_specialize=["k", "levels"],
    do_not_specialize_on_alignment=[
        "scores", "positions", "scores_out", "positions_out", "seq_lens"
    ],
)  # fmt: skip
def _thin_kernel(
    scores, positions, scores_out, positions_out, seq_lens, k, levels, stride, stride_out,
    CHUNK: tl.constexpr, THINNED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One chunk's k best, in their order; `positions` are those of `scores`, if thinned before."""
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    where = tl.arange(0, CHUNK)
    pdl_begin(PDL)
    n = _survivors(tl.load(seq_lens + row).to(tl.int32), k, levels, CHUNK) - chunk * CHUNK
    if n > 0:
        n = tl.minimum(n, CHUNK)
        start = row * stride + chunk * CHUNK
        x = _load_scores(scores + start, where, where < n, n)
        position = chunk * CHUNK + where
        if THINNED:
            position = tl.load(positions + start + where, mask=where < n, other=0)
        chosen, place = choose(x, n, k, CHUNK)
        out = row * stride_out + chunk * k
        tl.store(scores_out + out + place, x, mask=chosen)
        tl.store(positions_out + out + place, position, mask=chosen)
    pdl_end(PDL)


@triton.jit
def _pages(positions, table, where, n, THINNED: tl.constexpr, PAGE: tl.constexpr):
    """The position that each of n scores has in its request, and that position's page."""
    position = where
    if THINNED:
        position = tl.load(positions + where, mask=where < n, other=0)
    return position, tl.load(table + position // PAGE, mask=where < n, other=0).to(tl.uint32)


@triton.jit(
    do_not_specialize=["k", "levels", "columns", "pages"],
    do_not_specialize_on_alignment=[
        "scores", "positions", "seq_lens", "block_table", "request_index"
    ],
)  # fmt: skip
def _select_kernel(
    slots, scores, positions, seq_lens, block_table, request_index,
    k, levels, columns, stride, pages,
    BLOCK: tl.constexpr, CHUNK: tl.constexpr, THINNED: tl.constexpr, PAGE: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """The slots of a row's k best of at most `columns` <= BLOCK scores, then -1."""
    row = tl.program_id(0).to(tl.int64)
    where = tl.arange(0, BLOCK)
    pdl_begin(PDL)
    table = block_table + tl.load(request_index + row).to(tl.int64) * pages
    n = _survivors(tl.load(seq_lens + row).to(tl.int32), k, levels, CHUNK)
    x = _load_scores(scores + row * stride, where, where < columns, n)
    position, page = _pages(positions + row * stride, table, where, n, THINNED, PAGE)
    chosen, place = choose(x, n, k, BLOCK)
    slot = page.to(tl.int64) * PAGE + position % PAGE
    tl.store(slots + row * k + place, slot, mask=chosen)
    if n < k:
        tl.store(slots + row * k + where, -1, mask=(where >= n) & (where < k))
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


_Arguments = dict[str, str | int | float]
_SCORES: _Arguments = {
    "scores": "*fp32", "positions": "*i32", "seq_lens": "*i64", "k": "i32", "levels": "i32",
    "stride": "i32:16", "CHUNK": CHUNK,
}  # fmt: skip
_TABLES: _Arguments = {"request_index": "*i64", "pages": "i32", "PAGE": PAGE_SIZE}


def _select_row(block: int, thinned: bool = False, table: str = "*i64") -> Row:
    more: _Arguments = {"slots": "*i64:16", "block_table": table, "columns": "i32"}
    sizes: _Arguments = {"BLOCK": block, "THINNED": thinned}
    return Row(_SCORES | _TABLES | more | sizes, SELECT_WARPS[block])


def _thin_row(thinned: bool) -> Row:
    more: _Arguments = {"scores_out": "*fp32", "positions_out": "*i32", "stride_out": "i32:16"}
    return Row(_SCORES | more | {"THINNED": thinned}, SELECT_WARPS[CHUNK])


SELECT = KernelSpec(
    _select_kernel,
    (
        *(_select_row(block, thinned) for block in SELECT_WARPS for thinned in (False, True)),
        _select_row(4096, table="*i32"),
    ),
)
THIN = KernelSpec(_thin_kernel, (_thin_row(False), _thin_row(True)))
ALL_SLOTS = KernelSpec(
    _all_slots_kernel,
    tuple(
        Row(
            {"slots": "*i64:16", "seq_lens": "*i64", "block_table": table, "width": "i32"}
            | _TABLES
            | {"BLOCK": ALL_SLOTS_TILE.block_n}
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
        "levels": left.levels,
        "THINNED": left.levels > 0,
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
        "levels": left.levels,
        "THINNED": left.levels > 0,
        "CHUNK": thin.block_n,
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
