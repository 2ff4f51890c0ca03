"""The router: its GEMM, and the expert selection of DeepSeek-V3 ("noaux_tc"), all in fp32.

    router_gemm    logits = x w^T                                       fp32 accumulation
    grouped_topk   s = sigmoid(logits);  b = s + e_score_correction_bias
                   groups: score = sum of the 2 largest b; only the topk_group best groups keep
                   their experts (others -inf)
                   ids = top_k of b;  weights = s[ids] / (sum + 1e-20) * routed_scaling_factor
                   (the unbiased scores)

Ties go to the lowest index; a NaN is larger than any number. With n_group 1 (GLM) the group stage
keeps everything. Called by the MoE layer. `router_gemm` is `dsv3_router_gemm` of the seed (SGLang
PR 23965): hidden 7168, 256 experts, BF16 weights, few tokens.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from minidsv.kernels.gemm import linear
from minidsv.kernels.norm import PreNorm, norm_cost, pre_norm
from minidsv.kernels.pdl import PdlMode, triton_mode


def router_gemm_ref(x: Tensor, weight: Tensor, out_dtype: torch.dtype = torch.float32) -> Tensor:
    """x w^T in PyTorch, in fp32."""
    return F.linear(x.float(), weight.float()).to(out_dtype)


def router_gemm(
    x: Tensor,
    weight: Tensor,
    out_dtype: torch.dtype = torch.float32,
    pdl: PdlMode | None = None,
) -> Tensor:
    """x [T, hidden], weight [E, hidden] -> [T, E] in `out_dtype`, fp32 or bf16.

    `pdl`: None runs the reference, a mode the Triton kernel in that mode (CPU: the reference): one
    of its own for one token, else `linear`'s.
    """
    assert x.dim() == weight.dim() == 2, f"x {tuple(x.shape)}, weight {tuple(weight.shape)}"
    assert x.shape[1] == weight.shape[1], f"x {tuple(x.shape)}, weight {tuple(weight.shape)}"
    assert out_dtype in (torch.float32, torch.bfloat16), f"{out_dtype=} is not float32 or bfloat16"
    mode = triton_mode(x, pdl)
    if mode is None:
        return router_gemm_ref(x, weight, out_dtype)
    if len(x) != 1:
        return linear(x, weight, out_dtype=out_dtype, pdl=mode)
    from minidsv.kernels.router_gemm_triton import multiply

    return multiply(x, weight, out_dtype, mode)


def norm_router_gemm(
    x: PreNorm, weight: Tensor, pdl: PdlMode | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """(logits fp32 [T, E], normed [T, hidden], the residual [T, hidden]): the norm and its GEMM.

    One launch for one token with a block before; its logits are of the normed sum before it is
    rounded.
    """
    mode = triton_mode(x.residual, pdl)
    if mode is None or x.out is None or len(x.residual) != 1:
        normed, residual = pre_norm(x, pdl)
        return router_gemm(normed, weight, pdl=pdl), normed, residual
    assert x.out.shape == x.residual.shape, f"{tuple(x.out.shape)=}, {tuple(x.residual.shape)=}"
    assert x.residual.shape[1] == weight.shape[1], (
        f"{tuple(x.residual.shape)=}, {tuple(weight.shape)=}"
    )
    assert x.gain.shape == weight.shape[1:], f"{tuple(x.gain.shape)=}, {tuple(weight.shape)=}"
    from minidsv.kernels.router_gemm_triton import norm_multiply

    return norm_multiply(x, weight, mode)


def norm_router_gemm_cost(tokens: int, hidden: int, experts: int) -> tuple[int, int]:
    """(bytes, flops): the block's output and the residual read, the sum and the normed written."""
    norm, gemm = norm_cost(tokens, hidden, 2, 4), router_gemm_cost(tokens, hidden, experts)
    return norm[0] + gemm[0] - 2 * tokens * hidden, norm[1] + gemm[1]


def router_gemm_cost(tokens: int, hidden: int, experts: int, out_bytes: int = 4) -> tuple[int, int]:
    """(bytes, flops): BF16 weights and tokens read once, logits written."""
    nbytes = 2 * hidden * (experts + tokens) + out_bytes * tokens * experts
    return nbytes, 2 * tokens * hidden * experts


def grouped_topk_ref(
    logits: Tensor,
    bias: Tensor,
    top_k: int,
    n_group: int,
    topk_group: int,
    norm_topk_prob: bool,
    routed_scaling_factor: float,
) -> tuple[Tensor, Tensor]:
    """The selection in PyTorch."""
    scores = logits.sigmoid()
    biased = scores + bias
    if n_group > 1:
        grouped = biased.unflatten(-1, (n_group, -1))  # [T, n_group, E / n_group]
        group_scores = grouped.topk(2, -1).values.sum(-1)
        kept = _first_largest(group_scores, topk_group)
        dropped = torch.ones_like(group_scores, dtype=torch.bool).scatter(1, kept, False)
        biased = grouped.masked_fill(dropped.unsqueeze(-1), float("-inf")).flatten(1)
    ids = _first_largest(biased, top_k)
    weights = scores.gather(1, ids)
    if norm_topk_prob:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    return weights * routed_scaling_factor, ids


def _first_largest(scores: Tensor, count: int) -> Tensor:
    return scores.sort(dim=-1, descending=True, stable=True).indices[..., :count]


def grouped_topk(
    logits: Tensor,
    bias: Tensor,
    *,
    top_k: int,
    n_group: int,
    topk_group: int,
    norm_topk_prob: bool,
    routed_scaling_factor: float,
    pdl: PdlMode | None = None,
) -> tuple[Tensor, Tensor]:
    """logits and bias fp32 [T, E], [E] -> (weights fp32, expert ids int64), each [T, top_k]."""
    experts = logits.shape[-1]
    assert logits.dim() == 2, f"logits {tuple(logits.shape)} is not [T, E]"
    assert bias.shape == (experts,), f"bias {tuple(bias.shape)} for logits {tuple(logits.shape)}"
    assert experts % n_group == 0, f"n_group {n_group} does not divide {experts} experts"
    allowed = experts // n_group * topk_group
    assert topk_group <= n_group, f"topk_group {topk_group} of n_group {n_group}"
    assert top_k <= allowed, f"top_k {top_k} of {allowed} experts in {topk_group} groups"
    assert n_group == 1 or experts // n_group >= 2, f"n_group {n_group}: groups of one expert"
    mode = triton_mode(logits, pdl)
    options = (top_k, n_group, topk_group, norm_topk_prob, routed_scaling_factor)
    if mode is None:
        return grouped_topk_ref(logits, bias, *options)
    from minidsv.kernels.router_triton import select

    return select(logits, bias, *options, mode)


def grouped_topk_cost(tokens: int, experts: int, top_k: int) -> tuple[int, int]:
    """(bytes, flops): logits and bias read, weights and int64 ids written; flops of the scores."""
    return 4 * experts * (tokens + 1) + 12 * tokens * top_k, 4 * tokens * experts
