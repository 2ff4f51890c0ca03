"""The engine against itself: forms that must agree whatever the weights."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from builders import prompt, with_config
from compare import relative_l2
from minidsv import LLM, SamplingParams, mla
from minidsv.kernels.set_mla_kv_buffer import read_mla_kv_buffer
from minidsv.mla import MLA

LIMIT = 5e-6


def unabsorbed(layer: MLA, q: Tensor, q_pe: Tensor, slots: Tensor, scale: float) -> Tensor:
    """The MHA form: keys and values of every head decompressed, then plain attention."""
    rows = read_mla_kv_buffer(
        layer.kv_buffer, slots.clamp_min(0), layer.config.kv_lora_rank
    )  # [T, K, C + r]
    rows = torch.where((slots >= 0).unsqueeze(-1), rows, 0.0)
    latent, k_pe = rows.split((layer.config.kv_lora_rank, layer.config.qk_rope_head_dim), -1)
    keys = torch.einsum("tkc,hnc->tkhn", latent, layer.w_uk)
    values = torch.einsum("tkc,hvc->tkhv", latent, layer.w_uv)
    scores = torch.einsum("thn,tkhn->thk", q, keys) + torch.einsum("thr,tkr->thk", q_pe, k_pe)
    scores = (scores * scale).masked_fill((slots < 0).unsqueeze(1), float("-inf"))
    return torch.einsum("thk,tkhv->thv", scores.softmax(-1), values)


@pytest.mark.parametrize("family", ["dsv32", "glm"])
@pytest.mark.parametrize("length", [30, 150])
def test_absorbed_equals_mha(
    family: str, length: int, checkpoints: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = LLM(str(checkpoints[family]), num_pages=4)
    layers = llm.engine.runner.model.layers
    absorbed = mla.sparse_mla_values
    compared = []

    def both(q_latent: Tensor, q_pe: Tensor, buffer: Tensor, slots: Tensor, w_uv, scale, pdl):
        got = absorbed(q_latent, q_pe, buffer, slots, w_uv, scale, pdl)
        layer = next(x.attention for x in layers if x.attention.kv_buffer is buffer)
        # W_UK has more columns than rows, so q_nope is recovered from q_latent without loss
        q_nope = torch.linalg.lstsq(
            layer.w_uk.mT.double(), q_latent.transpose(0, 1).mT.double()
        ).solution
        q_nope = q_nope.mT.transpose(0, 1).float()
        want = unabsorbed(layer, q_nope, q_pe, slots, scale)
        compared.append(relative_l2(got, want.flatten(1)))
        return got

    monkeypatch.setattr(mla, "sparse_mla_values", both)
    llm.prompt_logits(prompt(length))
    assert len(compared) == len(layers)
    assert max(compared) < LIMIT


@pytest.mark.parametrize("family", ["dsv32", "glm"])
def test_topk_of_everything_is_dense(
    family: str, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    """Scoring with K equal to the context selects all, as the path without scoring does."""
    ids = prompt(100)
    exactly = with_config(checkpoints[family], tmp_path / "exactly", index_topk=100)
    beyond = with_config(checkpoints[family], tmp_path / "beyond", index_topk=4000)
    dense = LLM(str(beyond), num_pages=4).prompt_logits(ids)
    assert torch.equal(LLM(str(exactly), num_pages=4).prompt_logits(ids), dense)
    longer = LLM(str(exactly), num_pages=4).prompt_logits(
        (*ids, 7)
    )  # the last row scores, K of 101
    assert relative_l2(longer[:-1], dense) < LIMIT


@pytest.mark.parametrize("kv", ["float32", "bfloat16", "fp8", "fp8_flat"])
@pytest.mark.parametrize("index", ["float32", "bfloat16", "fp8"])
def test_decode_equals_recompute_in_every_cache_dtype(
    kv: str, index: str, checkpoints: dict[str, Path]
) -> None:
    """Prefill and decode read the same rounded rows; an ulp may move one element by a quantum, and
    with fp8_flat one of the query's too."""
    exact = kv == index == "float32"
    limit = 1e-4 if exact else 0.1 if kv == "fp8_flat" else 2e-2
    llm = LLM(str(checkpoints["dsv32"]), num_pages=4, kv_cache_dtype=kv, index_cache_dtype=index)
    ids = prompt(90)
    params = SamplingParams(max_tokens=20, ignore_eos=True, logprobs=0)
    output = llm.generate([ids], params)[0].outputs[0]
    logits = llm.prompt_logits(ids + tuple(output.token_ids))[len(ids) - 1 : -1]
    if exact:
        assert output.token_ids == logits.argmax(-1).tolist()
    rows = logits.log_softmax(-1)
    for row, token, entries in zip(rows, output.token_ids, output.logprobs, strict=True):
        assert entries[token].logprob == pytest.approx(float(row[token]), abs=limit)


@pytest.mark.parametrize(
    ("options", "most"),
    [
        ({"kv_cache_dtype": "bfloat16"}, 0.03),
        ({"kv_cache_dtype": "fp8"}, 0.15),
        ({"kv_cache_dtype": "fp8_flat"}, 0.2),
        ({"dtype": "bfloat16"}, 0.05),
    ],
    ids=lambda value: next(iter(value.values())) if isinstance(value, dict) else "",
)
def test_precision_costs_what_it_should(
    options: dict[str, str], most: float, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    """Against full precision, without selections that could flip: rounded, but not wrong."""
    no_choices = {"index_topk": 4000, "num_experts_per_tok": 16, "n_group": 1, "topk_group": 1}
    folder = with_config(checkpoints["dsv32"], tmp_path / "calm", **no_choices)
    ids = prompt(90)
    full = LLM(str(folder), num_pages=4).prompt_logits(ids)
    got = LLM(str(folder), num_pages=4, **options).prompt_logits(ids)
    assert got.dtype == torch.float32
    assert 1e-4 < relative_l2(got, full) < most


def test_poisoned_pools(checkpoints: dict[str, Path]) -> None:
    """No slot is read before it is written: pools full of NaN change nothing."""
    ids = prompt(130)
    llm = LLM(str(checkpoints["glm"]), num_pages=6)
    clean = llm.prompt_logits(ids)
    cache = llm.engine.runner.cache
    for buffer in [*cache.latent, *(b for b in cache.index if b is not None)]:
        buffer.fill_(float("nan"))
    assert torch.equal(llm.prompt_logits(ids), clean)
