"""The tiny DeepSeek-V3.2 as a trainable model: the formulas of the engine, built for autograd.

Tokens are flat, `N = batch * length`, everywhere but in attention. All experts are computed and
weighted (zero when not chosen): with 8 experts of 128 units that is one matrix product.
Attention is a strategy (`attend`), so that one forward serves dense training, the indexer's
warm-up, sparse training and the mutations of the eval.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minidsv.config import ModelConfig
from minidsv.rope import inv_freq


def rope_interleaved(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate pairs (2i, 2i+1) of x [..., rope]; cos and sin broadcast to [..., rope / 2]."""
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2)


def rope_half(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate pairs (i, i + rope/2) of x [..., rope]; cos and sin broadcast to [..., rope / 2]."""
    first, second = x.float().chunk(2, -1)
    return torch.cat((first * cos - second * sin, first * sin + second * cos), -1)


def top_mask(scores: Tensor, count: int) -> Tensor:
    """True at the `count` largest of the last (short) dimension; ties go to the lower index."""
    index = torch.arange(scores.shape[-1], device=scores.device)
    mine, other = scores.unsqueeze(-1), scores.unsqueeze(-2)
    ahead = (other > mine) | ((other == mine) & (index < index.unsqueeze(-1)))
    return ahead.sum(-1) < count


class RmsNorm(nn.Module):
    """x / rms(x) times a gain, in float32."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(dim)), eps

    def forward(self, x: Tensor) -> Tensor:
        x = x.float()
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * self.weight


def linear(fan_in: int, fan_out: int, gain: float = 1.0) -> nn.Linear:
    """A bias-free layer with standard deviation gain / sqrt(fan_in)."""
    layer = nn.Linear(fan_in, fan_out, bias=False)
    nn.init.normal_(layer.weight, std=gain * fan_in**-0.5)
    return layer


class Indexer(nn.Module):
    """Projections of the lightning indexer; scores are computed by `tiny_sparse`."""

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        self.heads, self.rope = cfg.index_n_heads, cfg.qk_rope_head_dim
        self.wq_b = linear(cfg.q_lora_rank, cfg.index_n_heads * cfg.index_head_dim)
        self.wk = linear(cfg.hidden_size, cfg.index_head_dim)
        self.weights_proj = linear(cfg.hidden_size, cfg.index_n_heads, 0.5)
        self.k_norm = nn.LayerNorm(cfg.index_head_dim, eps=1e-6)

    def forward(
        self, x: Tensor, qr: Tensor, cos: Tensor, sin: Tensor, swapped: bool = False
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [N, heads, 128], keys [N, 128], gates [N, heads]; `swapped` = wrong layout."""
        rotate = rope_interleaved if swapped else rope_half
        q = self.wq_b(qr).unflatten(-1, (self.heads, -1))
        k = self.k_norm(self.wk(x).float())
        q = torch.cat(
            (rotate(q[..., : self.rope], cos[:, None], sin[:, None]), q[..., self.rope :].float()),
            -1,
        )
        k = torch.cat((rotate(k[..., : self.rope], cos, sin), k[..., self.rope :]), -1)
        return q, k, self.weights_proj(x).float()


class View(NamedTuple):
    """What attention gets from one layer; N flat tokens, v padded to the head size of q."""

    q: Tensor  # [N, heads, nope + rope]
    k: Tensor  # [N, heads, nope + rope]
    v: Tensor  # [N, heads, nope + rope], zeros beyond v_head_dim
    x: Tensor  # [N, hidden], normalised layer input
    qr: Tensor  # [N, q_lora_rank], normalised


class Attention(nn.Module):
    """Multi-head latent attention's projections, in the uncompressed form."""

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        self.cfg, heads = cfg, cfg.num_attention_heads
        head_dim = cfg.qk_nope_head_dim + cfg.qk_rope_head_dim
        depth = (2 * cfg.num_hidden_layers) ** -0.5
        self.q_a_proj = linear(cfg.hidden_size, cfg.q_lora_rank)
        self.q_a_layernorm = RmsNorm(cfg.q_lora_rank, cfg.rms_norm_eps)
        self.q_b_proj = linear(cfg.q_lora_rank, heads * head_dim, 0.4)
        self.kv_a_proj_with_mqa = linear(cfg.hidden_size, cfg.kv_lora_rank + cfg.qk_rope_head_dim)
        self.kv_a_layernorm = RmsNorm(cfg.kv_lora_rank, cfg.rms_norm_eps)
        self.kv_b_proj = linear(cfg.kv_lora_rank, heads * (cfg.qk_nope_head_dim + cfg.v_head_dim))
        self.o_proj = linear(heads * cfg.v_head_dim, cfg.hidden_size, depth)
        self.indexer = Indexer(cfg)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> View:
        """Project normalised inputs x [N, hidden]; cos, sin [N, rope / 2]."""
        cfg, heads = self.cfg, self.cfg.num_attention_heads
        qr = self.q_a_layernorm(self.q_a_proj(x))
        q = self.q_b_proj(qr).unflatten(-1, (heads, -1))
        q_nope, q_pe = q.split((cfg.qk_nope_head_dim, cfg.qk_rope_head_dim), -1)
        ranks = (cfg.kv_lora_rank, cfg.qk_rope_head_dim)
        latent, k_pe = self.kv_a_proj_with_mqa(x).split(ranks, -1)
        kv = self.kv_b_proj(self.kv_a_layernorm(latent)).unflatten(-1, (heads, -1))
        k_nope, v = kv.split((cfg.qk_nope_head_dim, cfg.v_head_dim), -1)
        q_pe = rope_interleaved(q_pe, cos[:, None], sin[:, None]).to(q.dtype)
        k_pe = rope_interleaved(k_pe, cos, sin).to(q.dtype)[:, None].expand(-1, heads, -1)
        q, k = torch.cat((q_nope, q_pe), -1), torch.cat((k_nope, k_pe), -1)
        return View(q, k, F.pad(v, (0, q.shape[-1] - v.shape[-1])), x, qr)


class Mlp(nn.Module):
    """SwiGLU."""

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        depth = (2 * cfg.num_hidden_layers) ** -0.5
        self.gate_proj = linear(cfg.hidden_size, cfg.intermediate_size)
        self.up_proj = linear(cfg.hidden_size, cfg.intermediate_size)
        self.down_proj = linear(cfg.intermediate_size, cfg.hidden_size, depth)

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        """x [N, hidden] -> [N, hidden]; no routing counts."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x)), None


class Moe(nn.Module):
    """Routed experts and the shared one, which is the last of the stacked weights."""

    bias: Tensor

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        self.cfg, width = cfg, cfg.moe_intermediate_size
        stacked = (cfg.n_routed_experts + 1) * width
        depth = (2 * cfg.num_hidden_layers) ** -0.5
        self.gate = linear(cfg.hidden_size, cfg.n_routed_experts)
        self.register_buffer("bias", torch.zeros(cfg.n_routed_experts))
        self.gate_proj = linear(cfg.hidden_size, stacked)
        self.up_proj = linear(cfg.hidden_size, stacked)
        self.down_proj = linear(stacked, cfg.hidden_size)
        nn.init.normal_(self.down_proj.weight, std=depth * width**-0.5)

    def route(self, x: Tensor) -> Tensor:
        """Weight of every routed expert, float32 [N, experts], zero when not chosen."""
        cfg = self.cfg
        with torch.autocast(x.device.type, enabled=False):
            scores = torch.sigmoid(F.linear(x.float(), self.gate.weight.float()))
        biased = (scores + self.bias).detach()
        grouped = biased.unflatten(-1, (cfg.n_group, -1))
        best = grouped.masked_fill(~top_mask(grouped, 2), 0).sum(-1)
        keep = top_mask(best, cfg.topk_group)
        allowed = grouped.masked_fill(~keep.unsqueeze(-1), -torch.inf).flatten(-2)
        chosen = scores * top_mask(allowed, cfg.num_experts_per_tok)
        return chosen / (chosen.sum(-1, keepdim=True) + 1e-20) * cfg.routed_scaling_factor

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [N, hidden] -> output [N, hidden] and tokens per expert, float32 [experts]."""
        weights = self.route(x)
        hidden = F.silu(self.gate_proj(x)) * self.up_proj(x)
        every = F.pad(weights, (0, 1), value=1.0).to(hidden.dtype)
        hidden = (hidden.unflatten(-1, (every.shape[-1], -1)) * every.unsqueeze(-1)).flatten(-2)
        return self.down_proj(hidden), (weights > 0).float().sum(0)


class Layer(nn.Module):
    """One decoder layer, cut in two at attention."""

    def __init__(self, cfg: ModelConfig, index: int) -> None:
        super().__init__()
        self.input_layernorm = RmsNorm(cfg.hidden_size, cfg.rms_norm_eps)
        self.self_attn = Attention(cfg)
        self.post_attention_layernorm = RmsNorm(cfg.hidden_size, cfg.rms_norm_eps)
        self.mlp = Mlp(cfg) if index < cfg.first_k_dense_replace else Moe(cfg)


def before_attention(layer: Layer, h: Tensor, cos: Tensor, sin: Tensor) -> View:
    """Norm and projections of the residual stream h [N, hidden]."""
    return layer.self_attn(layer.input_layernorm(h), cos, sin)


def after_attention(layer: Layer, h: Tensor, o: Tensor) -> tuple[Tensor, Tensor | None]:
    """Add attention's heads o [N, heads, v] and the FFN to h; also tokens per expert."""
    h = h + layer.self_attn.o_proj(o.flatten(-2))
    out, load = layer.mlp(layer.post_attention_layernorm(h))
    return h + out, load


Attend = Callable[[Layer, View, tuple[int, int], tuple[Tensor, Tensor]], Tensor]


def attend_dense(
    layer: Layer, view: View, shape: tuple[int, int], rope: tuple[Tensor, Tensor]
) -> Tensor:
    """Causal attention over everything; shape (batch, length), result [N, heads, v]."""
    cfg = layer.self_attn.cfg
    q, k, v = (t.unflatten(0, shape).transpose(1, 2) for t in view[:3])
    o = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=cfg.attention_scale)
    return o.transpose(1, 2).flatten(0, 1)[..., : cfg.v_head_dim]


class Output(NamedTuple):
    """Result of the model over N flat tokens."""

    hidden: Tensor  # [N, hidden], after the final norm
    loads: list[Tensor]  # tokens per expert [experts], one entry a MoE layer
    stream: list[Tensor]  # residual stream [N, hidden] after every layer


class TinyDeepseek(nn.Module):
    """Embedding, layers, final norm and head."""

    inv_freq: Tensor

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        self.cfg = cfg
        self.embed_tokens = nn.Embedding(cfg.vocab_size, cfg.hidden_size)
        nn.init.normal_(self.embed_tokens.weight, std=0.3)
        self.layers = nn.ModuleList(Layer(cfg, i) for i in range(cfg.num_hidden_layers))
        self.norm = RmsNorm(cfg.hidden_size, cfg.rms_norm_eps)
        self.lm_head = linear(cfg.hidden_size, cfg.vocab_size, 0.5)
        self.register_buffer("inv_freq", inv_freq(cfg.rope, cfg.qk_rope_head_dim), persistent=False)
        self.before, self.after = before_attention, after_attention

    def compile_parts(self) -> None:
        """Fuse the two halves of a layer; all layers of a kind share the compiled code."""
        self.before = torch.compile(before_attention, dynamic=False)
        self.after = torch.compile(after_attention, dynamic=False)

    @property
    def blocks(self) -> list[Layer]:
        """The decoder layers, with their type."""
        return [layer for layer in self.layers if isinstance(layer, Layer)]

    def indexer_parameters(self) -> list[nn.Parameter]:
        """Parameters that only the indexer's loss may move."""
        return [p for layer in self.blocks for p in layer.self_attn.indexer.parameters()]

    def main_parameters(self) -> list[nn.Parameter]:
        """All other parameters."""
        indexer = {id(p) for p in self.indexer_parameters()}
        return [p for p in self.parameters() if id(p) not in indexer]

    def forward(
        self, ids: Tensor, attend: Attend = attend_dense, depth: int | None = None
    ) -> Output:
        """Run ids [batch, length], through the first `depth` layers only if given."""
        shape = (ids.shape[0], ids.shape[1])
        angle = torch.arange(shape[1], device=ids.device).float()[:, None] * self.inv_freq
        rope = (angle.cos().repeat(shape[0], 1), angle.sin().repeat(shape[0], 1))
        h, loads, stream = self.embed_tokens(ids).flatten(0, 1), [], []
        for layer in self.blocks[:depth]:
            view = self.before(layer, h, *rope)
            h, load = self.after(layer, h, attend(layer, view, shape, rope))
            stream.append(h)
            if load is not None:
                loads.append(load)
        return Output(self.norm(h), loads, stream)


def update_router_bias(model: TinyDeepseek, loads: list[Tensor], rate: float = 1e-3) -> None:
    """Raise the bias of experts that got too few tokens, lower the others', keep the mean at 0."""
    moe = [layer.mlp for layer in model.blocks if isinstance(layer.mlp, Moe)]
    for mlp, load in zip(moe, loads, strict=False):  # the upper layers may not have run
        mlp.bias += rate * torch.sign(load.mean() - load)
        mlp.bias -= mlp.bias.mean()
