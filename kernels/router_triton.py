"""Triton kernel of the router's selection: one warp a token.

Orders scores as integers, so that NaN is the largest and ties go to the lowest index, and takes the
best group or expert as often as asked.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import next_power_of_2

from minidsv.kernels.launch import KernelSpec, Row, pdl_begin, pdl_end
from minidsv.kernels.pdl import PdlMode, is_interpreted


@triton.jit
def _order(x):
    """fp32 as integers of the same order; zeros are equal, NaN is the largest."""
    bits = (x + 0.0).to(tl.int32, bitcast=True)
    key = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return tl.where(x != x, 0x7FFFFFFF, key)


@triton.jit
def _first_largest(keys, index, NONE: tl.constexpr):
    """(largest key of a vector, lowest index that has it)."""
    best = tl.max(keys, 0)
    return best, tl.min(tl.where(keys == best, index, NONE), 0)


@triton.jit
def _sigmoid(x, EXACT: tl.constexpr):
    """With the exponential that PyTorch's kernels use, where it exists."""
    e = tl.extra.cuda.libdevice.exp(-x) if EXACT else tl.exp(-x)
    return tl.div_rn(1.0, 1.0 + e) if EXACT else 1.0 / (1.0 + e)


@triton.jit(do_not_specialize=("experts",))
def _grouped_topk_kernel(
    logits, bias, weights, ids, experts, factor,
    TOP_K: tl.constexpr, GROUPS: tl.constexpr, KEPT: tl.constexpr, NORM: tl.constexpr,
    SIZE: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_K: tl.constexpr,
    EXACT: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Experts lie as [groups, SIZE] in a block of [BLOCK_G, BLOCK_S]."""
    DEAD: tl.constexpr = -0x80000000  # below every number
    token = tl.program_id(0).to(tl.int64)
    g, s, j = tl.arange(0, BLOCK_G), tl.arange(0, BLOCK_S), tl.arange(0, BLOCK_K)
    expert = g[:, None] * SIZE + s[None, :]
    exists = (g < GROUPS)[:, None] & (s < SIZE)[None, :]
    if PDL == "prefetch":
        correction = tl.load(bias + expert, mask=exists, other=0.0)
        pdl_begin(PDL)
    else:
        pdl_begin(PDL)
        correction = tl.load(bias + expert, mask=exists, other=0.0)
    score = _sigmoid(tl.load(logits + token * experts + expert, mask=exists, other=0.0), EXACT)
    biased = score + correction
    key = tl.where(exists, _order(biased), DEAD)
    if GROUPS > 1:
        first = tl.max(key, 1)
        at = tl.min(tl.where(key == first[:, None], s[None, :], BLOCK_S), 1)
        rest = tl.where(s[None, :] == at[:, None], DEAD, key)
        second = tl.max(rest, 1)
        there = tl.min(tl.where(rest == second[:, None], s[None, :], BLOCK_S), 1)
        two = (s[None, :] == at[:, None]) | (s[None, :] == there[:, None])
        group_key = tl.where(g < GROUPS, _order(tl.sum(tl.where(two, biased, 0.0), 1)), DEAD)
        kept = g < 0
        for _ in tl.static_range(KEPT):
            _best, best_group = _first_largest(group_key, g, BLOCK_G)
            kept = kept | (g == best_group)
            group_key = tl.where(g == best_group, DEAD, group_key)
        dropped = -0x7F800001  # the order of -inf
        key = tl.where(exists & (kept[:, None] == 0), dropped, key)
    flat_key = tl.reshape(key, (BLOCK_G * BLOCK_S,))
    flat_score = tl.reshape(score, (BLOCK_G * BLOCK_S,))
    nobody: tl.constexpr = BLOCK_G * BLOCK_S
    index = tl.reshape(tl.where(exists, expert, nobody), (nobody,))
    chosen = tl.zeros((BLOCK_K,), dtype=tl.int32)
    weight = tl.zeros((BLOCK_K,), dtype=tl.float32)
    for i in tl.static_range(TOP_K):
        _best, best_expert = _first_largest(flat_key, index, nobody)
        hit = index == best_expert
        chosen = tl.where(j == i, best_expert, chosen)
        weight = tl.where(j == i, tl.sum(tl.where(hit, flat_score, 0.0), 0), weight)
        flat_key = tl.where(hit, DEAD, flat_key)
    if NORM:
        weight = tl.div_rn(weight, tl.sum(weight, 0) + 1e-20)
    tl.store(weights + token * TOP_K + j, weight * factor, mask=j < TOP_K)
    tl.store(ids + token * TOP_K + j, chosen.to(tl.int64), mask=j < TOP_K)
    pdl_end(PDL)


# (experts, top_k, n_group, topk_group): DeepSeek-V3.2, GLM-5, mini, the bundled model
SELECTIONS = ((256, 8, 8, 4), (256, 8, 1, 1), (64, 6, 1, 1), (8, 2, 4, 2))


def _selection(experts: int, top_k: int, n_group: int, topk_group: int, norm: bool) -> Any:
    size = experts // n_group
    return {
        "TOP_K": top_k, "GROUPS": n_group, "KEPT": topk_group, "NORM": int(norm), "SIZE": size,
        "BLOCK_G": next_power_of_2(n_group), "BLOCK_S": next_power_of_2(size),
        "BLOCK_K": next_power_of_2(top_k), "EXACT": int(not is_interpreted()),
    }  # fmt: skip


TOPK = KernelSpec(
    _grouped_topk_kernel,
    tuple(
        Row(
            {
                "logits": "*fp32:16", "bias": "*fp32:16", "weights": "*fp32:16", "ids": "*i64:16",
                "experts": "i32", "factor": "fp32", **_selection(*sizes, norm),
            },
            num_warps=1,
        )
        for sizes in SELECTIONS
        for norm in (True, False)
    ),
    frozenset(("bias",)),
)  # fmt: skip
SPECS = (TOPK,)


def select(
    logits: Tensor,
    bias: Tensor,
    top_k: int,
    n_group: int,
    topk_group: int,
    norm_topk_prob: bool,
    routed_scaling_factor: float,
    mode: PdlMode,
) -> tuple[Tensor, Tensor]:
    """logits and bias fp32 [T, E], [E] -> (weights fp32, ids int64) [T, top_k]."""
    for name, tensor in (("logits", logits), ("bias", bias)):
        assert tensor.is_contiguous(), f"{name} strides {tensor.stride()}"
        assert tensor.dtype == torch.float32, f"{name} {tensor.dtype}"
    (tokens, experts), device = logits.shape, logits.device
    weights = torch.empty((tokens, top_k), dtype=torch.float32, device=device)
    ids = torch.empty((tokens, top_k), dtype=torch.int64, device=device)
    args: dict[str, Any] = {"logits": logits, "bias": bias, "weights": weights, "ids": ids}
    args |= {"experts": experts, "factor": routed_scaling_factor}
    args |= _selection(experts, top_k, n_group, topk_group, norm_topk_prob)
    TOPK.launch((tokens,), mode, args, num_warps=1)
    return weights, ids
