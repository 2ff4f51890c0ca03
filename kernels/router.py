"""Expert selection of DeepSeek-V3 ("noaux_tc"), all in fp32.

    s = sigmoid(logits);  b = s + e_score_correction_bias
    groups: score = sum of the 2 largest b; only the topk_group best groups keep their experts
    (others -inf)
    ids = top_k of b;  weights = s[ids] / (sum + 1e-20) * routed_scaling_factor     (the unbiased
    scores)

Ties go to the lowest index. With n_group 1 (GLM) the group stage keeps everything. Called by the
MoE layer.
"""

import torch
from torch import Tensor


def grouped_topk(
    logits: Tensor,
    bias: Tensor,
    *,
    top_k: int,
    n_group: int,
    topk_group: int,
    norm_topk_prob: bool,
    routed_scaling_factor: float,
) -> tuple[Tensor, Tensor]:
    """logits and bias fp32 [T, E], [E] -> (weights fp32, expert ids int64), each [T, top_k]."""
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
