"""The engine against transformers, in fp32: relative L2 of logits < 5e-6 and every argmax equal."""

from pathlib import Path
from typing import Any

import pytest
import torch

from builders import (
    FAMILY,
    boundary_gaps,
    hf_greedy,
    hf_logits,
    hf_model,
    prompt,
    save,
    use_rms_norm_eps_for_latents,
    with_config,
)
from compare import relative_l2
from minidsv import LLM, SamplingParams
from minidsv.kernels import router

LIMIT = 5e-6
TOPK = 48
FAMILIES = ("dsv32", "glm")


def assert_parity(got: torch.Tensor, want: torch.Tensor) -> None:
    assert relative_l2(got, want) < LIMIT
    assert torch.equal(got.argmax(-1), want.argmax(-1))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("length", [1, 2, TOPK - 1, TOPK, TOPK + 1, 63, 64, 65, 200, 321])
def test_prefill(
    family: str, length: int, checkpoints: dict[str, Path], hf_models: dict[str, Any]
) -> None:
    ids = prompt(length)
    got = LLM(str(checkpoints[family]), num_pages=8).prompt_logits(ids)
    assert_parity(got, hf_logits(hf_models[family], ids))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("budget", [1, 7, 64, 100])
def test_chunked_prefill(
    family: str, budget: int, checkpoints: dict[str, Path], hf_models: dict[str, Any]
) -> None:
    ids = prompt(150, seed=1)
    llm = LLM(str(checkpoints[family]), num_pages=8, max_num_batched_tokens=budget)
    assert_parity(llm.prompt_logits(ids), hf_logits(hf_models[family], ids))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("length", [5, TOPK - 2, 90])
def test_greedy_equals_generate(
    family: str, length: int, checkpoints: dict[str, Path], hf_models: dict[str, Any]
) -> None:
    """Decode crosses index_topk and a page edge from the shorter prompts."""
    ids = prompt(length, seed=2)
    params = SamplingParams(max_tokens=40, ignore_eos=True)
    output = LLM(str(checkpoints[family]), num_pages=8).generate([ids], params)[0].outputs[0]
    assert output.token_ids == hf_greedy(hf_models[family], ids, 40)
    assert output.finish_reason == "length"


@pytest.mark.parametrize("family", FAMILIES)
def test_mixed_batch(family: str, checkpoints: dict[str, Path], hf_models: dict[str, Any]) -> None:
    """Prefill chunks and decode tokens of nine requests share steps."""
    lengths = [1, 3, 30, 47, 48, 49, 64, 100, 130]
    prompts = [prompt(n, seed=3) for n in lengths]
    llm = LLM(str(checkpoints[family]), num_pages=40, max_num_batched_tokens=37)
    outputs = llm.generate(prompts, SamplingParams(max_tokens=20, ignore_eos=True, logprobs=3))
    for ids, output in zip(prompts, outputs, strict=True):
        generated = output.outputs[0]
        want = hf_logits(hf_models[family], ids + tuple(generated.token_ids))[len(ids) - 1 : -1]
        assert generated.token_ids == want.argmax(-1).tolist()
        log_probs = want.log_softmax(-1)
        for row, entries in zip(log_probs, generated.logprobs, strict=True):
            for token, entry in entries.items():
                assert entry.logprob == pytest.approx(float(row[token]), abs=5e-5)


DIMS: list[dict[str, Any]] = [
    {"index_n_heads": 64, "n_shared_experts": 2, "num_attention_heads": 2},
    {"kv_lora_rank": 64, "q_lora_rank": 40, "qk_nope_head_dim": 32, "v_head_dim": 48},
    {"qk_rope_head_dim": 32, "index_topk": 16, "first_k_dense_replace": 2},
    {"n_routed_experts": 8, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1},
    {"index_topk": 1, "first_k_dense_replace": 0, "norm_topk_prob": False, "kv_lora_rank": 256},
    {"n_group": 4, "topk_group": 4, "n_shared_experts": 3, "first_k_dense_replace": 3},
]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("seed", range(len(DIMS)))
def test_other_dims_and_seeds(family: str, seed: int, tmp_path: Path) -> None:
    model = hf_model(family, seed=seed + 10, **DIMS[seed])
    use_rms_norm_eps_for_latents(model)
    llm = LLM(str(save(model, tmp_path / "model")), num_pages=8, max_num_batched_tokens=64)
    ids = prompt(120, seed=seed)
    assert_parity(llm.prompt_logits(ids), hf_logits(model, ids))


@pytest.mark.parametrize(
    "change",
    [
        {"mscale": None, "mscale_all_dim": None},
        {"mscale": None, "mscale_all_dim": None, "attention_factor": 1.0},
        {"mscale": 0.7, "mscale_all_dim": 1.3},
        {"truncate": False, "beta_fast": 16, "beta_slow": 2},
        {"factor": 1.0},
    ],
    ids=lambda change: ",".join(change),
)
def test_yarn_variants(change: dict[str, Any], tmp_path: Path) -> None:
    rope = {**FAMILY["dsv32"]["rope_parameters"], **change}
    rope = {name: value for name, value in rope.items() if value is not None}
    model = hf_model("dsv32", seed=3, rope_parameters=rope, max_position_embeddings=512)
    llm = LLM(str(save(model, tmp_path / "model")), num_pages=4)
    ids = prompt(120, seed=3)
    assert_parity(llm.prompt_logits(ids), hf_logits(model, ids))


