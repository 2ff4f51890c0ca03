"""Multi-head latent attention, absorbed: decode and prefill alike attend over cached latents.

    qr = rms(W_q_a x)    [q_nope | q_pe] = W_q_b qr    [ckv | k_pe] = W_kv_a x    ckv = rms(ckv)
    cache row = [ckv | rope(k_pe)]        q_latent = q_nope W_UK        o = W_UV (attention over the
    indexer's slots)

W_UK and W_UV are the two halves of each head's rows of kv_b_proj. RoPE is interleaved in both
families. DeepSeek-V2 report (arXiv 2405.04434), section 2.1; model-spec 2.
"""

from torch import Tensor

from minidsv.batch import StepBatch
from minidsv.config import ModelConfig
from minidsv.indexer import Indexer
from minidsv.kernels.absorb import absorb_q, absorb_v
from minidsv.kernels.rope import apply_rope
from minidsv.kernels.set_mla_kv_buffer import set_mla_kv_buffer, set_mla_kv_buffer_fp8_quant
from minidsv.kernels.sparse_mla import sparse_mla
from minidsv.kv_cache import KVCache
from minidsv.layers import LayerWeights


class MLA:
    """The attention of one layer, with its indexer where it owns one."""

    def __init__(self, config: ModelConfig, weights: LayerWeights, layer: int, cache: KVCache):
        c = self.config = config
        self.kv_buffer = cache.latent[layer]
        index_cache = cache.index[layer]
        self.indexer = None if index_cache is None else Indexer(config, weights, index_cache)
        self.q_a_proj = weights.linear("q_a_proj")
        self.q_a_layernorm = weights.norm("q_a_layernorm", c.latent_norm_eps)
        self.q_b_proj = weights.linear("q_b_proj")
        self.kv_a_proj = weights.linear("kv_a_proj_with_mqa")
        self.kv_a_layernorm = weights.norm("kv_a_layernorm", c.latent_norm_eps)
        self.o_proj = weights.linear("o_proj")
        kv_b = weights["kv_b_proj"].data.unflatten(0, (c.num_attention_heads, -1))  # [H, n + v, C]
        self.w_uk, self.w_uv = kv_b.split((c.qk_nope_head_dim, c.v_head_dim), 1)

    def __call__(
        self,
        x: Tensor,
        step: StepBatch,
        rope: tuple[Tensor, Tensor],
        topk_indices: Tensor | None,
        dense: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """x [T, hidden] -> (attention output [T, hidden], the slots attended to, for the shared
        layers that follow).

        topk_indices: the previous full layer's slots [T, K], used if this layer owns no indexer.
        dense: every visible slot [T, S] if no token sees more than index_topk keys; then nothing is
        scored.
        """
        c = self.config
        qr = self.q_a_layernorm(self.q_a_proj(x))
        self._write_latent(x, step, rope)
        if self.indexer is not None:
            self.indexer.write_keys(x, step, rope)
            topk_indices = dense if dense is not None else self.indexer.select(x, qr, step, rope)
        assert topk_indices is not None, "the first layer owns an indexer"
        q = self.q_b_proj(qr).unflatten(-1, (c.num_attention_heads, c.qk_head_dim))
        q_nope, q_pe = q.split((c.qk_nope_head_dim, c.qk_rope_head_dim), -1)
        q_pe = apply_rope(q_pe, *rope, interleaved=True)
        q_latent = absorb_q(q_nope, self.w_uk)
        latent = sparse_mla(q_latent, q_pe, self.kv_buffer, topk_indices, c.attention_scale)
        return self.o_proj(absorb_v(latent, self.w_uv)), topk_indices

    def _write_latent(self, x: Tensor, step: StepBatch, rope: tuple[Tensor, Tensor]) -> None:
        c = self.config
        latent, k_pe = self.kv_a_proj(x).split((c.kv_lora_rank, c.qk_rope_head_dim), -1)
        latent, k_pe = self.kv_a_layernorm(latent), apply_rope(k_pe, *rope, interleaved=True)
        write = (
            set_mla_kv_buffer_fp8_quant if self.kv_buffer.element_size() == 1 else set_mla_kv_buffer
        )
        write(self.kv_buffer, step.slot_mapping, latent, k_pe)
