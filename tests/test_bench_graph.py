"""`minidsv bench --graph` without a GPU: layers stacked anew, reports of planted captures."""

import importlib
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from minidsv import bench_graph
from minidsv.bench_graph import layer_kinds, report_graph, stacked
from minidsv.bench_nodes import Edge, Node
from minidsv.bench_options import BenchOptions
from minidsv.bench_rig import Rig
from minidsv.engine_config import EngineConfig
from minidsv.model import DeepseekV32
from rigs import STEPS


def test_stacked_layers_are_the_model(rig: Rig) -> None:
    layers = range(rig.model.num_hidden_layers)
    want = rig.build_model("eager", len(layers)).forward(rig.first_step(3, 60))
    for got, logits in zip(stacked(rig, layers).forward(rig.first_step(3, 60)), want, strict=True):
        assert torch.equal(got, logits)


def test_a_layer_comes_twice(rig: Rig) -> None:
    for layer in layer_kinds(rig.model).values():
        model = stacked(rig, [0, layer, layer])
        first, one, two = model.layers
        assert type(one.mlp) is type(two.mlp)
        assert (one.attention.indexer is None) == (rig.model.indexer_types[layer] == "shared")
        assert one.attention.o_proj.weight is two.attention.o_proj.weight
        assert first.attention.kv_buffer is rig.cache.latent[0]
        assert one.attention.kv_buffer is rig.cache.latent[layer]
        model.greedy(rig.first_step(3, 60))


def test_kinds_of_layers(rig: Rig) -> None:
    want = {"dense": 0, "MoE": 1}
    if "shared" in rig.model.indexer_types:
        want["MoE with a shared indexer"] = rig.model.indexer_types.index("shared")
    assert layer_kinds(rig.model) == want


def test_the_report(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Planted: 4 kernels of ours a model, 7 a dense layer, 9 a MoE layer, and a memset."""
    captured = []

    def capture(rig: Rig, model: DeepseekV32, batch: int, context: int, keep_graph: bool) -> Any:
        assert keep_graph
        captured.append((model.config.num_hidden_layers, batch, context))
        return SimpleNamespace(graphs={"key": model})

    def read_graph(model: DeepseekV32, driver: Any) -> tuple[list[Node], list[Edge]]:
        assert driver == "driver"
        kinds = [model.config.is_moe(i) for i in range(model.config.num_hidden_layers)]
        count = 4 + sum(9 if is_moe else 7 for is_moe in kinds)
        nodes = [Node("memset"), *(Node("kernel", "_ours") for _ in range(count))]
        return nodes, [Edge(i, i + 1, int(i > 0), int(i > 0)) for i in range(count)]

    monkeypatch.setattr(bench_graph, "capture", capture)
    monkeypatch.setattr(bench_graph, "read_graph", read_graph)
    found = report_graph(replace(rig, variants=("graph+pdl",)), 3, 60, "driver", {"_ours"})
    layers = rig.model.num_hidden_layers
    assert captured[0] == (layers, 3, 60)
    expected = {"dense": 7, "MoE": 9, "MoE with a shared indexer": 9}
    kinds = layer_kinds(rig.model)
    assert found["launches_of_a_layer"] == {kind: expected[kind] for kind in kinds}
    assert found["ours"] == {"_ours": 4 + 7 + 9 * (layers - 1)}
    assert found["edges"] - found["programmatic"] == 1
    assert found["full_edges"] == {"memset -> _ours: a memset node has no trigger": 1}
    assert (found["batch"], found["context"], found["bound"]) == (3, 60, rig.bound(60))
    out = capsys.readouterr().out
    assert f"batch 3, contexts up to {rig.bound(60)}: scoring" in out
    assert "launches of a layer: 7 dense, 9 MoE" in out
    assert rig.bound(rig.model.index_topk - STEPS) == rig.model.index_topk
    report_graph(rig, 1, rig.model.index_topk - STEPS, "driver", {"_ours"})
    assert "nothing is scored" in capsys.readouterr().out


@pytest.mark.parametrize("findings", [[], ["PTX 0 waits, want one"]])
def test_a_binary_that_broke_the_contract(
    findings: list[str],
    rig: Rig,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Every path is reported, every launch checked; one finding and the run is not sound."""
    ran = pytest.importorskip("minidsv.kernels.ran")
    launch = importlib.import_module("minidsv.kernels.launch")
    planted = SimpleNamespace(compiled=SimpleNamespace(hash="a"))
    reported, checked = [], []

    def report(rig: Rig, batch: int, context: int, driver: Any, ours: set[str]) -> dict[str, Any]:
        launch._OBSERVER.get()(planted, {})
        assert "_rms_norm_kernel" in ours
        reported.append((batch, context))
        return {}

    def check(launches: Any, jobs: int) -> list[Any]:
        checked.extend(launches)
        proof = SimpleNamespace(case="_norm[0]")
        return [SimpleNamespace(findings=findings, proof=proof)]

    monkeypatch.setattr(Rig, "build", lambda *_: replace(rig, variants=("graph",), steps=0))
    monkeypatch.setattr(bench_graph, "cuda_driver", lambda: None)
    monkeypatch.setattr(bench_graph, "report_graph", report)
    monkeypatch.setattr(ran, "check_ran", check)
    monkeypatch.setattr(ran, "report_ran", lambda ran: "the proof")
    result = bench_graph.run(EngineConfig(), BenchOptions(graph=True, batch="1,8"))
    assert reported == [(batch, bound) for batch in (1, 8) for bound in rig.bounds]
    assert checked == [planted]
    assert result.is_sound == (not findings)
    assert result.data["findings"] == ({"_norm[0]": findings} if findings else {})
    assert capsys.readouterr().out.endswith("the proof\n")
