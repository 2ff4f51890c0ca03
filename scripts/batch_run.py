"""The loop: lines in, a window of them in flight, result lines out."""

import os
import reprlib
import signal
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import Any, Protocol

from batch_journal import Ids, Journal
from batch_lines import Answer, Failure, Job, LineError, Source, dump, parse
from batch_report import Load, Reporter, Tally

IDLE_SECONDS = 0.2  # wait so long for input, then look whether to stop
FIGURES = (
    "prefill_tokens_per_second",
    "decode_tokens_per_second",
    "ttft_ms",
    "itl_ms",
    "peak_kv_cache_usage",
    "preemptions",
)


class Backend(Protocol):
    """Whatever answers jobs."""

    urls: tuple[str, ...]  # that it serves

    def submit(self, job: Job) -> None:
        """Begin a job; raises LineError if it cannot be served."""

    def poll(self) -> list[Answer | Failure]:
        """Go on with what was submitted, for a moment; what has finished."""

    def load(self) -> Load: ...

    def figures(self) -> dict[str, Any]:
        """For the summary."""

    def close(self) -> None:
        """Abandon what is in flight."""


class Stop:
    """SIGINT or SIGTERM asks for the end, a second one insists."""

    def __init__(self) -> None:
        self.asked = False

    @contextmanager
    def listening(self) -> Iterator["Stop"]:
        names = (signal.SIGINT, signal.SIGTERM)
        before = [signal.signal(name, self._on_signal) for name in names]
        try:
            yield self
        finally:
            for name, handler in zip(names, before, strict=True):
                signal.signal(name, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        os.write(2, b"[finishing what is in flight; once more to stop at once]\n")


@dataclass
class Batch:
    """One run over `source`: `window` lines at most are between reading and writing."""

    source: Source
    backend: Backend
    output: Journal
    errors: Journal
    window: int
    seed: int
    in_order: bool = False  # write in the order of the input
    ids: Ids = field(default_factory=Ids)
    tally: Tally = field(default_factory=Tally)
    _open: deque[int] = field(default_factory=deque)  # lines in flight or held back, as read
    _held: dict[int, Answer | Failure] = field(default_factory=dict)
    _running: int = 0  # jobs of the backend

    def run(self, reporter: Reporter, stop: Stop) -> None:
        """Go on behind what `output` has, until the input has ended or `stop` was asked, and
        nothing is in flight.
        """
        for custom_id, answered_as in self.output.recover():
            self.ids.add_result(custom_id, answered_as)
        self.errors.clear()
        while self._running or not (self.source.ended or stop.asked):
            while len(self._open) < self.window and not stop.asked:
                if not self._take(0.0 if self._running else IDLE_SECONDS):
                    break
                self._tick(reporter, stop)
            if self._running:
                for result in self.backend.poll():
                    self._running -= 1
                    self._record(result)
            self._tick(reporter, stop)

    def _tick(self, reporter: Reporter, stop: Stop) -> None:
        self.output.tick()
        self.errors.tick()
        reporter.show(self.tally, self.backend.load(), self.source.read, stop.asked)

    def _take(self, wait: float) -> bool:
        """Read a line and begin its job; False if there was none."""
        job = None
        try:
            line = self.source.take(wait)
            if line is None:
                return False
            if not line.strip():
                return True
            job = parse(line, self.source.number, self.backend.urls, self.seed)
            if self._is_done(job):
                self.tally.skipped += 1
                return True
            self.backend.submit(job)
            self._open.append(job.line)
            self._running += 1
        except LineError as error:
            self._open.append(self.source.number)
            self._record(Failure(self.source.number, job, error))
        return True

    def _is_done(self, job: Job) -> bool:
        """Whether an earlier run has answered it; raises LineError if its id is taken."""
        result, owner = self.ids.claim(job.custom_id, job.line)
        name = f"custom_id: {reprlib.repr(job.custom_id)}"
        if owner is not None:
            raise LineError("duplicate_custom_id", f"{name} is that of line {owner}")
        if result not in (None, job.id):
            reason = "has been answered with another body or url; give it another custom_id"
            raise LineError("changed_line", f"{name} {reason}, or choose another output")
        return result is not None

    def _record(self, result: Answer | Failure) -> None:
        """Write a result; in the input's order, hold it back until its turn."""
        line = result.job.line if isinstance(result, Answer) else result.line
        if not self.in_order:
            self._open.remove(line)
            self._write(result)
            return
        self._held[line] = result
        while self._open and self._open[0] in self._held:
            self._write(self._held.pop(self._open.popleft()))

    def _write(self, result: Answer | Failure) -> None:
        if isinstance(result, Answer):
            self.output.write(dump(result.line()))
            self.tally.add(result)
        else:
            self.errors.write(dump(result.record()))
            self.tally.failed += 1


def summarise(tally: Tally, figures: dict[str, Any], start: float) -> dict[str, Any]:
    """Counts, and a backend's figures; null for those that it cannot know."""
    counts = {
        "ok": tally.ok,
        "failed": tally.failed,
        "skipped": tally.skipped,
        "prompt_tokens": tally.prompt_tokens,
        "generated_tokens": tally.generated_tokens,
        "wall_seconds": round(time.monotonic() - start, 3),
        "latency_ms": tally.latency.percentiles(),
    }
    return counts | dict.fromkeys(FIGURES) | figures
