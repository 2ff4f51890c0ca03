"""Deliberately broken engines: each context manager breaks one thing and yields a model folder."""

import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from builders import with_config
from minidsv.batch import StepBatch
from minidsv.engine_config import bundled_model
from minidsv.kernels import indexer_logits, mla_prep, topk
from minidsv.kernels.constants import PAGE_SIZE
from minidsv.kernels.index_cache import read_index_k_buffer
from minidsv.kernels.set_mla_kv_buffer import set_mla_kv_buffer_fp8_quant_ref
from minidsv.kernels.topk import topk_positions
from minidsv.runner import ModelRunner
from minidsv.scheduler import Chunk

Rule = Callable[[Tensor, Tensor, int], Tensor]


@contextmanager
def swapped_indexer_rope(folder: Path) -> Iterator[Path]:
    """The indexer's rotary pairs are taken from the wrong layout."""
    yield with_config(bundled_model(), folder, indexer_rope_interleave=True)


@contextmanager
def selected_plus_one(folder: Path) -> Iterator[Path]:
    """Every selected position is the one behind it."""

    def rule(logits: Tensor, seq_lens: Tensor, k: int) -> Tensor:
        found = topk_positions(logits, seq_lens, k)
        return torch.where(found < 0, found, (found + 1).minimum(seq_lens.unsqueeze(1) - 1))

    yield from _with_rule(rule)


@contextmanager
def padding_selected(folder: Path) -> Iterator[Path]:
    """A short row's padding selects the slot behind its last token."""

    def rule(logits: Tensor, seq_lens: Tensor, k: int) -> Tensor:
        found = topk_positions(logits, seq_lens, k)
        behind = seq_lens.unsqueeze(1).clamp_max(logits.shape[1] - 1)
        return torch.where(found < 0, behind, found)

    yield from _with_rule(rule)


@contextmanager
def stale_page(folder: Path) -> Iterator[Path]:
    """Reads of each request's second page see the page of a request beside it."""
    prepare = ModelRunner.prepare

    def broken(self: ModelRunner, chunks: Sequence[Chunk], rows: list[int]) -> StepBatch:
        step = prepare(self, chunks, rows)
        if step.block_table.shape[1] > 1:
            step.block_table[:, 1] = step.block_table[:, 1].roll(1)
        return step

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ModelRunner, "prepare", broken)
        yield bundled_model()


@contextmanager
def missing_fp8_scale(folder: Path) -> Iterator[Path]:
    """One projection's FP8 blocks are read without their scales."""
    name = "model.layers.2.self_attn.o_proj.weight_scale_inv"
    yield _with_tensor(folder, name, torch.ones_like)


@contextmanager
def dropped_router_bias(folder: Path) -> Iterator[Path]:
    """One layer chooses its experts without the correction bias."""
    yield _with_tensor(folder, "model.layers.3.mlp.gate.e_score_correction_bias", torch.zeros_like)


@contextmanager
def missing_index_scale(folder: Path) -> Iterator[Path]:
    """An fp8 index cache is read without its keys' scales."""

    def read(buffer: Tensor, pages: Tensor, dim: int) -> Tensor:
        damaged = buffer.clone()
        damaged[:, PAGE_SIZE * dim :].view(torch.float32).fill_(1.0)
        return read_index_k_buffer(damaged, pages, dim)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(indexer_logits, "read_index_k_buffer", read)
        yield bundled_model()


@contextmanager
def quantised_rope(folder: Path) -> Iterator[Path]:
    """The fp8 row's rotary part, which is bfloat16, goes through e4m3."""

    def write(buffer: Tensor, slots: Tensor, latent: Tensor, k_pe: Tensor, scale: float) -> None:
        coarse = k_pe.to(torch.float8_e4m3fn).to(k_pe.dtype)
        set_mla_kv_buffer_fp8_quant_ref(buffer, slots, latent, coarse, scale)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mla_prep, "set_mla_kv_buffer_fp8_quant_ref", write)
        yield bundled_model()


FP8_MUTANTS = (
    (missing_index_scale, "index_cache_dtype=fp8"),
    (quantised_rope, "kv_cache_dtype=fp8"),
)
MUTANTS = (
    swapped_indexer_rope,
    selected_plus_one,
    stale_page,
    missing_fp8_scale,
    dropped_router_bias,
    padding_selected,
)


def _with_rule(rule: Rule) -> Iterator[Path]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(topk, "topk_positions", rule)
        yield bundled_model()


def _with_tensor(folder: Path, name: str, change: Callable[[Tensor], Tensor]) -> Path:
    shutil.copytree(bundled_model(), folder)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    assert not torch.equal(tensors[name], change(tensors[name]))
    save_file({**tensors, name: change(tensors[name])}, file)
    return folder
