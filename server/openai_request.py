"""Fields that OpenAI's completion and chat bodies share, with vLLM's additions."""

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Self

from pydantic import Field, ValidationError

from minidsv.errors import RequestError
from minidsv.request import MAX_INT, Request
from minidsv.server.protocol import (
    MAX_LOGPROBS,
    SAMPLING_NAMES,
    Biases,
    Body,
    Flag,
    Integer,
    Integers,
    Number,
    Text,
    Texts,
    Unsupported,
    finite,
    given,
    validation_reason,
)

# Of OpenAI, vLLM and SGLang, on both routes.
UNSUPPORTED: Unsupported = {
    "best_of": (1,),
    "use_beam_search": (False,),
    "length_penalty": (1,),
    "watermarking": (False,),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "truncate_prompt_tokens": (),
    "truncation_side": (),
    "allowed_token_ids": (),
    "bad_words": (),
    "logits_processors": (),
    "prompt_embeds": (),
    "response_format": ({"type": "text"},),
    "structured_outputs": (),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
    "json_schema": (),
    "regex": (),
    "ebnf": (),
    "stop_regex": (),
    "no_stop_trim": (False,),
    "priority": (0,),
    "service_tier": ("auto", "default"),
    "repetition_detection": (),
    "thinking_token_budget": (-1,),
    "stream_interval": (1,),
    "routed_experts_prompt_start": (0,),
    "return_token_offsets": (False,),
    "return_hidden_states": (False,),
    "kv_transfer_params": (),
    "ec_transfer_params": (),
    "vllm_xargs": (),
    "custom_logit_processor": (),
    "lora_path": (),
    "session_params": (),
    "rid": (),
}


class StreamOptions(Body):
    """`stream_options`: which events of a stream carry token counts."""

    unsupported: ClassVar[Unsupported] = {"include_obfuscation": (False,)}
    include_usage: Flag = None  # one event behind the last choice's
    continuous_usage_stats: Flag = None  # every event


class OpenAIRequest(Body):
    """What both routes accept; null means the default."""

    unsupported: ClassVar[Unsupported] = UNSUPPORTED
    model: Text | None = None
    n: Annotated[Integer, Field(ge=1, le=128)] | None = None  # choices a prompt
    stream: Flag = None
    stream_options: StreamOptions | None = None
    max_tokens: Annotated[Integer, Field(ge=0)] | None = None
    min_tokens: Annotated[Integer, Field(ge=0)] | None = None
    temperature: Annotated[Number, Field(ge=0, le=2)] | None = None
    top_p: Annotated[Number, Field(gt=0, le=1)] | None = None
    min_p: Annotated[Number, Field(ge=0, le=1)] | None = None
    top_k: Annotated[Integer, Field(ge=-1)] | None = None
    presence_penalty: Annotated[Number, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[Number, Field(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[Number, Field(gt=0)] | None = None
    logit_bias: Biases | None = None
    seed: Integer | None = None
    stop: Texts | None = None
    stop_token_ids: Integers | None = None
    include_stop_str_in_output: Flag = None
    ignore_eos: Flag = None
    prompt_logprobs: Annotated[Integer, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    return_token_ids: Flag = None
    return_tokens_as_token_ids: Flag = None
    request_id: Annotated[Text, Field(min_length=1, max_length=128)] | None = None
    cache_salt: Annotated[Text, Field(min_length=1, max_length=1024)] | None = None
    user: Text | None = None  # the caller's own mark

    @classmethod
    def parse(cls, body: Any) -> Self:
        """Of a decoded JSON body, without a web framework; raises RequestError."""
        try:
            return cls.model_validate(body)
        except ValidationError as error:
            field, reason = validation_reason(error.errors()[0])
            raise RequestError(field or "body", reason) from None

    def check(self) -> None:
        """Raise RequestError for what this server lacks and for options without their option."""
        self.refuse_unsupported()
        if self.stream_options is not None:
            self.stream_options.refuse_unsupported("stream_options.")
            if not self.stream:
                raise RequestError("stream_options", "is given without stream: true")

    def sampling(self) -> dict[str, Any]:
        """The fields that SamplingParams has by the same names; OpenAI's default temperature is 1.

        A negative seed, which OpenAI's range allows, becomes one of ours.
        """
        values = {name: value for name, value in given(self).items() if name in SAMPLING_NAMES}
        if self.seed is not None:
            values["seed"] = self.seed & MAX_INT
        return {"temperature": 1.0} | values


def usage(prompts: Sequence[Request], completion_tokens: int) -> dict[str, Any]:
    """`usage` of an answer; `prompts` holds one request a prompt, however many choices each has."""
    prompt_tokens = sum(len(request.prompt_token_ids) for request in prompts)
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": sum(r.num_cached_tokens for r in prompts)},
    }


def prompt_logprobs(request: Request, count: int) -> list[dict[str, Any] | None]:
    """vLLM's `prompt_logprobs`: the `count` best and the prompt's own token at each position."""
    return [
        None
        if entries is None
        else {
            str(token): {
                "logprob": finite(entry.logprob),
                "rank": entry.rank,
                "decoded_token": entry.decoded_token,
            }
            for token, entry in entries.items()
            if entry.rank <= count or token == own
        }
        for own, entries in zip(request.prompt_token_ids, request.prompt_logprobs, strict=True)
    ]
