"""What an attention layer does between its projections and its scores: one launch for few tokens.

    absorb_q, apply_rope              q_latent = q_nope W_UK, rope(q_pe)
    norm_rope_set_mla_kv_buffer       the latents' rows go to their cache
    index_k_write, index_q_prep       the indexer's keys to theirs; its queries

For many tokens these operators run one after another. Called by MLA.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from minidsv.kernels.absorb import absorb_cost, absorb_q, assert_heads
from minidsv.kernels.indexer_prep import (
    index_k_write,
    index_k_write_cost,
    index_q_prep,
    index_q_prep_cost,
)
from minidsv.kernels.mla_prep import norm_rope_set_mla_kv_buffer, norm_rope_set_mla_kv_buffer_cost
from minidsv.kernels.pdl import PdlMode, triton_mode
from minidsv.kernels.rope import apply_rope, apply_rope_cost
from minidsv.kernels.tiles_gemm import PREPARED_TOKENS

Angles = tuple[Tensor, Tensor]  # cos and sin


class LatentRows(NamedTuple):
    """What `norm_rope_set_mla_kv_buffer` takes; a flat e4m3 buffer wants its own operator."""

    kv_buffer: Tensor
    rows: Tensor  # [T, C + r], the latent and k_pe
    gain: Tensor
    eps: float


class IndexKeys(NamedTuple):
    """What `index_k_write` takes."""

    buffer: Tensor
    k: Tensor  # [T, D]
    gain: Tensor
    bias: Tensor
    eps: float


class IndexQueries(NamedTuple):
    """What `index_q_prep` takes."""

    q: Tensor  # [T, heads, D]
    gate: Tensor  # fp32 [T, heads]
    softmax_scale: float
    head_scale: float


def index_prep(
    keys: IndexKeys | None,
    queries: IndexQueries | None,
    loc: Tensor,
    rope: Angles,
    interleaved: bool,
    pdl: PdlMode | None = None,
) -> tuple[Tensor, Tensor] | None:
    """The indexer's share: keys written, (queries, weights) if there are any."""
    if keys is None:
        return None
    buffer, k, gain, bias, eps = keys
    index_k_write(buffer, loc, k, gain, bias, eps, *rope, interleaved, pdl)
    if queries is None:
        return None
    q, gate, softmax_scale, head_scale = queries
    fp8 = buffer.dtype == torch.uint8
    return index_q_prep(q, gate, *rope, interleaved, softmax_scale, head_scale, fp8, pdl)


def attention_prep(
    q: Tensor,
    w_uk: Tensor,
    latents: LatentRows,
    keys: IndexKeys | None,
    queries: IndexQueries | None,
    loc: Tensor,
    rope: Angles,
    interleaved: bool,
    pdl: PdlMode | None = None,
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor] | None]:
    """q [T, H, n + r], w_uk [H, n, C] -> (q_latent [T, H, C], q_pe [T, H, r], index_q_prep's).

    keys: None in a layer without an indexer; queries: None where nothing is scored, else (queries,
    weights) come back. loc [T]: the slots that the tokens' rows go to; rope: cos and sin fp32
    [T, r / 2]; interleaved: the indexer's layout. `pdl`: None runs the references.
    """
    assert latents.kv_buffer.dtype != torch.float8_e4m3fn, "a flat e4m3 buffer takes quantised rows"
    assert queries is None or keys is not None, "queries without keys"
    mode = triton_mode(q, pdl)
    if mode is not None and len(q) <= PREPARED_TOKENS:
        assert_heads("q_nope", q[..., : w_uk.shape[1]], w_uk, 1)
        from minidsv.kernels.attention_prep_triton import prepare

        return prepare(q, w_uk, latents, keys, queries, loc, rope, interleaved, mode)
    index = index_prep(keys, queries, loc, rope, interleaved, pdl)
    n, c = w_uk.shape[1:]
    kv_buffer, rows, gain, eps = latents
    norm_rope_set_mla_kv_buffer(kv_buffer, loc, rows[:, :c], gain, eps, rows[:, c:], *rope, pdl=pdl)
    return absorb_q(q[..., :n], w_uk, pdl), apply_rope(q[..., n:], *rope, True, pdl), index


def attention_prep_cost(
    tokens: int,
    heads: int,
    nope: int,
    c: int,
    r: int,
    row_bytes: int,
    index_heads: int = 0,
    index_dim: int = 0,
    index_fp8: bool = False,
) -> tuple[int, int]:
    """(bytes, FLOPs): the operators' with bf16 inputs; cos, sin and loc are read once.

    index_heads: 0 in a layer without an indexer, else it prepares keys and queries.
    """
    parts = [
        absorb_cost(tokens, heads, nope, c),
        apply_rope_cost(tokens, heads, r, 2),
        norm_rope_set_mla_kv_buffer_cost(tokens, c, r, row_bytes),
    ]
    again = 4 * tokens * r
    if index_heads:
        parts.append(index_k_write_cost(tokens, index_dim, r, index_fp8))
        parts.append(index_q_prep_cost(tokens, index_heads, index_dim, r, index_fp8))
        again += 2 * 4 * tokens * r + 8 * tokens
    nbytes, flops = (sum(of_parts) for of_parts in zip(*parts, strict=True))
    return nbytes - again, flops
