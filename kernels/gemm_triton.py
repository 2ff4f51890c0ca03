"""Triton GEMMs under `fused_linear`: y^T = w x^T on the tensor cores, weights as the first operand.

    narrow   up to 16 tokens or so: each warp sums its own 128 columns of a [BLOCK_N, KS * 128] tile
             (a batched dot), so that few rows a program suffice to fill the device; the warps'
             sums are added at the end; with NORM (segments_triton) x is normalised
    wide     more tokens: tiles of [BLOCK_N, BLOCK_M] outputs

FP8 weights become bf16 exactly, by integer arithmetic, and each 128 columns' sum is scaled in fp32.
In prefetch mode the first tiles of a program's weights are drawn into L2 before the wait.
"""

import triton
import triton.language as tl

from minidsv.kernels.launch import KernelSpec, pdl_begin, pdl_end
from minidsv.kernels.segments_triton import (
    WEIGHTS,
    Arguments,
    has_type,
    launch_rows,
    locate,
    operand,
    select,
    store,
)
from minidsv.kernels.tile import Tile


@triton.jit
def as_operand(w, x, PAIRS: tl.constexpr):
    """Weights in the type of x, exactly.

    e4m3 s eeee mmm, its sign copied to the byte above and moved up 4 bits, is a bf16 with masked
    exponent bits, 2^120 too small (0x7B80); subnormals too.

    PAIRS: convert two at a time, which is how a warpgroup's operand leaves shared memory, not four.
    """
    if w.dtype == tl.float8e4nv and x.dtype == tl.bfloat16:
        if PAIRS:
            return tl.inline_asm_elementwise(
                """{ .reg .b32 a, s, t; cvt.u32.u16 a, $1; prmt.b32 a, a, 0, 0x9180;
                shl.b32 a, a, 4; and.b32 a, a, 0x87F087F0;
                mov.b32 s, 0x7B807B80; mov.b32 t, 0x80008000; fma.rn.bf16x2 $0, a, s, t; }""",
                "=r,h", [w], dtype=tl.bfloat16, is_pure=True, pack=2,
            )  # fmt: skip
        return tl.inline_asm_elementwise(
            """{ .reg .b32 a, b, s, t; prmt.b32 a, $2, 0, 0x9180; prmt.b32 b, $2, 0, 0xB3A2;
            shl.b32 a, a, 4; and.b32 a, a, 0x87F087F0; shl.b32 b, b, 4; and.b32 b, b, 0x87F087F0;
            mov.b32 s, 0x7B807B80; mov.b32 t, 0x80008000;
            fma.rn.bf16x2 $0, a, s, t; fma.rn.bf16x2 $1, b, s, t; }""",
            "=r,=r,r", [w], dtype=tl.bfloat16, is_pure=True, pack=4,
        )  # fmt: skip
    return w.to(x.dtype)


