"""What one decode step must read and compute, from the config alone, and how long a GPU's memory
takes for it.

A step of `batch` requests at `context` tokens reads every weight that it uses once (of the routed
experts the distinct ones: as counted, or as expected under uniform routing),
min(context, index_topk) latent rows and, beyond index_topk, all `context` indexer keys of each
request. Activations and logits are left out (well under 1 % at these batches).
"""

import math
from dataclasses import dataclass

from minidsv.config import ModelConfig
from minidsv.kernels.quant import block_scale_shape
from minidsv.kv_cache import index_bytes, latent_bytes
from minidsv.tensor_table import TensorSpec, tensor_table


@dataclass(frozen=True)
class Gpu:
    """Memory bytes/s and dense FP8 FLOP/s of a device, by its data sheet unless said."""

    bandwidth: float
    flops: float


GPUS = {
    "A100": Gpu(2.04e12, 312e12),  # 80 GB SXM; BF16 rate, it has no FP8
    "H100": Gpu(
        3.02e12, 1979e12
    ),  # 80 GB SXM; bandwidth as measured (docs/performance: copy, read + write)
    "H200": Gpu(4.8e12, 1979e12),
    "B200": Gpu(8.0e12, 4500e12),
}


@dataclass(frozen=True)
class Cost:
    """Bytes read and floating-point operations of one part of the step."""

    part: str
    bytes: float
    flops: float


def distinct_experts(config: ModelConfig, batch: int) -> float:
    """Expected number of distinct routed experts that `batch` tokens use in one layer."""
    share = config.num_experts_per_tok / config.n_routed_experts
    return config.n_routed_experts * (1 - (1 - share) ** batch)


def decode_cost(
    config: ModelConfig,
    *,
    batch: int,
    context: int,
    fp8_weights: bool,
    kv_cache_dtype: str,
    index_cache_dtype: str,
    experts: float | None = None,
) -> list[Cost]:
    """Costs of one decode step by part; contexts count the token being decoded.

    experts: distinct routed experts that the step uses in a layer, the layers' mean; None: as
    many as uniform routing is expected to use.
    """
    if experts is None:
        experts = distinct_experts(config, batch)
    parts: dict[str, list[float]] = {}
    for name, spec in tensor_table(config).items():
        part, used, per_token = _use(config, name, batch, experts)
        total = parts.setdefault(part, [0.0, 0.0])
        total[0] += spec_bytes(spec, fp8_weights) * used
        total[1] += 2.0 * math.prod(spec.shape) * per_token * batch
    attended = min(context, config.index_topk)
    layers = config.num_hidden_layers
    parts["latent cache"] = [
        float(layers * batch * attended * latent_bytes(config, kv_cache_dtype)),
        2.0
        * layers
        * batch
        * attended
        * config.num_attention_heads
        * (config.latent_dim + config.kv_lora_rank),
    ]
    if context > config.index_topk:
        indexers = sum(config.has_indexer(layer) for layer in range(layers))
        parts["indexer cache"] = [
            float(indexers * batch * context * index_bytes(config, index_cache_dtype)),
            2.0 * indexers * batch * context * config.index_n_heads * config.index_head_dim,
        ]
    return [Cost(part, *cost) for part, cost in parts.items()]


def _use(config: ModelConfig, name: str, batch: int, experts: float) -> tuple[str, float, float]:
    """(part, share of the tensor's bytes read, share of its elements that a token uses)."""
    if name == "model.embed_tokens.weight":
        return "embedding", batch / config.vocab_size, 0.0
    if name == "lm_head.weight":
        return "lm_head", 1.0, 1.0
    if ".experts." in name:
        read = experts / config.n_routed_experts
        return "routed experts", read, config.num_experts_per_tok / config.n_routed_experts
    if ".indexer." in name:
        return "indexer", 1.0, 1.0
    return ("attention" if ".self_attn." in name else "dense, shared, router, norms"), 1.0, 1.0


def spec_bytes(spec: TensorSpec, fp8: bool) -> int:
    """Bytes in the official layout: FP8 blocks with fp32 scales, fp32 gains, BF16 the rest."""
    count = math.prod(spec.shape)
    if spec.kind == "gain":
        return 4 * count
    if not (fp8 and spec.may_be_fp8):
        return 2 * count
    return count + 4 * math.prod(block_scale_shape(*spec.shape))


def step_seconds(costs: list[Cost], gpu: Gpu) -> float:
    """The roofline: the longer of bytes over bandwidth and FLOPs over peak."""
    return max(sum(c.bytes for c in costs) / gpu.bandwidth, sum(c.flops for c in costs) / gpu.flops)


def memory_seconds(costs: list[Cost], bandwidth: float) -> float:
    """The floor of a step that only memory holds up; bandwidth in bytes/s."""
    return sum(c.bytes for c in costs) / bandwidth
