"""`minidsv inspect`: what a checkpoint is, what its caches take, its roofline card."""

import math
from pathlib import Path

from rich.console import Console
from rich.table import Table

from minidsv.checkpoint import Checkpoint
from minidsv.config import ModelConfig
from minidsv.errors import ConfigError
from minidsv.kv_cache import bytes_per_token, index_bytes, latent_bytes
from minidsv.resolve import check_cache_dtypes, has_fp8_index_keys, has_fp8_rows
from minidsv.roofline import GPUS, decode_cost, distinct_experts, spec_bytes, step_seconds
from minidsv.tensor_table import tensor_table

_CACHES = [
    ("float32", "float32"),
    ("bfloat16", "bfloat16"),
    ("bfloat16", "fp8"),
    ("fp8", "fp8"),
    ("fp8_flat", "fp8"),
]


def show(
    path: Path,
    *,
    batch: int,
    context: int,
    gpu: str,
    weights: str,
    kv_cache_dtype: str,
    index_cache_dtype: str,
    console: Console,
) -> None:
    """Print the card; a folder's files are checked. Raises ConfigError, CheckpointError."""
    if gpu not in GPUS:
        raise ConfigError(f"gpu: {gpu!r} is not one of {sorted(GPUS)}")
    config = ModelConfig.from_path(path)
    if kv_cache_dtype == "auto":
        kv_cache_dtype = "fp8" if has_fp8_rows(config) else "bfloat16"
    if index_cache_dtype == "auto":
        index_cache_dtype = "fp8" if has_fp8_index_keys(config) else "bfloat16"
    check_cache_dtypes(config, kv_cache_dtype, index_cache_dtype)
    console.print(_summary(path, config), markup=False, highlight=False)
    if path.is_dir():
        count = len(Checkpoint(path, config).table)
        console.print(f"files: all {count} tensors are there, with the right shapes and dtypes\n")
    console.print(_caches(config))
    console.print(
        _card(config, batch, context, gpu, weights == "fp8", kv_cache_dtype, index_cache_dtype)
    )


def _summary(path: Path, c: ModelConfig) -> str:
    table = tensor_table(c)
    parameters = sum(math.prod(spec.shape) for spec in table.values())
    per_token = parameters - sum(
        math.prod(spec.shape) * (1 - c.num_experts_per_tok / c.n_routed_experts)
        for name, spec in table.items()
        if ".experts." in name
    )
    fp8, bf16 = (sum(spec_bytes(spec, mode) for spec in table.values()) for mode in (True, False))
    shared = c.indexer_types.count("shared")
    qk = f"{c.qk_nope_head_dim}/{c.qk_rope_head_dim}/{c.v_head_dim}"
    return f"""\
{path}: {c.model_type}
parameters: {parameters / 1e6:,.1f} M in {len(table)} tensors, {per_token / 1e6:,.1f} M a token
official layout: {fp8 / 1e9:.3f} GB as FP8, {bf16 / 1e9:.3f} GB as BF16 (without the MTP layer)
layers: {c.num_hidden_layers}, {c.first_k_dense_replace} dense, {shared} with a shared indexer
hidden {c.hidden_size}, vocabulary {c.vocab_size}, context {c.max_position_embeddings}
attention: {c.num_attention_heads} heads, nope/rope/v {qk}, latent {c.kv_lora_rank}
indexer: {c.index_n_heads} heads of {c.index_head_dim}, top {c.index_topk}
experts: {c.n_routed_experts} routed in {c.n_group} groups ({c.topk_group} kept), \
{c.num_experts_per_tok} a token, {c.n_shared_experts} shared"""


def _caches(config: ModelConfig) -> Table:
    table = Table(title="Cache bytes a token (kv_cache_dtype, index_cache_dtype)")
    for heading in ("latent", "indexer", "latent a layer", "indexer a layer", "all layers"):
        table.add_column(heading, justify="right")
    for kv, index in _CACHES:
        try:
            check_cache_dtypes(config, kv, index)
        except ConfigError:
            continue
        numbers = (
            latent_bytes(config, kv),
            index_bytes(config, index),
            bytes_per_token(config, kv, index),
        )
        table.add_row(kv, index, *(f"{n:,}" for n in numbers))
    return table


def _card(
    config: ModelConfig, batch: int, context: int, gpu: str, fp8: bool, kv: str, index: str
) -> Table:
    costs = decode_cost(
        config,
        batch=batch,
        context=context,
        fp8_weights=fp8,
        kv_cache_dtype=kv,
        index_cache_dtype=index,
    )
    peak = GPUS[gpu]
    seconds = step_seconds(costs, peak)
    table = Table(
        title=f"A decode step on {gpu} ({peak.bandwidth / 1e12:.2f} TB/s): batch {batch}, context "
        f"{context}, {'FP8' if fp8 else 'BF16'} weights, {kv} latent and {index} indexer cache",
        caption=f"floor {seconds * 1e6:,.0f} us a step, {batch / seconds:,.0f} tokens/s; "
        f"{distinct_experts(config, batch):.1f} distinct experts a layer (uniform routing)",
    )
    for heading in ("part", "MB", "GFLOP", "us at peak bandwidth"):
        table.add_column(heading, justify="left" if heading == "part" else "right")
    for cost in costs:
        table.add_row(
            cost.part,
            f"{cost.bytes / 1e6:,.2f}",
            f"{cost.flops / 1e9:,.2f}",
            f"{cost.bytes / peak.bandwidth * 1e6:,.1f}",
        )
    total = sum(c.bytes for c in costs), sum(c.flops for c in costs)
    table.add_row(
        "all",
        f"{total[0] / 1e6:,.2f}",
        f"{total[1] / 1e9:,.2f}",
        f"{total[0] / peak.bandwidth * 1e6:,.1f}",
    )
    return table
