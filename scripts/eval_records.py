"""The record file of a run: one JSON line an item behind a header, written as items finish.

A run that is started again with the same file goes on where it stopped; a torn last line is cut.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from eval_items import ItemError, Order


@dataclass(frozen=True)
class Record:
    """What came back for one item."""

    id: str
    repeat: int
    topic: str
    order: Order
    answer: str
    letter: str | None  # None: no answer found
    scores: tuple[float, ...] | None  # log-probabilities of the four choices
    tokens: tuple[str, ...]  # generated
    token_logprobs: tuple[float, ...]
    token_margins: tuple[float, ...]  # best less second-best log-probability at each token
    text: str
    finish_reason: str | None

    @property
    def key(self) -> tuple[str, int]:
        return self.id, self.repeat

    @property
    def correct(self) -> bool:
        return self.letter == self.answer


class RecordFile:
    """Records of a run, in memory and, given a path, on disk. `header` says what run it is."""

    def __init__(
        self, path: Path | None, header: dict[str, Any], on_add: Callable[[], None] = lambda: None
    ):
        self.records: dict[tuple[str, int], Record] = {}
        self._on_add = on_add
        self._file = None
        if path is None:
            return
        if path.exists():
            found = list(_whole_lines(path))
            if found:
                _check_header(path, found[0], header)
                self.records = {r.key: r for r in map(_record, found[1:])}
        self._file = path.open("a", encoding="utf-8")
        if self._file.tell() == 0:
            self._write({"header": header})

    def add(self, record: Record) -> None:
        self.records[record.key] = record
        self._write(asdict(record))
        self._on_add()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()

    def _write(self, line: dict[str, Any]) -> None:
        if self._file is not None:
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()
            os.fsync(self._file.fileno())


def _record(line: dict[str, Any]) -> Record:
    return Record(**{k: tuple(v) if isinstance(v, list) else v for k, v in line.items()})


def _whole_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Parsed lines; what follows the last newline is cut off the file."""
    data = path.read_bytes()
    whole = data.rfind(b"\n") + 1
    if whole < len(data):
        os.truncate(path, whole)
    for number, line in enumerate(data[:whole].splitlines(), 1):
        try:
            yield json.loads(line)
        except ValueError as error:
            raise ItemError(f"{path}:{number}: not JSON: {error}") from None


def _check_header(path: Path, line: dict[str, Any], header: dict[str, Any]) -> None:
    written = line.get("header")
    if not isinstance(written, dict):
        raise ItemError(f"{path}: not a record file of this program (its first line has no header)")
    want = json.loads(json.dumps(header))
    differing = sorted(k for k in written | want if written.get(k) != want.get(k))
    if differing:
        name = differing[0]
        raise ItemError(
            f"{path}: was written by another run: {name} is {written.get(name)!r} there and "
            f"{want.get(name)!r} here; name another --records file"
        )
