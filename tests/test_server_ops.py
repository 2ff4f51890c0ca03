"""Around the engine: keys, limits, deadlines, aborts, health."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
import pytest

from minidsv.errors import ConfigError
from minidsv.server import responses
from minidsv.server.app import create_app
from minidsv.server.options import ServerOptions
from served import (
    ENDLESS,
    SHORT,
    Served,
    assert_error,
    events,
    metrics,
    serving,
    slow_down,
    wait_until,
)

BOTH_WAYS = pytest.mark.parametrize("stream", [False, True], ids=["plain", "stream"])


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with serving() as running:
        yield running


@pytest.fixture
def slow_steps(served: Served, monkeypatch: pytest.MonkeyPatch) -> list[float]:
    return slow_down(served, monkeypatch)


# Keys

KEYS = ServerOptions(api_key=("first-key", "second-key"))
ACCEPTED = ["Bearer first-key", "Bearer second-key", "bearer  second-key"]
REFUSED = [None, "", "first-key", "Bearer", "Bearer first", "Bearer first-keys",
           "Basic first-key", "Bearer first-key second-key", "Bearer \xe4"]  # fmt: skip


def test_keys() -> None:
    with serving(KEYS) as served:
        for value in REFUSED:
            headers = {} if value is None else {"Authorization": value.encode("latin-1")}
            for path in ("/metrics", "/generate", "/v1/models", "/nowhere"):
                response = served.client.get(path, headers=headers)
                assert_error(response, 401, None, "Bearer")
                assert response.headers["www-authenticate"] == "Bearer"
            assert served.client.get("/health", headers=headers).status_code == 200
            assert served.client.get("/ready", headers=headers).status_code == 200
        for value in ACCEPTED:
            headers = {"Authorization": value}
            assert served.client.get("/metrics", headers=headers).status_code == 200
            body = {"text": "a", "sampling_params": SHORT}
            assert served.client.post("/generate", json=body, headers=headers).status_code == 200


def test_metrics_can_be_opened(tmp_path: Any) -> None:
    (tmp_path / "keys").write_text("one\n\n  two \n")
    options = ServerOptions(api_key_file=str(tmp_path / "keys"), open_metrics=True)
    with serving(options) as served:
        assert served.client.get("/metrics").status_code == 200
        assert served.generate(text="a").status_code == 401
        served.client.headers["Authorization"] = "Bearer two"
        assert served.generate(text="a", sampling_params=SHORT).status_code == 200


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"port": 70000}, "port: 70000"),
        ({"port": True}, "port: True"),
        ({"max_queued_requests": 0}, "max_queued_requests: 0"),
        ({"request_timeout": float("nan")}, "request_timeout: nan"),
        ({"drain_seconds": -1.0}, "drain_seconds: -1.0"),
        ({"log_level": "loud"}, "log_level: 'loud'"),
        ({"served_model_name": ""}, "served_model_name: ''"),
        ({"api_key": ("",)}, "api_key"),
        ({"api_key": ("a b",)}, "api_key"),
        ({"api_key": ("\xe4",)}, "api_key"),
        ({"api_key_file": "/nowhere/keys"}, "api_key_file: /nowhere/keys"),
        ({"api_key_file": "/dev/null"}, "api_key_file: /dev/null"),
    ],
    ids=str,
)
def test_bad_option_is_named(options: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        create_app(lambda: pytest.fail("it loads"), ServerOptions(**options))


# Bodies and identities


def test_body_limit() -> None:
    def pieces() -> Iterator[bytes]:
        yield from [b'{"text": "', *[b"a" * 100] * 20, b'"}']

    body = {"text": "a", "sampling_params": SHORT}
    with serving(ServerOptions(max_body_bytes=1000)) as served:
        assert served.client.post("/generate", json=body).status_code == 200
        exact = json.dumps(body).ljust(1000).encode()
        assert served.client.post("/generate", content=exact).status_code == 200
        for path in ("/generate", "/nowhere"):
            response = served.client.post(path, content=exact + b" ")
            assert_error(response, 413, None, "1000 bytes")
        assert_error(served.client.post("/generate", content=pieces()), 413, None, "1000 bytes")
        assert served.client.post("/generate", json=body).status_code == 200


def test_a_body_that_does_not_come() -> None:
    """The time ends with the body: an answer may take longer."""

    def pieces() -> Iterator[bytes]:
        yield b'{"text": "'
        time.sleep(1.5)
        yield b'a"}'

    long = {"text": "a", "sampling_params": {"max_new_tokens": 200, "ignore_eos": True}}
    with serving(ServerOptions(max_body_seconds=0.5)) as served:
        response = served.client.post("/generate", content=pieces())
        assert_error(response, 408, None, "0.5 seconds")
        start = time.monotonic()
        assert served.client.post("/generate", json=long).status_code == 200
        assert time.monotonic() - start > 0.5


@pytest.mark.parametrize("given", ["mine-1", "~" * 128, "", "a b", "x" * 129, "\xe4", None])
@pytest.mark.parametrize("path", ["/health", "/nowhere", "/generate"])
def test_request_id(given: str | None, path: str, served: Served) -> None:
    headers = {} if given is None else {"X-Request-Id": given.encode("latin-1")}
    answers = [served.client.get(path, headers=headers).headers for _ in range(2)]
    ids = [headers["x-request-id"] for headers in answers]
    if given in ("mine-1", "~" * 128):
        assert ids == [given, given]
    else:
        assert len(set(ids)) == 2
        assert all(len(i) == 32 for i in ids)


# Queue


def test_full_queue_refuses_with_advice(monkeypatch: pytest.MonkeyPatch) -> None:
    """50 clients at once on a queue of 4: answers and refusals only, and both are counted."""
    with serving(ServerOptions(max_queued_requests=4), max_num_seqs=2) as served:
        slow_down(served, monkeypatch, 0.01)
        body = {"text": "a", "sampling_params": SHORT}
        with ThreadPoolExecutor(50) as pool:
            answers = list(pool.map(lambda _: served.generate(**body), range(50)))
        refused = [answer for answer in answers if answer.status_code != 200]
        assert 0 < len(refused) < 50
        for answer in refused:
            assert_error(answer, 503, None, "queue is full", "4")
            seconds, exact = answer.headers["retry-after"], answer.headers["retry-after-ms"]
            assert 1 <= int(exact) / 1000 <= int(seconds) <= 4
        assert len({answer.headers["retry-after-ms"] for answer in refused}) > len(refused) / 2
        samples = metrics(served)
        assert samples["admission_rejections_total:queue_full"] == len(refused)
        assert samples["request_success_total:length"] == 50 - len(refused)


def test_clients_that_retry_end_well() -> None:
    """The openai client's own two retries, spread by what it is told, get 25 past a queue of 4."""
    with serving(ServerOptions(max_queued_requests=4)) as served:
        client = openai.OpenAI(base_url=f"{served.client.base_url}/v1", api_key="none")

        def ask(_: int) -> int:
            params: Any = {"max_tokens": 4, "extra_body": {"ignore_eos": True}}
            answer = client.completions.create(model="tiny", prompt="a", **params)
            assert answer.usage is not None
            return answer.usage.completion_tokens

        with client, ThreadPoolExecutor(25) as pool:
            assert list(pool.map(ask, range(25))) == [4] * 25