@triton.jit
def draw(w, row, n, k_size, BLOCK_N: tl.constexpr, BYTES: tl.constexpr):
    """Prefetch to L2 the first BYTES (a power of two of 128-byte lines) of BLOCK_N rows."""
    SIZE: tl.constexpr = w.dtype.element_ty.primitive_bitwidth // 8
    rows = tl.minimum(row + tl.arange(0, BLOCK_N), n - 1).to(tl.int64)
    k = tl.minimum(tl.arange(0, BYTES // 128) * (128 // SIZE), k_size - 1)
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.b32 $0, 0;",
        "=r,l", [w + rows[:, None] * k_size + k[None, :]],
        dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def _outputs(row, n, token, m, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Where a tile from (token, row) on lies in an output [m, n], and whether it does."""
    tokens = (token + tl.arange(0, BLOCK_M))[:, None]
    rows = (row + tl.arange(0, BLOCK_N))[None, :]
    return tokens.to(tl.int64) * n + rows, (tokens < m) & (rows < n)


@triton.jit
def _narrow(
    w, s, x, norm, eps, row, n, m, k_size, x_stride,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, KS: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """[BLOCK_M, BLOCK_N] outputs of one program."""
    rows = (row + tl.arange(0, BLOCK_N))[None, :, None]
    tokens = tl.arange(0, BLOCK_M)[None, :, None]
    part = tl.arange(0, KS)[:, None, None]
    k = part * 128 + tl.arange(0, 128)[None, None, :]
    w += row.to(tl.int64) * k_size
    w += (rows - row) * k_size + k
    x += tokens * x_stride + k
    if NORM:
        update, total_out, gain, added = norm
        norm = (update + tokens * x_stride + k, total_out + tokens * k_size + k, gain + k, added)
    s += (row // 128) * tl.cdiv(k_size, 128) + part
    total = tl.zeros([KS, BLOCK_N, BLOCK_M], tl.float32)
    squares = tl.zeros([KS, BLOCK_M, 16], tl.float32)
    for k0 in range(0, k_size, KS * 128):
        tile = tl.load(w + k0, mask=(rows < n) & (k < k_size - k0), other=0.0)
        turn = k0 // (KS * 128)
        values, more = operand(x, norm, k0, tokens < m, k, k_size - k0, turn, NORM)
        if NORM:
            values = values.to(x.dtype.element_ty)
            squares += tl.sum(tl.reshape(more, [KS, BLOCK_M, 16, 8]), 3)
        sums = tl.dot(as_operand(tile, values, False), tl.permute(values, (0, 2, 1)))
        if tile.dtype == tl.float8e4nv:
            sums *= tl.load(s + k0 // 128, mask=part * 128 < k_size - k0, other=0.0)
        total += sums
    y = tl.trans(tl.sum(total, 0))
    if NORM:
        y *= tl.rsqrt(tl.sum(tl.sum(squares, 2), 0) / k_size + eps)[:, None]
    return y


@triton.jit(do_not_specialize=("m", "n0", "n1", "n2", "n3", "added"))
def _narrow_kernel(
    x, w0, w1, w2, w3, s0, s1, s2, s3, o0, o1, o2, o3, n0, n1, n2, n3, m, k_size, x_stride,
    update, total, gain, added, eps,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, OTHER_N: tl.constexpr, KS: tl.constexpr,
    NORM: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    MIXED: tl.constexpr = w0.dtype != w3.dtype
    slot, n, row = locate(tl.program_id(0), w0, w1, w2, w3, n0, n1, n2, n3, BLOCK_N, OTHER_N)
    w, s = select(slot, w0, w1, w2, w3, w0), select(slot, s0, s1, s2, s3, s0)
    main = has_type(slot, w0, w1, w2, w3, w0)
    norm = (update, total, gain, added)
    if PDL == "prefetch":
        draw(w, tl.where(main, row, 0), tl.where(main, n, 1), k_size, BLOCK_N, KS * 256)
        if NORM:
            draw(gain, 0, 1, k_size, 1, KS * 512)
    pdl_begin(PDL)
    if main:
        y = _narrow(
            w, s, x, norm, eps, row, n, m, k_size, x_stride, BLOCK_M, BLOCK_N, KS, NORM
        )  # fmt: skip
        at, mask = _outputs(row, n, 0, m, BLOCK_M, BLOCK_N)
        store(slot, o0, o1, o2, o3, at, y, mask)
    elif MIXED:
        v, t = select(slot, w0, w1, w2, w3, w3), select(slot, s0, s1, s2, s3, s3)
        z = _narrow(
            v, t, x, norm, eps, row, n, m, k_size, x_stride, BLOCK_M, OTHER_N, KS, NORM
        )  # fmt: skip
        z_at, z_mask = _outputs(row, n, 0, m, BLOCK_M, OTHER_N)
        store(slot, o0, o1, o2, o3, z_at, z, z_mask)
    pdl_end(PDL)


@triton.jit
def _wide(
    w, s, x, row, n, token, m, k_size, x_stride,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """[BLOCK_M, BLOCK_N] outputs from (token, row) on."""
    rows, tokens = tl.arange(0, BLOCK_N)[:, None], tl.arange(0, BLOCK_M)[:, None]
    k = tl.arange(0, BLOCK_K)[None, :]
    w += row.to(tl.int64) * k_size
    w += rows * k_size + k
    x += token.to(tl.int64) * x_stride
    x += tokens * x_stride + k
    s += (row // 128) * tl.cdiv(k_size, 128)
    total = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for k0 in range(0, k_size, BLOCK_K):
        tile = tl.load(w + k0, mask=(row + rows < n) & (k < k_size - k0), other=0.0)
        values = tl.load(x + k0, mask=(token + tokens < m) & (k < k_size - k0), other=0.0)
        if tile.dtype == tl.float8e4nv:
            sums = tl.dot(as_operand(tile, values, True), tl.trans(values))
            total += sums * tl.load(s + k0 // 128)
        else:
            total = tl.dot(as_operand(tile, values, True), tl.trans(values), total)
    return tl.trans(total)


@triton.jit(do_not_specialize=("m",))
def _wide_kernel(
    x, w0, w1, w2, w3, s0, s1, s2, s3, o0, o1, o2, o3, n0, n1, n2, n3, m, k_size, x_stride,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    MIXED: tl.constexpr = w0.dtype != w3.dtype
    slot, n, row = locate(tl.program_id(1), w0, w1, w2, w3, n0, n1, n2, n3, BLOCK_N, BLOCK_N)
    w, s = select(slot, w0, w1, w2, w3, w0), select(slot, s0, s1, s2, s3, s0)
    main = has_type(slot, w0, w1, w2, w3, w0)
    if PDL == "prefetch":
        draw(w, tl.where(main, row, 0), tl.where(main, n, 1), k_size, BLOCK_N, 256)
    pdl_begin(PDL)
    token = tl.program_id(0) * BLOCK_M
    if main:
        y = _wide(w, s, x, row, n, token, m, k_size, x_stride, BLOCK_M, BLOCK_N, BLOCK_K)
        at, mask = _outputs(row, n, token, m, BLOCK_M, BLOCK_N)
        store(slot, o0, o1, o2, o3, at, y, mask)
    elif MIXED:
        v, t = select(slot, w0, w1, w2, w3, w3), select(slot, s0, s1, s2, s3, s3)
        z = _wide(v, t, x, row, n, token, m, k_size, x_stride, BLOCK_M, BLOCK_N, BLOCK_K)
        z_at, z_mask = _outputs(row, n, token, m, BLOCK_M, BLOCK_N)
        store(slot, o0, o1, o2, o3, z_at, z, z_mask)
    pdl_end(PDL)


Sizes = dict[str, int]
ROWS = ("n0", "n1", "n2", "n3")


def narrow_sizes(tile: Tile) -> Sizes:
    """The narrow kernel's constants; rows of a second type come in sixteens."""
    sizes = {"BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "OTHER_N": 16}
    return {**sizes, "KS": tile.split}


def wide_sizes(tile: Tile) -> Sizes:
    return {"BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "BLOCK_K": tile.block_k}


def _spec(size: int, narrow: bool) -> KernelSpec:
    """Of weights of `size` bytes."""
    # the narrow kernel takes any numbers of rows, the wide one those that it finds in the models
    n = "i32" if narrow else "i32:16"
    sizes = narrow_sizes if narrow else wide_sizes

    def own(tile: Tile) -> Arguments:
        return {"m": "i32", "x_stride": "i32:16", **dict.fromkeys(ROWS, n), **sizes(tile)}

    rows = launch_rows(size, lambda t: t.narrow if narrow else t.wide, own, normed=narrow)
    constant = WEIGHTS | {"gain"} if narrow else WEIGHTS
    return KernelSpec(_narrow_kernel if narrow else _wide_kernel, rows, constant, fp_fusion=True)


NARROW = {size: _spec(size, narrow=True) for size in (1, 2)}
WIDE = {size: _spec(size, narrow=False) for size in (1, 2)}
SPECS = (*NARROW.values(), *WIDE.values())
