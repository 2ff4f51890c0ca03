"""The whole forward pass of DeepSeek-V3.2 and GLM-5 on one screen."""

from copy import copy

import torch
from torch import Tensor

from minidsv.batch import StepBatch
from minidsv.checkpoint import Weight
from minidsv.config import ModelConfig
from minidsv.kernels.argmax import argmax
from minidsv.kernels.embedding import embedding
from minidsv.kernels.gemm import linear
from minidsv.kernels.norm import PreNorm, pre_norm
from minidsv.kernels.topk import all_slots
from minidsv.kv_cache import KVCache
from minidsv.layers import MLP, LayerWeights, Operators
from minidsv.mla import MLA
from minidsv.moe import MoE
from minidsv.rope import Rope


class DecoderLayer:
    def __init__(
        self,
        config: ModelConfig,
        weights: LayerWeights,
        layer: int,
        cache: KVCache,
        operators: Operators,
    ):
        self.kind = weights.signature, cache.index[layer] is None
        self.input_gain = weights["input_layernorm"].data
        self.post_attention_gain = weights["post_attention_layernorm"].data
        self.attention = MLA(config, weights, layer, cache, operators)
        self.mlp: MoE | MLP = (
            MoE(config, weights, operators)
            if config.is_moe(layer)
            else weights.mlp("mlp", operators)
        )


class DeepseekV32:
    """A model over its caches; a step is any mix of prefill chunks and decode tokens."""

    def __init__(
        self,
        config: ModelConfig,
        weights: dict[str, Weight],
        cache: KVCache,
        operators: Operators,
    ):
        self.config, self.pdl = config, operators.pdl
        self.embed_tokens = weights["embed_tokens"].data
        self.layers = [
            DecoderLayer(config, LayerWeights(weights, layer), layer, cache, operators)
            for layer in range(config.num_hidden_layers)
        ]
        self.norm = weights["norm"].data
        self.lm_head = weights["lm_head"].data
        device = self.embed_tokens.device
        self.rope = Rope(config.rope, config.qk_rope_head_dim, device, operators.pdl)

    def abridged(self) -> "DeepseekV32":
        """The first layer of each kind, which launch all that the whole model does."""
        short, kinds = copy(self), [layer.kind for layer in self.layers]
        short.layers = [self.layers[kinds.index(kind)] for kind in dict.fromkeys(kinds)]
        return short

    @torch.inference_mode()
    def forward(self, step: StepBatch) -> tuple[Tensor, Tensor]:
        """Compute the step's tokens, filling their cache slots.

        Returns (hidden after model.norm [L, hidden], logits fp32 [L, vocab]) of the L tokens of
        `step.logits_index`.
        """
        with torch.cuda.device_of(self.embed_tokens):  # Triton launches on the current one
            return self._forward(step)

    def greedy(self, step: StepBatch) -> tuple[Tensor, Tensor]:
        """(argmax ids int64 [L], logits fp32 [L, vocab]) of a step."""
        _, logits = self.forward(step)
        return argmax(logits, self.pdl), logits

    def _forward(self, step: StepBatch) -> tuple[Tensor, Tensor]:
        eps, pdl = self.config.rms_norm_eps, self.pdl
        rope = self.rope.at(step.positions)
        dense = None  # every visible slot, when there is nothing to choose
        if step.max_seq_len <= self.config.index_topk:
            dense = all_slots(
                step.seq_lens, step.block_table, step.request_index, step.max_seq_len, pdl
            )
        topk_indices = None  # the slots that the last full layer selected
        residual = embedding(step.input_ids, self.embed_tokens, pdl)
        out: Tensor | None = None
        for layer in self.layers:
            x = PreNorm(out, residual, layer.input_gain, eps)
            out, residual, topk_indices = layer.attention(x, step, rope, topk_indices, dense)
            out, residual = layer.mlp(PreNorm(out, residual, layer.post_attention_gain, eps))
        assert out is not None, "num_hidden_layers is at least 1"
        rows = step.logits_index
        if rows is not None:
            out, residual = embedding(rows, out, pdl), embedding(rows, residual, pdl)
        hidden, _ = pre_norm(PreNorm(out, residual, self.norm, eps), pdl)
        return hidden, linear(hidden, self.lm_head, out_dtype=torch.float32, pdl=pdl)