def test_queued_tokens_are_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty queue takes a prompt of any length; then prompts must fit beside what waits."""
    with serving(ServerOptions(max_queued_tokens=100), max_num_seqs=1) as served:
        slow_down(served, monkeypatch)
        bodies = [{"input_ids": [5] * n, "sampling_params": ENDLESS} for n in (3, 90, 11, 10)]
        with served.send(**bodies[0]):
            wait_until(lambda: served.engine.scheduler.running)
            with served.send(**bodies[1]):
                wait_until(lambda: served.engine.scheduler.waiting)
                assert_error(served.generate(**bodies[2]), 503, None, "101 prompt tokens", "100")
                with served.send(**bodies[3]):
                    wait_until(lambda: len(served.engine.scheduler.waiting) == 2)
        wait_until(lambda: served.idle)
        assert served.generate(input_ids=[5] * 101, sampling_params=SHORT).status_code == 200


def test_a_call_larger_than_the_queue_is_no_matter_of_time() -> None:
    with serving(ServerOptions(max_queued_requests=4)) as served:
        body = {"model": "tiny", "prompt": ["a"] * 5, "max_tokens": 2}
        assert_error(served.client.post("/v1/completions", json=body), 400, None, "5", "4")


def test_requests_that_overtake_leave_the_queue() -> None:
    """The second prompt waits for the first one's pages; the third is through before it starts."""
    with serving(ServerOptions(max_queued_requests=4)) as served:
        for number in range(4):
            shared = [5 + number] * 400
            body = {"model": "tiny", "prompt": [shared, shared, [5]], "max_tokens": 1}
            answer = served.client.post("/v1/completions", json=body)
            assert answer.status_code == 200, answer.text
        samples = metrics(served)
    assert samples["num_requests_waiting"] == samples["num_requests_running"] == 0
    assert samples["request_queue_time_seconds_count"] == 12


# Deadlines and aborts


