"""Bodies of POST /generate in SGLang's shape, what they ask of the engine, and the answers.

No web framework in here. Facts of the shape are read from SGLang's `io_struct.py` and
`tokenizer_manager.py`.
"""

import time
from collections.abc import Iterable, Sequence
from typing import Annotated, Any, ClassVar

from pydantic import Field
from pydantic_core import to_json

from minidsv.engine import Engine, StepOutput
from minidsv.errors import RequestError
from minidsv.request import IndexerTopk, Logprob, LogprobDict, Request, SamplingParams
from minidsv.server.gate import MAX_ID_LENGTH
from minidsv.server.protocol import (
    MAX_LOGPROBS,
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
)

_UNSUPPORTED_REQUEST: Unsupported = {
    "add_special_tokens": (True,),
    "input_embeds": (),
    "image_data": (),
    "audio_data": (),
    "video_data": (),
    "modalities": (),
    "token_ids_logprob": (),
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
}
_UNSUPPORTED_SAMPLING: Unsupported = {
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
_OF_RETURN_LOGPROB = {
    "logprob_start_len": -1,
    "top_logprobs_num": 0,
    "return_text_in_logprobs": False,
}
_OURS = {"max_new_tokens": "max_tokens", "min_new_tokens": "min_tokens", "sampling_seed": "seed"}

_FROM_ENGINE = {theirs: ours for ours, theirs in _OURS.items()}


class GenerateSampling(Body):
    """`sampling_params` of POST /generate; null means the default."""

    unsupported: ClassVar[Unsupported] = _UNSUPPORTED_SAMPLING
    n: Integer | None = None
    max_new_tokens: Integer | None = None
    min_new_tokens: Integer | None = None
    temperature: Number | None = None
    top_p: Number | None = None
    top_k: Integer | None = None
    min_p: Number | None = None
    presence_penalty: Number | None = None
    frequency_penalty: Number | None = None
    repetition_penalty: Number | None = None
    logit_bias: Biases | None = None
    stop: Texts | None = None
    stop_token_ids: Integers | None = None
    ignore_eos: Flag = None
    sampling_seed: Integer | None = None

    def values(self) -> dict[str, Any]:
        """Fields of SamplingParams, with SGLang's defaults (128 tokens, temperature 1)."""
        self.refuse_unsupported("sampling_params.")
        values = {_OURS.get(name, name): value for name, value in given(self).items()}
        return {"max_tokens": 128, "temperature": 1.0} | values


class GenerateRequest(Body):
    """Body of POST /generate: one prompt, as text or as token ids."""

    unsupported: ClassVar[Unsupported] = _UNSUPPORTED_REQUEST
    text: Text | None = None
    input_ids: Integers | None = None
    sampling_params: GenerateSampling | None = None
    return_logprob: Flag = None
    logprob_start_len: Annotated[Integer, Field(ge=-1)] | None = None  # -1: the output's only
    top_logprobs_num: Annotated[Integer, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    return_text_in_logprobs: Flag = None
    return_indexer_topk: Flag = None  # ours, not SGLang's
    stream: Flag = None
    rid: Annotated[Text, Field(min_length=1, max_length=MAX_ID_LENGTH)] | None = None
    extra_key: Annotated[Text, Field(min_length=1, max_length=1024)] | None = None  # our cache_salt

    def prompt(self) -> str | list[int]:
        """The one prompt given; raises RequestError for none or two."""
        prompts = [p for p in (self.text, self.input_ids) if p is not None]
        if len(prompts) != 1:
            raise RequestError(
                "text", f"exactly one of text and input_ids is needed, {len(prompts)} are given"
            )
        return prompts[0]

    def to_params(self) -> SamplingParams:
        """Raises RequestError."""
        return SamplingParams(
            **(self.sampling_params or GenerateSampling()).values(),
            **self._logprobs(),
            return_indexer_topk=bool(self.return_indexer_topk),
        )

    def in_own_terms(self, error: RequestError) -> RequestError:
        """The engine's refusal, with the names of this body in place of those of SamplingParams."""
        message = str(error).removeprefix(f"{error.param}: ")
        if error.param == "prompt":
            return RequestError("text" if self.input_ids is None else "input_ids", message)
        if error.param in ("logprobs", "prompt_logprobs"):
            return RequestError("top_logprobs_num", message)
        for ours, theirs in _OURS.items():
            message = message.replace(theirs, ours)
        name = _FROM_ENGINE.get(error.param, error.param)
        known = name in GenerateSampling.model_fields
        return RequestError(f"sampling_params.{name}" if known else name, message)

    def _logprobs(self) -> dict[str, Any]:
        start = -1 if self.logprob_start_len is None else self.logprob_start_len
        if self.return_logprob:
            count = self.top_logprobs_num or 0
            return {"logprobs": count, "prompt_logprobs": count if start >= 0 else None}
        for name, nothing in _OF_RETURN_LOGPROB.items():
            if getattr(self, name) not in (None, nothing):
                raise RequestError(name, "is given without return_logprob: true")
        return {}


def make_requests(engine: Engine, body: GenerateRequest, request_id: str) -> list[Request]:
    """One request an answer; raises RequestError in the body's terms."""
    body.refuse_unsupported()
    try:
        prompt, params = body.prompt(), body.to_params()
        text = prompt if isinstance(prompt, str) else None
        if isinstance(prompt, str):
            ids = engine.tokenizer.encode(prompt, most=engine.intake.max_request_tokens)
        else:
            ids = prompt
        if (body.logprob_start_len or 0) > len(ids):
            raise RequestError(
                "logprob_start_len",
                f"{body.logprob_start_len} lies behind the prompt's {len(ids)} tokens",
            )
        return engine.make_requests(ids, params, text, body.rid or request_id, body.extra_key)
    except RequestError as error:
        raise body.in_own_terms(error) from None


class Answer:
    """One answer as its request goes on; every event of a stream repeats all of it so far."""

    def __init__(self, body: GenerateRequest, request: Request, scored: Request):
        """`scored` is the first of the prompt's requests: it computes the prompt's logprobs."""
        self.request, self.scored = request, scored
        self._body = body
        self._start = time.perf_counter()
        self._num_tokens = 0
        self._selections: list[IndexerTopk] = []
        self._finished = False
        self._text = b""  # JSON without its quotes; all that grows is encoded once, and repeated
        self._output_ids = _JsonList()
        self._inputs: dict[str, _JsonList] | None = None
        self._outputs = {f"output_{kind}_logprobs": _JsonList() for kind in self._kinds()}

    def add(self, output: StepOutput) -> None:
        """Take in what a step brought."""
        self._text += to_json(output.text)[1:-1]
        self._output_ids.extend(output.token_ids)
        first, self._num_tokens = self._num_tokens, self._num_tokens + len(output.token_ids)
        known = self.request.logprobs[first : self._num_tokens]
        self._extend(self._outputs, output.token_ids, known)
        if self._body.return_indexer_topk:
            self._take_selections(len(output.token_ids))
        self._finished = output.finished

    def json(self) -> bytes:
        """All so far; with several answers, `index` tells which one it is."""
        if self._inputs is None:
            self._inputs = self._encoded_inputs()
        lists = b"".join(
            b',"%b":%b' % (name.encode(), entries.json())
            for name, entries in (self._inputs | self._outputs).items()
        )
        index = b',"index":%d' % self.request.index if self.request.params.n > 1 else b""
        return b'{"text":"%b","output_ids":%b,"meta_info":%b%b}%b}' % (
            self._text,
            self._output_ids.json(),
            to_json(self._meta_info())[:-1],
            lists,
            index,
        )

    def _meta_info(self) -> dict[str, Any]:
        request = self.request
        return {
            "id": request.request_id,
            "finish_reason": _finish_reason(request) if self._finished else None,
            "prompt_tokens": len(request.prompt_token_ids),
            "completion_tokens": self._num_tokens,
            "cached_tokens": request.num_cached_tokens,
            "e2e_latency": round(time.perf_counter() - self._start, 6),
            **self._indexer_topk(),
        }

    def _indexer_topk(self) -> dict[str, Any]:
        if not self._body.return_indexer_topk:
            return {}
        return {"indexer_topk": [vars(item) for item in self._selections]}

    def _take_selections(self, count: int) -> None:
        """Off the request: they are long, and an event of a stream has only the new ones."""
        if self._body.stream:
            self._selections.clear()
        self._selections += [self.request.indexer_topk.pop(0) for _ in range(count)]

    def _kinds(self) -> list[str]:
        """Of SGLang's lists: the tokens' own log-probabilities, and the best at each position."""
        if not self._body.return_logprob:
            return []
        return ["token", "top"] if self._body.top_logprobs_num else ["token"]

    def _encoded_inputs(self) -> dict[str, "_JsonList"]:
        """The prompt's lists, once it is scored; its first token has no entries."""
        lists = {f"input_{kind}_logprobs": _JsonList() for kind in self._kinds()}
        start = self._body.logprob_start_len
        if start is not None and start >= 0:
            tokens = self.request.prompt_token_ids[start:]
            known = [None, *self.scored.prompt_logprobs[start + 1 :]][: len(tokens)]
            self._extend(lists, tokens, known)
        return lists

    def _extend(
        self,
        lists: dict[str, "_JsonList"],
        tokens: Sequence[int],
        known: Sequence[LogprobDict | None],
    ) -> None:
        """Entries are [logprob, token id, text or null]; `lists` are in the order of `_kinds`."""
        for entries, of_kind in zip(lists.values(), (self._taken, self._best), strict=False):
            entries.extend(of_kind(tokens, known))

    def _taken(self, tokens: Sequence[int], known: Sequence[LogprobDict | None]) -> list[Any]:
        return [
            [None, token, None] if entries is None else self._entry(token, entries[token])
            for token, entries in zip(tokens, known, strict=True)
        ]

    def _best(self, _: Sequence[int], known: Sequence[LogprobDict | None]) -> list[Any]:
        count = self._body.top_logprobs_num or 0
        return [
            entries and [self._entry(t, e) for t, e in entries.items() if e.rank <= count]
            for entries in known
        ]

    def _entry(self, token: int, entry: Logprob) -> list[Any]:
        text = entry.decoded_token if self._body.return_text_in_logprobs else None
        return [finite(entry.logprob), token, text]


class _JsonList:
    """A JSON array that grows: each item is encoded once."""

    def __init__(self) -> None:
        self._items = b""

    def extend(self, items: Iterable[Any]) -> None:
        new = to_json(list(items))[1:-1]
        self._items += b"," + new if self._items and new else new

    def json(self) -> bytes:
        return b"[%b]" % self._items


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
