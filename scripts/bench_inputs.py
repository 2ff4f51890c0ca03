"""What a benchmark's row and its peer are, the sizes it is taken at, and its inputs from a seed."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from minidsv.kernels.gemm import Segment
from minidsv.kernels.pdl import PdlMode
from minidsv.kernels.quant import block_scale_shape

Run = Callable[[PdlMode | None], object]  # one launch in that mode; None is the reference


class Launch:
    """A Run that tells what it runs: `op` and its arguments."""

    def __init__(self, op: Callable[..., object], *args: Any, **options: Any):
        self.op, self.args, self.options = op, args, options

    def __call__(self, pdl: PdlMode | None) -> object:
        return self.op(*self.args, **self.options, pdl=pdl)


@dataclass(frozen=True)
class Dims:
    """The sizes that the operators see."""

    name: str
    heads: int = 128
    inner: int = 2048  # of an expert, and of the shared one
    vocab: int = 129280
    hidden: int = 7168
    q_lora: int = 1536
    nope: int = 128
    v: int = 128
    latent: int = 512
    rope: int = 64
    index_heads: int = 64
    index_dim: int = 128
    index_topk: int = 2048
    experts: int = 256
    top_k: int = 8


FULL = Dims("full")
TP8 = Dims("tp8", heads=16, inner=256, vocab=16160)
CONTEXTS = (4096, 32768, 131072)
EXACT, ROUNDED, FP8 = 0.0, 8e-3, 3e-2  # relative L2 against the reference


class Case(NamedTuple):
    """One row of the table; `build(seed)` makes a working set and the op over it."""

    op: str
    shape: str
    cost: tuple[int, int]  # compulsory bytes, FLOPs
    build: Callable[[int], Run]
    tolerance: float = ROUNDED


class Peer(NamedTuple):
    """A library's way to compute what one of our operators does."""

    name: str
    launch: Callable[[], object]
    outputs: Callable[[], Sequence[Tensor]]  # of a launch, in our operator's layout
    tolerance: float = ROUNDED


def normal(seed: int, *shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(*shape, device="cuda", generator=generator, dtype=torch.float32).to(dtype)


def fp8(seed: int, *shape: int) -> tuple[Tensor, Tensor]:
    """e4m3 codes without NaN, and scales that give a linear outputs of about 1."""
    generator = torch.Generator("cuda").manual_seed(seed)
    codes = torch.randint(0, 256, shape, device="cuda", generator=generator, dtype=torch.uint8)
    codes[(codes & 0x7F) == 0x7F] = 0
    *stack, rows, cols = shape
    scale = torch.rand(*stack, *block_scale_shape(rows, cols), device="cuda", generator=generator)
    return codes.view(torch.float8_e4m3fn), (0.5 + scale) * cols**-0.5 / 100


def fp8_segment(seed: int, rows: int, cols: int) -> Segment:
    return Segment(*fp8(seed, rows, cols))


def rope_tables(seed: int, m: int, dim: int) -> tuple[Tensor, Tensor]:
    angles = normal(seed, m, dim // 2, dtype=torch.float32)
    return angles.cos(), angles.sin()


def tensors(result: Any) -> list[Tensor]:
    """The tensors that an operator returned, or wrote."""
    return [result] if isinstance(result, Tensor) else [t for t in result if t is not None]


def numbers(t: Tensor) -> Tensor:
    return t.double() if t.is_floating_point() else t.view(torch.uint8).double()


def relative_error(got: list[Tensor], want: list[Tensor]) -> float:
    """Worst relative L2 of the tensors; inf where one has a NaN or a wrong shape or dtype."""
    worst = 0.0
    for g, w in zip(got, want, strict=True):
        if g.shape != w.shape or g.dtype != w.dtype:
            return float("inf")
        a, b = numbers(g), numbers(w)
        error = float((a - b).norm() / b.norm().clamp_min(1e-30))
        worst = max(worst, error if error == error else float("inf"))
    return worst
