"""The pools: latent and indexer buffers of every layer, cut into the same pages."""

from dataclasses import dataclass

import torch
from torch import Tensor

from minidsv.config import ModelConfig
from minidsv.kernels.constants import PAGE_SIZE
from minidsv.kernels.index_cache import fp8_page_bytes
from minidsv.kernels.set_mla_kv_buffer import fp8_row_bytes

_FLOATS = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass
class KVCache:
    """Buffers of all layers; `kernels/` has the layouts."""

    latent: list[Tensor]  # per layer [num_pages * 64, row]
    index: list[
        Tensor | None
    ]  # per layer [num_pages, 64, D] or uint8 [num_pages, bytes]; None for shared layers

    @classmethod
    def allocate(
        cls,
        config: ModelConfig,
        num_pages: int,
        kv_dtype: str,
        index_dtype: str,
        device: torch.device,
    ) -> "KVCache":
        """Uninitialised pools (no operator reads a slot that was not written)."""
        row, row_dtype = _latent_row(config, kv_dtype)
        page, page_dtype = _index_page(config, index_dtype)
        return cls(
            [
                torch.empty(num_pages * PAGE_SIZE, row, dtype=row_dtype, device=device)
                for _ in range(config.num_hidden_layers)
            ],
            [
                torch.empty(num_pages, *page, dtype=page_dtype, device=device)
                if config.has_indexer(layer)
                else None
                for layer in range(config.num_hidden_layers)
            ],
        )


def _latent_row(config: ModelConfig, dtype: str) -> tuple[int, torch.dtype]:
    if dtype == "fp8":
        return fp8_row_bytes(config.kv_lora_rank, config.qk_rope_head_dim), torch.uint8
    if dtype == "fp8_flat":
        return config.latent_dim, torch.float8_e4m3fn
    return config.latent_dim, _FLOATS[dtype]


def _index_page(config: ModelConfig, dtype: str) -> tuple[tuple[int, ...], torch.dtype]:
    if dtype == "fp8":
        return (fp8_page_bytes(config.index_head_dim),), torch.uint8
    return (PAGE_SIZE, config.index_head_dim), _FLOATS[dtype]


def latent_bytes(config: ModelConfig, kv_dtype: str) -> int:
    """Bytes of one latent row (a token in one layer)."""
    row, dtype = _latent_row(config, kv_dtype)
    return row * dtype.itemsize


def index_bytes(config: ModelConfig, index_dtype: str) -> int:
    """Bytes of one indexer key (a token in one layer that owns an indexer)."""
    page, dtype = _index_page(config, index_dtype)
    return torch.Size(page).numel() * dtype.itemsize // PAGE_SIZE


def bytes_per_token(config: ModelConfig, kv_dtype: str, index_dtype: str) -> int:
    """Cache bytes that one token takes over all layers."""
    indexers = sum(config.has_indexer(layer) for layer in range(config.num_hidden_layers))
    return config.num_hidden_layers * latent_bytes(config, kv_dtype) + indexers * index_bytes(
        config, index_dtype
    )
