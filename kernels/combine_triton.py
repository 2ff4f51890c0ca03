"""Triton kernels that sum the splits of `sparse_mla`, and multiply a lone token's sum with W_UV.

    latent[t, h] = sum_s 2^lse[t, s, h] partial[t, s, h] / sum_s 2^lse[t, s, h]
    out[h]       = w_uv[h] latent[0, h]

The second kernel sums the splits again for each BLOCK_N outputs of a head (they come from L2); its
weights, which are all that it reads from memory, are loaded before the wait.
"""

import itertools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from minidsv.kernels.launch import KernelSpec, Row, pdl_ahead, pdl_begin, pdl_end
from minidsv.kernels.pdl import PdlMode
from minidsv.kernels.sparse_mla_triton import EMPTY
from minidsv.kernels.tiles_attention import COMBINE_WARPS, LONE, SPLITS

# Up to so many heads, all programs here fit beside the attention's, and some of what comes next.
FEW_HEADS = tl.constexpr(64)


@triton.jit
def _sum_splits(partial, lse, token, head, heads, splits, SPLIT: tl.constexpr, C: tl.constexpr):
    """The latent of one token and head, fp32 [C]; SPLIT >= splits."""
    s = tl.arange(0, SPLIT)
    row = (token * splits + s) * heads + head
    at = row[:, None] * C + tl.arange(0, C)[None, :]
    values = tl.load(partial + at, mask=s[:, None] < splits, other=0.0)
    log = tl.load(lse + row, mask=s < splits, other=EMPTY)
    weight = tl.exp2(log - tl.max(log, 0))
    share = weight / tl.sum(weight, 0)
    return tl.sum(values.to(tl.float32) * share[:, None], 0)


@triton.jit(do_not_specialize=["heads"])
def _combine_splits_kernel(
    partial, lse, out, heads, SPLIT: tl.constexpr, C: tl.constexpr, PDL: tl.constexpr
):  # fmt: skip
    head, token = tl.program_id(0), tl.program_id(1).to(tl.int64)
    pdl_begin(PDL)
    latent = _sum_splits(partial, lse, token, head, heads, SPLIT, SPLIT, C)
    at = (token * heads + head) * C + tl.arange(0, C)
    tl.store(out + at, latent.to(out.dtype.element_ty))
    pdl_end(PDL)


@triton.jit(do_not_specialize=["splits"])
def _combine_values_kernel(
    partial, lse, w, out, n, splits, w_head, w_row,
    BLOCK_N: tl.constexpr, SPLIT: tl.constexpr, C: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    head, heads = tl.program_id(1).to(tl.int64), tl.num_programs(1)
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    w += head * w_head + rows[:, None] * w_row + tl.arange(0, C)[None, :]
    if PDL == "prefetch":
        tile = tl.load(w, mask=rows[:, None] < n, other=0.0)
    if heads <= FEW_HEADS:
        pdl_ahead(PDL)
    pdl_begin(PDL, LATE=True)
    if PDL != "prefetch":
        tile = tl.load(w, mask=rows[:, None] < n, other=0.0)
    latent = _sum_splits(partial, lse, 0, head, heads, splits, SPLIT, C)
    latent = latent.to(tile.dtype).to(tl.float32)  # as absorb_v has it
    y = tl.sum(tile.to(tl.float32) * latent[None, :], 1)
    tl.store(out + head * n + rows, y.to(out.dtype.element_ty), mask=rows < n)
    pdl_end(PDL, LATE=True)


WIDTHS = (512, 128)  # C: DeepSeek-V3.2 and GLM-5; the bundled model


def _splits_rows() -> tuple[Row, ...]:
    arguments: dict[str, str | int | float] = dict.fromkeys(("partial", "out"), "*bf16:16")
    arguments |= {"lse": "*fp32:16", "heads": "i32"}
    return tuple(
        Row(arguments | {"SPLIT": s, "C": c}, COMBINE_WARPS)
        for s, c in itertools.product(SPLITS[1:], WIDTHS)
    )


def _values_rows() -> tuple[Row, ...]:
    arguments: dict[str, str | int | float] = dict.fromkeys(("partial", "w", "out"), "*bf16:16")
    arguments |= {"lse": "*fp32:16", "splits": "i32", "BLOCK_N": LONE.block_n, "SPLIT": LONE.split}
    arguments |= dict.fromkeys(("n", "w_head", "w_row"), "i32:16")
    return tuple(Row(arguments | {"C": c}, LONE.num_warps) for c in WIDTHS)


COMBINE = KernelSpec(_combine_splits_kernel, _splits_rows())
COMBINE_VALUES = KernelSpec(
    _combine_values_kernel, _values_rows(), frozenset({"w"}), fp_fusion=True
)
SPECS = (COMBINE, COMBINE_VALUES)


def combine(partial: Tensor, lse: Tensor, mode: PdlMode) -> Tensor:
    """partial [T, S, H, C], lse fp32 [T, S, H] -> [T, H, C]; S one of SPLITS."""
    tokens, splits, heads, c = partial.shape
    out = torch.empty(tokens, heads, c, dtype=partial.dtype, device=partial.device)
    args: dict[str, Any] = {"partial": partial, "lse": lse, "out": out, "heads": heads}
    COMBINE.launch((heads, tokens), mode, args | {"SPLIT": splits, "C": c}, COMBINE_WARPS)
    return out


def combine_values(partial: Tensor, lse: Tensor, w_uv: Tensor, mode: PdlMode) -> Tensor:
    """A lone token's partial [1, S, H, C], lse fp32 [1, S, H], w_uv [H, v, C] -> [1, H * v]."""
    (tokens, splits, heads, c), n = partial.shape, w_uv.shape[1]
    assert tokens == 1, f"{tokens} tokens: only a lone one's splits are folded into W_UV"
    out = torch.empty(1, heads * n, dtype=partial.dtype, device=partial.device)
    args: dict[str, Any] = {"partial": partial, "lse": lse, "w": w_uv, "out": out, "n": n}
    args |= {"splits": splits, "w_head": w_uv.stride(0), "w_row": w_uv.stride(1)}
    args |= {"BLOCK_N": LONE.block_n, "SPLIT": LONE.split, "C": c}
    COMBINE_VALUES.launch((-(-n // LONE.block_n), heads), mode, args, LONE.num_warps)
    return out
