"""`minidsv bench` on a GPU, over the bundled model on Triton: every subject, every variant."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from minidsv.bench_options import VARIANTS
from minidsv.bench_timing import read_bandwidth
from minidsv.kernels.specs import SPECS
from rigs import run_bench

pytestmark = pytest.mark.gpu
OURS = {spec.kernel.__name__ for spec in SPECS}
OPTIONS = ["--device", "cuda", "--backend", "triton", "--max-model-len", "2048"]


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Run `minidsv bench` with OPTIONS and more; returns its JSON."""

    def run(*arguments: str) -> dict[str, Any]:
        code, out, err = run_bench(monkeypatch, capsys, *OPTIONS, *arguments)
        assert code == 0, out + err
        result: dict[str, Any] = json.loads(out.splitlines()[-1])
        with capsys.disabled():
            print("\n" + out.rpartition("{")[0])
        return result

    return run


def has_pdl() -> bool:
    return torch.cuda.get_device_capability() >= (9, 0)


def test_read_bandwidth() -> None:
    assert 0.2e12 < read_bandwidth(torch.device("cuda")) < 20e12


@pytest.mark.parametrize("kv", ["bfloat16", "fp8", "fp8_flat"])
def test_variants_decode_the_same(kv: str, bench: Any) -> None:
    """On both sides of index_topk, alone and in a batch."""
    result = bench(
        "--batch", "1,3", "--context", "20,700", "--replays", "60", "--kv-cache-dtype", kv
    )
    assert result["difference"] is None
    variants = VARIANTS if has_pdl() else VARIANTS[:2]
    assert [row["variant"] for row in result["rows"]] == [*variants] * 4
    for row in result["rows"]:
        assert 0 < row["floor_us"] < row["us"]
        assert row["variant"] == "eager" or row["saved_us_launch"] is not None
    eager, graph = result["rows"][:2]
    assert graph["us"] < eager["us"]


def test_the_graph_is_a_chain_of_our_kernels(bench: Any) -> None:
    result = bench("--graph", "--batch", "1,8")
    assert result["variant"] == ("graph+prefetch" if has_pdl() else "graph")
    assert result["findings"] == {}
    assert result["binaries"] > 10
    paths = {graph["bound"] for graph in result["graphs"]}
    assert len(paths) > 1
    for graph in result["graphs"]:
        assert set(graph["ours"]) <= OURS
        assert (graph["external"], graph["others"]) == ({}, {})
        assert graph["is_chain"]
        assert graph["edges"] == graph["nodes"] - 1
        assert graph["programmatic"] == (graph["edges"] if has_pdl() else 0)
        launches = graph["launches_of_a_layer"]
        assert 5 < launches["dense"] < 30
        assert 5 < launches["MoE"] < 30


def test_the_edges_without_pdl_are_full(bench: Any) -> None:
    (graph,) = bench("--graph", "--batch", "1", "--context", "20", "--variants", "graph")["graphs"]
    assert graph["programmatic"] == 0
    assert sum(graph["full_edges"].values()) == graph["edges"] == graph["nodes"] - 1
    assert all("launched without the attribute" in why for why in graph["full_edges"])


@pytest.mark.parametrize("variant", ["eager", "graph"])
def test_a_profile(variant: str, bench: Any, tmp_path: Path) -> None:
    """As many calls as the graph has nodes, all of our kernels, the weights charged once."""
    arguments = ("--batch", "2", "--context", "700", "--replays", "20", "--variants", variant)
    result = bench("--profile", "--plot", str(tmp_path / "profile.png"), *arguments)
    assert (tmp_path / "profile.png").exists()
    (rows,) = result["profiles"].values()
    assert {row["kernel"] for row in rows} <= OURS
    assert sum(row["share"] for row in rows) == pytest.approx(1)
    assert all(row["calls"] == int(row["calls"]) > 0 for row in rows)
    assert sum(row["nbytes"] or 0 for row in rows) > 4e6  # the bundled model has 10 MB


def test_the_whole_engine(bench: Any) -> None:
    result = bench("--wall", "--batch", "1,3", "--context", "300", "--replays", "20")
    for row in result["rows"]:
        assert 0 < row["graph_us"] < row["us"]
