"""The MLPs: SwiGLU, and the routed experts over it.

    mlp(x)     = down(silu(gate(x)) * up(x))                silu and product in fp32, rounded once
    experts(x) = sum_k weight_k * mlp_{id_k}(x)             fp32 sum; the weight multiplies the
                                                            output of down

gate and up are one tensor [..., 2, I, in] (gate first). Called by the dense and the MoE layers.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from minidsv.kernels.gemm import linear


def swiglu_mlp(
    x: Tensor,
    gate_up: Tensor,
    gate_up_scale: Tensor | None,
    down: Tensor,
    down_scale: Tensor | None,
) -> Tensor:
    """x [T, hidden], gate_up [2, I, hidden], down [hidden, I] -> [T, hidden]; scales for FP8."""
    gate, up = (
        linear(x, gate_up[half], None if gate_up_scale is None else gate_up_scale[half]).float()
        for half in (0, 1)
    )
    return linear((F.silu(gate) * up).to(x.dtype), down, down_scale)


def routed_experts(
    x: Tensor,
    weights: Tensor,
    ids: Tensor,
    gate_up: Tensor,
    gate_up_scale: Tensor | None,
    down: Tensor,
    down_scale: Tensor | None,
) -> Tensor:
    """x [T, hidden], weights and ids [T, k], stacks of E experts -> fp32 [T, hidden]."""
    out = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    for expert in ids.unique().tolist():
        token, choice = torch.where(ids == expert)
        y = swiglu_mlp(
            x[token],
            gate_up[expert],
            None if gate_up_scale is None else gate_up_scale[expert],
            down[expert],
            None if down_scale is None else down_scale[expert],
        )
        out.index_add_(0, token, y.float() * weights[token, choice, None])
    return out
