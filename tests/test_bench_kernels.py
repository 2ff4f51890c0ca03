"""scripts/bench_kernels.py on the CPU, where every mode is the reference: its rows at small sizes,
what they cost, what is written and what is refused."""

import inspect
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from torch import Tensor

import bench_kernels
import make_benchmarks
from bench_cases import all_cases
from bench_inputs import FULL, SLOTS, TP8, Case, Dims, Launch, Write, tensors
from bench_kernels import checked, main
from minidsv import indexer, layers, mla, model, moe, rope
from minidsv.bench import provenance
from minidsv.kernels.gemm import Segment
from minidsv.kernels.indexer_logits import chunk_rows
from minidsv.kernels.norm import rms_norm
from minidsv.kernels.pdl import PdlMode

TINY = Dims(
    "full", heads=2, inner=128, dense=256, vocab=96, hidden=256, q_lora=128, nope=16, v=24,
    latent=128, rope=32, index_heads=4, index_dim=64, index_topk=128, experts=16, top_k=2,
    contexts=(64, 320),
)  # fmt: skip
ENGINE = (indexer, layers, mla, model, moe, rope)  # every module that calls operators
KERNELS = "minidsv.kernels."
# Engine calls that are rows under another name: one of several, one after another, no operator.
FORMS = {"linear": "fused_linear", "pre_norm": "add_rms_norm", "index_prep": "index_k_write"}


@pytest.mark.parametrize("tokens", [1, 3])
def test_every_row_runs(tokens: int) -> None:
    cases = list(all_cases(TINY, [tokens]))
    for case in cases:
        assert checked(case) == 0
        for result in tensors(case.build(1)(None)):
            assert result.view(torch.uint8).any(), f"{case.op}: a result of zeros"


@pytest.mark.parametrize("dims", [FULL, TP8])
def test_names_are_unique_and_fit_their_columns(dims: Dims) -> None:
    names = [(case.op, case.shape) for case in all_cases(dims, [1, 64])]
    assert len({*names}) == len(names)
    for op, shape in names:
        assert len(op) < 28, op
        assert len(shape) < 22, shape


def operators(cases: Iterator[Case]) -> set[str]:
    """The functions of `kernels/` that the rows call, not those that these call."""
    called = set()

    def note(frame: FrameType, event: str, _: Any) -> None:
        inner, outer = (f.f_globals["__name__"] for f in (frame, frame.f_back or frame))
        if event == "call" and inner.startswith(KERNELS) and not outer.startswith(KERNELS):
            called.add(frame.f_code.co_name)

    for case in cases:
        run = case.build(0)
        sys.setprofile(note)
        try:
            run(None)
        finally:
            sys.setprofile(None)
    return called


def test_every_operator_of_the_engine_has_a_row() -> None:
    launched = {
        function.__name__
        for module in ENGINE
        for function in vars(module).values()
        if inspect.isfunction(function)
        and function.__module__.startswith(KERNELS)
        and "pdl" in inspect.signature(function).parameters
        and function is not chunk_rows
    }
    assert launched > {"attention_prep", "sparse_mla_values", "embedding", *FORMS}
    rows = operators(all_cases(TINY, [1]))
    assert {FORMS.get(name, name) for name in launched} - rows == set()


@pytest.mark.parametrize("dims", [FULL, TP8])
def test_every_row_can_be_launched(dims: Dims, monkeypatch: pytest.MonkeyPatch) -> None:
    """Launchers take the real sizes, strides and types; on the meta device, without data."""
    launch = pytest.importorskip("minidsv.kernels.launch")
    cases = list(all_cases(dims, [1, 8, 64]))
    launches = list[str]()
    monkeypatch.setattr(
        launch.KernelSpec, "launch", lambda spec, *_, **__: launches.append(spec.name)
    )
    monkeypatch.setattr("minidsv.kernels.pdl.is_interpreted", lambda: True)  # though not on CUDA
    monkeypatch.setattr("bench_inputs.device", lambda: torch.device("meta"))
    for module in ("bench_inputs", "bench_attention", "bench_indexer", "bench_small"):
        monkeypatch.setattr(f"{module}.seeded", lambda seed: {"device": torch.device("meta")})
    for case in cases:
        before = len(launches)
        tensors(case.build(0)("prefetch"))
        assert len(launches) > before, case.op
    assert {"attention_prep_kernel", "combine_values_kernel", "lone_down_kernel"} < {*launches}


def in_memory(arguments: Any) -> list[Tensor]:
    """The tensors among an operator's arguments."""
    if isinstance(arguments, Segment):
        return in_memory((arguments.weight, arguments.scale))
    if isinstance(arguments, tuple | list):
        return [t for one in arguments for t in in_memory(one)]
    return [arguments] if isinstance(arguments, Tensor) else []


PARTLY_READ = {"index logits fp8", "top-128", "all_slots", "moe_experts", "embedding 256"}


