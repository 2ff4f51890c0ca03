"""Batch files: input lines, result lines, and what a rerun makes of a file cut anywhere."""

import gzip
import json
import os
import subprocess
import sys
import tempfile
from collections import deque
from pathlib import Path
from typing import Any

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

import batch_lines
from batch_codec import BatchError, codec_of
from batch_journal import Ids, Journal, check_options
from batch_lines import Answer, Failure, Job, LineError, Source
from batch_report import Load, Reporter, Tally
from batch_run import Batch, Stop

SUFFIXES = ["", ".gz", ".zst"]
OPTIONS = {"model": "m", "seed": 0}


class Echo:
    """Answers `window` jobs at a time, newest first, with the prompt in capitals."""

    urls = ("/v1/completions",)

    def __init__(self) -> None:
        self.jobs: deque[Job] = deque()
        self.most = 0

    def submit(self, job: Job) -> None:
        if job.body["prompt"] == "refused":
            raise LineError("refused", "no")
        self.jobs.append(job)
        self.most = max(self.most, len(self.jobs))

    def poll(self) -> list[Answer | Failure]:
        return [answer(self.jobs.pop()) for _ in range(min(2, len(self.jobs)))]

    def load(self) -> Load:
        return Load(len(self.jobs), 0, None, 0)

    def figures(self) -> dict[str, Any]:
        return {}

    def close(self) -> None:
        self.jobs.clear()


def answer(job: Job) -> Answer:
    text = f"{job.body['prompt'].upper()} {job.body['seed']}"
    usage = {"prompt_tokens": 2, "completion_tokens": 3}
    return Answer(job, {"text": text, "usage": usage}, 0.01, job.request_id)


def decoded(path: str | Path) -> list[dict[str, Any]]:
    data = Path(path).read_bytes()
    if str(path).endswith(".gz"):
        data = gzip.decompress(data)
    if str(path).endswith(".zst"):
        reader = zstandard.ZstdDecompressor().stream_reader(data, read_across_frames=True)
        data = reader.read()
    return [json.loads(line) for line in data.splitlines()]


def run(
    source: str | Path, output: str | Path, window: int = 4, in_order: bool = False, sync: int = 3
) -> tuple[Tally, Echo]:
    """One whole run with Echo; a small block size makes for many blocks."""
    echo = Echo()
    with (
        Journal(str(output), sync, 9.0) as results,
        Journal(f"{output}.errors", sync, 9.0) as errors,
    ):
        check_options(str(output), OPTIONS, fresh=not results.size)
        batch = Batch(Source(str(source)), echo, results, errors, window, 0, in_order)
        batch.run(Reporter(None, quiet=True), Stop())
    return batch.tally, echo


def write_lines(path: Path, lines: list[Any]) -> Path:
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    path.write_bytes(codec_of(str(path)).encode("\n".join(texts).encode()))
    return path


def good_line(name: str, **fields: Any) -> dict[str, Any]:
    body = {"prompt": f"p {name}"}
    line = {"custom_id": name, "method": "POST", "url": "/v1/completions", "body": body}
    return line | fields


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_lines_become_results(tmp_path: Path, suffix: str) -> None:
    """Both kinds of line, blank lines, CRLF, a BOM, no line end at the end; any compression."""
    lines = ["\ufeff" + json.dumps(good_line("a")) + "\r", "", {"prompt": "x"}, "  "]
    lines += [{"prompt": "y", "custom_id": "né"}]
    source = write_lines(tmp_path / f"in{suffix}", lines)
    tally, _ = run(source, tmp_path / f"out{suffix}")
    got = {r["custom_id"]: r for r in decoded(tmp_path / f"out{suffix}")}
    assert set(got) == {"a", "line-3", "né"}
    assert got["a"]["response"]["status_code"] == 200
    assert got["a"]["response"]["body"]["text"].startswith("P A ")
    assert got["a"]["error"] is None
    assert got["a"]["id"].startswith("batch_req_")
    assert (tally.ok, tally.failed, tally.skipped) == (3, 0, 0)
    assert (tally.prompt_tokens, tally.generated_tokens) == (6, 9)


