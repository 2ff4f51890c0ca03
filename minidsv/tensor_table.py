"""The name table: every tensor of an official checkpoint, its shape, what may hold it, and the
parameter it fills.

Names and shapes follow deepseek-ai/DeepSeek-V3.2 and zai-org/GLM-5.x (model-spec section 8). A
parameter may be filled by several tensors: gate and up are halves of one `gate_up_proj`, the
experts of a layer are stacked.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from minidsv.config import ModelConfig

Kind = Literal["linear", "dense", "gain", "latent_up"]
Shard = Literal["none", "rows", "cols", "expert"]


@dataclass(frozen=True)
class TensorSpec:
    """One tensor of the checkpoint.

    kind   linear: FP8 blocks or a float dtype · dense: a float dtype, held in the compute dtype ·
           gain: a float dtype, held in fp32 · latent_up (kv_b_proj): stored like a linear, but
           always dequantised, since a head's rows need not start on a 128-row block (GLM: 448 rows
           a head)
    shard  how tensor or expert parallelism will cut it
    """

    shape: tuple[int, ...]
    kind: Kind
    shard: Shard
    param: str  # the parameter that it fills
    param_shape: tuple[int, ...]
    index: tuple[int, ...] = ()  # where in the parameter: () all of it, else leading indices

    @property
    def may_be_fp8(self) -> bool:
        return self.kind in ("linear", "latent_up")

    @property
    def stays_fp8(self) -> bool:
        return self.kind == "linear"


def tensor_table(config: ModelConfig) -> dict[str, TensorSpec]:
    """Checkpoint name -> TensorSpec, in the order of the forward pass."""
    table = {
        "model.embed_tokens.weight": _spec(
            "embed_tokens", "dense", "rows", config.vocab_size, config.hidden_size
        )
    }
    for layer in range(config.num_hidden_layers):
        for name, spec in _layer(config, layer):
            prefix = f"layers.{layer}."
            table[f"model.{prefix}{name}"] = replace(spec, param=prefix + spec.param)
    table["model.norm.weight"] = _spec("norm", "gain", "none", config.hidden_size)
    table["lm_head.weight"] = _spec(
        "lm_head", "dense", "rows", config.vocab_size, config.hidden_size
    )
    return table


def _spec(param: str, kind: Kind, shard: Shard, *shape: int) -> TensorSpec:
    return TensorSpec(shape, kind, shard, param, shape)


def _layer(c: ModelConfig, layer: int) -> Iterator[tuple[str, TensorSpec]]:
    def one(name: str, kind: Kind, shard: Shard, *shape: int) -> tuple[str, TensorSpec]:
        return name + ".weight", _spec(name.removeprefix("self_attn."), kind, shard, *shape)

    heads, hidden = c.num_attention_heads, c.hidden_size
    yield one("input_layernorm", "gain", "none", hidden)
    yield one("self_attn.q_a_proj", "linear", "none", c.q_lora_rank, hidden)
    yield one("self_attn.q_a_layernorm", "gain", "none", c.q_lora_rank)
    yield one("self_attn.q_b_proj", "linear", "rows", heads * c.qk_head_dim, c.q_lora_rank)
    yield one("self_attn.kv_a_proj_with_mqa", "linear", "none", c.latent_dim, hidden)
    yield one("self_attn.kv_a_layernorm", "gain", "none", c.kv_lora_rank)
    yield one(
        "self_attn.kv_b_proj",
        "latent_up",
        "rows",
        heads * (c.qk_nope_head_dim + c.v_head_dim),
        c.kv_lora_rank,
    )
    yield one("self_attn.o_proj", "linear", "cols", hidden, heads * c.v_head_dim)
    if c.has_indexer(layer):
        dim = c.index_head_dim
        yield one("self_attn.indexer.wq_b", "linear", "none", c.index_n_heads * dim, c.q_lora_rank)
        yield one("self_attn.indexer.wk", "linear", "none", dim, hidden)
        yield one("self_attn.indexer.weights_proj", "dense", "none", c.index_n_heads, hidden)
        yield one("self_attn.indexer.k_norm", "gain", "none", dim)
        yield "self_attn.indexer.k_norm.bias", _spec("indexer.k_norm_bias", "gain", "none", dim)
    yield one("post_attention_layernorm", "gain", "none", hidden)
    if not c.is_moe(layer):
        yield from _mlp("mlp", hidden, c.intermediate_size)
        return
    yield one("mlp.gate", "dense", "none", c.n_routed_experts, hidden)
    yield (
        "mlp.gate.e_score_correction_bias",
        _spec("mlp.gate_bias", "gain", "none", c.n_routed_experts),
    )
    for expert in range(c.n_routed_experts):
        for name, spec in _mlp(f"mlp.experts.{expert}", hidden, c.moe_intermediate_size):
            yield (
                name,
                replace(
                    spec,
                    shard="expert",
                    param=spec.param.replace(f"experts.{expert}", "experts"),
                    param_shape=(c.n_routed_experts, *spec.param_shape),
                    index=(expert, *spec.index),
                ),
            )
    yield from _mlp("mlp.shared_experts", hidden, c.moe_intermediate_size * c.n_shared_experts)


def _mlp(prefix: str, hidden: int, intermediate: int) -> Iterator[tuple[str, TensorSpec]]:
    for half, name in enumerate(("gate_proj", "up_proj")):
        spec = _spec(f"{prefix}.gate_up_proj", "linear", "rows", intermediate, hidden)
        yield (
            f"{prefix}.{name}.weight",
            replace(spec, param_shape=(2, intermediate, hidden), index=(half,)),
        )
    yield (
        f"{prefix}.down_proj.weight",
        _spec(f"{prefix}.down_proj", "linear", "cols", hidden, intermediate),
    )
