"""Bodies of POST /v1/chat/completions, in OpenAI's shape with vLLM's additions. No web framework.

As in completions.py: `make_requests`, then `chat_body`, or a `ChatChoice` each for a stream. What a
reasoning model thinks goes to `reasoning_content`, as in DeepSeek's own API.
"""

from collections.abc import Iterator, Sequence
from typing import Annotated, Any, ClassVar

from pydantic import Field, WithJsonSchema

from minidsv.chat import ChatPrompt, ChatTemplate
from minidsv.chat_reasoning import Split
from minidsv.engine import Engine, StepOutput
from minidsv.errors import RequestError
from minidsv.request import Logprob, Request, SamplingParams
from minidsv.server.openai_request import (
    UNSUPPORTED,
    OpenAIRequest,
    prompt_logprobs,
    usage,
)
from minidsv.server.protocol import MAX_LOGPROBS, Flag, Integer, Unsupported, finite
from minidsv.tokenizer import Tokenizer

_UNSUPPORTED: Unsupported = {
    "tools": (),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "functions": (),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "web_search_options": (),
    "store": (False,),
    "verbosity": ("medium",),
    "reasoning_effort": ("none",),
    "include_reasoning": (True,),
    "separate_reasoning": (True,),
    "stream_reasoning": (True,),
    "documents": (),
    "chat_template": (),
    "media_io_kwargs": (),
    "mm_processor_kwargs": (),
}
_TEXT_PART = {
    "type": "object",
    "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
    "required": ["type", "text"],
}
_MESSAGE = {
    "type": "object",
    "properties": {
        "role": {"enum": ["system", "developer", "user", "assistant"]},
        "content": {"anyOf": [{"type": "string"}, {"type": "array", "items": _TEXT_PART}]},
    },
    "required": ["role", "content"],
}
Messages = Annotated[list[Any], WithJsonSchema({"type": "array", "items": _MESSAGE, "minItems": 1})]


