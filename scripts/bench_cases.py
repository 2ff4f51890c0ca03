"""What `bench_kernels.py` measures: each operator at a model's sizes."""

import functools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from bench_inputs import (
    CONTEXTS,
    EXACT,
    FP8,
    ROUNDED,
    Case,
    Dims,
    Launch,
    Run,
    fp8,
    fp8_segment,
    normal,
)
from bench_small import norms, preparations, writes
from minidsv.kernels.absorb import absorb_cost, absorb_q, absorb_v
from minidsv.kernels.constants import PAGE_SIZE
from minidsv.kernels.gemm import Segment, fused_linear, fused_linear_cost
from minidsv.kernels.index_cache import fp8_page_bytes
from minidsv.kernels.indexer_logits import paged_index_logits, paged_index_logits_cost
from minidsv.kernels.moe import moe_experts, moe_experts_cost
from minidsv.kernels.norm import PreNorm
from minidsv.kernels.router import (
    grouped_topk,
    grouped_topk_cost,
    norm_router_gemm,
    norm_router_gemm_cost,
    router_gemm,
    router_gemm_cost,
)
from minidsv.kernels.set_mla_kv_buffer import (
    fp8_row_bytes,
    set_mla_kv_buffer_fp8_quant,
)
from minidsv.kernels.sparse_mla import sparse_mla, sparse_mla_cost
from minidsv.kernels.topk import select_topk, select_topk_cost


def linears(d: Dims, m: int) -> Iterator[Case]:
    """The projections."""

    def case(op: str, shape: str, k: int, *rows: int, gate_rows: int = 0) -> Case:
        def segments(seed: int) -> list[Segment]:
            made = [fp8_segment(seed + i, n, k) for i, n in enumerate(rows)]
            if gate_rows:
                gate = normal(seed, gate_rows, k) * k**-0.5
                made.append(Segment(gate, out_dtype=torch.float32))
            return made

        def build(seed: int) -> Run:
            x, weights = normal(seed, m, k), segments(seed)
            return Launch(fused_linear, x, weights)

        cost = fused_linear_cost(m, segments(0))
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

    def absorbed(op: Callable[..., Tensor], k: int) -> Callable[[int], Run]:
        def build(seed: int) -> Run:
            kv_b = normal(seed, h, d.nope + d.v, c) * 0.05
            x, w = normal(seed, m, h, k), kv_b[:, : d.nope] if k == d.nope else kv_b[:, d.nope :]
            return Launch(op, x, w)

        return build

    yield Case("absorb_q", f"M={m} H={h}", absorb_cost(m, h, d.nope, c),
               absorbed(absorb_q, d.nope))  # fmt: skip
    yield Case("absorb_v", f"M={m} H={h}", absorb_cost(m, h, c, d.v),
               absorbed(absorb_v, c))  # fmt: skip

    def sparse(layout: str) -> Callable[[int], Run]:
        def build(seed: int) -> Run:
            slots = max(m * d.index_topk, 1 << 16)
            cache = latent_cache(layout, slots, d)
            q, q_pe = normal(seed, m, h, c), normal(seed, m, h, r)
            generator = torch.Generator("cuda").manual_seed(seed)
            where = torch.randperm(slots, device="cuda", generator=generator)
            indices = where[: m * d.index_topk].view(m, d.index_topk)
            scale = (d.nope + r) ** -0.5
            return Launch(sparse_mla, q, q_pe, cache, indices, scale)

        return build

    for layout, row in (("bf16", 2 * (c + r)), ("fp8", fp8_row_bytes(c, r))):
        cost = sparse_mla_cost(m, h, d.index_topk, c, r, row)
        tolerance = ROUNDED if layout == "bf16" else FP8
        yield Case(f"sparse_mla {layout}", f"M={m} H={h}", cost, sparse(layout), tolerance)


@functools.cache
def latent_cache(layout: str, slots: int, d: Dims) -> Tensor:
    """A full latent cache in bf16 or 656-byte rows."""
    rows = normal(7, slots, d.latent + d.rope)
    if layout == "bf16":
        return rows
    width = fp8_row_bytes(d.latent, d.rope)
    cache = torch.empty(slots, width, dtype=torch.uint8, device="cuda")
    nope, pe = rows.split((d.latent, d.rope), 1)
    loc = torch.arange(slots, device="cuda")
    set_mla_kv_buffer_fp8_quant(cache, loc, nope, pe)
    return cache


