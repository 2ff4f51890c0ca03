"""Choosing the next token: greedy, or a counter-based draw, without synchronising the host.

    token = argmax over the kept tokens of  logits / temperature + G,    G = Gumbel(hash(seed,
    position, token id))

which draws from softmax(logits / temperature) over the kept tokens. G depends on (seed, output
position, token id) only, so a draw is the same whatever the row, the batch or the device. top_k is
applied before top_p; both keep a boundary tie's lowest token ids.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from minidsv.request import Request

MIN_TEMPERATURE = 1e-5  # anything colder is greedy
_MASK32 = 0xFFFFFFFF


@dataclass
class SamplingBatch:
    """Parameters of L rows on the device; built by `SamplingBatch.of`."""

    greedy: bool  # no row draws
    temperature: Tensor  # fp32 [L], 1 for greedy rows
    draws: Tensor  # bool [L]
    top_k: Tensor  # int64 [L]
    top_p: Tensor  # fp32 [L]
    filters: bool  # some drawing row has a top_k or a top_p
    seeds: Tensor  # int64 [L]
    positions: Tensor  # int64 [L] output position about to be filled
    banned_rows: Tensor  # int64 [B] with banned_ids: logits set to -inf (min_tokens)
    banned_ids: Tensor

    @classmethod
    def of(
        cls,
        requests: Sequence[Request],
        eos_token_ids: Sequence[int],
        vocab_size: int,
        device: torch.device,
    ) -> "SamplingBatch":
        """Collect the parameters of `requests`, one row each."""
        params = [r.params for r in requests]
        draws = [p.temperature >= MIN_TEMPERATURE for p in params]
        banned = [
            (row, token)
            for row, request in enumerate(requests)
            if len(request.output_token_ids) < request.params.min_tokens
            for token in {
                *(() if request.params.ignore_eos else eos_token_ids),
                *(request.params.stop_token_ids or ()),
            }
            if token < vocab_size
        ]
        integers = torch.tensor(
            [
                [p.top_k if 0 < p.top_k < vocab_size else vocab_size for p in params],
                [r.seed for r in requests],
                [len(r.output_token_ids) for r in requests],
            ],
            device=device,
        )
        pairs = torch.tensor(banned, dtype=torch.int64, device=device).view(-1, 2)
        return cls(
            greedy=not any(draws),
            temperature=torch.tensor(
                [p.temperature if draw else 1.0 for p, draw in zip(params, draws, strict=True)],
                dtype=torch.float32,
                device=device,
            ),
            draws=torch.tensor(draws, dtype=torch.bool, device=device),
            top_k=integers[0],
            top_p=torch.tensor([p.top_p for p in params], dtype=torch.float32, device=device),
            filters=any(
                d and (p.top_p < 1 or 0 < p.top_k < vocab_size)
                for d, p in zip(draws, params, strict=True)
            ),
            seeds=integers[1],
            positions=integers[2],
            banned_rows=pairs[:, 0],
            banned_ids=pairs[:, 1],
        )


def sample(logits: Tensor, batch: SamplingBatch) -> Tensor:
    """logits fp32 [L, vocab] -> token ids int64 [L]; the lowest id wins ties."""
    if batch.banned_rows.numel():
        logits = logits.index_put(
            (batch.banned_rows, batch.banned_ids), logits.new_tensor(float("-inf"))
        )
    best = logits.argmax(-1)
    if batch.greedy:
        return best
    scores = logits / batch.temperature.unsqueeze(1)
    if batch.filters:
        scores = keep_top(scores, batch.top_k, batch.top_p)
    scores = scores + gumbel(batch.seeds, batch.positions, logits.shape[1])
    return torch.where(batch.draws, scores.argmax(-1), best)


def keep_top(scores: Tensor, top_k: Tensor, top_p: Tensor) -> Tensor:
    """Keep each row's top_k best, then the smallest set that reaches top_p; the rest is -inf."""
    ordered, ids = scores.sort(dim=-1, descending=True, stable=True)
    ranks = torch.arange(scores.shape[1], device=scores.device)
    ordered = ordered.masked_fill(ranks >= top_k.unsqueeze(1), float("-inf"))
    probs = ordered.softmax(-1)
    before = probs.cumsum(-1) - probs
    dropped = (before >= top_p.unsqueeze(1)) & (top_p < 1).unsqueeze(1) & (ranks > 0)
    ordered = ordered.masked_fill(dropped, float("-inf"))
    return torch.empty_like(scores).scatter_(1, ids, ordered)


def gumbel(seeds: Tensor, positions: Tensor, vocab_size: int) -> Tensor:
    """Standard Gumbel noise fp32 [L, vocab] from a 32-bit hash of (seed, position, token id)."""
    tokens = torch.arange(vocab_size, device=seeds.device)
    key = _mix(_mix(_mix(seeds & _MASK32) ^ (seeds >> 32)) ^ positions)
    bits = _mix(_mix(key.unsqueeze(1) ^ tokens) + key.unsqueeze(1))
    uniform = ((bits >> 9).float() + 0.5) * 2.0**-23  # in (0, 1), exact in fp32
    return -torch.log(-torch.log1p(-uniform))


def _mix(x: Tensor) -> Tensor:
    """Bijective 32-bit finaliser (Wellons, "lowbias32") on int64 lanes."""
    x = x & _MASK32
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & _MASK32
    x = ((x ^ (x >> 15)) * 0x846CA68B) & _MASK32
    return x ^ (x >> 16)
