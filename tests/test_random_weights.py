"""Random weights: the right size, in pieces, and in little more memory than they take."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from minidsv import random_weights
from minidsv.bench_decode import distinct_experts
from minidsv.bench_options import BenchOptions
from minidsv.bench_rig import Rig
from minidsv.checkpoint import Weight, fill
from minidsv.config import ModelConfig
from minidsv.engine_config import EngineConfig, bundled_model
from minidsv.kernels.quant import dequantize_fp8_blocks
from minidsv.random_weights import SLAB, random_tensors
from minidsv.roofline import distinct_experts as expected_experts
from peak_memory import PeakMemory

CPU = torch.device("cpu")
CHANGES: dict[str, Any] = {
    "num_hidden_layers": 2, "hidden_size": 1024, "n_routed_experts": 8, "num_experts_per_tok": 2,
    "moe_intermediate_size": 384, "intermediate_size": 4096, "q_lora_rank": 256,
    "num_attention_heads": 16, "indexer_types": ("full", "full"), "n_group": 1, "topk_group": 1,
}  # fmt: skip


@pytest.fixture
def config() -> ModelConfig:
    full = ModelConfig.from_path(bundled_model().parent / "v32_slice.json")
    return replace(full, vocab_size=40_000, **CHANGES)


def drawn(config: ModelConfig, quantization: str = "auto", fp8: bool = True) -> dict[str, Weight]:
    pieces = random_tensors(config, seed=3, fp8=fp8, device=CPU)
    return fill(pieces, device=CPU, dtype=torch.bfloat16, quantization=quantization)


def test_values(config: ModelConfig) -> None:
    """N(0, 1/fan_in) as FP8 under power-of-two scales, gains near 1, and the same ones again."""
    weights, again = drawn(config), drawn(config)
    experts = weights["layers.1.mlp.experts.down_proj"]
    assert experts.data.dtype == torch.float8_e4m3fn
    assert experts.scale is not None
    assert torch.equal(experts.scale.log2(), experts.scale.log2().round())
    matrix = dequantize_fp8_blocks(experts.data[5], experts.scale[5])
    assert matrix.std() == pytest.approx(384**-0.5, rel=0.01)
    assert abs(matrix.mean()) < 1e-3 * 384**-0.5 * 3
    assert len({row.tobytes() for row in matrix[:64].numpy()}) == 64
    assert weights["lm_head"].data.float().std() == pytest.approx(1024**-0.5, rel=0.01)
    assert weights["norm"].data.mean() == pytest.approx(1, abs=0.02)
    assert 0 < weights["layers.1.mlp.gate_bias"].data.abs().max() < 0.05
    for name, weight in weights.items():
        assert torch.equal(weight.data.float(), again[name].data.float()), name


def test_tokens_spread_over_the_experts(tmp_path: Path) -> None:
    """256 experts in 8 groups, behind attention over random rows, as `minidsv bench` runs them."""
    raw = json.loads((bundled_model().parent / "v32_slice.json").read_text())
    raw |= {"num_hidden_layers": 3, "vocab_size": 4096, "hidden_size": 1024, "q_lora_rank": 256,
            "intermediate_size": 1024, "moe_intermediate_size": 128, "num_attention_heads": 8,
            "kv_lora_rank": 128, "index_n_heads": 4, "index_topk": 64}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(raw))
    config = EngineConfig(
        model=str(tmp_path), load_format="random", device="cpu", max_model_len=256
    )
    rig = Rig.build(config, BenchOptions(batch="8,64", context="100", replays=4))
    for batch in (8, 64):
        model = rig.build_model("eager", raw["num_hidden_layers"])
        got = distinct_experts(model, rig.first_step(batch, 100), batch, steps=2)
        assert got == pytest.approx(expected_experts(rig.model, batch), rel=0.06)


@pytest.mark.parametrize("quantization", ["auto", "none", "fp8"])
def test_pieces_make_the_whole(
    quantization: str, config: ModelConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cut after every block of rows, each matrix is still full, and of its own numbers."""
    monkeypatch.setattr(random_weights, "SLAB", 128 * 1024)
    pieces = list(random_tensors(config, seed=0, fp8=quantization != "fp8", device=CPU))
    assert max(piece.data.numel() for piece in pieces) <= 128 * 4096
    assert all(piece.row % 128 == 0 for piece in pieces)
    poisoned = torch.full  # every byte of a parameter has to come from a piece
    monkeypatch.setattr(
        torch,
        "empty",
        lambda *s, dtype=None, device=None: poisoned(
            s[0] if isinstance(s[0], tuple) else s, float("nan"), dtype=dtype, device=device
        ),
    )
    weights = drawn(config, quantization, fp8=quantization != "fp8")
    for name, weight in weights.items():
        assert weight.data.float().isfinite().all(), name
        assert weight.scale is None or weight.scale.isfinite().all(), name
    kept = weights["layers.0.o_proj"].data.dtype
    assert (kept == torch.float8_e4m3fn) == (quantization != "none")


def test_the_peak_is_the_parameters_and_a_slab(config: ModelConfig) -> None:
    """The vocabulary alone is 2.4 slabs; a slab is drawn in fp32 and copied while it is rounded."""
    assert config.vocab_size * config.hidden_size > 2.4 * SLAB
    with PeakMemory() as memory:
        weights = drawn(config)
    held = sum(weight.nbytes for weight in weights.values())
    assert held > 4 * SLAB * 2
    assert memory.peak <= held + 4 * SLAB * 6
