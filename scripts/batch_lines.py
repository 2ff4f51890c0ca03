"""Lines of a batch: reading them, what they ask for, and the result lines that answer them."""

import hashlib
import io
import json
import reprlib
import select
import stat
from collections import deque
from dataclasses import dataclass
from os import fstat
from typing import Any

from batch_codec import BatchError, DamagedError, Decoder, Splitter, codec_of
from minidsv.request import MAX_INT

MAX_LINE_BYTES = 16 * 2**20
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
RESULT_ID = "batch_req_"
RESULT_START = f'{{"id": "{RESULT_ID}'.encode()  # of every line that `dump` makes of a result
LINE_FIELDS = ("custom_id", "method", "url", "body")


class LineError(Exception):
    """A line that cannot be served. code: why, in one word; status: HTTP's, None if no server
    answered; param: the field at fault; body: the server's own words.
    """

    def __init__(
        self,
        code: str,
        message: str,
        *,
        status: int | None = 400,
        param: str | None = None,
        body: dict[str, Any] | None = None,
    ):
        super().__init__(message)
        self.code, self.status = code, status
        kind = "invalid_request_error"
        error = {"message": message, "type": kind, "param": param, "code": code}
        self.body = body or {"error": error}
        self.custom_id: str | None = None  # as soon as it is known


@dataclass(frozen=True)
class Job:
    """What a good line asks for."""

    line: int
    custom_id: str
    url: str
    body: dict[str, Any]
    id: str  # of the result: a hash of custom_id, url and body

    @property
    def request_id(self) -> str:
        return f"req_{self.id.removeprefix(RESULT_ID)}"


@dataclass(frozen=True)
class Answer:
    """A finished job: its result line, and tokens for the count."""

    job: Job
    body: dict[str, Any]
    seconds: float  # since the job was submitted
    request_id: str

    def tokens(self, kind: str) -> int:
        """`prompt` or `completion` tokens, as far as a server counts them."""
        usage = self.body.get("usage")
        count = usage.get(f"{kind}_tokens") if isinstance(usage, dict) else None
        return count if isinstance(count, int) else 0

    def line(self) -> dict[str, Any]:
        response = {"status_code": 200, "request_id": self.request_id, "body": self.body}
        return {
            "id": self.job.id,
            "custom_id": self.job.custom_id,
            "response": response,
            "error": None,
        }


@dataclass(frozen=True)
class Failure:
    """A line that got no answer; `job` is missing if it was not even understood."""

    line: int
    job: Job | None
    error: LineError

    def record(self) -> dict[str, Any]:
        """A line of the errors file; `response` is null if no server gave one."""
        error, job = self.error, self.job
        request_id = job.request_id if job else f"req_line_{self.line}"
        response = {"status_code": error.status, "request_id": request_id, "body": error.body}
        return {
            "id": job.id if job else f"{RESULT_ID}line_{self.line}",
            "custom_id": job.custom_id if job else error.custom_id,
            "line": self.line,
            "response": None if error.status is None else response,
            "error": {"code": error.code, "message": str(error)},
        }


class Source:
    """The lines of a file or of standard input, read as they are asked for."""

    def __init__(self, path: str):
        codec = codec_of(path)
        try:
            self._file = io.FileIO(0 if path == "-" else path, closefd=path != "-")
        except OSError as error:
            raise BatchError(f"--input: {path}: {error.strerror}") from None
        status = fstat(self._file.fileno())
        regular = stat.S_ISREG(status.st_mode)
        self.identity = (status.st_dev, status.st_ino) if regular else None
        self.size = status.st_size if regular else None
        self._read_bytes, self._decoder = codec.read_bytes, Decoder(codec)
        self._splitter = Splitter(MAX_LINE_BYTES)
        self._lines: deque[bytes | DamagedError | None] = deque()
        self._end = False
        self.read = 0  # bytes, as stored
        self.number = 0  # of the line taken last

    @property
    def ended(self) -> bool:
        return self._end and not self._lines

    def take(self, wait: float) -> bytes | None:
        """The next line; None if none came within `wait` seconds, or at the end.

        Raises LineError for a line that cannot be read.
        """
        while not self._lines and not self._end:
            if not select.select([self._file], [], [], wait)[0]:
                return None
            data = self._file.read(self._read_bytes)
            if data is not None:  # it was not ready after all
                self._push(data)
        if not self._lines:
            return None
        self.number += 1
        line = self._lines.popleft()
        if line is None:
            raise LineError("line_too_long", f"more than {MAX_LINE_BYTES} bytes")
        if isinstance(line, DamagedError):
            raise LineError("input_damaged", f"the input ends here: {line}")
        return line

    def _push(self, data: bytes) -> None:
        self.read += len(data)
        try:
            for decoded, _ in self._decoder.push(data):
                self._lines += self._splitter.push(decoded)
            if not data and not self._decoder.whole:
                raise DamagedError("its compressed data is cut off")
        except DamagedError as error:
            self._lines.append(error)
            self._end = True
        if not data and not self._end:
            self._end = True
            if self._splitter.rest:
                self._lines.append(self._splitter.end())


