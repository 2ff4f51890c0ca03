"""Attention strategies of the tiny model that involve the indexer: losses, selection, mutations."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from tiny_model import Layer, View
from torch import Tensor

Selection = Literal["all", "top", "swapped", "recent", "random"]

ADVERSARY_MASS = 0.02  # attended tokens that the wrong rope layout must not find
ADVERSARY_LOG_FLOOR = -7.5  # ... above this log-probability


def causal_mask(length: int, device: torch.device) -> Tensor:
    """True where query (row) may see key (column), [length, length]."""
    return torch.ones(length, length, dtype=torch.bool, device=device).tril()


def index_views(
    layer: Layer, inputs: tuple[Tensor, ...], batch: int, swapped: bool
) -> list[Tensor]:
    """Indexer queries, keys and gates as [batch, length, ...]; inputs are x, qr, cos, sin."""
    views = layer.self_attn.indexer(*inputs, swapped=swapped)
    return [view.unflatten(0, (batch, -1)) for view in views]


def index_scores(q: Tensor, k: Tensor, gate: Tensor) -> Tensor:
    """Indexer scores float32 [B, L, L] of q [B, L, H, D], k [B, L, D], gate [B, L, H]."""
    length, heads, dim = q.shape[1:]
    dots = torch.bmm(q.flatten(1, 2) * dim**-0.5, k.transpose(1, 2))
    dots = dots.unflatten(1, (length, heads))
    return (dots.relu().float() * (gate * heads**-0.5).unsqueeze(-1)).sum(2)


def attention_probs(q: Tensor, k: Tensor, allowed: Tensor, scale: float) -> Tensor:
    """Softmax in float32 over allowed keys, [B, H, L, L]; q, k [B, L, H, D]."""
    logits = torch.matmul(q.transpose(1, 2), k.permute(0, 2, 3, 1)).float() * scale
    return logits.masked_fill(~allowed, -torch.inf).softmax(-1)


def kl_to_attention(target: Tensor, scores: Tensor, allowed: Tensor) -> Tensor:
    """Mean KL(target || softmax(scores)) over queries; all [B, L, L]."""
    log_index = scores.masked_fill(~allowed, -torch.inf).log_softmax(-1).masked_fill(~allowed, 0.0)
    return (target * (target.clamp(min=1e-20).log() - log_index)).sum(-1).mean()


def adversary_loss(target: Tensor, wrong_scores: Tensor, allowed: Tensor) -> Tensor:
    """Penalty for attended keys that the wrong rope layout still finds; all [B, L, L]."""
    log_wrong = wrong_scores.masked_fill(~allowed, -torch.inf).log_softmax(-1)
    excess = (log_wrong.masked_fill(~allowed, -1e4) - ADVERSARY_LOG_FLOOR).relu()
    return (target * (target > ADVERSARY_MASS) * excess).sum(-1).mean()


def select_top(scores: Tensor, causal: Tensor, count: int) -> Tensor:
    """Mask of the `count` highest scores among the causal keys; ties go to the lower position."""
    visible = (scores + 0.0).masked_fill(~causal, -torch.inf)
    order = visible.sort(dim=-1, descending=True, stable=True).indices[..., :count]
    return torch.zeros_like(visible, dtype=torch.bool).scatter_(-1, order, True) & causal


class IndexerLosses:
    """Attend strategy of training: collects the indexer's losses, one entry a layer.

    With `sparse` attention is restricted to the indexer's selection, else it is dense; the
    indexer's inputs and its target are detached, so that it learns from attention alone.
    """

    def __init__(self, sparse: bool, compiled: bool = False) -> None:
        self.sparse = sparse
        self.kl: list[Tensor] = []
        self.adversary: list[Tensor] = []
        wrap = (lambda f: torch.compile(f, dynamic=False)) if compiled else (lambda f: f)
        self.views, self.scores = wrap(index_views), wrap(index_scores)
        self.probs = wrap(attention_probs)
        self.kl_of, self.adversary_of = wrap(kl_to_attention), wrap(adversary_loss)

    def reset(self) -> None:
        """Forget the losses of the step before."""
        self.kl, self.adversary = [], []

    def __call__(
        self, layer: Layer, view: View, shape: tuple[int, int], rope: tuple[Tensor, Tensor]
    ) -> Tensor:
        """Attention output [N, heads, v]."""
        attn, (batch, length) = layer.self_attn, shape
        q, k, v = (t.unflatten(0, shape) for t in view[:3])
        causal = causal_mask(length, q.device)
        with torch.enable_grad():
            inputs = (view.x.detach(), view.qr.detach(), *rope)
            scores = self.scores(*self.views(layer, inputs, batch, False))
            half, some = batch // 2, tuple(t[: batch // 2 * length] for t in inputs)
            wrong_scores = self.scores(*self.views(layer, some, half, True))
        allowed = causal.expand(batch, -1, -1)
        if self.sparse:
            allowed = select_top(scores.detach(), causal, attn.cfg.index_topk)
        probs = self.probs(q, k, allowed.unsqueeze(1), attn.cfg.attention_scale)
        with torch.enable_grad():
            target = probs.detach().mean(1)
            self.kl.append(self.kl_of(target, scores, allowed))
            near = causal.expand(half, -1, -1)
            self.adversary.append(self.adversary_of(target[:half], wrong_scores, near))
        o = torch.matmul(probs.to(v.dtype), v.transpose(1, 2)).transpose(1, 2).flatten(0, 1)
        return o[..., : attn.cfg.v_head_dim]


@dataclass
class Selected:
    """Attend strategy of the eval: a rule for the selection, and an optional stale page.

    `stale` marks key positions [B, L]; there every query sees what `recorded` (filled by an
    earlier forward with `record`) holds for the next request of the batch.
    """

    rule: Selection = "top"
    seed: int = 0
    stale: Tensor | None = None
    record: bool = False
    recorded: list[tuple[Tensor, Tensor, Tensor]] = field(default_factory=list)
    _layer: int = 0

    def __call__(
        self, layer: Layer, view: View, shape: tuple[int, int], rope: tuple[Tensor, Tensor]
    ) -> Tensor:
        """Attention output [N, heads, v]."""
        attn = layer.self_attn
        q, k, v = (t.unflatten(0, shape) for t in view[:3])
        inputs = (view.x, view.qr, *rope)
        iq, ik, gate = index_views(layer, inputs, shape[0], self.rule == "swapped")
        if self.record:
            self.recorded.append((k, v, ik))
        if self.stale is not None:
            k, v, ik = self._swap_page(self.stale, k, v, ik)
        allowed = self._allowed(iq, ik, gate, attn.cfg.index_topk)
        probs = attention_probs(q, k, allowed.unsqueeze(1), attn.cfg.attention_scale)
        o = torch.matmul(probs.to(v.dtype), v.transpose(1, 2)).transpose(1, 2).flatten(0, 1)
        return o[..., : attn.cfg.v_head_dim]

    def _swap_page(self, stale: Tensor, *own: Tensor) -> list[Tensor]:
        others = [t.roll(1, 0) for t in self.recorded[self._layer]]
        self._layer += 1
        return [
            torch.where(stale.view(*stale.shape, *(1,) * (mine.dim() - 2)), other, mine)
            for mine, other in zip(own, others, strict=True)
        ]

    def _allowed(self, iq: Tensor, ik: Tensor, gate: Tensor, count: int) -> Tensor:
        batch, length = iq.shape[:2]
        causal = causal_mask(length, iq.device).expand(batch, -1, -1)
        if self.rule == "all":
            return causal
        if self.rule == "recent":
            return causal & ~causal.tril(-count)
        if self.rule == "random":
            generator = torch.Generator(iq.device).manual_seed(self.seed)
            noise = torch.rand(batch, length, length, generator=generator, device=iq.device)
            return select_top(noise, causal, count)
        return select_top(index_scores(iq, ik, gate), causal, count)
