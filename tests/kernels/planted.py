"""Small kernels that keep the PDL contract, and some that break it in one way each."""

import triton
import triton.language as tl

from minidsv.kernels.launch import KernelSpec, Row, pdl_begin, pdl_end


@triton.jit
def clean(x, w, out, PDL: tl.constexpr):
    i = tl.arange(0, 128)
    pdl_begin(PDL)
    tl.store(out + i, tl.load(x + i) * tl.load(w + i))
    pdl_end(PDL)


@triton.jit
def weight_first(x, w, out, PDL: tl.constexpr):
    i = tl.arange(0, 128)
    weight = tl.load(w + i)
    pdl_begin(PDL)
    tl.store(out + i, tl.load(x + i) * weight)
    pdl_end(PDL)


@triton.jit
def activation_first(x, w, out, PDL: tl.constexpr):
    """As many loads on either side of the wait as `weight_first` has."""
    i = tl.arange(0, 128)
    activation = tl.load(x + i)
    pdl_begin(PDL)
    tl.store(out + i, activation * tl.load(w + i))


@triton.jit
def store_first(x, w, out, PDL: tl.constexpr):
    i = tl.arange(0, 128)
    tl.store(out + i, 0.0)
    pdl_begin(PDL)
    tl.store(out + i, tl.load(x + i) * tl.load(w + i))


@triton.jit
def atomic_first(x, w, out, PDL: tl.constexpr):
    i = tl.arange(0, 128)
    tl.atomic_add(w + i, 1.0)
    pdl_begin(PDL)
    tl.store(out + i, tl.load(x + i))


@triton.jit
def loaded_index_first(x, w, out, PDL: tl.constexpr):
    i = tl.arange(0, 128)
    weight = tl.load(w + tl.load(w + i).to(tl.int32))
    pdl_begin(PDL)
    tl.store(out + i, tl.load(x + i) * weight)


@triton.jit
def trigger_first(x, w, out, PDL: tl.constexpr):
    i = tl.arange(0, 128)
    tl.extra.cuda.gdc_launch_dependents()
    tl.extra.cuda.gdc_wait()
    tl.store(out + i, tl.load(x + i) * tl.load(w + i))


@triton.jit
def wait_in_one_role(x, w, out, PDL: tl.constexpr):
    i = tl.arange(0, 128)
    if tl.program_id(0) == 0:
        pdl_begin(PDL)
        tl.store(out + i, tl.load(x + i))
    else:
        tl.store(out + i, tl.load(w + i))


@triton.jit
def no_wait(x, w, out, PDL: tl.constexpr):
    i = tl.arange(0, 128)
    tl.store(out + i, tl.load(x + i) * tl.load(w + i))


@triton.jit
def two_waits(x, w, out, PDL: tl.constexpr):
    i = tl.arange(0, 128)
    pdl_begin(PDL)
    activation = tl.load(x + i)
    pdl_begin(PDL)
    tl.store(out + i, activation * tl.load(w + i))


@triton.jit
def always_waits(x, w, out, PDL: tl.constexpr):
    i = tl.arange(0, 128)
    tl.extra.cuda.gdc_wait()
    tl.store(out + i, tl.load(x + i) * tl.load(w + i))


@triton.jit
def wait_in_pipelined_loop(x, w, out, K, PDL: tl.constexpr):
    """Triton 3.6 issues the first stages' copies above the wait (triton #11905)."""
    rows, columns = tl.arange(0, 64), tl.arange(0, 64)
    acc = tl.zeros((64, 64), tl.float32)
    for k in tl.range(0, K, 64, num_stages=3):
        pdl_begin(PDL)
        a = tl.load(x + rows[:, None] * K + k + columns[None, :])
        b = tl.load(w + rows[None, :] * K + k + columns[:, None])
        acc = tl.dot(a, b, acc)
    tl.store(out + rows[:, None] * 64 + columns[None, :], acc)


def spec(kernel) -> KernelSpec:
    """`kernel` with `w` replay-constant, and its one row."""
    arguments: dict[str, str | int | float] = dict.fromkeys(("x", "w", "out"), "*fp32:16")
    if "K" in kernel.arg_names:
        arguments |= {"x": "*bf16:16", "w": "*bf16:16", "K": "i32:16"}
    return KernelSpec(kernel, (Row(arguments),), replay_constant=frozenset({"w"}))
