"""`resolve`: settle every "auto" once, and refuse by name what cannot be done."""

from dataclasses import replace
from pathlib import Path

import torch

from minidsv.backend import (
    Capability,
    device_name,
    settle_backend,
    settle_cuda_graph,
    settle_pdl,
)
from minidsv.config import ModelConfig
from minidsv.engine_config import EngineConfig
from minidsv.errors import ConfigError
from minidsv.kernels.constants import FP8_BLOCK
from minidsv.layers import FP8_ACTIVATION_TOKENS

FP8_CAPABILITY = (8, 9)


def resolve(config: EngineConfig, model: ModelConfig) -> EngineConfig:
    """Settle every "auto" but num_pages (the runner's); raises ConfigError."""
    device = _device(config.device)
    return settle(replace(config, device=device), model, _capability(device))


def settle(config: EngineConfig, model: ModelConfig, capability: Capability | None) -> EngineConfig:
    """`resolve` for a device whose CUDA compute capability is known; None stands for no CUDA."""
    on_cpu = config.device == "cpu"
    kv, index = ("float32",) * 2 if on_cpu else ("bfloat16",) * 2
    if capability is not None and capability >= FP8_CAPABILITY and has_fp8_index_keys(model):
        index = "fp8"
    resolved = replace(
        config,
        dtype=_auto(config.dtype, "float32" if on_cpu else "bfloat16"),
        kv_cache_dtype=_auto(config.kv_cache_dtype, kv),
        index_cache_dtype=_auto(config.index_cache_dtype, index),
        max_model_len=config.max_model_len or model.max_position_embeddings,
    )
    _check_model_len(resolved, model)
    check_cache_dtypes(model, resolved.kv_cache_dtype, resolved.index_cache_dtype)
    if capability is not None and capability < FP8_CAPABILITY:
        resolved = _without_fp8(resolved, model, capability)
    if resolved.activations == "fp8":
        _check_fp8_activations(resolved, model)
    resolved = replace(resolved, backend=settle_backend(resolved, model, capability))
    return replace(
        resolved, pdl=settle_pdl(resolved, capability), cuda_graph=settle_cuda_graph(resolved)
    )


def _check_model_len(config: EngineConfig, model: ModelConfig) -> None:
    most = model.max_position_embeddings
    if config.max_model_len is not None and config.max_model_len > most:
        raise ConfigError(
            f"max_model_len: {config.max_model_len} is more than the model's "
            f"max_position_embeddings {most}"
        )


def _has_fp8_weights(config: EngineConfig, model: ModelConfig) -> bool:
    return config.quantization == "fp8" or (model.fp8_weights and config.quantization == "auto")


def _check_fp8_activations(config: EngineConfig, model: ModelConfig) -> None:
    """Refuse them where they would change nothing, and where decode steps would take them."""
    missing, least = None, FP8_ACTIVATION_TOKENS
    if not _has_fp8_weights(config, model):
        missing = f"FP8 weights, and with quantization {config.quantization!r} there are none"
    elif config.max_num_batched_tokens < least:
        found = config.max_num_batched_tokens
        missing = f"max_num_batched_tokens of at least {least}, and it is {found}"
    elif config.max_num_seqs >= least:  # a decode step has a token of each
        missing = f"max_num_seqs below {least}, and it is {config.max_num_seqs}"
    if missing is not None:
        raise ConfigError(f"activations: 'fp8' needs {missing}; accepted here: 'none'")


def _without_fp8(config: EngineConfig, model: ModelConfig, capability: Capability) -> EngineConfig:
    """Refuse FP8 weights and caches; FP8 tensors of a BF16 checkpoint are dequantised on load."""
    found = device_name(config.device, capability)
    if _has_fp8_weights(config, model):
        raise ConfigError(
            f"quantization: {config.quantization!r} keeps FP8 weights, which need capability 8.9, "
            f"and {found}; accepted here: 'none' (dequantised on load)"
        )
    for name in ("kv_cache_dtype", "index_cache_dtype"):
        if (value := getattr(config, name)).startswith("fp8"):
            raise ConfigError(
                f"{name}: {value!r} needs capability 8.9, and {found}; "
                "accepted here: 'auto', 'float32', 'bfloat16'"
            )
    return replace(config, quantization="none")


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


def _capability(device: str) -> Capability | None:
    if device == "cpu" or torch.version.hip:
        return None
    return torch.cuda.get_device_capability(device)


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
