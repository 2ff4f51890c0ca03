"""How a Triton kernel is started, and what the checker has to know about it.

Every kernel is launched through its `KernelSpec`: the spec sets the kernel's constexpr `PDL` and
the launch attribute from one mode, and `minidsv.kernels.check` compiles the same spec's rows with
the same options. In the kernel, `pdl_begin` stands in straight-line code before the first access
to anything that changes during a replay, `pdl_end` after the last. Where the trigger stands is a
matter of speed alone: whoever is started waits for all that came before.
"""

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from importlib import import_module
from typing import Any, NamedTuple

import triton
import triton.language as tl

from minidsv.kernels.pdl import PdlMode, launch_kwargs


@triton.jit
def pdl_ahead(PDL: tl.constexpr) -> None:
    """Before `pdl_begin`, with `prefetch`: let the next kernel start while this one still waits.

    A trigger counts once all programs have issued it: for kernels whose programs all fit on the
    device while the kernel before ends. What comes next then prefetches beside both.
    """
    if PDL == "prefetch":
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def pdl_begin(PDL: tl.constexpr, LATE: tl.constexpr = False) -> None:
    """Wait for the kernels before, then let the next one start, unless that is `pdl_end`'s."""
    if PDL != "off":
        tl.extra.cuda.gdc_wait()
        if PDL == "on" or (PDL == "prefetch" and not LATE):
            tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def pdl_end(PDL: tl.constexpr, LATE: tl.constexpr = False) -> None:
    """The seed's trigger, and with `prefetch` that of a LATE kernel: one which leaves SMs idle, or
    wants them all for long.

    What starts early is placed on idle SMs alone and stays there, also when the others are free, or
    competes with programs that still have long to run.
    """
    if PDL == "seed" or (PDL == "prefetch" and LATE):
        tl.extra.cuda.gdc_launch_dependents()


@dataclass(frozen=True)
class Row:
    """One compiled form: each argument's type ("*bf16", "i32:16" = divisible by 16) or constant."""

    arguments: dict[str, str | int | float]
    num_warps: int = 4
    num_stages: int = 3

    @property
    def pointees(self) -> tuple[str, ...]:
        """Types behind the pointers, in order: ("bf16", "i64", "bf16")."""
        types = [t for t in self.arguments.values() if isinstance(t, str) and t[0] == "*"]
        return tuple(t[1:].removesuffix(":16") for t in types)

    @property
    def dtypes(self) -> tuple[str, ...]:
        """The pointees without the indices'."""
        return tuple(t for t in self.pointees if not t.startswith("i"))

    @property
    def min_capability(self) -> int:
        """8.0, or 8.9 with e4m3."""
        return 89 if "fp8e4nv" in self.pointees else 80


@dataclass(frozen=True)
class KernelSpec:
    """A kernel, the rows it is launched in, and the parameters whose memory no replay changes."""

    kernel: Any  # triton.JITFunction
    rows: tuple[Row, ...]
    replay_constant: frozenset[str] = frozenset()
    fp_fusion: bool = False  # fuse a * b + c into one rounding

    @property
    def name(self) -> str:
        return self.kernel.__name__.strip("_")

    def __getstate__(self) -> dict[str, Any]:
        """For pickle: the kernel by its name, as pickle takes functions."""
        return vars(self) | {"kernel": (self.kernel.__module__, self.kernel.__name__)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        module, name = state["kernel"]
        self.__dict__.update(state | {"kernel": getattr(import_module(module), name)})

    def compile_options(self, num_warps: int, num_stages: int, mode: PdlMode) -> dict[str, Any]:
        """Options of a launch, and of the same row's ahead-of-time compilation."""
        options = {"num_warps": num_warps, "num_stages": num_stages}
        return options | {"enable_fp_fusion": self.fp_fusion} | launch_kwargs(mode)

    def launch(
        self,
        grid: tuple[int, ...],
        mode: PdlMode,
        args: dict[str, Any],
        num_warps: int = 4,
        num_stages: int = 3,
    ) -> None:
        """Run the kernel on `args`, unless the grid is empty; `mode` is `pdl.triton_mode`'s."""
        if 0 in grid:
            return
        options = self.compile_options(num_warps, num_stages, mode)
        if _ONLY_COMPILES.get():
            self.kernel.warmup(**args, PDL=mode, grid=grid, **options)
        else:
            compiled = self.kernel[grid](**args, PDL=mode, **options)
            if (observe := _OBSERVER.get()) is not None:
                observe(Launch(self, mode, compiled), args)


class Launch(NamedTuple):
    """A binary that was started."""

    spec: KernelSpec
    mode: PdlMode
    compiled: Any  # triton's CompiledKernel


Observer = Callable[[Launch, dict[str, Any]], object]  # gets the arguments too
_OBSERVER: ContextVar[Observer | None] = ContextVar("_OBSERVER", default=None)
_ONLY_COMPILES: ContextVar[bool] = ContextVar("_ONLY_COMPILES", default=False)


@contextmanager
def observed_launches(observe: Observer) -> Iterator[None]:
    """Show `observe`, and none before it, every launch of this thread meanwhile."""
    token = _OBSERVER.set(observe)
    try:
        yield
    finally:
        _OBSERVER.reset(token)


@contextmanager
def recorded_launches() -> Iterator[dict[str, Launch]]:
    """Every binary that this thread starts meanwhile, once each, by Triton's hash."""
    record: dict[str, Launch] = {}
    with observed_launches(lambda launch, _: record.setdefault(launch.compiled.hash, launch)):
        yield record


@contextmanager
def compiling_only() -> Iterator[None]:
    """Launches of this thread start nothing meanwhile; at the end what they need is compiled, on
    as many threads as there are cores."""
    token = _ONLY_COMPILES.set(True)
    try:
        with ThreadPoolExecutor(os.cpu_count()) as threads, triton.AsyncCompileMode(threads):
            yield
    finally:
        _ONLY_COMPILES.reset(token)
