"""`return_indexer_topk`: the positions reported are those that transformers' indexers select."""

import random
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from builders import SMALL, hf_logits, prompt
from minidsv import LLM, SamplingParams
from minidsv.errors import RequestError
from minidsv.request import IndexerTopk
from minidsv.selections import selection_recorder

TOPK = SMALL["index_topk"]
FAMILIES = ("dsv32", "glm")
ASKING = SamplingParams(max_tokens=12, ignore_eos=True, return_indexer_topk=True)
SILENT = SamplingParams(max_tokens=12, ignore_eos=True)


@contextmanager
def indexer_outputs(model: Any) -> Iterator[dict[int, Tensor]]:
    """Per layer with an indexer, what transformers' selected in the last forward: [T, K]."""
    outputs: dict[int, Tensor] = {}
    with ExitStack() as stack:
        for number, layer in enumerate(model.model.layers):
            if (indexer := getattr(layer.self_attn, "indexer", None)) is not None:

                def keep(_: Any, __: Any, output: Tensor, number: int = number) -> None:
                    outputs[number] = output[0]

                stack.callback(indexer.register_forward_hook(keep).remove)
        yield outputs


def expected(model: Any, ids: tuple[int, ...], first: int) -> list[IndexerTopk]:
    """The selections of the queries from position `first` on, by one forward of transformers."""
    with indexer_outputs(model) as outputs:
        hf_logits(model, ids)
    selections = []
    for query in range(first, len(ids)):
        layers: list[list[int] | int] = []
        for layer in range(model.config.num_hidden_layers):
            source = max(number for number in outputs if number <= layer)
            chosen = sorted(outputs[layer][query].tolist()) if layer in outputs else source
            layers.append(chosen)
        selections.append(IndexerTopk(query + 1, layers if query + 1 > TOPK else "all"))
    return selections


def shuffle_pages(llm: LLM, seed: int) -> None:
    """Take every page of an idle engine and give them back in another order."""
    engine = llm.engine
    holders = [engine.make_request([3], SILENT) for _ in range(engine.runner.num_pages)]
    for holder in holders:
        assert engine.block_manager.grow(holder, 1)
    random.Random(seed).shuffle(holders)
    for holder in holders:
        engine.block_manager.free(holder)


@pytest.mark.parametrize("family", FAMILIES)
def test_against_transformers(
    family: str, checkpoints: dict[str, Path], hf_models: dict[str, Any]
) -> None:
    """Asking and silent requests in one batch, chunked, preempted, over shuffled pages."""
    prompts = [prompt(n, seed=5) for n in (120, 62, 60, 130, TOPK - 5, 70)]
    params = [ASKING, SILENT, ASKING, ASKING, ASKING, ASKING]
    llm = LLM(str(checkpoints[family]), num_pages=4, max_num_batched_tokens=33)
    shuffle_pages(llm, seed=0)
    outputs = llm.generate(prompts, params)
    assert llm.engine.scheduler.num_preemptions > 0
    assert outputs[1].outputs[0].indexer_topk is None
    for ids, output in ((prompts[i], outputs[i].outputs[0]) for i in (0, 2, 3, 4, 5)):
        sequence = (*ids, *output.token_ids[:-1])
        assert output.indexer_topk == expected(hf_models[family], sequence, len(ids) - 1)


def test_positions_follow_the_request_not_the_pool(checkpoints: dict[str, Path]) -> None:
    """The same numbers wherever the pages lie, and when their keys are there already."""
    reports = []
    for seed in range(3):
        llm = LLM(str(checkpoints["dsv32"]), num_pages=4)
        shuffle_pages(llm, seed)
        for _ in range(2):
            reports.append(llm.generate([prompt(200)], ASKING)[0].outputs[0].indexer_topk)
    assert all(report == reports[0] for report in reports)
    layers = reports[0][0].layers
    assert {position // 64 for layer in layers for position in layer} == {0, 1, 2, 3}


def test_shared_layers_name_their_source(checkpoints: dict[str, Path]) -> None:
    llm = LLM(str(checkpoints["glm"]), num_pages=2)
    types = llm.engine.model_config.indexer_types
    assert "shared" in types
    (selection, *_) = llm.generate([prompt(80)], ASKING)[0].outputs[0].indexer_topk
    for layer, kind in zip(selection.layers, types, strict=True):
        assert len(layer) == TOPK if kind == "full" else types[layer] == "full"


def test_text_is_that_of_a_silent_request(checkpoints: dict[str, Path]) -> None:
    llm = LLM(str(checkpoints["glm"]), num_pages=4)
    asking, silent = (llm.generate([prompt(90)], p)[0].outputs[0] for p in (ASKING, SILENT))
    assert asking.token_ids == silent.token_ids


def test_who_does_not_ask_or_has_no_choice_pays_nothing(
    checkpoints: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps carry a recorder only when they draw a token for an asker beyond index_topk keys."""
    llm = LLM(str(checkpoints["dsv32"]), num_pages=8, max_num_batched_tokens=64)
    recorders: list[bool] = []

    def spy(chunks: Any, config: Any, device: torch.device) -> Any:
        recorder = selection_recorder(chunks, config, device)
        recorders.append(recorder is not None)
        return recorder

    monkeypatch.setattr("minidsv.runner.selection_recorder", spy)
    llm.generate([prompt(100, seed=1)], SILENT)
    assert not any(recorders)
    recorders.clear()
    llm.generate([prompt(100)], ASKING)
    assert recorders == [False, *[True] * 12], "one chunk of the prompt draws nothing"
    recorders.clear()
    short = llm.generate([prompt(TOPK - 3)], ASKING)[0].outputs[0].indexer_topk
    assert recorders == [False] * 4 + [True] * 8
    assert [s.layers == "all" for s in short] == [not r for r in recorders]
    assert [s.num_keys for s in short] == list(range(TOPK - 3, TOPK + 9))


def test_only_true_and_false_are_taken() -> None:
    with pytest.raises(RequestError, match="return_indexer_topk: 1 is not true or false"):
        SamplingParams(return_indexer_topk=1)  # type: ignore[arg-type]
