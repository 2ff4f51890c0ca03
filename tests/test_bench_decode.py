"""The decoding loop, the experts it counts, rows of the table, variants that differ."""

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
    Decoded,
    Stepper,
    decode,
    distinct_experts,
    first_difference,
)  # fmt: skip
from minidsv.bench_rig import Rig
from minidsv.bench_table import VariantsDiffer, cells, floor_us, layer_counts, measure_rows
from minidsv.config import ModelConfig
from minidsv.errors import ConfigError
from minidsv.graph import DecodeGraphs
from minidsv.kernels.constants import PAGE_SIZE
from minidsv.kernels.router import grouped_topk
from minidsv.roofline import decode_cost, memory_seconds
from minidsv.roofline import distinct_experts as expected_experts
from rigs import REPLAYS, STEPS


def test_decoding_is_generation(rig: Rig) -> None:
    """On real rows the loop's tokens are those of the engine, across the end of a page."""
    context, folder = 60, rig.config.model
    ids = [prompt(context, seed) for seed in range(3)]
    step = rig.first_step(3, context)
    for row, tokens in enumerate(ids):
        write_prompt(rig, step, row, tokens[:-1])
    step.input_ids.copy_(torch.tensor([tokens[-1] for tokens in ids]))
    model = rig.build_model("eager", rig.model.num_hidden_layers)
    got = decode(Stepper(lambda: model.greedy(step), step), 3, STEPS)
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
    want, _ = plain.greedy(rig.first_step(3, 60))
    mean = sum(len(ids[:2].unique()) for ids in chosen) / len(chosen)
    assert distinct_experts(counted, rig.first_step(3, 60), 2, steps=1) == mean
    assert sum(isinstance(layer.mlp, CountedMoE) for layer in counted.layers) == len(chosen) // 2
    assert torch.equal(counted.greedy(rig.first_step(3, 60))[0], want)


def test_without_experts(rig: Rig) -> None:
    assert distinct_experts(rig.build_model("eager", 1), rig.first_step(3, 60), 3) is None


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
    original, replays = bench_decode.start, []

    def broken(rig: Rig, variant: str, *rest: Any) -> Stepper:
        run, step = original(rig, variant, *rest)

        def run_wrongly() -> tuple[Tensor, Tensor]:
            ids, logits = run()
            replays.append(variant)
            if replays.count("graph+pdl") == 10:
                ids = ids + torch.tensor([0, 1, 0])
            return ids, logits

        return Stepper(run_wrongly, step)

    monkeypatch.setattr(bench_table, "start", broken)
    rows = measure_rows(replace(rig, variants=("eager", "graph", "graph+pdl")), 3, 60, (2,), 1e9)
    assert [next(rows).variant, next(rows).variant] == ["eager", "graph"]
    with pytest.raises(VariantsDiffer) as raised:
        next(rows)
    assert "graph+pdl and eager at batch 3, context 60, 2 layers: step 9, request 1" in str(
        raised.value
    )


def test_first_difference() -> None:
    tokens, logits = torch.arange(12).view(4, 3), torch.zeros(3, 5)
    one = Decoded([], tokens, logits)
    assert first_difference(one, Decoded([], tokens.clone(), logits.clone())) is None
    other = tokens.clone()
    other[2, 1], other[3, 0] = 99, 98
    assert first_difference(one, Decoded([], other, logits)) == (
        "step 2, request 1: tokens 7 and 99"
    )
    bits = logits.clone()
    bits[2, 4] = -0.0
    assert first_difference(one, Decoded([], tokens, bits)) == (
        "last step, request 2, token 4: logits 0.0 and -0.0"
    )


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
