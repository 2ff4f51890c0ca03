"""The batch program before a server: what is sent, what is tried again."""

from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path

import pytest
from test_batch_files import decoded, write_lines
from test_batch_generate import run, texts

from stub_server import Fault, completion, stub_server


def test_server(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Retried: 429, 5xx and a dropped connection; not retried: a 400."""
    later = format_datetime(datetime.now(UTC) + timedelta(seconds=1))
    now = {"Retry-After": "0"}
    faults = {
        "busy": [Fault(429, now), Fault(503, now)],
        "dropped": [Fault(hang_up=True)],
        "dated": [Fault(503, {"Retry-After": later})],
        "bad": [Fault(400)] * 2,
        "poison": [Fault(500, {"x-should-retry": "false"})] * 2,
        "down": [Fault(500, now)] * 3,
        "gone": [Fault(hang_up=True)] * 3,
        "nonsense": [Fault(200, content=b'{"a": NaN}')],
    }
    prompts = [*faults, *(f"p{i}" for i in range(12))]
    source = write_lines(tmp_path / "in", [{"prompt": p, "custom_id": p} for p in prompts])
    with stub_server(faults=faults, seconds=0.02) as stub:
        options = ["--base-url", f"{stub.url}/v1", "--api-key", "secret", "--model", "m"]
        options += ["--concurrency", "3", "--retries", "2"]
        files = ["--input", source, "--output", tmp_path / "out"]
        summary = run(capfd, *files, *options, code=1)
        got, errors = texts(tmp_path / "out"), decoded(tmp_path / "out.errors.jsonl")
        assert {e["custom_id"]: e["error"]["code"] for e in errors} == {
            "bad": "fault",
            "poison": "fault",
            "down": "fault",
            "gone": "connection_error",
            "nonsense": "bad_response",
        }
        status = {e["custom_id"]: (e["response"] or {}).get("status_code") for e in errors}
        assert (status["bad"], status["down"], status["gone"]) == (400, 500, None)
        sent = {body["prompt"]: body for body in stub.bodies}
        assert got == {p: [completion(sent[p])] for p in prompts if p not in status}
        tries = [stub.attempts(p) for p in ("busy", "dropped", "dated", "bad", "poison", "down")]
        assert tries == [3, 2, 2, 1, 1, 3]
        assert stub.most_at_once == 3
        assert all(h["authorization"] == "Bearer secret" for h in stub.headers)
        assert all(body["model"] == "m" and body["seed"] >= 0 for body in stub.bodies)
        assert summary["ok"] == len(prompts) - 5
        assert summary["generated_tokens"] == 2 * summary["ok"]
        assert summary["retries"] == 2 + 1 + 1 + 2 + 2
        stub.faults.clear()
        assert run(capfd, *files, *options)["skipped"] == len(prompts) - 5
        assert decoded(tmp_path / "out.errors.jsonl") == []


def test_chat_lines_go_to_a_server(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    line = {"custom_id": "c", "method": "POST", "url": "/v1/chat/completions"}
    source = write_lines(tmp_path / "in", [{**line, "body": {"messages": [], "prompt": ""}}])
    with stub_server() as stub:
        run(capfd, "--input", source, "--output", tmp_path / "o", "--base-url", stub.url)
    assert set(texts(tmp_path / "o")) == {"c"}


def test_a_line_that_no_server_can_read(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A lone surrogate is sent as JSON spells it; the lines around it are answered."""
    source = write_lines(tmp_path / "in", [{"prompt": prompt} for prompt in ("a", "\ud800", "ü")])
    with stub_server(faults={"\ud800": [Fault(400)]}) as stub:
        options = ("--output", tmp_path / "out", "--base-url", stub.url)
        assert run(capfd, "--input", source, *options, code=1)["failed"] == 1
    assert set(texts(tmp_path / "out")) == {"line-1", "line-3"}
    assert {body["prompt"] for body in stub.bodies} == {"a", "\ud800", "ü"}
