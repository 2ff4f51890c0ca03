"""What `bench_kernels.py` measures: each operator at a model's sizes, with inputs from a seed."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from typing import NamedTuple

import torch
from torch import Tensor

from minidsv.kernels import (
    absorb,
    argmax,
    embedding,
    gemm,
    index_cache,
    indexer_logits,
    indexer_prep,
    latent_write,
    moe,
    norm,
    quant,
    rope,
    rope_quant,
    router,
    set_mla_kv_buffer,
    sparse_mla,
    topk,
)
from minidsv.kernels.constants import PAGE_SIZE
from minidsv.kernels.gemm import Segment
from minidsv.kernels.pdl import PdlMode

Run = Callable[[PdlMode | None], object]  # one launch in that mode; None is the reference


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
EXACT, ROUNDED, FP8 = 0.0, 4e-3, 2e-2  # relative L2 against the reference


class Case(NamedTuple):
    """One row of the table; `build(seed)` makes a working set and the op over it."""

    op: str
    shape: str
    cost: tuple[int, int]  # compulsory bytes, FLOPs
    build: Callable[[int], Run]
    tolerance: float = ROUNDED


def _normal(seed: int, *shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(*shape, device="cuda", generator=generator, dtype=torch.float32).to(dtype)


def _fp8(seed: int, *shape: int) -> tuple[Tensor, Tensor]:
    """e4m3 codes without NaN, and scales that give a linear outputs of about 1."""
    generator = torch.Generator("cuda").manual_seed(seed)
    codes = torch.randint(0, 256, shape, device="cuda", generator=generator, dtype=torch.uint8)
    codes[(codes & 0x7F) == 0x7F] = 0
    *stack, rows, cols = shape
    scale = torch.rand(
        *stack, *quant.block_scale_shape(rows, cols), device="cuda", generator=generator
    )
    return codes.view(torch.float8_e4m3fn), (0.5 + scale) * cols**-0.5 / 100


def _fp8_segment(seed: int, rows: int, cols: int) -> Segment:
    return Segment(*_fp8(seed, rows, cols))


def _rope_tables(seed: int, m: int, dim: int) -> tuple[Tensor, Tensor]:
    angles = _normal(seed, m, dim // 2, dtype=torch.float32)
    return angles.cos(), angles.sin()


def linears(d: Dims, m: int) -> Iterator[Case]:
    """The projections."""

    def case(op: str, shape: str, k: int, *rows: int, gate_rows: int = 0) -> Case:
        def segments(seed: int) -> list[Segment]:
            made = [_fp8_segment(seed + i, n, k) for i, n in enumerate(rows)]
            if gate_rows:
                gate = _normal(seed, gate_rows, k) * k**-0.5
                made.append(Segment(gate, out_dtype=torch.float32))
            return made

        def build(seed: int) -> Run:
            x, weights = _normal(seed, m, k), segments(seed)
            return lambda pdl: gemm.fused_linear(x, weights, pdl)

        cost = gemm.fused_linear_cost(m, segments(0))
        return Case(op, f"M={m} {shape}", cost, build)

    q, o = d.heads * (d.nope + d.rope), d.heads * d.v
    keys = (d.q_lora, d.latent + d.rope, d.index_dim)
    yield case("fused_a_gemm", f"{d.hidden}->{sum(keys) + d.index_heads}", d.hidden, *keys,
               gate_rows=d.index_heads)  # fmt: skip
    index_q = d.index_heads * d.index_dim
    yield case("q_b + index wq_b", f"{d.q_lora}->{q}+{index_q}", d.q_lora, q, index_q)
    yield case("o_proj", f"{o}->{d.hidden}", o, d.hidden)
    yield case("lm_head", f"{d.hidden}->{d.vocab}", d.hidden, gate_rows=d.vocab)


def attention(d: Dims, m: int) -> Iterator[Case]:
    """Absorbed products and sparse attention over three caches."""
    h, c, r = d.heads, d.latent, d.rope

    def absorbed(op: Callable[..., Tensor], k: int, n: int) -> Callable[[int], Run]:
        def build(seed: int) -> Run:
            kv_b = _normal(seed, h, d.nope + d.v, c) * 0.05
            x, w = _normal(seed, m, h, k), kv_b[:, : d.nope] if k == d.nope else kv_b[:, d.nope :]
            return lambda pdl: op(x, w, pdl)

        return build

    yield Case("absorb_q", f"M={m} H={h}", absorb.absorb_cost(m, h, d.nope, c),
               absorbed(absorb.absorb_q, d.nope, c))  # fmt: skip
    yield Case("absorb_v", f"M={m} H={h}", absorb.absorb_cost(m, h, c, d.v),
               absorbed(absorb.absorb_v, c, d.v))  # fmt: skip

    def sparse(layout: str) -> Callable[[int], Run]:
        def build(seed: int) -> Run:
            slots = max(m * d.index_topk, 1 << 16)
            cache = latent_cache(layout, slots, d)
            q, q_pe = _normal(seed, m, h, c), _normal(seed, m, h, r)
            generator = torch.Generator("cuda").manual_seed(seed)
            where = torch.randperm(slots, device="cuda", generator=generator)
            indices = where[: m * d.index_topk].view(m, d.index_topk)
            scale = (d.nope + r) ** -0.5
            return lambda pdl: sparse_mla.sparse_mla(q, q_pe, cache, indices, scale, pdl=pdl)

        return build

    for layout, row in (("bf16", 2 * (c + r)), ("fp8", set_mla_kv_buffer.fp8_row_bytes(c, r))):
        cost = sparse_mla.sparse_mla_cost(m, h, d.index_topk, c, r, row)
        tolerance = ROUNDED if layout == "bf16" else FP8
        yield Case(f"sparse_mla {layout}", f"M={m} H={h}", cost, sparse(layout), tolerance)


@cache
def latent_cache(layout: str, slots: int, d: Dims) -> Tensor:
    """A full latent cache in bf16 or 656-byte rows."""
    rows = _normal(7, slots, d.latent + d.rope)
    if layout == "bf16":
        return rows
    width = set_mla_kv_buffer.fp8_row_bytes(d.latent, d.rope)
    cache = torch.empty(slots, width, dtype=torch.uint8, device="cuda")
    nope, pe = rows.split((d.latent, d.rope), 1)
    loc = torch.arange(slots, device="cuda")
    set_mla_kv_buffer.set_mla_kv_buffer_fp8_quant_ref(cache, loc, nope, pe)
    return cache
