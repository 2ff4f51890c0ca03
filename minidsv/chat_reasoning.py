"""Splits generated text into reasoning and answer at `</think>`, however the text is cut."""

from dataclasses import dataclass

THINK, END_THINK = "<think>", "</think>"


@dataclass(frozen=True)
class Split:
    """A piece of reasoning and the piece of answer behind it; either may be empty."""

    reasoning: str = ""
    content: str = ""


class ReasoningSplitter:
    """For one output. What may be the start of `</think>` is held back; nothing is stripped, so
    reasoning + `</think>` + content is the text. Without `</think>` all of it is reasoning.

    in_reasoning: the prompt ended in `<think>`; otherwise every piece is content.
    """

    def __init__(self, in_reasoning: bool):
        self.in_reasoning = in_reasoning
        self._held = ""

    def push(self, text: str) -> Split:
        """What `text`, the next piece, adds to either part."""
        if not self.in_reasoning:
            return Split(content=text)
        reasoning, end, content = (self._held + text).partition(END_THINK)
        if end:
            self.in_reasoning, self._held = False, ""
            return Split(reasoning, content)
        lengths = range(min(len(END_THINK) - 1, len(reasoning)), 0, -1)
        held = next((n for n in lengths if reasoning.endswith(END_THINK[:n])), 0)
        at = len(reasoning) - held
        self._held = reasoning[at:]
        return Split(reasoning[:at])

    def finish(self) -> Split:
        """What was held back: the text ended, so it is reasoning."""
        rest, self._held = self._held, ""
        return Split(rest)


def split_reasoning(text: str, in_reasoning: bool) -> Split:
    """The whole text's parts."""
    splitter = ReasoningSplitter(in_reasoning)
    first, last = splitter.push(text), splitter.finish()
    return Split(first.reasoning + last.reasoning, first.content)
