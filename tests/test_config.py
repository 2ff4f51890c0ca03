"""ModelConfig: the traps of real files, and errors that name field, value, what is accepted."""

import json
from pathlib import Path
from typing import Any

import pytest

from minidsv.config import ModelConfig
from minidsv.engine_config import bundled_model
from minidsv.errors import ConfigError
from minidsv.kv_cache import bytes_per_token
from minidsv.roofline import GPUS, decode_cost, distinct_experts, step_seconds
from minidsv.tensor_table import tensor_table

CONFIGS = bundled_model().parent
V32: dict[str, Any] = json.loads((CONFIGS / "deepseek_v32.json").read_text())
GLM52: dict[str, Any] = json.loads((CONFIGS / "glm52.json").read_text())


def changed(raw: dict[str, Any], **fields: Any) -> ModelConfig:
    merged = {**raw, **fields}
    return ModelConfig.from_hf({k: v for k, v in merged.items() if v != "absent"})


def test_deepseek_v32() -> None:
    config = ModelConfig.from_path(CONFIGS / "deepseek_v32.json")
    assert config.attention_scale == pytest.approx(0.1352337788608801, rel=1e-12)
    assert config.rope.cos_sin_scale == 1.0
    assert not config.indexer_rope_interleave
    assert config.indexer_types == ("full",) * 61
    assert config.latent_norm_eps == 1e-6
    assert not config.is_moe(2)
    assert config.is_moe(3)
    assert bytes_per_token(config, "fp8", "fp8") == 48_068


def test_glm() -> None:
    old, new = (ModelConfig.from_path(CONFIGS / f"{name}.json") for name in ("glm5", "glm52"))
    assert old.attention_scale == new.attention_scale == 0.0625
    assert old.rope.theta == 1e6
    assert new.rope.theta == 8e6
    assert old.indexer_rope_interleave
    assert new.indexer_rope_interleave
    assert old.latent_norm_eps == new.latent_norm_eps == 1e-5
    assert set(old.indexer_types) == {"full"}
    full = [i for i, kind in enumerate(new.indexer_types) if kind == "full"]
    assert full == [0, 1, *range(2, 78, 4)]
    assert new.eos_token_ids == (154820, 154827, 154829)
    assert bytes_per_token(new, "bfloat16", "bfloat16") == 95_232


def test_tensor_counts_close_with_the_released_repositories() -> None:
    """model-spec 8.1: 92,425 and 118,629 tensors with their FP8 scales and the MTP layer."""
    for name, released, mtp_extra in (("deepseek_v32", 92_425, 6), ("glm52", 118_629, 4)):
        config = ModelConfig.from_path(CONFIGS / f"{name}.json")
        table = tensor_table(config)
        counts = dict.fromkeys(range(config.num_hidden_layers), 0)
        outside = 0
        for tensor, spec in table.items():
            amount = 2 if spec.may_be_fp8 else 1
            if tensor.startswith("model.layers."):
                counts[int(tensor.split(".")[2])] += amount
            else:
                outside += amount
        mtp = (
            max(counts.values()) + mtp_extra
        )  # a MoE layer with an indexer, eh_proj, norms (DS: copies)
        assert sum(counts.values()) + outside + mtp == released


def test_rope_spellings_agree() -> None:
    scaling = V32["rope_scaling"]
    parameters = {**scaling, "rope_type": "yarn", "rope_theta": V32["rope_theta"]}
    parameters.pop("type")
    new = changed(V32, rope_scaling="absent", rope_theta="absent", rope_parameters=parameters)
    assert new.rope == ModelConfig.from_hf(V32).rope
    flat = changed(GLM52, rope_parameters="absent", rope_theta=8e6, rope_scaling=None)
    assert flat.rope == ModelConfig.from_hf(GLM52).rope


def test_indexer_types_precedence() -> None:
    types = ["full"] + ["shared"] * 77
    assert changed(GLM52, indexer_types=types, index_topk_pattern="F" * 78).indexer_types == tuple(
        types
    )
    pattern = "FFS" * 26
    got = changed(GLM52, indexer_types=None, index_topk_pattern=pattern).indexer_types
    assert got == tuple({"F": "full", "S": "shared"}[letter] for letter in pattern)
    assert changed(GLM52, indexer_types="absent") == ModelConfig.from_hf(GLM52)


def test_hf_saved_fields() -> None:
    types = ["dense"] * 3 + ["sparse"] * 58
    config = changed(V32, first_k_dense_replace="absent", mlp_layer_types=types, head_dim=64)
    assert config.first_k_dense_replace == 3
    assert changed(V32, num_nextn_predict_layers="absent").num_nextn_predict_layers == 1
    assert changed(V32, num_nextn_predict_layers=0).num_nextn_predict_layers == 0
    assert changed(GLM52, indexer_rope_interleave=None).indexer_rope_interleave
    assert not changed(GLM52, indexer_rope_interleave=False).indexer_rope_interleave
    assert changed(V32, rope_scaling={**V32["rope_scaling"], "rope_type": None}).rope.factor == 40
    assert config.qk_head_dim == 192


