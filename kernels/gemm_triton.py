"""Triton GEMMs under `fused_linear`: y^T = w x^T on the tensor cores, weights as the first operand.

    narrow   up to 16 tokens or so: each warp sums its own 128 columns of a [BLOCK_N, KS * 128] tile
             (a batched dot), so that few rows a program suffice to fill the device; the warps'
             sums are added at the end
    wide     more tokens: tiles of [BLOCK_N, BLOCK_M] outputs, 64 columns at once, so that few
             converted weights lie in registers and more programs fit a processor

Program (., ., part) sums the `span` columns of its part; where there are several, outputs are
fp32 [parts, m, n], which parts_triton adds up. FP8 weights become bf16 exactly, by integer
arithmetic. The narrow kernel scales each 128 columns' sum in fp32; the wide one has registers for
one sum alone, which it counts in the scale of the columns that come next. In prefetch mode the
first tiles of a program's weights are drawn into L2 before the wait.
"""

from dataclasses import replace

import triton
import triton.language as tl

from minidsv.kernels.launch import KernelSpec, pdl_begin, pdl_end
from minidsv.kernels.segments_triton import (
    WEIGHTS,
    Arguments,
    has_type,
    launch_rows,
    locate,
    select,
    store,
)
from minidsv.kernels.tile import Tile
from minidsv.kernels.tiles_gemm import BF16_SOME


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
def as_unit(scale):
    """A block's scale as what a sum may be counted in: one below 2^-64 counts as 2^-64."""
    return tl.where(tl.abs(scale) < 2.0**-64, 2.0**-64, scale)


