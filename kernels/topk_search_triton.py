"""Which of a tile of scores in registers are the K best: device functions of the selection.

Absent scores are NaN. A round maps the scores linearly onto 16 bins, best first, counts how many
lie in each bin and before, and goes on within the bin that holds the K-th best; where exactly K
lie before a bin's end, those are the K best, whatever the map's rounding. About three rounds do for
smooth scores. Where six do not, the scores about the K-th are equal or nearly so, and the bits of
the numbers, which are in the same order, are searched instead, four a round. What is chosen depends
on counts alone, so it is exact; among equal scores the first by position are taken.
"""

import triton
import triton.language as tl

MAGIC = tl.constexpr(2.0**23)  # floats from here to twice this are integers, in their lowest bits
LAST = tl.constexpr(2.0**23 + 63)
ONES = tl.constexpr(0x1111111111111111)
EVEN = tl.constexpr(0x0F0F0F0F0F0F0F0F)
HALVES = tl.constexpr(0x80008000 - 2**32)  # bit 15 of both halves of a word
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
def upto(bins4, BLOCK: tl.constexpr):
    """How many of BLOCK bins4 (4 x 0..15) lie in each bin and before: [8], two counts a word.

    The 16 counts share 64 bits, 4 each for 8 scores, then 8 each, then 16.
    """
    ones = tl.full((BLOCK,), ONES, tl.int64) << bins4.to(tl.int64)
    eights = tl.sum(tl.reshape(ones, (2, 8, BLOCK // 16)), 1)
    even, odd = tl.sum(eights & EVEN, 0)[None, :], tl.sum((eights >> 4) & EVEN, 0)[None, :]
    word = tl.arange(0, 8)[:, None]
    part = tl.where(word < 4, even, odd) >> (word % 2 * 8 + word // 2 % 2 * 32).to(tl.int64)
    return tl.sum(part.to(tl.int32) & 0xFF00FF, 1)


@triton.jit
def find_bin(counts, k, slack):
    """The first bin up to which there are k, and whether there are at most `slack` more.

    Both halves of a word are compared at once: bit 15 of 2**15 + a - b says whether b <= a.
    """
    fewer = (HALVES + (k - 1) * 0x10001 - counts) >> 15 & 0x10001
    enough = (HALVES + (k + slack) * 0x10001 - counts) >> 10 & 0x200020
    code = tl.sum(fewer + enough, 0)
    code = (code & 0xFFFF) + (code >> 16)
    return code & 31, (code >> 5) > (code & 31)


@triton.jit
def _add_pairs(a, b, c, d):
    return a + c, b + d


@triton.jit
def quantile(x, n, k):
    """About the k-th best of n > k scores, were they logistic, and their deviation; finite."""
    seen = tl.where(tl.abs(x) < float("inf"), x, 0.0)
    first, second = tl.reduce((seen, seen * seen), 0, _add_pairs)
    mean = first / n
    variance = second / n - mean * mean
    usable = (variance > 1e-24) & (variance < 1e30)
    deviation = tl.sqrt(tl.where(usable, variance, 1.0))
    guess = mean + deviation * tl.log((n - k) / k.to(tl.float32)) / 1.702
    return tl.where(tl.abs(guess) < 1e30, guess, 0.0), deviation


@triton.jit
def scaled(x, guess, slope, start):
    """Where x lies on the bins: MAGIC + 4 x bin; NaN for the absent."""
    return tl.fma(x - guess, -slope, start)


@triton.jit
def bracket(x, guess, deviation, k, slack, BLOCK: tl.constexpr):
    """slope, start, end: `scaled(x, guess, slope, start) < end` for the k best of x, if found.

    Begins about `guess`; up to `slack` more will do.
    """
    width, slope = deviation / 24, 96 / deviation
    top = width * 8
    rounds, found = k * 0, k * 0
    start, end = MAGIC + 0.0 * width, MAGIC + 0.0 * width
    while (rounds < 6) & (found == 0):
        start = MAGIC + top * slope
        place = tl.maximum(tl.minimum(scaled(x, guess, slope, start), LAST), MAGIC)
        bin, hit = find_bin(upto(place.to(tl.int32, bitcast=True) & 60, BLOCK), k, slack)
        found = hit.to(tl.int32)
        rounds += 1
        upper = 4 * bin.to(tl.float32) - 0.5  # of the bin, for places are rounded
        end = tl.where(bin < 15, MAGIC + (upper + 4.5), float("inf"))
        top = (start - MAGIC - upper) * (width * 0.25)
        bottom = top - width
        if (found == 0) & (rounds < 6):
            if (bin > 0) & (bin < 15):  # within the bin, and a little beyond
                width *= 1 / 14
                slope *= 14
                top += width
            else:
                width *= 4
                slope *= 0.25
                top = tl.where(bin == 0, bottom + 15 * width, top + width)
    return slope, start, end, found


@triton.jit
def bins_of_bits(u, top, shift):
    """4 x bin of u: 0 for u in (top - 2**shift, top] and above, 60 for the 16th and below."""
    below = (top - tl.minimum(u, top)).to(tl.uint32) >> shift.to(tl.uint32)
    return tl.minimum(below, 15).to(tl.int32) * 4


@triton.jit
def search_bits(u, k, BLOCK: tl.constexpr):
    """The k-th best of integers below HIGHEST."""
    top, shift = tl.full((), HIGHEST, tl.int32), tl.full((), 32, tl.int32)
    while shift > 0:
        shift -= 4
        bin, _ = find_bin(upto(bins_of_bits(u, top, shift), BLOCK), k, 0)
        top -= bin << shift
    return top


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
def choose(x, n, k, BLOCK: tl.constexpr):
    """Which of the n scores in x are the k best; their places."""
    chosen = x == x
    if n > k:
        guess, deviation = quantile(x, n, k)
        slope, start, end, found = bracket(x, guess, deviation, k, 0, BLOCK)
        chosen = scaled(x, guess, slope, start) < end
        if found == 0:
            u = order(x)
            kth = search_bits(u, k, BLOCK)
            equal = u == kth
            chosen = u > kth
            need = k - tl.sum(tl.where(chosen, 1, 0), 0)
            chosen |= equal & (places(equal, BLOCK) < need)
    return chosen, places(chosen, BLOCK)
