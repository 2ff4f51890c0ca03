"""Rows of `bench_kernels.py` for the MLPs: the dense one; router, selection and experts."""

import functools
from collections.abc import Iterator

import torch
from torch import Tensor

from bench_inputs import Case, Dims, Launch, Run, bf16, fp8, normal, total, unnormed
from minidsv.kernels.moe import moe_experts, moe_experts_cost, swiglu_mlp, swiglu_mlp_cost
from minidsv.kernels.router import (
    grouped_topk,
    grouped_topk_cost,
    norm_router_gemm,
    norm_router_gemm_cost,
    router_gemm,
    router_gemm_cost,
)

MLP = tuple[Tensor, Tensor | None, Tensor, Tensor | None]  # gate_up and down with their scales


def experts(d: Dims, m: int) -> Iterator[Case]:
    """Router, selection, and the experts on the choices that random logits give."""
    yield from routers(d, m)
    ids = choices(d, m, 0)[1]
    distinct = len(ids.unique())
    shape, sizes = f"M={m} ({distinct} distinct)", (m, d.top_k, distinct, d.hidden, d.inner)

    def routed(seed: int) -> Run:
        x, nothing = normal(seed, m, d.hidden), (None, None, None, None)
        return Launch(moe_experts, x, *choices(d, m, seed), *stacks(d), *nothing)

    def all_of(fp8_weights: bool, seed: int) -> Run:
        x, (weights, ids) = normal(seed, m, d.hidden), choices(d, m, seed)
        mlps = (*stacks(d, fp8_weights), *mlp(20 + seed, d.inner, d.hidden, fp8_weights))
        return lambda pdl: moe_experts(x, weights, ids, *mlps, pdl=pdl)  # no peer has the shared

    def dense(seed: int) -> Run:
        return Launch(swiglu_mlp, normal(seed, m, d.hidden), *mlp(seed, d.dense, d.hidden))

    yield Case("moe_experts", shape, moe_experts_cost(*sizes), routed)
    for name, weight_bytes in (("moe_experts + shared", 1), ("moe_experts bf16 + shared", 2)):
        cost = moe_experts_cost(*sizes, d.inner, weight_bytes)
        yield Case(name, shape, cost, functools.partial(all_of, weight_bytes == 1))
    yield Case("swiglu_mlp", f"M={m} I={d.dense}", swiglu_mlp_cost(m, d.hidden, d.dense), dense)


def routers(d: Dims, m: int) -> Iterator[Case]:
    """The gate's product, alone and with the norm before it, and the selection."""

    def gemm(seed: int) -> Run:
        return Launch(router_gemm, normal(seed, m, d.hidden), normal(seed + 1, d.experts, d.hidden))

    def norm_gemm(seed: int) -> Run:
        w = normal(seed + 1, d.experts, d.hidden)
        return Launch(norm_router_gemm, unnormed(seed, m, d.hidden), w)

    def select(seed: int) -> Run:
        logits = normal(seed, m, d.experts, dtype=torch.float32)
        bias = normal(seed + 1, d.experts, dtype=torch.float32) * 0.1
        return Launch(grouped_topk, logits, bias, **options(d))

    def both(seed: int) -> Run:
        x, w = normal(seed, m, d.hidden), normal(seed + 1, d.experts, d.hidden)
        bias = normal(seed + 2, d.experts, dtype=torch.float32) * 0.1
        return lambda pdl: grouped_topk(router_gemm(x, w, pdl=pdl), bias, **options(d), pdl=pdl)

    gemm_cost = router_gemm_cost(m, d.hidden, d.experts)
    select_cost = grouped_topk_cost(m, d.experts, d.top_k)
    yield Case("router_gemm", f"M={m}", gemm_cost, gemm)
    norm_cost = norm_router_gemm_cost(m, d.hidden, d.experts)
    yield Case("norm_router_gemm", f"M={m}", norm_cost, norm_gemm)
    yield Case("grouped_topk", f"M={m}", select_cost, select)
    yield Case(f"router + top-{d.top_k}", f"M={m}", total((gemm_cost, select_cost)), both)


def options(d: Dims) -> dict[str, int | float | bool]:
    return {
        "top_k": d.top_k, "n_group": 8, "topk_group": 4,
        "norm_topk_prob": True, "routed_scaling_factor": 2.5,
    }  # fmt: skip


def choices(d: Dims, m: int, seed: int) -> tuple[Tensor, Tensor]:
    """(weights, ids), each [m, top_k]."""
    logits = normal(seed, m, d.experts, dtype=torch.float32)
    weights, ids = grouped_topk(logits, torch.zeros_like(logits[0]), **options(d))
    return weights, ids.contiguous()


def mlp(seed: int, inner: int, hidden: int, fp8_weights: bool = True, *stack: int) -> MLP:
    """One, or a stack of them."""
    shapes = ((*stack, 2, inner, hidden), (*stack, hidden, inner))
    gate_up, down = (
        fp8(seed + i, *shape) if fp8_weights else (bf16(seed + i, *shape), None)
        for i, shape in enumerate(shapes)
    )
    return *gate_up, *down


@functools.cache
def stacks(d: Dims, fp8_weights: bool = True) -> MLP:
    """All experts: 11.3 GB at full size, 22.5 GB in BF16."""
    return mlp(11, d.inner, d.hidden, fp8_weights, d.experts)
