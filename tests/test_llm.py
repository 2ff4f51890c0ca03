"""LLM: what prompts, options and parameters it takes, and what it gives back."""

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from minidsv import LLM, SamplingParams
from minidsv.engine import StepOutput
from minidsv.engine_config import bundled_model
from minidsv.errors import ConfigError, RequestError

PAGES = 12


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM(load_format="random", num_pages=PAGES, max_model_len=600, max_num_batched_tokens=64)


@pytest.fixture(autouse=True)
def nothing_leaks(llm: LLM) -> Iterator[None]:
    yield
    assert llm.engine.block_manager.num_free == PAGES
    assert not llm.engine.has_work
    assert not llm.engine._texts


def test_prompt_forms(llm: LLM) -> None:
    params = SamplingParams(max_tokens=4, ignore_eos=True)
    ids = llm.engine.tokenizer.encode("hello")
    (text,), (tokens,) = llm.generate("hello", params), llm.generate(ids, params)
    both = llm.generate(["hello", "there"], [params, SamplingParams(max_tokens=2, ignore_eos=True)])
    assert text.outputs == tokens.outputs == both[0].outputs
    assert (text.prompt, tokens.prompt) == ("hello", None)
    assert text.prompt_token_ids == tokens.prompt_token_ids == ids
    assert llm.generate([ids, [3]], params)[0].outputs == text.outputs
    dictionaries = [{"prompt": "hello"}, {"prompt_token_ids": ids, "cache_salt": "mine"}]
    for output, given in zip(llm.generate(dictionaries, params), ("hello", None), strict=True):
        assert (output.prompt, output.outputs) == (given, text.outputs)
    assert llm.generate(dictionaries[0], params)[0].outputs == text.outputs
    assert len(both[1].outputs[0].token_ids) == 2
    assert llm.generate([], params) == []


@pytest.mark.parametrize(
    ("prompts", "params", "words"),
    [
        ("", {}, []),
        ([[]], {}, ["prompt", "empty"]),
        ([1280], {}, ["prompt", "1280", "1279"]),
        ([-1], {}, ["prompt", "-1"]),
        ([[1.5]], {}, ["prompt", "1.5"]),
        ([[True]], {}, ["prompt", "True"]),
        (3, {}, ["prompts", "int"]),
        ([None], {}, ["prompts", "None"]),
        (["ok", "\ud800"], {}, ["prompt", "Unicode"]),
        ({"prompt": [5]}, {}, ["prompts", "'prompt'", "prompt_token_ids"]),
        ([{"prompt": "x", "prompt_token_ids": [5]}], {}, ["prompts", "'prompt'"]),
        ({"cache_salt": "x"}, {}, ["prompts", "cache_salt"]),
        ({"prompt": "x", "cache_salt": ""}, {}, ["cache_salt", "''"]),
        ({"prompt_token_ids": [1280]}, {}, ["prompt", "1280"]),
        ([5] * 590, {}, ["max_tokens", "590", "16", "606", "600"]),
        ("x", {"max_tokens": 599}, ["max_tokens", "599", "600"]),
        ("x", {"logprobs": 5000}, ["logprobs", "5000", "1280"]),
        ("x", {"temperature": -1}, ["temperature", "-1"]),
        ("x", {"temperature": math.nan}, ["temperature", "nan"]),
        ("x", {"temperature": 1e39}, ["temperature", "1e+39"]),
        ("x", {"temperature": 10**400}, ["temperature"]),
        ("x", {"stop": 5}, ["stop", "5"]),
        ("x", {"stop": {"a": 1}}, ["stop", "'a'"]),
        ("x", {"stop_token_ids": 5}, ["stop_token_ids", "5"]),
        ("x", {"top_p": 0}, ["top_p", "0"]),
        ("x", {"top_p": 1.5}, ["top_p", "1.5"]),
        ("x", {"top_k": -2}, ["top_k", "-2"]),
        ("x", {"seed": 2**63}, ["seed"]),
        ("x", {"stop": ""}, ["stop", "''"]),
        ("x", {"stop": ["a"] * 17}, ["stop", "17", "16"]),
        ("x", {"max_tokens": -1}, ["max_tokens", "-1"]),
        ("x", {"max_tokens": 0, "min_tokens": 1}, ["min_tokens", "1", "0"]),
        ([5] * 601, {"max_tokens": 0}, ["prompt", "601", "600"]),
        ("x", {"n": 0}, ["n", "0", "128"]),
        ("x", {"n": 129}, ["n", "129", "128"]),
        ("x", {"n": True}, ["n", "True"]),
        ("x", {"min_p": 1.1}, ["min_p", "1.1"]),
        ("x", {"presence_penalty": 2.1}, ["presence_penalty", "2.1", "-2"]),
        ("x", {"frequency_penalty": -2.1}, ["frequency_penalty", "-2.1", "-2"]),
        ("x", {"repetition_penalty": 0}, ["repetition_penalty", "0", "1e-06"]),
        ("x", {"repetition_penalty": math.nan}, ["repetition_penalty", "nan"]),
        ("x", {"logit_bias": [5]}, ["logit_bias", "[5]"]),
        ("x", {"logit_bias": {"5": 1}}, ["logit_bias", "'5'"]),
        ("x", {"logit_bias": {5: 101}}, ["logit_bias", "101", "100"]),
        ("x", {"logit_bias": {5: math.inf}}, ["logit_bias", "inf"]),
        ("x", {"logit_bias": {1280: 1}}, ["logit_bias", "1280", "1279"]),
        ("x", {"logprobs": -2}, ["logprobs", "-2", "-1"]),
        ("x", {"max_tokens": 3, "min_tokens": 4}, ["min_tokens", "4", "3"]),
        ("x", {"ignore_eos": 1}, ["ignore_eos", "1"]),
        ("x", {"stop_token_ids": [-2]}, ["stop_token_ids", "-2"]),
        ("x", {"stop_token_ids": [3] * 129}, ["stop_token_ids", "129", "128"]),
        ("x", {"stop_token_ids": [10**6]}, ["stop_token_ids", "1000000 is not a token id"]),
        ("x" * 10**6, {}, ["prompt", "1000000 characters"]),
        ([[-1] * 10**6], {}, ["prompt", "1000000 tokens are too many"]),
    ],
)
def test_refusals(prompts: Any, params: dict[str, Any], words: list[str], llm: LLM) -> None:
    """Nothing runs if any prompt cannot be served; the message names field, value and limit."""
    if not words:
        assert llm.generate(prompts, SamplingParams(max_tokens=1))[0].prompt_token_ids == [0]
        return
    with pytest.raises(RequestError) as error:
        llm.generate(prompts, SamplingParams(**params))
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize("params", [5, {"max_tokens": 5}, [None], [SamplingParams()] * 2])
def test_wrong_sampling_params(params: Any, llm: LLM) -> None:
    with pytest.raises(RequestError, match="sampling_params"):
        llm.generate("x", params)


