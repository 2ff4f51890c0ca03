"""Which of a tile of scores in registers are the K best: device functions of the selection.

Absent scores are NaN. The rest is mapped onto integers in the same order: first linearly, 2**26 to
a standard deviation, then, among those that this makes equal, by the bits of the number. A round
counts a bracket of integers in 32 bins, by ballots, and goes on within the bin that holds the K-th
best: two or three rounds for smooth scores, at most 13 for any. What is chosen depends on counts
alone, so it is exact; among equal scores the first by position are taken.
"""

import triton
import triton.language as tl

SIGMA = tl.constexpr(2.0**26)  # of the linear map
LIMIT = tl.constexpr(2**30)  # what lies farther out is taken for equal at first
FIRST_SHIFT = tl.constexpr(20)  # log2 of the first bins: 64 to a standard deviation
FIRST_HALF = tl.constexpr(16 << 20)  # half of the first bracket
LOWEST = tl.constexpr(-(2**31))
HIGHEST = tl.constexpr(2**31 - 1)


@triton.jit
def load_scores(scores, where, mask, n):
    """Scores of the first n positions, NaN as -inf, -0.0 as 0.0; NaN behind them."""
    x = tl.maximum(tl.load(scores + where, mask=mask, other=0.0), float("-inf"))
    return tl.where(where < n, tl.where(x == 0.0, 0.0, x), float("nan"))


@triton.jit
def order(x):
    """fp32 without NaN -> int32 of the same order."""
    bits = x.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _add_pairs(a, b, c, d):
    return a + c, b + d


@triton.jit
def linear_map(x, n):
    """Mean of the n scores in x, and integers to a unit: finite and positive, or 0."""
    seen = tl.where(tl.abs(x) < float("inf"), x, 0.0)
    first, second = tl.reduce((seen, seen * seen), 0, _add_pairs)
    mean = first / n
    variance = second / n - mean * mean
    usable = (variance > 1e-30) & (variance < 1e30)
    return mean, tl.where(usable, SIGMA / tl.sqrt(tl.where(usable, variance, 1.0)), 0.0)


@triton.jit
def mapped(x, mean, scale):
    """Integers of the order of x, several scores to one; LOWEST for the absent."""
    centred = tl.minimum(tl.maximum(x - mean, -3e38), 3e38) * scale
    units = tl.minimum(tl.maximum(centred, -1073741760.0), 1073741760.0)
    return tl.where(x == x, tl.where(x == x, units, 0.0).to(tl.int32), LOWEST)


@triton.jit
def bins(u, top, shift):
    """0 for u in (top - 2**shift, top] and above, 31 for the 32nd such interval and below."""
    below = (top - tl.minimum(u, top)).to(tl.uint32) >> shift.to(tl.uint32)
    return tl.minimum(below, 31).to(tl.int32)


@triton.jit
def find_bin(counts, k, slack):
    """The first bin up to which there are k, and whether there are at most `slack` more."""
    upto = tl.cumsum(counts, 0)
    code = tl.sum(tl.where(upto < k, 1, 0) + tl.where(upto <= k + slack, 64, 0), 0)
    return code & 63, (code >> 6) > (code & 63)


@triton.jit
def _descend(u, k, slack, top, shift, done):
    """Narrow (top - 2**shift, top], which holds the k-th best of u, to one number or until done."""
    while (shift > 0) & (done == 0):
        shift = tl.maximum(shift - 5, 0)
        bin, hit = find_bin(tl.histogram(bins(u, top, shift), 32), k, slack)
        top -= bin << shift
        done = hit.to(tl.int32)
    return top, shift, done


@triton.jit
def descend_linear(u, n, k, slack):
    """Of n > k mapped scores: the bracket of the k-th best, and whether k (+ slack) begin at it."""
    guess = tl.log((n - k) / k.to(tl.float32)) * SIGMA / 1.702  # were they logistic
    top = guess.to(tl.int32) + FIRST_HALF
    shift = tl.full((), FIRST_SHIFT, tl.int32)
    bin, hit = find_bin(tl.histogram(bins(u, top, shift), 32), k, slack)
    done = hit.to(tl.int32)
    if ((bin == 0) | (bin == 31)) & (done == 0):
        top, shift = tl.full((), LIMIT, tl.int32), tl.full((), 31, tl.int32)
    else:
        top -= bin << FIRST_SHIFT
    return _descend(u, k, slack, top, shift, done)


@triton.jit
def descend_bits(u, k):
    """The same for any integers below HIGHEST, k exactly."""
    top, shift = tl.full((), HIGHEST, tl.int32), tl.full((), 32, tl.int32)
    return _descend(u, k, 0, top, shift, tl.full((), 0, tl.int32))


@triton.jit
def places(chosen, BLOCK: tl.constexpr):
    """How many are chosen before each position.

    Four quarters' counts share a word within 32 lanes and 64 bits across the warps.
    """
    ones = tl.reshape(tl.where(chosen, 1, 0), (4, BLOCK // 4))
    quarter = tl.arange(0, 4)[:, None]
    lanes = tl.reshape(tl.sum(ones << (quarter * 8), 0), (BLOCK // 128, 32))
    sums = tl.sum(lanes, 1).to(tl.uint32).to(tl.int64)
    sums = (sums & 0xFF) | (sums & 0xFF00) << 8 | (sums & 0xFF0000) << 16 | (sums >> 24) << 48
    total = tl.sum(sums, 0)
    starts = (total << 16) + (total << 32) + (total << 48)
    before = tl.reshape(tl.cumsum(sums, 0) - sums + starts, (1, BLOCK // 128, 1))
    within = tl.reshape(tl.cumsum(lanes, 1), (1, BLOCK // 128, 32))
    quarter = tl.reshape(quarter, (4, 1, 1))
    place = ((before >> (quarter * 16)) & 0xFFFF).to(tl.int32) + ((within >> (quarter * 8)) & 0xFF)
    return tl.reshape(place, (BLOCK,)) - tl.reshape(ones, (BLOCK,))


@triton.jit
def choose(x, n, k, BLOCK: tl.constexpr):
    """Which of the n scores in x are the k best; their places."""
    u = tl.where(x == x, 1, 0)
    floor, ties = tl.full((), 1, tl.int32), tl.full((), LOWEST, tl.int32)
    if n > k:
        mean, scale = linear_map(x, n)
        u = mapped(x, mean, scale)
        top, shift, done = descend_linear(u, n, k, 0)
        if done == 0:
            u = tl.where(u == top, order(x), tl.where(u > top, HIGHEST, LOWEST))
            top, shift, done = descend_bits(u, k)
        floor = top - (1 << shift) + 1
        if done == 0:
            floor, ties = top + 1, top
    chosen = u >= floor
    if ties != LOWEST:
        equal = u == ties
        need = k - tl.sum(tl.where(chosen, 1, 0), 0)
        chosen |= equal & (places(equal, BLOCK) < need)
    return chosen, places(chosen, BLOCK)
