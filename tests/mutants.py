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
from minidsv import indexer
from minidsv.batch import StepBatch
from minidsv.engine_config import bundled_model
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
        patch.setattr(indexer, "topk_positions", rule)
        yield bundled_model()


def _with_tensor(folder: Path, name: str, change: Callable[[Tensor], Tensor]) -> Path:
    shutil.copytree(bundled_model(), folder)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    assert not torch.equal(tensors[name], change(tensors[name]))
    save_file({**tensors, name: change(tensors[name])}, file)
    return folder
