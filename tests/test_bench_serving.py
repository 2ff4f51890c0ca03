"""The serving benchmark as it is run, on the CPU: no graph, the same answers, and always an end."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import bench_serving
from bench_serving import Answer

SCRIPT = Path(bench_serving.__file__)
SMALL = ["--device", "cpu", "--num-pages", "16", "--prompt-tokens", "5", "--concurrency", "1"]
LONG = '{"groups": [[{"output_ids": [], "times": []}]], "metrics": ""}' + " " * 200_000  # > a pipe
WRONG = f"c.wait_until_ready(task['port'], 30); print({LONG!r})"
PATCHED = f"import sys; sys.path.insert(0, {str(SCRIPT.parent)!r}); import bench_serving as b; "


def test_streams_beside_generate() -> None:
    command = [sys.executable, str(SCRIPT), *SMALL, "--concurrency", "2", "--tokens", "8"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert run.returncode == 0, run.stderr
    *_, last = run.stdout.splitlines()
    one, two = json.loads(last)["results"]
    assert (one["concurrency"], two["concurrency"]) == (1, 2)
    assert two["replay_us"] is None
    assert 0 < two["itl_us"] <= two["itl_p99_us"]
    assert two["different"] == 0
    assert json.loads(last)["metrics"]["cuda_graph_steps_total"] == 0
    assert run.stderr.splitlines()[-1] == "client: concurrency 2 done"


def test_another_answer_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = [[Answer([7] * 4, [0.0, 1.0, 2.0, 3.0])]]
    monkeypatch.setattr(bench_serving, "serve_and_ask", lambda *_: (wrong, ""))
    with pytest.raises(SystemExit, match="1 of 1 streamed answers differ"):
        bench_serving.app([*SMALL, "--tokens", "4"], standalone_mode=False)


@pytest.mark.parametrize(
    ("client", "patch", "message"),
    [
        ("import no_such_package", "pass", "the client failed: exit code 1"),
        ("import time; time.sleep(60)", "pass", "the client failed: not done after 5 s"),
        (None, "b.CLIENT = b.CLIENT.with_name('absent.py')", "the client failed: exit code 2"),
        (None, "s = b.serve; b.serve = lambda _, o: s(lambda: 1 / 0, o)", "ZeroDivisionError"),
        (None, "b.serve = lambda *_: 1 / 0", "ZeroDivisionError"),
        (WRONG, "pass", "1 of 1 streamed answers are not as long as generate's"),
    ],
)
def test_every_failure_ends_it(
    client: str | None, patch: str, message: str, tmp_path: Path
) -> None:
    if client is not None:
        path = f"import json, sys; sys.path.append({str(SCRIPT.parent)!r})"
        task = "import bench_client as c; task = json.load(sys.stdin)"
        (tmp_path / "client.py").write_text(f"{path}; {task}; {client}\n")
        patch = f"import pathlib; b.CLIENT = pathlib.Path({str(tmp_path / 'client.py')!r}); {patch}"
    command = [sys.executable, "-c", f"{PATCHED}{patch}; b.run_app(b.app)"]
    command += [*SMALL, "--tokens", "4", "--limit", "5"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert run.returncode not in (0, None)
    assert message in run.stderr


@pytest.mark.parametrize(
    ("line", "where"),
    [
        ("engine ready", "in bench_serving"),
        ("client: the server is warm", "the client failed"),
    ],
)
def test_sigterm_ends_it(line: str, where: str) -> None:
    command = [sys.executable, str(SCRIPT), *SMALL, "--tokens", "200"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as run:
        assert run.stderr is not None
        assert any(line in said for said in run.stderr)
        run.send_signal(signal.SIGTERM)
        _, rest = run.communicate(timeout=20)
    assert where in rest
    assert run.returncode not in (0, None)
