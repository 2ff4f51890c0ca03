"""LLM: offline generation, the Python entry point."""

import reprlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from torch import Tensor

from minidsv.chat import ChatTemplate
from minidsv.engine import Engine, StepOutput
from minidsv.engine_config import EngineConfig
from minidsv.errors import ConfigError, RequestError
from minidsv.request import IndexerTopk, LogprobDict, Request, SamplingParams

Prompt = str | Sequence[int] | Mapping[str, Any]
Prompts = Prompt | Sequence[Prompt]
Conversation = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class CompletionOutput:
    """One generated continuation. `token_ids` includes an EOS or stop token, `text` does not."""

    index: int
    text: str
    token_ids: list[int]
    logprobs: list[LogprobDict] | None
    finish_reason: str | None  # "stop", "length" or "abort"
    stop_reason: str | int | None  # the stop string or stop token that ended it
    indexer_topk: list[IndexerTopk] | None = None  # one a token, with return_indexer_topk

    @classmethod
    def of(cls, request: Request) -> "CompletionOutput":
        return cls(
            index=request.index,
            text=request.text,
            token_ids=request.output_token_ids,
            logprobs=None if request.params.logprobs is None else request.logprobs,
            finish_reason=request.finish_reason,
            stop_reason=request.stop_reason,
            indexer_topk=request.indexer_topk if request.params.return_indexer_topk else None,
        )


