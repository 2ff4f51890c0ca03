"""Multi-head latent attention, absorbed: decode and prefill alike attend over cached latents.

    qr = rms(W_q_a x)    [q_nope | q_pe] = W_q_b qr    [ckv | k_pe] = W_kv_a x    ckv = rms(ckv)
    cache row = [ckv | rope(k_pe)]        q_latent = q_nope W_UK        o = W_UV (attention over the
    indexer's slots)

W_UK and W_UV are the two halves of each head's rows of kv_b_proj. RoPE is interleaved in both
families. A flat FP8 cache takes q and k as e4m3 over scalar scales of 1. DeepSeek-V2 report (arXiv
2405.04434), section 2.1; model-spec 2.
"""

import torch
from torch import Tensor

from minidsv.batch import StepBatch
from minidsv.config import ModelConfig
from minidsv.indexer import Indexer
from minidsv.kernels.absorb import absorb_q
from minidsv.kernels.attention_prep import (
    IndexKeys,
    IndexQueries,
    LatentRows,
    attention_prep,
    index_prep,
)
from minidsv.kernels.gemm import fused_a_gemm, linear, normed_linear
from minidsv.kernels.norm import PreNorm, rms_norm
from minidsv.kernels.rope_quant import mla_rope_quantize_fp8
from minidsv.kernels.set_mla_kv_buffer import set_mla_kv_buffer
from minidsv.kernels.sparse_mla import sparse_mla_values
from minidsv.kv_cache import KVCache
from minidsv.layers import LayerWeights, Operators


class MLA:
    """The attention of one layer, with its indexer where it owns one."""

    def __init__(
        self,
        config: ModelConfig,
        weights: LayerWeights,
        layer: int,
        cache: KVCache,
        operators: Operators,
    ):
        c = self.config = config
        self.operators, self.kv_buffer = operators, cache.latent[layer]
        index_cache = cache.index[layer]
        self.indexer = (
            None if index_cache is None else Indexer(c, weights, index_cache, operators.pdl)
        )
        self.q_a_proj = weights.linear("q_a_proj")
        self.q_a_gain = weights["q_a_layernorm"].data
        self.q_b_proj = weights.linear("q_b_proj")
        self.kv_a_proj = weights.linear("kv_a_proj_with_mqa")
        self.kv_a_gain = weights["kv_a_layernorm"].data
        self.o_proj = weights.linear("o_proj")
        kv_b = weights["kv_b_proj"].data.unflatten(0, (c.num_attention_heads, -1))  # [H, n + v, C]
        self.w_uk, self.w_uv = kv_b.split((c.qk_nope_head_dim, c.v_head_dim), 1)

    def __call__(
        self,
        x: PreNorm,
        step: StepBatch,
        rope: tuple[Tensor, Tensor],
        topk_indices: Tensor | None,
        dense: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """x [T, hidden] -> (attention output [T, hidden], the residual, the slots attended to, for
        the shared layers that follow).

        topk_indices: the previous full layer's slots [T, K], used if this layer owns no indexer.
        dense: every visible slot [T, S] if no token sees more than index_topk keys; then nothing is
        scored.
        """
        c, pdl, indexer = self.config, self.operators.pdl, self.indexer
        activations = self.operators.activations_of(x)
        scorer = indexer if dense is None else None
        qr, latent, index_k, gate, residual = fused_a_gemm(
            x,
            self.q_a_proj,
            self.kv_a_proj,
            indexer.wk if indexer else None,
            scorer.weights_proj if scorer else None,
            pdl,
            activations,
        )
        projections = [self.q_b_proj, *([scorer.wq_b] if scorer else [])]
        query_norm = PreNorm(None, qr, self.q_a_gain, c.latent_norm_eps)
        (q, *index_q), _ = normed_linear(query_norm, projections, pdl, activations)
        keys = indexer.keys(index_k) if indexer and index_k is not None else None
        queries = scorer.queries(index_q[0], gate) if scorer and gate is not None else None
        q_latent, q_pe, prepared = self._prepare(q, latent, keys, queries, step, rope)
        if scorer is not None and prepared is not None:
            topk_indices = scorer.select(*prepared, step)
        elif indexer is not None:
            topk_indices = dense
        assert topk_indices is not None, "the first layer owns an indexer"
        out = sparse_mla_values(
            q_latent, q_pe, self.kv_buffer, topk_indices, self.w_uv, c.attention_scale, pdl
        )
        o_proj = self.o_proj.weight, self.o_proj.scale
        out = linear(out, *o_proj, pdl=pdl, activations=activations)
        return out, residual, topk_indices

    def _prepare(
        self,
        q: Tensor,
        latent: Tensor,
        keys: IndexKeys | None,
        queries: IndexQueries | None,
        step: StepBatch,
        rope: tuple[Tensor, Tensor],
    ) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor] | None]:
        """q [T, H * (n + r)] -> q_latent [T, H, C], rotated q_pe [T, H, r], and the indexer's
        queries and weights if any; latent [T, C + r] and keys go to the caches."""
        c, loc = self.config, step.slot_mapping
        q = q.unflatten(-1, (c.num_attention_heads, c.qk_head_dim))
        rows = LatentRows(self.kv_buffer, latent, self.kv_a_gain, c.latent_norm_eps)
        index = keys, queries, loc, rope, c.indexer_rope_interleave, self.operators.pdl
        if self.kv_buffer.dtype == torch.float8_e4m3fn:
            return *self._quantize_and_write(q, rows, loc, rope), index_prep(*index)
        return attention_prep(q, self.w_uk, rows, *index)

    def _quantize_and_write(
        self, q: Tensor, rows: LatentRows, loc: Tensor, rope: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """q [T, H, n + r] -> q_latent [T, H, C], rotated q_pe [T, H, r], both e4m3, as are the rows
        that go to a flat cache."""
        c, pdl = self.config, self.operators.pdl
        q_nope, q_pe = q.split((c.qk_nope_head_dim, c.qk_rope_head_dim), -1)
        latent, k_pe = rows.rows.split((c.kv_lora_rank, c.qk_rope_head_dim), -1)
        q_latent, q_pe, latent, k_pe = mla_rope_quantize_fp8(
            absorb_q(q_nope, self.w_uk, pdl),
            q_pe,
            rms_norm(latent, rows.gain, rows.eps, pdl),
            k_pe,
            *rope,
            backend=self.operators.rope_quant,
            pdl=pdl,
        )
        set_mla_kv_buffer(self.kv_buffer, loc, latent, k_pe, pdl)
        return q_latent, q_pe
