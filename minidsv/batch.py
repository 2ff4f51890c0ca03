"""StepBatch: all the metadata of one step, built by the runner and passed to every forward."""

from dataclasses import dataclass, field

from torch import Tensor


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
