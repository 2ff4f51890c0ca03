"""ModelConfig: the `config.json` of a DeepSeek-V3.2-family checkpoint, checked, under its Hugging
Face names.

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

from minidsv.errors import ConfigError

FP8_BLOCK = 128
ARCHITECTURES = {"deepseek_v32": "DeepseekV32ForCausalLM", "glm_moe_dsa": "GlmMoeDsaForCausalLM"}
_POSITIVE = (
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
    truncate: bool = True

    @property
    def cos_sin_scale(self) -> float:
        """Multiplier of the cos/sin table; 1.0 for every released checkpoint (mscale equals
        mscale_all_dim).
        """
        if self.factor is None:
            return 1.0
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
    eos_token_ids: tuple[int, ...]
    bos_token_id: int | None

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
        except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
            raise ConfigError(f"{file}: not a readable JSON file ({error})") from None
        return cls.from_hf(raw)

    @classmethod
    def from_hf(cls, raw: Mapping[str, Any]) -> "ModelConfig":
        """Build from the mapping of a Hugging Face `config.json`; raises ConfigError."""
        if not isinstance(raw, Mapping):
            raise ConfigError(f"config.json: a JSON object is needed, got {type(raw).__name__}")
        model_type = raw.get("model_type")
        if model_type not in ARCHITECTURES:
            raise ConfigError(
                f"model_type: {model_type!r} is not supported; accepted: {sorted(ARCHITECTURES)}"
            )
        _check_architectures(raw, model_type)
        for name, accepted in _FIXED.items():
            if raw.get(name, accepted) not in (accepted, None):
                raise ConfigError(f"{name}: {raw[name]!r} is not supported; accepted: {accepted!r}")
        _check_quantization(raw.get("quantization_config"))
        dims: dict[str, Any] = {name: _positive_int(raw, name) for name in _POSITIVE}
        layers = dims["num_hidden_layers"]
        rms_norm_eps = _positive_float(raw, "rms_norm_eps")
        config = cls(
            model_type=model_type,
            **dims,
            first_k_dense_replace=_dense_layers(raw, layers),
            norm_topk_prob=bool(_get(raw, "norm_topk_prob")),
            routed_scaling_factor=_positive_float(raw, "routed_scaling_factor"),
            rms_norm_eps=rms_norm_eps,
            latent_norm_eps=_positive_float(raw, "latent_norm_eps", rms_norm_eps),
            indexer_rope_interleave=bool(
                raw.get("indexer_rope_interleave", model_type == "glm_moe_dsa")
            ),
            indexer_types=_indexer_types(raw, layers),
            rope=_rope(raw),
            num_nextn_predict_layers=_nextn_layers(raw),
            eos_token_ids=token_id_tuple(raw.get("eos_token_id")),
            bos_token_id=raw.get("bos_token_id"),
        )
        _check_dims(config)
        return config


def _get(raw: Mapping[str, Any], name: str) -> Any:
    if raw.get(name) is None:
        raise ConfigError(f"{name}: missing from config.json")
    return raw[name]


def _positive_int(raw: Mapping[str, Any], name: str) -> int:
    value = _get(raw, name)
    if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
        raise ConfigError(f"{name}: {value!r} is not a positive integer")
    return value


def _positive_float(raw: Mapping[str, Any], name: str, default: float | None = None) -> float:
    value = default if raw.get(name) is None and default is not None else _get(raw, name)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ConfigError(f"{name}: {value!r} is not a positive number")
    return float(value)


def token_id_tuple(value: Any) -> tuple[int, ...]:
    """`eos_token_id` as a tuple: null, one id, or a list of ids."""
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if any(isinstance(i, bool) or not isinstance(i, int) or i < 0 for i in ids):
        raise ConfigError(f"eos_token_id: {value!r} is not a token id or a list of them")
    return tuple(ids)


def _check_architectures(raw: Mapping[str, Any], model_type: str) -> None:
    names = raw.get("architectures") or [ARCHITECTURES[model_type]]
    if names != [ARCHITECTURES[model_type]]:
        raise ConfigError(
            f"architectures: {names!r} is not supported; accepted: {[ARCHITECTURES[model_type]]}"
        )


def _check_quantization(quantization: Any) -> None:
    if quantization is None:
        return
    if not isinstance(quantization, Mapping):
        raise ConfigError(f"quantization_config: {quantization!r} is not a JSON object")
    method, block = quantization.get("quant_method"), quantization.get("weight_block_size")
    if (
        method != "fp8"
        or block != [FP8_BLOCK, FP8_BLOCK]
        or quantization.get("fmt", "e4m3") != "e4m3"
    ):
        raise ConfigError(
            f"quantization_config: quant_method {method!r} with weight_block_size {block!r} is not "
            f"supported; accepted: 'fp8', fmt 'e4m3', blocks of [{FP8_BLOCK}, {FP8_BLOCK}]"
        )


def _dense_layers(raw: Mapping[str, Any], layers: int) -> int:
    """Number of leading dense layers, from first_k_dense_replace or mlp_layer_types (which must
    agree).
    """
    types = raw.get("mlp_layer_types")
    dense = raw.get("first_k_dense_replace")
    if dense is None:
        dense = list(types).count("dense") if types else _get(raw, "first_k_dense_replace")
    if isinstance(dense, bool) or not isinstance(dense, int) or dense < 0:
        raise ConfigError(f"first_k_dense_replace: {dense!r} is not a non-negative integer")
    dense = min(dense, layers)
    expected = ["dense"] * dense + ["sparse"] * (layers - dense)
    if types is not None and list(types) != expected:
        raise ConfigError(
            f"mlp_layer_types: {types!r} does not match "
            f"first_k_dense_replace {dense} of {layers} layers"
        )
    return dense


def _nextn_layers(raw: Mapping[str, Any]) -> int:
    """Multi-token-prediction layers; where the field is absent (transformers drops it), one."""
    value = raw.get("num_nextn_predict_layers")
    if value is None:
        return 1
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ConfigError(f"num_nextn_predict_layers: {value!r} is not a non-negative integer")
    return value


def _indexer_types(raw: Mapping[str, Any], layers: int) -> tuple[str, ...]:
    """Which layers own an indexer ("full") and which reuse the last one's choice ("shared")."""
    if raw.get("indexer_types") is not None:
        field, types = "indexer_types", list(raw["indexer_types"])
    elif raw.get("index_topk_pattern") is not None:
        field, pattern = "index_topk_pattern", raw["index_topk_pattern"]
        types = [{"F": "full", "S": "shared"}.get(letter, letter) for letter in pattern]
    else:
        field = "index_topk_freq"
        freq = raw.get("index_topk_freq") or 1
        offset = raw.get("index_skip_topk_offset")
        offset = 2 if offset is None else offset
        types = ["full" if max(i - offset + 1, 0) % freq == 0 else "shared" for i in range(layers)]
    if len(types) != layers or not set(types) <= {"full", "shared"} or types[0] != "full":
        raise ConfigError(
            f"{field}: {types!r} is not a list of {layers} of 'full' or 'shared' "
            "that starts with 'full'"
        )
    if raw["model_type"] == "deepseek_v32" and "shared" in types:
        raise ConfigError(f"{field}: deepseek_v32 has an indexer in every layer; got {types!r}")
    return tuple(types)


