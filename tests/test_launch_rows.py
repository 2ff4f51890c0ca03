"""Every binary that a forward pass launches is a row that the checker proves.

No GPU: the models run on the meta device, which has shapes, strides and no data; Triton's own
binder says what it would compile for the arguments of each launch.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

from minidsv.batch import StepBatch, StepBuffers
from minidsv.block_manager import pages_for
from minidsv.checkpoint import Weight, WeightStore
from minidsv.config import ModelConfig
from minidsv.engine_config import bundled_model
from minidsv.graph import DecodeGraphs, GraphKey, batch_sizes, context_bounds
from minidsv.kernels import pdl
from minidsv.kernels.argmax import argmax
from minidsv.kernels.launch import KernelSpec, Row
from minidsv.kernels.norm import PreNorm
from minidsv.kernels.pdl import PdlMode
from minidsv.kernels.quant import Activations
from minidsv.kernels.ran import nearest, row_of
from minidsv.kernels.specs import SPECS
from minidsv.kv_cache import KVCache
from minidsv.layers import LayerWeights, Operators
from minidsv.model import DeepseekV32
from minidsv.moe import MoE
from minidsv.tensor_table import tensor_table
from minidsv.warmup import warm_up_steps

META = torch.device("meta")
BOUNDS = (2048, 8192, 65_792)
CONFIGS = bundled_model().parent
MODELS = {
    "bundled": "tiny/config.json",
    "mini": "mini.json",
    "deepseek_v32": "deepseek_v32.json",
    "a shard of 8": "v32_tp8_shard.json",
    "glm5": "glm5.json",
    "glm52": "glm52.json",
}


def model_config(name: str, layers: int = 2) -> ModelConfig:
    """A dense layer and some with experts, of which in GLM-5.2 the first 3 own no indexer."""
    config = ModelConfig.from_path(CONFIGS / MODELS[name])
    types = ("full", *config.indexer_types[3:])
    return replace(
        config,
        num_hidden_layers=layers,
        first_k_dense_replace=1,
        indexer_types=types[:layers],
    )


def meta_weights(config: ModelConfig, fp8: bool) -> dict[str, Weight]:
    store = WeightStore(META, torch.bfloat16, "auto")
    for spec in tensor_table(config).values():
        if spec.param not in store.weights:
            store._allocate(spec, fp8 and spec.stays_fp8)
    return store.weights


def meta_step(tokens: int, requests: int, seq_len: int, logits: int) -> StepBatch:
    def of(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.int64, device=META)

    rows = [of(tokens) for _ in range(5)]
    return StepBatch(*rows, of(requests, -(-seq_len // 64)), of(logits), seq_len)


def steps() -> Iterator[StepBatch]:
    """Decode batches and prefill chunks, of contexts on both sides of every index_topk."""
    for seq_len in (1, 70, 5000, 70_000):
        for requests in (1, 2, 3, 8, 16, 17, 33, 64, 200):
            yield meta_step(requests, requests, seq_len, requests)
        for tokens in (16, 70, 1000, 8192):
            yield meta_step(tokens, 1, max(seq_len, tokens), 1)
            yield meta_step(tokens, 2, max(seq_len, tokens), tokens)
    for seq_len in (131_072, 1_048_576):
        yield meta_step(1, 1, seq_len, 1)
        yield meta_step(9, 9, seq_len, 9)


def decode_graph(model: DeepseekV32) -> DecodeGraphs:
    buffers = StepBuffers(200, pages_for(BOUNDS[-1]), 199, META)
    return DecodeGraphs(model, buffers, BOUNDS, 200)


class Launches:
    """Stands in for `KernelSpec.launch`: notes what Triton would compile, once each."""

    def __init__(self) -> None:
        self.rows: list[tuple[KernelSpec, Row]] = []
        self.names: list[str] = []  # of all launches
        self._seen: set[str] = set()
        self._backend = make_backend(GPUTarget("cuda", 90, 32))
        self._binders: dict[str, Any] = {}

    def add(
        self,
        spec: KernelSpec,
        grid: tuple[int, ...],
        mode: PdlMode,
        args: dict[str, Any],
        num_warps: int = 4,
        num_stages: int = 3,
    ) -> None:
        kernel, options = spec.kernel, spec.compile_options(num_warps, num_stages, mode)
        if spec.name not in self._binders:
            self._binders[spec.name] = create_function_from_signature(
                kernel.signature, kernel.params, self._backend
            )
        bound, specialization, rest = self._binders[spec.name](**args, PDL=mode, **options)
        key = f"{id(spec)} {specialization} {rest}"
        if 0 not in grid:
            self.names.append(spec.name)
        if 0 in grid or key in self._seen:
            return
        self._seen.add(key)
        _, *source = kernel._pack_args(self._backend, rest, bound, specialization, rest)
        self.rows.append((spec, row_of(ASTSource(kernel, *source), num_warps, num_stages)))


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Launches:
    """What is launched meanwhile; none of it runs."""
    launches = Launches()
    monkeypatch.setattr(KernelSpec, "launch", lambda *args, **named: launches.add(*args, **named))
    monkeypatch.setattr(pdl, "is_interpreted", lambda: True)  # kernels for tensors not on CUDA
    return launches


@pytest.mark.parametrize("weights", ["fp8", "bf16"])
@pytest.mark.parametrize("name", MODELS)
def test_every_launch_is_a_row(name: str, weights: str, launches: Launches) -> None:
    config = model_config(name)
    parameters = meta_weights(config, weights == "fp8")
    variants: tuple[tuple[str, str, Activations], ...] = (
        ("bfloat16", "bfloat16", "none"), ("fp8", "fp8", "fp8"), ("fp8_flat", "fp8", "fp8_ue8m0"),
        ("bfloat16", "fp8", "none"), ("fp8", "bfloat16", "none"),
    )  # fmt: skip
    for *caches, activations in variants:
        cache = KVCache.allocate(config, 200, *caches, META)
        model = DeepseekV32(config, parameters, cache, Operators("off", activations=activations))
        for step in steps():
            argmax(model.forward(step)[1], "off")
        for size in batch_sizes(200):
            for bound in BOUNDS:
                decode_graph(model)._compute(GraphKey(size, 1, bound))
    assert len({spec.name for spec, _ in launches.rows}) > 10
    assert {spec.name for spec, _ in launches.rows} <= {spec.name for spec in SPECS}
    missing = [nearest(spec, row) for spec, row in launches.rows if row not in spec.rows]
    assert not missing, "\n".join(missing)


@pytest.mark.parametrize(
    ("name", "kinds", "activations"),
    [("bundled", 2, "fp8"), ("deepseek_v32", 2, "none"), ("glm52", 3, "fp8_ue8m0")],
)
def test_nothing_compiles_in_a_request(
    name: str, kinds: int, activations: Activations, launches: Launches
) -> None:
    """All that any step launches was launched by the warm-up, whatever its sizes."""
    config = model_config(name, layers=5 if kinds == 3 else 3)
    cache = KVCache.allocate(config, 200, "fp8", "fp8", META)
    operators = Operators("off", activations=activations)
    model = DeepseekV32(config, meta_weights(config, True), cache, operators)
    bounds, short = context_bounds(config.index_topk, 70_016), model.abridged()
    assert len(short.layers) == kinds
    for step in warm_up_steps(bounds, 200, 8192, 199, META):
        argmax(short.forward(step)[1], "off")
    warm = {f"{spec.name} {row}" for spec, row in launches.rows}
    for step in steps():
        if step.max_seq_len <= bounds[-1]:
            argmax(model.forward(step)[1], "off")
    cold = {f"{spec.name} {row}" for spec, row in launches.rows} - warm
    assert not cold, "\n".join(sorted(cold))


@pytest.mark.parametrize("cache", ["bfloat16", "fp8"])
@pytest.mark.parametrize(("tokens", "scored", "dense"), [(1, 8, 6), (8, 12, 10), (64, 12, 10)])
def test_launches_of_an_attention(
    tokens: int, scored: int, dense: int, cache: str, launches: Launches
) -> None:
    """Of a decode step: beyond one token the norms take launches of their own, and so do sums that
    programs share."""
    for name, shared in (("deepseek_v32", False), ("glm52", True)):
        config = model_config(name)
        caches = KVCache.allocate(config, 200, cache, cache, META)
        model = DeepseekV32(config, meta_weights(config, True), caches, Operators("off"))
        attention = model.layers[1].attention
        assert (attention.indexer is None) is shared
        hidden = torch.empty(tokens, config.hidden_size, dtype=torch.bfloat16, device=META)
        x = PreNorm(hidden, hidden, model.layers[1].input_gain, 1e-6)
        for seq_len, count in (
            (2048, dense),
            *((n, dense if shared else scored) for n in BOUNDS[1:]),
        ):
            step = meta_step(tokens, tokens, seq_len, tokens)
            slots = torch.empty(tokens, 2048, dtype=torch.int64, device=META)
            rope = model.rope.at(step.positions)
            launches.names.clear()
            attention(x, step, rope, slots, slots if seq_len == 2048 else None)
            summed = tokens == 64 and shared  # half the heads: the slots of 64 tokens are split too
            assert len(launches.names) == count + summed, launches.names


ROUTER_OF_MANY = ["add_rms_norm_kernel", "narrow_kernel", "sum_parts_kernel"]
EXPERTS_OF_ONE = ["grouped_topk_kernel", "lone_gate_up_kernel", "lone_down_kernel"]
EXPERTS_OF_MANY = [
    "grouped_topk_kernel", "prepare_kernel", "gate_up_kernel", "down_kernel", "combine_kernel",
]  # fmt: skip
EXPERTS_IN_FP8 = [
    "grouped_topk_kernel", "prepare_kernel", "quantize_groups_kernel", "gate_up_fp8_kernel",
    "down_fp8_kernel", "combine_kernel",
]  # fmt: skip


@pytest.mark.parametrize("weights", ["fp8", "bf16"])
@pytest.mark.parametrize(
    ("tokens", "names", "activations"),
    [
        (1, ["norm_router_gemv_kernel", *EXPERTS_OF_ONE], "none"),
        (8, [*ROUTER_OF_MANY, *EXPERTS_OF_MANY], "none"),
        (64, ["add_rms_norm_kernel", "wide_kernel", "sum_parts_kernel", *EXPERTS_OF_MANY], "none"),
        (255, ["add_rms_norm_kernel", "wide_kernel", *EXPERTS_OF_MANY], "fp8"),
        (256, ["add_rms_norm_kernel", "wide_kernel", *EXPERTS_IN_FP8], "fp8"),
    ],
)
def test_launches_of_a_moe_block(
    tokens: int, names: list[str], activations: Activations, weights: str, launches: Launches
) -> None:
    """A lone token's norm is the router's; it needs no plan and no sum."""
    if weights == "bf16" and names[2:] == EXPERTS_IN_FP8:
        names = [*names[:2], *EXPERTS_OF_MANY]
    config = model_config("deepseek_v32")
    operators = Operators("off", activations=activations)
    block = MoE(config, LayerWeights(meta_weights(config, weights == "fp8"), 1), operators)
    x = torch.empty((2, tokens, config.hidden_size), dtype=torch.bfloat16, device=META)
    gain = torch.empty(config.hidden_size, device=META)
    out, residual = block(PreNorm(x[0], x[1], gain, 1e-6))
    assert out.shape == residual.shape == x[0].shape
    assert launches.names == names
