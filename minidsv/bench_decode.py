"""Decoding for time: a variant's steps, each feeding back its argmax, and which experts they use.

The position advances as in a generation, so that contexts, slots and routing are a request's; over
`replays` steps the context grows by as many tokens. What advances the requests runs between the
timed steps, on the device.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from minidsv.batch import StepBatch, StepBuffers
from minidsv.bench_rig import WARMUP, Rig, place_rows
from minidsv.bench_timing import times_us
from minidsv.block_manager import pages_for
from minidsv.graph import DecodeGraphs
from minidsv.model import DeepseekV32
from minidsv.moe import MoE

ROUTED_STEPS = 8  # steps over which distinct experts are counted


class Stepper(NamedTuple):
    """A variant at a batch and context: what computes its step, and the step to feed back into."""

    run: Callable[[], tuple[Tensor, Tensor]]  # returns the rows' argmax ids and logits
    step: StepBatch


@dataclass(frozen=True)
class Decoded:
    """The timed steps of one variant."""

    us: list[float]  # of each step behind the warm-up
    tokens: Tensor  # int64 [steps, batch], the warm-up's too
    logits: Tensor  # fp32 [batch, vocab] of the last step


def decode(stepper: Stepper, batch: int, steps: int) -> Decoded:
    """Decode `steps` tokens of each of `batch` requests, the step's first rows."""
    step, device = stepper.step, stepper.step.input_ids.device
    tokens = torch.empty(steps, batch, dtype=torch.int64, device=device)
    last: tuple[Tensor, Tensor] | None = None
    rows = iter(tokens)

    def compute() -> None:
        nonlocal last
        last = stepper.run()

    def feed_back() -> None:
        assert last is not None
        ids = next(rows)
        ids.copy_(last[0][:batch])
        advance(step, ids)

    us = times_us(compute, feed_back, steps, device)
    assert last is not None, f"{steps} steps"
    return Decoded(us[WARMUP:], tokens, last[1][:batch].clone())


def advance(step: StepBatch, ids: Tensor) -> None:
    """Make `step`, in place, the one after it: `ids` [n] for its first n rows."""
    rows = slice(len(ids))
    step.input_ids[rows] = ids
    step.positions[rows] += 1
    step.seq_lens[rows] += 1
    place_rows(step)


def start(rig: Rig, variant: str, layers: int, batch: int, context: int) -> Stepper:
    """At the first step, which is the same for every variant."""
    model, step = rig.build_model(variant, layers), rig.first_step(batch, context)
    if model.pdl is not None:
        from minidsv.kernels.launch import compiling_only  # imports triton

        with compiling_only():
            model.greedy(step)
    if variant == "eager":
        return Stepper(lambda: model.greedy(step), step)
    graphs = capture(rig, model, batch, context)
    outputs = graphs.replay(step)  # which is where every replay leaves its own
    graphs.buffers.fill(step, batch)
    (key,) = graphs.graphs

    def replay() -> tuple[Tensor, Tensor]:
        graphs.graphs[key].replay()  # `graphs` keeps the model, whose tensors the graph reads
        return outputs

    return Stepper(replay, graphs.buffers.batch(batch, key.max_seq_len))


def capture(
    rig: Rig, model: DeepseekV32, batch: int, context: int, keep_graph: bool = False
) -> DecodeGraphs:
    """The engine's graph of one size and path."""
    assert rig.config.max_model_len is not None
    pages = pages_for(rig.config.max_model_len)
    buffers = StepBuffers(batch, pages, rig.dummy_page, rig.device)
    graphs = DecodeGraphs(model, buffers, (rig.bound(context),), batch, keep_graph)
    graphs.buckets = (batch,)
    graphs.capture()
    return graphs


def first_difference(want: Decoded, got: Decoded) -> str | None:
    """Where two runs part, in words: in a token, or in any bit of the last logits."""
    places = (want.tokens != got.tokens).nonzero()
    if len(places):
        step, request = places[0].tolist()
        tokens = int(want.tokens[step, request]), int(got.tokens[step, request])
        return f"step {step}, request {request}: tokens {tokens[0]} and {tokens[1]}"
    places = (want.logits.view(torch.int32) != got.logits.view(torch.int32)).nonzero()
    if len(places):
        request, token = places[0].tolist()
        logits = float(want.logits[request, token]), float(got.logits[request, token])
        return f"last step, request {request}, token {token}: logits {logits[0]} and {logits[1]}"
    return None


class CountedMoE(MoE):
    """A layer's experts that also count, in `distinct`, how many of them the requests choose."""

    def __init__(self, moe: MoE, batch: int, distinct: list[int]):
        vars(self).update(vars(moe))
        self.batch, self.distinct = batch, distinct

    def choose(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        weights, ids = super().choose(logits)
        self.distinct.append(len(ids[: self.batch].unique()))
        return weights, ids


def distinct_experts(
    model: DeepseekV32, step: StepBatch, batch: int, steps: int = ROUTED_STEPS
) -> float | None:
    """Experts that a step uses in a layer with experts: the mean over `steps` steps and the layers.

    `model` is used up: its layers keep noting. None: no layer has experts.
    """
    distinct: list[int] = []
    for layer in model.layers:
        if isinstance(layer.mlp, MoE):
            layer.mlp = CountedMoE(layer.mlp, batch, distinct)
    for _ in range(steps):
        advance(step, model.greedy(step)[0][:batch])
    return sum(distinct) / len(distinct) if distinct else None


def count_launches(model: DeepseekV32, step: StepBatch) -> int:
    """Launches of our kernels in a step."""
    if model.pdl is None:
        return 0
    from minidsv.kernels.launch import observed_launches

    launches: list[object] = []
    with observed_launches(lambda launch, _: launches.append(launch)):
        model.greedy(step)
    return len(launches)
