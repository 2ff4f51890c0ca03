"""Checkpoints written by transformers, and the tools that the tests share."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from minidsv.engine_config import bundled_model

SMALL = {
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 192,
    "moe_intermediate_size": 64,
    "first_k_dense_replace": 1,
    "num_attention_heads": 4,
    "n_shared_experts": 1,
    "n_routed_experts": 16,
    "num_experts_per_tok": 4,
    "q_lora_rank": 96,
    "kv_lora_rank": 128,
    "qk_rope_head_dim": 64,
    "index_head_dim": 128,
    "index_n_heads": 32,
    "index_topk": 48,
    "max_position_embeddings": 4096,
    "initializer_range": 0.08,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "attn_implementation": "eager",
}
FAMILY: dict[str, dict[str, Any]] = {
    "dsv32": {
        "num_hidden_layers": 3,
        "n_group": 4,
        "topk_group": 2,
        "qk_nope_head_dim": 64,
        "v_head_dim": 64,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 40.0,
            "beta_fast": 32,
            "beta_slow": 1,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "original_max_position_embeddings": 128,
        },
    },
    "glm": {
        "num_hidden_layers": 6,
        "n_group": 1,
        "topk_group": 1,
        "qk_nope_head_dim": 96,
        "v_head_dim": 128,
        "rms_norm_eps": 1e-5,
        "index_topk_freq": 3,
        "index_skip_topk_offset": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 8e6},
    },
}


def hf_model(family: str, seed: int = 0, **dims: Any) -> Any:
    """A random transformers model of one family in fp32, gains and biases randomised too."""
    import transformers

    prefix = {"dsv32": "DeepseekV32", "glm": "GlmMoeDsa"}[family]
    fields = {**SMALL, **FAMILY[family], **dims}
    fields["num_key_value_heads"] = fields["num_attention_heads"]
    config = getattr(transformers, prefix + "Config")(**fields)
    torch.manual_seed(seed)
    model = getattr(transformers, prefix + "ForCausalLM")(config).eval()
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for name, p in [*model.named_parameters(), *model.named_buffers()]:
            noise = torch.randn(p.shape, generator=generator)
            if name.endswith("e_score_correction_bias"):
                p.copy_(noise * 0.1)
            elif name.endswith("k_norm.bias"):
                p.copy_(noise * 0.2)
            elif "norm" in name and name.endswith("weight"):
                p.copy_(1 + noise * 0.2)
    return model


def use_rms_norm_eps_for_latents(model: Any) -> None:
    """transformers gives GLM's latent norms eps 1e-6 (model-spec 9.2): use rms_norm_eps."""
    for layer in model.model.layers:
        for norm in (layer.self_attn.q_a_layernorm, layer.self_attn.kv_a_layernorm):
            norm.variance_epsilon = model.config.rms_norm_eps


def save(model: Any, folder: Path, **config: Any) -> Path:
    """save_pretrained with the bundled tokenizer; `config` overrides fields of config.json."""
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(bundled_model() / name, folder / name)
    return with_config(folder, folder, **config)


def with_config(source: Path, folder: Path, **config: Any) -> Path:
    """The checkpoint in `source`, in `folder`, with other fields in config.json."""
    if folder != source:
        folder.mkdir(parents=True)
        for file in source.iterdir():
            (folder / file.name).symlink_to(file)
        (folder / "config.json").unlink()
    raw = json.loads((source / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**raw, **config}))
    return folder


@cache
def prompt(length: int, seed: int = 0, vocab: int = 512) -> tuple[int, ...]:
    """`length` random token ids, none of them special."""
    generator = torch.Generator().manual_seed(1000 * seed + length)
    return tuple(torch.randint(3, vocab, (length,), generator=generator).tolist())


def hf_logits(model: Any, token_ids: tuple[int, ...]) -> Tensor:
    with torch.no_grad():
        return model(torch.tensor([token_ids]), use_cache=False).logits[0]


def hf_greedy(model: Any, token_ids: tuple[int, ...], count: int) -> list[int]:
    out = model.generate(
        torch.tensor([token_ids]),
        max_new_tokens=count,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=1,
    )
    return out[0, len(token_ids) :].tolist()


@contextmanager
def boundary_gaps(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[float]]:
    """Collect how near each selection (indexer top-k, router groups and experts) comes to a tie."""
    from minidsv.kernels import router, topk

    gaps: list[float] = []
    topk_positions, first_largest = topk.topk_positions, router._first_largest

    def record(scores: Tensor, count: int) -> None:
        if scores.shape[-1] > count:
            ordered = scores.sort(dim=-1, descending=True).values
            gap = (ordered[..., count - 1] - ordered[..., count]).nan_to_num(1.0, 1.0)
            gaps.append(float(gap.min()))

    def positions(logits: Tensor, seq_lens: Tensor, k: int) -> Tensor:
        record(logits, k)
        return topk_positions(logits, seq_lens, k)

    def largest(scores: Tensor, count: int) -> Tensor:
        record(scores, count)
        return first_largest(scores, count)

    with monkeypatch.context() as patch:
        patch.setattr(topk, "topk_positions", positions)
        patch.setattr(router, "_first_largest", largest)
        yield gaps