@pytest.mark.parametrize("tokens", [1, 3])
def test_costs_are_the_bytes_that_go_in_and_come_out(tokens: int) -> None:
    """Of caches the rows of the tokens; once what is both read and returned."""
    counted = set()
    for case in all_cases(TINY, [tokens]):
        run = case.build(0)
        if not isinstance(run, Launch) or case.op in PARTLY_READ:
            continue
        every = [*in_memory(run.args), *tensors(run(None))]
        moved = {(t.data_ptr(), t.shape): t for t in every}.values()
        caches = [t for t in moved if t.untyped_storage().nbytes() >= SLOTS * 64]
        assert bool(caches) == (isinstance(run, Write) or case.op.startswith("sparse_mla"))
        rows = tokens if isinstance(run, Write) else tokens * TINY.index_topk
        nbytes = sum(t.nbytes for t in moved if not any(t is cache for cache in caches))
        nbytes += sum(cache.nbytes // SLOTS * rows for cache in caches)
        assert case.cost[0] == nbytes, case.op
        counted.add(case.op)
    assert len(counted) > 30


def row_without_writes(seed: int) -> Launch:
    """Of an operator that writes nothing in one mode."""
    cache = torch.zeros(2, 4)

    def write(pdl: PdlMode | None) -> None:
        if pdl != "on":
            cache.fill_(3.0)

    return Write((cache,), write)


def test_wrong_rows_are_seen() -> None:
    with pytest.raises(AssertionError, match="write M=1: on differs from off"):
        checked(Case("write", "M=1", (1, 1), row_without_writes))
    planted = Case("norm", "M=1", (1, 1), lambda _: lambda pdl: torch.ones(2) * (pdl is None or 2))
    with pytest.raises(AssertionError, match=r"norm M=1: relative L2 1, 0\.008 allowed"):
        checked(planted)


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small sizes, no device, and a microsecond for everything."""
    monkeypatch.setattr(bench_kernels, "DIMS", {"full": TINY})
    monkeypatch.setattr(bench_kernels, "device", lambda: torch.device("cuda"))
    monkeypatch.setattr(bench_kernels, "provenance", lambda _: provenance("cpu"))
    monkeypatch.setattr(bench_kernels, "read_bandwidth", lambda _: 3e12)
    monkeypatch.setattr(bench_kernels, "graph_us", lambda runs: 1.0)


def test_what_is_written(bench: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, picture = tmp_path / "a.json", tmp_path / "a.png"
    options = ["--no-peers", "--json", str(file), "--plot", str(picture)]
    assert main(["--tokens", "2", "--op", "norm +", "--op", "argmax", *options]) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    result = json.loads(last)
    assert file.read_text() == last + "\n"
    assert picture.stat().st_size > 1000
    assert lines[1] == "memory read at 3000 GB/s"
    about = ("kind", "device", "driver", "torch", "triton", "commit", "command", "date")
    assert [*result][:8] == [*about]
    assert (result["kind"], result["command"][:7]) == ("kernels", "python ")
    names = [row["op"] for row in result["rows"]]
    assert names == [
        "norm + fused_a_gemm", "norm + q_b + index wq_b", "norm + rope + write bf16",
        "norm + rope + write fp8", "argmax 96",
    ]  # fmt: skip
    ((_, read),) = make_benchmarks.read_results(tmp_path)
    assert "| full | argmax 96 | M=2 | 1.00 |" in make_benchmarks.section(file, read)


def test_a_wrong_row_fails_the_run_and_leaves_the_others(
    bench: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("bench_small.rms_norm", lambda *a, pdl: rms_norm(*a) * (pdl != "seed"))
    assert main(["--tokens", "1", "--op", "rms_norm", "--no-peers"]) == 1
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["wrong"] == ["full rms_norm 128 M=1: seed differs from off"]
    assert [row["op"] for row in result["rows"]] == ["add_rms_norm 256"]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--op", "rms", "--op", "mox"], "op: 'mox' is in none of ['fused_a_gemm', 'q_b + "),
        (["--op", ""], "op: ''"),
        (["--tokens", "0"], "argument --tokens: '0' is not an integer of at least 1"),
        (["--tokens", "-1"], "'-1' is not an integer of at least 1"),
        (["--tokens", "1.5"], "'1.5' is not an integer of at least 1"),
        (["--json", "/nowhere/a.json"], "json: /nowhere/a.json is not in a folder that exists"),
        (["--json", ""], "json: '' is no file that can be written"),
        (["--plot", "/nowhere/a.png"], "plot: /nowhere/a.png"),
        (["--plot", "a.foo"], "plot: 'a.foo' ends in none of"),
    ],
)
def test_refusals(
    arguments: list[str], named: str, bench: None, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before anything is measured."""
    with pytest.raises(SystemExit) as refused:
        main(arguments)
    out, err = capsys.readouterr()
    assert (refused.value.code, out) == (2, "")
    assert named in err


def test_without_a_gpu() -> None:
    with pytest.raises(SystemExit, match="needs a CUDA device, and none is visible"):
        main(["--op", "argmax"])
