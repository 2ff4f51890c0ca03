"""`minidsv bench` without a GPU: options, the decoding loop, the table, variants that differ."""

import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from builders import prompt
from minidsv import LLM, SamplingParams, bench_decode, bench_table
from minidsv.batch import StepBatch
from minidsv.bench_decode import (
    CountedMoE,
    Stepper,
    decode,
    distinct_experts,
    eager,
    first_difference,
    stepper,
)  # fmt: skip
from minidsv.bench_options import BenchOptions
from minidsv.bench_rig import WARMUP, Rig, fill_cache, settle_variants
from minidsv.bench_table import TokensDiffer, cells, floor_us, layer_counts, measure_rows
from minidsv.bench_timing import read_bandwidth, times_us
from minidsv.bench_wall import WallRow, replay_us
from minidsv.bench_wall import line as wall_line
from minidsv.cli import main
from minidsv.config import ModelConfig
from minidsv.engine_config import EngineConfig, bundled_model
from minidsv.errors import ConfigError
from minidsv.graph import DecodeGraphs, GraphKey
from minidsv.kernels.constants import PAGE_SIZE
from minidsv.kernels.index_cache import read_index_k_buffer
from minidsv.kernels.router import grouped_topk
from minidsv.kernels.set_mla_kv_buffer import read_mla_kv_buffer
from minidsv.kv_cache import KVCache
from minidsv.resolve import settle
from minidsv.roofline import decode_cost, memory_seconds
from minidsv.roofline import distinct_experts as expected_experts

CPU = torch.device("cpu")
REPLAYS = 6
STEPS = WARMUP + REPLAYS


def build(folder: Path | None, batch: str = "3", context: str = "60", **options: Any) -> Rig:
    engine = EngineConfig(
        model=None if folder is None else str(folder), device="cpu", max_model_len=512
    )
    return Rig.build(engine, BenchOptions(batch=batch, context=context, replays=REPLAYS, **options))


@pytest.fixture(scope="module", params=["dsv32", "glm"])
def rig(request: pytest.FixtureRequest, checkpoints: dict[str, Path]) -> Rig:
    return build(checkpoints[request.param])


def run_bench(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str
) -> tuple[int, str, str]:
    """(exit code, standard output, standard error) of `minidsv bench ARGUMENTS`."""
    monkeypatch.setattr(sys, "argv", ["minidsv", "bench", *arguments])
    with pytest.raises(SystemExit) as end:
        main()
    return int(end.value.code or 0), *capsys.readouterr()


TINY = ("--load-format", "random", "--device", "cpu", "--max-model-len", "512", "--replays", "2")


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
    assert result["tokens_differ"] is None
    rows = result["rows"]
    assert [(r["batch"], r["context"]) for r in rows] == [(1, 40), (1, 100), (2, 40), (2, 100)]
    for row, printed in zip(rows, lines[2:], strict=False):
        assert row["tokens_per_s"] == pytest.approx(1e6 * row["batch"] / row["us"])
        assert row["mbu"] == pytest.approx(row["floor_us"] / row["us"])
        assert 0 < row["floor_us_layer"] < row["floor_us"]
        assert printed.split()[:3] == [str(row["batch"]), str(row["context"]), "eager"]
    assert rows[0]["distinct_experts"] == 2 < rows[2]["distinct_experts"] <= 4


def test_decoding_is_generation(rig: Rig) -> None:
    """On real rows the loop's tokens are those of the engine, across the end of a page."""
    context, folder = 60, rig.config.model
    ids = [prompt(context, seed) for seed in range(3)]
    step = rig.first_step(3, context)
    for row, tokens in enumerate(ids):
        write_prompt(rig, step, row, tokens[:-1])
    step.input_ids.copy_(torch.tensor([tokens[-1] for tokens in ids]))
    model = rig.build_model("eager", rig.model.num_hidden_layers)
    got = decode(Stepper(lambda: eager(model, step), step), 3, STEPS)
    assert len(got.us) == REPLAYS
    assert all(us > 0 for us in got.us)
    llm = LLM(folder, device="cpu", num_pages=9)
    wanted = llm.generate(ids, SamplingParams(max_tokens=STEPS, ignore_eos=True))
    assert got.tokens.T.tolist() == [output.outputs[0].token_ids for output in wanted]
    assert step.positions.tolist() == [context - 1 + STEPS] * 3


