"""Triton kernels of the router.

gemv   few tokens: a program holds its rows of the weight in registers, all of K, loaded before
       the wait, and multiplies one block of tokens after the other on CUDA cores
gemm   more: tensor cores, tiles of tokens and experts
topk   one warp a token: orders scores as integers, so that NaN is the largest and ties go to
       the lowest index, and takes the best group or expert as often as asked
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import cdiv, next_power_of_2

from minidsv.kernels.launch import KernelSpec, Row, pdl_begin, pdl_end
from minidsv.kernels.launch_config import launch_config
from minidsv.kernels.pdl import PdlMode, is_interpreted
from minidsv.kernels.tile import Tile
from minidsv.kernels.tiles_moe import GEMV_TOKENS, ROUTER_TILES


@triton.jit(do_not_specialize=("tokens", "experts"))
def _router_gemv_kernel(
    x, weight, out, tokens, experts, hidden,
    BN: tl.constexpr, BM: tl.constexpr, BLOCK_K: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    n = (tl.program_id(0) * BN + tl.arange(0, BN))[None, :]
    m, k = tl.arange(0, BM)[:, None], tl.arange(0, BLOCK_K)[None, None, :]  # [BM, BN, BLOCK_K]
    rows = weight + n.to(tl.int64)[:, :, None] * hidden + k
    there = (n < experts)[:, :, None] & (k < hidden)
    if PDL == "prefetch":
        w = tl.load(rows, mask=there, other=0.0)
        pdl_begin(PDL)
    else:
        pdl_begin(PDL)
        w = tl.load(rows, mask=there, other=0.0)
    w = w.to(tl.float32)
    for start in range(0, tokens, BM):
        token = (start + m).to(tl.int64)
        inside = (token < tokens)[:, :, None] & (k < hidden)
        row = tl.load(x + token[:, :, None] * hidden + k, mask=inside, other=0.0).to(tl.float32)
        logits = tl.sum(row * w, 2).to(out.dtype.element_ty)
        tl.store(out + token * experts + n, logits, mask=(token < tokens) & (n < experts))
    pdl_end(PDL)


@triton.jit(do_not_specialize=("tokens", "experts"))
def _router_gemm_kernel(
    x, weight, out, tokens, experts, hidden,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    m = tl.program_id(1) * BM + tl.arange(0, BM)
    n, k = tl.program_id(0) * BN + tl.arange(0, BN), tl.arange(0, BK)
    rows = weight + tl.minimum(n, experts - 1).to(tl.int64)[:, None] * hidden
    pdl_begin(PDL)
    lines = x + tl.minimum(m, tokens - 1).to(tl.int64)[:, None] * hidden
    acc = tl.zeros((BM, BN), dtype=tl.float32)
    for start in range(0, hidden, BK):
        inside = (start + k < hidden)[None, :]
        a = tl.load(lines + (start + k)[None, :], mask=inside, other=0.0)
        w = tl.load(rows + (start + k)[None, :], mask=inside, other=0.0)
        acc = tl.dot(a, tl.trans(w), acc, input_precision="ieee")
    tl.store(
        out + m.to(tl.int64)[:, None] * experts + n[None, :],
        acc.to(out.dtype.element_ty),
        mask=(m < tokens)[:, None] & (n < experts)[None, :],
    )
    pdl_end(PDL)


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


def _gemm_row(tile: Tile, out: str, block_k: int) -> Row:
    sizes = {"BM": tile.block_m, "BN": tile.block_n}
    sizes["BLOCK_K" if tile.block_k == 1 else "BK"] = block_k
    types: dict[str, str | int | float] = {
        "x": "*bf16:16", "weight": "*bf16:16", "out": f"*{out}:16", "tokens": "i32",
        "experts": "i32", "hidden": "i32:16",
    }  # fmt: skip
    return Row(types | sizes, tile.num_warps, tile.num_stages)


# (experts, top_k, n_group, topk_group): DeepSeek-V3.2, GLM-5, mini, the bundled model
SELECTIONS = ((256, 8, 8, 4), (256, 8, 1, 1), (64, 6, 1, 1), (8, 2, 4, 2))
HIDDEN_BLOCKS = (8192, 2048, 256)  # powers of two over the models' hidden sizes


def _selection(experts: int, top_k: int, n_group: int, topk_group: int, norm: bool) -> Any:
    size = experts // n_group
    return {
        "TOP_K": top_k, "GROUPS": n_group, "KEPT": topk_group, "NORM": int(norm), "SIZE": size,
        "BLOCK_G": next_power_of_2(n_group), "BLOCK_S": next_power_of_2(size),
        "BLOCK_K": next_power_of_2(top_k), "EXACT": int(not is_interpreted()),
    }  # fmt: skip


GEMV = KernelSpec(
    _router_gemv_kernel,
    tuple(
        _gemm_row(tile, out, block)
        for out in ("fp32", "bf16")
        for tile in ROUTER_TILES
        if tile.block_k == 1
        for block in HIDDEN_BLOCKS
    ),
    frozenset(("weight",)),
    fp_fusion=True,
)
GEMM = KernelSpec(
    _router_gemm_kernel,
    tuple(
        _gemm_row(tile, out, tile.block_k)
        for out in ("fp32", "bf16")
        for tile in ROUTER_TILES
        if tile.block_k > 1
    ),
    frozenset(("weight",)),
    fp_fusion=True,
)
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
SPECS = (GEMV, GEMM, TOPK)


def multiply(x: Tensor, weight: Tensor, out_dtype: torch.dtype, mode: PdlMode) -> Tensor:
    """x [T, hidden], weight [E, hidden] -> [T, E]."""
    for name, tensor in (("x", x), ("weight", weight)):
        assert tensor.is_contiguous(), f"{name} strides {tensor.stride()}"
    assert x.dtype == weight.dtype, f"x {x.dtype}, weight {weight.dtype}"
    (tokens, hidden), experts = x.shape, len(weight)
    out = torch.empty((tokens, experts), dtype=out_dtype, device=x.device)
    tile = launch_config("router_gemm", tokens, (hidden, experts))
    args: dict[str, Any] = {"x": x, "weight": weight, "out": out}
    args |= {"tokens": tokens, "experts": experts, "hidden": hidden}
    args |= {"BM": tile.block_m, "BN": tile.block_n}
    columns = cdiv(experts, tile.block_n)
    if tokens <= GEMV_TOKENS:
        grid: tuple[int, ...] = (columns if tokens else 0,)
        args["BLOCK_K"] = next_power_of_2(hidden)
        GEMV.launch(grid, mode, args, tile.num_warps, tile.num_stages)
    else:
        grid = (columns, cdiv(tokens, tile.block_m))
        GEMM.launch(grid, mode, args | {"BK": tile.block_k}, tile.num_warps, tile.num_stages)
    return out


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
