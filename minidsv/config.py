"""ModelConfig: the `config.json` of a DeepSeek-V3.2-family checkpoint, under its HF names.

Accepted architectures: `deepseek_v32` (DeepSeek-V3.2, V3.2-Exp) and `glm_moe_dsa` (GLM-5, 5.1,
5.2). Both spellings of RoPE are read (`rope_scaling` + `rope_theta`, and `rope_parameters`), and
the three ways of saying which layers own an indexer (`indexer_types`, `index_topk_pattern`,
`index_topk_freq`).
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minidsv.config_fields import Fields
from minidsv.errors import ConfigError
from minidsv.kernels.constants import FP8_BLOCK

ARCHITECTURES = {"deepseek_v32": "DeepseekV32ForCausalLM", "glm_moe_dsa": "GlmMoeDsaForCausalLM"}
_DIMS = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "intermediate_size",
    "moe_intermediate_size",
    "num_attention_heads",
    "q_lora_rank",
    "kv_lora_rank",
    "qk_nope_head_dim",
    "qk_rope_head_dim",
    "v_head_dim",
    "n_routed_experts",
    "n_shared_experts",
    "num_experts_per_tok",
    "n_group",
    "topk_group",
    "max_position_embeddings",
    "index_n_heads",
    "index_head_dim",
    "index_topk",
)
_FIXED = {
    "hidden_act": "silu",
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": False,
    "moe_layer_freq": 1,
    "rope_interleave": True,
    "partial_rotary_factor": 1.0,
}


@dataclass(frozen=True)
class RopeConfig:
    """Rotary embedding: plain, or YaRN when `factor` is set."""

    theta: float
    factor: float | None = None
    original_max_position_embeddings: int = 0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 0.0
    mscale_all_dim: float = 0.0
    attention_factor: float | None = None
    truncate: bool = True

    @property
    def cos_sin_scale(self) -> float:
        """Multiplier of the cos/sin table; 1.0 for every released checkpoint."""
        if self.factor is None:
            return 1.0
        if self.attention_factor is not None:
            return self.attention_factor
        if self.mscale and self.mscale_all_dim:
            return _mscale(self.factor, self.mscale) / _mscale(self.factor, self.mscale_all_dim)
        return _mscale(self.factor, 1.0)

    @property
    def softmax_scale(self) -> float:
        """Multiplier of the attention's softmax scale: YaRN's mscale squared."""
        if self.factor is None or not self.mscale_all_dim:
            return 1.0
        return _mscale(self.factor, self.mscale_all_dim) ** 2


def _mscale(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


@dataclass(frozen=True)
class ModelConfig:
    """Dimensions and constants of one model. Field names are those of `config.json`."""

    model_type: str
    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    first_k_dense_replace: int
    intermediate_size: int
    moe_intermediate_size: int
    num_attention_heads: int
    q_lora_rank: int
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    n_routed_experts: int
    n_shared_experts: int
    num_experts_per_tok: int
    n_group: int
    topk_group: int
    norm_topk_prob: bool
    routed_scaling_factor: float
    rms_norm_eps: float
    latent_norm_eps: float  # of q_a_layernorm and kv_a_layernorm; defaults to rms_norm_eps
    max_position_embeddings: int
    index_n_heads: int
    index_head_dim: int
    index_topk: int
    indexer_rope_interleave: bool
    indexer_types: tuple[str, ...]  # "full" or "shared", one a layer
    rope: RopeConfig
    num_nextn_predict_layers: int  # multi-token-prediction layers behind the last one; not loaded
    fp8_weights: bool  # stored as FP8 128x128 blocks
    ue8m0_activations: bool  # FP8 activations have scales of powers of two
    eos_token_ids: tuple[int, ...]

    @property
    def qk_head_dim(self) -> int:
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def latent_dim(self) -> int:
        """Width of one latent cache row: kv_lora_rank + qk_rope_head_dim."""
        return self.kv_lora_rank + self.qk_rope_head_dim

    @property
    def attention_scale(self) -> float:
        return self.qk_head_dim**-0.5 * self.rope.softmax_scale

    def is_moe(self, layer: int) -> bool:
        return layer >= self.first_k_dense_replace

    def has_indexer(self, layer: int) -> bool:
        return self.indexer_types[layer] == "full"

    @classmethod
    def from_path(cls, path: str | Path) -> "ModelConfig":
        """Read `path`, a `config.json` or the folder that holds one."""
        file = Path(path)
        file = file / "config.json" if file.is_dir() else file
        try:
            raw = json.loads(file.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ConfigError(
                f"{file}: no such file; give a checkpoint folder or a config.json"
            ) from None
        except (OSError, ValueError, RecursionError) as error:
            raise ConfigError(f"{file}: not a readable JSON file ({error})") from None
        return cls.from_hf(raw)

    @classmethod
    def from_hf(cls, raw: Mapping[str, Any]) -> "ModelConfig":
        """Build from the mapping of a Hugging Face `config.json`; raises ConfigError."""
        fields = Fields(raw)
        model_type = fields.choice("model_type", tuple(ARCHITECTURES))
        fields.fixed("architectures", [ARCHITECTURES[model_type]])
        for name, accepted in _FIXED.items():
            fields.fixed(name, accepted)
        dims: dict[str, Any] = {name: fields.integer(name) for name in _DIMS}
        layers = dims["num_hidden_layers"]
        rms_norm_eps = fields.number("rms_norm_eps")
        is_glm = model_type == "glm_moe_dsa"
        config = cls(
            model_type=model_type,
            **dims,
            first_k_dense_replace=_dense_layers(fields, layers),
            norm_topk_prob=fields.boolean("norm_topk_prob"),
            routed_scaling_factor=fields.number("routed_scaling_factor"),
            rms_norm_eps=rms_norm_eps,
            latent_norm_eps=fields.number("latent_norm_eps", rms_norm_eps),
            indexer_rope_interleave=fields.boolean("indexer_rope_interleave", is_glm),
            indexer_types=_indexer_types(fields, layers, may_share=is_glm),
            rope=_rope(fields),
            # transformers drops the field; every release has one such layer
            num_nextn_predict_layers=fields.integer("num_nextn_predict_layers", 1, least=0),
            fp8_weights=_fp8_weights(fields),
            ue8m0_activations=_ue8m0_activations(fields),
            eos_token_ids=fields.token_ids("eos_token_id"),
        )
        _check_dims(config)
        return config


def _fp8_weights(fields: Fields) -> bool:
    if not fields.has("quantization_config"):
        return False
    quantization = fields.object("quantization_config")
    for name, accepted in (
        ("quant_method", "fp8"),
        ("fmt", "e4m3"),
        ("weight_block_size", [FP8_BLOCK, FP8_BLOCK]),
    ):
        value = quantization.raw.get(name)
        if value != accepted and not (name == "fmt" and value is None):
            raise ConfigError(
                f"quantization_config.{name}: {value!r} is not supported; accepted: {accepted!r}"
            )
    return True


def _ue8m0_activations(fields: Fields) -> bool:
    """Whether FP8 activations have scales of powers of two; else any fp32."""
    if not fields.has("quantization_config"):
        return False
    value = fields.object("quantization_config").raw.get("scale_fmt")
    if value not in (None, "ue8m0"):
        raise ConfigError(
            f"quantization_config.scale_fmt: {value!r} is not supported; accepted: 'ue8m0', None"
        )
    return value is not None


def _dense_layers(fields: Fields, layers: int) -> int:
    """Number of leading dense layers: first_k_dense_replace, or by mlp_layer_types."""
    types = fields.strings("mlp_layer_types") if fields.has("mlp_layer_types") else None
    default = None if types is None else types.count("dense")
    dense = fields.integer("first_k_dense_replace", default, least=0)
    if dense > layers:
        raise ConfigError(f"first_k_dense_replace: {dense} is more than {layers} layers")
    if types not in (None, ["dense"] * dense + ["sparse"] * (layers - dense)):
        raise ConfigError(
            f"mlp_layer_types: {types!r} does not match first_k_dense_replace {dense} of "
            f"{layers} layers"
        )
    return dense


def _indexer_types(fields: Fields, layers: int, may_share: bool) -> tuple[str, ...]:
    """Which layers own an indexer ("full") and which reuse the last one's choice ("shared")."""
    if fields.has("indexer_types"):
        field, types = "indexer_types", fields.strings("indexer_types")
    elif fields.has("index_topk_pattern"):
        field, pattern = "index_topk_pattern", fields.raw["index_topk_pattern"]
        if not isinstance(pattern, str):
            pattern = fields.strings(field)
        types = [{"F": "full", "S": "shared"}.get(letter, letter) for letter in pattern]
    else:
        field = "index_topk_freq"
        freq = fields.integer(field, 1)
        offset = fields.integer("index_skip_topk_offset", 2, least=0)
        types = ["full" if max(i - offset + 1, 0) % freq == 0 else "shared" for i in range(layers)]
    if len(types) != layers or not set(types) <= {"full", "shared"} or types[0] != "full":
        raise ConfigError(
            f"{field}: {types!r} is not a list of {layers} of 'full' or 'shared' "
            "that starts with 'full'"
        )
    if not may_share and "shared" in types:
        raise ConfigError(f"{field}: deepseek_v32 has an indexer in every layer; got {types!r}")
    return tuple(types)


