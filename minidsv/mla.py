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
from minidsv.kernels.absorb import absorb_q, absorb_v
from minidsv.kernels.gemm import fused_a_gemm, fused_linear
from minidsv.kernels.mla_prep import norm_rope_set_mla_kv_buffer
from minidsv.kernels.norm import PreNorm, pre_norm, rms_norm
from minidsv.kernels.rope import apply_rope
from minidsv.kernels.rope_quant import mla_rope_quantize_fp8
from minidsv.kernels.set_mla_kv_buffer import set_mla_kv_buffer
from minidsv.kernels.sparse_mla import sparse_mla
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
        scorer = indexer if dense is None else None
        normed, residual = pre_norm(x, pdl)
        qr, latent, index_k, gate = fused_a_gemm(
            normed,
            self.q_a_proj,
            self.kv_a_proj,
            indexer.wk if indexer else None,
            scorer.weights_proj if scorer else None,
            pdl,
        )
        qr = rms_norm(qr, self.q_a_gain, c.latent_norm_eps, pdl)
        q, *index_q = fused_linear(qr, [self.q_b_proj, *([scorer.wq_b] if scorer else [])], pdl)
        if indexer is not None and index_k is not None:
            indexer.write_keys(index_k, step, rope)
        if scorer is not None and gate is not None:
            topk_indices = scorer.select(index_q[0], gate, step, rope)
        elif indexer is not None:
            topk_indices = dense
        assert topk_indices is not None, "the first layer owns an indexer"
        q_latent, q_pe = self._absorb_and_write(q, latent, step, rope)
        scale = c.attention_scale
        latent = sparse_mla(
            q_latent, q_pe, self.kv_buffer, topk_indices, scale, out_dtype=q.dtype, pdl=pdl
        )
        out = absorb_v(latent, self.w_uv, pdl)
        return fused_linear(out, [self.o_proj], pdl)[0], residual, topk_indices

    def _absorb_and_write(
        self, q: Tensor, latent: Tensor, step: StepBatch, rope: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """q [T, H * (n + r)] -> q_latent [T, H, C], rotated q_pe [T, H, r]; latent [T, C + r] goes
        to the cache."""
        c, pdl = self.config, self.operators.pdl
        q_nope, q_pe = q.unflatten(-1, (c.num_attention_heads, c.qk_head_dim)).split(
            (c.qk_nope_head_dim, c.qk_rope_head_dim), -1
        )
        latent, k_pe = latent.split((c.kv_lora_rank, c.qk_rope_head_dim), -1)
        q_latent = absorb_q(q_nope, self.w_uk, pdl)
        gain, eps = self.kv_a_gain, c.latent_norm_eps
        if self.kv_buffer.dtype != torch.float8_e4m3fn:
            norm_rope_set_mla_kv_buffer(
                self.kv_buffer, step.slot_mapping, latent, gain, eps, k_pe, *rope, pdl=pdl
            )
            return q_latent, apply_rope(q_pe, *rope, interleaved=True, pdl=pdl)
        q_latent, q_pe, latent, k_pe = mla_rope_quantize_fp8(
            q_latent,
            q_pe,
            rms_norm(latent, gain, eps, pdl),
            k_pe,
            *rope,
            backend=self.operators.rope_quant,
            pdl=pdl,
        )
        set_mla_kv_buffer(self.kv_buffer, step.slot_mapping, latent, k_pe, pdl)
        return q_latent, q_pe
