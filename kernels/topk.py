"""Selection of the indexer's K best positions, as physical slots of the paged cache.

The order is total: score descending (NaN as -inf, -0.0 equal to 0.0), then the lowest position
first, so the set is unique, whatever the ties. Rows that see at most K keys select all of them.
Called by the indexer; `all_slots` also by the model for steps in which no context exceeds K.
"""

import torch
from torch import Tensor

from minidsv.kernels.constants import PAGE_SIZE


def topk_positions(logits: Tensor, seq_lens: Tensor, k: int) -> Tensor:
    """logits fp32 [T, S], seq_lens [T] -> selected positions, ascending, [T, k], then -1."""
    hidden = torch.arange(logits.shape[1], device=logits.device) >= seq_lens.unsqueeze(1)
    scores = logits.masked_fill(logits.isnan() | hidden, float("-inf"))
    best = scores.sort(dim=-1, descending=True, stable=True).indices[:, :k]
    beyond = logits.shape[1]
    best = best.masked_fill(best >= seq_lens.unsqueeze(1), beyond).sort(-1).values
    best = best.masked_fill(best == beyond, -1)
    return torch.nn.functional.pad(best, (0, k - best.shape[1]), value=-1)


def positions_to_slots(positions: Tensor, block_table: Tensor, request_index: Tensor) -> Tensor:
    """Positions [T, K] in the rows' requests -> physical slots int64 [T, K]; -1 stays -1."""
    pages = block_table.long()[request_index].gather(1, positions.clamp_min(0) // PAGE_SIZE)
    slots = pages * PAGE_SIZE + positions.clamp_min(0) % PAGE_SIZE
    return slots.masked_fill(positions < 0, -1)


def all_slots(seq_lens: Tensor, block_table: Tensor, request_index: Tensor) -> Tensor:
    """Every visible slot of each row, by position: int64 [T, max(seq_lens)], -1 padded."""
    positions = torch.arange(int(seq_lens.max()), device=seq_lens.device)
    positions = positions.masked_fill(positions >= seq_lens.unsqueeze(1), -1)
    return positions_to_slots(positions, block_table, request_index)
