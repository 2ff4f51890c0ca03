"""Rows of `bench_kernels.py` for the indexer's scores and what is selected by them."""

import functools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from bench_inputs import EXACT, Case, Dims, Launch, Run, normal, seeded
from minidsv.kernels.constants import PAGE_SIZE
from minidsv.kernels.index_cache import fp8_page_bytes
from minidsv.kernels.indexer_logits import paged_index_logits, paged_index_logits_cost
from minidsv.kernels.topk import all_slots, all_slots_cost, select_topk, select_topk_cost

MOST_PAGES = 1 << 15  # of a cache; requests of more share some


def indexer(d: Dims, m: int) -> Iterator[Case]:
    """Scores and selection at some contexts, m rows of m requests; all slots of a short one."""
    h, dim, k = d.index_heads, d.index_dim, d.index_topk

    def scores(context: int) -> Callable[[int], Run]:
        def build(seed: int) -> Run:
            pages = -(-context // PAGE_SIZE)
            cache = index_cache(min(m * pages, MOST_PAGES), dim)
            q, gate = normal(seed, m, h, dim), normal(seed, m, h, dtype=torch.float32)
            q = q.to(torch.float8_e4m3fn)
            table, lens, rows = block_table(seed, m, context, len(cache))
            return Launch(paged_index_logits, q, gate, cache, table, lens, rows, context)

        return build

    def best(context: int) -> Callable[[int], Run]:
        def build(seed: int) -> Run:
            logits = normal(seed, m, context, dtype=torch.float32)
            table, lens, rows = block_table(seed, m, context, MOST_PAGES)
            tickets = torch.zeros_like(lens, dtype=torch.int32)
            return Launch(select_topk, logits, lens, k, table, rows, tickets=tickets)

        return build

    def everything(seed: int) -> Run:
        table, lens, rows = block_table(seed, m, k, MOST_PAGES)
        return Launch(all_slots, lens, table, rows, k)

    for context in d.contexts:
        shape = f"M={m} {context // 1024}k"
        cost = paged_index_logits_cost([context] * m, h, dim, dim + 4, 1)
        yield Case("index logits fp8", shape, cost, scores(context))
        yield Case(f"top-{k}", shape, select_topk_cost([context] * m, k), best(context), EXACT)
    yield Case("all_slots", f"M={m} {k}", all_slots_cost(m, k), everything, EXACT)


@functools.cache
def index_cache(pages: int, dim: int) -> Tensor:
    """Random keys of DeepGEMM's page, scales of 1."""
    keys = torch.randn(pages, PAGE_SIZE * dim, **seeded(3))
    cache = torch.empty(pages, fp8_page_bytes(dim), dtype=torch.uint8, device=keys.device)
    cache[:, : PAGE_SIZE * dim] = keys.to(torch.float8_e4m3fn).view(torch.uint8)
    cache[:, PAGE_SIZE * dim :].view(torch.float32).fill_(1.0)
    return cache


def block_table(seed: int, m: int, context: int, pages: int) -> tuple[Tensor, Tensor, Tensor]:
    """Shuffled pages [m, *], seq_lens [m], request_index [m]; requests share pages if they must."""
    wanted = -(-context // PAGE_SIZE)
    order = torch.randperm(pages, **seeded(seed))
    table = order.repeat(-(-m * wanted // pages))[: m * wanted].view(m, wanted)
    return table, torch.full_like(table[:, 0], context), torch.arange(m, device=table.device)
