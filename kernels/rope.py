"""Rotary position embedding in its two layouts.

    interleaved (GPT-J): pairs (x[2i], x[2i+1])      MLA's q_pe and k_pe; the indexer of GLM
    half-split (NeoX):   pairs (x[i], x[i + D/2])    the indexer of DeepSeek
    (a, b) -> (a cos - b sin, a sin + b cos)

Angles are position * inv_freq in fp32 (the recipe of training; not fp64), the rotation is fp32, the
result is rounded once. Called by MLA, the indexer and, once a step, the model.
"""

import torch
from torch import Tensor

from minidsv.kernels.pdl import PdlMode, triton_mode


def rope_cos_sin_ref(positions: Tensor, inv_freq: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """rope_cos_sin in PyTorch."""
    angles = positions.float().unsqueeze(1) * inv_freq
    return angles.cos() * scale, angles.sin() * scale


def apply_rope_ref(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """apply_rope in PyTorch."""
    shape = (len(x), *[1] * (x.dim() - 2), cos.shape[1])
    cos, sin = cos.view(shape), sin.view(shape)
    wide = x.float()
    if interleaved:
        a, b = wide[..., 0::2], wide[..., 1::2]
        out = torch.stack((a * cos - b * sin, a * sin + b * cos), -1).flatten(-2)
    else:
        a, b = wide.chunk(2, -1)
        out = torch.cat((a * cos - b * sin, a * sin + b * cos), -1)
    return out.to(x.dtype)


def assert_angles(x: Tensor, cos: Tensor, sin: Tensor, rope_dim: int) -> None:
    """cos and sin must be fp32 [T, rope_dim / 2], contiguous; x [T, ...]."""
    for name, table in (("cos", cos), ("sin", sin)):
        assert (*table.shape[:-1], 2 * table.shape[-1]) == (len(x), rope_dim), (
            f"{name} {tuple(table.shape)} is not [{len(x)}, {rope_dim} / 2]"
        )
        assert table.dtype == torch.float32, f"{name} {table.dtype} is not fp32"
        assert table.is_contiguous(), f"{name} strides {table.stride()}: want contiguous"


def rope_cos_sin(
    positions: Tensor, inv_freq: Tensor, scale: float, pdl: PdlMode | None = None
) -> tuple[Tensor, Tensor]:
    """positions [T] int32 or int64 below 2^24, inv_freq fp32 [D / 2] -> cos, sin fp32 [T, D / 2].

    `scale` multiplies both (YaRN's attention factor).
    """
    assert positions.dim() == 1, f"positions {tuple(positions.shape)} is not [T]"
    assert inv_freq.dim() == 1, f"inv_freq {tuple(inv_freq.shape)} is not [D / 2]"
    assert inv_freq.dtype == torch.float32, f"inv_freq {inv_freq.dtype} is not fp32"
    mode = triton_mode(positions, pdl)
    if mode is None:
        return rope_cos_sin_ref(positions, inv_freq, scale)
    from minidsv.kernels import rope_triton

    return rope_triton.rope_cos_sin(positions, inv_freq, scale, mode)


def rope_cos_sin_cost(tokens: int, dim: int) -> tuple[int, int]:
    """Bytes (positions, frequencies, cos and sin) and FLOPs (the angles)."""
    return tokens * (8 + 4 * dim) + 2 * dim, tokens * dim // 2


def apply_rope(
    x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, pdl: PdlMode | None = None
) -> Tensor:
    """Rotate all of x's last axis: x [T, D] or [T, H, D], cos and sin [T, D / 2] fp32 -> like x."""
    assert x.dim() in (2, 3), f"x {tuple(x.shape)} is not [T, D] or [T, H, D]"
    assert_angles(x, cos, sin, x.shape[-1])
    mode = triton_mode(x, pdl)
    if mode is None:
        return apply_rope_ref(x, cos, sin, interleaved)
    from minidsv.kernels import rope_triton

    return rope_triton.apply_rope(x, cos, sin, interleaved, mode)


def apply_rope_cost(tokens: int, heads: int, dim: int, itemsize: int) -> tuple[int, int]:
    """Bytes (x, its result, cos and sin) and FLOPs."""
    return 2 * tokens * heads * dim * itemsize + 4 * tokens * dim, 3 * tokens * heads * dim
