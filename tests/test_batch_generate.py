"""The batch program as it is run: the bundled model, kills and signals."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import IO, Any

import pytest
from test_batch_files import decoded, write_lines

import batch_generate
from batch_lines import Job, LineError, parse
from batch_local import LocalBackend
from minidsv import LLM, SamplingParams
from minidsv.cli import run_app
from minidsv.engine_config import bundled_model

SCRIPT = Path(batch_generate.__file__)
QUESTION = "What is the capital of {}?"
PLACES = ["France", "Italy", "Spain", "Germany", "Poland", "Greece", "Norway", "Japan"]


def run(capfd: pytest.CaptureFixture[str], *arguments: object, code: int = 0) -> dict[str, Any]:
    """The program in this process; its summary, or where it refuses its error line."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["batch_generate", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            run_app(batch_generate.app)
    err = capfd.readouterr().err
    assert (end.value.code or 0) == code, err
    last = err.splitlines()[-1]
    return {"error": last} if code == 2 else json.loads(last)


def start(*arguments: object, stdin: int = subprocess.DEVNULL) -> subprocess.Popen[str]:
    """The program in a process of its own."""
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(SCRIPT), *map(str, arguments), "--device", "cpu"]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, env=env, stdin=stdin, stdout=pipe, stderr=pipe, text=True)


def texts(path: str | Path) -> dict[str, list[str]]:
    """custom_id -> the texts of its choices; no id comes twice."""
    records = decoded(path)
    choices = {r["custom_id"]: r["response"]["body"]["choices"] for r in records}
    assert len(choices) == len(records)
    return {name: [choice["text"] for choice in of] for name, of in choices.items()}


def questions(count: int, **fields: Any) -> list[dict[str, Any]]:
    """Plain lines, every second one sampled with no seed."""
    return [
        {"prompt": QUESTION.format(PLACES[i % 8]), "temperature": i % 2, "max_tokens": 12}
        | {"ignore_eos": True, **fields}
        for i in range(count)
    ]