BAD_LINES = [
    pytest.param("{", "invalid_json", id="json"),
    pytest.param("[" * 100_000, "invalid_json", id="deep"),
    pytest.param("[1]", "invalid_line", id="list"),
    pytest.param('{"prompt": NaN}', "invalid_json", id="nan"),
    pytest.param('{"prompt": "a", "top_p": 1e999}', "invalid_json", id="infinity"),
    pytest.param({}, "invalid_line", id="empty"),
    pytest.param({"prompt": "a", "custom_id": 7}, "invalid_line", id="id-is-a-number"),
    pytest.param({"prompt": "a", "custom_id": "\ud800"}, "invalid_line", id="id-is-no-text"),
    pytest.param(good_line(""), "invalid_line", id="id-is-empty"),
    pytest.param({"body": {"prompt": "a"}}, "invalid_line", id="id-missing"),
    pytest.param(good_line("b", method="GET"), "invalid_line", id="method"),
    pytest.param(good_line("b", url="/v1/embeddings"), "unsupported_url", id="url"),
    pytest.param(good_line("b", url="/v1/chat/completions"), "unsupported_url", id="chat"),
    pytest.param(good_line("b", body="p"), "invalid_line", id="body"),
    pytest.param(good_line("b", body={"max_tokens": 1}), "invalid_line", id="no-prompt"),
    pytest.param(good_line("b", priority=1), "invalid_line", id="unknown-field"),
    pytest.param({"prompt": "a", "stream": True}, "invalid_line", id="stream"),
    pytest.param({"prompt": "refused"}, "refused", id="refused-by-the-backend"),
    pytest.param(good_line("a"), "duplicate_custom_id", id="duplicate"),
    pytest.param("x" * 3000, "line_too_long", id="long"),
]


@pytest.mark.parametrize(("line", "code"), BAD_LINES)
def test_a_bad_line_is_reported_and_the_rest_goes_on(
    line: Any, code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch_lines, "MAX_LINE_BYTES", 2000 if code == "line_too_long" else 10**6)
    source = write_lines(tmp_path / "in", [good_line("a"), "", line, good_line("z")])
    for _ in range(2):  # a rerun reports it again, once
        tally, _ = run(source, tmp_path / "out")
        (error,) = decoded(tmp_path / "out.errors")
        assert (error["line"], error["error"]["code"]) == (3, code)
        assert error["response"]["status_code"] == 400
        assert error["response"]["body"]["error"]["message"] == error["error"]["message"]
        assert tally.failed == 1
        assert len(error["error"]["message"]) < 300
    assert tally.skipped == 2
    assert {r["custom_id"] for r in decoded(tmp_path / "out")} == {"a", "z"}


def test_bad_utf8_is_reported(tmp_path: Path) -> None:
    (tmp_path / "in").write_bytes(b'{"prompt": "\xff"}\n{"prompt": "b"}\n')
    run(tmp_path / "in", tmp_path / "out")
    assert decoded(tmp_path / "out.errors")[0]["error"]["code"] == "invalid_utf8"
    assert len(decoded(tmp_path / "out")) == 1


@pytest.mark.parametrize("suffix", SUFFIXES[1:])
@pytest.mark.parametrize("damage", ["cut", "changed"])
def test_damaged_input_ends_there(suffix: str, damage: str, tmp_path: Path) -> None:
    codec = codec_of(f"in{suffix}")
    good = codec.encode(json.dumps(good_line("a")).encode() + b"\n")
    bad = codec.encode(os.urandom(500))
    bad = bad[:-20] if damage == "cut" else b"no block" + bad
    (tmp_path / f"in{suffix}").write_bytes(good + bad)
    tally, _ = run(tmp_path / f"in{suffix}", tmp_path / "out")
    errors = decoded(tmp_path / "out.errors")
    assert errors[-1]["error"]["code"] == "input_damaged"
    assert (tally.ok, len(decoded(tmp_path / "out"))) == (1, 1)


@pytest.mark.parametrize("window", [1, 3, 100])
def test_order_and_window(window: int, tmp_path: Path) -> None:
    """At most `window` lines are begun; in order, failed lines make no gap."""
    names = [f"n{i}" for i in range(20)]
    lines: list[Any] = [good_line(name) for name in names]
    source = write_lines(tmp_path / "in", [*lines[:7], "bad", *lines[7:]])
    _, echo = run(source, tmp_path / "ordered", window, in_order=True)
    assert [r["custom_id"] for r in decoded(tmp_path / "ordered")] == names
    assert echo.most <= window
    run(source, tmp_path / "any", window)
    got = [r["custom_id"] for r in decoded(tmp_path / "any")]
    assert sorted(got) == sorted(names)
    assert (got == names) == (window == 1)


