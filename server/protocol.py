"""Bodies of POST /generate, in SGLang's shape, and how they become SamplingParams.

A field that SGLang documents and we lack is refused unless it carries the value that asks for
nothing; a name that nobody documents is ignored and logged at debug.
"""

import logging
import reprlib
from dataclasses import replace
from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StrictBool,
    StrictInt,
    StrictStr,
)
from pydantic_core import PydanticCustomError

from minidsv.errors import RequestError
from minidsv.request import Request, SamplingParams

logger = logging.getLogger(__name__)


def _check_unicode(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise PydanticCustomError(
            "unicode", "Input should be valid Unicode (it has a lone surrogate)"
        ) from None
    return text


Text = Annotated[StrictStr, AfterValidator(_check_unicode)]
Integer = Annotated[StrictInt, Field(ge=-(2**63), lt=2**63)]
Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]
Texts = Annotated[list[Text], BeforeValidator(lambda v: [v] if isinstance(v, str) else v)]

# SGLang's documented fields that we lack -> values that ask for nothing (None and what is empty
# always do).
_UNSUPPORTED_REQUEST: dict[str, tuple[Any, ...]] = {
    "input_embeds": (),
    "image_data": (),
    "audio_data": (),
    "video_data": (),
    "modalities": (),
    "return_logprob": (False,),
    "logprob_start_len": (-1,),
    "top_logprobs_num": (0,),
    "token_ids_logprob": (),
    "return_text_in_logprobs": (False,),
    "return_hidden_states": (False,),
    "return_routed_experts": (False,),
    "session_params": (),
    "lora_path": (),
    "lora_id": (),
    "custom_logit_processor": (),
    "bootstrap_host": (),
    "bootstrap_port": (),
    "bootstrap_room": (),
    "data_parallel_rank": (),
    "background": (False,),
    "priority": (),
    "extra_key": (),
}
_UNSUPPORTED_SAMPLING: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "min_p": (0,),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "repetition_penalty": (1,),
    "logit_bias": (),
    "stop_regex": (),
    "json_schema": (),
    "regex": (),
    "ebnf": (),
    "structural_tag": (),
    "custom_params": (),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "no_stop_trim": (False,),
}


class GenerateSampling(BaseModel):
    """`sampling_params` of POST /generate; null means the default."""

    model_config = ConfigDict(extra="allow")
    max_new_tokens: Integer | None = None
    min_new_tokens: Integer | None = None
    temperature: Number | None = None
    top_p: Number | None = None
    top_k: Integer | None = None
    stop: Texts | None = None
    stop_token_ids: list[Integer] | None = None
    ignore_eos: StrictBool | None = None
    sampling_seed: Integer | None = None

    def to_params(self) -> SamplingParams:
        """Our parameters, with SGLang's defaults (128 tokens, temperature 1, top_k -1 for all)."""
        _refuse(self, "sampling_params.", _UNSUPPORTED_SAMPLING)
        top_k = 0 if self.top_k in (None, -1) else self.top_k
        return SamplingParams(
            max_tokens=128 if self.max_new_tokens is None else self.max_new_tokens,
            min_tokens=self.min_new_tokens or 0,
            temperature=1.0 if self.temperature is None else self.temperature,
            top_p=1.0 if self.top_p is None else self.top_p,
            top_k=top_k or 0,
            stop=self.stop,
            stop_token_ids=self.stop_token_ids,
            ignore_eos=bool(self.ignore_eos),
            seed=self.sampling_seed,
        )


class GenerateRequest(BaseModel):
    """Body of POST /generate: one prompt, as text or as token ids."""

    model_config = ConfigDict(extra="allow")
    text: Text | None = None
    input_ids: list[Integer] | None = None
    sampling_params: GenerateSampling | None = None
    stream: StrictBool | None = None
    return_indexer_topk: StrictBool | None = None  # ours, not SGLang's
    rid: Text | None = None

    def prompt(self) -> str | list[int]:
        """The one prompt given; raises RequestError for none or two."""
        _refuse(self, "", _UNSUPPORTED_REQUEST)
        given = [p for p in (self.text, self.input_ids) if p is not None]
        if len(given) != 1:
            raise RequestError(
                "text", f"exactly one of text and input_ids is needed, {len(given)} are given"
            )
        return given[0]

    def to_params(self) -> SamplingParams:
        params = (self.sampling_params or GenerateSampling()).to_params()
        return replace(params, return_indexer_topk=bool(self.return_indexer_topk))

    def in_own_terms(self, error: RequestError) -> RequestError:
        """The engine's refusal, with the names of this body in place of those of SamplingParams."""
        message = str(error).removeprefix(f"{error.param}: ")
        if error.param == "prompt":
            return RequestError("text" if self.input_ids is None else "input_ids", message)
        if error.param not in _FROM_ENGINE:
            return error
        message = message.replace("max_tokens", "max_new_tokens")
        return RequestError("sampling_params." + _FROM_ENGINE[error.param], message)


# SamplingParams' names -> ours.
_FROM_ENGINE = {
    "max_tokens": "max_new_tokens",
    "min_tokens": "min_new_tokens",
    "seed": "sampling_seed",
    **{n: n for n in ("temperature", "top_p", "top_k", "stop", "stop_token_ids", "ignore_eos")},
}


def _refuse(model: BaseModel, prefix: str, unsupported: dict[str, tuple[Any, ...]]) -> None:
    for name, value in (model.model_extra or {}).items():
        if name not in unsupported:
            logger.debug("ignoring unknown field %s%s", prefix, name)
        elif not _asks_for_nothing(value, unsupported[name]):
            shown = reprlib.repr(value)
            raise RequestError(prefix + name, f"{shown} is not supported by this server")


def _asks_for_nothing(value: Any, neutral: tuple[Any, ...]) -> bool:
    if value is None or value in ("", [], {}):
        return True
    return any(value == n and isinstance(value, bool) == isinstance(n, bool) for n in neutral)


def generate_response(
    request: Request, text: str, token_ids: list[int], finished: bool, seconds: float
) -> dict[str, Any]:
    """The JSON of one (partial) answer; `text` and `token_ids` are all so far."""
    return {
        "text": text,
        "output_ids": token_ids,
        "meta_info": {
            "id": request.request_id,
            "finish_reason": _finish_reason(request) if finished else None,
            "prompt_tokens": len(request.prompt_token_ids),
            "completion_tokens": len(token_ids),
            "e2e_latency": round(seconds, 6),
        },
    }


def indexer_topk(request: Request, new_tokens: int, stream: bool) -> dict[str, Any]:
    """The field of meta_info with the selections of all tokens so far, if they are asked for; in a
    stream those of the new tokens, which the request then holds no longer: they are long.
    """
    if not request.params.return_indexer_topk:
        return {}
    held = request.indexer_topk
    chosen = [held.pop(0) for _ in range(new_tokens)] if stream else held
    return {"indexer_topk": [{"num_keys": s.num_keys, "layers": s.layers} for s in chosen]}


def _finish_reason(request: Request) -> dict[str, Any]:
    if request.finish_reason == "length":
        return {"type": "length", "length": request.max_tokens}
    if request.finish_reason == "stop":
        matched = request.stop_reason
        return {
            "type": "stop",
            "matched": request.output_token_ids[-1] if matched is None else matched,
        }
    return {"type": "abort", "message": "aborted"}


def error_body(
    message: str, kind: str, param: str | None = None, code: str | None = None
) -> dict[str, Any]:
    """OpenAI's nested error shape."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}
