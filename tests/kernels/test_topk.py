"""Selection: score descending, then the lowest position; never out of range."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minidsv.kernels.topk import all_slots, positions_to_slots, topk_positions


def oracle(scores: list[float], length: int, k: int) -> list[int]:
    visible = [(-float("-inf") if s != s else -s, i) for i, s in enumerate(scores[:length])]
    best = sorted(i for _, i in sorted(visible)[:k])
    return best + [-1] * (k - len(best))


@pytest.mark.parametrize(
    ("scores", "k", "want"),
    [
        ([1.0, 3.0, 3.0, 3.0, 0.0], 2, [1, 2]),
        ([0.0, -0.0, 0.0, 5.0, -1.0], 3, [0, 1, 3]),
        ([-0.0, 0.0, 1.0, -0.0], 2, [0, 2]),
        ([2.0] * 7, 4, [0, 1, 2, 3]),
        ([float("nan"), 1.0, float("nan"), 0.5], 3, [0, 1, 3]),
        ([float("-inf")] * 4, 2, [0, 1]),
    ],
    ids=["tie across K", "signed zeros", "zero plateau", "all equal", "nan last", "all -inf"],
)
def test_constructed_ties(scores: list[float], k: int, want: list[int]) -> None:
    got = topk_positions(torch.tensor([scores]), torch.tensor([len(scores)]), k)
    assert got.tolist() == [want]


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.sampled_from([0.0, -0.0, 1.0, 1.0 + 2**-23, -2.0, float("nan"), float("-inf"), 7.5]),
        min_size=1,
        max_size=40,
    ),
    st.integers(1, 12),
    st.data(),
)
def test_against_sorting(scores: list[float], k: int, data: st.DataObject) -> None:
    length = data.draw(st.integers(1, len(scores)))
    padded = torch.tensor([scores])
    got = topk_positions(padded, torch.tensor([length]), k)[0].tolist()
    assert got == oracle(scores, length, k)


@pytest.mark.parametrize("length", [1, 2047, 2048, 2049, 5000])
def test_lengths(length: int) -> None:
    scores = torch.randn(1, length, generator=torch.Generator().manual_seed(length))
    got = topk_positions(scores, torch.tensor([length]), 2048)[0]
    want = scores[0].topk(min(2048, length)).indices.sort().values
    assert torch.equal(got[got >= 0], want)
    assert int((got >= 0).sum()) == min(2048, length)


def test_slots_follow_the_block_table() -> None:
    block_table = torch.tensor([[5, 2, 0], [9, 7, 3]])
    positions = torch.tensor([[0, 63, 64, -1], [128, 1, -1, -1]])
    slots = positions_to_slots(positions, block_table, torch.tensor([0, 1]))
    assert slots.tolist() == [[320, 383, 128, -1], [192, 577, -1, -1]]
    dense = all_slots(torch.tensor([2, 66]), block_table, torch.tensor([0, 1]), 66)
    assert dense[0, :3].tolist() == [320, 321, -1]
    assert dense[1, 62:].tolist() == [638, 639, 448, 449]
