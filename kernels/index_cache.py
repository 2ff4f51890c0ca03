"""Paged writes and reads of the lightning indexer's keys; this file alone knows the bytes of its
pages.

    float32, bfloat16   [num_pages, 64, D]: one key a token
    fp8 (uint8)         [num_pages, 64 * (D + 4)], DeepGEMM's page: 64 keys of D e4m3, then their 64
                        fp32 scales (powers of two); for D = 128 a page is 8192 + 256 bytes. Keys
                        are rotated by the Hadamard matrix first.

Called by the indexer (writes) and `indexer_logits` (reads).
"""

import torch
from torch import Tensor

from minidsv.kernels.constants import PAGE_SIZE
from minidsv.kernels.quant import dequantize_groups, hadamard, per_token_group_quant_fp8


def fp8_page_bytes(index_head_dim: int) -> int:
    """Bytes of one fp8 page: 8448 for index_head_dim 128."""
    return PAGE_SIZE * (index_head_dim + 4)


def rotate_quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    """Hadamard, bf16, one power-of-two scale a row: x [..., D] -> e4m3 [..., D], [..., 1]."""
    rotated = hadamard(x).to(torch.bfloat16)
    return per_token_group_quant_fp8(rotated, group_size=x.shape[-1], ue8m0=True)


def set_index_k_buffer(buffer: Tensor, loc: Tensor, k: Tensor) -> None:
    """Write the keys k [T, D] to slots loc [T]; a uint8 buffer takes them rotated and quantised."""
    page, offset = loc.long() // PAGE_SIZE, loc.long() % PAGE_SIZE
    if buffer.dtype != torch.uint8:
        buffer[page, offset] = k.to(buffer.dtype)
        return
    keys, scales = _fp8_views(buffer, k.shape[-1])
    k8, scale = rotate_quantize(k)
    keys[page, offset] = k8.view(torch.uint8)
    scales[page, offset] = scale.squeeze(-1)


def read_index_k_buffer(buffer: Tensor, pages: Tensor, index_head_dim: int) -> Tensor:
    """All keys of `pages` [P] int64, dequantised: fp32 [P * 64, D]."""
    if buffer.dtype != torch.uint8:
        return buffer[pages].flatten(0, 1).float()
    keys, scales = _fp8_views(buffer[pages], index_head_dim)
    k8 = keys.contiguous().view(torch.float8_e4m3fn)
    return dequantize_groups(k8, scales.unsqueeze(-1)).flatten(0, 1)


def _fp8_views(buffer: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """uint8 [P, 64 * (D + 4)] viewed as keys uint8 [P, 64, D] and scales fp32 [P, 64]."""
    keys, scales = buffer[:, : PAGE_SIZE * dim], buffer[:, PAGE_SIZE * dim :]
    return keys.unflatten(-1, (PAGE_SIZE, dim)), scales.view(torch.float32)
