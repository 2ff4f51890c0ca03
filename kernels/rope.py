"""Rotary position embedding in its two layouts.

    interleaved (GPT-J): pairs (x[2i], x[2i+1])      MLA's q_pe and k_pe; the indexer of GLM
    half-split (NeoX):   pairs (x[i], x[i + D/2])    the indexer of DeepSeek
    (a, b) -> (a cos - b sin, a sin + b cos)

Angles are position * inv_freq in fp32 (the recipe of training; not fp64), the rotation is fp32, the
result is rounded once. Called by MLA and the indexer.
"""

import torch
from torch import Tensor


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """Rotate all of x's last axis: x [T, ..., D], cos and sin [T, D / 2] fp32 -> like x."""
    shape = (x.shape[0], *[1] * (x.dim() - 2), -1)
    cos, sin = cos.view(shape), sin.view(shape)
    wide = x.float()
    if interleaved:
        a, b = wide[..., 0::2], wide[..., 1::2]
        out = torch.stack((a * cos - b * sin, a * sin + b * cos), -1).flatten(-2)
    else:
        a, b = wide.chunk(2, -1)
        out = torch.cat((a * cos - b * sin, a * sin + b * cos), -1)
    return out.to(x.dtype)
