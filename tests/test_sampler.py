"""Sampling: filters, counter-based draws, and what a draw may depend on."""

import pytest
import torch

from minidsv.request import Request, SamplingParams
from minidsv.sampler import SamplingBatch, gumbel, keep_top, sample

CPU = torch.device("cpu")


def rows(
    *params: SamplingParams, position: int = 0, seeds: list[int] | None = None
) -> SamplingBatch:
    requests = []
    for i, p in enumerate(params):
        seed = seeds[i] if seeds else (p.seed or 0)
        request = Request(str(i), [1], p, seed, 10)
        request.output_token_ids += [0] * position
        requests.append(request)
    return SamplingBatch.of(requests, [1], 50, CPU)


def logits(count: int, vocab: int = 50, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, vocab, generator=torch.Generator().manual_seed(seed))


def test_greedy_takes_the_lowest_of_equals() -> None:
    scores = torch.zeros(1, 50)
    scores[0, [7, 30]] = 2.0
    assert sample(scores, rows(SamplingParams())).tolist() == [7]


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
    alone = sample(row, rows(params, position=4))
    greedy, other = SamplingParams(), SamplingParams(temperature=0.5, seed=3, top_k=4)
    crowd = sample(torch.cat((logits(2, seed=9), row)), rows(greedy, other, params, position=4))
    assert crowd[2] == alone[0]
    draws = {int(sample(row, rows(params, position=p))[0]) for p in range(20)}
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
    assert sample(row, rows(params))[0] == row.argmax()


def test_hot_keeps_what_is_banned_out() -> None:
    params = SamplingParams(temperature=1e6, min_tokens=2, max_tokens=5)
    assert all(int(sample(logits(1), rows(params, seeds=[s]))[0]) != 1 for s in range(500))


def test_min_tokens_bans_eos_and_stop_tokens() -> None:
    scores = torch.zeros(3, 50)
    scores[:, 1], scores[:, 2], scores[:, 3] = 9.0, 8.0, 7.0
    params = [
        SamplingParams(min_tokens=2, stop_token_ids=[2], max_tokens=5),
        SamplingParams(min_tokens=2, ignore_eos=True, max_tokens=5),
        SamplingParams(max_tokens=5),
    ]
    assert sample(scores, rows(*params, position=1)).tolist() == [3, 1, 1]
    assert sample(scores, rows(*params, position=2)).tolist() == [1, 1, 1]
    assert (scores[:, 1] == 9.0).all(), "the model's logits are left as they are"
