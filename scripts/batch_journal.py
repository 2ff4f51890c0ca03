"""Files that only grow: result lines that survive a kill, and what a rerun makes of them."""

import fcntl
import hashlib
import json
import os
import sqlite3
import stat
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

from batch_codec import BatchError, DamagedError, Decoder, Splitter, codec_of
from batch_lines import RESULT_START

_FLAGS = os.O_RDWR | os.O_CREAT | os.O_APPEND
SYNC_BYTES = 4 * 2**20  # lines of so many bytes are written without waiting for more


class Journal:
    """Appends lines to a locked file, or to standard output for `-`.

    Lines are collected and written as one block, with an fsync behind it, every `sync_lines` lines
    or `sync_seconds` seconds: a kill costs at most one block. In a compressed file a block is a
    whole gzip member or zstd frame.
    """

    def __init__(self, path: str, sync_lines: int, sync_seconds: float):
        self._path, self._codec = path, codec_of(path)
        self._sync_lines, self._sync_seconds = sync_lines, sync_seconds
        self._lines: list[bytes] = []
        self._num_bytes = 0
        self._synced = time.monotonic()
        try:
            self._fd = 1 if path == "-" else os.open(path, _FLAGS, 0o666)
        except OSError as error:
            raise BatchError(f"{path}: {error.strerror}") from None
        status = os.fstat(self._fd)
        regular = stat.S_ISREG(status.st_mode)
        self.identity = (status.st_dev, status.st_ino) if regular else None
        self.durable = path != "-" and regular  # can be resumed
        if self.durable:
            self._lock()
            _sync_folder(Path(path))

    @property
    def size(self) -> int:
        """Bytes stored."""
        return os.fstat(self._fd).st_size

    def _lock(self) -> None:
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BatchError(f"{self._path}: another process is writing to it") from None

    def recover(self) -> Iterator[tuple[str, str]]:
        """custom_id and id of every whole line or block; what is behind the last is then cut off.

        Raises BatchError, and cuts nothing, where something else is broken than the end, or where
        the end is all there is and does not begin as our lines do.
        """
        if not self.durable:
            return
        decoder, splitter = Decoder(self._codec), Splitter()
        lines: list[bytes | None] = []
        good = number = 0
        os.lseek(self._fd, 0, os.SEEK_SET)
        try:
            while data := os.read(self._fd, self._codec.read_bytes):
                for decoded, whole in decoder.push(data):
                    lines += splitter.push(decoded)
                    if whole:
                        if splitter.rest and self._codec.new_decoder is not None:
                            raise self._foreign(number + len(lines) + 1)
                        good = decoder.offset - splitter.rest
                        for number, line in enumerate(lines, number + 1):  # noqa: B020
                            yield self._ids(line, number)
                        lines.clear()
        except DamagedError as error:
            raise BatchError(f"{self._path}: {error}; choose another output") from None
        torn = lines[0] if lines else splitter.end()
        if not number and not RESULT_START.startswith((torn or b"")[: len(RESULT_START)]):
            raise self._foreign(1)
        os.ftruncate(self._fd, good)

    def _ids(self, line: bytes | None, number: int) -> tuple[str, str]:
        try:
            record = json.loads(line or b"")
            return str(record["custom_id"]), str(record["id"])
        except (ValueError, KeyError, TypeError, RecursionError):
            raise self._foreign(number) from None

    def _foreign(self, number: int) -> BatchError:
        return BatchError(f"{self._path}: line {number} is no result line; choose another output")

    def clear(self) -> None:
        """Drop the lines of an earlier run; raises BatchError if they are something else."""
        if self.durable:
            next(self.recover(), None)
            os.ftruncate(self._fd, 0)

    def write(self, line: bytes) -> None:
        self._lines.append(line)
        self._num_bytes += len(line)
        if len(self._lines) >= self._sync_lines or self._num_bytes >= SYNC_BYTES:
            self.sync()

    def tick(self) -> None:
        """Write what has waited for `sync_seconds`."""
        if self._lines and time.monotonic() - self._synced >= self._sync_seconds:
            self.sync()

    def sync(self) -> None:
        """Write what waits, and have it on the disk."""
        self._synced = time.monotonic()
        if not self._lines:
            return
        data = memoryview(self._codec.encode(b"".join(self._lines)))
        self._lines.clear()  # first: after a failed write nothing may follow the torn end
        self._num_bytes = 0
        while data:
            data = data[os.write(self._fd, data) :]
        if self.durable:
            os.fsync(self._fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        """Write what waits, and unlock."""
        try:
            self.sync()
        finally:
            if self._path != "-":
                os.close(self._fd)


class Ids:
    """The custom_ids of a run, in a temporary SQLite file: 2 MB of memory for any number, on the
    disk 26 bytes a line, 71 if an earlier run has answered it (with ids of 14 characters).
    """

    def __init__(self) -> None:
        self._db = sqlite3.connect("", isolation_level=None)
        self._db.execute("PRAGMA journal_mode = OFF")
        self._db.execute(
            "CREATE TABLE ids (custom_id BLOB PRIMARY KEY, result TEXT, line INTEGER) WITHOUT ROWID"
        )

    def add_result(self, custom_id: str, result: str) -> None:
        """An earlier run has answered it, in the line whose id is `result`."""
        row = (custom_id.encode(), result)
        self._db.execute("INSERT OR IGNORE INTO ids VALUES (?, ?, NULL)", row)

    def claim(self, custom_id: str, line: int) -> tuple[str | None, int | None]:
        """Give the id to this line, if it is free: (id of an earlier run's result or None, number
        of the line that has it already or None).
        """
        key = custom_id.encode()
        query = "SELECT result, line FROM ids WHERE custom_id = ?"
        result, owner = self._db.execute(query, (key,)).fetchone() or (None, None)
        if owner is None:
            row = (key, result, line)
            self._db.execute("INSERT OR REPLACE INTO ids VALUES (?, ?, ?)", row)
        return result, owner


def options_hash(options: dict[str, Any]) -> str:
    """16 hex digits."""
    return hashlib.sha256(json.dumps(options, sort_keys=True).encode()).hexdigest()[:16]


def check_options(output: str, options: dict[str, Any], fresh: bool) -> None:
    """Keep what the results depend on in OUTPUT.run.json; a rerun with other options is refused."""
    path = Path(f"{output}.run.json")
    if fresh:
        _write_whole(path, json.dumps(options, indent=1) + "\n")
        return
    try:
        before = dict(json.loads(path.read_text()))
    except FileNotFoundError:
        raise BatchError(
            f"{output}: has lines, but no {path.name} beside it; not resumed"
        ) from None
    except (OSError, ValueError, TypeError) as error:
        raise BatchError(f"{path}: {error}") from None
    differing = [
        f"{name} was {before.get(name)!r}, is {options.get(name)!r}"
        for name in sorted(before.keys() | options.keys())
        if before.get(name) != options.get(name)
    ]
    if differing:
        raise BatchError(f"{output}: was begun with other options: {'; '.join(differing)}")


def _write_whole(path: Path, text: str) -> None:
    """All of it or nothing, whenever the machine stops."""
    temporary = path.with_name(f"{path.name}.tmp")
    with temporary.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    _sync_folder(path)


def _sync_folder(path: Path) -> None:
    """Have the names in `path`'s folder on the disk."""
    fd = os.open(path.parent, os.O_RDONLY)
    os.fsync(fd)
    os.close(fd)