def test_glm_latent_eps_has_a_switch(tmp_path: Path) -> None:
    """transformers unpatched is latent_norm_eps=1e-6, not our default (rms_norm_eps, 1e-5)."""
    model = hf_model("glm")
    folder = save(model, tmp_path / "model", latent_norm_eps=1e-6)
    ids = prompt(100)
    want = hf_logits(model, ids)
    assert_parity(LLM(str(folder), num_pages=8).prompt_logits(ids), want)
    default = with_config(folder, tmp_path / "default", latent_norm_eps=None)
    assert relative_l2(LLM(str(default), num_pages=8).prompt_logits(ids), want) > LIMIT


# The mutation table of model-spec 10.4: each mistake must make the comparison fail.


@pytest.fixture(scope="module", params=FAMILIES)
def mutant_base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    family = request.param
    model = hf_model(family, seed=5, index_topk=16, initializer_range=0.1)
    folder = save(model, tmp_path_factory.mktemp("mutants") / family, latent_norm_eps=1e-6)
    ids = prompt(96, seed=5)
    return family, folder, ids, hf_logits(model, ids)


def test_unmutated(mutant_base: Any) -> None:
    _, folder, ids, want = mutant_base
    assert_parity(LLM(str(folder), num_pages=4).prompt_logits(ids), want)


@pytest.mark.parametrize(
    ("change", "at_least"),
    [
        ({"indexer_rope_interleave": "swap"}, 0.1),
        ({"index_topk": 4096}, 0.1),
        ({"latent_norm_eps": 1e-5}, LIMIT),
    ],
    ids=["indexer rope layout", "no sparsity", "latent eps"],
)
def test_config_mutations(
    mutant_base: Any, change: dict[str, Any], at_least: float, tmp_path: Path
) -> None:
    family, folder, ids, want = mutant_base
    if change.get("indexer_rope_interleave") == "swap":
        change = {"indexer_rope_interleave": family == "dsv32"}
    got = LLM(str(with_config(folder, tmp_path / "mutant", **change)), num_pages=4).prompt_logits(
        ids
    )
    assert relative_l2(got, want) > at_least


def test_mutation_no_mscale(mutant_base: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from minidsv.config import RopeConfig

    family, folder, ids, want = mutant_base
    if family == "glm":
        pytest.skip("GLM has no mscale")
    monkeypatch.setattr(RopeConfig, "softmax_scale", 1.0)
    assert relative_l2(LLM(str(folder), num_pages=4).prompt_logits(ids), want) > 0.1


def test_mutation_biased_routing_weights(mutant_base: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from minidsv import moe

    def biased(
        logits: torch.Tensor, bias: torch.Tensor, **options: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        _, ids = router.grouped_topk(logits, bias, **options)
        weights = (logits.sigmoid() + bias).gather(1, ids)
        weights = weights / weights.sum(-1, keepdim=True) * options["routed_scaling_factor"]
        return weights, ids

    _, folder, ids, want = mutant_base
    monkeypatch.setattr(moe, "grouped_topk", biased)
    assert relative_l2(LLM(str(folder), num_pages=4).prompt_logits(ids), want) > 0.05


# What the README promises of one request among others.


def served_alone(folder: Path, ids: tuple[int, ...], params: SamplingParams) -> list[int]:
    return LLM(str(folder), num_pages=20).generate([ids], params)[0].outputs[0].token_ids


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "options",
    [
        {"num_pages": 60},
        {"num_pages": 60, "max_num_batched_tokens": 16},
        {"num_pages": 5, "max_num_seqs": 5},
        {"num_pages": 4, "max_num_batched_tokens": 50},
    ],
    ids=["neighbours", "chunks", "small pool", "preemption"],
)
def test_neighbours_chunks_and_pools(
    family: str,
    options: dict[str, int],
    checkpoints: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Tokens are those of the request alone, or differ where a choice is within 1e-5 of a tie."""
    prompts = [prompt(n, seed=7) for n in (10, 60, 63, 64, 65, 100, 130)]
    params = SamplingParams(max_tokens=60, ignore_eos=True)
    folder = checkpoints[family]
    llm = LLM(str(folder), **options)
    for ids, output in zip(prompts, llm.generate(prompts, params), strict=True):
        want, got = served_alone(folder, ids, params), output.outputs[0].token_ids
        if got == want:
            continue
        at = next(i for i, (a, b) in enumerate(zip(got, want, strict=True)) if a != b)
        with boundary_gaps(monkeypatch) as gaps:
            last = LLM(str(folder), num_pages=8).prompt_logits(ids + tuple(want[:at]))[-1]
        best = last.topk(2).values
        assert min(float(best[0] - best[1]), *gaps) < 1e-5, f"token {at} differs without a tie"


@pytest.mark.parametrize("family", FAMILIES)
def test_same_shapes_are_bitwise_equal(family: str, checkpoints: dict[str, Path]) -> None:
    ids = prompt(130)
    llm = LLM(str(checkpoints[family]), num_pages=8)
    assert torch.equal(llm.prompt_logits(ids), llm.prompt_logits(ids))
