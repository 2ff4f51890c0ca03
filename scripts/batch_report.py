"""What a run tells about itself: progress on standard error, and the figures of its summary."""

import math
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column

from batch_lines import Answer
from minidsv import __version__

PLAIN_SECONDS = 10.0  # between two lines of progress where there is no terminal
BUCKETS = 8  # a factor of two


class Histogram:
    """Seconds in buckets 2**(1/8) apart: percentiles within 4.5 %, in memory that does not grow."""

    def __init__(self) -> None:
        self._counts: Counter[int] = Counter()

    def add(self, seconds: float) -> None:
        self._counts[math.floor(BUCKETS * math.log2(max(seconds, 1e-6)))] += 1

    def percentiles(self) -> dict[str, float] | None:
        """p50, p90 and p99 in ms; None if nothing was added."""
        total = self._counts.total()
        return {f"p{q}": self._percentile(total * q / 100) for q in (50, 90, 99)} if total else None

    def _percentile(self, rank: float) -> float:
        below = 0
        for bucket in sorted(self._counts):
            below += self._counts[bucket]
            if below >= rank:
                break
        return float(f"{1000 * 2 ** ((bucket + 0.5) / BUCKETS):.4g}")


@dataclass
class Tally:
    """Lines and tokens so far; `latency` is from a line's submission to its answer."""

    ok: int = 0
    failed: int = 0
    skipped: int = 0  # answered by an earlier run
    prompt_tokens: int = 0
    generated_tokens: int = 0
    latency: Histogram = field(default_factory=Histogram)

    def add(self, answer: Answer) -> None:
        self.ok += 1
        self.prompt_tokens += answer.tokens("prompt")
        self.generated_tokens += answer.tokens("completion")
        self.latency.add(answer.seconds)


@dataclass(frozen=True)
class Load:
    """What a backend is doing now; `kv_cache_usage` 0 to 1, None if it cannot be seen."""

    running: int
    waiting: int
    kv_cache_usage: float | None
    generated_tokens: int  # since the start, of unfinished requests too


class Reporter:
    """A bar on a terminal, else a line every ten seconds; nothing if `quiet`."""

    def __init__(self, size: int | None, quiet: bool):
        """size: bytes of the input, for the bar and the time left; None if not known."""
        console = Console(stderr=True)
        self._quiet, self._plain = quiet, not console.is_terminal
        self._start = self._shown = time.monotonic()
        self._tokens = [(self._start, 0)]  # (time, generated) at the last two displays
        self._progress = Progress(
            BarColumn(bar_width=12),
            TextColumn("{task.percentage:>3.0f}%" if size else ""),
            TimeRemainingColumn(),
            TextColumn("{task.description}", table_column=Column(ratio=1)),
            expand=True,
            console=console,
            disable=quiet or self._plain,
        )
        self._size = size
        self._task = self._progress.add_task("starting", total=size)

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._progress.stop()

    def show(self, tally: Tally, load: Load, read: int, stopping: bool) -> None:
        """Say how it stands, if it is time to."""
        now = time.monotonic()
        if self._quiet or now - self._shown < (PLAIN_SECONDS if self._plain else 0.2):
            return
        self._shown = now
        self._tokens = [*self._tokens[-9:], (now, load.generated_tokens)]
        (before, tokens), seconds = self._tokens[0], now - self._tokens[0][0]
        rate = (load.generated_tokens - tokens) / seconds if now > before else 0.0
        cache = "" if load.kv_cache_usage is None else f", KV {load.kv_cache_usage:.0%}"
        text = (
            f"{tally.ok} ok, {tally.failed} failed, {tally.skipped} skipped; "
            f"{load.running} running, {load.waiting} waiting{cache}; {rate:.0f} tokens/s"
            f"{' (finishing)' if stopping else ''}"
        )
        if self._plain:
            print(f"{text}{self._left(read, now)}", file=sys.stderr)
        else:
            self._progress.update(self._task, completed=read, description=text)

    def _left(self, read: int, now: float) -> str:
        if not self._size or not read:
            return ""
        seconds = (now - self._start) * max(0, self._size - read) / read
        return f"; {read / self._size:.0%}, {seconds:.0f} s left"


def program() -> dict[str, str | None]:
    """Version and, in a checkout, the commit."""
    git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = None
    return {"version": __version__, "git_commit": commit}
