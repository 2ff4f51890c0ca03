"""Rows of `bench_kernels.py` for the projections, alone and with the norm before them."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

from bench_inputs import Case, Dims, Launch, Run, bf16, fp8_segment, normal, unnormed
from minidsv.kernels.gemm import (
    Segment,
    fused_a_gemm,
    fused_linear,
    fused_linear_cost,
    normed_linear,
    normed_linear_cost,
)
from minidsv.kernels.quant import block_scale_shape


class Sizes(NamedTuple):
    """Projections of one x: FP8 weights of `rows` by `columns`, and BF16 ones with fp32 outputs."""

    columns: int
    rows: Sequence[int]
    gate_rows: int = 0

    def segments(self, seed: int) -> list[Segment]:
        made = [fp8_segment(seed + i, rows, self.columns) for i, rows in enumerate(self.rows)]
        if self.gate_rows:
            gate = bf16(seed, self.gate_rows, self.columns)
            made.append(Segment(gate, out_dtype=torch.float32))
        return made

    def without_data(self) -> list[Segment]:
        """For the costs."""
        meta = torch.device("meta")
        made = [
            Segment(
                torch.empty(rows, self.columns, dtype=torch.float8_e4m3fn, device=meta),
                torch.empty(block_scale_shape(rows, self.columns), device=meta),
            )
            for rows in self.rows
        ]
        if self.gate_rows:
            gate = torch.empty(self.gate_rows, self.columns, dtype=torch.bfloat16, device=meta)
            made.append(Segment(gate, out_dtype=torch.float32))
        return made


def linears(d: Dims, m: int) -> Iterator[Case]:
    """At the head of attention, where one token's norm is inside; behind it; the vocabulary's."""
    keys = (d.q_lora, d.latent + d.rope, d.index_dim)
    fused_a = Sizes(d.hidden, keys, gate_rows=d.index_heads)
    q, index_q = d.heads * (d.nope + d.rope), d.index_heads * d.index_dim
    queries = Sizes(d.q_lora, (q, index_q))
    values = Sizes(d.heads * d.v, (d.hidden,))
    vocabulary = Sizes(d.hidden, (), gate_rows=d.vocab)

    def plain(op: str, shape: str, sizes: Sizes) -> Case:
        def build(seed: int) -> Run:
            return Launch(fused_linear, normal(seed, m, sizes.columns), sizes.segments(seed))

        return Case(op, f"M={m} {shape}", fused_linear_cost(m, sizes.without_data()), build)

    def head(seed: int) -> Run:
        q_a, kv_a, wk, gate = fused_a.segments(seed)
        return Launch(fused_a_gemm, unnormed(seed, m, d.hidden), q_a, kv_a, wk, gate.weight)

    def normed_queries(seed: int) -> Run:
        x = unnormed(seed, m, d.q_lora, adds=False)
        return Launch(normed_linear, x, queries.segments(seed))

    fused_a_shape = f"{d.hidden}->{sum(keys) + d.index_heads}"
    queries_shape = f"{d.q_lora}->{q}+{index_q}"
    yield plain("fused_a_gemm", fused_a_shape, fused_a)
    yield plain("q_b + index wq_b", queries_shape, queries)
    yield plain("o_proj", f"{values.columns}->{d.hidden}", values)
    yield plain("lm_head", f"{d.hidden}->{d.vocab}", vocabulary)
    cost = normed_linear_cost(m, fused_a.without_data(), adds=True)
    yield Case("norm + fused_a_gemm", f"M={m} {fused_a_shape}", cost, head)
    cost = normed_linear_cost(m, queries.without_data(), adds=False)
    yield Case("norm + q_b + index wq_b", f"M={m} {queries_shape}", cost, normed_queries)
