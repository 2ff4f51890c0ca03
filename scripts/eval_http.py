"""The eval's client of an OpenAI-compatible server, by httpx."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any, Self, TypeVar

import httpx
from pydantic import BaseModel, Field, FiniteFloat, ValidationError, model_validator

from eval_backends import Ask, BackendError, HTTPOptions, OnReply, Reply, tail_logprob
from minidsv.errors import ConfigError

RETRIED = {408, 409, 429}  # and everything from 500: a later try may succeed
LONGEST_WAIT = 30.0  # seconds between two tries


class _Logprobs(BaseModel):
    tokens: list[str]
    token_logprobs: list[FiniteFloat | None]
    top_logprobs: list[dict[str, FiniteFloat] | None]

    @model_validator(mode="after")
    def _of_one_length(self) -> Self:
        if not len(self.tokens) == len(self.token_logprobs) == len(self.top_logprobs):
            raise ValueError("the lists differ in length")
        return self


class _Choice(BaseModel):
    text: str
    finish_reason: str | None = None
    logprobs: _Logprobs | None = None


class _Completion(BaseModel):
    choices: list[_Choice] = Field(min_length=1)


class _Message(BaseModel):
    content: str | None


class _ChatChoice(BaseModel):
    message: _Message
    finish_reason: str | None = None


class _Chat(BaseModel):
    choices: list[_ChatChoice] = Field(min_length=1)


Answer = TypeVar("Answer", _Completion, _Chat)


class HTTPBackend:
    """Sends every prompt to `base_url` (with or without /v1); a failed request is tried again."""

    def __init__(self, base_url: str, options: HTTPOptions):
        self.base_url = base_url.rstrip("/").removesuffix("/v1") + "/v1"
        self.options = options
        key = options.api_key or ""
        if not (key.isascii() and key.isprintable()):
            raise ConfigError("--api-key: a key is printable ASCII")
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        limits = httpx.Limits(max_connections=options.concurrency)
        self.client = httpx.Client(headers=headers, timeout=options.timeout, limits=limits)
        self.model = options.model or self._first_model()
        self.retried = 0

    def describe(self) -> dict[str, Any]:
        return {"url": self.base_url, "model": self.model, "chat": self.options.chat}

    def complete(self, asks: Sequence[Ask], on_reply: OnReply) -> None:
        pool = ThreadPoolExecutor(self.options.concurrency)
        futures = {pool.submit(self._ask, ask): number for number, ask in enumerate(asks)}
        try:
            for future in as_completed(futures):
                error = future.exception()
                if error is not None and not isinstance(error, BackendError):
                    raise error
                on_reply(futures.pop(future), error or future.result())
        except KeyboardInterrupt:
            self.client.close()  # ends what is in flight
            raise
        except Exception:  # given up: keep what has been answered and what is in flight
            pool.shutdown(cancel_futures=True)
            for future, number in futures.items():
                if not future.cancelled() and future.exception() is None:
                    on_reply(number, future.result())
            raise
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def score(self, prompt: str, choice: str) -> float:
        body = {"prompt": prompt + choice, "max_tokens": 1, "temperature": 0.0}
        answer = self._complete({**body, "echo": True, "logprobs": 1})
        assert answer.logprobs is not None
        known = zip(answer.logprobs.tokens, answer.logprobs.token_logprobs, strict=True)
        entries = [(token, logprob) for token, logprob in known if logprob is not None]
        return tail_logprob(entries[:-1], choice)  # the last one is generated

    def close(self) -> None:
        self.client.close()

    def _ask(self, ask: Ask) -> Reply:
        body: dict[str, Any] = {"max_tokens": ask.max_tokens, "temperature": ask.temperature}
        if ask.seed is not None:
            body["seed"] = ask.seed
        if ask.ignore_eos:
            body["ignore_eos"] = True
        if self.options.chat:
            if ask.top_logprobs is not None:
                raise BackendError("scores of choices need /v1/completions; leave out --chat")
            messages = [{"role": "user", "content": ask.prompt}]
            chosen = self._post("chat/completions", {**body, "messages": messages}, _Chat).choices[
                0
            ]
            return Reply(chosen.message.content or "", chosen.finish_reason)
        body["prompt"] = ask.prompt
        if ask.top_logprobs is not None:
            body["logprobs"] = ask.top_logprobs
        choice = self._complete(body)
        if choice.logprobs is None:
            return Reply(choice.text, choice.finish_reason)
        return Reply(
            choice.text,
            choice.finish_reason,
            tuple(choice.logprobs.tokens),
            tuple(-math.inf if x is None else x for x in choice.logprobs.token_logprobs),
            tuple(best or {} for best in choice.logprobs.top_logprobs),
        )

    def _complete(self, body: dict[str, Any]) -> _Choice:
        choice = self._post("completions", body, _Completion).choices[0]
        if "logprobs" in body and choice.logprobs is None:
            raise BackendError(
                "the server sends no logprobs; the loglikelihood protocol needs them"
            )
        return choice

    def _post(self, route: str, body: dict[str, Any], kind: type[Answer]) -> Answer:
        url = f"{self.base_url}/{route}"
        answer = self._send("POST", url, {"model": self.model, **body})
        try:
            return kind.model_validate(answer)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            raise BackendError(f"{url}: a malformed answer: {where}: {first['msg']}") from None

    def _send(self, method: str, url: str, body: dict[str, Any] | None = None) -> Any:
        delay, last = 0.5, ""
        for attempt in range(self.options.retries + 1):
            if attempt:
                self.retried += 1
                time.sleep(delay)
                delay = min(2 * delay, LONGEST_WAIT)
            try:
                response = self.client.request(method, url, json=body)
            except httpx.HTTPError as error:
                last = f"{type(error).__name__}: {error}"
                continue
            if response.is_success:
                return _json(url, response)
            last = f"{response.status_code}: {response.text[:300]}"
            if response.status_code not in RETRIED and response.status_code < 500:
                break
            delay = _retry_after(response, delay)
        raise BackendError(f"{method} {url}: {last}")

    def _first_model(self) -> str:
        url = f"{self.base_url}/models"
        answer = self._send("GET", url)
        try:
            return str(answer["data"][0]["id"])
        except (KeyError, IndexError, TypeError):
            raise BackendError(f"{url}: names no model; give --model") from None


def _json(url: str, response: httpx.Response) -> Any:
    try:
        return response.json()
    except ValueError:
        raise BackendError(f"{url}: the answer is not JSON: {response.text[:200]}") from None


def _retry_after(response: httpx.Response, delay: float) -> float:
    try:
        return min(max(float(response.headers["retry-after"]), 0.0), LONGEST_WAIT)
    except (KeyError, ValueError):
        return delay
