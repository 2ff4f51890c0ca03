"""Counters in shared memory: how many numbers lie in each of up to 2048 bins, and where the k-th.

In PTX, for Triton has no scatter into shared memory, and tl.histogram (3.6) takes 33 instructions a
number for 32 bins; in the interpreter with tl.histogram. `counters` are an address in the one, of
static shared memory, which Triton's metadata does not count, and the counts in the other: a kernel
makes `room` once, and a block clears them there, adds any number of times, and finds.
"""

import triton
import triton.language as tl

from minidsv.kernels.pdl import is_interpreted

PTX = tl.constexpr(not is_interpreted())


MOST_BITS = tl.constexpr(11)


@triton.constexpr_function
def bits_a_pass(block):
    """Of a bin's number: MOST_BITS, or for as many bins as there are numbers."""
    return min(block.bit_length() - 1, MOST_BITS)


@triton.constexpr_function
def _by_four(count, line):
    return [line.format(i, i + 1, i + 2, i + 3, at=4 * i) for i in range(0, count, 4)]


@triton.constexpr_function
def _making(words):
    """-> address."""
    return f"{{ .shared .align 16 .b32 counters[{words}]; mov.u32 $0, counters; }}"


@triton.constexpr_function
def _clearing(own):
    """Address -> itself: `own` counters a thread, a multiple of 4."""
    return f"""{{ .reg .b32 mine, zero;
    mov.u32 $0, $1; mov.u32 mine, %tid.x; mov.u32 zero, 0;
    mad.lo.u32 mine, mine, {4 * own}, $0;
    {" ".join(_by_four(own, "st.shared.v4.b32 [mine+{at}], {{zero, zero, zero, zero}};"))}
    bar.sync 0; }}"""


@triton.constexpr_function
def _adding(numbers):
    """A thread's bins, the address -> zeros: Triton wants as many results."""
    lines = [
        f"mad.lo.u32 counter, ${numbers + i}, 4, ${2 * numbers}; red.shared.add.u32 [counter], 1;"
        for i in range(numbers)
    ]
    return "\n".join(
        ["{ .reg .b32 counter;", *lines, *(f"mov.u32 ${i}, 0;" for i in range(numbers)), "}"]
    )


@triton.constexpr_function
def _adding_registers(numbers):
    return ",".join(["=r"] * numbers + ["r"] * 2 * numbers)


@triton.constexpr_function
def _finding(own, threads):
    """Address, k, slack -> the first bin up to which there are k; 2**16 for at most `slack` more.

    Sums in the thread, the warp and over the warps before; one thread has the bin.
    """
    warps, last, sums = threads // 32, own - 1, 4 * own * threads
    lines = [
        "bar.sync 0;",
        f".reg .b32 thread, lane, warp, mine, c<{own}>, w<{max(warps, 4)}>;",
        ".reg .b32 upto, sum, before, need, bin, count, hit; .reg .pred p, here;",
        "mov.u32 thread, %tid.x; and.b32 lane, thread, 31; shr.u32 warp, thread, 5;",
        f"mad.lo.u32 mine, thread, {4 * own}, $1;",
        *_by_four(own, "ld.shared.v4.b32 {{c{}, c{}, c{}, c{}}}, [mine+{at}];"),
        *(f"add.u32 c{i}, c{i}, c{i - 1};" for i in range(1, own)),
        f"mov.u32 upto, c{last};",
        *(
            f"shfl.sync.up.b32 sum|p, upto, {step}, 0, -1; @p add.u32 upto, upto, sum;"
            for step in (1, 2, 4, 8, 16)
        ),
        "mad.lo.u32 mine, warp, 4, $1; setp.eq.u32 p, lane, 31;",
        f"@p st.shared.b32 [mine+{sums}], upto;",
        "bar.sync 0;",
        f"sub.u32 before, upto, c{last};",
        *_by_four(
            warps, f"ld.shared.v4.b32 {{{{w{{}}, w{{}}, w{{}}, w{{}}}}}}, [$1+{sums}+{{at}}];"
        ),
        *(f"setp.gt.u32 p, warp, {i}; @p add.u32 before, before, w{i};" for i in range(warps - 1)),
        f"sub.s32 need, $2, before; mul.lo.u32 bin, thread, {own}; mov.u32 count, c{last};",
        "setp.gt.s32 here, need, 0; setp.le.and.s32 here, need, count, here;",
        *(f"setp.lt.s32 p, c{i}, need; @p add.u32 bin, bin, 1;" for i in range(last)),
        *(f"setp.ge.s32 p, c{i}, need; @p mov.u32 count, c{i};" for i in reversed(range(last))),
        "sub.s32 count, count, need; setp.le.s32 p, count, $3; selp.u32 hit, 65536, 0, p;",
        f"or.b32 bin, bin, hit; @here st.shared.b32 [$1+{sums + 128}], bin;",
        "bar.sync 0;",
        f"ld.shared.b32 $0, [$1+{sums + 128}];",
    ]
    return "\n".join(["{", *lines, "}"])


@triton.jit
def room():
    """For the counters of one count at a time, the sums of 32 warps and a result."""
    if PTX:
        WORDS: tl.constexpr = (1 << MOST_BITS) + 33
        at = tl.inline_asm_elementwise(
            _making(WORDS), "=r", [], dtype=tl.int32, is_pure=False, pack=1
        )
    else:
        at = 0
    return at


@triton.jit
def clear(space, BLOCK: tl.constexpr):
    """Counters of no numbers, for BLOCK at a time."""
    BINS: tl.constexpr = 1 << bits_a_pass(BLOCK)
    if PTX:
        THREADS: tl.constexpr = tl.extra.cuda.num_threads()
        tl.static_assert(BINS // THREADS % 4 == 0, "a thread's counters come in fours")
        counters = tl.inline_asm_elementwise(
            _clearing(BINS // THREADS), "=r,r", [space], dtype=tl.int32, is_pure=False, pack=1
        )
    else:
        counters = tl.zeros((BINS,), tl.int32)
    return counters


@triton.jit
def add(counters, bins, BLOCK: tl.constexpr):
    """The counters with BLOCK numbers more, which lie one to a register of a thread."""
    if PTX:
        NUMBERS: tl.constexpr = BLOCK // tl.extra.cuda.num_threads()
        tl.inline_asm_elementwise(
            _adding(NUMBERS), _adding_registers(NUMBERS), [bins, counters],
            dtype=tl.int32, is_pure=False, pack=NUMBERS,
        )  # fmt: skip
    else:
        counters += tl.histogram(bins, 1 << bits_a_pass(BLOCK))
    return counters


@triton.jit
def find_bin(counters, k, slack, BLOCK: tl.constexpr):
    """The first bin up to which there are k, and whether there are at most `slack` more."""
    if PTX:
        THREADS: tl.constexpr = tl.extra.cuda.num_threads()
        OWN: tl.constexpr = (1 << bits_a_pass(BLOCK)) // THREADS
        code = tl.inline_asm_elementwise(
            _finding(OWN, THREADS), "=r,r,r,r", [counters, k, slack],
            dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip
    else:
        upto = tl.cumsum(counters, 0)
        bin = tl.sum(tl.where(upto < k, 1, 0), 0)
        enough = tl.sum(tl.where(upto <= k + slack, 1, 0), 0)
        code = bin | tl.where(enough > bin, 1 << 16, 0)
    return code & 0xFFFF, code >> 16
