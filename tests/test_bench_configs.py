"""The configs that are measured: cut from the released ones, of the sizes that they promise."""

import io
import json
import math
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from minidsv import LLM, SamplingParams
from minidsv.config import ModelConfig
from minidsv.engine_config import bundled_model
from minidsv.inspect_checkpoint import show
from minidsv.kernels.constants import FP8_BLOCK
from minidsv.kv_cache import bytes_per_token
from minidsv.roofline import spec_bytes
from minidsv.tensor_table import tensor_table

CONFIGS = bundled_model().parent
CUT = {"num_hidden_layers": 5, "num_nextn_predict_layers": 0, "first_k_dense_replace": 1}
SHARD = {
    "vocab_size": 129_280 // 8,
    "intermediate_size": 18_432 // 8,
    "moe_intermediate_size": 2048 // 8,
    "num_attention_heads": 128 // 8,
    "num_key_value_heads": 128 // 8,
}
MINI = {
    "vocab_size": 102_400, "hidden_size": 2048, "num_hidden_layers": 27,
    "num_nextn_predict_layers": 0, "first_k_dense_replace": 1, "intermediate_size": 11_264,
    "moe_intermediate_size": 1408, "num_attention_heads": 16, "num_key_value_heads": 16,
    "n_routed_experts": 64, "n_shared_experts": 2, "num_experts_per_tok": 6, "n_group": 1,
    "topk_group": 1,
}  # fmt: skip
NAMES = ("v32_slice", "glm52_slice", "v32_tp8_shard", "mini")
SHRUNKEN = {
    "hidden_size": 128, "intermediate_size": 256, "moe_intermediate_size": 128,
    "num_attention_heads": 2, "n_routed_experts": 8, "num_experts_per_tok": 2, "q_lora_rank": 128,
    "kv_lora_rank": 128, "n_group": 1, "topk_group": 1, "index_topk": 64, "num_hidden_layers": 5,
}  # fmt: skip


def raw(name: str) -> dict[str, Any]:
    return json.loads((CONFIGS / f"{name}.json").read_text())


@pytest.mark.parametrize(
    ("name", "origin", "changes"),
    [
        ("v32_slice", "deepseek_v32", CUT),
        ("glm52_slice", "glm52", CUT),
        ("v32_tp8_shard", "deepseek_v32", CUT | SHARD),
        ("mini", "deepseek_v32", MINI),
    ],
)
def test_they_are_the_released_configs_with_changes(
    name: str, origin: str, changes: dict[str, int]
) -> None:
    assert raw(name) == raw(origin) | changes


@pytest.mark.parametrize(
    ("name", "parameters", "gigabytes"),
    [
        ("v32_slice", 48_535_790_848, 50.41),
        ("glm52_slice", 41_794_945_280, 43.71),
        ("v32_tp8_shard", 6_200_780_032, 6.44),
        ("mini", 16_101_323_136, 16.53),
    ],
)
def test_sizes(name: str, parameters: int, gigabytes: float) -> None:
    """Tensors of the official layout; every FP8 one ends on a block, but the rows of kv_a."""
    table = tensor_table(ModelConfig.from_path(CONFIGS / f"{name}.json"))
    assert sum(math.prod(spec.shape) for spec in table.values()) == parameters
    assert sum(spec_bytes(spec, True) for spec in table.values()) / 1e9 == pytest.approx(
        gigabytes, abs=0.005
    )
    ragged = {
        tensor.split(".")[-2]
        for tensor, spec in table.items()
        if spec.may_be_fp8 and any(dim % FP8_BLOCK for dim in spec.shape)
    }
    assert ragged == {"kv_a_proj_with_mqa"}


def test_mini_is_a_model_of_16_billion() -> None:
    config = ModelConfig.from_path(CONFIGS / "mini.json")
    assert not config.is_moe(0)
    assert config.is_moe(1)
    assert (config.index_n_heads, config.index_head_dim, config.index_topk) == (64, 128, 2048)
    assert bytes_per_token(config, "fp8", "fp8") == 27 * (656 + 132)


def test_the_glm_slice_has_full_and_shared_layers() -> None:
    """By the rule of the whole model, frequency 4 from layer 3 on."""
    config = ModelConfig.from_path(CONFIGS / "glm52_slice.json")
    assert config.indexer_types == ("full", "full", "full", "shared", "shared")
    assert config.indexer_types == ModelConfig.from_path(CONFIGS / "glm52.json").indexer_types[:5]


@pytest.mark.parametrize("name", NAMES)
def test_inspect_prints_their_card(name: str) -> None:
    out = io.StringIO()
    show(
        CONFIGS / f"{name}.json",
        batch=8,
        context=65_536,
        gpu="H100",
        weights="fp8",
        kv_cache_dtype="fp8",
        index_cache_dtype="fp8",
        console=Console(file=out, width=160),
    )
    for words in ("parameters: ", "indexer cache", "routed experts", "batch 8, context 65536"):
        assert words in out.getvalue()


@pytest.mark.parametrize("name", NAMES)
def test_a_shrunken_copy_speaks_with_the_bundled_tokenizer(name: str, tmp_path: Path) -> None:
    """Most ids are none of the tokenizer's: they have no text, and that is all."""
    changes = SHRUNKEN
    file = tmp_path / f"{name}.json"
    file.write_text(json.dumps(raw(name) | changes))
    llm = LLM(str(file), load_format="random", num_pages=4, max_model_len=256)
    assert llm.engine.tokenizer.size < llm.engine.model_config.vocab_size / 8
    params = SamplingParams(max_tokens=8, ignore_eos=True, logprobs=2, temperature=1.0, seed=1)
    outputs = llm.generate(["What is the capital of France?", [5, 16_000] * 50], params)
    for output in outputs:
        (answer,) = output.outputs
        assert len(answer.token_ids) == len(answer.logprobs or ()) == 8
        assert max(answer.token_ids) >= llm.engine.tokenizer.size
        known = [token for token in answer.token_ids if token < llm.engine.tokenizer.size]
        assert answer.text.strip() == llm.engine.tokenizer.decode(known).strip()
    assert outputs[0].prompt == "What is the capital of France?"
