"""Sampling: edits, penalties, filters, counter-based draws, and what a draw may depend on."""

import math
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor

from minidsv.penalties import TokenCounts
from minidsv.request import Request, SamplingParams
from minidsv.sampler import Draws, Edits, Sampler, gumbel, keep_likely, keep_top

CPU = torch.device("cpu")


def make(params: SamplingParams, output: list[int], prompt: tuple[int, ...] = (1,)) -> Request:
    request = Request("r", list(prompt), params, params.seed or 0, 10)
    request.output_token_ids += output
    return request


def sample(scores: Tensor, *params: SamplingParams, position: int = 0) -> Tensor:
    """The choice of a new sampler for requests that are `position` tokens on."""
    return Sampler(50, [1], CPU)(scores, [make(p, [0] * position) for p in params])


def logits(count: int, vocab: int = 50, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, vocab, generator=torch.Generator().manual_seed(seed))


def test_greedy_takes_the_lowest_of_equals() -> None:
    scores = torch.zeros(1, 50)
    scores[0, [7, 30]] = 2.0
    assert sample(scores, SamplingParams()).tolist() == [7]


def test_draws_follow_softmax() -> None:
    """Chi-square over 20,000 seeds; 99.9 % quantile of 9 degrees of freedom is 27.9."""
    scores, count = logits(1, 10), 20_000
    noise = gumbel(torch.arange(count), torch.full((count,), 3), 10)
    drawn = (scores / 0.7 + noise).argmax(-1).bincount(minlength=10).double()
    want = (scores[0].double() / 0.7).softmax(-1) * count
    assert float(((drawn - want) ** 2 / want).sum()) < 27.9


def test_draws_are_uncorrelated_over_positions() -> None:
    count = 20_000
    first, second = (
        gumbel(torch.full((count,), 5), torch.arange(count) + shift, 2) for shift in (0, 1)
    )
    for noise in (first[:, 0] * second[:, 0], first[:, 0] * first[:, 1]):
        product = float(noise.mean()) - 0.5772**2
        assert abs(product) < 0.06


def test_noise_is_finite_everywhere() -> None:
    noise = gumbel(torch.tensor([0, 2**62, 2**63 - 1]), torch.tensor([0, 1, 10**6]), 130_000)
    assert torch.isfinite(noise).all()
    assert noise.max() < 17


def test_a_draw_depends_on_seed_and_position_only() -> None:
    params = SamplingParams(temperature=1.0, seed=11, max_tokens=20)
    row = logits(1)
    alone = sample(row, params, position=4)
    greedy, other = SamplingParams(), SamplingParams(temperature=0.5, seed=3, top_k=4)
    rows = torch.cat((logits(2, seed=9), row))
    crowd = sample(rows, greedy, other, params, position=4)
    assert crowd[2] == alone[0]
    draws = {int(sample(row, params, position=p)[0]) for p in range(20)}
    assert len(draws) > 3


@pytest.mark.parametrize(
    ("top_k", "top_p", "want"),
    [
        (0, 1.0, {0, 1, 2, 3}),
        (2, 1.0, {0, 1}),
        (0, 0.4, {0}),
        (0, 0.5, {0}),
        (0, 0.51, {0, 1}),
        (0, 0.75, {0, 1}),
        (0, 0.8, {0, 1, 2}),
        (3, 0.99, {0, 1, 2}),
        (1, 0.01, {0}),
    ],
)
def test_filters(top_k: int, top_p: float, want: set[int]) -> None:
    """1/2, 1/4, 1/8, 1/8: the token that crosses top_p stays; a tie keeps the lowest id."""
    scores = torch.tensor([[0.5, 0.25, 0.125, 0.125]]).log2()
    kept = keep_top(scores * 0.6931471805599453, torch.tensor([top_k or 4]), torch.tensor([top_p]))
    assert set(torch.where(kept[0] > float("-inf"))[0].tolist()) == want


@pytest.mark.parametrize("temperature", [0.0, 1e-45, 1e-6])
def test_cold_is_greedy(temperature: float) -> None:
    row = logits(1)
    params = SamplingParams(temperature=temperature)
    assert sample(row, params)[0] == row.argmax()


def test_hot_keeps_what_is_banned_out() -> None:
    hot = [SamplingParams(temperature=1e6, min_tokens=2, max_tokens=5, seed=s) for s in range(500)]
    assert 1 not in sample(logits(1).expand(500, -1), *hot)


def test_min_tokens_bans_eos_and_stop_tokens() -> None:
    scores = torch.zeros(3, 50)
    scores[:, 1], scores[:, 2], scores[:, 3] = 9.0, 8.0, 7.0
    params = [
        SamplingParams(min_tokens=2, stop_token_ids=[2], max_tokens=5),
        SamplingParams(min_tokens=2, ignore_eos=True, max_tokens=5),
        SamplingParams(max_tokens=5),
    ]
    assert sample(scores, *params, position=1).tolist() == [3, 1, 1]
    assert sample(scores, *params, position=2).tolist() == [1, 1, 1]
    assert (scores[:, 1] == 9.0).all(), "the model's logits are left as they are"


PROMPT, OUTPUT = (4, 9, 9, 20), [9, 30, 30, 30, 7]


def penalised(row: list[float], p: SamplingParams, output: list[int]) -> list[float]:
    """The definition, one number at a time."""
    counts, edited = Counter(output), []
    for token, value in enumerate(row):
        if token in {*PROMPT, *output}:
            value = value / p.repetition_penalty if value > 0 else value * p.repetition_penalty
        if token in counts:
            value -= p.presence_penalty + p.frequency_penalty * counts[token]
        edited.append(value)
    return edited