@dataclass(frozen=True)
class RequestOutput:
    """A prompt with its outputs. `prompt_logprobs[0]` is None: nothing predicts the first token."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    prompt_logprobs: list[LogprobDict | None] | None
    outputs: list[CompletionOutput]
    num_cached_tokens: int  # of the prompt: their keys were in the cache when its first output ran

    @classmethod
    def of(cls, requests: Sequence[Request]) -> "RequestOutput":
        """`requests`: all that `Engine.make_requests` made of one prompt."""
        first = requests[0]
        return cls(
            request_id=first.request_id,
            prompt=first.prompt,
            prompt_token_ids=first.prompt_token_ids,
            prompt_logprobs=(
                None if first.params.prompt_logprobs is None else first.prompt_logprobs
            ),
            outputs=[CompletionOutput.of(request) for request in requests],
            num_cached_tokens=first.num_cached_tokens,
        )


class LLM:
    """A model ready to generate. Options are those of `EngineConfig`; an unknown one is a
    ConfigError.

    >>> LLM().generate("Question: What is the chemical symbol of
    iron?\\nAnswer:")[0].outputs[0].text
    """

    def __init__(self, model: str | None = None, **options: Any):
        known = {option.name for option in fields(EngineConfig)}
        for name in options.keys() - known:
            raise ConfigError(f"{name}: no such option; accepted: {sorted(known)}")
        self._engine: Engine | None = Engine(EngineConfig(model=model, **options))

    @property
    def engine(self) -> Engine:
        if self._engine is None:
            raise RuntimeError("this LLM is closed")
        return self._engine

    def generate(
        self,
        prompts: Prompts,
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        on_output: Callable[[StepOutput], None] | None = None,
    ) -> list[RequestOutput]:
        """Generate for one prompt or many; outputs come in the prompts' order.

        prompts: a string, a list of strings, a list of token ids, or a list of such lists (strings
        get the tokenizer's BOS, token ids are taken as they are); instead of each a dictionary with
        "prompt" (a string) or "prompt_token_ids", and maybe "cache_salt": only prompts of one salt
        share cached prefixes. sampling_params: one for all, or one a prompt. on_output sees every
        step's output as it comes. Raises RequestError before anything runs if any prompt cannot be
        served.
        """
        engine = self.engine
        groups = self._requests(prompts, sampling_params)
        requests = [request for group in groups for request in group]
        try:
            for request in requests:
                engine.add(request)
            while engine.has_work:
                for output in engine.step():
                    if on_output is not None:
                        on_output(output)
        finally:
            for request in requests:
                engine.abort(request)
        return [RequestOutput.of(group) for group in groups]

    def chat(
        self,
        messages: Conversation | Sequence[Conversation],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        on_output: Callable[[StepOutput], None] | None = None,
        *,
        add_generation_prompt: bool | None = None,
        continue_final_message: bool = False,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        cache_salt: str | None = None,
    ) -> list[RequestOutput]:
        """`generate` for one conversation or a list of them; see `ChatTemplate.render`.

        The texts are whole: `split_reasoning` of `minidsv.chat_reasoning` parts off the reasoning.
        """
        template = ChatTemplate(self.engine.tokenizer, self.engine.model_config)
        prompts = [
            template.render(
                conversation,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                template_kwargs=chat_template_kwargs,
                most=self.engine.intake.max_request_tokens,
            )
            for conversation in _conversations(messages)
        ]
        items: list[Prompt] = [
            {"prompt_token_ids": prompt.token_ids, "cache_salt": cache_salt} for prompt in prompts
        ]
        outputs = self.generate(items, sampling_params, on_output)
        pairs = zip(outputs, prompts, strict=True)
        return [replace(output, prompt=prompt.text) for output, prompt in pairs]

    def prompt_logits(self, token_ids: Sequence[int]) -> Tensor:
        """fp32 logits [len(token_ids), vocab] of one forward over the prompt."""
        if not isinstance(token_ids, Sequence) or isinstance(token_ids, str | bytes):
            raise RequestError("token_ids", f"{token_ids!r} is not a list of token ids")
        return self.engine.prompt_logits(list(token_ids))

    def close(self) -> None:
        """Release the weights and the caches."""
        self._engine = None

    def _requests(
        self, prompts: Prompts, params: SamplingParams | Sequence[SamplingParams] | None
    ) -> list[list[Request]]:
        """One list a prompt, of its outputs' requests."""
        items = _as_list(prompts)
        if params is None or isinstance(params, SamplingParams):
            params = [params or SamplingParams()] * len(items)
        if not isinstance(params, Sequence) or not all(
            isinstance(one, SamplingParams) for one in params
        ):
            raise RequestError("sampling_params", f"{params!r} is not SamplingParams or a list")
        if len(params) != len(items):
            raise RequestError("sampling_params", f"{len(params)} given for {len(items)} prompts")
        engine = self.engine
        groups = []
        for item, one in zip(items, params, strict=True):
            prompt, salt = _prompt_and_salt(item)
            text = prompt if isinstance(prompt, str) else None
            if isinstance(prompt, str):
                ids = engine.tokenizer.encode(prompt, most=engine.intake.max_request_tokens)
            else:
                ids = list(prompt)
            groups.append(engine.make_requests(ids, one, text, cache_salt=salt))
        return groups


def _conversations(messages: Any) -> list[Any]:
    many = isinstance(messages, list | tuple) and all(isinstance(m, list | tuple) for m in messages)
    return list(messages) if many and messages else [messages]


def _as_list(prompts: Prompts) -> list[Prompt]:
    if isinstance(prompts, str | Mapping):
        return [prompts]
    if not isinstance(prompts, Sequence) or isinstance(prompts, bytes):
        raise RequestError("prompts", f"{type(prompts).__name__} is not a string or a list")
    if prompts and all(isinstance(item, int) for item in prompts):
        return [prompts]  # type: ignore[list-item]
    for item in prompts:
        if not isinstance(item, str | Sequence | Mapping) or isinstance(item, bytes):
            raise RequestError("prompts", f"{item!r} is not a string or a list of token ids")
    return list(prompts)  # type: ignore[arg-type]


def _prompt_and_salt(item: Prompt) -> tuple[str | Sequence[int], str | None]:
    if not isinstance(item, Mapping):
        return item, None
    given = {name: value for name, value in item.items() if name != "cache_salt"}
    match list(given.items()):
        case [("prompt", str(text))]:
            return text, item.get("cache_salt")
        case [("prompt_token_ids", list() | tuple() as token_ids)]:
            return token_ids, item.get("cache_salt")
    raise RequestError(
        "prompts",
        f"{reprlib.repr(dict(item))} is refused; accepted: a string as prompt or a list as "
        "prompt_token_ids, and cache_salt",
    )
