"""Stored bytes: plain, gzip members or zstd frames, by a file's suffix."""

import gzip
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from minidsv.errors import MinidsvError

READ_BYTES = {True: 4096, False: 65536}  # compressed or not: zstd may grow 40,000-fold


class BatchError(MinidsvError):
    """The program cannot start: a usage error, or files that do not belong together."""


class DamagedError(ValueError):
    """Compressed bytes that cannot be decoded."""


@dataclass(frozen=True)
class Codec:
    """How a block of bytes is stored. Stored blocks follow one another in a file."""

    encode: Callable[[bytes], bytes]
    new_decoder: Callable[[], Any] | None = None  # as zlib.decompressobj; None: stored as it is
    errors: type[Exception] = zlib.error

    @property
    def read_bytes(self) -> int:
        """How much of a file to decode at once."""
        return READ_BYTES[self.new_decoder is not None]


def codec_of(path: str) -> Codec:
    """gzip for `.gz`, zstd for `.zst`, else plain."""
    if path.endswith(".gz"):
        return Codec(lambda data: gzip.compress(data, mtime=0), lambda: zlib.decompressobj(31))
    if path.endswith(".zst"):
        try:
            import zstandard
        except ImportError:
            raise BatchError(
                f"{path}: .zst needs zstandard: pip install 'minidsv[batch]'"
            ) from None
        compressor = zstandard.ZstdCompressor(write_checksum=True)
        decompressor = zstandard.ZstdDecompressor()
        return Codec(compressor.compress, decompressor.decompressobj, zstandard.ZstdError)
    return Codec(lambda data: data)


class Decoder:
    """Decodes pushed bytes; `offset` counts those that belong to what it has yielded."""

    def __init__(self, codec: Codec):
        self._codec = codec
        self._block: Any = None
        self.offset = 0
        self.whole = True  # no block is open

    def push(self, data: bytes) -> Iterator[tuple[bytes, bool]]:
        """(decoded bytes, whether a block ends behind them); raises DamagedError."""
        if self._codec.new_decoder is None:
            self.offset += len(data)
            yield data, True
            return
        while data:
            if self._block is None:
                self._block = self._codec.new_decoder()
            try:
                decoded = self._block.decompress(data)
            except self._codec.errors as error:
                raise DamagedError(f"damaged after byte {self.offset}: {error}") from None
            self.whole = self._block.eof
            rest = self._block.unused_data if self.whole else b""
            self.offset += len(data) - len(rest)
            if self.whole:
                self._block = None
            yield decoded, self.whole
            data = rest


class Splitter:
    """Cuts pushed bytes into lines at b"\\n"; None stands for a line of more than `limit` bytes."""

    def __init__(self, limit: int | None = None):
        self._limit = limit
        self._parts: list[bytes] = []
        self.rest = 0  # bytes behind the last line end

    def push(self, data: bytes) -> list[bytes | None]:
        """Lines that end in `data`, without their line ends."""
        *ends, rest = data.split(b"\n")
        lines = []
        for end in ends:
            self._append(end)
            lines.append(self.end())
        self._append(rest)
        return lines

    def end(self) -> bytes | None:
        """What has been pushed behind the last line end, as a line."""
        line = None if self._too_long else b"".join(self._parts)
        self._parts.clear()
        self.rest = 0
        return line

    def _append(self, part: bytes) -> None:
        self.rest += len(part)
        if self._too_long:
            self._parts.clear()
        else:
            self._parts.append(part)

    @property
    def _too_long(self) -> bool:
        return self._limit is not None and self.rest > self._limit
