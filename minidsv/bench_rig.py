"""What all measurements of a run share: one set of weights, one cache, the pages of each request.

The cache is filled without a prompt: every slot of the pool gets rows of N(0, 1) latents and keys,
distinct in every layer, through the operators that write rows. That is what prompts of random
weights leave there (latents are normalised, matrices are N(0, 1/fan_in)), it takes seconds where
prefilling 64 requests of 65,536 tokens takes minutes, and the time of a decode step depends on how
many rows it reads, not on what they say. `minidsv bench --wall` computes real prompts.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from minidsv.batch import StepBatch
from minidsv.bench_options import BenchOptions
from minidsv.bench_variants import operators, settle_variants
from minidsv.block_manager import pages_for
from minidsv.checkpoint import Weight
from minidsv.config import ModelConfig
from minidsv.engine import load_weights
from minidsv.engine_config import EngineConfig, model_path
from minidsv.errors import ConfigError
from minidsv.graph import context_bounds
from minidsv.kernels.constants import PAGE_SIZE
from minidsv.kernels.index_cache import set_index_k_buffer
from minidsv.kernels.set_mla_kv_buffer import set_mla_kv_buffer, set_mla_kv_buffer_fp8_quant
from minidsv.kv_cache import KVCache, bytes_per_token
from minidsv.model import DeepseekV32
from minidsv.resolve import resolve
from minidsv.threads import limit_threads

WARMUP = 8  # steps before those that are timed
FILL_PAGES = 128  # pages that are filled at a time


@dataclass
class Rig:
    """Models, in every variant and of any number of layers, and their requests."""

    config: EngineConfig  # resolved
    model: ModelConfig
    weights: dict[str, Weight]
    cache: KVCache
    pages: Tensor  # int64, all pages of the pool but the dummy, in the order of their use
    steps: int  # that a measurement decodes; 0: only graphs are captured, which need no pages
    variants: tuple[str, ...]  # to measure

    @classmethod
    def build(cls, config: EngineConfig, options: BenchOptions) -> "Rig":
        """Load, allocate, fill. Raises ConfigError, CheckpointError."""
        model = ModelConfig.from_path(model_path(config))
        config = resolve(config, model)
        device = torch.device(config.device)
        steps = 0 if options.subject == "graph" else WARMUP + options.timed_steps
        _check_lengths(config, options, steps)
        variants = settle_variants(config, options)
        if device.type == "cuda":
            torch.cuda.set_device(device)
        weights = load_weights(config, model)
        limit_threads(config.device, sum(weight.nbytes for weight in weights.values()))
        needed = 0
        if steps:
            needed = max(options.batches) * pages_for(max(options.contexts) + steps)
        cache = _allocate(config, model, needed + 1)
        generator = torch.Generator(device).manual_seed(config.seed)
        fill_cache(model, cache, generator)
        pages = torch.randperm(needed, generator=generator, device=device)
        return cls(config, model, weights, cache, pages, steps, variants)

    @property
    def device(self) -> torch.device:
        return torch.device(self.config.device)

    def describe(self) -> str:
        """One line: what model, in which types."""
        config, weights = self.config, "FP8" if self.fp8_weights else self.config.dtype
        return (
            f"{model_name(config)} on {config.device}: {weights} weights, latent cache "
            f"{config.kv_cache_dtype}, indexer cache {config.index_cache_dtype}, max_model_len "
            f"{config.max_model_len}"
        )

    def setting(self) -> dict[str, Any]:
        """What the numbers of a run hold for, for the JSON."""
        names = ("dtype", "kv_cache_dtype", "index_cache_dtype", "backend", "max_model_len")
        return {
            "model": model_name(self.config),
            "fp8_weights": self.fp8_weights,
            **{name: getattr(self.config, name) for name in names},
            "replays": max(0, self.steps - WARMUP),
        }

    @property
    def dummy_page(self) -> int:
        return len(self.pages)

    @property
    def fp8_weights(self) -> bool:
        return any(weight.scale is not None for weight in self.weights.values())

    def truncated(self, layers: int) -> ModelConfig:
        """The model's first `layers` layers."""
        return replace(
            self.model,
            num_hidden_layers=layers,
            first_k_dense_replace=min(self.model.first_k_dense_replace, layers),
            indexer_types=self.model.indexer_types[:layers],
        )

    def build_model(self, variant: str, layers: int) -> DeepseekV32:
        """A model over the shared weights and cache."""
        config = self.truncated(layers)
        return DeepseekV32(config, self.weights, self.cache, operators(self.config, variant))

    @property
    def bounds(self) -> tuple[int, ...]:
        """The largest contexts of the engine's paths."""
        assert self.config.max_model_len is not None
        return context_bounds(self.model.index_topk, self.config.max_model_len)

    def bound(self, context: int) -> int:
        """That of the path which holds a whole measurement."""
        return next(bound for bound in self.bounds if bound >= context + self.steps)

    def first_step(self, batch: int, context: int) -> StepBatch:
        """Each request decodes its first token as the context's last; tokens are random."""
        generator = torch.Generator().manual_seed(self.config.seed + batch)
        ids = torch.randint(self.model.vocab_size, (batch,), generator=generator)
        width = pages_for(context + self.steps)
        positions = torch.full((batch,), context - 1, device=self.device)
        table = torch.zeros(
            batch, pages_for(self.bound(context)), dtype=torch.int64, device=self.device
        )
        table[:, :width] = self.pages[: batch * width].view(batch, width)
        rows = torch.arange(batch, device=self.device)
        step = StepBatch(
            input_ids=ids.to(self.device),
            positions=positions,
            slot_mapping=torch.empty_like(positions),
            seq_lens=positions + 1,
            request_index=rows,
            block_table=table,
            logits_index=None,
            max_seq_len=self.bound(context),
        )
        place_rows(step)
        return step


