"""Penalties for tokens that a request has seen, and the counts they need, on the device.

seen = in the prompt or the output; count = occurrences in the output
logit = (logit > 0 ? logit / repetition : logit * repetition)  if seen
logit = logit - frequency * count - presence * (count > 0)
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from minidsv.request import Request
from minidsv.upload import upload


@dataclass
class Penalties:
    """Penalties of P of a batch's rows."""

    rows: Tensor  # int64 [P] rows of the logits
    counts: Tensor  # int32 [P, vocab] occurrences in the output
    in_prompt: Tensor  # bool [P, vocab]
    presence: Tensor  # fp32 [P, 1], as the next two
    frequency: Tensor
    repetition: Tensor

    def apply(self, logits: Tensor) -> Tensor:
        """logits fp32 [L, vocab] -> a copy with the P rows penalised."""
        rows, used = logits[self.rows], self.counts > 0
        scaled = torch.where(rows > 0, rows / self.repetition, rows * self.repetition)
        rows = torch.where(used | self.in_prompt, scaled, rows)
        rows = rows - self.frequency * self.counts - self.presence * used
        return logits.index_copy(0, self.rows, rows)


class TokenCounts:
    """Counts of the requests in the last batch; a step adds only the tokens that are new."""

    def __init__(self, vocab_size: int, device: torch.device):
        self._vocab_size, self._device = vocab_size, device
        self._entries: dict[Request, _Entry] = {}
        self._counts = torch.zeros(0, vocab_size, dtype=torch.int32, device=device)
        self._in_prompt = torch.zeros(0, vocab_size, dtype=torch.bool, device=device)

    def penalties(self, requests: Sequence[Request]) -> Penalties | None:
        """What applies to a batch with one row a request; None if nothing does."""
        rows = [row for row, request in enumerate(requests) if request.params.penalizes]
        slots = self._update([requests[row] for row in rows])
        if not rows:
            return None
        params = [requests[row].params for row in rows]
        values = [
            [p.presence_penalty for p in params],
            [p.frequency_penalty for p in params],
            [p.repetition_penalty for p in params],
        ]
        index = upload([rows, slots], torch.int64, self._device)
        presence, frequency, repetition = upload(values, torch.float32, self._device).unsqueeze(-1)
        return Penalties(
            index[0],
            self._counts[index[1]],
            self._in_prompt[index[1]],
            presence,
            frequency,
            repetition,
        )

    def _update(self, requests: list[Request]) -> list[int]:
        """Count what is new in `requests`, forget all others; returns their slots."""
        self._entries = {r: self._entries[r] for r in requests if r in self._entries}
        self._reserve(len(requests))
        taken = {entry.slot for entry in self._entries.values()}
        free = iter([s for s in range(len(self._counts)) if s not in taken])
        new = {r: _Entry(next(free)) for r in requests if r not in self._entries}
        self._entries |= new
        if new:
            self._start(new)
        outputs = [
            self._entries[r].slot * self._vocab_size + token
            for r in requests
            for token in r.output_token_ids[self._entries[r].counted :]
        ]
        if outputs:
            index = upload(outputs, torch.int64, self._device)
            one = torch.ones_like(index, dtype=torch.int32)
            self._counts.view(-1).scatter_add_(0, index, one)
        for request in requests:
            self._entries[request].counted = len(request.output_token_ids)
        return [self._entries[r].slot for r in requests]

    def _start(self, new: dict[Request, "_Entry"]) -> None:
        """Clear the slots of new requests and mark their prompts."""
        slots = upload([entry.slot for entry in new.values()], torch.int64, self._device)
        prompts = [
            entry.slot * self._vocab_size + token
            for request, entry in new.items()
            for token in set(request.prompt_token_ids)
        ]
        self._counts.index_fill_(0, slots, 0)
        self._in_prompt.index_fill_(0, slots, False)
        self._in_prompt.view(-1).index_fill_(0, upload(prompts, torch.int64, self._device), True)

    def _reserve(self, slots: int) -> None:
        missing = slots - len(self._counts)
        if missing > 0:
            self._counts, self._in_prompt = (
                torch.cat((t, t.new_zeros(missing, self._vocab_size)))
                for t in (self._counts, self._in_prompt)
            )


@dataclass
class _Entry:
    slot: int  # row of the count tables
    counted: int = 0  # output tokens
