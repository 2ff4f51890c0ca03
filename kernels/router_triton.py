"""Triton kernel of the router's selection: one warp a token.

Orders scores as integers, so that NaN is the largest and ties go to the lowest index, and takes the
best group or expert as often as asked. Pointers to scores are taken as unaligned: then a lane has
an expert of each group, and what is found of a group is in every lane. The bias follows the wait:
loaded before it, the compiler (3.6) takes the logits one after the other (3.6 us instead of 2.3).
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
def _value(key):
    """The number of an order."""
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _first_largest(keys, index, NONE: tl.constexpr):
    """(largest key of a vector, lowest index that has it)."""
    best = tl.max(keys, 0)
    return best, tl.min(tl.where(keys == best, index, NONE), 0)


@triton.jit
def _sigmoid(x, EXACT: tl.constexpr):
    """With the exponential that PyTorch's kernels use, where it exists.

    1 / y is rounded to the nearest by a Newton step, without div_rn's branch for each number.
    """
    y = 1.0 + (tl.extra.cuda.libdevice.exp(-x) if EXACT else tl.exp(-x))
    near = 1.0 / y
    return tl.where(y < 1e37, tl.fma(near, tl.fma(-y, near, 1.0), near), near)


@triton.jit(do_not_specialize=("experts",), do_not_specialize_on_alignment=("logits", "bias"))
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
    pdl_begin(PDL)
    logits += token * experts
    score = _sigmoid(tl.load(logits + expert, mask=exists, other=0.0), EXACT)
    biased = score + tl.load(bias + expert, mask=exists, other=0.0)
    key = tl.where(exists, _order(biased), DEAD)
    if GROUPS > 1:
        first = tl.max(key, 1)
        same = tl.sum(tl.where(key == first[:, None], 1, 0), 1)
        rest = tl.max(tl.where(key < first[:, None], key, DEAD), 1)
        two = _value(first) + _value(tl.where(same > 1, first, rest))
        group_key = tl.where(g < GROUPS, _order(two), DEAD)
        kept = g < 0
        for _ in tl.static_range(KEPT):
            _best, best_group = _first_largest(group_key, g, BLOCK_G)
            kept = kept | (g == best_group)
            group_key = tl.where(g == best_group, DEAD, group_key)
        dropped = -0x7F800001  # the order of -inf
        key = tl.where(exists & (kept[:, None] == 0), dropped, key)
    nobody: tl.constexpr = BLOCK_G * BLOCK_S
    key = tl.reshape(key, (nobody,))
    index = tl.reshape(tl.where(exists, expert, nobody), (nobody,))
    chosen = tl.zeros((BLOCK_K,), dtype=tl.int32)
    for i in tl.static_range(TOP_K):
        _best, best_expert = _first_largest(key, index, nobody)
        chosen = tl.where(j == i, best_expert, chosen)
        key = tl.where(index == best_expert, DEAD, key)
    real = j < TOP_K
    weight = tl.where(real, _sigmoid(tl.load(logits + chosen), EXACT), 0.0)
    if NORM:
        weight = tl.div_rn(weight, tl.sum(weight, 0) + 1e-20)
    tl.store(weights + token * TOP_K + j, weight * factor, mask=real)
    tl.store(ids + token * TOP_K + j, chosen.to(tl.int64), mask=real)
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
                "logits": "*fp32",
                "bias": "*fp32",
                "weights": "*fp32:16",
                "ids": "*i64:16",
                "experts": "i32",
                "factor": "fp32",
                **_selection(*sizes, norm),
            },
            num_warps=1,
        )
        for sizes in SELECTIONS
        for norm in (True, False)
    ),
)
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
