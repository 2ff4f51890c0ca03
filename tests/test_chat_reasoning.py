"""The split at `</think>` is the same however the text arrives."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minidsv.chat_reasoning import END_THINK, ReasoningSplitter, Split, split_reasoning

FRAGMENTS = st.sampled_from([END_THINK, "</", "<", "think>", "</think", ">", "a", "\n", "🎉"])


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("because</think>so", Split("because", "so")),
        ("because</think>", Split("because", "")),
        ("</think>so</think>!", Split("", "so</think>!")),
        ("cut short</thi", Split("cut short</thi", "")),
        ("", Split()),
    ],
)
def test_split(text: str, want: Split) -> None:
    assert split_reasoning(text, in_reasoning=True) == want
    assert split_reasoning(text, in_reasoning=False) == Split("", text)


@given(st.lists(FRAGMENTS).map("".join), st.lists(st.integers(0, 60)), st.booleans())
def test_any_cut(text: str, cuts: list[int], in_reasoning: bool) -> None:
    """Reasoning never follows content, and at most seven characters are ever held back."""
    splitter = ReasoningSplitter(in_reasoning)
    edges = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    reasoning = content = ""
    for start, end in pairwise(edges):
        piece = splitter.push(text[start:end])
        assert not (content and piece.reasoning)
        reasoning, content = reasoning + piece.reasoning, content + piece.content
        shown = len(reasoning) + len(content)
        shown += len(END_THINK) * (in_reasoning and not splitter.in_reasoning)
        assert end - shown < len(END_THINK)
    reasoning += splitter.finish().reasoning
    assert Split(reasoning, content) == split_reasoning(text, in_reasoning)
    if in_reasoning:
        before, _, after = text.partition(END_THINK)
        assert Split(reasoning, content) == Split(before, after)


def test_reasoning_is_shown_as_soon_as_it_may_be() -> None:
    splitter = ReasoningSplitter(in_reasoning=True)
    pieces = [splitter.push(text) for text in ("a<", "b</th", "i", "nk>c", "d")]
    assert pieces == [Split("a"), Split("<b"), Split(), Split("", "c"), Split("", "d")]
    assert splitter.finish() == Split()
