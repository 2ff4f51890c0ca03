"""Choosing the next token: greedy, or a counter-based draw, without synchronising the host.

In vLLM's order: the model's logits; -inf for what min_tokens forbids, + logit_bias; penalties
(minidsv/penalties.py). Greedy rows now take the best, the lowest id of equals. The others go on:
divided by the temperature, cut by min_p, then top_k, then top_p, and

    token = argmax over the kept tokens of  score + G,    G = Gumbel(hash(seed, position, token id))

which draws from softmax(score) over the kept tokens. G depends on (seed, output position, token
id) only, so a draw is the same whatever the row, the batch or the device. top_k and top_p keep a
boundary tie's lowest token ids.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from minidsv.kernels.argmax import argmax
from minidsv.kernels.pdl import PdlMode
from minidsv.penalties import TokenCounts
from minidsv.request import Request, SamplingParams
from minidsv.upload import upload

MIN_TEMPERATURE = 1e-5  # anything colder is greedy
_MASK32 = 0xFFFFFFFF


class Sampler:
    """Chooses tokens for requests; remembers nothing but how often they have used each token."""

    def __init__(
        self,
        vocab_size: int,
        eos_token_ids: Sequence[int],
        device: torch.device,
        pdl: PdlMode | None = None,
    ):
        self._vocab_size, self._eos_token_ids, self._device = vocab_size, eos_token_ids, device
        self._pdl = pdl
        self._counts = TokenCounts(vocab_size, device)

    def __call__(
        self, logits: Tensor, requests: Sequence[Request], best: Tensor | None = None
    ) -> Tensor:
        """logits fp32 [L, vocab], left as they are, one row a request -> token ids int64 [L].

        best [L]: their argmax, where it is known already.
        """
        edits = Edits.of(requests, self._eos_token_ids, self._vocab_size, self._device)
        if edits is not None:
            logits, best = edits.apply(logits), None
        penalties = self._counts.penalties(requests)
        if penalties is not None:
            logits, best = penalties.apply(logits), None
        if best is None:
            best = argmax(logits, self._pdl)
        draws = Draws.of(requests, self._vocab_size, self._device)
        return best if draws is None else torch.where(draws.wanted, draws.choose(logits), best)


@dataclass
class Edits:
    """Numbers added to single logits: -inf (min_tokens) and logit_bias."""

    rows: Tensor  # int64 [E]
    token_ids: Tensor  # int64 [E]
    values: Tensor  # fp32 [E]

    @classmethod
    def of(
        cls,
        requests: Sequence[Request],
        eos_token_ids: Sequence[int],
        vocab_size: int,
        device: torch.device,
    ) -> "Edits | None":
        """Those of a batch with one row a request; None if there are none."""
        edits: list[tuple[int, int, float]] = []
        for row, request in enumerate(requests):
            params = request.params
            if request.num_sampled_tokens < params.min_tokens:
                ends = () if params.ignore_eos else eos_token_ids
                banned = {*ends, *(params.stop_token_ids or ())}
                edits += [(row, token, float("-inf")) for token in banned if token < vocab_size]
            if params.logit_bias:
                edits += [(row, token, bias) for token, bias in params.logit_bias.items()]
        if not edits:
            return None
        rows, token_ids, values = zip(*edits, strict=True)
        index = upload([rows, token_ids], torch.int64, device)
        return cls(index[0], index[1], upload(values, torch.float32, device))

    def apply(self, logits: Tensor) -> Tensor:
        return logits.index_put((self.rows, self.token_ids), self.values, accumulate=True)


@dataclass
class Draws:
    """What the rows that are not greedy need; L rows, greedy ones with neutral values."""

    wanted: Tensor  # bool [L]
    temperature: Tensor  # fp32 [L]
    top_p: Tensor  # fp32 [L]
    log_min_p: Tensor  # fp32 [L], -inf for none
    top_k: Tensor  # int64 [L], the vocabulary for all
    seeds: Tensor  # int64 [L]
    positions: Tensor  # int64 [L] output position about to be filled
    filters: bool  # some row has a top_k or a top_p

    @classmethod
    def of(
        cls, requests: Sequence[Request], vocab_size: int, device: torch.device
    ) -> "Draws | None":
        """Those of a batch with one row a request; None if every row is greedy."""
        neutral = SamplingParams(temperature=1.0)
        wanted = [r.params.temperature >= MIN_TEMPERATURE for r in requests]
        if not any(wanted):
            return None
        params = [r.params if draw else neutral for r, draw in zip(requests, wanted, strict=True)]
        top_k = [p.top_k if 0 < p.top_k < vocab_size else vocab_size for p in params]
        numbers = upload(
            [
                [p.temperature for p in params],
                [p.top_p for p in params],
                [p.min_p for p in params],
            ],
            torch.float32,
            device,
        )
        integers = upload(
            [top_k, [r.seed for r in requests], [r.num_sampled_tokens for r in requests]],
            torch.int64,
            device,
        )
        return cls(
            wanted=upload(wanted, torch.bool, device),
            temperature=numbers[0],
            top_p=numbers[1],
            log_min_p=numbers[2].log(),
            top_k=integers[0],
            seeds=integers[1],
            positions=integers[2],
            filters=any(p.top_p < 1 for p in params) or min(top_k) < vocab_size,
        )

    def choose(self, logits: Tensor) -> Tensor:
        """logits fp32 [L, vocab] -> token ids int64 [L]."""
        scores = logits / self.temperature.unsqueeze(1)
        scores = keep_likely(scores, self.log_min_p)
        if self.filters:
            scores = keep_top(scores, self.top_k, self.top_p)
        return (scores + gumbel(self.seeds, self.positions, logits.shape[1])).argmax(-1)


def keep_likely(scores: Tensor, log_min_p: Tensor) -> Tensor:
    """Keep the tokens at least min_p times as probable as the row's best; the rest is -inf."""
    least = scores.amax(-1) + log_min_p
    return scores.masked_fill(scores < least.unsqueeze(1), float("-inf"))


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
