"""RMSNorm and LayerNorm, in fp32, rounded once at the end.

    rms_norm:   y = x / sqrt(mean(x^2) + eps) * w
    layer_norm: y = (x - mean(x)) / sqrt(var(x) + eps) * w + b      (the indexer's k_norm, eps 1e-6)

`add_rms_norm` adds the residual in fp32 and normalises the unrounded sum (DeepSeek's demo). Called
by every layer. `pdl`: None runs the reference, a mode the Triton kernel in that mode.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from minidsv.kernels.pdl import PdlMode, triton_mode


class PreNorm(NamedTuple):
    """What a block reads, not normalised yet: rms_norm(out + residual)."""

    out: Tensor | None  # [T, D], the block before; None before the first
    residual: Tensor  # [T, D], the sum of those before it
    gain: Tensor  # [D]
    eps: float


def rms_norm_ref(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """rms_norm in PyTorch; any number of leading axes."""
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight.float()).to(
        x.dtype
    )


def add_rms_norm_ref(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """add_rms_norm in PyTorch."""
    total = x.float() + residual.float()
    return rms_norm_ref(total, weight, eps).to(residual.dtype), total.to(residual.dtype)


def layer_norm_ref(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """layer_norm in PyTorch; any number of leading axes."""
    return F.layer_norm(x.float(), x.shape[-1:], weight.float(), bias.float(), eps).to(x.dtype)


def _assert_vectors(x: Tensor, **vectors: Tensor) -> None:
    for name, vector in vectors.items():
        assert vector.shape == x.shape[-1:], (
            f"{name} {tuple(vector.shape)} does not fit x {tuple(x.shape)}"
        )


def rms_norm(x: Tensor, weight: Tensor, eps: float, pdl: PdlMode | None = None) -> Tensor:
    """x [T, D], rows of any stride; weight [D] -> [T, D] in x's dtype."""
    _assert_vectors(x, weight=weight)
    mode = triton_mode(x, pdl)
    if mode is None:
        return rms_norm_ref(x, weight, eps)
    from minidsv.kernels import norm_triton

    return norm_triton.rms_norm(x, weight, eps, mode)


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, pdl: PdlMode | None = None
) -> tuple[Tensor, Tensor]:
    """x, residual [T, D] -> (rms_norm(x + residual), x + residual), both in residual's dtype."""
    assert x.shape == residual.shape, f"x {tuple(x.shape)}, residual {tuple(residual.shape)}"
    _assert_vectors(x, weight=weight)
    mode = triton_mode(x, pdl)
    if mode is None:
        return add_rms_norm_ref(x, residual, weight, eps)
    from minidsv.kernels import norm_triton

    return norm_triton.add_rms_norm(x, residual, weight, eps, mode)


def assert_pre_norm(x: PreNorm) -> None:
    """out, if any, and residual [T, D] of one dtype, gain [D]."""
    _assert_vectors(x.residual, gain=x.gain)
    if x.out is not None:
        assert x.out.shape == x.residual.shape, (
            f"out {tuple(x.out.shape)}, residual {tuple(x.residual.shape)}"
        )
        assert x.out.dtype == x.residual.dtype, f"out {x.out.dtype}, residual {x.residual.dtype}"


def pre_norm(x: PreNorm, pdl: PdlMode | None = None) -> tuple[Tensor, Tensor]:
    """(the normalised sum, the sum: the next block's residual), both [T, D]."""
    if x.out is None:
        return rms_norm(x.residual, x.gain, x.eps, pdl), x.residual
    return add_rms_norm(x.out, x.residual, x.gain, x.eps, pdl)


def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, pdl: PdlMode | None = None
) -> Tensor:
    """x [T, D], rows of any stride; weight and bias [D] -> [T, D] in x's dtype."""
    _assert_vectors(x, weight=weight, bias=bias)
    mode = triton_mode(x, pdl)
    if mode is None:
        return layer_norm_ref(x, weight, bias, eps)
    from minidsv.kernels import norm_triton

    return norm_triton.layer_norm(x, weight, bias, eps, mode)


def norm_cost(tokens: int, dim: int, itemsize: int, operands: int = 2) -> tuple[int, int]:
    """Bytes and FLOPs of a norm that moves `operands` [T, D] tensors; add_rms_norm moves 4."""
    return operands * tokens * dim * itemsize + 4 * dim, 4 * tokens * dim