@BOTH_WAYS
@pytest.mark.parametrize("when", ["queued", "decode"])
def test_deadline(when: str, stream: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(ServerOptions(request_timeout=0.3), max_num_seqs=1) as served:
        monkeypatch.setattr(served.engine.scheduler, "max_num_seqs", int(when == "decode"))
        slow_down(served, monkeypatch, 0.01)
        # An engine that may run nothing waits for more work, as a busy one would.
        monkeypatch.setattr(served.engine, "step", stepping(served, when))
        begin = time.monotonic()
        answer = served.generate(text="a", sampling_params=ENDLESS, stream=stream)
        assert 0.3 <= time.monotonic() - begin < 1.5
        if stream:
            parts = events(answer)
            assert "0.3 s" in parts[-1]["error"]["message"]
            assert (len(parts) > 1) == (when == "decode")
        else:
            assert_error(answer, 504, None, "0.3 s")
            assert answer.headers["x-should-retry"] == "false"
        wait_until(lambda: served.idle)
        assert metrics(served)["request_success_total:abort"] == 1


def stepping(served: Served, when: str) -> Callable[[], Any]:
    step = served.engine.step
    return step if when == "decode" else lambda: time.sleep(0.01) or []


def openai_stream(client: openai.OpenAI) -> None:
    stream = client.completions.create(
        model="tiny", prompt="a", max_tokens=1500, stream=True, extra_body={"ignore_eos": True}
    )
    with stream:
        for _ in zip(range(5), stream, strict=False):
            pass


def openai_timeout(client: openai.OpenAI) -> None:
    with pytest.raises(openai.APITimeoutError):
        client.with_options(timeout=0.3, max_retries=0).completions.create(
            model="tiny", prompt="a", max_tokens=1500, extra_body={"ignore_eos": True}
        )


@pytest.mark.parametrize("leave", [openai_stream, openai_timeout])
def test_client_that_leaves_frees_its_pages_within_two_steps(
    leave: Callable[[openai.OpenAI], None], served: Served, slow_steps: list[float]
) -> None:
    with openai.OpenAI(base_url=f"{served.client.base_url}/v1", api_key="none") as client:
        leave(client)
        left = time.monotonic()
        wait_until(lambda: served.idle)
    assert len(slow_steps) >= 3
    assert len([step for step in slow_steps if step > left]) <= 2


# Health


def test_a_stalled_step_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    go_on = threading.Event()
    with serving(ServerOptions(stall_seconds=0.2)) as served, ThreadPoolExecutor(1) as pool:
        time.sleep(0.3)
        assert served.client.get("/health").status_code == 200, "idle is not stalled"
        execute = served.engine.runner.execute
        monkeypatch.setattr(
            served.engine.runner, "execute", lambda *a: go_on.wait(10) and execute(*a)
        )
        running = pool.submit(served.generate, text="a", sampling_params=SHORT)
        wait_until(lambda: served.client.get("/health").status_code == 503)
        assert_error(served.client.get("/ready"), 503, None, "step")
        assert_error(served.generate(text="b", sampling_params=SHORT), 503, None, "step")
        go_on.set()
        assert running.result().status_code == 200
        assert served.client.get("/health").status_code == 200
        assert metrics(served)["admission_rejections_total:unhealthy"] == 1


# Bugs, silence and oddities


def test_a_bug_is_a_500_that_is_not_retried(served: Served, monkeypatch: Any) -> None:
    monkeypatch.setattr(served.engine, "tokenizer", None)  # using it raises
    response = served.generate(text="a")
    assert_error(response, 500, None, "internal error")
    assert response.headers["x-should-retry"] == "false"
    assert isinstance(response, httpx.Response)
    assert response.headers["x-request-id"]


def test_silence_is_filled_with_comments(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(responses, "PING_SECONDS", 0.02)
    slow_down(served, monkeypatch, 0.2)
    body = {"text": "a", "sampling_params": SHORT, "stream": True}
    blocks = served.client.post("/generate", json=body).text.split("\n\n")
    comments = [block for block in blocks if block == ": ping"]
    assert len(blocks) - len(comments) == 4 + 2, "tokens, [DONE] and the end"
    assert len(comments) >= 4


@pytest.mark.parametrize("path", ["/%ff", "/a%00b", "//", "/health/", "/generate/x", "/\u20ac?%f0"])
@pytest.mark.parametrize("method", ["GET", "HEAD", "PUT", "OPTIONS", "PROPFIND"])
def test_odd_paths_and_methods(method: str, path: str, served: Served) -> None:
    response = served.client.request(method, path, follow_redirects=True)
    assert response.status_code in (200, 404, 405)
    if response.status_code != 200 and method != "HEAD":
        assert_error(response, response.status_code, None)
