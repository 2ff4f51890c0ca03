"""Which of a tile of scores in registers are the K best: device functions of the selection.

The K-th best is searched in the bits of the scores, as integers of the same order: a pass counts
how many lie in each of 2048 bins, and the next divides the bin that holds the K-th best. Where
exactly K lie before a bin's end, those are the K best: for distinct scores mostly after two passes,
and after three there are no more bits. What is chosen depends on counts alone, so it is exact;
among equal scores the first by position are taken.
"""

import triton
import triton.language as tl

from minidsv.kernels.topk_count_triton import add, bits_a_pass, clear, find_bin

LOWEST = tl.constexpr(-(2**31))
HIGHEST = tl.constexpr(2**31 - 1)


@triton.jit
def load_scores(scores, where, mask, n):
    """Scores of the first n positions, NaN as -inf; NaN behind them."""
    x = tl.maximum(tl.load(scores + where, mask=mask, other=0.0), float("-inf"))
    return tl.where(where < n, x, float("nan"))


@triton.jit
def order(x):
    """fp32 -> int32 of the same order, -0.0 as 0.0; LOWEST for NaN."""
    bits = (x + 0.0).to(tl.int32, bitcast=True)
    return tl.where(x == x, bits ^ ((bits >> 31) & 0x7FFFFFFF), LOWEST)


@triton.jit
def bins_of(u, top, shift, BLOCK: tl.constexpr):
    """0 for u in (top - 2**shift, top] and above; the last bin for all below."""
    below = (top - tl.minimum(u, top)).to(tl.uint32) >> shift.to(tl.uint32)
    return tl.minimum(below, (1 << bits_a_pass(BLOCK)) - 1).to(tl.int32)


@triton.jit
def search(u, k, slack, space, BLOCK: tl.constexpr):
    """(kth, bound, found): the k best of u and up to `slack` more are above the bound, if found.

    Else kth is the k-th best, and the bound just below it.
    """
    kth, shift, found = tl.full((), HIGHEST, tl.int32), tl.full((), 32, tl.int32), k * 0
    while (shift > 0) & (found == 0):
        shift = tl.maximum(shift - bits_a_pass(BLOCK), 0)
        counters = add(clear(space, BLOCK), bins_of(u, kth, shift, BLOCK), BLOCK)
        bin, found = find_bin(counters, k, slack, BLOCK)
        kth -= bin << shift
    return kth, kth - (1 << shift), found


@triton.jit
def places(chosen, BLOCK: tl.constexpr):
    """How many are chosen before each position.

    Four quarters' counts share a word within 32 lanes and 64 bits across the warps.
    """
    ones = tl.reshape(tl.where(chosen, 1, 0), (4, BLOCK // 4))
    quarter = tl.arange(0, 4)[:, None]
    lanes = tl.reshape(tl.sum(ones << (quarter * 8), 0), (BLOCK // 128, 32))
    sums = tl.sum(lanes, 1).to(tl.int64)
    sums = (sums & 0xFF) | (sums & 0xFF00) << 8 | (sums & 0xFF0000) << 16 | (sums >> 24) << 48
    total = tl.sum(sums, 0)
    before = tl.cumsum(sums, 0) - sums + (total << 16) + (total << 32) + (total << 48)
    before = tl.reshape(before, (1, BLOCK // 128, 1))
    quarter = tl.reshape(quarter, (4, 1, 1))
    half = tl.where(quarter < 2, before.to(tl.int32), (before >> 32).to(tl.int32))
    start = (half >> (quarter % 2 * 16)) & 0xFFFF
    within = tl.reshape(tl.cumsum(lanes, 1) - lanes, (1, BLOCK // 128, 32))
    return tl.reshape(start + ((within >> (quarter * 8)) & 0xFF), (BLOCK,))


@triton.jit
def choose(x, n, k, space, BLOCK: tl.constexpr):
    """Which of the n scores in x are the k best; their places."""
    chosen = x == x
    if n > k:
        u = order(x)
        kth, bound, found = search(u, k, 0, space, BLOCK)
        chosen = u > bound
        if found == 0:
            equal = u == kth
            chosen = u > kth
            need = k - tl.sum(tl.where(chosen, 1, 0), 0)
            chosen |= equal & (places(equal, BLOCK) < need)
    return chosen, places(chosen, BLOCK)
