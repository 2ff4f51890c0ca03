"""The MLPs: SwiGLU, and the mixture of experts over it.

    mlp(x)     = down(silu(gate(x)) * up(x))                silu and product in fp32, rounded once
    experts(x) = sum_k weight_k * mlp_{id_k}(x) + shared(x) fp32 sum, rounded once; the weight
                                                            multiplies the output of down

gate and up are one tensor [..., 2, I, in] (gate first); weights are BF16, or FP8 (e4m3) in 128x128
blocks with fp32 scales, multiplied with x and h as they are or, where `activations` says so, with
their e4m3 of groups of 128 columns. Every linear's output is rounded to x's dtype. Called by the
dense and the MoE layers.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from minidsv.kernels.gemm import linear
from minidsv.kernels.pdl import PdlMode, triton_mode
from minidsv.kernels.quant import Activations, is_quantised


def swiglu_mlp_ref(
    x: Tensor,
    gate_up: Tensor,
    gate_up_scale: Tensor | None,
    down: Tensor,
    down_scale: Tensor | None,
    activations: Activations = "none",
) -> Tensor:
    """One MLP in PyTorch."""
    scales = (None, None) if gate_up_scale is None else gate_up_scale
    gate, up = (
        linear(x, gate_up[half], scales[half], activations=activations).float() for half in (0, 1)
    )
    h = (F.silu(gate) * up).to(x.dtype)
    return linear(h, down, down_scale, activations=activations)


def _of_all(activations: Activations, *mlps: Tensor | None) -> Activations:
    """ "none" where weights are BF16, or x or h of an MLP, whose down is given, no whole groups."""
    downs = [down for down in mlps if down is not None]
    fp8 = all(down.dtype == torch.float8_e4m3fn for down in downs)
    sizes = {columns for down in downs for columns in down.shape[-2:]}
    return activations if fp8 and all(is_quantised(activations, n) for n in sizes) else "none"


def routed_experts_ref(
    x: Tensor,
    weights: Tensor,
    ids: Tensor,
    gate_up: Tensor,
    gate_up_scale: Tensor | None,
    down: Tensor,
    down_scale: Tensor | None,
    activations: Activations = "none",
) -> Tensor:
    """x [T, hidden], weights and ids [T, k], stacks of E experts -> fp32 [T, hidden]."""
    out = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    for expert in ids.unique().tolist():
        token, choice = torch.where(ids == expert)
        y = swiglu_mlp_ref(
            x[token],
            gate_up[expert],
            None if gate_up_scale is None else gate_up_scale[expert],
            down[expert],
            None if down_scale is None else down_scale[expert],
            activations,
        )
        out.index_add_(0, token, y.float() * weights[token, choice, None])
    return out


def moe_experts_ref(
    x: Tensor,
    weights: Tensor,
    ids: Tensor,
    gate_up: Tensor,
    gate_up_scale: Tensor | None,
    down: Tensor,
    down_scale: Tensor | None,
    shared_gate_up: Tensor | None,
    shared_gate_up_scale: Tensor | None,
    shared_down: Tensor | None,
    shared_down_scale: Tensor | None,
    activations: Activations = "none",
) -> Tensor:
    """Routed and shared experts in PyTorch."""
    out = routed_experts_ref(x, weights, ids, gate_up, gate_up_scale, down, down_scale, activations)
    if shared_gate_up is not None and shared_down is not None:
        shared = swiglu_mlp_ref(
            x, shared_gate_up, shared_gate_up_scale, shared_down, shared_down_scale, activations
        )
        out = out + shared.float()
    return out.to(x.dtype)


def _assert_mlp(
    x: Tensor,
    gate_up: Tensor,
    gate_up_scale: Tensor | None,
    down: Tensor,
    down_scale: Tensor | None,
) -> None:
    """Weights [..., 2, I, hidden] and [..., hidden, I] of one dtype, FP8 with scales."""
    hidden, inner = down.shape[-2:]
    assert x.dim() == 2, f"x {tuple(x.shape)} is not [T, hidden]"
    assert x.shape[1] == hidden, f"x {tuple(x.shape)}, down {tuple(down.shape)}"
    assert gate_up.shape == (*down.shape[:-2], 2, inner, hidden), (
        f"gate_up {tuple(gate_up.shape)}, down {tuple(down.shape)}"
    )
    assert gate_up.dtype == down.dtype, f"gate_up {gate_up.dtype}, down {down.dtype}"
    for name, weight, scale in (("gate_up", gate_up, gate_up_scale), ("down", down, down_scale)):
        quantised = weight.dtype == torch.float8_e4m3fn
        assert quantised == (scale is not None), (
            f"{name} {weight.dtype} {'without' if scale is None else 'with'} scales"
        )


def swiglu_mlp(
    x: Tensor,
    gate_up: Tensor,
    gate_up_scale: Tensor | None,
    down: Tensor,
    down_scale: Tensor | None,
    pdl: PdlMode | None = None,
    activations: Activations = "none",
) -> Tensor:
    """x [T, hidden], gate_up [2, I, hidden], down [hidden, I] -> [T, hidden]; scales for FP8.

    `pdl`: None runs the reference, a mode the Triton kernels in that mode (CPU: the reference).
    """
    assert down.dim() == 2, f"down {tuple(down.shape)} is not [hidden, I]"
    _assert_mlp(x, gate_up, gate_up_scale, down, down_scale)
    mode, activations = triton_mode(x, pdl), _of_all(activations, down)
    if mode is None:
        return swiglu_mlp_ref(x, gate_up, gate_up_scale, down, down_scale, activations)
    from minidsv.kernels.moe_weights_triton import Weights

    dense = Weights(gate_up, gate_up_scale, down, down_scale)
    if activations != "none":
        from minidsv.kernels.moe_fp8_triton import mlp_fp8

        return mlp_fp8(x, dense, activations == "fp8_ue8m0", mode)
    from minidsv.kernels.moe_triton import mlp_triton

    return mlp_triton(x, dense, mode)


def moe_experts(
    x: Tensor,
    weights: Tensor,
    ids: Tensor,
    gate_up: Tensor,
    gate_up_scale: Tensor | None,
    down: Tensor,
    down_scale: Tensor | None,
    shared_gate_up: Tensor | None,
    shared_gate_up_scale: Tensor | None,
    shared_down: Tensor | None,
    shared_down_scale: Tensor | None,
    pdl: PdlMode | None = None,
    activations: Activations = "none",
) -> Tensor:
    """Routed and shared experts: x [T, hidden] -> [T, hidden] in x's dtype.

    weights fp32 and ids int64 [T, k]; gate_up [E, 2, I, hidden], down
    [E, hidden, I]; shared_gate_up [2, Is, hidden] and shared_down [hidden, Is], both or neither.
    """
    assert down.dim() == 3, f"down {tuple(down.shape)} is not [E, hidden, I]"
    assert weights.shape == ids.shape, f"weights {tuple(weights.shape)}, ids {tuple(ids.shape)}"
    assert ids.dim() == 2, f"ids {tuple(ids.shape)} is not [T, k]"
    assert len(ids) == len(x), f"ids {tuple(ids.shape)}, x {tuple(x.shape)}"
    _assert_mlp(x, gate_up, gate_up_scale, down, down_scale)
    assert (shared_gate_up is None) == (shared_down is None), "half of a shared expert"
    if shared_gate_up is not None and shared_down is not None:
        _assert_mlp(x, shared_gate_up, shared_gate_up_scale, shared_down, shared_down_scale)
        assert shared_down.dtype == down.dtype, f"shared {shared_down.dtype}, routed {down.dtype}"
    stack = (gate_up, gate_up_scale, down, down_scale)
    shared = (shared_gate_up, shared_gate_up_scale, shared_down, shared_down_scale)
    mode, activations = triton_mode(x, pdl), _of_all(activations, down, shared_down)
    if mode is None:
        return moe_experts_ref(x, weights, ids, *stack, *shared, activations)
    from minidsv.kernels.moe_weights_triton import Weights

    expert = None
    if shared_gate_up is not None and shared_down is not None:
        expert = Weights(shared_gate_up, shared_gate_up_scale, shared_down, shared_down_scale)
    if activations != "none":
        from minidsv.kernels.moe_fp8_triton import moe_fp8

        ue8m0 = activations == "fp8_ue8m0"
        return moe_fp8(x, weights, ids, Weights(*stack), expert, ue8m0, mode)
    from minidsv.kernels.moe_triton import moe_triton

    return moe_triton(x, weights, ids, Weights(*stack), expert, mode)


def swiglu_mlp_cost(tokens: int, hidden: int, inner: int, weight_bytes: int = 1) -> tuple[int, int]:
    """(bytes, flops) of one MLP: weights, FP8 scales and BF16 activations, each moved once."""
    numbers = 3 * hidden * inner
    nbytes = numbers * weight_bytes + (4 * numbers // 128**2 if weight_bytes == 1 else 0)
    return nbytes + 4 * tokens * hidden, 2 * tokens * numbers


def moe_experts_cost(
    tokens: int,
    top_k: int,
    distinct: int,
    hidden: int,
    inner: int,
    shared_inner: int = 0,
    weight_bytes: int = 1,
) -> tuple[int, int]:
    """(bytes, flops) when the tokens' choices name `distinct` experts; each is read once."""
    weights = distinct * swiglu_mlp_cost(0, hidden, inner, weight_bytes)[0]
    weights += swiglu_mlp_cost(0, hidden, shared_inner, weight_bytes)[0]
    flops = 6 * tokens * hidden * (top_k * inner + shared_inner)
    return weights + 4 * tokens * hidden + 12 * tokens * top_k, flops
