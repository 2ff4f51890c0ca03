"""What a benchmark's row and its peer are, the sizes it is taken at, and its inputs from a seed."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from minidsv.kernels.constants import PAGE_SIZE
from minidsv.kernels.gemm import Segment
from minidsv.kernels.index_cache import fp8_page_bytes
from minidsv.kernels.norm import PreNorm
from minidsv.kernels.pdl import PdlMode
from minidsv.kernels.quant import block_scale_shape
from minidsv.kernels.set_mla_kv_buffer import fp8_row_bytes

Run = Callable[[PdlMode | None], object]  # one launch in that mode; None is the reference


class Launch:
    """A Run that tells what it runs: `op` and its arguments."""

    def __init__(self, op: Callable[..., object], *args: Any, **options: Any):
        self.op, self.args, self.options = op, args, options

    def __call__(self, pdl: PdlMode | None) -> object:
        return self.op(*self.args, **self.options, pdl=pdl)


class Write(Launch):
    """A Launch whose result is also the caches that it writes to."""

    def __init__(
        self, caches: Sequence[Tensor], op: Callable[..., object], *args: Any, **options: Any
    ):
        super().__init__(op, *args, **options)
        self.caches = caches

    def __call__(self, pdl: PdlMode | None) -> object:
        return super().__call__(pdl), self.caches


@dataclass(frozen=True)
class Dims:
    """The sizes that the operators see."""

    name: str
    heads: int = 128
    inner: int = 2048  # of an expert, and of the shared one
    dense: int = 18432  # of a layer without experts
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
    contexts: tuple[int, ...] = (4096, 32768, 131072)


FULL = Dims("full")
TP8 = Dims("tp8", heads=16, inner=256, dense=2304, vocab=16160)
SLOTS = 1 << 16  # of a cache
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


def device() -> torch.device:
    """CUDA where there is any: the same rows can be made without."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def seeded(seed: int) -> dict[str, Any]:
    """What torch's random functions take: a generator, and its device."""
    return {"generator": torch.Generator(device()).manual_seed(seed), "device": device()}


def normal(seed: int, *shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(*shape, **seeded(seed), dtype=torch.float32).to(dtype)


def bf16(seed: int, *shape: int) -> Tensor:
    """A weight with which a linear's outputs are about 1; no copy in fp32 beside it."""
    return torch.randn(*shape, **seeded(seed), dtype=torch.bfloat16).mul_(shape[-1] ** -0.5)


def fp8(seed: int, *shape: int) -> tuple[Tensor, Tensor]:
    """e4m3 codes without NaN, and scales that give a linear outputs of about 1."""
    source = seeded(seed)
    codes = torch.randint(0, 256, shape, **source, dtype=torch.uint8)
    codes[(codes & 0x7F) == 0x7F] = 0
    *stack, rows, cols = shape
    scale = torch.rand(*stack, *block_scale_shape(rows, cols), **source)
    return codes.view(torch.float8_e4m3fn), (0.5 + scale) * cols**-0.5 / 100


def fp8_segment(seed: int, rows: int, cols: int) -> Segment:
    return Segment(*fp8(seed, rows, cols))


def unnormed(seed: int, m: int, dim: int, adds: bool = True) -> PreNorm:
    """What a block reads; `adds`: there is a block before it."""
    out = normal(seed + 2, m, dim) if adds else None
    return PreNorm(out, normal(seed, m, dim), normal(dim, dim, dtype=torch.float32), 1e-6)


def where(seed: int, m: int) -> Tensor:
    """m of SLOTS, distinct."""
    return torch.randperm(SLOTS, **seeded(seed))[:m]


def latent_row(layout: str, d: Dims) -> tuple[int, torch.dtype]:
    """Width and type of a row of the latents' cache."""
    if layout == "fp8":
        return fp8_row_bytes(d.latent, d.rope), torch.uint8
    return d.latent + d.rope, {"bf16": torch.bfloat16, "fp8_flat": torch.float8_e4m3fn}[layout]


def latent_row_bytes(layout: str, d: Dims) -> int:
    width, dtype = latent_row(layout, d)
    return width * dtype.itemsize


def empty_latents(layout: str, slots: int, d: Dims) -> Tensor:
    width, dtype = latent_row(layout, d)
    return torch.zeros(slots, width, dtype=dtype, device=device())


def empty_index_keys(layout: str, d: Dims) -> Tensor:
    """The indexer's pages."""
    if layout == "fp8":
        width = fp8_page_bytes(d.index_dim)
        return torch.zeros(SLOTS // PAGE_SIZE, width, dtype=torch.uint8, device=device())
    page = SLOTS // PAGE_SIZE, PAGE_SIZE, d.index_dim
    return torch.zeros(*page, dtype=torch.bfloat16, device=device())


def rope_tables(seed: int, m: int, dim: int) -> tuple[Tensor, Tensor]:
    angles = normal(seed, m, dim // 2, dtype=torch.float32)
    return angles.cos(), angles.sin()


def total(costs: Iterable[tuple[int, int]]) -> tuple[int, int]:
    """The cost of operators one after another."""
    nbytes, flops = zip(*costs, strict=True)
    return sum(nbytes), sum(flops)


def tensors(result: Any) -> list[Tensor]:
    """The tensors that an operator returned, or wrote."""
    if isinstance(result, Tensor):
        return [result]
    return [t for part in result if part is not None for t in tensors(part)]


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
