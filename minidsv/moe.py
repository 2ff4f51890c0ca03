"""The mixture of experts: routed + shared, summed in fp32 and rounded once."""

from torch import Tensor

from minidsv.config import ModelConfig
from minidsv.kernels.moe import moe_experts
from minidsv.kernels.norm import PreNorm
from minidsv.kernels.router import grouped_topk, norm_router_gemm
from minidsv.layers import LayerWeights, Operators


class MoE:
    """One layer's router, routed experts and shared expert."""

    def __init__(self, config: ModelConfig, weights: LayerWeights, operators: Operators):
        self.config, self.operators, self.pdl = config, operators, operators.pdl
        self.gate = weights["mlp.gate"].data
        self.gate_bias = weights["mlp.gate_bias"].data
        self.gate_up = weights["mlp.experts.gate_up_proj"]
        self.down = weights["mlp.experts.down_proj"]
        self.shared = weights.mlp("mlp.shared_experts", operators)

    def __call__(self, x: PreNorm) -> tuple[Tensor, Tensor]:
        """x [T, hidden] -> (the mixture [T, hidden], the residual)."""
        logits, normed, residual = norm_router_gemm(x, self.gate, self.pdl)
        weights, ids = self.choose(logits)
        out = moe_experts(
            normed,
            weights,
            ids,
            self.gate_up.data,
            self.gate_up.scale,
            self.down.data,
            self.down.scale,
            self.shared.gate_up.data,
            self.shared.gate_up.scale,
            self.shared.down.data,
            self.shared.down.scale,
            pdl=self.pdl,
            activations=self.operators.activations_of(x),
        )
        return out, residual

    def choose(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """The router's logits fp32 [T, E] -> (weights fp32, expert ids int64), each [T, top_k]."""
        c = self.config
        return grouped_topk(
            logits,
            self.gate_bias,
            top_k=c.num_experts_per_tok,
            n_group=c.n_group,
            topk_group=c.topk_group,
            norm_topk_prob=c.norm_topk_prob,
            routed_scaling_factor=c.routed_scaling_factor,
            pdl=self.pdl,
        )
