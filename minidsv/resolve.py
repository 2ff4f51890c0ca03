"""`resolve`: settle every "auto" once, and refuse by name what cannot be done."""

from dataclasses import replace
from pathlib import Path

import torch

from minidsv.config import ModelConfig
from minidsv.engine_config import EngineConfig
from minidsv.errors import ConfigError
from minidsv.kernels.constants import FP8_BLOCK


def resolve(config: EngineConfig, model: ModelConfig) -> EngineConfig:
    """Settle every "auto" but num_pages (the runner's); raises ConfigError."""
    device = _device(config.device)
    on_cpu = device == "cpu"
    _refuse_unbuilt(config)
    fp8_keys = not on_cpu and torch.cuda.get_device_capability(device) >= (8, 9)
    auto_kv, auto_index = (
        ("float32",) * 2 if on_cpu else ("bfloat16", "fp8" if fp8_keys else "bfloat16")
    )
    max_model_len = config.max_model_len or model.max_position_embeddings
    resolved = replace(
        config,
        device=device,
        dtype=_auto(config.dtype, "float32" if on_cpu else "bfloat16"),
        kv_cache_dtype=_auto(config.kv_cache_dtype, auto_kv),
        index_cache_dtype=_auto(config.index_cache_dtype, auto_index),
        pdl="off",
        cuda_graph="off",
        backend="torch",
        max_model_len=max_model_len,
    )
    check_cache_dtypes(model, resolved.kv_cache_dtype, resolved.index_cache_dtype)
    if max_model_len > model.max_position_embeddings:
        raise ConfigError(
            f"max_model_len: {max_model_len} is more than the model's "
            f"max_position_embeddings {model.max_position_embeddings}"
        )
    return resolved


def _auto(value: str, default: str) -> str:
    return default if value == "auto" else value


def _device(name: str) -> str:
    if name == "auto":
        return "cuda:0" if torch.cuda.is_available() else "cpu"
    if name == "cpu":
        return name
    try:
        device = torch.device("cuda:0" if name == "cuda" else name)
    except RuntimeError:
        device = None
    if device is None or device.type != "cuda":
        raise ConfigError(f"device: {name!r} is not one of 'auto', 'cpu', 'cuda', 'cuda:N'")
    found = torch.cuda.device_count()
    if (device.index or 0) >= found:
        raise ConfigError(f"device: {name!r} asks for a CUDA device, and {found} are visible")
    return f"cuda:{device.index or 0}"


def _refuse_unbuilt(config: EngineConfig) -> None:
    for name, value, why in (
        ("pdl", "on", "the torch backend launches no kernels of ours; accepted: 'auto', 'off'"),
        ("cuda_graph", "on", "the torch backend cannot be captured; accepted: 'auto', 'off'"),
        ("backend", "flashinfer", "no operator uses it yet; accepted: 'auto', 'torch'"),
    ):
        if getattr(config, name) == value:
            raise ConfigError(f"{name}: {value!r} is not available: {why}")


def has_fp8_rows(model: ModelConfig) -> bool:
    """The latent splits into whole groups, each with a scale of its own."""
    return model.kv_lora_rank % FP8_BLOCK == 0


def has_fp8_index_keys(model: ModelConfig) -> bool:
    """An indexer key is one group: DeepGEMM's page holds one scale a key."""
    return model.index_head_dim == FP8_BLOCK


def check_cache_dtypes(model: ModelConfig, kv_cache_dtype: str, index_cache_dtype: str) -> None:
    """Raise ConfigError if this model's rows have no such layout."""
    if kv_cache_dtype == "fp8" and not has_fp8_rows(model):
        raise ConfigError(
            f"kv_cache_dtype: 'fp8' needs a kv_lora_rank that is a multiple of {FP8_BLOCK}, this "
            f"model has {model.kv_lora_rank}; accepted here: 'float32', 'bfloat16', 'fp8_flat'"
        )
    if index_cache_dtype == "fp8" and not has_fp8_index_keys(model):
        raise ConfigError(
            f"index_cache_dtype: 'fp8' needs index_head_dim {FP8_BLOCK}, this model has "
            f"{model.index_head_dim}; accepted here: 'float32', 'bfloat16'"
        )


def free_memory(device: str) -> int:
    """Bytes that the page pool may count on: free device memory, or what the host has available."""
    if device != "cpu":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(1024 * int(x.split()[1]) for x in lines if x.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return 16 << 30  # not Linux: assume a laptop's