def indexer(d: Dims, m: int) -> Iterator[Case]:
    """Scores and selection at three contexts, m rows of m requests."""
    h, dim, k = d.index_heads, d.index_dim, d.index_topk

    def scores(context: int) -> Callable[[int], Run]:
        def build(seed: int) -> Run:
            pages = -(-context // PAGE_SIZE)
            cache = index_cache(min(m * pages, 1 << 15), dim)
            q, gate = normal(seed, m, h, dim), normal(seed, m, h, dtype=torch.float32)
            q = q.to(torch.float8_e4m3fn)
            table, lens, rows = block_table(seed, m, context, len(cache))
            return Launch(paged_index_logits, q, gate, cache, table, lens, rows, context)

        return build

    def best(context: int) -> Callable[[int], Run]:
        def build(seed: int) -> Run:
            logits = normal(seed, m, context, dtype=torch.float32)
            table, lens, rows = block_table(seed, m, context, 1 << 15)
            return Launch(select_topk, logits, lens, k, table, rows)

        return build

    for context in CONTEXTS:
        shape = f"M={m} {context // 1024}k"
        cost = paged_index_logits_cost([context] * m, h, dim, dim + 4, 1)
        yield Case("index logits fp8", shape, cost, scores(context), ROUNDED)
        yield Case(f"top-{k}", shape, select_topk_cost([context] * m, k), best(context), EXACT)


@functools.cache
def index_cache(pages: int, dim: int) -> Tensor:
    """Random keys of DeepGEMM's page, scales of 1."""
    generator = torch.Generator("cuda").manual_seed(3)
    keys = torch.randn(pages, PAGE_SIZE * dim, device="cuda", generator=generator)
    cache = torch.empty(pages, fp8_page_bytes(dim), dtype=torch.uint8, device="cuda")
    cache[:, : PAGE_SIZE * dim] = keys.to(torch.float8_e4m3fn).view(torch.uint8)
    cache[:, PAGE_SIZE * dim :].view(torch.float32).fill_(1.0)
    return cache


def block_table(seed: int, m: int, context: int, pages: int) -> tuple[Tensor, Tensor, Tensor]:
    """Shuffled pages [m, *], seq_lens [m], request_index [m]; requests share pages if they must."""
    wanted = -(-context // PAGE_SIZE)
    generator = torch.Generator("cuda").manual_seed(seed)
    order = torch.randperm(pages, device="cuda", generator=generator)
    table = order.repeat(-(-m * wanted // pages))[: m * wanted].view(m, wanted)
    return table, torch.full((m,), context, device="cuda"), torch.arange(m, device="cuda")


def experts(d: Dims, m: int) -> Iterator[Case]:
    """Router, selection, and the experts on the choices that random logits give."""
    options = {
        "top_k": d.top_k, "n_group": 8, "topk_group": 4,
        "norm_topk_prob": True, "routed_scaling_factor": 2.5,
    }  # fmt: skip

    def gemm(seed: int) -> Run:
        x, w = normal(seed, m, d.hidden), normal(seed + 1, d.experts, d.hidden)
        return Launch(router_gemm, x, w)

    def norm_gemm(seed: int) -> Run:
        out, residual = normal(seed, m, d.hidden), normal(seed + 2, m, d.hidden)
        w, gain = normal(seed + 1, d.experts, d.hidden), torch.ones(d.hidden, device="cuda")
        x = PreNorm(out, residual, gain, 1e-6)
        return lambda pdl: norm_router_gemm(x, w, pdl)

    def select(seed: int) -> Run:
        logits = normal(seed, m, d.experts, dtype=torch.float32)
        bias = normal(seed + 1, d.experts, dtype=torch.float32) * 0.1
        return Launch(grouped_topk, logits, bias, **options)

    def both(seed: int) -> Run:
        x, w = normal(seed, m, d.hidden), normal(seed + 1, d.experts, d.hidden)
        bias = normal(seed + 2, d.experts, dtype=torch.float32) * 0.1
        return lambda pdl: grouped_topk(router_gemm(x, w, pdl=pdl), bias, **options, pdl=pdl)

    def choices(seed: int) -> tuple[Tensor, Tensor]:
        logits = normal(seed, m, d.experts, dtype=torch.float32)
        weights, ids = grouped_topk(logits, torch.zeros(d.experts, device="cuda"), **options)
        return weights, ids.contiguous()

    def mlp(seed: int) -> Run:
        weights, ids = choices(seed)
        x, stacks = normal(seed, m, d.hidden), expert_weights(d)
        return Launch(moe_experts, x, weights, ids, *stacks, None, None, None, None)

    gemm_cost = router_gemm_cost(m, d.hidden, d.experts)
    select_cost = grouped_topk_cost(m, d.experts, d.top_k)
    yield Case("router_gemm", f"M={m}", gemm_cost, gemm)
    norm_cost = norm_router_gemm_cost(m, d.hidden, d.experts)
    yield Case("norm_router_gemm", f"M={m}", norm_cost, norm_gemm)
    yield Case("grouped_topk", f"M={m}", select_cost, select)
    sums = (gemm_cost[0] + select_cost[0], gemm_cost[1] + select_cost[1])
    yield Case("router + top-8", f"M={m}", sums, both)
    distinct = len(choices(0)[1].unique())
    cost = moe_experts_cost(m, d.top_k, distinct, d.hidden, d.inner)
    yield Case("moe_experts", f"M={m} ({distinct} distinct)", cost, mlp, FP8)


@functools.cache
def expert_weights(d: Dims) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """gate_up and down of all experts with their scales: 11.3 GB at full size."""
    return *fp8(11, d.experts, 2, d.inner, d.hidden), *fp8(12, d.experts, d.hidden, d.inner)


CHAIN = ("rms_norm", "add_rms_norm", "apply_rope", "index_q_prep", "index_k_write", "norm + rope",
         "absorb_q", "absorb_v", "router_gemm", "grouped_topk")  # fmt: skip


def chain(d: Dims, m: int) -> Iterator[Case]:
    """A layer's small kernels one after another: what a launch costs between them."""
    parts = [
        case
        for family in (norms, preparations, writes, attention, experts)
        for case in family(d, m)
        if case.op.startswith(CHAIN)
    ]

    def build(seed: int) -> Run:
        runs = [case.build(seed) for case in parts]
        return lambda pdl: [run(pdl) for run in runs][-1]

    cost = (sum(case.cost[0] for case in parts), sum(case.cost[1] for case in parts))
    yield Case(f"chain of {len(parts)} launches", f"M={m}", cost, build)


def all_cases(dims: Dims, tokens: list[int]) -> Iterator[Case]:
    """Every row at these sizes."""
    for m in tokens:
        for family in (linears, attention, indexer, experts, norms, preparations, writes, chain):
            yield from family(dims, m)
