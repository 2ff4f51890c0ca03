"""The greedy token: the lowest id of the largest logit. Called at the end of a step.

As torch.argmax: a NaN is larger than every number, -0 equals +0, of equals the lowest id wins.
"""

import torch
from torch import Tensor

from minidsv.kernels.pdl import PdlMode, triton_mode


def argmax_ref(logits: Tensor) -> Tensor:
    """argmax in PyTorch."""
    return logits.argmax(-1)


def argmax(logits: Tensor, pdl: PdlMode | None = None) -> Tensor:
    """logits fp32 [L, V], rows of any stride -> int64 [L].

    `pdl`: None runs the reference, a mode the Triton kernels in that mode.
    """
    assert logits.dim() == 2, f"logits {tuple(logits.shape)} is not [L, V]"
    assert logits.shape[1] > 0, f"logits {tuple(logits.shape)}: no ids to choose from"
    assert logits.dtype == torch.float32, f"logits {logits.dtype} is not fp32"
    mode = triton_mode(logits, pdl)
    if mode is None:
        return argmax_ref(logits)
    from minidsv.kernels import argmax_triton

    return argmax_triton.argmax(logits, mode)


def argmax_cost(rows: int, vocab: int) -> tuple[int, int]:
    """Bytes (logits, ids) and FLOPs (one comparison a logit)."""
    return rows * (4 * vocab + 8), rows * vocab
