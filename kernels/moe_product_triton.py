"""The experts' product: rows of a weight [ROWS, size] by tokens [BT, size], summed in fp32.

few tokens   tiles of 32 rows (`mma.sync`); each 128 columns' sum is scaled
many         64 and more (`wgmma`): one sum, counted in the scale of the columns that come next,
             and 64 columns at once, so that two programs fit a processor
"""

import triton
import triton.language as tl

from minidsv.kernels.gemm_triton import as_operand, as_unit


@triton.jit
def _load(w, x, valid, at, size, COLUMNS: tl.constexpr, EVEN: tl.constexpr):
    """Columns from `at` on of the weights and the tokens; EVEN: none is beyond `size`."""
    k = (at + tl.arange(0, COLUMNS))[None, :]
    if EVEN:
        weight = tl.load(w[:, None] + k)
        token = tl.load(x[:, None] + k, mask=valid[:, None], other=0.0)
    else:
        weight = tl.load(w[:, None] + k, mask=k < size, other=0.0)
        token = tl.load(x[:, None] + k, mask=(k < size) & valid[:, None], other=0.0)
    return weight, token


@triton.jit
def _few(
    w, x, valid, low, high, size, ROWS: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr,
    EVEN: tl.constexpr,
):  # fmt: skip
    acc = tl.zeros((ROWS, BT), dtype=tl.float32)
    is_low = tl.arange(0, ROWS) < ROWS // 2
    fp8: tl.constexpr = w.dtype.scalar.element_ty == tl.float8e4nv
    if fp8:
        scale_low, scale_high = tl.load(low), tl.load(high)
        last = (size - 1) // 128
    for start in range(0, size, BK):
        for part in tl.static_range(0, BK, 128):
            weight, token = _load(w, x, valid, start + part, size, 128, EVEN)
            if fp8:
                scale = tl.where(is_low, scale_low, scale_high)
                following = tl.minimum((start + part + 128) // 128, last)
                scale_low, scale_high = tl.load(low + following), tl.load(high + following)
                operand = as_operand(weight, token, False)
                acc += tl.dot(operand, tl.trans(token)) * scale[:, None]
            else:
                acc = tl.dot(weight, tl.trans(token), acc)
    return acc


@triton.jit
def _many(
    w, x, valid, low, high, size, ROWS: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr,
    EVEN: tl.constexpr,
):  # fmt: skip
    acc = tl.zeros((ROWS, BT), dtype=tl.float32)
    is_low = tl.arange(0, ROWS) < ROWS // 2
    fp8: tl.constexpr = w.dtype.scalar.element_ty == tl.float8e4nv
    if fp8:
        unit_low, unit_high = as_unit(tl.load(low)), as_unit(tl.load(high))
    for start in range(0, size, BK):
        if fp8:
            following = tl.minimum(start + BK, size - 1) // 128
            scale_low, scale_high = tl.load(low + following), tl.load(high + following)
        for part in tl.static_range(0, BK, 64):
            weight, token = _load(w, x, valid, start + part, size, 64, EVEN)
            acc = tl.dot(as_operand(weight, token, True), tl.trans(token), acc)
        if fp8:
            scale_low, scale_high = as_unit(scale_low), as_unit(scale_high)
            acc *= tl.where(is_low, unit_low / scale_low, unit_high / scale_high)[:, None]
            unit_low, unit_high = scale_low, scale_high
    if fp8:
        acc *= tl.where(is_low, unit_low, unit_high)[:, None]
    return acc


@triton.jit
def product(
    w, x, valid, low, high, size, ROWS: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr,
    EVEN: tl.constexpr,
):  # fmt: skip
    """w [ROWS] and x [BT] point to rows of `size` -> fp32 [ROWS, BT]; only `valid` x are read.

    FP8: `low` and `high` point to the block scales of the first and the second half of the rows,
    and BK divides 128 or, of few tokens, is a multiple of it.
    """
    if ROWS >= 64:
        acc = _many(w, x, valid, low, high, size, ROWS, BT, BK, EVEN)
    else:
        acc = _few(w, x, valid, low, high, size, ROWS, BT, BK, EVEN)
    return acc
