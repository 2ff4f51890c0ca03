"""scripts/make_benchmarks.py: what is committed is what it makes, and what it makes of results."""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

import make_benchmarks
from bench_kernels import Row
from bench_peers import PeerTime
from rigs import TINY, run_bench

ROOT = Path(__file__).parents[1]
MARKED = f"# x\n{make_benchmarks.BEGIN}\nold\n{make_benchmarks.END}\nrest\n"


def test_what_is_committed_is_what_it_makes() -> None:
    for path, text in make_benchmarks.generate(ROOT).items():
        assert path.read_text() == text, f"run scripts/make_benchmarks.py: {path} is stale"


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    (tmp_path / "docs" / "results").mkdir(parents=True)
    (tmp_path / "README.md").write_text(MARKED)
    return tmp_path


def generated(tree: Path) -> tuple[str, str]:
    """(BENCHMARKS.md, the README)."""
    files = make_benchmarks.generate(tree)
    return files[tree / "docs" / "BENCHMARKS.md"], files[tree / "README.md"]


def add(tree: Path, name: str, *results: dict[str, Any]) -> Path:
    file = tree / "docs" / "results" / name
    file.write_text("".join(json.dumps(result) + "\n" for result in results))
    return file


def test_without_results(tree: Path) -> None:
    page, readme = generated(tree)
    assert page.endswith(f"\n{make_benchmarks.NOTHING}\n")
    assert readme == MARKED.replace("old", make_benchmarks.NOTHING)


ABOUT = {
    "device": "NVIDIA H100", "driver": "580.1", "torch": "2.11", "triton": "3.6", "commit": "abc",
    "command": "minidsv bench --x", "date": "2026-01-02 03:04 UTC", "model": "configs/big.json",
}  # fmt: skip
ROW = {
    "batch": 8, "context": 4096, "variant": "graph", "us": 1234.56, "us_layer": None,
    "floor_us": 1000.0, "floor_us_layer": None, "distinct_experts": 57.25, "tokens_per_s": 6480.0,
    "mbu": 0.81, "saved_us_launch": 0.0, "over_graph": 1.0,
}  # fmt: skip
TABLE = {
    "kind": "table", **ABOUT, "bandwidth": 3.017e12, "layers": [2, 5], "replays": 200,
    "difference": None,
    "rows": [ROW, ROW | {"variant": "graph+prefetch", "us": 1200.0, "us_layer": 255.5,
                         "floor_us_layer": 201.0, "saved_us_launch": 0.346, "over_graph": 1.0288}],
}  # fmt: skip


def test_decode_steps(tree: Path) -> None:
    add(tree, "a.json", TABLE)
    page, readme = generated(tree)
    assert "## configs/big.json: decode steps\n" in page
    assert (
        "NVIDIA H100, driver 580.1, torch 2.11, triton 3.6, commit abc, 2026-01-02 03:04 UTC: "
        "`minidsv bench --x`" in page
    )
    assert (
        "Memory read at 3,017 GB/s; 2 and 5 layers; 200 replays; all variants decode the same"
        in page
    )
    first = "| 8 | 4096 | graph | 6,480.0 | 1,234.6 | 1,000.0 | 81.0 % | - | - | 0.00 | 1.000 |"
    assert f"{first} 57.2 |" in page
    assert "| 255.5 | 201.0 | 0.35 | 1.029 | 57.2 |" in page
    assert "| big | 8 | 4096 | graph+prefetch | 6,480.0 | 1,200.0 | 255.5 | 201.0 |" in readme
    assert "| graph |" not in readme
    assert readme.startswith("# x\n")
    assert readme.endswith("\nrest\n")


def test_a_run_whose_variants_differ_is_no_figure(tree: Path) -> None:
    add(tree, "a.json", TABLE | {"difference": "variants differ: somewhere"})
    page, readme = generated(tree)
    assert "**variants differ: somewhere**" in page
    assert make_benchmarks.NOTHING in readme


