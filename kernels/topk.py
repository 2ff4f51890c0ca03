"""Selection of the indexer's K best positions, as physical slots of the paged cache.

The order is total: score descending (NaN as -inf, -0.0 equal to 0.0), then the lowest position
first, so the set is unique, whatever the ties; it is written by ascending position. Rows that see
at most K keys select all of them. Called by the indexer; `all_slots` by the model, for steps in
which no context exceeds K.
"""

import torch
from torch import Tensor

from minidsv.kernels.constants import PAGE_SIZE
from minidsv.kernels.pdl import PdlMode, triton_mode


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


def select_topk_ref(
    logits: Tensor, seq_lens: Tensor, k: int, block_table: Tensor, request_index: Tensor
) -> Tensor:
    """The selection in PyTorch."""
    return positions_to_slots(topk_positions(logits, seq_lens, k), block_table, request_index)


def all_slots_ref(
    seq_lens: Tensor, block_table: Tensor, request_index: Tensor, width: int
) -> Tensor:
    """Every visible slot in PyTorch."""
    positions = torch.arange(width, device=seq_lens.device)
    positions = positions.masked_fill(positions >= seq_lens.unsqueeze(1), -1)
    return positions_to_slots(positions, block_table, request_index)


def _assert_rows(seq_lens: Tensor, block_table: Tensor, request_index: Tensor, width: int) -> None:
    assert seq_lens.dim() == 1, f"seq_lens {tuple(seq_lens.shape)} is not [T]"
    assert request_index.shape == seq_lens.shape, (
        f"request_index {tuple(request_index.shape)}, seq_lens {tuple(seq_lens.shape)}"
    )
    assert block_table.dtype in (torch.int32, torch.int64), f"block_table {block_table.dtype}"
    assert width <= block_table.shape[1] * PAGE_SIZE, (
        f"{width} positions a row, block_table {tuple(block_table.shape)}"
    )


def select_topk(
    logits: Tensor,
    seq_lens: Tensor,
    k: int,
    block_table: Tensor,
    request_index: Tensor,
    pdl: PdlMode | None = None,
    tickets: Tensor | None = None,
) -> Tensor:
    """The slots of each row's K best positions, by position: int64 [T, k], -1 padded.

    logits fp32 [T, S], whatever stands behind a row's seq_lens; seq_lens [T] int64, <= S;
    block_table [R, pages] int64 or int32, pages * 64 >= S; request_index [T] int64. `pdl`: None
    runs the reference, a mode the Triton kernels in that mode (CPU tensors: the reference), which
    take k up to 8192, S up to 8192 or, with k up to 4096, 1048576, and load garbage, unused. There
    S beyond 8192 takes `tickets`, int32 [T or more], zeros before and after; None: made for it.
    """
    _assert_rows(seq_lens, block_table, request_index, logits.shape[1])
    assert logits.dtype == torch.float32, f"logits {logits.dtype} is not float32"
    assert logits.shape[0] == len(seq_lens), f"logits {tuple(logits.shape)}, T = {len(seq_lens)}"
    assert k > 0, f"k {k} is not positive"
    mode = triton_mode(logits, pdl)
    if mode is None:
        return select_topk_ref(logits, seq_lens, k, block_table, request_index)
    from minidsv.kernels.topk_triton import select

    return select(logits, seq_lens, k, block_table, request_index, tickets, mode)


def all_slots(
    seq_lens: Tensor,
    block_table: Tensor,
    request_index: Tensor,
    width: int,
    pdl: PdlMode | None = None,
) -> Tensor:
    """Every visible slot of each row, by position: int64 [T, width], -1 padded.

    seq_lens [T] int64, <= width; block_table [R, pages] int64 or int32; request_index [T] int64.
    """
    _assert_rows(seq_lens, block_table, request_index, width)
    mode = triton_mode(seq_lens, pdl)
    if mode is None:
        return all_slots_ref(seq_lens, block_table, request_index, width)
    from minidsv.kernels.topk_triton import write_all_slots

    return write_all_slots(seq_lens, block_table, request_index, width, mode)


def select_topk_cost(seq_lens: list[int], k: int) -> tuple[int, int]:
    """(bytes, FLOPs) of one row a request: scores, the pages' numbers, slots; a compare a score."""
    pages = sum(-(-length // PAGE_SIZE) for length in seq_lens)
    return 4 * sum(seq_lens) + 8 * (pages + len(seq_lens) * k), sum(seq_lens)


def all_slots_cost(rows: int, width: int) -> tuple[int, int]:
    """(bytes, FLOPs): the pages' numbers and the slots."""
    return rows * (8 * -(-width // PAGE_SIZE) + 8 * width), 0
