"""Paged writes and reads of the latent (MLA) cache; this file alone knows the bytes of its rows.

One row a token: the normalised latent (`k_nope`, C = kv_lora_rank values) and the rotated, shared
`k_pe` (`k_rope`, r values). A buffer is [num_slots, row], slot = page * 64 + offset. Rows, for
DeepSeek's C = 512 and r = 64:

    float32, bfloat16   576 values
    fp8_flat (e4m3)     576 values over one scalar scale (the seed's `set_mla_kv_buffer_fp8_quant`,
                        SGLang PR 23965)
    fp8 (uint8)         656 bytes as FlashMLA's sparse decode reads them: 512 e4m3, then 4 fp32
                        scales (amax / 448 of each 128 channels), then 64 bf16 of k_pe, not
                        quantised

For another C, a multiple of 128, the fp8 row is C e4m3, 4 bytes of scale per 128 channels and 2
bytes per rope channel. Called by MLA (writes) and `sparse_mla` (reads).
"""

import torch
from torch import Tensor

from minidsv.kernels.constants import FP8_BLOCK
from minidsv.kernels.pdl import PdlMode, triton_mode
from minidsv.kernels.quant import E4M3_MAX, dequantize_groups, per_token_group_quant_fp8


def fp8_row_bytes(kv_lora_rank: int, rope_dim: int) -> int:
    """Bytes of one fp8 row: 656 for C = 512, r = 64."""
    assert kv_lora_rank % FP8_BLOCK == 0, (
        f"kv_lora_rank {kv_lora_rank} is not a multiple of {FP8_BLOCK}"
    )
    return kv_lora_rank + kv_lora_rank // FP8_BLOCK * 4 + rope_dim * 2


def set_mla_kv_buffer_ref(kv_buffer: Tensor, loc: Tensor, k_nope: Tensor, k_rope: Tensor) -> None:
    """kv_buffer[loc] = [k_nope | k_rope] in PyTorch; rows of one-byte dtypes are copied."""
    rows = torch.cat((k_nope, k_rope), -1).to(kv_buffer.dtype)
    if kv_buffer.element_size() == 1:  # PyTorch has no index_put for FP8
        kv_buffer, rows = kv_buffer.view(torch.uint8), rows.view(torch.uint8)
    kv_buffer[loc.long()] = rows


def set_mla_kv_buffer_fp8_quant_ref(
    kv_buffer: Tensor, loc: Tensor, k_nope: Tensor, k_rope: Tensor, scale: float = 1.0
) -> None:
    """The FP8 rows in PyTorch."""
    if not len(loc):  # views of empty tensors have no strides
        return
    if kv_buffer.dtype == torch.float8_e4m3fn:
        row = torch.cat((k_nope, k_rope), -1).float() / scale
        bytes_ = row.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn).view(torch.uint8)
    else:
        latent, scales = per_token_group_quant_fp8(k_nope)
        rope = k_rope.to(torch.bfloat16).contiguous()
        bytes_ = torch.cat([part.view(torch.uint8) for part in (latent, scales, rope)], -1)
    kv_buffer.view(torch.uint8)[loc.long()] = bytes_


def assert_rows(kv_buffer: Tensor, loc: Tensor, k_nope: Tensor, k_rope: Tensor, width: int) -> None:
    """loc [T], k_nope [T, C], k_rope [T, r] of one dtype, rows of `width` in the buffer."""
    assert loc.dim() == 1, f"loc {tuple(loc.shape)} is not [T]"
    assert loc.dtype in (torch.int32, torch.int64), f"loc {loc.dtype} is not int32 or int64"
    assert k_nope.shape[:-1] == k_rope.shape[:-1] == loc.shape, (
        f"k_nope {tuple(k_nope.shape)}, k_rope {tuple(k_rope.shape)}: not [{len(loc)}, *]"
    )
    assert k_nope.dtype == k_rope.dtype, f"k_nope {k_nope.dtype}, k_rope {k_rope.dtype}"
    assert kv_buffer.dim() == 2, f"kv_buffer {tuple(kv_buffer.shape)} is not [num_slots, row]"
    assert kv_buffer.stride(1) == 1, f"kv_buffer strides {kv_buffer.stride()}: want contiguous rows"
    assert kv_buffer.shape[1] == width, (
        f"kv_buffer {tuple(kv_buffer.shape)} {kv_buffer.dtype}: its rows must hold {width}"
    )


