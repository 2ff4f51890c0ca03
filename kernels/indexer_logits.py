"""Scores of the lightning indexer over a paged cache of keys.

    I(t, s) = sum_j W_j(t) * relu(q_j(t) . k(s))        s < seq_lens[t]; fp32

W holds everything that is constant over s: the head gate (which may be negative, so it stays
outside the ReLU), q's FP8 scale, index_head_dim^-0.5 and index_n_heads^-0.5. A key's own FP8 scale
is positive, so it comes out of the ReLU and multiplies the sum. DeepSeek-V3.2-Exp report, section
2.1; model-spec 4. Called by the indexer, in chunks of `chunk_rows` rows.
"""

import torch
from torch import Tensor

from minidsv.kernels.constants import PAGE_SIZE
from minidsv.kernels.index_cache import fp8_page_bytes, read_index_k_buffer
from minidsv.kernels.pdl import PdlMode, triton_mode

_REF_ELEMENTS = 1 << 20  # scores of all heads that the reference holds at a time: 4 MiB
CHUNK_SCORES = 1 << 25  # of a chunk of rows: 128 MiB, and twice as much to select from them


def chunk_rows(q: Tensor, max_seq_len: int, pdl: PdlMode | None = None) -> int:
    """Rows of q [T, H, D] to score at a time."""
    if triton_mode(q, pdl) is None:
        return max(1, _REF_ELEMENTS // (q.shape[1] * max_seq_len))
    return max(1, CHUNK_SCORES // max_seq_len)


def paged_index_logits_ref(
    q: Tensor,
    weights: Tensor,
    buffer: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    request_index: Tensor,
    max_seq_len: int,
) -> Tensor:
    """The scores in PyTorch, -inf behind a row's last visible key."""
    _, heads, dim = q.shape
    logits = torch.full((q.shape[0], max_seq_len), float("-inf"), device=q.device)
    for request in request_index.unique().tolist():
        mine = torch.where(request_index == request)[0]
        length = int(seq_lens[mine].max())
        pages = block_table[request, : -(-length // PAGE_SIZE)].long()
        keys = read_index_k_buffer(buffer, pages, dim)[:length]
        queries = q[mine].float().flatten(0, 1)
        dots = (queries @ keys.T).relu_().unflatten(0, (-1, heads))  # [t, H, length]
        scores = (weights[mine].unsqueeze(1) @ dots).squeeze(1)
        hidden = torch.arange(length, device=q.device) >= seq_lens[mine].unsqueeze(1)
        logits[mine, :length] = scores.masked_fill_(hidden, float("-inf"))
    return logits


def paged_index_logits(
    q: Tensor,
    weights: Tensor,
    buffer: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    request_index: Tensor,
    max_seq_len: int,
    pdl: PdlMode | None = None,
) -> Tensor:
    """Score every visible key of each row.

    q [T, H, D]: e4m3 for an fp8 cache, else the cache's dtype; weights fp32 [T, H]; buffer: index
    cache; block_table [R, pages] int64 or int32; seq_lens <= max_seq_len, request_index [T] int64.
    Returns fp32 [T, max_seq_len]. Behind a row's last visible key the reference (`pdl` None, CPU
    tensors) writes -inf and the kernel nothing: `select_topk` does not look there.
    """
    rows, heads, dim = q.shape
    assert weights.shape == (rows, heads), f"weights {tuple(weights.shape)}, q {tuple(q.shape)}"
    assert weights.dtype == torch.float32, f"weights {weights.dtype} is not float32"
    assert seq_lens.shape == request_index.shape == (rows,), (
        f"seq_lens {tuple(seq_lens.shape)}, request_index {tuple(request_index.shape)}, T = {rows}"
    )
    page = (fp8_page_bytes(dim),) if buffer.dtype == torch.uint8 else (PAGE_SIZE, dim)
    assert buffer.shape[1:] == page, f"buffer {tuple(buffer.shape)} is not [pages, {page}]"
    assert max_seq_len <= block_table.shape[1] * PAGE_SIZE, (
        f"max_seq_len {max_seq_len}, block_table {tuple(block_table.shape)}"
    )
    mode = triton_mode(q, pdl)
    if mode is None:
        return paged_index_logits_ref(
            q, weights, buffer, block_table, seq_lens, request_index, max_seq_len
        )
    from minidsv.kernels.indexer_logits_triton import score

    return score(q, weights, buffer, block_table, seq_lens, request_index, max_seq_len, mode)


def paged_index_logits_cost(
    seq_lens: list[int], heads: int, dim: int, key_bytes: int, query_bytes: int
) -> tuple[int, int]:
    """(bytes, FLOPs) of one row a request: keys (132 bytes each in fp8), q, W, scores."""
    keys, rows = sum(seq_lens), len(seq_lens)
    nbytes = keys * (key_bytes + 4) + rows * heads * (dim * query_bytes + 4)
    return nbytes, keys * heads * (2 * dim + 3)
