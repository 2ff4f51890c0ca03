"""Triton kernel under `sum_pieces`: a program loads one contiguous piece, 16 bytes a thread at a
time, and stores its sum."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from minidsv.kernels.bandwidth import PIECE
from minidsv.kernels.launch import KernelSpec, Row, pdl_begin, pdl_end
from minidsv.kernels.pdl import PdlMode

WARPS = 8


@triton.jit
def _sum_pieces_kernel(words, out, BLOCK: tl.constexpr, PDL: tl.constexpr):
    piece = tl.program_id(0).to(tl.int64)
    pdl_begin(PDL)
    total = tl.sum(tl.load(words + piece * BLOCK + tl.arange(0, BLOCK)))
    tl.store(out + piece, total)
    pdl_end(PDL)


SUM_PIECES = KernelSpec(
    _sum_pieces_kernel, (Row({"words": "*i32:16", "out": "*i32:16", "BLOCK": PIECE}, WARPS),)
)
SPECS = (SUM_PIECES,)


def sum_pieces(words: Tensor, mode: PdlMode) -> Tensor:
    """words int32 [N] contiguous."""
    out = torch.empty(words.numel() // PIECE, dtype=torch.int32, device=words.device)
    SUM_PIECES.launch((len(out),), mode, {"words": words, "out": out, "BLOCK": PIECE}, WARPS)
    return out
