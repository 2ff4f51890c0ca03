"""Rows of `bench_kernels.py` for attention: W_UK and W_UV, what prepares it, three caches."""

import functools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from bench_inputs import (
    FP8,
    SLOTS,
    Case,
    Dims,
    Launch,
    Run,
    Write,
    empty_index_keys,
    empty_latents,
    latent_row_bytes,
    normal,
    rope_tables,
    seeded,
    where,
)
from minidsv.kernels.absorb import absorb_cost, absorb_q, absorb_v
from minidsv.kernels.attention_prep import (
    IndexKeys,
    IndexQueries,
    LatentRows,
    attention_prep,
    attention_prep_cost,
)
from minidsv.kernels.set_mla_kv_buffer import set_mla_kv_buffer_fp8_quant
from minidsv.kernels.sparse_mla import (
    sparse_mla,
    sparse_mla_cost,
    sparse_mla_values,
    sparse_mla_values_cost,
)

LAYOUTS = ("bf16", "fp8", "fp8_flat")


def attention(d: Dims, m: int) -> Iterator[Case]:
    """Absorbed products, preparation, sparse attention alone and with the values."""
    h, c = d.heads, d.latent
    shape = f"M={m} H={h}"

    def q(seed: int) -> Run:
        return Launch(absorb_q, normal(seed, m, h, d.nope), halves(seed, d)[0])

    def v(seed: int) -> Run:
        return Launch(absorb_v, normal(seed, m, h, c), halves(seed, d)[1])

    yield Case("absorb_q", shape, absorb_cost(m, h, d.nope, c), q)
    yield Case("absorb_v", shape, absorb_cost(m, h, c, d.v), v)
    for layout in LAYOUTS[:2]:
        sizes = (m, h, d.nope, c, d.rope, latent_row_bytes(layout, d))
        index = (d.index_heads, d.index_dim, layout == "fp8")
        tolerance = {} if layout == "bf16" else {"tolerance": FP8}
        cost = attention_prep_cost(*sizes, *index)
        yield Case(f"attention_prep {layout}", shape, cost, prepared(d, m, layout), **tolerance)
        cost = attention_prep_cost(*sizes)
        build = prepared(d, m, layout, has_indexer=False)
        yield Case(f"attention_prep {layout} shared", shape, cost, build, **tolerance)
    for layout in LAYOUTS:
        query_bytes = 1 if layout == "fp8_flat" else 2
        sizes = (m, h, d.index_topk, c, d.rope, latent_row_bytes(layout, d), query_bytes)
        yield Case(f"sparse_mla {layout}", shape, sparse_mla_cost(*sizes), sparse(d, m, layout))
        cost = sparse_mla_values_cost(*sizes, v_dim=d.v)
        build = sparse(d, m, layout, with_values=True)
        yield Case(f"sparse_mla_values {layout}", shape, cost, build)


def halves(seed: int, d: Dims) -> tuple[Tensor, Tensor]:
    """W_UK [H, n, C] and W_UV [H, v, C], views of one weight."""
    kv_b = normal(seed, d.heads, d.nope + d.v, d.latent) * 0.05
    return kv_b[:, : d.nope], kv_b[:, d.nope :]


def prepared(d: Dims, m: int, layout: str, has_indexer: bool = True) -> Callable[[int], Run]:
    """attention_prep with both caches of `layout`; without an indexer, of a shared layer."""
    c, dim, heads = d.latent, d.index_dim, d.index_heads

    def vector(size: int, seed: int = 0) -> Tensor:
        return normal(seed, size, dtype=torch.float32)

    def build(seed: int) -> Run:
        latents, index = empty_latents(layout, SLOTS, d), empty_index_keys(layout, d)
        rows = LatentRows(latents, normal(seed, m, c + d.rope), vector(c), 1e-6)
        keys = IndexKeys(index, normal(seed + 1, m, dim), vector(dim), vector(dim, 1), 1e-6)
        q, gate = normal(seed + 2, m, heads, dim), normal(seed, m, heads, dtype=torch.float32)
        queries = IndexQueries(q, gate, dim**-0.5, heads**-0.5)
        parts = (keys, queries) if has_indexer else (None, None)
        q = normal(seed + 3, m, d.heads, d.nope + d.rope)
        args = (q, halves(seed, d)[0], rows, *parts, where(seed, m), rope_tables(1, m, d.rope))
        caches = (latents, index) if has_indexer else (latents,)
        return Write(caches, attention_prep, *args, False)

    return build


def sparse(d: Dims, m: int, layout: str, with_values: bool = False) -> Callable[[int], Run]:
    """m tokens over slots of their own; the flat cache's queries are e4m3 as well."""

    def build(seed: int) -> Run:
        slots = max(m * d.index_topk, SLOTS)
        cache = latent_cache(layout, slots, d)
        q, q_pe = normal(seed, m, d.heads, d.latent), normal(seed, m, d.heads, d.rope)
        if layout == "fp8_flat":
            q, q_pe = q.to(cache.dtype), q_pe.to(cache.dtype)
        indices = torch.randperm(slots, **seeded(seed))[: m * d.index_topk].view(m, d.index_topk)
        scale = (d.nope + d.rope) ** -0.5
        if with_values:
            return Launch(sparse_mla_values, q, q_pe, cache, indices, halves(seed, d)[1], scale)
        return Launch(sparse_mla, q, q_pe, cache, indices, scale)

    return build


@functools.cache
def latent_cache(layout: str, slots: int, d: Dims) -> Tensor:
    """A full latent cache."""
    rows = normal(7, slots, d.latent + d.rope)
    if layout == "bf16":
        return rows
    cache = empty_latents(layout, slots, d)
    loc = torch.arange(slots, device=rows.device)
    set_mla_kv_buffer_fp8_quant(cache, loc, *rows.split((d.latent, d.rope), 1))
    return cache
