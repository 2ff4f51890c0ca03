"""The command `minidsv bench` on the CPU: the table, the wall clock, what it refuses."""

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from minidsv import bench_table
from minidsv.bench_table import VariantsDiffer
from minidsv.bench_timing import read_bandwidth, times_us
from minidsv.bench_wall import WallRow, replay_us
from minidsv.bench_wall import line as wall_line
from minidsv.graph import GraphKey
from rigs import CPU, TINY, run_bench


def test_the_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "result.json"
    arguments = ("--batch", "1,2", "--context", "40,100", "--json", str(file))
    code, out, _ = run_bench(monkeypatch, capsys, *TINY, *arguments)
    *_, last = lines = out.splitlines()
    result = json.loads(last)
    assert code == 0
    assert file.read_text() == last + "\n"
    assert (result["kind"], result["model"], result["layers"]) == ("table", "configs/tiny", [2, 5])
    assert (result["device"][-3:], result["driver"], result["replays"]) == ("CPU", None, 2)
    assert result["command"].startswith("minidsv bench --load-format random")
    assert result["difference"] is None
    rows = result["rows"]
    assert [(r["batch"], r["context"]) for r in rows] == [(1, 40), (1, 100), (2, 40), (2, 100)]
    for row, printed in zip(rows, lines[2:], strict=False):
        assert row["tokens_per_s"] == pytest.approx(1e6 * row["batch"] / row["us"])
        assert row["mbu"] == pytest.approx(row["floor_us"] / row["us"])
        assert 0 < row["floor_us_layer"] < row["floor_us"]
        assert printed.split()[:3] == [str(row["batch"]), str(row["context"]), "eager"]
    assert rows[0]["distinct_experts"] == 2 < rows[2]["distinct_experts"] <= 4


def test_the_command_fails_if_variants_differ(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def differ(*_: Any) -> Iterator[Any]:
        raise VariantsDiffer("variants differ: planted")
        yield

    monkeypatch.setattr(bench_table, "measure_rows", differ)
    code, out, err = run_bench(monkeypatch, capsys, *TINY, "--batch", "1", "--context", "9")
    assert code == 1
    assert err == "error: variants differ: planted\n"
    assert json.loads(out.splitlines()[-1])["difference"] == "variants differ: planted"


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--batch", "1,,2"], "batch: '1,,2'"),
        (["--batch", "0"], "batch: '0'"),
        (["--context", "4k"], "context: '4k'"),
        (["--context", "510"], "context: 510 and the 10 tokens"),
        (["--replays", "504"], "context: 40 and the 512 tokens"),
        (["--variants", "fast"], "variants: 'fast'"),
        (["--variants", "graph"], "variants: 'graph' needs our kernels"),
        (["--replays", "0"], "replays: 0"),
        (["--layers", "4"], "layers: '4'"),
        (["--layers", "4,2"], "layers: '4,2'"),
        (["--graph", "--wall"], "wall: not together with graph"),
        (["--plot", "a.png"], "plot: means nothing to table"),
        (["--graph"], "replays: means nothing to graph"),
        (["--profile", "--layers", "2,3"], "layers: means nothing to profile"),
        (["--profile", "--variants", "eager,graph"], "variants: profile takes one"),
        (["--pdl", "off"], "pdl: 'off'"),
        (["--num-pages", "5"], "num_pages: 5"),
        (["--no-enable-prefix-caching"], "enable_prefix_caching: False"),
        (["--wall", "--batch", "65", "--context", "8"], "batch: 65 is more than max_num_seqs 64"),
        (["--wall", "--context", "9", "--batch", "5", "--num-pages", "4"], "take 5 pages, and"),
        (["--wall", "--context", "505"], "max_tokens"),
        (["--model", "/nowhere"], "/nowhere"),
        (["--json", "/nowhere/a.json"], "json: /nowhere/a.json"),
        (["--profile", "--plot", "/nowhere/a.png"], "plot: /nowhere/a.png"),
        (["--json", ""], "json: ''"),
        (["--json", "/"], "json: '/'"),
        (["--profile", "--plot", "/tmp"], "plot: '/tmp'"),
        (["--profile", "--plot", "a.foo"], "plot: 'a.foo' ends in none of"),
        (["--batch", "9" * 20], "batch, context"),
        (["--max-num-batched-tokens", "64"], "max_num_batched_tokens: 64"),
    ],
)
def test_refusals(
    arguments: list[str],
    named: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    few = [] if "--batch" in arguments else ["--batch", "1"]
    few += [] if "--context" in arguments else ["--context", "40"]
    code, out, err = run_bench(monkeypatch, capsys, *TINY, *few, *arguments)
    assert code == 2
    assert "{" not in out
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert named in err


def test_the_wall_clock(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Prompts that take several steps, so that the first request is ahead of the last."""
    arguments = ("--wall", "--batch", "1,3", "--context", "70", "--max-num-batched-tokens", "64")
    code, out, _ = run_bench(monkeypatch, capsys, *TINY, *arguments, "--num-pages", "12")
    assert code == 0
    result = json.loads(out.splitlines()[-1])
    assert result["engine"]["max_num_batched_tokens"] == 64
    for row, batch in zip(result["rows"], (1, 3), strict=True):
        assert (row["batch"], row["context"]) == (batch, 70)
        assert row["prefill_ms"] * 1e3 > row["us"] > 0
        assert (row["graph_us"], row["beside_graph"]) == (None, None)
        assert row["tokens_per_s"] == pytest.approx(1e6 * batch / row["us"])


def test_the_graph_of_a_step() -> None:
    """The smallest that holds the requests and the longest of them."""
    ran = []

    def graph(key: GraphKey) -> Any:
        return SimpleNamespace(replay=lambda: ran.append(key))

    keys = [GraphKey(size, 1, bound) for size in (1, 2, 4) for bound in (48, 600)]
    graphs = SimpleNamespace(
        buckets=(1, 2, 4), bounds=(48, 600), graphs={key: graph(key) for key in keys}
    )
    engine: Any = SimpleNamespace(runner=SimpleNamespace(graphs=graphs, device=CPU))
    requests: Any = [SimpleNamespace(num_computed_tokens=n) for n in (9, 49, 3)]
    assert replay_us(engine, requests, 5) is not None
    assert ran == [GraphKey(4, 1, 600)] * 5
    replay_us(engine, requests[:1], 1)
    assert ran[-1] == GraphKey(1, 1, 48)
    row = WallRow(batch=2, context=9, prefill_ms=1.0, us=1000.0, graph_us=950.0)
    assert row.beside_graph == pytest.approx(0.05)
    assert wall_line(row).split()[-2:] == ["950.0", "5.0%"]


def test_times_are_of_the_run_alone() -> None:
    import time

    calls = []

    def run() -> None:
        calls.append("run")
        time.sleep(2e-3)

    def between() -> None:
        calls.append("between")
        time.sleep(20e-3)

    times = times_us(run, between, 4, CPU)
    assert calls == ["run", "between"] * 4
    assert all(2e3 <= us < 18e3 for us in times)


def test_read_bandwidth() -> None:
    assert 1e8 < read_bandwidth(CPU) < 1e13
