"""The eval's client of an OpenAI-compatible server, by httpx."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from typing import Any

import httpx

from eval_backends import Ask, BackendError, OnReply, Reply, tail_logprob

RETRIED = {408, 409, 429}  # and everything from 500: a later try may succeed
LONGEST_WAIT = 30.0  # seconds between two tries


@dataclass(frozen=True)
class HTTPOptions:
    """How to talk to a server."""

    model: str | None = None  # None: the first that /v1/models names
    api_key: str | None = None
    chat: bool = False  # /v1/chat/completions instead of /v1/completions
    concurrency: int = 16
    retries: int = 4
    timeout: float = 1800.0  # seconds for one request


class HTTPBackend:
    """Sends every prompt to `base_url` (with or without /v1); a failed request is tried again."""

    def __init__(self, base_url: str, options: HTTPOptions):
        self.base_url = base_url.rstrip("/").removesuffix("/v1") + "/v1"
        self.options = options
        headers = {"Authorization": f"Bearer {options.api_key}"} if options.api_key else {}
        limits = httpx.Limits(max_connections=options.concurrency)
        self.client = httpx.Client(headers=headers, timeout=options.timeout, limits=limits)
        self.model = options.model or self._first_model()
        self.retried = 0

    def describe(self) -> dict[str, Any]:
        return {"url": self.base_url, "model": self.model, "chat": self.options.chat}

    def complete(self, asks: Sequence[Ask], on_reply: OnReply) -> None:
        pool = ThreadPoolExecutor(self.options.concurrency)
        try:
            futures = {pool.submit(self._ask, ask): number for number, ask in enumerate(asks)}
            for future in as_completed(futures):
                error = future.exception()
                if error is not None and not isinstance(error, BackendError):
                    raise error
                on_reply(futures[future], error or future.result())
        finally:
            pool.shutdown(cancel_futures=True)

    def score(self, prompt: str, choice: str) -> float:
        body = {"prompt": prompt + choice, "max_tokens": 1, "echo": True, "logprobs": 1}
        logprobs = _logprobs(self._post("completions", {**body, "temperature": 0.0}))
        entries = list(zip(logprobs["tokens"], logprobs["token_logprobs"], strict=True))
        return tail_logprob(
            entries[1:-1], choice
        )  # the first has no logprob, the last is generated

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
            body["messages"] = [{"role": "user", "content": ask.prompt}]
            choice = self._post("chat/completions", body)
            return Reply(choice["message"].get("content") or "", choice.get("finish_reason"))
        body["prompt"] = ask.prompt
        if ask.top_logprobs is None:
            choice = self._post("completions", body)
            return Reply(choice["text"], choice.get("finish_reason"))
        choice = self._post("completions", {**body, "logprobs": ask.top_logprobs})
        logprobs = _logprobs(choice)
        return Reply(
            choice["text"],
            choice.get("finish_reason"),
            tuple(logprobs["tokens"]),
            tuple(logprobs["token_logprobs"]),
            tuple(logprobs["top_logprobs"]),
        )

    def _post(self, route: str, body: dict[str, Any]) -> dict[str, Any]:
        """The first choice of the answer."""
        url = f"{self.base_url}/{route}"
        answer = self._send("POST", url, {"model": self.model, **body})
        try:
            return answer["choices"][0]
        except (KeyError, IndexError, TypeError):
            raise BackendError(f"{url}: the answer has no choices: {str(answer)[:200]}") from None

    def _send(self, method: str, url: str, body: dict[str, Any] | None = None) -> Any:
        delay, last = 0.5, ""
        for attempt in range(self.options.retries + 1):
            if attempt:
                self.retried += 1
                time.sleep(delay)
                delay = min(2 * delay, LONGEST_WAIT)
            try:
                response = self.client.request(method, url, json=body)
            except httpx.TransportError as error:
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


def _logprobs(choice: dict[str, Any]) -> dict[str, Any]:
    logprobs = choice.get("logprobs")
    if not logprobs or not logprobs.get("top_logprobs"):
        raise BackendError("the server sends no logprobs; the loglikelihood protocol needs them")
    return logprobs