@triton.jit
def draw(w, row, n, first, k_size, BLOCK_N: tl.constexpr, BYTES: tl.constexpr):
    """Prefetch to L2 BYTES (a power of two of 128-byte lines) of BLOCK_N rows, from column `first`
    on."""
    SIZE: tl.constexpr = w.dtype.element_ty.primitive_bitwidth // 8
    rows = tl.minimum(row + tl.arange(0, BLOCK_N), n - 1).to(tl.int64)
    k = tl.minimum(first + tl.arange(0, BYTES // 128) * (128 // SIZE), k_size - 1)
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.b32 $0, 0;",
        "=r,l", [w + rows[:, None] * k_size + k[None, :]],
        dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def _outputs(part, row, n, token, m, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Where a tile from (token, row) on lies in an output [parts, m, n], and whether it does."""
    tokens = (token + tl.arange(0, BLOCK_M))[:, None]
    rows = (row + tl.arange(0, BLOCK_N))[None, :]
    return (part.to(tl.int64) * m + tokens) * n + rows, (tokens < m) & (rows < n)


@triton.jit
def _narrow(
    w, s, x, row, n, m, k_size, x_stride, first, span,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, KS: tl.constexpr,
):  # fmt: skip
    """[BLOCK_M, BLOCK_N] outputs of one program."""
    FP8: tl.constexpr = w.dtype.element_ty == tl.float8e4nv
    rows = tl.minimum(tl.arange(0, BLOCK_N), n - 1 - row)[None, :, None]
    tokens = tl.minimum(tl.arange(0, BLOCK_M), m - 1)[None, :, None]
    part = tl.arange(0, KS)[:, None, None]
    k = part * 128 + tl.arange(0, 128)[None, None, :]
    w += row.to(tl.int64) * k_size
    w += rows * k_size + k
    x += tokens * x_stride + k
    s += (row // 128) * tl.cdiv(k_size, 128) + part
    total = tl.zeros([KS, BLOCK_N, BLOCK_M], tl.float32)
    end = tl.minimum(first + span, k_size)
    if FP8:
        scale = tl.load(s + first // 128, mask=part * 128 < end - first, other=0.0)
    for k0 in range(first, end, KS * 128):
        tile = tl.load(w + k0, mask=k < end - k0, other=0.0)
        values = tl.load(x + k0, mask=k < end - k0, other=0.0)
        if FP8:
            after = k0 + KS * 128
            following = tl.load(s + after // 128, mask=part * 128 < end - after, other=0.0)
        sums = tl.dot(as_operand(tile, values, False), tl.permute(values, (0, 2, 1)))
        if FP8:
            sums *= scale
            scale = following
        total += sums
    return tl.trans(tl.sum(total, 0))


@triton.jit(do_not_specialize=("m", "n0", "n1", "n2", "n3"))
def _narrow_kernel(
    x, w0, w1, w2, w3, s0, s1, s2, s3, o0, o1, o2, o3, n0, n1, n2, n3, m, k_size, x_stride, span,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, OTHER_N: tl.constexpr, KS: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    MIXED: tl.constexpr = w0.dtype != w3.dtype
    slot, n, row = locate(tl.program_id(0), w0, w1, w2, w3, n0, n1, n2, n3, BLOCK_N, OTHER_N)
    w, s = select(slot, w0, w1, w2, w3, w0), select(slot, s0, s1, s2, s3, s0)
    main = has_type(slot, w0, w1, w2, w3, w0)
    part = tl.program_id(1)
    first = part * span
    if PDL == "prefetch":
        rows = tl.where(main, row, 0), tl.where(main, n, 1)
        draw(w, rows[0], rows[1], first, k_size, BLOCK_N, KS * 256)
    pdl_begin(PDL)
    if main:
        y = _narrow(w, s, x, row, n, m, k_size, x_stride, first, span, BLOCK_M, BLOCK_N, KS)
        at, mask = _outputs(part, row, n, 0, m, BLOCK_M, BLOCK_N)
        store(slot, o0, o1, o2, o3, at, y, mask)
    elif MIXED:
        v, t = select(slot, w0, w1, w2, w3, w3), select(slot, s0, s1, s2, s3, s3)
        z = _narrow(v, t, x, row, n, m, k_size, x_stride, first, span, BLOCK_M, OTHER_N, KS)
        z_at, z_mask = _outputs(part, row, n, 0, m, BLOCK_M, OTHER_N)
        store(slot, o0, o1, o2, o3, z_at, z, z_mask)
    pdl_end(PDL)


@triton.jit
def _wide(
    w, s, x, row, n, token, m, k_size, x_stride, first, span,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """[BLOCK_M, BLOCK_N] outputs from (token, row) on."""
    FP8: tl.constexpr = w.dtype.element_ty == tl.float8e4nv
    rows = tl.minimum(tl.arange(0, BLOCK_N), n - 1 - row)[:, None]
    tokens = tl.minimum(tl.arange(0, BLOCK_M), m - 1 - token)[:, None]
    k = tl.arange(0, 64)[None, :]
    w += row.to(tl.int64) * k_size
    w += rows * k_size + k
    x += token.to(tl.int64) * x_stride
    x += tokens * x_stride + k
    blocks = tl.cdiv(k_size, 128)
    s += (row // 128) * blocks
    if BLOCK_N > 128:
        s += rows // 128 * blocks
    total = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    end = tl.minimum(first + span, k_size)
    if FP8:
        unit = as_unit(tl.load(s + first // 128))
    for k0 in range(first, end, BLOCK_K):
        if FP8:
            following = as_unit(tl.load(s + tl.minimum(k0 + BLOCK_K, k_size - 1) // 128))
        for half in tl.static_range(BLOCK_K // 64):
            at = k0 + half * 64
            tile = tl.load(w + at, mask=k < end - at, other=0.0)
            values = tl.load(x + at, mask=k < end - at, other=0.0)
            total = tl.dot(as_operand(tile, values, True), tl.trans(values), total)
        if FP8:
            total *= unit / following
            unit = following
    if FP8:
        total *= unit
    return tl.trans(total)


@triton.jit(do_not_specialize=("m",))
def _wide_kernel(
    x, w0, w1, w2, w3, s0, s1, s2, s3, o0, o1, o2, o3, n0, n1, n2, n3, m, k_size, x_stride, span,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, OTHER_N: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    MIXED: tl.constexpr = w0.dtype != w3.dtype
    slot, n, row = locate(tl.program_id(1), w0, w1, w2, w3, n0, n1, n2, n3, BLOCK_N, OTHER_N)
    w, s = select(slot, w0, w1, w2, w3, w0), select(slot, s0, s1, s2, s3, s0)
    main = has_type(slot, w0, w1, w2, w3, w0)
    part = tl.program_id(2)
    first = part * span
    if PDL == "prefetch":
        rows = tl.where(main, row, 0), tl.where(main, n, 1)
        draw(w, rows[0], rows[1], first, k_size, BLOCK_N, 256)
    pdl_begin(PDL)
    token = tl.program_id(0) * BLOCK_M
    if main:
        y = _wide(
            w, s, x, row, n, token, m, k_size, x_stride, first, span, BLOCK_M, BLOCK_N, BLOCK_K
        )
        at, mask = _outputs(part, row, n, token, m, BLOCK_M, BLOCK_N)
        store(slot, o0, o1, o2, o3, at, y, mask)
    elif MIXED:
        v, t = select(slot, w0, w1, w2, w3, w3), select(slot, s0, s1, s2, s3, s3)
        z = _wide(
            v, t, x, row, n, token, m, k_size, x_stride, first, span, BLOCK_M, OTHER_N, BLOCK_K
        )
        z_at, z_mask = _outputs(part, row, n, token, m, BLOCK_M, OTHER_N)
        store(slot, o0, o1, o2, o3, z_at, z, z_mask)
    pdl_end(PDL)


def narrow_sizes(tile: Tile) -> dict[str, int]:
    """The narrow kernel's constants; rows of a second type come in sixteens."""
    sizes = {"BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "OTHER_N": 16}
    return {**sizes, "KS": tile.block_k // 128}


def wide_sizes(tile: Tile) -> dict[str, int]:
    """The wide kernel's constants; rows of a second type, wider, come as a warpgroup takes them."""
    sizes = {"BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "OTHER_N": 64}
    return {**sizes, "BLOCK_K": tile.block_k}


def _spec(size: int, narrow: bool) -> KernelSpec:
    """Of weights of `size` bytes. The narrow kernel takes any numbers of rows; the wide one those
    that it finds in the models, sixteens but for the experts of a small one."""
    sizes = narrow_sizes if narrow else wide_sizes
    n = dict.fromkeys(("n0", "n1", "n2", "n3"), "i32" if narrow else "i32:16")

    def own(tile: Tile) -> Arguments:
        return {"m": "i32", "x_stride": "i32:16", "span": "i32:16", **n, **sizes(tile)}

    rows = launch_rows(size, lambda t: t.narrow if narrow else t.wide + t.huge, own, normed=False)
    if not narrow:
        few = wide_sizes(BF16_SOME).items() | {("w0", "*bf16:16"), ("o0", "*fp32:16")}
        gates = [row for row in rows if few <= row.arguments.items()]
        rows += tuple(replace(row, arguments=row.arguments | {"n0": "i32"}) for row in gates)
    return KernelSpec(_narrow_kernel if narrow else _wide_kernel, rows, WEIGHTS, fp_fusion=True)


NARROW = {size: _spec(size, narrow=True) for size in (1, 2)}
WIDE = {size: _spec(size, narrow=False) for size in (1, 2)}
SPECS = (*NARROW.values(), *WIDE.values())
