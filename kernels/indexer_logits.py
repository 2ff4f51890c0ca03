"""Scores of the lightning indexer over a paged cache of keys.

    I(t, s) = sum_j W_j(t) * relu(q_j(t) . k(s))        s < seq_lens[t], else -inf; fp32

W holds everything that is constant over s: the head gate (which may be negative, so it stays
outside the ReLU), q's FP8 scale, index_head_dim^-0.5 and index_n_heads^-0.5. DeepSeek-V3.2-Exp
report, section 2.1; model-spec 4. Called by the indexer, in chunks of rows.
"""

import torch
from torch import Tensor

from minidsv.kernels.constants import PAGE_SIZE
from minidsv.kernels.index_cache import read_index_k_buffer


def paged_index_logits(
    q: Tensor,
    weights: Tensor,
    buffer: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    request_index: Tensor,
) -> Tensor:
    """Score every visible key of each row.

    q fp32 [T, H, D]; weights fp32 [T, H]; buffer: index cache; block_table [R, pages]; seq_lens,
    request_index [T]. Returns fp32 [T, max(seq_lens)], -inf behind a row's last visible key.
    """
    rows, heads, dim = q.shape
    logits = q.new_full((rows, int(seq_lens.max())), float("-inf"))
    for request in request_index.unique().tolist():
        mine = torch.where(request_index == request)[0]
        length = int(seq_lens[mine].max())
        pages = block_table[request, : -(-length // PAGE_SIZE)].long()
        keys = read_index_k_buffer(buffer, pages, dim)[:length]
        dots = (q[mine].flatten(0, 1) @ keys.T).relu_().unflatten(0, (-1, heads))  # [t, H, length]
        scores = (weights[mine].unsqueeze(1) @ dots).squeeze(1)
        hidden = torch.arange(length, device=q.device) >= seq_lens[mine].unsqueeze(1)
        logits[mine, :length] = scores.masked_fill_(hidden, float("-inf"))
    return logits
