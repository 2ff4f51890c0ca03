"""Fields that OpenAI's completion and chat bodies share, with vLLM's additions."""

from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from minidsv.errors import RequestError
from minidsv.request import MAX_INT, Request
from minidsv.server.protocol import Flag, Integer, Number, Text, Texts, refuse_unsupported

# Documented fields of OpenAI, vLLM and SGLang that we lack on both routes -> values that ask for
# nothing (None and what is empty always do).
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "min_p": (0,),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "repetition_penalty": (1,),
    "logit_bias": (),
    "cache_salt": (),
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
    "logprob_token_ids": (),
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
_UNSUPPORTED_STREAM: dict[str, tuple[Any, ...]] = {"include_obfuscation": (False,)}


class StreamOptions(BaseModel):
    """`stream_options`: which events of a stream carry token counts."""

    model_config = ConfigDict(extra="allow")
    include_usage: Flag = None  # one event behind the last choice's
    continuous_usage_stats: Flag = None  # every event


class OpenAIRequest(BaseModel):
    """What both routes accept; null means the default."""

    model_config = ConfigDict(extra="allow")
    model: Text | None = None
    stream: Flag = None
    stream_options: StreamOptions | None = None
    max_tokens: Annotated[Integer, Field(ge=0)] | None = None
    min_tokens: Annotated[Integer, Field(ge=0)] | None = None
    temperature: Annotated[Number, Field(ge=0, le=2)] | None = None
    top_p: Annotated[Number, Field(gt=0, le=1)] | None = None
    top_k: Annotated[Integer, Field(ge=-1)] | None = None
    seed: Integer | None = None
    stop: Texts | None = None
    stop_token_ids: list[Integer] | None = None
    include_stop_str_in_output: Flag = None
    ignore_eos: Flag = None
    prompt_logprobs: Annotated[Integer, Field(ge=0, le=20)] | None = None
    return_token_ids: Flag = None
    return_tokens_as_token_ids: Flag = None
    add_special_tokens: Flag = None
    request_id: Annotated[Text, Field(min_length=1, max_length=128)] | None = None
    user: Text | None = None  # the caller's own mark

    def check(self, unsupported: dict[str, tuple[Any, ...]]) -> None:
        """Raise RequestError for what this server lacks and for options without their option."""
        refuse_unsupported(self, "", UNSUPPORTED | unsupported)
        if self.stream_options is not None:
            refuse_unsupported(self.stream_options, "stream_options.", _UNSUPPORTED_STREAM)
            if not self.stream:
                raise RequestError("stream_options", "is given without stream: true")

    @property
    def num_choices(self) -> int:
        """Choices a prompt."""
        return 1

    def sampling(self) -> dict[str, Any]:
        """SamplingParams' fields but max_tokens and logprobs; OpenAI's default temperature is 1."""
        return {
            "temperature": 1.0 if self.temperature is None else self.temperature,
            "top_p": 1.0 if self.top_p is None else self.top_p,
            "top_k": max(0, self.top_k or 0),
            "seed": None if self.seed is None else self.seed & MAX_INT,
            "stop": self.stop,
            "stop_token_ids": self.stop_token_ids,
            "ignore_eos": bool(self.ignore_eos),
            "min_tokens": self.min_tokens or 0,
        }


def usage(prompts: Sequence[Request], completion_tokens: int) -> dict[str, Any]:
    """`usage` of an answer; `prompts` holds one request a prompt, however many choices each has."""
    prompt_tokens = sum(len(request.prompt_token_ids) for request in prompts)
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }


def finite(logprob: float) -> float:
    """JSON has no infinity; the lowest number is vLLM's."""
    return max(logprob, -9999.0)


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
