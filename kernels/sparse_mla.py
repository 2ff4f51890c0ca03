"""Sparse multi-head latent attention in its absorbed (MQA) form, over a list of physical slots a
token.

    score[t, h, s] = (q_latent[t, h] . ckv[s] + q_pe[t, h] . k_pe[s]) * scale       s in
    topk_indices[t], others ignored
    out[t, h]      = sum_s softmax(score[t, h])[s] * ckv[s]                         the first C of
    the same row

One shared key-value head: each cache row is [ckv | k_pe]. The scale is given, never derived from
the row's width. A token without a single valid slot yields zeros. `sparse_mla_values` goes on to
the heads' values (absorb_v). Called by MLA for decode and prefill alike. DeepSeek-V2 report,
appendix C.
"""

import torch
from torch import Tensor

from minidsv.kernels.absorb import absorb_cost, absorb_v, assert_heads
from minidsv.kernels.pdl import PdlMode, triton_mode
from minidsv.kernels.set_mla_kv_buffer import fp8_row_bytes, read_mla_kv_buffer

CHUNK_ELEMENTS = 1 << 22  # gathered cache elements at a time: 16 MiB of fp32


def sparse_mla_ref(
    q_latent: Tensor,
    q_pe: Tensor,
    kv_buffer: Tensor,
    topk_indices: Tensor,
    scale: float,
    kv_scale: float = 1.0,
    q_scale: float = 1.0,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """The same in PyTorch, fp32 inside."""
    latent_dim = q_latent.shape[-1]
    query = torch.cat((q_latent.float(), q_pe.float()), -1)
    if q_latent.dtype == torch.float8_e4m3fn:
        query *= q_scale
    out = torch.empty_like(q_latent, dtype=out_dtype or output_dtype(q_latent))
    step = max(1, CHUNK_ELEMENTS // max(1, topk_indices.shape[1] * query.shape[-1]))
    for start in range(0, query.shape[0], step):
        chunk = slice(start, start + step)
        indices = topk_indices[chunk]
        valid = indices >= 0  # [t, K]
        rows = read_mla_kv_buffer(kv_buffer, indices.clamp_min(0), latent_dim, kv_scale)
        rows = rows.masked_fill(~valid.unsqueeze(-1), 0.0)  # whatever slot 0 holds
        scores = query[chunk] @ rows.mT * scale  # [t, H, K]
        scores = scores.masked_fill(~valid.unsqueeze(1), float("-inf"))
        probs = scores.softmax(-1).masked_fill(~valid.any(-1)[:, None, None], 0.0)
        out[chunk] = (probs @ rows[..., :latent_dim]).to(out.dtype)
    return out


def output_dtype(q_latent: Tensor) -> torch.dtype:
    """The query's dtype; bf16 for an e4m3 query."""
    return torch.bfloat16 if q_latent.dtype == torch.float8_e4m3fn else q_latent.dtype


def _assert_inputs(q_latent: Tensor, q_pe: Tensor, kv_buffer: Tensor, topk_indices: Tensor) -> None:
    assert q_latent.dim() == 3, f"q_latent {tuple(q_latent.shape)} is not [T, H, C]"
    tokens, _, c = q_latent.shape
    r = q_pe.shape[-1]
    assert q_pe.shape[:-1] == q_latent.shape[:-1], (
        f"q_pe {tuple(q_pe.shape)} is not {list(q_latent.shape[:-1])} + [r]"
    )
    assert q_pe.dtype == q_latent.dtype, f"q_latent {q_latent.dtype}, q_pe {q_pe.dtype}"
    assert topk_indices.shape == (tokens, topk_indices.shape[-1]), (
        f"topk_indices {tuple(topk_indices.shape)} is not [{tokens}, K]"
    )
    assert topk_indices.dtype == torch.int64, f"topk_indices {topk_indices.dtype} is not int64"
    assert kv_buffer.dim() == 2, f"kv_buffer {tuple(kv_buffer.shape)} is not [num_slots, row]"
    width = fp8_row_bytes(c, r) if kv_buffer.dtype == torch.uint8 else c + r
    assert kv_buffer.shape[1] == width, (
        f"kv_buffer {tuple(kv_buffer.shape)} {kv_buffer.dtype}: its rows must hold {width}"
    )


def _assert_scales(q_latent: Tensor, kv_buffer: Tensor, kv_scale: float, q_scale: float) -> None:
    """Each scale belongs to an e4m3 tensor."""
    e4m3 = torch.float8_e4m3fn
    assert kv_scale == 1.0 or kv_buffer.dtype == e4m3, f"{kv_scale=} for {kv_buffer.dtype} rows"
    assert q_scale == 1.0 or q_latent.dtype == e4m3, f"{q_scale=} for a {q_latent.dtype} query"
    assert q_latent.dtype != e4m3 or kv_buffer.dtype == e4m3, (
        f"an e4m3 query wants e4m3 rows, kv_buffer is {kv_buffer.dtype}"
    )


def sparse_mla(
    q_latent: Tensor,
    q_pe: Tensor,
    kv_buffer: Tensor,
    topk_indices: Tensor,
    scale: float,
    kv_scale: float = 1.0,
    q_scale: float = 1.0,
    out_dtype: torch.dtype | None = None,
    pdl: PdlMode | None = None,
) -> Tensor:
    """Attend each token to its slots.

    q_latent [T, H, C], q_pe [T, H, r] of one dtype; kv_buffer [num_slots, row], any of
    `set_mla_kv_buffer`'s layouts; topk_indices int64 [T, K], -1 = none. With the flat e4m3 rows
    (over `kv_scale`) the query may be e4m3 too (over `q_scale`, both parts). Returns the latent
    output [T, H, C] in `out_dtype` (None: the query's, bf16 for an e4m3 query). `pdl`: None runs
    the reference, a mode the Triton kernels in that mode (CPU tensors: the reference).
    """
    _assert_inputs(q_latent, q_pe, kv_buffer, topk_indices)
    _assert_scales(q_latent, kv_buffer, kv_scale, q_scale)
    mode = triton_mode(q_latent, pdl)
    if mode is None:
        return sparse_mla_ref(
            q_latent, q_pe, kv_buffer, topk_indices, scale, kv_scale, q_scale, out_dtype
        )
    from minidsv.kernels.combine_triton import combine

    partial, lse = _attend(
        q_latent, q_pe, kv_buffer, topk_indices, scale, kv_scale, q_scale, out_dtype, mode
    )
    return partial.squeeze(1) if partial.shape[1] == 1 else combine(partial, lse, mode)


def sparse_mla_values(
    q_latent: Tensor,
    q_pe: Tensor,
    kv_buffer: Tensor,
    topk_indices: Tensor,
    w_uv: Tensor,
    scale: float,
    pdl: PdlMode | None = None,
) -> Tensor:
    """absorb_v of sparse_mla: w_uv [H, v, C] -> [T, H * v] in w_uv's dtype.

    Of a lone token whose slots are split, one launch sums the splits and multiplies.
    """
    mode = triton_mode(q_latent, pdl)
    args = q_latent, q_pe, kv_buffer, topk_indices, scale, 1.0, 1.0, w_uv.dtype
    if mode is None or len(q_latent) != 1:
        return absorb_v(sparse_mla(*args, pdl), w_uv, pdl)
    _assert_inputs(q_latent, q_pe, kv_buffer, topk_indices)
    _assert_scales(q_latent, kv_buffer, 1.0, 1.0)
    assert_heads("latents", q_latent, w_uv, 2)
    from minidsv.kernels.combine_triton import combine_values

    partial, lse = _attend(*args, mode)
    if partial.shape[1] == 1:
        return absorb_v(partial.squeeze(1), w_uv, mode)
    return combine_values(partial, lse, w_uv, mode)


def _attend(
    q_latent: Tensor,
    q_pe: Tensor,
    kv_buffer: Tensor,
    topk_indices: Tensor,
    scale: float,
    kv_scale: float,
    q_scale: float,
    out_dtype: torch.dtype | None,
    mode: PdlMode,
) -> tuple[Tensor, Tensor]:
    """The Triton kernel: (latent outputs [T, S, H, C] of S splits, log2 of their sums)."""
    from minidsv.kernels.sparse_mla_triton import attend

    assert kv_buffer.is_contiguous(), (
        f"kv_buffer strides {kv_buffer.stride()}: want contiguous rows"
    )
    for name, x in (("q_latent", q_latent), ("q_pe", q_pe), ("topk_indices", topk_indices)):
        assert x.stride(-1) == 1, f"{name} strides {x.stride()}: want a last axis of step 1"
    out_dtype = out_dtype or output_dtype(q_latent)
    factor = scale * kv_scale * q_scale
    return attend(q_latent, q_pe, kv_buffer, topk_indices, out_dtype, factor, kv_scale, mode)


def sparse_mla_cost(
    tokens: int,
    heads: int,
    topk: int,
    kv_lora_rank: int,
    rope_dim: int,
    row_bytes: int,
    query_bytes: int = 2,
) -> tuple[int, int]:
    """(bytes, flops): each token's query, slots, rows and bf16 output move once."""
    query = heads * (kv_lora_rank + rope_dim) * query_bytes
    token_bytes = query + topk * (8 + row_bytes) + heads * kv_lora_rank * 2
    return tokens * token_bytes, tokens * heads * topk * 2 * (2 * kv_lora_rank + rope_dim)


def sparse_mla_values_cost(
    tokens: int,
    heads: int,
    topk: int,
    kv_lora_rank: int,
    rope_dim: int,
    row_bytes: int,
    query_bytes: int = 2,
    *,
    v_dim: int,
) -> tuple[int, int]:
    """(bytes, flops) with absorb_v, to which the latent outputs need not move."""
    sizes = tokens, heads, topk, kv_lora_rank, rope_dim, row_bytes, query_bytes
    parts = sparse_mla_cost(*sizes), absorb_cost(tokens, heads, kv_lora_rank, v_dim)
    nbytes, flops = (sum(of_parts) for of_parts in zip(*parts, strict=True))
    return nbytes - 2 * tokens * heads * kv_lora_rank * 2, flops
