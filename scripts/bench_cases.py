"""What `bench_kernels.py` measures: each operator at a model's sizes, a file a subject."""

from collections.abc import Iterator, Sequence

from bench_attention import attention
from bench_experts import experts
from bench_indexer import indexer
from bench_inputs import Case, Dims, Run, total
from bench_linears import linears
from bench_small import norms, preparations, step_ends, writes

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

    cost = total(case.cost for case in parts)
    yield Case(f"chain of {len(parts)} launches", f"M={m}", cost, build)


FAMILIES = (linears, attention, indexer, experts, norms, preparations, writes, step_ends, chain)


def all_cases(dims: Dims, tokens: Sequence[int]) -> Iterator[Case]:
    """Every row at these sizes."""
    for m in tokens:
        for family in FAMILIES:
            yield from family(dims, m)
