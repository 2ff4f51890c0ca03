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
from minidsv.kernels.gemm import linear
from minidsv.kernels.index_cache import rotate_quantize, set_index_k_buffer
from minidsv.kernels.indexer_logits import chunk_rows, paged_index_logits
from minidsv.kernels.norm import layer_norm
from minidsv.kernels.rope import apply_rope
from minidsv.kernels.topk import select_topk
from minidsv.layers import LayerWeights

K_NORM_EPS = 1e-6  # a LayerNorm's, whatever rms_norm_eps is


def apply_q_scale_and_softmax_scale(
    weights: Tensor, q_scale: Tensor, softmax_scale: float
) -> Tensor:
    """Fold q's FP8 scales into the gates: [T, H], [T, H, 1] -> [T, H] (SGLang PR 23965)."""
    return (weights.unsqueeze(-1) * q_scale * softmax_scale).squeeze(-1)


class Indexer:
    """One layer's indexer over its own cache of keys."""

    def __init__(self, config: ModelConfig, weights: LayerWeights, cache: Tensor):
        self.config, self.cache = config, cache
        self.wq_b = weights.linear("indexer.wq_b")
        self.wk = weights.linear("indexer.wk")
        self.weights_proj = weights["indexer.weights_proj"].data
        self.k_norm = weights["indexer.k_norm"].data
        self.k_norm_bias = weights["indexer.k_norm_bias"].data

    def write_keys(self, x: Tensor, step: StepBatch, rope: tuple[Tensor, Tensor]) -> None:
        """Cache the keys of x [T, hidden]; every token's, also when no step scores them yet."""
        k = layer_norm(self.wk(x), self.k_norm, self.k_norm_bias, K_NORM_EPS)
        set_index_k_buffer(self.cache, step.slot_mapping, self._rope_first(k, rope))

    def select(self, x: Tensor, qr: Tensor, step: StepBatch, rope: tuple[Tensor, Tensor]) -> Tensor:
        """x [T, hidden], qr [T, q_lora_rank] -> physical slots int64 [T, K], -1 padded."""
        c = self.config
        q = self.wq_b(qr).unflatten(-1, (c.index_n_heads, c.index_head_dim))
        q = self._rope_first(q, rope)
        gate = linear(x, self.weights_proj, out_dtype=torch.float32)
        gate = gate * c.index_n_heads**-0.5
        if self.cache.dtype == torch.uint8:
            q, q_scale = rotate_quantize(q)
            gate = apply_q_scale_and_softmax_scale(gate, q_scale, c.index_head_dim**-0.5)
        else:
            gate = gate * c.index_head_dim**-0.5
        rows = chunk_rows(q, step.max_seq_len)
        chunks = [
            self._select_rows(q[i : i + rows], gate[i : i + rows], step, slice(i, i + rows))
            for i in range(0, q.shape[0], rows)
        ]
        topk_indices = torch.cat(chunks) if len(chunks) > 1 else chunks[0]
        if step.selections is not None:
            step.selections.record(topk_indices)
        return topk_indices

    def _select_rows(self, q: Tensor, gate: Tensor, step: StepBatch, rows: slice) -> Tensor:
        seq_lens, request_index = step.seq_lens[rows], step.request_index[rows]
        logits = paged_index_logits(
            q, gate, self.cache, step.block_table, seq_lens, request_index, step.max_seq_len
        )
        k = self.config.index_topk
        return select_topk(logits, seq_lens, k, step.block_table, request_index)

    def _rope_first(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        c = self.config
        turned, rest = x.split((c.qk_rope_head_dim, c.index_head_dim - c.qk_rope_head_dim), -1)
        return torch.cat((apply_rope(turned, *rope, c.indexer_rope_interleave), rest), -1)
