"""Triton kernels under `argmax`: pieces of a row find their winners, a second launch the row's.

A candidate is one int64: an order-preserving integer of the logit above the complement of its id,
so that the largest is the largest logit and, of equals, the lowest id. The order of the maxima does
not matter.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import cdiv

from minidsv.kernels.launch import KernelSpec, Row, pdl_begin, pdl_end
from minidsv.kernels.launch_config import launch_config
from minidsv.kernels.pdl import PdlMode
from minidsv.kernels.tiles_small import TABLES

MOST_PIECES = 512
LEAST = tl.constexpr(-(1 << 63))


@triton.jit
def _candidate(x, index):
    """fp32 and its id -> int64, larger for the better; NaN is best."""
    x = tl.where(x == 0.0, 0.0, x)  # -0 equals +0
    bits = x.to(tl.int32, bitcast=True)
    key = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    key = tl.where(x != x, 0x7FFFFFFF, key)
    return (key.to(tl.int64) << 32) | (0x7FFFFFFF - index).to(tl.int64)


@triton.jit
def _argmax_piece_kernel(
    logits, candidates, stride, V, BLOCK: tl.constexpr, PDL: tl.constexpr
):  # fmt: skip
    row, piece = tl.program_id(0).to(tl.int64), tl.program_id(1)
    i = piece * BLOCK + tl.arange(0, BLOCK)
    pdl_begin(PDL)
    x = tl.load(logits + row * stride + i, mask=i < V, other=0.0)
    best = tl.max(tl.where(i < V, _candidate(x, i), LEAST))
    tl.store(candidates + row * tl.num_programs(1) + piece, best)
    pdl_end(PDL)


@triton.jit(do_not_specialize=["PIECES"])
def _argmax_merge_kernel(candidates, out, PIECES, BLOCK: tl.constexpr, PDL: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)
    pdl_begin(PDL)
    best = tl.max(tl.load(candidates + row * PIECES + i, mask=i < PIECES, other=LEAST))
    tl.store(out + row, 0x7FFFFFFF - (best & 0xFFFFFFFF))
    pdl_end(PDL)


PIECE = KernelSpec(
    _argmax_piece_kernel,
    tuple(
        Row(
            {"logits": "*fp32:16", "candidates": "*i64:16", "stride": "i32:16", "V": "i32:16"}
            | {"BLOCK": tile.block_n},
            tile.num_warps,
        )
        for tile in TABLES["argmax"]
    ),
)
MERGE = KernelSpec(
    _argmax_merge_kernel,
    (Row({"candidates": "*i64:16", "out": "*i64:16", "PIECES": "i32", "BLOCK": MOST_PIECES}, 1),),
)
SPECS = (PIECE, MERGE)


def argmax(logits: Tensor, mode: PdlMode) -> Tensor:
    """logits fp32 [L, V], last axis contiguous."""
    assert logits.stride(1) == 1, f"logits strides {logits.stride()}: want contiguous rows"
    rows, vocab = logits.shape
    tile = launch_config("argmax", rows, (vocab,))
    pieces = cdiv(vocab, tile.block_n)
    assert pieces <= MOST_PIECES, f"{vocab} ids are more than {MOST_PIECES * tile.block_n}"
    candidates = torch.empty((rows, pieces), dtype=torch.int64, device=logits.device)
    out = torch.empty(rows, dtype=torch.int64, device=logits.device)
    args = {"logits": logits, "candidates": candidates, "stride": logits.stride(0), "V": vocab}
    PIECE.launch((rows, pieces), mode, args | {"BLOCK": tile.block_n}, tile.num_warps)
    merge = {"candidates": candidates, "out": out, "PIECES": pieces}
    MERGE.launch((rows,), mode, merge | {"BLOCK": MOST_PIECES}, 1)
    return out
