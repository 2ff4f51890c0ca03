"""The first operator of a step: out[t] = table[input_ids[t]]. Called by the model."""

import torch
import torch.nn.functional as F
from torch import Tensor

from minidsv.kernels.pdl import PdlMode, triton_mode


def embedding_ref(input_ids: Tensor, table: Tensor) -> Tensor:
    """embedding in PyTorch."""
    return F.embedding(input_ids, table)


def embedding(input_ids: Tensor, table: Tensor, pdl: PdlMode | None = None) -> Tensor:
    """input_ids [T] int32 or int64 below V, table [V, D] -> [T, D] in the table's dtype.

    `pdl`: None runs the reference, a mode the Triton kernel in that mode.
    """
    assert input_ids.dim() == 1, f"input_ids {tuple(input_ids.shape)} is not [T]"
    assert input_ids.dtype in (torch.int32, torch.int64), f"input_ids are {input_ids.dtype}"
    assert table.dim() == 2, f"table {tuple(table.shape)} is not [V, D]"
    mode = triton_mode(table, pdl)
    if mode is None:
        return embedding_ref(input_ids, table)
    from minidsv.kernels.embedding_triton import gather_rows

    return gather_rows(input_ids, table, mode)


def embedding_cost(tokens: int, dim: int, itemsize: int = 2) -> tuple[int, int]:
    """Bytes (ids, rows read and written) and FLOPs."""
    return tokens * (8 + 2 * dim * itemsize), 0