def _rope(raw: Mapping[str, Any]) -> RopeConfig:
    given = dict(raw.get("rope_scaling") or {}) | dict(raw.get("rope_parameters") or {})
    theta = given.get("rope_theta", raw.get("rope_theta"))
    if theta is None:
        raise ConfigError(
            "rope_theta: missing from config.json (looked in rope_parameters and at the top level)"
        )
    theta = _positive_float({"rope_theta": theta}, "rope_theta")
    kind = given.get("rope_type", given.get("type", "default"))
    if kind not in ("default", "yarn"):
        raise ConfigError(f"rope_type: {kind!r} is not supported; accepted: 'default', 'yarn'")
    for name in ("attention_factor", "partial_rotary_factor"):
        if given.get(name) not in (None, 1.0):
            raise ConfigError(f"{name}: {given[name]!r} is not supported; accepted: absent or 1.0")
    if kind == "default":
        return RopeConfig(theta)
    return RopeConfig(
        theta,
        factor=_positive_float(given, "factor"),
        original_max_position_embeddings=_positive_int(given, "original_max_position_embeddings"),
        beta_fast=_positive_float(given, "beta_fast", 32.0),
        beta_slow=_positive_float(given, "beta_slow", 1.0),
        mscale=float(given.get("mscale") or 0.0),
        mscale_all_dim=float(given.get("mscale_all_dim") or 0.0),
        truncate=bool(given.get("truncate", True)),
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