@settings(max_examples=150, deadline=None)
@given(suffix=st.sampled_from(SUFFIXES), at=st.floats(0, 1), sync=st.integers(1, 7))
def test_cut_anywhere_and_resumed(suffix: str, at: float, sync: int) -> None:
    """The union is that of an uninterrupted run: the same records, none twice."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / f"out{suffix}"
        lines: list[Any] = [good_line(f"n{i}") for i in range(9)]
        source = write_lines(Path(folder) / "in", [*lines, "bad", lines[0]])
        run(source, output, sync=sync)
        whole = output.read_bytes()
        want = sorted(decoded(output), key=lambda r: r["custom_id"])
        output.write_bytes(whole[: round(at * len(whole))])
        tally, _ = run(source, output, sync=sync)
        assert sorted(decoded(output), key=lambda r: r["custom_id"]) == want
        assert (tally.ok + tally.skipped, tally.failed) == (9, 2)
        assert len(decoded(Path(folder) / f"out{suffix}.errors")) == 2


def test_blocks_survive_alone(tmp_path: Path) -> None:
    """A cut costs at most the lines of one block."""
    source = write_lines(tmp_path / "in", [good_line(f"n{i}") for i in range(12)])
    for suffix in SUFFIXES:
        output = tmp_path / f"out{suffix}"
        run(source, output, sync=3)
        output.write_bytes(output.read_bytes()[:-1])
        tally, _ = run(source, output)
        assert tally.ok <= 3


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_damage_before_the_end_is_refused(suffix: str, tmp_path: Path) -> None:
    output = tmp_path / f"out{suffix}"
    source = write_lines(tmp_path / "in", [good_line(f"n{i}") for i in range(6)])
    run(source, output, sync=1)
    whole = output.read_bytes()
    output.write_bytes(b"\xff\xff\n\xff" + whole[4:])
    with pytest.raises(BatchError, match=r"line 1|after byte 0"):
        run(source, output)
    assert len(output.read_bytes()) == len(whole)


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("cut", [0, 9])
@pytest.mark.parametrize("text", [b"dear diary", b'{"prompt": "a"}', b"dear\ndiary"])
def test_a_foreign_file_is_left_alone(text: bytes, cut: int, suffix: str, tmp_path: Path) -> None:
    """Also one without a line end: what a run of ours has torn begins as its lines do."""
    path = tmp_path / f"foreign{suffix}"
    stored = codec_of(str(path)).encode(text + b" " * 300_000)  # zstd shows whole blocks only
    path.write_bytes(stored[: len(stored) - cut])
    before = path.read_bytes()
    with Journal(str(path), 1, 1.0) as journal, pytest.raises(BatchError, match="no result line"):
        journal.clear()
    assert path.read_bytes() == before


def test_what_does_not_belong_together_is_refused(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "in", [good_line("a")])
    output = tmp_path / "out"
    run(source, output)
    with pytest.raises(BatchError, match="model was 'm', is 'other'; seed was 0, is None"):
        check_options(str(output), {"model": "other"}, fresh=False)
    with Journal(str(output), 1, 1), pytest.raises(BatchError, match="another process"):
        run(source, output)
    (tmp_path / "out.run.json").unlink()
    with pytest.raises(BatchError, match=r"no out\.run\.json"):
        run(source, output)
    assert len(decoded(output)) == 1


def test_a_changed_line_is_not_taken_for_done(tmp_path: Path) -> None:
    run(write_lines(tmp_path / "in", [{"prompt": "one"}]), tmp_path / "out")
    tally, _ = run(write_lines(tmp_path / "in", [{"prompt": "two"}]), tmp_path / "out")
    assert (tally.failed, tally.skipped) == (1, 0)
    assert decoded(tmp_path / "out.errors")[0]["error"]["code"] == "changed_line"


def test_seeds_depend_on_the_custom_id() -> None:
    def seed(line: dict[str, Any], run_seed: int = 0, number: int = 1) -> Any:
        urls = ("/v1/completions",)
        return batch_lines.parse(json.dumps(line).encode(), number, urls, run_seed).body["seed"]

    a = {"prompt": "p", "custom_id": "a"}
    assert seed(a) == seed({**a, "seed": None, "prompt": "q"}, number=9)
    assert len({seed(a), seed({**a, "custom_id": "b"}), seed(a, run_seed=1)}) == 3
    assert seed({**a, "seed": 5}) == 5


def test_ids() -> None:
    ids = Ids()
    ids.add_result("a", "r1")
    assert ids.claim("a", 4) == ("r1", None)
    assert ids.claim("a", 5) == ("r1", 4)
    assert ids.claim("b", 6) == (None, None)
    assert ids.claim("b", 7) == (None, 6)


MEMORY = """
import json, resource, sys
from test_batch_files import run
count, folder = int(sys.argv[1]), sys.argv[2]
with open(f"{folder}/in", "w") as file:
    for i in range(count):
        file.write(json.dumps({"custom_id": f"request-{i}", "prompt": "p" * 200}) + chr(10))
for _ in range(2):
    tally, echo = run(f"{folder}/in", f"{folder}/out", window=256, sync=64)
    print(tally.ok, tally.skipped, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def peak_kib(count: int, folder: Path) -> int:
    """Peak memory of a process that runs `count` lines, and runs them again, all done."""
    folder.mkdir()
    here = Path(__file__).parent
    env = {**os.environ, "PYTHONPATH": f"{here}:{here.parent / 'scripts'}"}
    command = [sys.executable, "-c", MEMORY, str(count), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=True)
    first, second = (map(int, line.split()) for line in done.stdout.splitlines())
    assert [*first][:2] == [count, 0]
    ok, skipped, peak = second
    assert (ok, skipped) == (0, count)
    return peak


def test_memory_does_not_grow_with_the_input(tmp_path: Path) -> None:
    assert peak_kib(10_000, tmp_path / "long") - peak_kib(1000, tmp_path / "short") < 4096
