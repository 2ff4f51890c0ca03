"""The record file of a run: one JSON line an item behind a header, written as items finish.

A run that is started again with the same file goes on where it stopped; a torn last line is cut.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
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
            self.records, whole = _read(path, header)
            os.truncate(path, whole)
            for _ in self.records:
                on_add()
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


def _read(path: Path, header: dict[str, Any]) -> tuple[dict[tuple[str, int], Record], int]:
    """Records of the same run, and the bytes up to the last newline; raises ItemError."""
    data = path.read_bytes()
    whole = data.rfind(b"\n") + 1
    if not whole and not json.dumps({"header": header}).encode().startswith(data):
        raise ItemError(f"{path}: not a record file of this program (no header in its first line)")
    records = {}
    for number, content in enumerate(data[:whole].split(b"\n")[:-1], 1):
        try:
            line = json.loads(content)
        except ValueError as error:
            raise ItemError(f"{path}:{number}: not JSON: {error}") from None
        if number == 1:
            _check_header(path, line, header)
            continue
        try:
            record = Record(**{k: tuple(v) if isinstance(v, list) else v for k, v in line.items()})
        except (TypeError, AttributeError):
            raise ItemError(f"{path}:{number}: not a record of this program") from None
        records[record.key] = record
    return records, whole


def _check_header(path: Path, line: Any, header: dict[str, Any]) -> None:
    written = line.get("header") if isinstance(line, dict) else None
    if not isinstance(written, dict):
        raise ItemError(f"{path}: not a record file of this program (no header in its first line)")
    want = json.loads(json.dumps(header))
    for name in sorted(written | want):
        if written.get(name) != want.get(name):
            raise ItemError(
                f"{path}: was written by another run: {name} is {written.get(name)!r} there and "
                f"{want.get(name)!r} here; name another --records file"
            )
