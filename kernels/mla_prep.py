"""The key side of MLA in one step: norm of the latent, RoPE of k_pe, write to the paged cache.

    kv_buffer[loc] = row(rms_norm(latent; gain, eps), rope(k_pe))      row: set_mla_kv_buffer.py

The norm and the rotation round to the inputs' dtype before the row is made, as the composition of
the three operators does. Called by MLA.
"""

import torch
from torch import Tensor

from minidsv.kernels.norm import rms_norm_ref
from minidsv.kernels.pdl import PdlMode, triton_mode
from minidsv.kernels.rope import apply_rope_ref, assert_angles
from minidsv.kernels.set_mla_kv_buffer import (
    assert_rows,
    fp8_row_bytes,
    set_mla_kv_buffer_fp8_quant_ref,
    set_mla_kv_buffer_ref,
)


def norm_rope_set_mla_kv_buffer_ref(
    kv_buffer: Tensor,
    loc: Tensor,
    latent: Tensor,
    gain: Tensor,
    eps: float,
    k_pe: Tensor,
    cos: Tensor,
    sin: Tensor,
    scale: float = 1.0,
) -> None:
    """norm_rope_set_mla_kv_buffer in PyTorch: the three operators one after another."""
    k_nope, k_rope = rms_norm_ref(latent, gain, eps), apply_rope_ref(k_pe, cos, sin, True)
    if kv_buffer.element_size() == 1:
        set_mla_kv_buffer_fp8_quant_ref(kv_buffer, loc, k_nope, k_rope, scale)
    else:
        set_mla_kv_buffer_ref(kv_buffer, loc, k_nope, k_rope)


def norm_rope_set_mla_kv_buffer(
    kv_buffer: Tensor,
    loc: Tensor,
    latent: Tensor,
    gain: Tensor,
    eps: float,
    k_pe: Tensor,
    cos: Tensor,
    sin: Tensor,
    scale: float = 1.0,
    pdl: PdlMode | None = None,
) -> None:
    """Write rows kv_buffer[loc] of tokens that are still to be normalised and rotated.

    kv_buffer as set_mla_kv_buffer (fp32, bf16) or set_mla_kv_buffer_fp8_quant (e4m3 over `scale`,
    uint8) have it; loc [T]; latent [T, C] and k_pe [T, r], last axis contiguous; gain [C] fp32;
    cos, sin fp32 [T, r / 2]. `pdl`: None runs the reference, a mode the Triton kernel.
    """
    c, r = latent.shape[-1], k_pe.shape[-1]
    width = fp8_row_bytes(c, r) if kv_buffer.dtype == torch.uint8 else c + r
    assert_rows(kv_buffer, loc, latent, k_pe, width)
    assert gain.shape == (c,), f"gain {tuple(gain.shape)} is not [{c}]"
    assert_angles(k_pe, cos, sin, r)
    mode = triton_mode(kv_buffer, pdl)
    if mode is None:
        return norm_rope_set_mla_kv_buffer_ref(
            kv_buffer, loc, latent, gain, eps, k_pe, cos, sin, scale
        )
    from minidsv.kernels.mla_prep_triton import write_rows

    return write_rows(kv_buffer, loc, latent, gain, eps, k_pe, cos, sin, scale, mode)


def norm_rope_set_mla_kv_buffer_cost(
    tokens: int, c: int, r: int, row_bytes: int, itemsize: int = 2
) -> tuple[int, int]:
    """Bytes (inputs, rows, gain, loc, cos and sin) and FLOPs."""
    return tokens * ((c + r) * itemsize + row_bytes + 8 + 4 * r) + 4 * c, tokens * (4 * c + 3 * r)
