"""Which rows of logits a step needs, and the log-probabilities that it reports of them."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor

from minidsv.scheduler import Chunk
from minidsv.upload import upload

BLOCK_ROWS = 64  # rows whose log-probabilities are in memory at once


@dataclass
class RowLogprobs:
    """Log-probabilities at one position: the best tokens in order, and others by name."""

    best: list[tuple[int, float]]
    named: list[tuple[int, float, int]]  # token id, logprob, rank; the one that was taken is first


@dataclass
class LogitRows:
    """Tokens of a step whose logits are wanted: each sampling chunk's last, and prompt's."""

    tokens: list[int]  # index of the token in the flat batch, one a row
    sampling: list[int]  # rows that choose a token
    prompt: list[list[tuple[int, int]]]  # per chunk (row, prompt position that the row predicts)

    @classmethod
    def of(cls, chunks: Sequence[Chunk]) -> "LogitRows":
        rows = cls([], [], [])
        first = 0
        for chunk in chunks:
            predicted = _predicted_prompt_positions(chunk)
            rows.prompt.append([(len(rows.tokens) + i, p) for i, p in enumerate(predicted)])
            rows.tokens += [first + p - 1 - chunk.start for p in predicted]
            if chunk.samples:
                rows.sampling.append(len(rows.tokens))
                rows.tokens.append(first + chunk.num_tokens - 1)
            first += chunk.num_tokens
        return rows

    def logprobs(
        self, chunks: Sequence[Chunk], logits: Tensor, sampled: Tensor
    ) -> tuple[list[RowLogprobs | None], list[list[RowLogprobs]]]:
        """What the requests ask for, from raw logits [L, vocab] and the sampled ids [S].

        Returns one entry a sampling chunk, and one list a chunk for its prompt positions.
        """
        params = [chunk.request.params for chunk in chunks if chunk.samples]
        counts = [one.logprobs for one in params]
        reported = [i for i, count in enumerate(counts) if count is not None]
        wanted = [(self.sampling[i], counts[i] or 0) for i in reported]
        also = [tuple(params[i].logprob_token_ids or ()) for i in reported]
        prompt_tokens: list[int] = []
        for chunk, pairs in zip(chunks, self.prompt, strict=True):
            wanted += [(row, chunk.request.params.prompt_logprobs or 0) for row, _ in pairs]
            prompt_tokens += [chunk.request.prompt_token_ids[position] for _, position in pairs]
        if not wanted:
            return [None] * len(counts), [[] for _ in chunks]
        taken = torch.cat(
            (
                sampled[upload(reported, torch.int64, logits.device)],
                upload(prompt_tokens, torch.int64, logits.device),
            )
        )
        also += [()] * len(prompt_tokens)
        found = iter(_row_logprobs(logits, wanted, taken, also))
        outputs = [None if count is None else next(found) for count in counts]
        return outputs, [list(islice(found, len(pairs))) for pairs in self.prompt]


def _predicted_prompt_positions(chunk: Chunk) -> range:
    """Prompt positions whose logprobs this chunk gives and that are not known yet."""
    request = chunk.request
    if request.params.prompt_logprobs is None:
        return range(0)
    first = max(chunk.start + 1, len(request.prompt_logprobs))
    return range(first, min(chunk.end + 1, len(request.prompt_token_ids)))


def _row_logprobs(
    logits: Tensor,
    wanted: Sequence[tuple[int, int]],
    taken: Tensor,
    also: Sequence[tuple[int, ...]],
) -> list[RowLogprobs]:
    """Of each (row, count): the count best tokens (-1: all), `taken` and `also`, from the same
    values."""
    vocab = logits.shape[1]
    result = []
    for begin in range(0, len(wanted), BLOCK_ROWS):
        block, more = wanted[begin : begin + BLOCK_ROWS], also[begin : begin + BLOCK_ROWS]
        counts = [min(count, vocab) if count >= 0 else vocab for _, count in block]
        ids = _named_ids(taken[begin : begin + BLOCK_ROWS], more)
        values = logits[upload([row for row, _ in block], torch.int64, logits.device)]
        values = values.log_softmax(-1)
        own = values.gather(1, ids)
        ranks = torch.stack([1 + (values > column[:, None]).sum(-1) for column in own.unbind(1)], 1)
        best, best_ids = values.topk(max(counts))
        rows = zip(*(x.tolist() for x in (best_ids, best, ids, own, ranks)), strict=True)
        for count, extra, row in zip(counts, more, rows, strict=True):
            pairs = list(zip(row[0][:count], row[1][:count], strict=True))
            named = list(zip(*row[2:], strict=True))[: 1 + len(extra)]
            result.append(RowLogprobs(pairs, named))
    return result


def _named_ids(taken: Tensor, also: Sequence[tuple[int, ...]]) -> Tensor:
    """taken [S] and the ids of each row -> [S, 1 + most ids], padded with 0."""
    width = max(map(len, also))
    if width == 0:
        return taken.unsqueeze(1)
    flat = [token for ids in also for token in (*ids, *[0] * (width - len(ids)))]
    return torch.cat(
        (taken.unsqueeze(1), upload(flat, torch.int64, taken.device).view(-1, width)), 1
    )
