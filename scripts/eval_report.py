"""What the eval prints: progress on standard error; tables, and JSON last, on standard output."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from eval_items import Protocol
from eval_parity import Limits, Pair, Tier, Verdict
from eval_records import Record
from eval_run import Failures, by_topic, summarise


@contextmanager
def progress(name: str, total: int) -> Iterator[Callable[[], None]]:
    """A bar on standard error, if that is a terminal; yields what advances it by one."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    console = Console(stderr=True)
    with Progress(
        *columns, TimeRemainingColumn(), console=console, disable=not console.is_terminal
    ) as bar:
        task = bar.add_task(name or "bundled model", total=total)
        yield lambda: bar.advance(task)


def print_accuracy(
    records: Sequence[Record], failures: Failures, protocol: Protocol, more: dict[str, Any]
) -> float:
    """A line a topic and one for all; returns the accuracy over all."""
    failed = Counter(failures.topics)
    topics = by_topic(records)
    names = [*topics, *sorted(failed.keys() - topics.keys())]
    rows = {name: summarise(topics.get(name, []), failed[name], protocol) for name in names}
    overall = summarise(records, len(failures.topics), protocol)
    table = Table(
        "topic", "questions", "items", "accuracy", "95 %", "no answer", "truncated", "errors"
    )
    for name, row in {**rows, "all": overall}.items():
        table.add_row(
            name,
            str(row.questions),
            str(row.items),
            f"{row.accuracy:.1%}",
            f"{row.low:.1%} - {row.high:.1%}",
            f"{row.no_answer:.1%}",
            f"{row.truncated:.1%}",
            f"{row.errors:.1%}",
        )
    _print(table)
    parts = {name: asdict(row) for name, row in rows.items()}
    print(json.dumps({**asdict(overall), **more, "topics": parts}))
    return overall.accuracy


def print_parity(
    pairs: Sequence[Pair], verdict: Verdict, tier: Tier, limits: Limits, more: dict[str, Any]
) -> None:
    """The items that moved most, the figures beside their limits, and the verdict."""
    moved = sorted(pairs, key=lambda p: (p.flipped, p.shift), reverse=True)[:8]
    items = Table("item", "right", "A", "B", "margin A", "margin B", "KL", "shift", "first token")
    for pair in moved:
        items.add_row(
            f"{pair.a.id}#{pair.a.repeat}",
            pair.a.answer,
            str(pair.a.letter),
            str(pair.b.letter),
            f"{pair.margin_a:.3g}",
            f"{pair.margin_b:.3g}",
            f"{pair.kl:.2g}",
            f"{pair.shift:.2g}",
            "-" if pair.divergence is None else str(pair.divergence),
        )
    _print(items)
    figures = Table("figure", "value", f"limit ({tier})")
    allowed = limits.by_figure()
    for name, value in asdict(verdict).items():
        if name != "reasons":
            figures.add_row(name, f"{value:.4g}", f"{allowed[name]:g}" if name in allowed else "")
    _print(figures)
    print("green" if verdict.green else "RED: " + "; ".join(verdict.reasons))
    print(json.dumps({"green": verdict.green, "tier": tier, **asdict(verdict), **more}))


def _print(table: Table) -> None:
    console = Console()
    if not console.is_terminal:
        console = Console(width=120)
    console.print(table)