def test_a_pool_that_fits_no_memory() -> None:
    with pytest.raises(ConfigError, match=r"num_pages: 1000000000000 pages"):
        LLM(load_format="random", num_pages=10**12)


def test_a_config_file_needs_random_weights() -> None:
    config = str(bundled_model() / "config.json")
    with pytest.raises(ConfigError, match=r"config\.json is not a folder"):
        LLM(config)
    assert LLM(config, load_format="random", num_pages=1).generate("x")


def test_a_request_that_fits_no_pool() -> None:
    small = LLM(load_format="random", num_pages=2)
    with pytest.raises(RequestError, match=r"120 prompt tokens \+ 9 .*129.*2 pages of 64 hold 128"):
        small.generate([5] * 120, SamplingParams(max_tokens=9))
    assert len(small.generate([5] * 120, SamplingParams(max_tokens=8, ignore_eos=True))) == 1
    whole = small.generate([5] * 120, SamplingParams(max_tokens=None, ignore_eos=True))[0]
    assert len(whole.outputs[0].token_ids) == 8


def test_unknown_options_and_parameters() -> None:
    with pytest.raises(ConfigError, match="tensor_parallel_size"):
        LLM(tensor_parallel_size=2)
    with pytest.raises(TypeError, match="best_of"):
        SamplingParams(best_of=2)  # type: ignore[call-arg]


def test_closed(llm: LLM) -> None:
    other = LLM(load_format="random", num_pages=1)
    other.close()
    other.close()
    with pytest.raises(RuntimeError, match="closed"):
        other.generate("x")


def test_n(llm: LLM) -> None:
    """n outputs: the first is that of the seed itself, the others draw with seeds of their own."""
    params = SamplingParams(n=4, temperature=1.0, max_tokens=12, seed=7, prompt_logprobs=0)
    (result,) = llm.generate("hello", params)
    alone = replace(params, n=1)
    assert [o.index for o in result.outputs] == [0, 1, 2, 3]
    assert len({tuple(o.token_ids) for o in result.outputs}) == 4
    assert llm.generate("hello", alone)[0].outputs == result.outputs[:1]
    requests = llm.engine.make_requests([5], params)
    for request, output in zip(requests, result.outputs, strict=True):
        again = llm.generate("hello", replace(alone, seed=request.seed))[0]
        assert again.outputs[0].token_ids == output.token_ids
    assert result.prompt_logprobs is not None
    assert len(result.prompt_logprobs) == len(result.prompt_token_ids)
    assert len({(r.request_id, tuple(r.prompt_token_ids)) for r in requests}) == 1
    with pytest.raises(RequestError, match=r"n: 4 outputs"):
        llm.engine.make_request([5], params)


def test_scoring_only(llm: LLM) -> None:
    """max_tokens=0 computes the prompt, over the whole context if need be, and samples nothing."""
    for length in (1, 63, 64, 65, 600):
        pieces: list[StepOutput] = []
        params = SamplingParams(max_tokens=0, prompt_logprobs=1)
        (result,) = llm.generate([[5] * length], params, pieces.append)
        (output,) = result.outputs
        assert (output.text, output.token_ids, output.finish_reason) == ("", [], "length")
        assert [(p.text, p.token_ids, p.finished) for p in pieces] == [("", [], True)]
        assert result.prompt_logprobs is not None
        assert len(result.prompt_logprobs) == length
    with_output = llm.generate([[5] * 65], replace(params, max_tokens=3))[0]
    assert llm.generate([[5] * 65], params)[0].prompt_logprobs == with_output.prompt_logprobs


def test_prompt_logits_shape_and_limits(llm: LLM) -> None:
    assert llm.prompt_logits([3, 4, 5]).shape == (3, 1280)
    assert llm.prompt_logits([3] * 600).dtype == torch.float32
    with pytest.raises(RequestError, match=r"601.*600"):
        llm.prompt_logits([3] * 601)
    with pytest.raises(RequestError, match="token_ids"):
        llm.prompt_logits(5)  # type: ignore[arg-type]
