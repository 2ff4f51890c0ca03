"""OutputText: the text of one request, from its tokens to what may be shown of it."""

from collections.abc import Sequence

from minidsv.tokenizer import DetokenizerStream


class OutputText:
    """Grows by tokens, is cut at the first stop string, and is handed out piece by piece.

    The cut is before the stop string, or behind it if `include_stop`.
    """

    def __init__(
        self, stream: DetokenizerStream, stop_strings: Sequence[str], include_stop: bool = False
    ):
        self.text = ""
        self._stream, self._stop_strings = stream, stop_strings
        self._include_stop = include_stop
        self._held = max(map(len, stop_strings), default=1) - 1  # may become a stop string yet
        self._released = 0

    def push(self, token_id: int, may_stop: bool) -> str | None:
        """Append a token's text; returns the stop string that it completes, where the text is cut.

        Only text that this token brought can complete one; of several, the first to end counts.
        """
        begin = len(self.text)
        self.text += self._stream.push(token_id)
        if not may_stop or begin == len(self.text):
            return None
        matches = []
        for stop in self._stop_strings:
            at = self.text.find(stop, max(0, begin - len(stop) + 1))
            if at >= 0:
                matches.append((at + len(stop), at, stop))
        if not matches:
            return None
        end, at, stop = min(matches)
        self.text = self.text[: end if self._include_stop else at]
        self._stream.flush()
        return stop

    def finish(self) -> str:
        """Append what the tokenizer still held back; returns the whole text."""
        self.text += self._stream.flush()
        self._held = 0
        return self.text

    def release(self) -> str:
        """New text that can no longer become part of a stop string."""
        end = max(self._released, len(self.text) - self._held)
        text, self._released = self.text[self._released : end], end
        return text
