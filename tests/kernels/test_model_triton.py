"""The whole forward pass on the Triton kernels, in the interpreter, in fp32: every operator's
wiring, both families, prefill and decode, on both sides of index_topk."""

from pathlib import Path

import pytest
import torch

from builders import hf_model, save, use_rms_norm_eps_for_latents
from compare import relative_l2
from minidsv.batch import StepBatch
from minidsv.bench_bytes import LaunchBytes
from minidsv.checkpoint import load_checkpoint
from minidsv.config import ModelConfig
from minidsv.kernels.constants import PAGE_SIZE
from minidsv.kernels.pdl import PdlMode, is_interpreted
from minidsv.kv_cache import KVCache
from minidsv.layers import Operators
from minidsv.model import DeepseekV32

DIMS = {
    "vocab_size": 96, "hidden_size": 64, "intermediate_size": 64, "moe_intermediate_size": 32,
    "num_attention_heads": 2, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1,
    "topk_group": 1, "q_lora_rank": 32, "index_n_heads": 16, "index_topk": 4,
    "num_hidden_layers": 2, "qk_nope_head_dim": 32, "v_head_dim": 32,
}  # fmt: skip
CPU = torch.device("cpu")


def checkpoint(family: str, folder: Path) -> Path:
    model = hf_model(family, **DIMS)
    if family == "glm":
        use_rms_norm_eps_for_latents(model)
    return save(model, folder)


def step(first: list[int], second: list[int], start: int) -> StepBatch:
    """Tokens of two requests from position `start` on, which live in pages 2 and 0."""
    positions = torch.tensor([start + i for ids in (first, second) for i in range(len(ids))])
    requests = torch.tensor([0] * len(first) + [1] * len(second))
    table = torch.tensor([[2], [0]])
    slots = table[requests, 0] * PAGE_SIZE + positions
    rows = torch.arange(len(positions))
    ids = torch.tensor(first + second)
    longest = start + max(len(first), len(second))
    return StepBatch(ids, positions, slots, positions + 1, requests, table, rows, longest)


def logits(folder: Path, quantization: str, pdl: PdlMode | None) -> torch.Tensor:
    """A short prefill that scores nothing, one that does, a decode step; NaN in unwritten slots."""
    config = ModelConfig.from_path(folder)
    weights = load_checkpoint(
        folder, config, device=CPU, dtype=torch.float32, quantization=quantization
    )
    cache = KVCache.allocate(config, 3, "float32", "float32", CPU)
    for buffer in (*cache.latent, *cache.index):
        if buffer is not None:
            buffer.fill_(float("nan"))
    model = DeepseekV32(config, weights, cache, Operators(pdl))
    steps = (step([5, 9, 14], [7, 8, 2], 0), step([4, 3], [1, 6], 3), step([11], [10], 5))
    return torch.cat([model.forward(s)[1] for s in steps])


@pytest.mark.skipif(not is_interpreted(), reason="runs in the interpreter")
@pytest.mark.parametrize(("family", "quantization"), [("dsv32", "none"), ("glm", "fp8")])
def test_forward(family: str, quantization: str, tmp_path: Path) -> None:
    folder = checkpoint(family, tmp_path / family)
    want = logits(folder, quantization, None)
    got = logits(folder, quantization, "off")
    assert relative_l2(got, want) < 5e-6
    assert torch.equal(got.argmax(-1), want.argmax(-1))


@pytest.mark.skipif(not is_interpreted(), reason="runs in the interpreter")
def test_bytes_of_a_step(tmp_path: Path) -> None:
    """Every weight is charged to a kernel, once, and every cache row that is read or written."""
    from minidsv.kernels.launch import observed_launches

    folder = checkpoint("dsv32", tmp_path / "dsv32")
    config = ModelConfig.from_path(folder)
    weights = load_checkpoint(folder, config, device=CPU, dtype=torch.float32, quantization="fp8")
    cache = KVCache.allocate(config, 3, "float32", "float32", CPU)
    for buffer in (*cache.latent, *cache.index):
        if buffer is not None:
            buffer.zero_()
    model, context, chosen = DeepseekV32(config, weights, cache, Operators("off")), 7, 2
    observer = LaunchBytes(config, weights, cache, batch=2, context=context, experts=chosen)
    with observed_launches(observer):
        model.forward(step([11], [10], context - 1))
    want = 2 * sum(
        4 * config.latent_dim * (1 + config.index_topk)
        + 4 * config.index_head_dim * (1 + context) * config.has_indexer(layer)
        for layer in range(config.num_hidden_layers)
    )
    for name, weight in weights.items():
        share = chosen / config.n_routed_experts if ".experts." in name else 1.0
        want += weight.nbytes * (2 / config.vocab_size if name == "embed_tokens" else share)
    assert sum(observer.by_kernel.values()) == pytest.approx(want, rel=1e-6)