class ChatRequest(OpenAIRequest):
    """Body of POST /v1/chat/completions; ChatTemplate checks the messages."""

    unsupported: ClassVar[Unsupported] = {**UNSUPPORTED, **_UNSUPPORTED}
    messages: Messages
    max_completion_tokens: Annotated[Integer, Field(ge=0)] | None = None
    logprobs: Flag = None
    top_logprobs: Annotated[Integer, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    add_generation_prompt: Flag = None
    continue_final_message: Flag = None
    chat_template_kwargs: dict[str, Any] | None = None

    def to_params(self) -> SamplingParams:
        """Our parameters; without a limit, as many tokens as the context holds."""
        self.check()
        if self.top_logprobs is not None and not self.logprobs:
            raise RequestError("top_logprobs", "is given without logprobs: true")
        limits = {self.max_tokens, self.max_completion_tokens} - {None}
        if len(limits) > 1:
            raise RequestError(
                "max_completion_tokens",
                f"{self.max_completion_tokens} and max_tokens {self.max_tokens} contradict",
            )
        logprobs = (self.top_logprobs or 0) if self.logprobs else None
        return SamplingParams(
            **self.sampling() | {"max_tokens": next(iter(limits), None), "logprobs": logprobs}
        )

    def in_own_terms(self, error: RequestError) -> RequestError:
        """The engine's refusal, with the names of this body."""
        ours = {"prompt": "messages", "logprobs": "top_logprobs"}
        if self.max_completion_tokens is not None:
            ours["max_tokens"] = "max_completion_tokens"
        message = str(error).removeprefix(f"{error.param}: ")
        return RequestError(ours.get(error.param, error.param), message)


def render(
    engine: Engine,
    messages: list[Any],
    add_generation_prompt: bool | None,
    continue_final_message: bool | None,
    template_kwargs: dict[str, Any] | None,
    most: int | None = None,
) -> ChatPrompt:
    """The prompt of a conversation; raises RequestError, also for a checkpoint without a format."""
    template = ChatTemplate(engine.tokenizer, engine.model_config)
    return template.render(
        messages,
        add_generation_prompt=add_generation_prompt,
        continue_final_message=bool(continue_final_message),
        template_kwargs=template_kwargs,
        most=most,
    )


def make_requests(
    engine: Engine, body: ChatRequest, request_id: str | None = None
) -> tuple[ChatPrompt, list[Request]]:
    """The rendered prompt and the engine's requests, one a choice; raises RequestError."""
    params = body.to_params()
    prompt = render(
        engine,
        body.messages,
        body.add_generation_prompt,
        body.continue_final_message,
        body.chat_template_kwargs,
        engine.intake.max_request_tokens,
    )
    try:
        requests = engine.make_requests(
            prompt.token_ids, params, prompt.text, request_id, body.cache_salt
        )
    except RequestError as error:
        raise body.in_own_terms(error) from None
    return prompt, requests


def chat_body(
    body: ChatRequest,
    prompt: ChatPrompt,
    requests: Sequence[Request],
    tokenizer: Tokenizer,
    *,
    model: str,
    answer_id: str,
    created: int,
) -> dict[str, Any]:
    """The answer of the finished `requests` that `make_requests` made of `body`."""
    choices = choices_of(body, prompt, requests, tokenizer)
    total = sum(len(request.output_token_ids) for request in requests)
    return {
        "id": answer_id,
        "object": "chat.completion",
        "created": created,
        "model": model,
        "choices": [choice.whole() for choice in choices],
        "usage": usage(requests[:1], total),
        **prompt_fields(body, requests[0]),
    }


def prompt_fields(body: ChatRequest, first: Request) -> dict[str, Any]:
    """What vLLM's clients may ask to see of the prompt."""
    shown: dict[str, Any] = {}
    if body.return_token_ids:
        shown["prompt_token_ids"] = first.prompt_token_ids
    if body.prompt_logprobs is not None:
        shown["prompt_logprobs"] = prompt_logprobs(first, body.prompt_logprobs)
    return shown


def choices_of(
    body: ChatRequest, prompt: ChatPrompt, requests: Sequence[Request], tokenizer: Tokenizer
) -> list["ChatChoice"]:
    """One a request."""
    return [ChatChoice(body, prompt, request, tokenizer) for request in requests]


class ChatChoice:
    """One choice as its request goes on."""

    def __init__(
        self, body: ChatRequest, prompt: ChatPrompt, request: Request, tokenizer: Tokenizer
    ):
        self.request = self.scored = request
        self.num_tokens = 0  # output tokens in the parts so far
        self._body, self._prompt, self._tokenizer = body, prompt, tokenizer
        self._splitter = prompt.splitter()
        self._begun = False

    def whole(self) -> dict[str, Any]:
        """The finished choice."""
        message = {"role": "assistant"} | self._message(self._prompt.split(self.request.text))
        return self._choice("message", message, len(self.request.output_token_ids), True)

    def chunks(self, output: StepOutput) -> Iterator[dict[str, Any]]:
        """What one engine step brought; the role comes first, in a chunk of its own."""
        if not self._begun:
            self._begun = True
            opening = self._choice("delta", {"role": "assistant", "content": ""}, 0, False)
            first = self.request.index == 0
            shown = prompt_fields(self._body, self.request) if first else {}
            yield {"choices": [opening], **shown}
        split = self._splitter.push(output.text)
        if output.finished:
            rest = self._splitter.finish()
            split = Split(split.reasoning + rest.reasoning, split.content + rest.content)
        delta = self._message(split)
        num_tokens = len(output.token_ids)
        yield {"choices": [self._choice("delta", delta, num_tokens, output.finished)]}

    def _message(self, split: Split) -> dict[str, Any]:
        reasons = self._prompt.in_reasoning
        return {"content": split.content} | (
            {"reasoning_content": split.reasoning} if reasons else {}
        )

    def _choice(
        self, name: str, message: dict[str, Any], num_tokens: int, finished: bool
    ) -> dict[str, Any]:
        request, body = self.request, self._body
        first, self.num_tokens = self.num_tokens, self.num_tokens + num_tokens
        choice = {
            "index": request.index,
            name: message,
            "logprobs": self._logprobs(first) if body.logprobs else None,
            "finish_reason": request.finish_reason if finished else None,
            "stop_reason": request.stop_reason if finished else None,
        }
        if body.return_token_ids:
            choice["token_ids"] = request.output_token_ids[first : self.num_tokens]
        return choice

    def _logprobs(self, first: int) -> dict[str, Any]:
        """One entry an output token from `first` on, each with the best ones at its position."""
        tokens = self.request.output_token_ids[first : self.num_tokens]
        known = self.request.logprobs[first : self.num_tokens]
        count = self._body.top_logprobs or 0
        return {
            "content": [
                self._entry(token, entries[token])
                | {
                    "top_logprobs": [
                        self._entry(other, entry)
                        for other, entry in entries.items()
                        if entry.rank <= count
                    ]
                }
                for token, entries in zip(tokens, known, strict=True)
            ]
        }

    def _entry(self, token: int, entry: Logprob) -> dict[str, Any]:
        named = self._body.return_tokens_as_token_ids
        return {
            "token": f"token_id:{token}" if named else entry.decoded_token,
            "logprob": finite(entry.logprob),
            "bytes": list(self._tokenizer.token_bytes(token)),
        }
