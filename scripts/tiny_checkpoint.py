"""The training model's weights in the official layout: FP8 blocks with scales, official names."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tiny_model import TinyDeepseek
from torch import Tensor

from minidsv.config import ModelConfig
from minidsv.kernels.constants import FP8_BLOCK
from minidsv.kernels.quant import dequantize_fp8_blocks, quantize_fp8_blocks

EXPERT = re.compile(r"(.*\.mlp)\.(experts\.(\d+)|shared_experts)\.(gate|up|down)_proj\.weight")
BF16_NAMES = ("embed_tokens.weight", "lm_head.weight", "mlp.gate.weight", "weights_proj.weight")


def official_tensors(model: TinyDeepseek) -> Iterator[tuple[str, Tensor]]:
    """(official name, float32 tensor on CPU); stacked experts come out one by one."""
    experts = model.cfg.n_routed_experts
    for name, tensor in model.state_dict().items():
        tensor = tensor.detach().float().cpu()
        stacked = re.match(r"layers\.\d+\.mlp\.(gate|up|down)_proj", name)
        if name.endswith("mlp.bias"):
            yield f"model.{name[:-4]}gate.e_score_correction_bias", tensor
        elif stacked and tensor.numel() > experts * model.cfg.hidden_size * FP8_BLOCK:
            head, tail = name.split(".mlp.")
            parts = tensor.chunk(experts + 1, 1 if tail.startswith("down") else 0)
            for index, part in enumerate(parts):
                owner = f"experts.{index}" if index < experts else "shared_experts"
                yield f"model.{head}.mlp.{owner}.{tail}", part
        else:
            yield (name if name.startswith("lm_head") else f"model.{name}"), tensor


def save_checkpoint(model: TinyDeepseek, path: Path) -> None:
    """Write `path` (safetensors) with the dtypes of the official FP8 repository."""
    tensors: dict[str, Tensor] = {}
    for name, tensor in official_tensors(model):
        if name.endswith(BF16_NAMES):
            tensors[name] = tensor.bfloat16()
        elif tensor.dim() == 2:
            tensors[name], tensors[f"{name}_scale_inv"] = quantize_fp8_blocks(tensor)
        else:
            tensors[name] = tensor
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({k: v.contiguous() for k, v in tensors.items()}, path, {"format": "pt"})


def read_dequantized(path: Path) -> dict[str, Tensor]:
    """Official names -> float32 tensors, FP8 weights multiplied by their scales."""
    tensors = load_file(path)
    plain: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name.endswith("_scale_inv"):
            continue
        scale = tensors.get(f"{name}_scale_inv")
        plain[name] = tensor.float() if scale is None else dequantize_fp8_blocks(tensor, scale)
    return plain


def load_checkpoint(folder_config: ModelConfig, path: Path) -> TinyDeepseek:
    """The training model with the weights of a checkpoint written by `save_checkpoint`."""
    model = TinyDeepseek(folder_config)
    state: dict[str, Tensor] = {}
    stacks: dict[str, list[tuple[int, Tensor]]] = {}
    for name, tensor in read_dequantized(path).items():
        expert = EXPERT.fullmatch(name)
        own = name.removeprefix("model.")
        if expert:
            order = int(expert[3]) if expert[3] else folder_config.n_routed_experts
            target = f"{expert[1].removeprefix('model.')}.{expert[4]}_proj.weight"
            stacks.setdefault(target, []).append((order, tensor))
        elif own.endswith("gate.e_score_correction_bias"):
            state[own.replace("gate.e_score_correction_bias", "bias")] = tensor
        else:
            state[own] = tensor
    for target, parts in stacks.items():
        ordered = [part for _, part in sorted(parts, key=lambda item: item[0])]
        state[target] = torch.cat(ordered, 1 if "down_proj" in target else 0)
    model.load_state_dict(state)
    return model
