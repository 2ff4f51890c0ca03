"""The lightning indexer: picks the K cached tokens that each query attends to (DeepSeek Sparse
Attention).

    q_j = rope((W_wq_b qr)_j)    k = rope(LayerNorm(W_wk x))    w_j = (W_weights_proj x)_j * H^-0.5
    I(t, s) = sum_j w_j(t) relu(q_j(t) . k(s) * D^-0.5)         the K largest s <= t

qr is the *normalised* query latent. RoPE covers the first qk_rope_head_dim of the D dims:
half-split for DeepSeek, interleaved for GLM. With an fp8 cache q and k are rotated by the Hadamard
matrix and quantised, and q's scale is folded into w: the deployed form of DeepSeek's demo.
DeepSeek-V3.2-Exp report, section 2; model-spec 4.
"""

import torch
from torch import Tensor

from minidsv.batch import StepBatch
from minidsv.config import ModelConfig
from minidsv.kernels.attention_prep import IndexKeys, IndexQueries
from minidsv.kernels.indexer_logits import CHUNK_SCORES, chunk_rows, paged_index_logits
from minidsv.kernels.pdl import PdlMode
from minidsv.kernels.tiles_indexer import CHUNK
from minidsv.kernels.topk import select_topk
from minidsv.layers import LayerWeights

K_NORM_EPS = 1e-6  # a LayerNorm's, whatever rms_norm_eps is


class Indexer:
    """One layer's indexer over its own cache of keys; its projections run with the attention's."""

    def __init__(
        self, config: ModelConfig, weights: LayerWeights, cache: Tensor, pdl: PdlMode | None
    ):
        self.config, self.cache, self.pdl = config, cache, pdl
        self.wq_b = weights.linear("indexer.wq_b")
        self.wk = weights.linear("indexer.wk")
        self.weights_proj = weights["indexer.weights_proj"].data
        self.k_norm = weights["indexer.k_norm"].data
        self.k_norm_bias = weights["indexer.k_norm_bias"].data
        most = CHUNK_SCORES // CHUNK  # rows scored at a time that need one
        self.tickets = torch.zeros(most, dtype=torch.int32, device=cache.device)

    def keys(self, k: Tensor) -> IndexKeys:
        """k [T, D] = wk x, to be cached; every token's, also when no step scores them yet."""
        return IndexKeys(self.cache, k, self.k_norm, self.k_norm_bias, K_NORM_EPS)

    def queries(self, q: Tensor, gate: Tensor) -> IndexQueries:
        """q [T, H * D] = wq_b qr and gate fp32 [T, H] = weights_proj x, to be prepared."""
        heads, dim = self.config.index_n_heads, self.config.index_head_dim
        return IndexQueries(q.unflatten(-1, (heads, dim)), gate, dim**-0.5, heads**-0.5)

    def select(self, q: Tensor, gate: Tensor, step: StepBatch) -> Tensor:
        """Prepared q [T, H, D], gate [T, H] -> physical slots int64 [T, K], -1 padded."""
        rows = chunk_rows(q, step.max_seq_len, self.pdl)
        chunks = [
            self._select_rows(q[i : i + rows], gate[i : i + rows], step, slice(i, i + rows))
            for i in range(0, q.shape[0], rows)
        ]
        topk_indices = torch.cat(chunks) if len(chunks) > 1 else chunks[0]
        if step.selections is not None:
            step.selections.record(topk_indices)
        return topk_indices

    def _select_rows(self, q: Tensor, gate: Tensor, step: StepBatch, rows: slice) -> Tensor:
        seq_lens, request_index, pdl = step.seq_lens[rows], step.request_index[rows], self.pdl
        logits = paged_index_logits(
            q, gate, self.cache, step.block_table, seq_lens, request_index, step.max_seq_len, pdl
        )
        k, table = self.config.index_topk, step.block_table
        return select_topk(logits, seq_lens, k, table, request_index, pdl, self.tickets)
