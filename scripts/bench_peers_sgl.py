"""sglang-kernel's kernels on the inputs of our operators, for `bench_peers.py`.

    flash_mla_with_kvcache           sparse attention over the 656-byte rows (FlashMLA)
    dsv3_router_gemm                 router, up to 16 tokens
    moe_fused_gate                   selection of experts, weights normalised
    fast_topk_transform_fused        the indexer's 2048 best, as slots
    sgl_per_token_group_quant_8bit   e4m3 in groups

Each takes what SGLang hands it in a decode step, made before: joined queries of 64 or 128 heads and
FlashMLA's plan, a table of slots by token. FlashMLA's time is of two launches, the attention and
the sum of its splits, as ours is. `dsv3_fused_a_gemm` has no row: it multiplies BF16 weights alone,
and the projections measured here are FP8.
"""

import os
from typing import Any

import torch
from torch import Tensor

from bench_inputs import Peer
from minidsv.kernels.constants import FP8_BLOCK, PAGE_SIZE
from minidsv.kernels.quant import E4M3_MAX
from minidsv.kernels.set_mla_kv_buffer import fp8_row_bytes

AMAX_FLOOR = 1e-10  # the one that the group quantisation takes


def sgl_kernel() -> Any:
    os.environ.setdefault("TRTLLM_ENABLE_PDL", "1")  # as SGLang does; read at the first launch
    import sgl_kernel

    return sgl_kernel


def flash_mla(
    q_latent: Tensor, q_pe: Tensor, kv_buffer: Tensor, topk_indices: Tensor, scale: float
) -> Peer:
    (tokens, heads, c), r, k = q_latent.shape, q_pe.shape[-1], topk_indices.shape[1]
    if kv_buffer.dtype != torch.uint8:
        wanted = f"{fp8_row_bytes(c, r)}-byte FP8 rows"
        raise ValueError(f"FlashMLA decodes over {wanted}, these are {kv_buffer.dtype}")
    sgl_kernel()
    from sgl_kernel import flash_mla as library

    padded = 64 if heads <= 64 else 128  # what it has kernels for; SGLang pads too
    q = q_latent.new_zeros(tokens, 1, padded, c + r)
    q[:, 0, :heads] = torch.cat((q_latent, q_pe), -1)
    pages = kv_buffer.view(-1, PAGE_SIZE, 1, kv_buffer.shape[1])
    slots = topk_indices.int().unsqueeze(1)
    lens = slots.new_full((tokens,), k)
    plan, splits = library.get_mla_metadata(lens, padded, 1, padded, is_fp8_kvcache=True, topk=k)
    unused_table = slots.new_empty(tokens, 0)

    def launch() -> Any:
        out, _ = library.flash_mla_with_kvcache(
            q, pages, unused_table, lens, c, plan, splits, softmax_scale=scale,
            is_fp8_kvcache=True, indices=slots,
        )  # fmt: skip
        return out

    return Peer("sgl_kernel.flash_mla_with_kvcache", launch, lambda: [launch()[:, 0, :heads]])


def router(x: Tensor, weight: Tensor) -> Peer:
    library = sgl_kernel()

    def launch() -> Any:
        return library.dsv3_router_gemm(x, weight, torch.float32)

    return Peer("sgl_kernel.dsv3_router_gemm", launch, lambda: [launch()])


def fused_gate(
    logits: Tensor,
    bias: Tensor,
    *,
    top_k: int,
    n_group: int,
    topk_group: int,
    norm_topk_prob: bool,
    routed_scaling_factor: float,
) -> Peer:
    if not norm_topk_prob:
        raise ValueError(f"moe_fused_gate always normalises, {norm_topk_prob=}")
    library = sgl_kernel()

    def launch() -> Any:
        return library.moe_fused_gate(
            logits, bias, n_group, topk_group, top_k, 0, routed_scaling_factor, True
        )

    return Peer("sgl_kernel.moe_fused_gate", launch, launch)


def topk(
    logits: Tensor,
    lens: Tensor,
    k: int,
    table: Tensor,
    rows: Tensor,
    tickets: Tensor | None = None,  # is ours alone
) -> Peer:
    """Where every row is visible whole; the best come in no order."""
    library = sgl_kernel()
    offsets = torch.arange(PAGE_SIZE, device=table.device)
    by_token = (table[rows].unsqueeze(-1) * PAGE_SIZE + offsets).flatten(1).int()
    lengths = lens.int()
    first = torch.arange(len(lens) + 1, device=lens.device, dtype=torch.int32)  # a query a row

    def launch() -> Any:
        return library.fast_topk_transform_fused(logits, lengths, by_token, first, k)

    def outputs() -> list[Tensor]:
        got, (slots, position) = launch(), by_token.sort()
        at = torch.searchsorted(slots, got).clamp_max(slots.shape[1] - 1)
        return [got.gather(1, position.gather(1, at).argsort())]

    name = "sgl_kernel.fast_topk_transform_fused"
    return Peer(name, launch, outputs, 1e-2)  # of equal scores it may take another


def group_quant(x: Tensor, group_size: int = FP8_BLOCK) -> Peer:
    library = sgl_kernel()
    codes = torch.empty_like(x, dtype=torch.float8_e4m3fn)
    scale = x.new_empty(len(x), x.shape[1] // group_size, dtype=torch.float32)

    def launch() -> None:
        library.sgl_per_token_group_quant_8bit(
            x, codes, scale, group_size, AMAX_FLOOR, -E4M3_MAX, E4M3_MAX
        )

    def outputs() -> list[Tensor]:
        launch()
        return [codes, scale]

    return Peer("sgl_kernel.sgl_per_token_group_quant_8bit", launch, outputs)
