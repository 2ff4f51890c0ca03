"""Triton kernels under `select_topk` for rows of more scores than a program keeps in registers.

Each chunk's program finds, in the same sample of the row, a score that about `aim` > K of all are
as good as, and writes those of its chunk, by position, padded to lines of LINE. Then it takes a
ticket, and who has a row's last gathers the lines and chooses exactly among them: what is chosen
does not depend on who that is. Should there be fewer than K or more than it can hold (scores that
repeat, or a sample that misleads), it goes through all scores instead: slowly, and exactly as well.
"""

import math
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
from minidsv.kernels.tiles_indexer import LONG_ROWS
from minidsv.kernels.topk_count_triton import add, bits_a_pass, clear, find_bin, room
from minidsv.kernels.topk_search_triton import (
    HIGHEST,
    bins_of,
    choose,
    load_scores,
    order,
    places,
    search,
)

LINE = 16  # scores of one chunk that lie together before a row's last program gathers them
ABSENT = tl.constexpr(0x7FC00000)  # a NaN
RUN = tl.constexpr(8)  # neighbours in the sample: 32 bytes


@triton.jit
def _good(x, scores, n, aim, space, SAMPLE: tl.constexpr):
    """Which of x are as good as about `aim` of a row's n scores, by a sample of them (with repeats
    where n < SAMPLE)."""
    i = tl.arange(0, SAMPLE)
    start = (i // RUN).to(tl.int64) * n // (SAMPLE // RUN)
    where = start.to(tl.int32) // RUN * RUN + i % RUN
    sample = load_scores(scores, where, where < n, n)
    share = aim.to(tl.float32) * SAMPLE / n
    least = tl.maximum(share.to(tl.int32), 1)
    _, bound, _ = search(order(sample), least, (share * 0.06).to(tl.int32), space, SAMPLE)
    return order(x) > bound


@triton.jit
def _sift(
    kept, counts, scores, n, first, chunk, aim, held, space,
    CHUNK: tl.constexpr, SAMPLE: tl.constexpr, LINE: tl.constexpr,
):  # fmt: skip
    """One chunk's scores that may be among the best, all of them in rows of up to `held`."""
    where = tl.arange(0, CHUNK)
    count = n * 0
    if first < n:
        x = load_scores(scores + first, where, first + where < n, n - first)
        good = x == x
        if n > held:
            good = _good(x, scores, n, aim, space, SAMPLE)
        place = places(good, CHUNK)
        kept += first
        bits = x.to(tl.uint32, bitcast=True).to(tl.int64)
        tl.store(kept + place, (first + where).to(tl.int64) << 32 | bits, mask=good)
        count = tl.sum(tl.where(good, 1, 0), 0)
        line = tl.arange(0, LINE)
        tl.store(kept + count + line, ABSENT, mask=line < (LINE - count % LINE) % LINE)
    tl.store(counts + chunk, count)


@triton.jit
def _gathered(
    kept, counts, chunks,
    BLOCK: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr, LINE: tl.constexpr,
):  # fmt: skip
    """Scores and positions in a row's lines, how many scores, how many lines."""
    chunk = tl.arange(0, CHUNKS)
    count = tl.load(counts + chunk, mask=chunk < chunks, other=0)
    lines = (count + LINE - 1) // LINE
    end = tl.cumsum(lines, 0)
    line = tl.arange(0, BLOCK // LINE)
    behind = tl.where(end[None, :] <= line[:, None], CHUNK // LINE - lines[None, :], 0)
    total = tl.sum(lines, 0)
    source = (line + tl.sum(behind, 1)) * LINE
    where = source[:, None] + tl.arange(0, LINE)[None, :]
    real = (line < total)[:, None]
    both = tl.reshape(tl.load(kept + where, mask=real, other=ABSENT), (BLOCK,))
    x = both.to(tl.uint32).to(tl.float32, bitcast=True)
    return x, (both >> 32).to(tl.uint32), tl.sum(count, 0), total


@triton.jit
def _ordered(scores, first, n, BLOCK: tl.constexpr):
    where = first + tl.arange(0, BLOCK)
    return order(load_scores(scores, where, where < n, n))


@triton.jit
def _threshold(scores, n, k, space, BLOCK: tl.constexpr):
    """The k-th best of n > k scores in memory, ordered; how many of it are among the k best."""
    kth, shift, above = tl.full((), HIGHEST, tl.int32), tl.full((), 32, tl.int32), k * 0
    while shift > 0:
        shift = tl.maximum(shift - bits_a_pass(BLOCK), 0)
        counters = clear(space, BLOCK)
        for first in range(0, n, BLOCK):
            bins = bins_of(_ordered(scores, first, n, BLOCK), kth, shift, BLOCK)
            counters = add(counters, bins, BLOCK)
        bin, _ = find_bin(counters, k, 0, BLOCK)
        kth -= bin << shift
    for first in range(0, n, BLOCK):
        above += tl.sum(tl.where(_ordered(scores, first, n, BLOCK) > kth, 1, 0), 0)
    return kth, k - above


@triton.jit
def _go_through_all(slots, scores, table, n, k, space, BLOCK: tl.constexpr, PAGE: tl.constexpr):
    """The slots of the k best of n > k scores in memory."""
    kth, need = _threshold(scores, n, k, space, BLOCK)
    done, equal = k * 0, k * 0
    for start in range(0, n, BLOCK):
        where = start + tl.arange(0, BLOCK)
        u = _ordered(scores, start, n, BLOCK)
        same = u == kth
        chosen = (u > kth) | (same & (equal + places(same, BLOCK) < need))
        page = tl.load(table + where // PAGE, mask=chosen, other=0).to(tl.uint32)
        slot = page.to(tl.int64) * PAGE + where % PAGE
        tl.store(slots + done + places(chosen, BLOCK), slot, mask=chosen)
        done += tl.sum(tl.where(chosen, 1, 0), 0)
        equal += tl.sum(tl.where(same, 1, 0), 0)


@triton.jit
def _settle(
    slots, kept, counts, scores, table, n, k, chunks, space,
    BLOCK: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr, LINE: tl.constexpr,
    PAGE: tl.constexpr,
):  # fmt: skip
    """The slots of a row's k best, then -1."""
    x, position, kept_n, lines = _gathered(kept, counts, chunks, BLOCK, CHUNK, CHUNKS, LINE)
    if (lines * LINE <= BLOCK) & (kept_n >= tl.minimum(n, k)):
        slot = tl.load(table + position // PAGE).to(tl.uint32).to(tl.int64) * PAGE + position % PAGE
        chosen, place = choose(x, kept_n, k, space, BLOCK)
        tl.store(slots + place, slot, mask=chosen)
    else:
        _go_through_all(slots, scores, table, n, k, space, BLOCK, PAGE)
    for start in range(n, k, BLOCK):
        where = start + tl.arange(0, BLOCK)
        tl.store(slots + where, -1, mask=where < k)


@triton.jit(
    do_not_specialize=["aim", "held", "k", "chunks", "pages"],
    do_not_specialize_on_alignment=[
        "scores", "kept", "counts", "seq_lens", "block_table", "request_index"
    ],
)  # fmt: skip
def _select_long_kernel(
    slots, scores, kept, counts, tickets, seq_lens, block_table, request_index,
    aim, held, k, stride, stride_out, chunks, pages,
    BLOCK: tl.constexpr, CHUNK: tl.constexpr, SAMPLE: tl.constexpr, CHUNKS: tl.constexpr,
    LINE: tl.constexpr, PAGE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One chunk of a row; the last to be done chooses among what all have kept."""
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    scores += row * stride
    kept += row * stride_out
    counts += row * chunks
    pdl_begin(PDL)
    n = tl.load(seq_lens + row).to(tl.int32)
    space = room()
    first = chunk * CHUNK
    _sift(kept, counts, scores, n, first, chunk, aim, held, space, CHUNK, SAMPLE, LINE)
    tl.debug_barrier()  # every thread's stores are before its program's ticket
    before = tl.atomic_add(tickets + row, 1, sem="acq_rel", scope="gpu")
    if before == chunks - 1:
        tl.store(tickets + row, 0)
        table = block_table + tl.load(request_index + row).to(tl.int64) * pages
        slots += row * k
        _settle(
            slots, kept, counts, scores, table, n, k, chunks, space,
            BLOCK, CHUNK, CHUNKS, LINE, PAGE,
        )  # fmt: skip
    pdl_end(PDL)


def _sizes(tile: Tile) -> dict[str, int]:
    return {
        "BLOCK": tile.block_n, "CHUNK": tile.block_m, "SAMPLE": tile.block_k,
        "CHUNKS": tile.split, "LINE": LINE, "PAGE": PAGE_SIZE,
    }  # fmt: skip


def _row(tile: Tile, table: str = "*i64") -> Row:
    types: dict[str, str | int | float] = {
        "slots": "*i64:16", "scores": "*fp32", "kept": "*i64", "counts": "*i32",
        "tickets": "*i32:16", "seq_lens": "*i64", "block_table": table, "request_index": "*i64",
        "stride": "i32:16", "stride_out": "i32:16",
    }  # fmt: skip
    types |= dict.fromkeys(("aim", "held", "k", "chunks", "pages"), "i32")
    return Row(types | _sizes(tile), tile.num_warps)


SELECT_LONG = KernelSpec(
    _select_long_kernel,
    (*(_row(tile) for *_, tile in LONG_ROWS), _row(LONG_ROWS[0][2], table="*i32")),
)
SPECS = (SELECT_LONG,)


def select_long(
    logits: Tensor,
    k: int,
    tables: dict[str, Any],
    slots: Tensor,
    tickets: Tensor | None,
    mode: PdlMode,
) -> Tensor:
    """The selection from rows of any length; `tables`: seq_lens, block_table and the like.

    Returns how many scores each chunk's program kept, int32 [T, chunks].
    """
    (rows, columns), device = logits.shape, logits.device
    tile = launch_config("select_long", rows, (columns, k))
    chunk, held, chunks = tile.block_m, tile.block_n, -(-columns // tile.block_m)
    assert chunks <= tile.split, f"{columns} scores a row, k {k}"
    if tickets is None:
        tickets = torch.zeros(rows, dtype=torch.int32, device=device)
    assert tickets.dtype == torch.int32, f"tickets {tickets.dtype}"
    assert len(tickets) >= rows, f"tickets {tuple(tickets.shape)} for {rows} rows"
    kept = torch.empty(rows, chunks * chunk, dtype=torch.int64, device=device)
    counts = torch.empty(rows, chunks, dtype=torch.int32, device=device)
    room = held - chunks * LINE // 2
    args = tables | {
        "slots": slots,
        "scores": logits,
        "kept": kept,
        "counts": counts,
        "tickets": tickets,
        "aim": (math.isqrt(k * room) + (k + room) // 2) // 2,  # a sample errs both ways alike
        "held": held,
        "k": k,
        "stride": logits.stride(0),
        "stride_out": kept.stride(0),
        "chunks": chunks,
    }
    SELECT_LONG.launch((rows, chunks), mode, args | _sizes(tile), tile.num_warps)
    return counts
