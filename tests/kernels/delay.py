"""A kernel that makes races show: it lets the next kernel start at once, and ends late."""

import triton
import triton.language as tl
from torch import Tensor

from minidsv.kernels.launch import KernelSpec
from minidsv.kernels.pdl import PdlMode


@triton.jit
def _delay_kernel(rounds, sink, PDL: tl.constexpr):
    """Trigger, spin, wait: what follows starts beside what went before, unless it waits itself."""
    if PDL != "off":
        tl.extra.cuda.gdc_launch_dependents()
    turns = tl.load(rounds)
    state = tl.program_id(0) + 1
    for _ in range(turns):
        state = state * 1664525 + 1013904223
    if PDL != "off":
        tl.extra.cuda.gdc_wait()
    tl.store(sink + tl.program_id(0), state)


DELAY = KernelSpec(_delay_kernel, ())
PROGRAMS = 4


def delay(rounds: Tensor, sink: Tensor, mode: PdlMode) -> None:
    """Spin rounds[0] times (int32, about 10 ns each) in 4 programs; sink int32 [4]."""
    DELAY.launch((PROGRAMS,), mode, {"rounds": rounds, "sink": sink}, num_warps=1)
