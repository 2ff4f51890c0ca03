"""Rotary embedding of a model: plain or YaRN frequencies, cos and sin of positions."""

import math

import torch
from torch import Tensor

from minidsv.config import RopeConfig
from minidsv.kernels.pdl import PdlMode
from minidsv.kernels.rope import rope_cos_sin


def inv_freq(rope: RopeConfig, dim: int) -> Tensor:
    """Frequencies fp32 [dim / 2]; YaRN blends f_i and f_i / factor over a ramp (2309.00071)."""
    freq = 1.0 / rope.theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    if rope.factor is None:
        return freq

    def pair_that_turns(times: float) -> float:
        wavelength = rope.original_max_position_embeddings / (times * 2 * math.pi)
        return dim * math.log(wavelength) / (2 * math.log(rope.theta))

    low, high = pair_that_turns(rope.beta_fast), pair_that_turns(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    span = high - low if high != low else 0.001
    ramp = ((torch.arange(dim // 2, dtype=torch.float32) - low) / span).clamp(0, 1)
    return freq / rope.factor * ramp + freq * (1 - ramp)


class Rope:
    """cos and sin of a model's positions, computed a step at a time: no table of a long context."""

    def __init__(
        self, rope: RopeConfig, dim: int, device: torch.device, pdl: PdlMode | None = None
    ):
        self._inv_freq = inv_freq(rope, dim).to(device)
        self._scale, self._pdl = rope.cos_sin_scale, pdl

    def at(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin of positions [T], fp32 [T, dim / 2] each."""
        return rope_cos_sin(positions, self._inv_freq, self._scale, self._pdl)
