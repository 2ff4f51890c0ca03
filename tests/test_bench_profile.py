"""`minidsv bench --profile` without a GPU: planted events and launches, PyTorch's operators."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from minidsv.bench_bytes import LaunchBytes
from minidsv.bench_profile import KernelRow, aggregate, line, plot
from minidsv.checkpoint import Weight
from minidsv.config import ModelConfig
from minidsv.engine_config import bundled_model
from minidsv.kv_cache import KVCache
from rigs import TINY, run_bench


def test_aggregate() -> None:
    events = [("_gemv", 30.0), ("void at::fill<4>(int)", 10.0), ("_gemv", 50.0), ("_norm", 110.0)]
    rows = aggregate(events, 2, {"_gemv": 4e4, "unseen": 1.0}, bandwidth=2e9)
    assert rows == [
        KernelRow("_norm", 0.5, 55.0, None, None, pytest.approx(0.55)),
        KernelRow("_gemv", 1.0, 40.0, 4e4, pytest.approx(0.5), pytest.approx(0.4)),
        KernelRow("at::fill", 0.5, 5.0, None, None, pytest.approx(0.05)),
    ]
    assert line(rows[0]).split() == ["0.5", "55.0", "-", "-", "55.0%", "_norm"]
    assert line(rows[1]).split() == ["1.0", "40.0", "0.04", "50.0%", "40.0%", "_gemv"]


def launch(name: str, family: str = "gemv_triton") -> Any:
    function = SimpleNamespace(__module__=f"minidsv.kernels.{family}")
    kernel = SimpleNamespace(__name__=name, fn=function)
    return SimpleNamespace(spec=SimpleNamespace(kernel=kernel))


def test_bytes_of_launches() -> None:
    """Weights as stored, of experts and the embedding what is read, of caches the rows."""
    model = ModelConfig.from_path(bundled_model())
    cpu = torch.device("cpu")
    cache = KVCache.allocate(model, 30, "bfloat16", "fp8", cpu)
    weights = {
        "embed_tokens": Weight(torch.empty(model.vocab_size, 6)),
        "layers.1.mlp.experts.down_proj": Weight(torch.empty(model.n_routed_experts, 10)),
        "layers.1.mlp.shared_experts.down_proj": Weight(torch.empty(10)),
        "layers.0.o_proj": Weight(torch.empty(64, 32, dtype=torch.float8_e4m3fn), torch.empty(2)),
    }
    observer = LaunchBytes(model, weights, cache, batch=3, context=1000, experts=2.5)
    _, experts, shared, o_proj = weights.values()
    x = torch.empty(5000)
    gemv = {"w": o_proj.data, "s": o_proj.scale, "x": x, "BLOCK": 4, "unused": o_proj.data}
    observer(launch("_gemv"), gemv)
    observer(launch("_gemv"), {"w": o_proj.data[:32], "s": None, "x": x})
    observer(launch("_down", "moe_triton"), {"w": experts.data, "shared": shared.data, "out": x})
    observer(launch("_gather"), {"table": weights["embed_tokens"].data})
    observer(launch("_write"), {"kv": cache.latent[0], "index": cache.index[1]})
    observer(launch("_attend", "sparse_mla_triton"), {"kv": cache.latent[1], "q": x})
    observer(launch("_score", "indexer_logits_triton"), {"keys": cache.index[0]})
    observer(launch("_norm"), {"x": x, "out": x})
    row, key = 2 * model.latent_dim, model.index_head_dim + 4
    assert observer.by_kernel == {
        "_gemv": 64 * 32 + 8 + 32 * 32,
        "_down": round(2.5 * 40) + 40,
        "_gather": 3 * 6 * 4,
        "_write": 3 * (row + key),
        "_attend": 3 * model.index_topk * row,
        "_score": 3 * 1000 * key,
    }


def test_a_picture(tmp_path: Path) -> None:
    rows = [KernelRow(f"kernel {i}", 1.0, 20.0 - i, None, None, 0.05) for i in range(20)]
    plot({"batch 1": rows, "batch 8": rows[::2]}, str(tmp_path / "bars.png"))
    assert (tmp_path / "bars.png").read_bytes().startswith(b"\x89PNG")


def test_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On the CPU rows are operators, whose bytes nobody knows."""
    picture = tmp_path / "profile.png"
    options = ("--batch", "2", "--context", "30,90", "--profile", "--plot", str(picture))
    code, out, _ = run_bench(monkeypatch, capsys, *TINY, *options)
    assert code == 0
    result = json.loads(out.splitlines()[-1])
    assert picture.exists()
    assert (result["kind"], result["variant"]) == ("profile", "eager")
    assert list(result["profiles"]) == ["batch 2, context 30", "batch 2, context 90"]
    for rows in result["profiles"].values():
        assert sum(row["share"] for row in rows) == pytest.approx(1)
        (embedding,) = (row for row in rows if row["kernel"] == "aten::embedding")
        assert embedding["calls"] == 1
        assert embedding["nbytes"] is None
        assert rows == sorted(rows, key=lambda row: -row["us"])


def test_without_matplotlib(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("minidsv.bench_profile.find_spec", lambda name: None)
    code, _, err = run_bench(monkeypatch, capsys, "--profile", "--plot", "a.png")
    assert code == 2
    assert "minidsv[bench]" in err
