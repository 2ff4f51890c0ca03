"""Reads memory and nothing else: how fast a kernel can. Called by `minidsv bench` for its peak."""

import torch
from torch import Tensor

from minidsv.kernels.pdl import PdlMode, triton_mode

PIECE = 8192  # words that one program adds up


def sum_pieces_ref(words: Tensor) -> Tensor:
    """sum_pieces in PyTorch."""
    return words.view(-1, PIECE).sum(-1, dtype=torch.int32)


def sum_pieces(words: Tensor, pdl: PdlMode | None = None) -> Tensor:
    """words int32 [N], N a multiple of PIECE -> int32 [N / PIECE], their sums modulo 2^32.

    `pdl`: None runs the reference, a mode the Triton kernel in that mode.
    """
    assert words.dtype == torch.int32, f"words {words.dtype} is not int32"
    assert words.is_contiguous(), f"words have stride {words.stride()}"
    assert words.numel() % PIECE == 0, f"{words.numel()} words are not whole pieces of {PIECE}"
    mode = triton_mode(words, pdl)
    if mode is None:
        return sum_pieces_ref(words)
    from minidsv.kernels import bandwidth_triton

    return bandwidth_triton.sum_pieces(words, mode)


def sum_pieces_cost(words: int) -> tuple[int, int]:
    """Bytes (words, sums) and additions."""
    return 4 * (words + words // PIECE), words
