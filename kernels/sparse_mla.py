"""Sparse multi-head latent attention in its absorbed (MQA) form, over a list of physical slots a
token.

    score[t, h, s] = (q_latent[t, h] . ckv[s] + q_pe[t, h] . k_pe[s]) * scale       s in
    topk_indices[t], others ignored
    out[t, h]      = sum_s softmax(score[t, h])[s] * ckv[s]                         the first C of
    the same row

One shared key-value head: each cache row is [ckv | k_pe]. The scale is given, never derived from
the row's width. A token without a single valid slot yields zeros. Called by MLA for decode and
prefill alike. DeepSeek-V2 report, appendix C.
"""

import torch
from torch import Tensor

from minidsv.kernels.set_mla_kv_buffer import read_mla_kv_buffer

_CHUNK_ELEMENTS = 1 << 22  # gathered cache elements at a time: 16 MiB of fp32


def sparse_mla(
    q_latent: Tensor,
    q_pe: Tensor,
    kv_buffer: Tensor,
    topk_indices: Tensor,
    scale: float,
    kv_scale: float = 1.0,
) -> Tensor:
    """Attend each token to its slots.

    q_latent [T, H, C], q_pe [T, H, r]; kv_buffer [num_slots, row]; topk_indices int64 [T, K], -1 =
    none. Returns the latent output [T, H, C] in q_latent's dtype; fp32 inside.
    """
    latent_dim = q_latent.shape[-1]
    query = torch.cat((q_latent, q_pe), -1).float()
    out = torch.empty_like(q_latent)
    step = max(1, _CHUNK_ELEMENTS // (topk_indices.shape[1] * query.shape[-1]))
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