def parse(line: bytes, number: int, urls: tuple[str, ...], seed: int) -> Job:
    """The job of an OpenAI batch line or of a plain line; raises LineError.

    `urls` are what the backend serves. A plain line is a body of /v1/completions that may bring a
    custom_id; without one it is `line-<number>`. A body without a seed gets one made of `seed` and
    the custom_id, so that a resumed run draws the same tokens.
    """
    fields = _object(line)
    plain = not fields.keys() & {"method", "url", "body"}
    custom_id = fields.pop("custom_id", f"line-{number}" if plain else None)
    _check_custom_id(custom_id)
    try:
        url, body = (COMPLETIONS, fields) if plain else _openai_line(fields, urls)
        if "prompt" not in body and url == COMPLETIONS:
            raise LineError("invalid_line", "prompt: is missing", param="prompt")
        if body.get("stream"):
            raise _invalid("stream", body["stream"], "false: a batch has no streams")
        result_id = f"{RESULT_ID}{_digest(custom_id, url, body)[:32]}"
    except LineError as error:
        error.custom_id = custom_id
        raise
    if body.get("seed") is None:
        body["seed"] = int(_digest(seed, custom_id)[:16], 16) & MAX_INT
    return Job(number, custom_id, url, body, result_id)


def _invalid(field: str, value: Any, wanted: str) -> LineError:
    return LineError("invalid_line", f"{field}: {reprlib.repr(value)} is not {wanted}", param=field)


def _object(line: bytes) -> dict[str, Any]:
    try:
        fields = json.loads(line.decode("utf-8-sig"), parse_constant=_refuse_constant)
    except UnicodeDecodeError as error:
        raise LineError("invalid_utf8", f"not UTF-8: {error}") from None
    except (ValueError, RecursionError) as error:
        raise LineError("invalid_json", f"not JSON: {error}") from None
    if not isinstance(fields, dict):
        raise LineError("invalid_line", f"a JSON {type(fields).__name__}, not an object")
    return fields


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")


def _check_custom_id(custom_id: Any) -> None:
    if not isinstance(custom_id, str) or not custom_id:
        raise _invalid("custom_id", custom_id, "a non-empty string")
    try:
        custom_id.encode()
    except UnicodeEncodeError:
        raise _invalid("custom_id", custom_id, "valid Unicode") from None


def _openai_line(fields: dict[str, Any], urls: tuple[str, ...]) -> tuple[str, dict[str, Any]]:
    for name in fields.keys() - set(LINE_FIELDS):
        raise _invalid("line", name, f"a field of a batch line; accepted: {list(LINE_FIELDS)}")
    method, url, body = (fields.get(name) for name in LINE_FIELDS[1:])
    if method != "POST":
        raise _invalid("method", method, "'POST'")
    if url not in urls:
        raise LineError("unsupported_url", f"url: {reprlib.repr(url)} is not one of {list(urls)}")
    if not isinstance(body, dict):
        raise _invalid("body", body, "an object")
    return url, body


def _digest(*parts: Any) -> str:
    try:
        text = json.dumps(parts, sort_keys=True, allow_nan=False)
    except (ValueError, RecursionError) as error:  # 1e999 is read as infinity
        raise LineError("invalid_json", f"body: {error}") from None
    return hashlib.sha256(text.encode()).hexdigest()


def dump(record: dict[str, Any]) -> bytes:
    """One line of ASCII: no reader can take a character of it for a line end."""
    return json.dumps(record, allow_nan=False).encode() + b"\n"