def test_serving(tree: Path) -> None:
    row = {
        "concurrency": 8, "replay_us": 1000.0, "idle_share": 0.0125, "generate_us": 1020.0,
        "itl_us": 1034.0, "itl_p99_us": 1500.0, "tokens_per_s": 7700.0, "different": 1,
        "widest_tie": 0.1,
    }  # fmt: skip
    metrics = {"decode_steps_total": 1200.0, "cuda_graph_steps_total": 1199.0}
    data = {"kind": "serving", **ABOUT, "metrics": metrics}
    without = row | {"replay_us": None, "idle_share": None}
    add(tree, "a.json", data | {"results": [row, without]})
    page, _ = generated(tree)
    assert "## configs/big.json: the server" in page
    assert "| 8 | 1,000.0 | 1.2 % | 1,020.0 | 1,034.0 | 1.034 | 7,700.0 | 1 |" in page
    assert "| 8 | - | - | 1,020.0 | 1,034.0 | - | 7,700.0 | 1 |" in page
    assert "1,199 of 1,200 decode steps by a graph." in page


def test_the_whole_engine(tree: Path) -> None:
    row = {
        "batch": 1, "context": 4096, "prefill_ms": 108.7, "us": 1390.0, "tokens_per_s": 719.4,
        "graph_us": 1360.0, "beside_graph": 0.0216,
    }  # fmt: skip
    for activations in ("none", "fp8"):
        data = {"kind": "wall", **ABOUT, "engine": {"activations": activations}, "rows": [row]}
        add(tree, f"{activations}.json", data)
    page, _ = generated(tree)
    assert "## configs/big.json: the whole engine\n" in page
    assert "## configs/big.json: the whole engine with FP8 activations\n" in page
    assert "| 1 | 4096 | 108.7 | 1,390.0 | 719.4 | 1,360.0 | 2.2 % |" in page


def test_a_graph(tree: Path) -> None:
    graph = {
        "batch": 1, "bound": 8192, "launches_of_a_layer": {"dense": 9, "MoE": 12}, "nodes": 70,
        "ours": {"_gemv": 67}, "external": {"at::cat": 2}, "others": {"memset": 1}, "edges": 69,
        "programmatic": 66, "full_edges": {"_gemv -> at::cat: an external kernel": 2},
        "is_chain": True,
    }  # fmt: skip
    data = {"kind": "graph", **ABOUT, "graphs": [graph], "binaries": 30, "findings": {}}
    add(tree, "a.json", data)
    page, _ = generated(tree)
    assert "| 1 | 8192 | 70 | 69 | 2 | 69 | 66 | 9 dense, 12 MoE |" in page
    assert "- batch 1, contexts up to 8192: 2 x full, _gemv -> at::cat: an external kernel" in page
    assert "- batch 1, contexts up to 8192: 2 x at::cat, unproved" in page
    assert "30 binaries ran, of which 0 failed the check." in page


def test_a_profile_and_its_picture(tree: Path) -> None:
    rows = [
        {"kernel": "_gemv", "calls": 20.0, "us": 300.0, "nbytes": 8.1e8, "of_peak": 0.9,
         "share": 0.75},
        {"kernel": "at::cat", "calls": 1.0, "us": 100.0, "nbytes": None, "of_peak": None,
         "share": 0.25},
    ]  # fmt: skip
    profiles = {"batch 1, context 4096": rows}
    data = {"kind": "profile", **ABOUT, "variant": "graph", "profiles": profiles}
    file = add(tree, "slice-profile.json", data)
    assert "![" not in generated(tree)[0]
    file.with_suffix(".png").write_bytes(b"")
    page, _ = generated(tree)
    assert "![kernels of a decode step](results/slice-profile.png)" in page
    assert "### batch 1, context 4096, graph" in page
    assert "| _gemv | 20.0 | 300.0 | 810.00 | 90.0 % | 75.0 % |" in page
    assert "| at::cat | 1.0 | 100.0 | - | - | 25.0 % |" in page