def _rope(fields: Fields) -> RopeConfig:
    scaling, parameters = fields.object("rope_scaling").raw, fields.object("rope_parameters").raw
    given = {name: value for name, value in scaling.items() if value is not None}
    given |= {name: value for name, value in parameters.items() if value is not None}
    rope = Fields({"rope_theta": fields.raw.get("rope_theta"), **given})
    theta = rope.number("rope_theta")
    rope.fixed("partial_rotary_factor", 1.0)
    kind = rope.choice("rope_type", ("default", "yarn"), given.get("type", "default"))
    if kind == "default":
        return RopeConfig(theta)
    return RopeConfig(
        theta,
        factor=rope.number("factor"),
        original_max_position_embeddings=rope.integer("original_max_position_embeddings"),
        beta_fast=rope.number("beta_fast", 32.0),
        beta_slow=rope.number("beta_slow", 1.0),
        mscale=rope.number_or_zero("mscale"),
        mscale_all_dim=rope.number_or_zero("mscale_all_dim"),
        attention_factor=rope.number("attention_factor") if rope.has("attention_factor") else None,
        truncate=rope.boolean("truncate", True),
    )


def _check_dims(c: ModelConfig) -> None:
    def require(ok: bool, message: str) -> None:
        if not ok:
            raise ConfigError(message)

    experts, groups, k = c.n_routed_experts, c.n_group, c.num_experts_per_tok
    rope, index = c.qk_rope_head_dim, c.index_head_dim
    require(experts % groups == 0, f"n_group: {groups} does not divide n_routed_experts {experts}")
    require(c.topk_group <= groups, f"topk_group: {c.topk_group} is more than n_group {groups}")
    require(groups == 1 or experts >= 2 * groups, f"n_group: {groups} leaves groups of 1 expert")
    kept = experts // groups * c.topk_group
    require(k <= kept, f"num_experts_per_tok: {k} is more than the {kept} of topk_group groups")
    require(rope % 2 == 0, f"qk_rope_head_dim: {rope} is odd")
    require(rope <= index, f"index_head_dim: {index} is less than qk_rope_head_dim {rope}")
    for token in c.eos_token_ids:
        require(token < c.vocab_size, f"eos_token_id: {token} is outside vocab_size {c.vocab_size}")
