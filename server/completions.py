"""Bodies of POST /v1/completions, in OpenAI's shape with vLLM's additions. No web framework.

`make_requests(engine, body)` turns a body into the engine's requests; when they have finished,
`completion_body` makes the answer of them. A stream makes its events of one `Choice` a request.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from pydantic import Field, PlainValidator, WithJsonSchema
from pydantic_core import PydanticCustomError

from minidsv.engine import Engine, StepOutput
from minidsv.errors import RequestError
from minidsv.request import LogprobDict, Request, SamplingParams
from minidsv.server.openai_request import (
    UNSUPPORTED,
    OpenAIRequest,
    prompt_logprobs,
    usage,
)
from minidsv.server.protocol import Flag, Integer, Integers, Unsupported, check_unicode, finite
from minidsv.tokenizer import Tokenizer

MAX_CHOICES = 1024  # of one body


def _prompts(value: Any) -> list[str | list[int]]:
    """OpenAI's four forms (text, texts, token ids, lists of them) as a list of prompts."""
    items = [value] if isinstance(value, str) or _are_token_ids(value) else value
    if not isinstance(items, list) or not (
        all(isinstance(item, str) for item in items) or all(map(_are_token_ids, items))
    ):
        raise PydanticCustomError(
            "prompt", "Input should be text, a list of texts, token ids, or a list of such lists"
        )
    if not 0 < len(items) <= MAX_CHOICES:
        raise PydanticCustomError("prompt", f"Input should be 1 to {MAX_CHOICES} prompts")
    for item in items:
        if isinstance(item, str):
            check_unicode(item)
    return items


def _are_token_ids(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(item) is int for item in value)


_TOKEN_IDS = {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1}
_TEXTS = {"type": "array", "items": {"type": "string"}, "minItems": 1}
_LISTS = {"type": "array", "items": _TOKEN_IDS, "minItems": 1}
Prompts = Annotated[
    list[str | list[int]],
    PlainValidator(_prompts),
    WithJsonSchema({"anyOf": [{"type": "string"}, _TEXTS, _TOKEN_IDS, _LISTS]}),
]


class CompletionRequest(OpenAIRequest):
    """Body of POST /v1/completions."""

    unsupported: ClassVar[Unsupported] = {**UNSUPPORTED, "suffix": ()}
    prompt: Prompts
    echo: Flag = None
    add_special_tokens: Flag = None  # true unless it says false
    logprobs: Annotated[Integer, Field(ge=0, le=5)] | None = None
    logprob_token_ids: Integers | None = None  # shown with the best, at output positions

    def to_params(self) -> SamplingParams:
        """Our parameters, which have OpenAI's default of 16 tokens too; raises RequestError."""
        self.check()
        if len(self.prompt) * (self.n or 1) > MAX_CHOICES:
            choices = f"{len(self.prompt)} prompts of {self.n} choices are too many"
            raise RequestError("n", f"{choices}; accepted: {MAX_CHOICES} choices")
        asked = [self.prompt_logprobs, self.logprobs if self.echo else None]
        known = [count for count in asked if count is not None]
        prompt_logprobs = {"prompt_logprobs": max(known) if known else None}
        return SamplingParams(**self.sampling() | prompt_logprobs)


def make_requests(
    engine: Engine, body: CompletionRequest, request_id: str | None = None
) -> list[Request]:
    """The engine's requests in the order of the answer's choices; raises RequestError."""
    params = body.to_params()
    requests = []
    for number, prompt in enumerate(body.prompt):
        try:
            requests += _make_requests(engine, body, prompt, params, request_id)
        except RequestError as error:
            if error.param != "prompt" or len(body.prompt) == 1:
                raise
            reason = str(error).removeprefix("prompt: ")
            raise RequestError("prompt", f"item {number}: {reason}") from None
    return requests


def _make_requests(
    engine: Engine,
    body: CompletionRequest,
    prompt: str | list[int],
    params: SamplingParams,
    request_id: str | None,
) -> list[Request]:
    """Those of one prompt. Token ids get their text where it has to be echoed."""
    if isinstance(prompt, str):
        ids = engine.tokenizer.encode(
            prompt,
            add_special_tokens=body.add_special_tokens is not False,
            most=engine.intake.max_request_tokens,
        )
        return engine.make_requests(ids, params, prompt, request_id, body.cache_salt)
    requests = engine.make_requests(prompt, params, None, request_id, body.cache_salt)
    if body.echo:
        text = engine.tokenizer.decode(prompt)
        for request in requests:
            request.prompt = text
    return requests


