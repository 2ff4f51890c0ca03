"""Rows of `bench_kernels.py` for the small operators: norms, rotations, quantisation, writes."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from bench_inputs import EXACT, FP8, Case, Dims, Launch, Run, normal, rope_tables
from minidsv.kernels.argmax import argmax, argmax_cost
from minidsv.kernels.index_cache import fp8_page_bytes
from minidsv.kernels.indexer_prep import (
    index_k_write,
    index_k_write_cost,
    index_q_prep,
    index_q_prep_cost,
)
from minidsv.kernels.mla_prep import norm_rope_set_mla_kv_buffer, norm_rope_set_mla_kv_buffer_cost
from minidsv.kernels.norm import add_rms_norm, norm_cost, rms_norm
from minidsv.kernels.pdl import PdlMode
from minidsv.kernels.quant import per_token_group_quant_fp8, per_token_group_quant_fp8_cost
from minidsv.kernels.rope import apply_rope, apply_rope_cost
from minidsv.kernels.rope_quant import mla_rope_quantize_fp8, mla_rope_quantize_fp8_cost
from minidsv.kernels.set_mla_kv_buffer import fp8_row_bytes, set_mla_kv_buffer

SLOTS = 1 << 16


def where(seed: int, m: int) -> Tensor:
    """m slots, distinct."""
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randperm(SLOTS, device="cuda", generator=generator)[:m]


def norms(d: Dims, m: int) -> Iterator[Case]:
    """RMSNorm alone and with the residual, argmax, group quantisation."""
    gains = {n: normal(n, n, dtype=torch.float32) for n in (d.hidden, d.q_lora)}

    def norm(seed: int) -> Run:
        x = normal(seed, m, d.q_lora)
        return Launch(rms_norm, x, gains[d.q_lora], 1e-6)

    def add_norm(seed: int) -> Run:
        x, residual = normal(seed, m, d.hidden), normal(seed + 1, m, d.hidden)
        return Launch(add_rms_norm, x, residual, gains[d.hidden], 1e-6)

    def groups(seed: int) -> Run:
        x = normal(seed, m, d.hidden)
        return Launch(per_token_group_quant_fp8, x)

    def greedy(seed: int) -> Run:
        logits = normal(seed, m, d.vocab, dtype=torch.float32)
        return lambda pdl: argmax(logits, pdl)

    shape = f"M={m}"
    yield Case(f"rms_norm {d.q_lora}", shape, norm_cost(m, d.q_lora, 2), norm)
    yield Case(f"add_rms_norm {d.hidden}", shape, norm_cost(m, d.hidden, 2, 4), add_norm)
    cost = per_token_group_quant_fp8_cost(m, d.hidden)
    yield Case(f"group quant {d.hidden}", shape, cost, groups, FP8)
    yield Case(f"argmax {d.vocab}", shape, argmax_cost(m, d.vocab), greedy, EXACT)


def preparations(d: Dims, m: int) -> Iterator[Case]:
    """Rotations, with what is fused to them."""
    c, r, dim, h = d.latent, d.rope, d.index_dim, d.index_heads
    cos, sin = rope_tables(1, m, r)

    def q_rope(seed: int) -> Run:
        q = normal(seed, m, d.heads, d.nope + r)[..., d.nope :]
        return lambda pdl: apply_rope(q, cos, sin, True, pdl)

    def q_quant(seed: int) -> Run:
        q = normal(seed, m, d.heads, c + r).split((c, r), -1)
        k = normal(seed + 1, m, c + r).split((c, r), -1)
        return Launch(mla_rope_quantize_fp8, *q, *k, cos, sin)

    def index_q(seed: int) -> Run:
        q, gate = normal(seed, m, h, dim), normal(seed, m, h, dtype=torch.float32)
        return lambda pdl: index_q_prep(q, gate, cos, sin, False, 0.1, 0.1, True, pdl)

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
    cos, sin = rope_tables(1, m, r)

    def index_k(seed: int) -> Run:
        k, loc = normal(seed, m, dim), where(seed, m)
        cache = torch.zeros(SLOTS // 64, fp8_page_bytes(dim), dtype=torch.uint8, device="cuda")

        def run(pdl: PdlMode | None) -> Tensor:
            index_k_write(cache, loc, k, gains[dim], gains[dim], 1e-6, cos, sin, False, pdl)
            return cache

        return run

    def write(seed: int) -> Run:
        cache = torch.zeros(SLOTS, c + r, dtype=torch.bfloat16, device="cuda")
        keys, loc = normal(seed, m, c + r).split((c, r), -1), where(seed, m)

        def run(pdl: PdlMode | None) -> Tensor:
            set_mla_kv_buffer(cache, loc, *keys, pdl)
            return cache

        return run

    def fused_write(width: int, dtype: torch.dtype) -> Callable[[int], Run]:
        def build(seed: int) -> Run:
            cache = torch.zeros(SLOTS, width, dtype=dtype, device="cuda")
            keys, loc = normal(seed, m, c + r).split((c, r), -1), where(seed, m)

            def run(pdl: PdlMode | None) -> Tensor:
                norm_rope_set_mla_kv_buffer(
                    cache, loc, keys[0], gains[c], 1e-6, keys[1], cos, sin, pdl=pdl
                )
                return cache

            return run

        return build

    shape, row = f"M={m}", 2 * (c + r)
    yield Case("index_k_write fp8", shape, index_k_write_cost(m, dim, r, True), index_k, FP8)
    yield Case("set_mla_kv_buffer bf16", shape, (m * (2 * row + 8), 0), write, EXACT)
    cost = norm_rope_set_mla_kv_buffer_cost(m, c, r, row)
    build = fused_write(c + r, torch.bfloat16)
    yield Case("norm + rope + write bf16", shape, cost, build)
    width = fp8_row_bytes(c, r)
    cost = norm_rope_set_mla_kv_buffer_cost(m, c, r, width)
    yield Case("norm + rope + write fp8", shape, cost, fused_write(width, torch.uint8), FP8)
