"""A server that looks like OpenAI's: deterministic completions, and faults on demand."""

import hashlib
import json
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass(frozen=True)
class Fault:
    """What goes wrong with one attempt: a status with headers, or the line goes dead."""

    status: int = 500
    headers: dict[str, str] = field(default_factory=dict)
    hang_up: bool = False
    content: bytes | None = None  # instead of an error body


def completion(body: dict[str, Any]) -> str:
    """The text that the stub answers: a function of the prompt and the seed."""
    key = json.dumps([body["prompt"], body.get("seed")])
    return f" {hashlib.sha256(key.encode()).hexdigest()[:8]}"


@dataclass
class Stub:
    """A running stub. `faults` are used up by attempts whose body has that prompt."""

    url: str = ""
    answer: Callable[[dict[str, Any]], str] = completion
    faults: dict[str, list[Fault]] = field(default_factory=dict)
    seconds: float = 0.0  # that every answer takes
    bodies: list[dict[str, Any]] = field(default_factory=list)  # of all attempts
    headers: list[dict[str, str]] = field(default_factory=list)
    at_once: int = 0
    most_at_once: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def attempts(self, prompt: str) -> int:
        return sum(body.get("prompt") == prompt for body in self.bodies)

    def take(self, body: dict[str, Any], headers: dict[str, str]) -> Fault | None:
        """Note an attempt; the fault that it runs into."""
        with self.lock:
            self.bodies.append(body)
            self.headers.append(headers)
            self.at_once += 1
            self.most_at_once = max(self.most_at_once, self.at_once)
            faults = self.faults.get(str(body.get("prompt")))
            return faults.pop(0) if faults else None

    def reply(self, body: dict[str, Any]) -> dict[str, Any]:
        """OpenAI's answer."""
        choice = {"index": 0, "text": self.answer(body), "finish_reason": "length"}
        usage = {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}
        return {
            "id": "cmpl-stub",
            "object": "text_completion",
            "created": 0,
            "model": body.get("model"),
            "choices": [choice | {"logprobs": None}],
            "usage": usage,
        }


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    stub: Stub

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        fault = self.stub.take(body, {k.lower(): v for k, v in self.headers.items()})
        time.sleep(self.stub.seconds)
        with self.stub.lock:
            self.stub.at_once -= 1
        if fault is None and self.path in ("/v1/completions", "/v1/chat/completions"):
            self._send(200, json.dumps(self.stub.reply(body)).encode(), {})
        elif fault is None:
            self._send(404, b"no such path", {})
        elif fault.hang_up:
            self.close_connection = True
        else:
            error = {"message": "a fault", "type": "stub", "param": None, "code": "fault"}
            content = fault.content or json.dumps({"error": error}).encode()
            self._send(fault.status, content, fault.headers)

    def _send(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        """Say nothing."""


class _Server(ThreadingHTTPServer):
    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients may leave when they like; anything else is a bug of the stub."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


@contextmanager
def stub_server(**options: Any) -> Iterator[Stub]:
    """A stub on a free port; options are fields of Stub."""
    stub = Stub(**options)
    handler = type("Handler", (_Handler,), {"stub": stub})
    with _Server(("127.0.0.1", 0), handler) as server:
        stub.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield stub
        server.shutdown()
