"""StepBatch: all the metadata of one step, built by the runner and passed to every forward; and
StepBuffers, the memory that captured decode steps read it from."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from minidsv.kernels.constants import PAGE_SIZE


@dataclass
class SelectionRecorder:
    """Keeps what the indexers select for some tokens of a step (`minidsv/selections.py`).

    The layers fill it from Python while the forward runs, which the replay of a CUDA graph would
    not do: a step that carries one runs eagerly.
    """

    rows: Tensor  # int64 [S], the tokens that are wanted
    slots: list[Tensor] = field(default_factory=list)  # int64 [S, K], one a layer with an indexer

    def record(self, topk_indices: Tensor) -> None:
        """Take in a layer's choice: slots int64 [T, K] of the whole step."""
        self.slots.append(topk_indices[self.rows])


@dataclass
class StepBatch:
    """T tokens of R requests in one flat batch, whatever their mix of prefill chunks and decode
    tokens.

    Integer tensors are int64. The runner fills every field.
    """

    input_ids: Tensor  # [T]
    positions: Tensor  # [T] position of each token in its request
    slot_mapping: Tensor  # [T] physical slot that each token's keys are written to
    seq_lens: Tensor  # [T] keys each token may see: its position + 1
    request_index: Tensor  # [T] row of block_table
    block_table: Tensor  # [R, pages] physical pages of each request, 0 behind its last
    logits_index: Tensor | None  # [L] tokens whose logits are wanted; None: all
    max_seq_len: int  # the largest of seq_lens, known on the host
    selections: SelectionRecorder | None = None  # for requests that want to see them


class StepBuffers:
    """The static twin of a decode step's StepBatch, for up to `max_batch` requests of one token.

    Rows beyond a step's own repeat its first one, so that they route to experts that are read
    anyway, but write to `dummy_page`, which no request owns.
    """

    def __init__(self, max_batch: int, max_pages: int, dummy_page: int, device: torch.device):
        def full(value: int) -> Tensor:
            return torch.full((max_batch,), value, device=device)

        self.dummy_slot = dummy_page * PAGE_SIZE
        self.input_ids, self.positions, self.seq_lens = full(0), full(0), full(1)
        self.slot_mapping, self.request_index = full(self.dummy_slot), full(0)
        self.block_table = torch.full((max_batch, max_pages), dummy_page, device=device)

    def fill(self, step: StepBatch, rows: int) -> None:
        """Take over a step of one token a request, as `rows` rows."""
        count, (requests, pages) = len(step.input_ids), step.block_table.shape
        for name in ("input_ids", "positions", "seq_lens", "slot_mapping", "request_index"):
            mine, others = getattr(self, name), getattr(step, name)
            mine[:count].copy_(others)
            if count < rows:
                mine[count:rows].copy_(others[:1].expand(rows - count))
        self.slot_mapping[count:rows].fill_(self.dummy_slot)
        self.block_table[:requests, :pages].copy_(step.block_table)

    def batch(self, rows: int, max_seq_len: int) -> StepBatch:
        """The first `rows` rows, to be computed as contexts of up to `max_seq_len` tokens."""
        return StepBatch(
            input_ids=self.input_ids[:rows],
            positions=self.positions[:rows],
            slot_mapping=self.slot_mapping[:rows],
            seq_lens=self.seq_lens[:rows],
            request_index=self.request_index[:rows],
            block_table=self.block_table[:rows],
            logits_index=None,
            max_seq_len=max_seq_len,
        )
