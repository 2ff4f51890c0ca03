"""A live server: the application under uvicorn in a thread, on a real socket."""

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx
import pytest
import uvicorn
from prometheus_client.parser import text_string_to_metric_families

from minidsv.engine import Engine
from minidsv.engine_config import EngineConfig
from minidsv.server.app import create_app
from minidsv.server.options import ServerOptions

OPTIONS: dict[str, Any] = {"load_format": "random", "device": "cpu", "num_pages": 64}
SHORT = {"max_new_tokens": 4, "ignore_eos": True}
ENDLESS = {"max_new_tokens": 3000, "ignore_eos": True}


@dataclass
class Served:
    engine: Engine
    server: uvicorn.Server
    thread: threading.Thread
    client: httpx.Client

    @property
    def idle(self) -> bool:
        scheduler, pages = self.engine.scheduler, self.engine.block_manager
        return not scheduler.has_work and pages.num_free == pages.num_pages

    def generate(self, **body: Any) -> httpx.Response:
        return self.client.post("/generate", json=body)

    def send(self, **body: Any) -> socket.socket:
        """A raw connection on which the request has been written."""
        address = (self.client.base_url.host, self.client.base_url.port)
        head = "POST /generate HTTP/1.1\r\nHost: test\r\nContent-Type: application/json\r\n"
        content = json.dumps(body)
        connection = socket.create_connection(address, timeout=10)
        connection.sendall(f"{head}Content-Length: {len(content)}\r\n\r\n{content}".encode())
        return connection

    def stop(self) -> None:
        self.server.should_exit = True
        self.thread.join(20)
        assert not self.thread.is_alive()


@contextmanager
def serving(
    options: ServerOptions | None = None, grace: int | None = None, **engine_options: Any
) -> Iterator[Served]:
    """The application under uvicorn in a thread, ready to answer."""
    engine = Engine(EngineConfig(**OPTIONS | engine_options))
    app = create_app(lambda: engine, options)
    config = uvicorn.Config(app, log_level="error", timeout_graceful_shutdown=grace)
    server = uvicorn.Server(config)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # as process.py does
        url = "http://127.0.0.1:%d" % listener.getsockname()[1]  # noqa: UP031
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        headers = {"Content-Type": "application/json"}
        with httpx.Client(base_url=url, headers=headers, timeout=20) as client:
            served = Served(engine, server, thread, client)
            try:
                wait_until(lambda: client.get("/ready").status_code == 200)
                yield served
            finally:
                served.stop()


def slow_down(
    served: Served, monkeypatch: pytest.MonkeyPatch, seconds: float = 0.05
) -> list[float]:
    """Steps of the engine take so much more; grows by the time at which each one begins."""
    steps: list[float] = []
    execute = served.engine.runner.execute

    def slow(*args: Any) -> Any:
        steps.append(time.monotonic())
        time.sleep(seconds)
        return execute(*args)

    monkeypatch.setattr(served.engine.runner, "execute", slow)
    return steps


def wait_until(condition: Callable[[], Any], seconds: float = 5) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.005)


def events(response: httpx.Response) -> list[dict[str, Any]]:
    """The JSON of each event but the last, which is [DONE]; every event is `data: ...` alone."""
    assert response.status_code == 200
    assert response.headers["content-type"].startswith("text/event-stream")
    *blocks, done, rest = response.text.split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    assert all(block.startswith("data: {") and "\n" not in block for block in blocks)
    return [json.loads(block.removeprefix("data: ")) for block in blocks]


def metrics(served: Served) -> dict[str, float]:
    """Samples by name, label values other than the model's appended."""
    families = text_string_to_metric_families(served.client.get("/metrics").text)
    samples = {}
    for sample in (sample for family in families for sample in family.samples):
        assert sample.labels.pop("model_name") == "tiny"
        name = ":".join([sample.name.removeprefix("minidsv:"), *sample.labels.values()])
        samples[name] = sample.value
    return samples


def assert_error(response: httpx.Response, status: int, param: str | None, *parts: str) -> None:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == ("server_error" if status >= 500 else "invalid_request_error")
    assert (error["param"] or "").removesuffix(".0") == (param or "")
    assert all(part in error["message"] for part in (param or "", *parts))