@pytest.mark.parametrize(
    ("fields", "names"),
    [
        ({"model_type": "llama"}, ["model_type", "llama", "deepseek_v32"]),
        ({"model_type": "absent"}, ["model_type", "missing"]),
        ({"model_type": []}, ["model_type", "[]"]),
        ({"architectures": ["LlamaForCausalLM"]}, ["architectures", "DeepseekV32ForCausalLM"]),
        ({"kv_lora_rank": "absent"}, ["kv_lora_rank", "missing"]),
        ({"hidden_size": "wide"}, ["hidden_size", "wide"]),
        ({"hidden_size": 0}, ["hidden_size", "0"]),
        ({"index_topk": True}, ["index_topk", "True"]),
        ({"rms_norm_eps": 0}, ["rms_norm_eps", "0"]),
        ({"rope_theta": "absent"}, ["rope_theta", "missing"]),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, ["rope_type", "linear", "yarn"]),
        ({"rope_scaling": {"type": "yarn"}}, ["factor", "missing"]),
        ({"n_group": 7}, ["n_group", "7", "256"]),
        ({"topk_group": 9}, ["topk_group", "9", "8"]),
        ({"num_experts_per_tok": 200}, ["num_experts_per_tok", "200"]),
        ({"qk_rope_head_dim": 256}, ["index_head_dim", "128", "256"]),
        ({"scoring_func": "softmax"}, ["scoring_func", "softmax", "sigmoid"]),
        ({"tie_word_embeddings": True}, ["tie_word_embeddings", "True", "False"]),
        ({"attention_bias": True}, ["attention_bias", "True"]),
        ({"quantization_config": {"quant_method": "awq"}}, ["quantization_config", "awq", "fp8"]),
        ({"quantization_config": "fp8"}, ["quantization_config", "fp8"]),
        ({"indexer_types": ["shared"] * 61}, ["indexer_types", "full"]),
        ({"index_topk_freq": 4, "index_skip_topk_offset": 3}, ["index_topk_freq", "deepseek_v32"]),
        ({"mlp_layer_types": ["dense"] * 61}, ["mlp_layer_types", "first_k_dense_replace"]),
        ({"eos_token_id": "1"}, ["eos_token_id", "1"]),
        ({"norm_topk_prob": "false"}, ["norm_topk_prob", "'false'"]),
        ({"rope_scaling": "yarn"}, ["rope_scaling", "yarn", "object"]),
        ({"rope_scaling": {**V32["rope_scaling"], "mscale": float("nan")}}, ["mscale", "nan"]),
        ({"rope_scaling": {**V32["rope_scaling"], "mscale": "a"}}, ["mscale", "'a'"]),
        ({"partial_rotary_factor": 0.5}, ["partial_rotary_factor", "0.5", "1.0"]),
        ({"mlp_layer_types": 3}, ["mlp_layer_types", "3"]),
        ({"indexer_types": [["full"]]}, ["indexer_types", "full"]),
        ({"index_topk_pattern": 3}, ["index_topk_pattern", "3"]),
        ({"index_topk_freq": "4"}, ["index_topk_freq", "'4'"]),
        ({"index_topk_freq": -1}, ["index_topk_freq", "-1"]),
        ({"num_nextn_predict_layers": True}, ["num_nextn_predict_layers", "True"]),
        ({"first_k_dense_replace": 99}, ["first_k_dense_replace", "99", "61"]),
        (
            {"quantization_config": {**V32["quantization_config"], "fmt": "e5m2"}},
            ["quantization_config.fmt", "e5m2", "e4m3"],
        ),
        (
            {"quantization_config": {**V32["quantization_config"], "scale_fmt": "e8"}},
            ["quantization_config.scale_fmt", "e8", "ue8m0"],
        ),
        ({"eos_token_id": 129280}, ["eos_token_id", "129280"]),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_refusals_name_field_and_value(fields: dict[str, Any], names: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        changed(V32, **fields)
    for name in names:
        assert name in str(error.value)


def test_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file"):
        ModelConfig.from_path(tmp_path)
    for text in (b"{", b"\xff", b"[" * 10**5, b'{"vocab_size": ' + b"9" * 5000 + b"}"):
        (tmp_path / "config.json").write_bytes(text)
        with pytest.raises(ConfigError, match="not a readable JSON"):
            ModelConfig.from_path(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ConfigError, match="JSON object"):
        ModelConfig.from_path(tmp_path)


def test_roofline_of_one_full_layer() -> None:
    """performance.md 6.1: one full-width MoE layer at batch 1 and 4k reads about 612 MB."""
    config = ModelConfig.from_hf(V32)
    costs = decode_cost(
        config,
        batch=1,
        context=4096,
        fp8_weights=True,
        kv_cache_dtype="fp8",
        index_cache_dtype="fp8",
    )
    total = sum(c.bytes for c in costs if c.part not in ("embedding", "lm_head"))
    assert total / 61 == pytest.approx(600e6, rel=0.03)
    assert distinct_experts(config, 64) == pytest.approx(222.4, abs=0.5)
    assert step_seconds(costs, GPUS["H100"]) == pytest.approx(0.0128, rel=0.05)
