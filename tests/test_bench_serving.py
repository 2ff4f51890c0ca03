"""The serving benchmark as it is run, on the CPU: no graph, the same answers."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import bench_serving
from bench_serving import Answer

SMALL = ["--device", "cpu", "--num-pages", "16", "--prompt-tokens", "5"]


def test_streams_beside_generate() -> None:
    script = str(Path(bench_serving.__file__))
    options = [
        "--device",
        "cpu",
        "--num-pages",
        "16",
        "--concurrency",
        "2",
        "--tokens",
        "8",
        "--prompt-tokens",
        "5",
    ]
    run = subprocess.run(
        [sys.executable, script, *options], capture_output=True, text=True, timeout=120, check=False
    )
    assert run.returncode == 0, run.stderr
    *_, last = run.stdout.splitlines()
    (result,) = json.loads(last)["results"]
    assert result["concurrency"] == 2
    assert result["replay_us"] is None
    assert 0 < result["itl_us"] <= result["itl_p99_us"]
    assert json.loads(last)["metrics"]["cuda_graph_steps_total"] == 0


def test_another_answer_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = [[Answer([7] * 4, [0.0, 1.0, 2.0, 3.0])]]
    monkeypatch.setattr(bench_serving, "serve_and_ask", lambda *_: (wrong, ""))
    with pytest.raises(SystemExit, match="1 of 1 streamed answers differ"):
        bench_serving.app([*SMALL, "--concurrency", "1", "--tokens", "4"], standalone_mode=False)
