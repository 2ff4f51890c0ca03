"""What the eval asks: prompts to a backend, replies from it; and `LLM` as a backend."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Protocol

from minidsv import LLM, SamplingParams
from minidsv.cli import limit_threads
from minidsv.engine_config import EngineConfig
from minidsv.errors import RequestError
from minidsv.request import Request


@dataclass(frozen=True)
class Ask:
    """One prompt, and how to go on from it."""

    prompt: str
    max_tokens: int
    temperature: float = 0.0
    seed: int | None = None
    top_logprobs: int | None = None
    choices: tuple[str, ...] = ()  # that may come next: their log-probabilities too, if it can be
    ignore_eos: bool = False


@dataclass(frozen=True)
class Reply:
    """A continuation; if top_logprobs were asked for, what each token was chosen from."""

    text: str
    finish_reason: str | None
    tokens: tuple[str, ...] = ()
    token_logprobs: tuple[float, ...] = ()
    top_logprobs: tuple[dict[str, float], ...] = ()


class BackendError(Exception):
    """A request that was refused, or failed as often as it was tried."""


OnReply = Callable[[int, Reply | BackendError], None]  # number of the ask, what came of it


class Backend(Protocol):
    """Answers prompts."""

    def complete(self, asks: Sequence[Ask], on_reply: OnReply) -> None:
        """Answer all; `on_reply` sees each once, as it finishes, in this thread."""

    def score(self, prompt: str, choice: str) -> float:
        """Log-probability of `choice` behind `prompt`; raises BackendError."""

    def close(self) -> None: ...


@dataclass(frozen=True)
class HTTPOptions:
    """How to talk to a server."""

    model: str | None = None  # None: the first that /v1/models names
    api_key: str | None = None
    chat: bool = False  # /v1/chat/completions instead of /v1/completions
    concurrency: int = 16
    retries: int = 4
    timeout: float = 1800.0  # seconds for one request


class EngineBackend:
    """An `LLM` in this process; all prompts are queued at once, the scheduler does the rest."""

    def __init__(self, config: EngineConfig):
        self.llm = LLM(**{option.name: getattr(config, option.name) for option in fields(config)})
        limit_threads(self.llm.engine)

    def complete(self, asks: Sequence[Ask], on_reply: OnReply) -> None:
        engine = self.llm.engine
        numbers: dict[Request, int] = {}
        try:
            for number, ask in enumerate(asks):
                try:
                    numbers[self._request(ask)] = number
                except BackendError as error:
                    on_reply(number, error)
            for request in numbers:
                engine.add(request)
            while engine.has_work:
                for output in engine.step():
                    if output.finished:
                        on_reply(numbers[output.request], _engine_reply(output.request))
        finally:
            for request in numbers:
                engine.abort(request)

    def _request(self, ask: Ask) -> Request:
        tokenizer = self.llm.engine.tokenizer
        choices = [tokenizer.encode(c, add_special_tokens=False) for c in ask.choices]
        params = SamplingParams(
            max_tokens=ask.max_tokens,
            temperature=ask.temperature,
            seed=ask.seed,
            logprobs=ask.top_logprobs,
            logprob_token_ids=[ids[0] for ids in choices if len(ids) == 1],
            ignore_eos=ask.ignore_eos,
        )
        try:
            return self.llm.engine.make_request(tokenizer.encode(ask.prompt), params, ask.prompt)
        except RequestError as error:
            raise BackendError(f"{error} (prompt {ask.prompt[:60]!r}...)") from None

    def score(self, prompt: str, choice: str) -> float:
        params = SamplingParams(max_tokens=1, prompt_logprobs=0)
        output = self.llm.generate(prompt + choice, params)[0]
        entries = [
            (row[token].decoded_token, row[token].logprob)
            for token, row in zip(
                output.prompt_token_ids, output.prompt_logprobs or (), strict=True
            )
            if row is not None
        ]
        return tail_logprob(entries, choice)

    def close(self) -> None:
        self.llm.close()


def _engine_reply(request: Request) -> Reply:
    taken = [
        row[token] for token, row in zip(request.output_token_ids, request.logprobs, strict=False)
    ]
    return Reply(
        request.text,
        request.finish_reason,
        tuple(entry.decoded_token for entry in taken),
        tuple(entry.logprob for entry in taken),
        tuple({e.decoded_token: e.logprob for e in row.values()} for row in request.logprobs),
    )


def tail_logprob(entries: Sequence[tuple[str, float]], tail: str) -> float:
    """Summed log-probability of the last tokens (text, logprob), whose texts join to `tail`."""
    total, text = 0.0, ""
    for token, logprob in reversed(entries):
        total, text = total + logprob, token + text
        if text == tail:
            return total
        if len(text) >= len(tail):
            break
    raise BackendError(f"no token ends where the choice {tail!r} begins; its score is undefined")