PENALTIES: list[dict[str, Any]] = [
    {"presence_penalty": 1.5},
    {"frequency_penalty": 0.75},
    {"frequency_penalty": -2.0, "presence_penalty": -0.5},
    {"repetition_penalty": 1.3},
    {"repetition_penalty": 0.5, "presence_penalty": 2.0, "frequency_penalty": 0.1},
]


def test_penalties_follow_their_definition() -> None:
    """Rows with and without penalties in one batch, over steps that come, go and come back."""
    table = TokenCounts(50, CPU)
    plain = make(SamplingParams(temperature=1.0), list(OUTPUT), PROMPT)
    requests = [make(SamplingParams(**p), list(OUTPUT), PROMPT) for p in PENALTIES]
    batches = [[0, 1], [0, 1, 2, 3, 4], [4, 2], [2, 4, 0], [], [3, 1, 0], [1, 0, 3, 2, 4]]
    for step, batch in enumerate(batches):
        chosen = [plain, *(requests[i] for i in batch)]
        rows = logits(len(chosen), seed=step) * 4
        penalties = table.penalties(chosen)
        assert (penalties is None) == (not batch)
        got = rows if penalties is None else penalties.apply(rows)
        assert torch.equal(got[0], rows[0])
        for row, request, edited in zip(rows[1:], chosen[1:], got[1:], strict=True):
            want = penalised(row.tolist(), request.params, request.output_token_ids)
            assert edited.tolist() == pytest.approx(want, rel=1e-6, abs=1e-6)
        for request in requests[::2] if step else requests:
            request.output_token_ids += [step, 9]


def test_penalties_are_those_of_the_request_alone() -> None:
    rows = logits(5, seed=3)
    requests = [make(SamplingParams(**p), list(OUTPUT), PROMPT) for p in PENALTIES]
    together = TokenCounts(50, CPU).penalties(requests)
    assert together is not None
    for i, row in enumerate(together.apply(rows)):
        alone = TokenCounts(50, CPU).penalties([requests[i]])
        assert alone is not None
        assert torch.equal(alone.apply(rows[i : i + 1])[0], row)


@pytest.mark.parametrize(
    ("params", "want"),
    [
        ({"logit_bias": {3: 2.5}}, 3),
        ({"logit_bias": {1: 100.0}, "min_tokens": 3, "max_tokens": 5}, 2),
        ({"logit_bias": {5: 20.0}, "repetition_penalty": 2.0}, 5),
        ({"logit_bias": {5: 17.0}, "repetition_penalty": 2.0}, 1),
        ({"logit_bias": {0: 11.5}, "presence_penalty": 2.0}, 0),
        ({"logit_bias": {0: 10.5}, "presence_penalty": 2.0}, 1),
        ({"logit_bias": {1: -1.5}}, 2),
    ],
)
def test_bias_bans_and_penalties_in_order(params: dict[str, Any], want: int) -> None:
    """The bias comes before the penalties, a ban beats it, and greedy rows obey all three."""
    scores = torch.zeros(2, 50)
    scores[:, 1], scores[:, 2], scores[:, 3] = 9.0, 8.0, 7.0
    before = scores.clone()
    requests = [make(SamplingParams(**p), [0, 5], (5, 6)) for p in ({}, params)]
    assert Sampler(50, [1], CPU)(scores, requests).tolist() == [1, want]
    assert torch.equal(scores, before), "the model's logits are left as they are"


@pytest.mark.parametrize(
    ("min_p", "want"),
    [(0.0, {0, 1, 2, 3}), (0.24, {0, 1, 2, 3}), (0.3, {0, 1}), (0.6, {0}), (1.0, {0})],
)
def test_min_p(min_p: float, want: set[int]) -> None:
    """1/2, 1/4, 1/8, 1/8 of probability, whatever the logits' offset."""
    row = torch.tensor([[0.5, 0.25, 0.125, 0.125]]).log() + 7
    kept = keep_likely(row, torch.tensor([min_p]).log())
    assert set(torch.where(kept[0] > float("-inf"))[0].tolist()) == want


def test_min_p_looks_at_the_heated_logits() -> None:
    row = torch.tensor([[0.0, -2.0, -4.0] + [-1000.0] * 47])
    kept = {}
    for temperature in (1.0, 4.0):
        warm = [
            SamplingParams(temperature=temperature, min_p=math.exp(-1.5), seed=s)
            for s in range(200)
        ]
        kept[temperature] = set(sample(row.expand(200, -1), *warm).tolist())
    assert kept == {1.0: {0}, 4.0: {0, 1, 2}}


def test_a_greedy_batch_draws_nothing() -> None:
    greedy = [make(SamplingParams(top_k=3, min_p=0.5), []), make(SamplingParams(), [])]
    assert Draws.of(greedy, 50, CPU) is None
    assert Edits.of(greedy, [1], 50, CPU) is None


def test_every_parameter_is_the_rows_own() -> None:
    """A busy batch gives each row what a sampler of its own gives it."""
    params = [
        SamplingParams(temperature=0.8, seed=1, min_p=0.1, presence_penalty=1.0),
        SamplingParams(temperature=1.2, seed=2, top_k=5, logit_bias={3: 4.0}),
        SamplingParams(repetition_penalty=1.7),
        SamplingParams(temperature=1.0, seed=3, top_p=0.7, frequency_penalty=-1.0),
        SamplingParams(temperature=1.0, seed=4),
    ]
    for trial in range(20):
        rows = logits(5, seed=trial)
        requests = [make(p, [trial, *OUTPUT], PROMPT) for p in params]
        together = Sampler(50, [1], CPU)(rows, requests)
        for i, request in enumerate(requests):
            assert Sampler(50, [1], CPU)(rows[i : i + 1], [request])[0] == together[i]