def model_name(config: EngineConfig) -> str:
    """The model as it was given; the bundled one's folder."""
    return "configs/tiny" if config.model is None else config.model


def place_rows(step: StepBatch) -> None:
    """Make slot_mapping, in place, that of the rows' positions."""
    page = step.block_table[step.request_index, step.positions // PAGE_SIZE]
    step.slot_mapping.copy_(page * PAGE_SIZE + step.positions % PAGE_SIZE)


def _check_lengths(config: EngineConfig, options: BenchOptions, steps: int) -> None:
    assert config.max_model_len is not None
    longest = max(options.contexts, default=0)
    if longest + steps > config.max_model_len:
        after = f" and the {steps} tokens decoded after it" if steps else ""
        raise ConfigError(
            f"context: {longest}{after} are more than max_model_len {config.max_model_len}"
        )


def _allocate(config: EngineConfig, model: ModelConfig, pages: int) -> KVCache:
    device = torch.device(config.device)
    kv, index = config.kv_cache_dtype, config.index_cache_dtype
    try:
        return KVCache.allocate(model, pages, kv, index, device)
    except (RuntimeError, TypeError):  # torch's allocators; numbers that are none of its
        size = pages * PAGE_SIZE * bytes_per_token(model, kv, index)
        raise ConfigError(
            f"batch, context: the caches of the largest of them take {size / 1e9:.1f} GB, which do "
            "not fit beside the weights; give smaller ones"
        ) from None


def fill_cache(model: ModelConfig, cache: KVCache, generator: torch.Generator) -> None:
    """Write random rows and keys to every slot of every layer."""
    c, r, dim = model.kv_lora_rank, model.qk_rope_head_dim, model.index_head_dim
    slots, device = len(cache.latent[0]), cache.latent[0].device

    def random(count: int, width: int) -> Tensor:
        return torch.randn(count, width, generator=generator, device=device)

    for start in range(0, slots, FILL_PAGES * PAGE_SIZE):
        loc = torch.arange(start, min(start + FILL_PAGES * PAGE_SIZE, slots), device=device)
        for latent, index in zip(cache.latent, cache.index, strict=True):
            write = (
                set_mla_kv_buffer
                if latent.dtype in (torch.float32, torch.bfloat16)
                else set_mla_kv_buffer_fp8_quant
            )
            write(latent, loc, random(len(loc), c), random(len(loc), r))
            if index is not None:
                set_index_k_buffer(index, loc, random(len(loc), dim))