def completion_body(
    body: CompletionRequest,
    requests: Sequence[Request],
    tokenizer: Tokenizer,
    *,
    model: str,
    answer_id: str,
    created: int,
) -> dict[str, Any]:
    """The answer of the finished `requests` that `make_requests` made of `body`."""
    choices = choices_of(body, requests, tokenizer)
    counts = [len(request.output_token_ids) for request in requests]
    return {
        "id": answer_id,
        "object": "text_completion",
        "created": created,
        "model": model,
        "choices": [
            choice.part(choice.request.text, count, finished=True)
            for choice, count in zip(choices, counts, strict=True)
        ],
        "usage": usage(requests[:: body.n or 1], sum(counts)),
    }


def choices_of(
    body: CompletionRequest, requests: Sequence[Request], tokenizer: Tokenizer
) -> list["Choice"]:
    """One a request, with its number in the answer: those of the first prompt come first."""
    return [
        Choice(body, index, request, requests[index - request.index], tokenizer)
        for index, request in enumerate(requests)
    ]


@dataclass
class Choice:
    """One choice as its request goes on; a whole answer is a single part."""

    body: CompletionRequest
    index: int
    request: Request
    scored: Request  # the first of the prompt's, which alone computes the prompt's logprobs
    tokenizer: Tokenizer
    num_tokens: int = 0  # output tokens in the parts so far
    _text_offset: int = 0  # characters of the tokens in the parts so far
    _begun: bool = False

    def chunks(self, output: StepOutput) -> list[dict[str, Any]]:
        """What one engine step brought."""
        return [{"choices": [self.part(output.text, len(output.token_ids), output.finished)]}]

    def part(self, text: str, num_tokens: int, finished: bool) -> dict[str, Any]:
        """The next part: new `text` and as many new tokens; the first one brings the echo."""
        request, body = self.request, self.body
        first, self.num_tokens = self.num_tokens, self.num_tokens + num_tokens
        starts, self._begun = not self._begun, True
        echo = bool(body.echo) and starts
        part = {
            "index": self.index,
            "text": (request.prompt or "") + text if echo else text,
            "logprobs": self._logprobs(first, echo),
            "finish_reason": request.finish_reason if finished else None,
            "stop_reason": request.stop_reason if finished else None,
        }
        if body.return_token_ids:
            part["token_ids"] = request.output_token_ids[first : self.num_tokens]
        if body.return_token_ids and starts:
            part["prompt_token_ids"] = request.prompt_token_ids
        if body.prompt_logprobs is not None and starts:
            part["prompt_logprobs"] = prompt_logprobs(self.scored, body.prompt_logprobs)
        return part

    def _logprobs(self, first: int, echo: bool) -> dict[str, Any] | None:
        """OpenAI's four arrays over output tokens from `first` on, behind the prompt's if echoed.

        Offsets count characters of `tokens`. Both numbers of a token are one float, so that
        comparing them tells whether it was the best (lm-eval does).
        """
        count = self.body.logprobs
        if count is None:
            return None
        request = self.request
        tokens = request.output_token_ids[first : self.num_tokens]
        known: list[LogprobDict | None] = list(request.logprobs[first : self.num_tokens])
        if echo:
            tokens = request.prompt_token_ids + tokens
            known = self.scored.prompt_logprobs + known
        names = [self._name(token, entries) for token, entries in zip(tokens, known, strict=True)]
        own = [
            None if entries is None else finite(entries[token].logprob)
            for token, entries in zip(tokens, known, strict=True)
        ]
        best = [
            None if entries is None else self._best(token, entries, count)
            for token, entries in zip(tokens, known, strict=True)
        ]
        return {
            "tokens": names,
            "token_logprobs": own,
            "top_logprobs": best,
            "text_offset": [self._advance(name) for name in names],
        }

    def _name(self, token: int, entries: LogprobDict | None) -> str:
        if self.body.return_tokens_as_token_ids:
            return f"token_id:{token}"
        return self.tokenizer.token_text(token) if entries is None else entries[token].decoded_token

    def _best(self, token: int, entries: LogprobDict, count: int) -> dict[str, float]:
        """The `count` best and `token`; of tokens with the same text the better one is shown."""
        best: dict[str, float] = {}
        asked = self.body.logprob_token_ids or ()
        for other, entry in entries.items():
            if entry.rank <= count or other == token or other in asked:
                best.setdefault(self._name(other, entries), finite(entry.logprob))
        return best

    def _advance(self, name: str) -> int:
        offset, self._text_offset = self._text_offset, self._text_offset + len(name)
        return offset