def set_mla_kv_buffer(
    kv_buffer: Tensor, loc: Tensor, k_nope: Tensor, k_rope: Tensor, pdl: PdlMode | None = None
) -> None:
    """Write rows kv_buffer[loc] = [k_nope | k_rope].

    kv_buffer [num_slots, C + r] fp32 or bf16, or e4m3 or uint8 with keys of that dtype, which are
    copied; loc [T] int32 or int64, distinct; k_nope [T, C], k_rope [T, r], any strides. `pdl`:
    None runs the reference, a mode the Triton kernel in that mode (CPU tensors: the reference).
    """
    assert_rows(kv_buffer, loc, k_nope, k_rope, k_nope.shape[-1] + k_rope.shape[-1])
    assert kv_buffer.element_size() > 1 or kv_buffer.dtype == k_nope.dtype, (
        f"{kv_buffer.dtype} rows are copied, not quantised: k_nope is {k_nope.dtype}"
    )
    mode = triton_mode(kv_buffer, pdl)
    if mode is None:
        return set_mla_kv_buffer_ref(kv_buffer, loc, k_nope, k_rope)
    from minidsv.kernels.set_mla_kv_buffer_triton import copy_rows

    return copy_rows(kv_buffer, loc, k_nope, k_rope, mode)


def set_mla_kv_buffer_cost(tokens: int, row_bytes: int) -> tuple[int, int]:
    """Bytes (keys, rows, loc) of keys in the buffer's dtype; no FLOPs."""
    return tokens * (2 * row_bytes + 8), 0


def set_mla_kv_buffer_fp8_quant(
    kv_buffer: Tensor,
    loc: Tensor,
    k_nope: Tensor,
    k_rope: Tensor,
    scale: float = 1.0,
    pdl: PdlMode | None = None,
) -> None:
    """The same in FP8: an e4m3 buffer takes the flat row over `scale`, a uint8 one the fp8 row."""
    assert kv_buffer.dtype in (torch.float8_e4m3fn, torch.uint8), f"{kv_buffer.dtype=}"
    c, r = k_nope.shape[-1], k_rope.shape[-1]
    flat = kv_buffer.dtype == torch.float8_e4m3fn
    assert_rows(kv_buffer, loc, k_nope, k_rope, c + r if flat else fp8_row_bytes(c, r))
    mode = triton_mode(kv_buffer, pdl)
    if mode is None:
        return set_mla_kv_buffer_fp8_quant_ref(kv_buffer, loc, k_nope, k_rope, scale)
    from minidsv.kernels.set_mla_kv_buffer_triton import write_flat_rows, write_fp8_rows

    if flat:
        return write_flat_rows(kv_buffer, loc, k_nope, k_rope, scale, mode)
    return write_fp8_rows(kv_buffer, loc, k_nope, k_rope, mode)


def read_mla_kv_buffer(
    kv_buffer: Tensor, slots: Tensor, kv_lora_rank: int, scale: float = 1.0
) -> Tensor:
    """kv_buffer[slots] dequantised: slots [...] int64 -> fp32 [..., C + r]."""
    rows = kv_buffer.view(torch.uint8)[slots] if kv_buffer.element_size() == 1 else kv_buffer[slots]
    if kv_buffer.dtype == torch.float8_e4m3fn:
        return rows.view(torch.float8_e4m3fn).float() * scale
    if kv_buffer.dtype != torch.uint8:
        return rows.float()
    scale_bytes = kv_lora_rank // FP8_BLOCK * 4
    rope_bytes = rows.shape[-1] - kv_lora_rank - scale_bytes
    latent, scales, rope = rows.split((kv_lora_rank, scale_bytes, rope_bytes), -1)
    return torch.cat(
        (
            dequantize_groups(
                latent.view(torch.float8_e4m3fn), scales.contiguous().view(torch.float32)
            ),
            rope.contiguous().view(torch.bfloat16).float(),
        ),
        -1,
    )
