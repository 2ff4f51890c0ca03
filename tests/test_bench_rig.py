"""What the measurements of a run share: filled caches, first steps, variants."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from minidsv.bench_decode import (
    decode,
    start,
)  # fmt: skip
from minidsv.bench_options import BenchOptions
from minidsv.bench_rig import Rig, fill_cache
from minidsv.bench_variants import settle_variants
from minidsv.config import ModelConfig
from minidsv.engine_config import EngineConfig, bundled_model
from minidsv.errors import ConfigError
from minidsv.kernels.constants import PAGE_SIZE
from minidsv.kernels.index_cache import read_index_k_buffer
from minidsv.kernels.set_mla_kv_buffer import read_mla_kv_buffer
from minidsv.kv_cache import KVCache
from minidsv.resolve import settle
from rigs import CPU, STEPS, build


def test_first_steps_are_distinct_and_repeatable(rig: Rig) -> None:
    first, again = rig.first_step(3, 60), rig.first_step(3, 60)
    assert len(set(first.input_ids.tolist())) == 3
    pages = first.block_table[:, : -(-(60 + STEPS) // PAGE_SIZE)]
    assert len(pages.unique()) == pages.numel()
    assert rig.dummy_page not in pages
    for name, value in vars(first).items():
        if isinstance(value, Tensor):
            assert torch.equal(value, getattr(again, name)), name
    runs = [decode(start(rig, "eager", 2, 3, 60), 3, STEPS).tokens for _ in range(2)]
    assert torch.equal(*runs)
    assert len(runs[0].unique()) > 3


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


def test_caches_that_do_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(KVCache, "allocate", full)
    with pytest.raises(ConfigError, match=r"batch, context: .* GB"):
        build(None)


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


def test_contexts() -> None:
    """Without any given, of graphs one a path of the engine's."""
    assert BenchOptions().contexts == (4096, 65536)
    assert BenchOptions(wall=True, context="7").contexts == (7,)
    assert BenchOptions(graph=True).contexts == ()
    assert BenchOptions(graph=True, context="7,8").contexts == (7, 8)


def test_a_graph_needs_no_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    """But for the dummy; its path is the first that holds the context."""
    monkeypatch.setattr("minidsv.bench_variants._missing", lambda config, variant: None)
    options = BenchOptions(graph=True, batch="64")
    rig = Rig.build(EngineConfig(device="cpu", max_model_len=512), options)
    assert (len(rig.cache.latent[0]), rig.dummy_page, rig.steps) == (PAGE_SIZE, 0, 0)
    topk = rig.model.index_topk
    assert rig.bounds == (topk, 512)
    assert [rig.bound(context) for context in (1, topk, topk + 1, 512)] == [topk, topk, 512, 512]
