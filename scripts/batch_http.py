"""Jobs answered by an OpenAI-compatible server."""

import asyncio
import json
import random
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

import httpx

from batch_codec import BatchError
from batch_lines import CHAT, COMPLETIONS, Answer, Failure, Job, LineError
from batch_report import Load

POLL_SECONDS = 0.2
JSON = {"content-type": "application/json"}
RETRIED = (408, 409, 429)  # and every 5xx
MAX_BACKOFF, MAX_RETRY_AFTER = 8.0, 600.0  # seconds


@dataclass(frozen=True)
class Endpoint:
    """Where to send jobs, and how hard to try."""

    base_url: str  # with or without /v1
    api_key: str | None = None
    model: str | None = None  # for bodies that name none
    concurrency: int = 16
    retries: int = 4  # of one request
    timeout: float = 600.0  # seconds that an answer may take

    def __post_init__(self) -> None:
        if not self.base_url.startswith(("http://", "https://")):
            raise BatchError(f"--base-url: {self.base_url!r} is no http:// or https:// URL")
        if self.api_key and not (self.api_key.isascii() and self.api_key.isprintable()):
            raise BatchError("--api-key: a key is printable ASCII")

    def client(self) -> httpx.AsyncClient:
        headers = {"Authorization": f"Bearer {self.api_key}"} if self.api_key else {}
        limits = httpx.Limits(max_connections=self.concurrency)
        base = self.base_url.rstrip("/").removesuffix("/v1")
        return httpx.AsyncClient(
            base_url=base, headers=headers, limits=limits, timeout=self.timeout
        )


class HttpBackend:
    """Keeps `concurrency` requests on their way; answers are not streamed."""

    urls: tuple[str, ...] = (COMPLETIONS, CHAT)

    def __init__(self, endpoint: Endpoint):
        self._endpoint, self._client = endpoint, endpoint.client()
        self._loop = asyncio.new_event_loop()
        self._places = asyncio.Semaphore(endpoint.concurrency)
        self._tasks: set[asyncio.Task[Answer | Failure]] = set()
        self._sent = self._generated = self._retried = 0

    def submit(self, job: Job) -> None:
        self._tasks.add(self._loop.create_task(self._answer(job, time.monotonic())))

    def poll(self) -> list[Answer | Failure]:
        """Wait for the next answers, for a moment."""
        waiting = asyncio.wait(
            self._tasks, timeout=POLL_SECONDS, return_when=asyncio.FIRST_COMPLETED
        )
        done, self._tasks = self._loop.run_until_complete(waiting)
        return [task.result() for task in done]

    async def _answer(self, job: Job, submitted: float) -> Answer | Failure:
        async with self._places:
            self._sent += 1
            try:
                response = await self._post(job)
                body = _json_object(response)
                if body is None:
                    raise LineError(
                        "bad_response", f"no JSON object: {response.text[:200]!r}", status=200
                    )
            except LineError as error:
                return Failure(job.line, job, error)
            finally:
                self._sent -= 1
        request_id = response.headers.get("x-request-id", job.request_id)
        answer = Answer(job, body, time.monotonic() - submitted, request_id)
        self._generated += answer.tokens("completion")
        return answer

    async def _post(self, job: Job) -> httpx.Response:
        """A 200; raises LineError when it is refused, or when no attempt is left."""
        content = dict(job.body)
        if self._endpoint.model is not None and content.get("model") is None:
            content["model"] = self._endpoint.model
        for attempt in range(self._endpoint.retries + 1):
            wanted = None
            try:
                response = await self._client.post(
                    job.url, content=json.dumps(content), headers=JSON
                )
                if response.status_code == 200:
                    return response
                failure = _failure(response)
                if not _may_retry(response):
                    break
                wanted = _retry_after(response)
            except httpx.HTTPError as error:
                reason = str(error) or type(error).__name__
                failure = LineError("connection_error", reason, status=None)
            if attempt < self._endpoint.retries:
                self._retried += 1
                backoff = min(MAX_BACKOFF, 0.5 * 2**attempt) * random.uniform(0.75, 1.0)
                await asyncio.sleep(backoff if wanted is None else wanted)
        raise failure

    def load(self) -> Load:
        return Load(self._sent, len(self._tasks) - self._sent, None, self._generated)

    def figures(self) -> dict[str, Any]:
        return {"retries": self._retried}

    def close(self) -> None:
        """Abandon what is in flight."""
        self._loop.run_until_complete(self._end())
        self._loop.close()

    async def _end(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._client.aclose()


def _may_retry(response: httpx.Response) -> bool:
    if response.headers.get("x-should-retry") == "false":
        return False
    return response.status_code in RETRIED or response.status_code >= 500


def _retry_after(response: httpx.Response) -> float | None:
    """Seconds that the server asks for; RFC 9110 allows a number or a date."""
    value = response.headers.get("retry-after", "")
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = (parsedate_to_datetime(value) - datetime.now(UTC)).total_seconds()
        except (ValueError, TypeError):
            return None
    return min(max(0.0, seconds), MAX_RETRY_AFTER)


def _json_object(response: httpx.Response) -> dict[str, Any] | None:
    """The body, if it is a JSON object that can be written as one."""
    try:
        body = response.json()
        json.dumps(body, allow_nan=False)
    except (ValueError, RecursionError):
        return None
    return body if isinstance(body, dict) else None


def _failure(response: httpx.Response) -> LineError:
    """The server's own words, where they have OpenAI's shape."""
    status, body = response.status_code, _json_object(response)
    error = body.get("error") if body else None
    if not isinstance(error, dict):
        error = {"message": response.text[:500] or response.reason_phrase}
    code = str(error.get("code") or error.get("type") or f"http_{status}")
    return LineError(code, f"{status}: {error.get('message')}", status=status, body=body)
