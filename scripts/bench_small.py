"""Rows of `bench_kernels.py` for the small operators: norms, rotations, quantisation, writes, and
what a step begins and ends with."""

import functools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from bench_inputs import (
    EXACT,
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
from minidsv.kernels.argmax import argmax, argmax_cost
from minidsv.kernels.embedding import embedding, embedding_cost
from minidsv.kernels.indexer_prep import (
    index_k_write,
    index_k_write_cost,
    index_q_prep,
    index_q_prep_cost,
)
from minidsv.kernels.mla_prep import norm_rope_set_mla_kv_buffer, norm_rope_set_mla_kv_buffer_cost
from minidsv.kernels.norm import add_rms_norm, norm_cost, rms_norm
from minidsv.kernels.quant import per_token_group_quant_fp8, per_token_group_quant_fp8_cost
from minidsv.kernels.rope import apply_rope, apply_rope_cost, rope_cos_sin, rope_cos_sin_cost
from minidsv.kernels.rope_quant import mla_rope_quantize_fp8, mla_rope_quantize_fp8_cost
from minidsv.kernels.set_mla_kv_buffer import set_mla_kv_buffer, set_mla_kv_buffer_cost

ANGLES = 1e-6  # relative L2 of cos and sin of up to 131072 rad, fp32


def norms(d: Dims, m: int) -> Iterator[Case]:
    """RMSNorm alone and with the residual, group quantisation."""
    gains = {n: normal(n, n, dtype=torch.float32) for n in (d.hidden, d.q_lora)}

    def norm(seed: int) -> Run:
        x = normal(seed, m, d.q_lora)
        return Launch(rms_norm, x, gains[d.q_lora], 1e-6)

    def add_norm(seed: int) -> Run:
        x, residual = normal(seed, m, d.hidden), normal(seed + 1, m, d.hidden)
        return Launch(add_rms_norm, x, residual, gains[d.hidden], 1e-6)

    def groups(seed: int) -> Run:
        return Launch(per_token_group_quant_fp8, normal(seed, m, d.hidden))

    shape = f"M={m}"
    yield Case(f"rms_norm {d.q_lora}", shape, norm_cost(m, d.q_lora, 2), norm)
    yield Case(f"add_rms_norm {d.hidden}", shape, norm_cost(m, d.hidden, 2, 4), add_norm)
    cost = per_token_group_quant_fp8_cost(m, d.hidden)
    yield Case(f"group quant {d.hidden}", shape, cost, groups, FP8)


def preparations(d: Dims, m: int) -> Iterator[Case]:
    """Rotations, with what is fused to them."""
    c, r, dim, h = d.latent, d.rope, d.index_dim, d.index_heads
    angles = rope_tables(1, m, r)

    def q_rope(seed: int) -> Run:
        q = normal(seed, m, d.heads, d.nope + r)[..., d.nope :]
        return Launch(apply_rope, q, *angles, True)

    def q_quant(seed: int) -> Run:
        q = normal(seed, m, d.heads, c + r).split((c, r), -1)
        k = normal(seed + 1, m, c + r).split((c, r), -1)
        return Launch(mla_rope_quantize_fp8, *q, *k, *angles)

    def index_q(seed: int) -> Run:
        q, gate = normal(seed, m, h, dim), normal(seed, m, h, dtype=torch.float32)
        return Launch(index_q_prep, q, gate, *angles, False, 0.1, 0.1, True)

    shape = f"M={m} H={d.heads}"
    yield Case("apply_rope", shape, apply_rope_cost(m, d.heads, r, 2), q_rope)
    cost = mla_rope_quantize_fp8_cost(m, d.heads, c, r)
    yield Case("mla_rope_quantize_fp8", shape, cost, q_quant, FP8)
    cost = index_q_prep_cost(m, h, dim, r, True)
    yield Case("index_q_prep fp8", f"M={m} H={h}", cost, index_q, FP8)


def writes(d: Dims, m: int) -> Iterator[Case]:
    """One row a token into the caches; each compared over the whole cache."""
    c, r, dim = d.latent, d.rope, d.index_dim
    gains = {n: normal(n, n, dtype=torch.float32) for n in (c, dim)}
    angles = rope_tables(1, m, r)

    def index_k(seed: int) -> Run:
        cache, k = empty_index_keys("fp8", d), normal(seed, m, dim)
        norm = (gains[dim], normal(dim + 1, dim, dtype=torch.float32), 1e-6)
        return Write((cache,), index_k_write, cache, where(seed, m), k, *norm, *angles, False)

    def copy(layout: str) -> Callable[[int], Run]:
        def build(seed: int) -> Run:
            cache = empty_latents(layout, SLOTS, d)
            keys = normal(seed, m, c + r).to(cache.dtype).split((c, r), -1)
            return Write((cache,), set_mla_kv_buffer, cache, where(seed, m), *keys)

        return build

    def fused_write(layout: str) -> Callable[[int], Run]:
        def build(seed: int) -> Run:
            cache = empty_latents(layout, SLOTS, d)
            nope, pe = normal(seed, m, c + r).split((c, r), -1)
            args = (cache, where(seed, m), nope, gains[c], 1e-6, pe, *angles)
            return Write((cache,), norm_rope_set_mla_kv_buffer, *args)

        return build

    shape = f"M={m}"
    yield Case("index_k_write fp8", shape, index_k_write_cost(m, dim, r, True), index_k, FP8)
    for layout in ("bf16", "fp8_flat"):
        cost = set_mla_kv_buffer_cost(m, latent_row_bytes(layout, d))
        yield Case(f"set_mla_kv_buffer {layout}", shape, cost, copy(layout), EXACT)
    for layout in ("bf16", "fp8"):
        cost = norm_rope_set_mla_kv_buffer_cost(m, c, r, latent_row_bytes(layout, d))
        tolerance = {} if layout == "bf16" else {"tolerance": FP8}
        yield Case(f"norm + rope + write {layout}", shape, cost, fused_write(layout), **tolerance)


def step_ends(d: Dims, m: int) -> Iterator[Case]:
    """What runs once a step: the tokens' rows, their angles, the greedy choice."""

    def rows(seed: int) -> Run:
        table = vocabulary(d)
        return Launch(embedding, torch.randint(0, d.vocab, (m,), **seeded(seed)), table)

    def angles(seed: int) -> Run:
        positions = torch.randint(0, 1 << 17, (m,), **seeded(seed))
        exponents = torch.arange(0, d.rope, 2, device=positions.device) / d.rope
        return Launch(rope_cos_sin, positions, 1e4**-exponents, 1.0)

    def greedy(seed: int) -> Run:
        return Launch(argmax, normal(seed, m, d.vocab, dtype=torch.float32))

    shape = f"M={m}"
    yield Case(f"embedding {d.hidden}", shape, embedding_cost(m, d.hidden), rows, EXACT)
    yield Case("rope_cos_sin", shape, rope_cos_sin_cost(m, d.rope), angles, ANGLES)
    yield Case(f"argmax {d.vocab}", shape, argmax_cost(m, d.vocab), greedy, EXACT)


@functools.cache
def vocabulary(d: Dims) -> Tensor:
    """The embedding's table."""
    return normal(5, d.vocab, d.hidden)
