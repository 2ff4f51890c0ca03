"""Which of a tile of scores in registers are the K best: device functions for `topk_triton`.

A bracket [low, high) is narrowed until the K-th best score is known:

    count(x >= low) >= K > count(x >= high)      done when the first is K, or low and high neighbour

Two pivots a round. They interpolate the bracket's ends, half a standard error of the rank to either
side, as long as that halves the scores in the bracket, and cut the fp32 numbers in it (as ordered
integers) in three otherwise: about 5 rounds for smooth scores, at most some 25 for any. What is
chosen depends on the counts alone, so it is exact: all scores from `high` on, and of those in the
bracket the first by position.
"""

import triton
import triton.language as tl

LOWEST = tl.constexpr(-2139095041)  # _order(-inf)
BEYOND = tl.constexpr(2139095041)  # _order(inf) + 1: a NaN, which no score reaches


@triton.jit
def _order(x):
    """fp32 -> int32 of the same order; -0.0 lies just below 0.0."""
    bits = x.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _value(order):
    return (order ^ ((order >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _finite(x):
    return tl.abs(x) < float("inf")


@triton.jit
def _first_pivots(x, n, k):
    """Two values about the K-th best of n normally distributed scores, and their deviation."""
    seen = tl.where(_finite(x), x, 0.0)
    mean = tl.sum(seen, 0) / n
    deviation = tl.sqrt(tl.maximum(tl.sum(seen * seen, 0) / n - mean * mean, 0.0))
    quantile = mean + deviation * tl.log(tl.maximum(n - k, 1) / k.to(tl.float32)) / 1.702
    return quantile - 0.15 * deviation, quantile + 0.15 * deviation, deviation


@triton.jit
def _next_pivots(low, high, over, m, deviation, halved, rounds):
    """Of a bracket with m scores, `over` more than wanted from `low` on."""
    bottom, top = _value(low), _value(high)
    third = ((high - low).to(tl.uint32) // 3).to(tl.int32)
    a, b = _value(low + third), _value(high - third)
    step = deviation * rounds
    if _finite(bottom) & _finite(top):
        if halved:
            share = over / m.to(tl.float32)
            margin = (0.5 * tl.sqrt(m * share * (1 - share)) + 0.25) / m
            a = bottom + (top - bottom) * (share - margin)
            b = bottom + (top - bottom) * (share + margin)
    elif (rounds < 3) & _finite(bottom):
        a, b = bottom + 0.5 * step, bottom + 2 * step
    elif (rounds < 3) & _finite(top):
        a, b = top - 2 * step, top - 0.5 * step
    return a, b


@triton.jit
def _bracket(x, n, k):
    """low, high as ordered integers, count(x >= low) and count(x >= high), for n scores in x."""
    low, high = tl.full((), LOWEST, tl.int32), tl.full((), BEYOND, tl.int32)
    from_low, from_high = n, n * 0
    a, b, deviation = _first_pivots(x, n, k)
    rounds = n * 0
    while (from_low > k) & (high != low + 1):
        rounds += 1
        first = tl.where(a == a, _order(a), low)
        first = tl.minimum(tl.maximum(first, low + 1), high - 1)
        second = tl.minimum(tl.maximum(_order(b), first), high - 1)
        pair = tl.where(x >= _value(first), 1, 0) + tl.where(x >= _value(second), 65536, 0)
        counts = tl.sum(pair, 0)
        from_first, from_second = counts & 0xFFFF, (counts >> 16) & 0xFFFF
        before = from_low - from_high
        if from_second >= k:
            low, from_low = second, from_second
        elif from_first >= k:
            low, from_low, high, from_high = first, from_first, second, from_second
        else:
            high, from_high = first, from_first
        m = from_low - from_high
        a, b = _next_pivots(low, high, from_low - k, m, deviation, 2 * m <= before, rounds)
    return low, high, from_low, from_high


@triton.jit
def _places(chosen, BLOCK: tl.constexpr):
    """How many are chosen before each position.

    The halves' counts share a word; sums of 32 lanes first, so that few cross the warps.
    """
    ones = tl.reshape(tl.where(chosen, 1, 0), (2, BLOCK // 2))
    half = tl.arange(0, 2)[:, None]
    pairs = tl.reshape(tl.sum(ones << (half * 16), 0), (BLOCK // 64, 32))
    sums = tl.sum(pairs, 1)
    before = tl.cumsum(sums, 0) - sums
    pairs = tl.reshape(tl.cumsum(pairs, 1) + before[:, None], (1, BLOCK // 2))
    first = tl.sum(sums, 0) & 0xFFFF
    return tl.reshape(((pairs >> (half * 16)) & 0xFFFF) - ones + half * first, (BLOCK,))


@triton.jit
def choose(x, n, k, BLOCK: tl.constexpr):
    """Which of the n scores in x (then -inf) are the k best; their places."""
    low, high, from_low, from_high = _bracket(x, n, k)
    if (from_low > k) | (n <= k):  # some that are as good come too late, or are none
        ties = (x >= _value(low)) & ~(x >= _value(high))
        kept = _places(ties, BLOCK) < tl.minimum(n, k) - from_high
        x = tl.where(ties & ~kept, float("nan"), x)
    chosen = x >= _value(low)
    return chosen, _places(chosen, BLOCK)
