"""FP8 (e4m3fn) quantisation: activations in groups, weights in 128x128 blocks, and the Hadamard
rotation.

    s = max(amax(|x|), 1e-4) / 448          one scale a group; ue8m0: rounded up to a power of two
    q = e4m3(clamp(x / s, -448, 448))       x is about q * s

Formats: DeepSeek-V3.2's `quantization_config` (fmt e4m3, dynamic, weight_block_size [128, 128]);
`weight_scale_inv` is a multiplier despite its name. Called by the cache writers, the indexer, the
FP8 linear and experts, and the loader.
"""

import functools
from typing import Literal

import torch
from torch import Tensor

from minidsv.kernels.constants import FP8_BLOCK
from minidsv.kernels.pdl import PdlMode, triton_mode

# What FP8 weights are multiplied with: x as it is, or e4m3 in groups of FP8_BLOCK columns a token.
Activations = Literal["none", "fp8", "fp8_ue8m0"]
E4M3_MAX = 448.0
AMAX_FLOOR = 1e-4


def round_scale_ue8m0(scale: Tensor) -> Tensor:
    """Smallest power of two >= `scale` (fp32, positive), by exponent bits: exact, unlike log2."""
    bits = scale.view(torch.int32)
    exponent = (bits >> 23) + ((bits & 0x7FFFFF) != 0).to(torch.int32)
    return (exponent << 23).view(torch.float32)


def _scales(amax: Tensor, ue8m0: bool) -> Tensor:
    scale = amax.clamp_min(AMAX_FLOOR) * (1.0 / E4M3_MAX)
    return round_scale_ue8m0(scale) if ue8m0 else scale


def _to_e4m3(x: Tensor) -> Tensor:
    return x.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)


def per_token_group_quant_fp8_ref(
    x: Tensor, group_size: int = FP8_BLOCK, ue8m0: bool = False
) -> tuple[Tensor, Tensor]:
    """per_token_group_quant_fp8 in PyTorch."""
    groups = x.float().unflatten(-1, (-1, group_size))  # [..., G, group_size]
    scale = _scales(groups.abs().amax(-1), ue8m0)
    return _to_e4m3(groups / scale.unsqueeze(-1)).flatten(-2), scale


def per_token_group_quant_fp8(
    x: Tensor, group_size: int = FP8_BLOCK, ue8m0: bool = False, pdl: PdlMode | None = None
) -> tuple[Tensor, Tensor]:
    """Quantise the last axis: x [..., D] -> e4m3 [..., D], fp32 [..., D / group_size].

    `pdl`: None runs the reference; a mode the Triton kernel in that mode, on x [T, D] with rows of
    any stride and a group_size that is a power of two.
    """
    assert x.shape[-1] % group_size == 0, (
        f"last axis {x.shape[-1]} is not a multiple of {group_size}"
    )
    mode = triton_mode(x, pdl)
    if mode is None:
        return per_token_group_quant_fp8_ref(x, group_size, ue8m0)
    from minidsv.kernels.quant_triton import quantize_groups

    return quantize_groups(x, group_size, ue8m0, mode)


def per_token_group_quant_fp8_cost(
    tokens: int, dim: int, group_size: int = FP8_BLOCK, itemsize: int = 2
) -> tuple[int, int]:
    """Bytes (x, e4m3, scales) and FLOPs."""
    return tokens * (dim * (itemsize + 1) + 4 * dim // group_size), 3 * tokens * dim


def dequantize_groups(q: Tensor, scale: Tensor) -> Tensor:
    """Inverse of `per_token_group_quant_fp8`: e4m3 [..., D], fp32 [..., G] -> fp32 [..., D]."""
    return (q.float().unflatten(-1, (scale.shape[-1], -1)) * scale.unsqueeze(-1)).flatten(-2)


def is_quantised(activations: Activations, columns: int) -> bool:
    """Whether operands of so many columns are e4m3; those of no whole groups stay as they are."""
    return activations != "none" and columns % FP8_BLOCK == 0


def rounded_to_fp8(x: Tensor, activations: Activations) -> Tensor:
    """x [T, D], or what of it FP8 activations keep, fp32."""
    if not is_quantised(activations, x.shape[-1]):
        return x
    return dequantize_groups(*per_token_group_quant_fp8_ref(x, ue8m0=activations == "fp8_ue8m0"))


def block_scale_shape(rows: int, cols: int) -> tuple[int, int]:
    """Shape of `weight_scale_inv` for a [rows, cols] weight; edge blocks are cut, not padded."""
    return -(-rows // FP8_BLOCK), -(-cols // FP8_BLOCK)


def quantize_fp8_blocks(weight: Tensor, ue8m0: bool = True) -> tuple[Tensor, Tensor]:
    """w [out, in] -> e4m3 [out, in], fp32 scales [ceil(out/128), ceil(in/128)]."""
    rows, cols = weight.shape
    grid_rows, grid_cols = block_scale_shape(rows, cols)
    padded = torch.zeros(grid_rows * FP8_BLOCK, grid_cols * FP8_BLOCK, device=weight.device)
    padded[:rows, :cols] = weight.float()
    blocks = padded.view(grid_rows, FP8_BLOCK, grid_cols, FP8_BLOCK)
    scale = _scales(blocks.abs().amax((1, 3)), ue8m0)
    quantized = _to_e4m3(blocks / scale[:, None, :, None]).view_as(padded)
    return quantized[:rows, :cols].contiguous(), scale


def dequantize_fp8_blocks(weight: Tensor, scale: Tensor) -> Tensor:
    """w8 [out, in] e4m3, scale [ceil(out/128), ceil(in/128)] -> fp32 [out, in]."""
    rows, cols = weight.shape
    assert tuple(scale.shape) == block_scale_shape(rows, cols), f"{scale.shape=} {weight.shape=}"
    full = _e4m3_over_256(weight)
    wide = (scale * 256.0).repeat_interleave(FP8_BLOCK, 1)[:, :cols]  # [ceil(out/128), in]
    whole = rows // FP8_BLOCK
    full[: whole * FP8_BLOCK].view(whole, FP8_BLOCK, cols).mul_(wide[:whole, None])
    full[whole * FP8_BLOCK :] *= wide[whole:]
    return full


def _e4m3_over_256(x: Tensor) -> Tensor:
    """x / 256 in fp32, exactly; the NaN codes, which the loader refuses, read as 480 / 256.

    An e4m3 number moved 7 bits up is an fp16 number whose exponent is biased by 8 less. On CPU this
    is 13 times as fast as torch 2.13's cast (README's machine, one thread).
    """
    bits = (x.view(torch.int8).to(torch.int16) << 7) & ~0x4000
    return bits.view(torch.float16).float()


@functools.cache
def hadamard_matrix(size: int) -> Tensor:
    """Sylvester's Hadamard matrix over sqrt(size): symmetric and orthogonal, fp32 [size, size]."""
    assert size & (size - 1) == 0, f"{size} is not a power of two"
    matrix = torch.ones(1, 1)
    while matrix.shape[0] < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix * size**-0.5


def hadamard(x: Tensor) -> Tensor:
    """Rotate the last axis (fp32): spreads outliers before FP8 and keeps dot products."""
    return x.float() @ hadamard_matrix(x.shape[-1]).to(x.device)