def write_prompt(rig: Rig, step: StepBatch, row: int, tokens: tuple[int, ...]) -> None:
    """Compute `tokens` as the first of request `row`."""
    positions = torch.arange(len(tokens))
    table = step.block_table[row : row + 1]
    prefill = StepBatch(
        input_ids=torch.tensor(tokens),
        positions=positions,
        slot_mapping=table[0, positions // PAGE_SIZE] * PAGE_SIZE + positions % PAGE_SIZE,
        seq_lens=positions + 1,
        request_index=torch.zeros_like(positions),
        block_table=table,
        logits_index=positions[-1:],
        max_seq_len=len(tokens),
    )
    rig.build_model("eager", rig.model.num_hidden_layers).forward(prefill)


def test_first_steps_are_distinct_and_repeatable(rig: Rig) -> None:
    first, again = rig.first_step(3, 60), rig.first_step(3, 60)
    assert len(set(first.input_ids.tolist())) == 3
    pages = first.block_table[:, : -(-(60 + STEPS) // PAGE_SIZE)]
    assert len(pages.unique()) == pages.numel()
    assert rig.dummy_page not in pages
    for name, value in vars(first).items():
        if isinstance(value, Tensor):
            assert torch.equal(value, getattr(again, name)), name
    runs = [decode(stepper(rig, "eager", 2, 3, 60), 3, STEPS).tokens for _ in range(2)]
    assert torch.equal(*runs)
    assert len(runs[0].unique()) > 3


def test_distinct_experts_are_counted(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many as the model's own router names, and counting changes nothing."""
    chosen = []

    def record(*args: Any, **named: Any) -> tuple[Tensor, Tensor]:
        weights, ids = grouped_topk(*args, **named)
        chosen.append(ids)
        return weights, ids

    layers = rig.model.num_hidden_layers
    plain, counted = (rig.build_model("eager", layers) for _ in range(2))
    monkeypatch.setattr("minidsv.moe.grouped_topk", record)
    want = eager(plain, rig.first_step(3, 60))
    mean = sum(len(ids[:2].unique()) for ids in chosen) / len(chosen)
    assert distinct_experts(counted, rig.first_step(3, 60), 2, steps=1) == mean
    assert sum(isinstance(layer.mlp, CountedMoE) for layer in counted.layers) == len(chosen) // 2
    assert torch.equal(eager(counted, rig.first_step(3, 60)), want)


def test_without_experts(rig: Rig) -> None:
    assert distinct_experts(rig.build_model("eager", 1), rig.first_step(3, 60), 3) is None


@pytest.mark.parametrize("kv", ["float32", "bfloat16", "fp8", "fp8_flat"])
@pytest.mark.parametrize("index", ["bfloat16", "fp8"])
def test_every_slot_is_filled(kv: str, index: str, checkpoints: dict[str, Path]) -> None:
    config = ModelConfig.from_path(checkpoints["glm"])
    cache = KVCache.allocate(config, 3, kv, index, CPU)
    for buffer in (*cache.latent, *cache.index):
        if buffer is not None:
            buffer.view(torch.uint8).fill_(255)  # NaN in every dtype
    fill_cache(config, cache, torch.Generator().manual_seed(0))
    slots, pages = torch.arange(3 * PAGE_SIZE), torch.arange(3)
    rows = [read_mla_kv_buffer(t, slots, config.kv_lora_rank) for t in cache.latent]
    rows += [
        read_index_k_buffer(t, pages, config.index_head_dim) for t in cache.index if t is not None
    ]
    for number, values in enumerate(rows):
        assert values.isfinite().all()
        assert values.std() == pytest.approx(1, abs=0.05)
        assert all(values.shape != v.shape or not v.equal(values) for v in rows[:number])


@pytest.fixture
def graphs_on_cpu(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """DecodeGraphs whose "graphs" compute at each replay into the outputs of the capture."""
    captured = []

    def capture(self: DecodeGraphs) -> None:
        for size in self.buckets:
            for bound in self.bounds:
                key = self.key(replace(self.buffers.batch(size, bound)))
                outputs = tuple(t.clone() for t in self._compute(key))
                self._outputs[key] = outputs

                def replay(key: Any = key, outputs: Any = outputs) -> None:
                    for mine, new in zip(outputs, self._compute(key), strict=True):
                        mine.copy_(new)

                self.graphs[key] = SimpleNamespace(replay=replay)
                captured.append(key)

    def replay_step(self: DecodeGraphs, step: StepBatch) -> tuple[Tensor, Tensor]:
        key = self._fill(step)
        self.graphs[key].replay()
        return self._outputs[key]

    monkeypatch.setattr(DecodeGraphs, "capture", capture)
    monkeypatch.setattr(DecodeGraphs, "replay", replay_step)
    return captured


def test_replays_are_the_eager_steps(rig: Rig, graphs_on_cpu: list[Any]) -> None:
    variants = ("eager", "graph", "graph+prefetch")
    both = replace(rig, variants=variants)
    rows = list(measure_rows(both, 3, 60, layer_counts(rig, None), 1e9))
    assert [row.variant for row in rows] == list(variants)
    assert [tuple(key) for key in graphs_on_cpu] == [(3, 1, 512)] * 4  # two counts, two variants
    assert all(len(cells(row)) == len(bench_table.HEADINGS) for row in rows)


def test_a_variant_that_differs_is_named(
    rig: Rig, graphs_on_cpu: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A replay that goes wrong once, late: for the second request in its tenth step."""
    original, replays = bench_decode.stepper, []

    def broken(rig: Rig, variant: str, *rest: Any) -> Stepper:
        run, step = original(rig, variant, *rest)

        def run_wrongly() -> Tensor:
            ids = run().clone()
            replays.append(variant)
            if replays.count("graph+pdl") == 10:
                ids[1] += 1
            return ids

        return Stepper(run_wrongly, step)

    monkeypatch.setattr(bench_table, "stepper", broken)
    rows = measure_rows(replace(rig, variants=("eager", "graph", "graph+pdl")), 3, 60, (2,), 1e9)
    assert [next(rows).variant, next(rows).variant] == ["eager", "graph"]
    with pytest.raises(TokensDiffer) as raised:
        next(rows)
    assert "graph+pdl and eager at batch 3, context 60, 2 layers: step 9, request 1" in str(
        raised.value
    )


def test_the_command_fails_if_tokens_differ(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def differ(*_: Any) -> Iterator[Any]:
        raise TokensDiffer("tokens differ: planted")
        yield

    monkeypatch.setattr(bench_table, "measure_rows", differ)
    code, out, err = run_bench(monkeypatch, capsys, *TINY, "--batch", "1", "--context", "9")
    assert code == 1
    assert err == "error: tokens differ: planted\n"
    assert json.loads(out.splitlines()[-1])["tokens_differ"] == "tokens differ: planted"


def test_first_difference() -> None:
    one = torch.arange(12).view(4, 3)
    assert first_difference(one, one.clone()) is None
    other = one.clone()
    other[2, 1], other[3, 0] = 99, 98
    assert first_difference(one, other) == "step 2, request 1: 7 and 99"


def test_floor(rig: Rig) -> None:
    """Bytes over bandwidth; more experts cost as much as they weigh."""
    layers, c = rig.model.num_hidden_layers, rig.model
    few, more = (floor_us(rig, layers, 3, 60, experts, 2e9) for experts in (4.0, 6.5))
    weight = 3 * c.hidden_size * c.moe_intermediate_size * 2
    moe_layers = layers - c.first_k_dense_replace
    assert more - few == pytest.approx(2.5 * moe_layers * weight / 2e9 * 1e6)
    kinds = {"fp8_weights": False, "kv_cache_dtype": "float32", "index_cache_dtype": "float32"}
    uniform = decode_cost(c, batch=3, context=60, **kinds)
    assert uniform == decode_cost(c, batch=3, context=60, experts=expected_experts(c, 3), **kinds)
    total = memory_seconds(uniform, 2e9) * 1e6
    assert floor_us(rig, layers, 3, 60, expected_experts(c, 3), 2e9) == pytest.approx(total)


@pytest.mark.parametrize(("given", "counts"), [(None, (2, 3)), ((1, 3), (1, 3)), ((2, 3), (2, 3))])
def test_layer_counts(
    given: tuple[int, int] | None, counts: tuple[int, int], checkpoints: dict[str, Path]
) -> None:
    rig = SimpleNamespace(model=ModelConfig.from_path(checkpoints["dsv32"]))
    assert layer_counts(rig, given) == counts


def test_layer_counts_that_cannot_be(checkpoints: dict[str, Path]) -> None:
    model = ModelConfig.from_path(checkpoints["dsv32"])
    assert layer_counts(SimpleNamespace(model=replace(model, num_hidden_layers=2)), None) == (2,)
    with pytest.raises(ConfigError, match="layers"):
        layer_counts(SimpleNamespace(model=model), (1, 4))
    with pytest.raises(ConfigError, match="dense"):
        layer_counts(SimpleNamespace(model=replace(model, first_k_dense_replace=2)), (1, 3))


ALL = ("eager", "graph", "graph+seed", "graph+pdl", "graph+prefetch")


@pytest.mark.parametrize(
    ("capability", "backend", "subject", "variants"),
    [
        ((9, 0), "triton", {}, ALL),
        ((8, 0), "triton", {}, ALL[:2]),
        ((9, 0), "torch", {}, ALL[:1]),
        ((9, 0), "triton", {"graph": True}, ALL[-1:]),
        ((8, 0), "triton", {"graph": True}, ("graph",)),
        ((9, 0), "triton", {"profile": True}, ("graph",)),
        ((9, 0), "torch", {"profile": True}, ("eager",)),
        ((9, 0), "triton", {"variants": "graph+pdl,eager"}, ("eager", "graph+pdl")),
        ((8, 0), "triton", {"variants": "graph+pdl"}, "capability 9.0, and cuda:0 has 8.0"),
        ((9, 0), "torch", {"variants": "graph"}, "backend is 'torch'"),
        ((9, 0), "torch", {"graph": True}, "graph: needs our kernels"),
        ((9, 0), "triton", {"graph": True, "variants": "eager"}, "accepted here: ('graph',"),
    ],
)
def test_variants(
    capability: tuple[int, int],
    backend: str,
    subject: dict[str, Any],
    variants: tuple[str, ...] | str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    config = EngineConfig(device="cuda:0", backend=backend, quantization="none")
    config = settle(config, ModelConfig.from_path(bundled_model()), capability)
    options = BenchOptions(**subject)
    if isinstance(variants, tuple):
        assert settle_variants(config, options) == variants
        return
    with pytest.raises(ConfigError) as raised:
        settle_variants(config, options)
    assert variants in str(raised.value)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--batch", "1,,2"], "batch: '1,,2'"),
        (["--batch", "0"], "batch: '0'"),
        (["--context", "4k"], "context: '4k'"),
        (["--context", "510"], "context: 510 and the 10 tokens"),
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


def test_caches_that_do_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(KVCache, "allocate", full)
    with pytest.raises(ConfigError, match=r"batch, context: .* GB"):
        build(None)


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
