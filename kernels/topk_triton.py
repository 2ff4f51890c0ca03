"""Triton kernels under `select_topk` and `all_slots`.

A program keeps up to 8192 scores of a row in registers (`topk_search_triton`); longer rows go
through `topk_long_triton`. Pointers to scores are taken as unaligned: then loads, scans and
scattered stores share one layout, 32 neighbours a warp, and nothing moves through shared memory in
between. Nothing is constant over a replay, so every access follows the wait.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from minidsv.kernels.constants import PAGE_SIZE
from minidsv.kernels.launch import KernelSpec, Row, pdl_begin, pdl_end
from minidsv.kernels.launch_config import launch_config
from minidsv.kernels.pdl import PdlMode
from minidsv.kernels.tiles_indexer import ALL_SLOTS_TILE, SELECT_WARPS
from minidsv.kernels.topk_count_triton import room
from minidsv.kernels.topk_long_triton import select_long
from minidsv.kernels.topk_search_triton import choose, load_scores


@triton.jit(
    do_not_specialize=["k", "columns", "pages"],
    do_not_specialize_on_alignment=["scores", "seq_lens", "block_table", "request_index"],
)
def _select_kernel(
    slots, scores, seq_lens, block_table, request_index, k, columns, stride, pages,
    BLOCK: tl.constexpr, PAGE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """The slots of a row's k best of at most `columns` <= BLOCK scores, then -1."""
    row = tl.program_id(0).to(tl.int64)
    where = tl.arange(0, BLOCK)
    pdl_begin(PDL)
    n = tl.load(seq_lens + row).to(tl.int32)
    x = load_scores(scores + row * stride, where, where < columns, n)
    request = tl.load(request_index + row).to(tl.int64)
    tl.debug_barrier()  # the scores are on their way before a page has to wait for the request
    table = block_table + request * pages
    page = tl.load(table + where // PAGE, mask=where < columns, other=0).to(tl.uint32)
    chosen, place = choose(x, n, k, room(), BLOCK)
    slot = page.to(tl.int64) * PAGE + where % PAGE
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


_Arguments = dict[str, str | int | float]
_TABLES: _Arguments = {"request_index": "*i64", "pages": "i32", "PAGE": PAGE_SIZE}


def _select_row(block: int, table: str = "*i64") -> Row:
    scores: _Arguments = {
        "slots": "*i64:16", "scores": "*fp32", "seq_lens": "*i64", "block_table": table,
        "k": "i32", "columns": "i32", "stride": "i32:16", "BLOCK": block,
    }  # fmt: skip
    return Row(scores | _TABLES, SELECT_WARPS[block])


SELECT = KernelSpec(
    _select_kernel,
    (*(_select_row(block) for block in SELECT_WARPS), _select_row(4096, table="*i32")),
)
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
SPECS = (SELECT, ALL_SLOTS)


def select(
    logits: Tensor,
    seq_lens: Tensor,
    k: int,
    block_table: Tensor,
    request_index: Tensor,
    tickets: Tensor | None,
    mode: PdlMode,
) -> Tensor:
    """logits [T, S] -> slots int64 [T, k]."""
    assert logits.stride(1) == 1, f"logits strides {logits.stride()}: want contiguous rows"
    rows, columns = logits.shape
    tables = _rows(seq_lens, block_table, request_index)
    slots = torch.empty(rows, k, dtype=torch.int64, device=logits.device)
    tile = launch_config("select_topk", rows, (columns, k))
    if columns > tile.block_n:
        select_long(logits, k, tables, slots, tickets, mode)
        return slots
    assert k <= tile.block_n, f"k {k} is above {tile.block_n}"
    args = {
        "slots": slots,
        "scores": logits,
        "k": k,
        "columns": columns,
        "stride": logits.stride(0),
        "BLOCK": tile.block_n,
    }
    SELECT.launch((rows,), mode, args | tables, tile.num_warps)
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
