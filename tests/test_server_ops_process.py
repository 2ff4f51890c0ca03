"""`minidsv serve` as a process: starting, draining, failing, and the exit codes of each."""

import json
import re
import signal
import statistics
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from threading import Thread
from typing import Any

import httpx
import pytest

from served import ENDLESS, assert_error, events, wait_until

# The command line's own function, so that a test can give it a slow or a failing engine.
SERVE = """
import sys, time
from minidsv.engine import Engine
from minidsv.engine_config import EngineConfig
from minidsv.server.options import ServerOptions
from minidsv.server.process import serve

def load():
    import torch
    torch.set_num_threads(1)
    {loading}
    engine = Engine(EngineConfig(load_format="random", device="cpu", num_pages=64))
    execute = engine.runner.execute
    def step(chunks):
        {stepping}
        return execute(chunks)
    engine.runner.execute = step
    return engine

sys.exit(serve(load, ServerOptions(port=0, log_json=True, **{options})))
"""
FAILING = "assert sum(c.request.num_tokens for c in chunks) < 20"


@dataclass
class Process:
    popen: "subprocess.Popen[str]"
    client: httpx.Client
    lines: list[str] = field(default_factory=list)

    def generate(self, **body: Any) -> httpx.Response:
        return self.client.post("/generate", json=body)

    def is_ready(self) -> bool:
        return self.client.get("/ready").status_code == 200

    def running(self) -> float:
        page = self.client.get("/metrics").text
        return float(page.partition('num_requests_running{model_name="tiny"} ')[2].split()[0])

    def logged(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.lines]


@contextmanager
def process(loading: str = "", stepping: str = "", **options: Any) -> Iterator[Process]:
    """The server in a process of its own, from the moment at which it listens."""
    code = SERVE.format(loading=loading, stepping=stepping, options=options)
    popen = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True)
    assert popen.stderr is not None
    lines: list[str] = []
    try:
        for line in popen.stderr:
            lines.append(line)
            if url := re.search(r"http://[\d.:]+", line):
                break
        else:
            pytest.fail(f"it does not listen: {lines}")
        reader = Thread(target=lambda: lines.extend(popen.stderr or ()))
        reader.start()
        with httpx.Client(base_url=url.group(), timeout=60) as client:
            yield Process(popen, client, lines)
        reader.join(30)
    finally:
        popen.kill()
        popen.wait()


def test_it_starts_drains_and_exits_with_0() -> None:
    """503 until it is loaded; at SIGTERM 503 for the new while all that runs finishes."""
    with process("time.sleep(1)", "time.sleep(0.02)") as server, ThreadPoolExecutor(9) as pool:
        assert server.client.get("/health").status_code == 200
        for response in (server.client.get("/ready"), server.generate(text="a")):
            assert_error(response, 503, None, "being loaded")
            assert int(response.headers["retry-after"]) > 0
        wait_until(server.is_ready, seconds=60)
        body = {"text": "hush", "sampling_params": {"max_new_tokens": 60, "ignore_eos": True}}
        running = [pool.submit(server.generate, **body, stream=i > 0) for i in range(9)]
        wait_until(lambda: server.running() == 9)
        server.popen.send_signal(signal.SIGTERM)
        wait_until(lambda: not server.is_ready())
        assert server.client.get("/health").status_code == 200
        for response in (server.client.get("/ready"), server.generate(text="a")):
            assert_error(response, 503, None, "shutting down")
            assert int(response.headers["retry-after"]) > 0
        assert not any(call.done() for call in running), "the drain was over too soon"
        plain, *streams = [call.result() for call in running]
        assert plain.json()["meta_info"]["completion_tokens"] == 60
        assert all(events(s)[-1]["meta_info"]["completion_tokens"] == 60 for s in streams)
        assert server.popen.wait(20) == 0
    calls = [line for line in server.logged() if line["message"] == "POST /generate"]
    assert [call["status"] for call in calls].count(200) == 9
    assert all(call["generated_tokens"] == 60 for call in calls if call["status"] == 200)
    assert "hush" not in "".join(server.lines)


def test_no_answer_waits_for_an_acknowledgement() -> None:
    """40 ms a call, where the socket lacks TCP_NODELAY."""
    with process() as server:
        wait_until(server.is_ready, seconds=60)
        calls = [server.client.post("/tokenize", json={"prompt": "a"}) for _ in range(40)]
        server.popen.send_signal(signal.SIGTERM)
        assert server.popen.wait(20) == 0
    assert statistics.median(call.elapsed.total_seconds() for call in calls) < 0.03


def test_what_outlasts_the_drain_is_told() -> None:
    with process(drain_seconds=0.2) as server, ThreadPoolExecutor(2) as pool:
        wait_until(server.is_ready, seconds=60)
        body = {"text": "a", "sampling_params": ENDLESS}
        plain, stream = (pool.submit(server.generate, **body, stream=s) for s in (False, True))
        wait_until(lambda: server.running() == 2)
        server.popen.send_signal(signal.SIGINT)
        assert_error(plain.result(20), 503, None, "shutting down")
        parts = events(stream.result(20))
        assert parts[-1] == plain.result().json() != parts[-2]
        assert server.popen.wait(20) == 0


def test_a_failing_engine_ends_the_process() -> None:
    """Its requests get 500, not to be retried; the exit code tells the supervisor."""
    with process(stepping=FAILING) as server, ThreadPoolExecutor(2) as pool:
        wait_until(server.is_ready, seconds=60)
        body = {"text": "a", "sampling_params": ENDLESS}
        plain, stream = (pool.submit(server.generate, **body, stream=s) for s in (False, True))
        assert_error(plain.result(20), 500, None, "engine has failed")
        assert plain.result().headers["x-should-retry"] == "false"
        assert events(stream.result(20))[-1] == plain.result().json()
        assert server.popen.wait(20) == 1
    assert any("AssertionError" in line.get("exception", "") for line in server.logged())


@pytest.mark.parametrize("stuck", ["loading", "stepping"])
def test_a_stuck_engine_does_not_keep_the_process(stuck: str) -> None:
    """A second signal ends the drain, and nothing waits for a thread that does not come back."""
    options: dict[str, Any] = {stuck: "time.sleep(100)"}
    with process(**options) as server, ThreadPoolExecutor(1) as pool:
        if stuck == "stepping":
            wait_until(server.is_ready, seconds=60)
            call = pool.submit(server.generate, text="a", sampling_params=ENDLESS)
            wait_until(lambda: server.running() == 1)
            server.popen.send_signal(signal.SIGINT)
            wait_until(lambda: not server.is_ready())
        server.popen.send_signal(signal.SIGTERM)
        assert server.popen.wait(30) == 0
        if stuck == "stepping":
            assert_error(call.result(), 503, None, "shutting down")


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--model", "/nowhere"], "model: /nowhere"),
        (["--host", "256.0.0.1"], "port: cannot listen on 256.0.0.1"),
    ],
    ids=["model", "host"],
)
def test_bad_start_is_one_line_and_exit_code_2(options: list[str], named: str) -> None:
    command = [sys.executable, "-c", "from minidsv.cli import main; main()", "serve", "--port", "0"]
    done = subprocess.run(
        [*command, "--log-level", "error", *options], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {named}")
    assert done.stderr.count("\n") == 1