def test_engine_answers(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Equal to `LLM`; no window, order or resume changes a text, sampled or not."""
    lines: list[Any] = questions(10)
    lines.append({"prompt": [[0, 5, 6], [0, 7]], "n": 2, "logprobs": 1, "max_tokens": 3})
    source = write_lines(tmp_path / "in", lines)
    summary = run(capfd, "--input", source, "--output", tmp_path / "a")
    got = texts(tmp_path / "a")
    params = SamplingParams(max_tokens=12, ignore_eos=True)
    greedy = LLM().generate([lines[i]["prompt"] for i in range(0, 10, 2)], params)
    assert [got[f"line-{i}"] for i in range(1, 11, 2)] == [[o.outputs[0].text] for o in greedy]
    assert len(got["line-11"]) == 4
    options = ["--window", 1, "--order", "input", "--max-num-seqs", 2]
    run(capfd, "--input", source, "--output", tmp_path / "b", *options)
    assert texts(tmp_path / "b") == got
    with (tmp_path / "b").open("r+b") as file:
        file.truncate((tmp_path / "b").stat().st_size // 2)
    again = run(capfd, "--input", source, "--output", tmp_path / "b", "--num-pages", 64)
    assert texts(tmp_path / "b") == got
    assert again["ok"] + again["skipped"] == 11
    assert summary["generated_tokens"] == 10 * 12 + 4 * 3
    records = decoded(tmp_path / "a")
    usage = [r["response"]["body"]["usage"] for r in records]
    assert summary["prompt_tokens"] == sum(u["prompt_tokens"] for u in usage)
    figures = ("prefill_tokens_per_second", "decode_tokens_per_second", "peak_kv_cache_usage")
    assert all(summary[name] > 0 for name in figures)
    assert all(summary[name]["p50"] > 0 for name in ("ttft_ms", "itl_ms", "latency_ms"))
    assert len(summary["config_hash"]) == 16
    assert not summary["interrupted"]


def test_peaks_and_preemptions(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A pool for less than two requests: the summary tells, the texts are those of a big one."""
    source = write_lines(tmp_path / "in", questions(2, max_tokens=70))
    small = run(capfd, "--input", source, "--output", tmp_path / "a", "--num-pages", 3)
    run(capfd, "--input", source, "--output", tmp_path / "b")
    assert small["preemptions"] > 0
    assert small["peak_kv_cache_usage"] > 0.6
    assert texts(tmp_path / "a") == texts(tmp_path / "b")


def test_other_options_are_refused(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """So is another model, wherever it lies; what only schedules may change."""
    model = shutil.copytree(bundled_model(), tmp_path / "tiny")
    files = ["--input", write_lines(tmp_path / "in", questions(1)), "--output", tmp_path / "out"]
    run(capfd, *files)
    assert run(capfd, *files, "--model", model, "--max-num-seqs", 3)["skipped"] == 1
    assert "seed was 0, is 1" in run(capfd, *files, "--seed", 1, code=2)["error"]
    weights = bytearray((model / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (model / "model.safetensors").write_bytes(weights)
    assert "model_files" in run(capfd, *files, "--model", model, code=2)["error"]


REFUSED = [
    pytest.param({"suffix": "x"}, "suffix", 400, id="unsupported"),
    pytest.param({"max_tokens": "many"}, "max_tokens", 400, id="type"),
    pytest.param({"max_tokens": 10**6}, "max_tokens", 400, id="too-much"),
    pytest.param({"prompt": [0, 10**7]}, "prompt", 400, id="token-id"),
    pytest.param({"prompt": "\ud800"}, "prompt", 400, id="surrogate"),
    pytest.param({"prompt": [0] * 5000}, "prompt", 400, id="too-long"),
    pytest.param({"seed": "x"}, "seed", 400, id="seed"),
    pytest.param({"model": "other"}, "model", 404, id="model"),
]


@pytest.fixture(scope="module")
def backend() -> LocalBackend:
    return LocalBackend(LLM(num_pages=16), "tiny")


@pytest.mark.parametrize(("fields", "param", "status"), REFUSED)
def test_the_engine_refuses_a_line(
    fields: dict[str, Any], param: str, status: int, backend: LocalBackend
) -> None:
    job = parse(json.dumps({"prompt": "a", **fields}).encode(), 1, backend.urls, 0)
    with pytest.raises(LineError) as refusal:
        backend.submit(job)
    assert refusal.value.status == status
    assert refusal.value.body["error"]["param"] == param
    assert str(refusal.value).startswith(f"{param}: ")
    assert backend.load().waiting == 0


def chat_line(**body: Any) -> Job:
    line = {"custom_id": "c", "method": "POST", "url": "/v1/chat/completions", "body": body}
    return parse(json.dumps(line).encode(), 1, LocalBackend.urls, 0)


def test_the_engine_chats(backend: LocalBackend) -> None:
    message = {"role": "user", "content": QUESTION.format("France")}
    backend.submit(chat_line(messages=[message], temperature=0, max_tokens=8, n=2))
    answers: list[Any] = []
    while not answers:
        answers = backend.poll()
    assert answers[0].body["object"] == "chat.completion"
    contents = [choice["message"]["content"] for choice in answers[0].body["choices"]]
    assert contents == [" Paris"] * 2
    with pytest.raises(LineError, match="messages: is empty"):
        backend.submit(chat_line(messages=[]))


USAGE = [
    pytest.param(["--input", "nowhere"], "nowhere", id="input"),
    pytest.param(["--output", "-"], "--errors", id="errors-needed"),
    pytest.param(["--errors", "in"], "different", id="same-file"),
    pytest.param(["--summary", "no/such"], "no/such", id="summary"),
    pytest.param(["--dtype", "int3"], "int3", id="engine-option"),
    pytest.param(["--order", "random"], "random", id="order"),
    pytest.param(["--window", "0"], "--window", id="window"),
    pytest.param(["--retries", "2"], "--base-url", id="for-a-server"),
    pytest.param(["--base-url", "http://x", "--max-num-seqs", "2"], "max-num-seqs", id="for-us"),
    pytest.param(["--base-url", "localhost"], "localhost", id="no-url"),
    pytest.param(["--base-url", "http://x", "--api-key", "ключ"], "--api-key", id="no-ascii"),
]


@pytest.mark.parametrize(("options", "named"), USAGE)
def test_usage_errors(
    options: list[str],
    named: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    write_lines(Path("in"), questions(1))
    defaults = {"--input": "in", "--output": "out"}
    options = [*(x for k, v in defaults.items() if k not in options for x in (k, v)), *options]
    error = run(capfd, *options, code=2)["error"]
    assert error.startswith("error: ")
    assert named in error


def test_killed_again_and_again(tmp_path: Path) -> None:
    """SIGKILL at random moments, then to the end: what an uninterrupted run gives."""
    draw = random.Random(7)
    source = write_lines(tmp_path / "in.jsonl.gz", questions(40))
    output = tmp_path / "out.jsonl.gz"
    options = ["--input", source, "--output", output, "--sync-lines", 2, "--window", 6, "--quiet"]
    kills = 0
    for _ in range(8):
        before = output.stat().st_size if output.exists() else 0
        process = start(*options)
        while process.poll() is None and (not output.exists() or output.stat().st_size <= before):
            time.sleep(0.01)
        time.sleep(draw.uniform(0, 0.05))
        process.kill()
        _, err = process.communicate()
        kills += process.returncode == -signal.SIGKILL
        if process.returncode == 0:
            break
        if kills == 3:
            summary = start(*options).communicate()[1].splitlines()[-1]
            assert json.loads(summary)["skipped"] >= 3
            break
    assert kills >= 2, err
    whole = start("--input", source, "--output", tmp_path / "whole", "--quiet")
    assert whole.wait(60) == 0
    assert texts(output) == texts(tmp_path / "whole")


def feed(pipe: IO[str] | None, lines: list[dict[str, Any]]) -> None:
    assert pipe is not None
    pipe.write("".join(json.dumps(line) + "\n" for line in lines))
    pipe.flush()


def wait_for(path: Path) -> None:
    """Until the file has content."""
    deadline = time.monotonic() + 60
    while not (path.exists() and path.stat().st_size):
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_finishes_what_is_in_flight(number: int, tmp_path: Path) -> None:
    """Input that never ends: lines come out as they go in, the signal ends the run."""
    output = tmp_path / "out"
    options = ["--input", "-", "--output", output, "--sync-seconds", 0, "--window", 100]
    process = start(*options, stdin=subprocess.PIPE)
    long = {"prompt": "a", "max_tokens": 150, "ignore_eos": True}
    feed(process.stdin, [*questions(3), long])
    wait_for(output)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert json.loads(err.splitlines()[-1])["interrupted"]
    assert set(texts(output)) == {"line-1", "line-2", "line-3", "line-4"}


def test_a_second_signal_stops_at_once(tmp_path: Path) -> None:
    output = tmp_path / "out"
    options = ["--input", "-", "--output", output, "--sync-seconds", 0]
    process = start(*options, stdin=subprocess.PIPE)
    endless = {"prompt": "a", "max_tokens": 15_000, "ignore_eos": True}
    feed(process.stdin, [*questions(2), endless])
    wait_for(output)
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=10)
    assert process.returncode == 130
    assert json.loads(err.splitlines()[-1])["ok"] == 2
    assert set(texts(output)) == {"line-1", "line-2"}


def test_standard_output(tmp_path: Path) -> None:
    process = start("--input", "-", "--output", "-", "--errors", tmp_path / "e", stdin=-1)
    out, err = process.communicate(json.dumps(questions(1)[0]) + "\nbad\n", timeout=60)
    assert process.returncode == 1
    assert json.loads(out)["custom_id"] == "line-1"
    assert decoded(tmp_path / "e")[0]["line"] == 2
    assert json.loads(err.splitlines()[-1])["failed"] == 1


def test_a_file_under_two_names_is_not_destroyed(tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text('{"prompt": "x"}\n')
    (tmp_path / "hard.jsonl").hardlink_to(source)
    other = tmp_path / "notes.txt"
    other.write_text("dear diary\n")
    for errors, words in ((tmp_path / "hard.jsonl", "several names"), (other, "no result line")):
        args = ("--input", source, "--output", tmp_path / "out.jsonl", "--errors", errors)
        command = [sys.executable, SCRIPT, *map(str, args)]
        result = subprocess.run(command, capture_output=True, text=True)
        assert result.returncode == 2, result.stderr
        assert words in result.stderr
    assert source.read_text() == '{"prompt": "x"}\n'
    assert other.read_text() == "dear diary\n"