KERNELS = {
    "kind": "kernels", **ABOUT, "driver": None, "date": None, "read_gb_per_s": 3000.0, "wrong": [],
}  # fmt: skip


def test_operators(tree: Path) -> None:
    us = {"off": 9.0, "seed": 8.5, "on": 8.25, "prefetch": 8.0}
    row = {"dims": "full", "op": "q_b", "shape": "M=1", "nbytes": 16_000_000, "us": us}
    add(tree, "kernels.json", KERNELS | {"rows": [row], "wrong": ["topk"]})
    page, _ = generated(tree)
    assert "## kernels: operators alone\n\nNVIDIA H100, torch 2.11, triton 3.6, commit a" in page
    assert "commit abc: `minidsv bench --x`\n\nMemory read at 3,000 GB/s.\n\n| dims |" in page
    assert "| full | q_b | M=1 | 9.00 | 8.50 | 8.25 | 8.00 | 2,000 | 66.7 % |" in page
    assert "**wrong:** topk" in page


def test_operators_beside_their_peers(tree: Path) -> None:
    peer = PeerTime("deep_gemm masked x 2", us=10.0, ours_us=7.5, error=0.04)
    row = Row("full", "moe", "M=8", nbytes=1000, flops=1, error=0.0, us={"prefetch": 8.0})
    rows = [asdict(replace(row, peer=peer)), asdict(replace(row, op="argmax"))]
    result = KERNELS | {"rows": rows}
    add(tree, "k_m8.json", result)
    old = {"op": "moe", "dims": "full", "shape": "M=1", "nbytes": 1000, "us": {"prefetch": 8.0}}
    for name in ("k_m64.json", "k_m1.json", "k_tp8_m1.json"):
        add(tree, name, result | {"rows": [old]})
    page, _ = generated(tree)
    assert "| moe | M=8 | 8.00 | 0 | 0.0 % | deep_gemm masked x 2 | 10.00 | 0.75 |" in page
    assert "| argmax | M=8 | 8.00 | 0 | 0.0 % | - | - | - |" in page
    titles = [line.split(":")[0] for line in page.splitlines() if line.startswith("## ")]
    assert titles == ["## k_m1", "## k_m8", "## k_m64", "## k_tp8_m1"]
    assert page.count("| peer |") == 1


@pytest.mark.parametrize(
    "text", ["{", '{"kind": "table"}', '{"rows": []}', "[]", '{"kind": "wall", "rows": [{}]}']
)
def test_what_is_no_result_is_named(text: str, tree: Path) -> None:
    (tree / "docs" / "results" / "a.json").write_text(text)
    with pytest.raises(ValueError, match=r"a\.json:1: not a result"):
        make_benchmarks.generate(tree)


def test_a_readme_without_markers(tree: Path) -> None:
    (tree / "README.md").write_text(make_benchmarks.BEGIN)
    with pytest.raises(ValueError, match="README"):
        make_benchmarks.generate(tree)


def test_it_takes_what_the_command_writes(
    tree: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Real output of the three subjects that a CPU has."""
    for subject in ([], ["--profile"], ["--wall"]):
        name = "".join(subject).strip("-") or "table"
        options = [*TINY, "--batch", "1", "--context", "30", *subject]
        file = str(tree / "docs" / "results" / f"{name}.json")
        assert run_bench(monkeypatch, capsys, *options, "--json", file)[0] == 0
    page, readme = generated(tree)
    titles = [line for line in page.splitlines() if line.startswith("## ")]
    assert titles == [
        "## configs/tiny: kernels of a decode step",
        "## configs/tiny: decode steps",
        "## configs/tiny: the whole engine",
    ]
    assert "| tiny | 1 | 30 | eager |" in readme
