"""Jobs answered by an engine in this process."""

import hashlib
import reprlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from batch_lines import CHAT, COMPLETIONS, Answer, Failure, Job, LineError
from batch_report import Histogram, Load
from minidsv import LLM
from minidsv.errors import RequestError
from minidsv.request import Request
from minidsv.server import chat_completions as chat
from minidsv.server.chat_completions import ChatRequest
from minidsv.server.completions import CompletionRequest, completion_body, make_requests

TAIL_BYTES = 2**20


@dataclass(eq=False)
class _Running:
    """A job with one engine request a choice."""

    job: Job
    answer: Callable[[], dict[str, Any]]  # once all are finished
    submitted: float
    left: int  # unfinished requests


class LocalBackend:
    """Steps the engine of `llm`; of a step's time it knows whether it was prefill or decode."""

    urls: tuple[str, ...] = (COMPLETIONS, CHAT)

    def __init__(self, llm: LLM, name: str):
        """name: the model's, for lines that bring one."""
        self._engine, self._name = llm.engine, name
        self._of: dict[Request, _Running] = {}
        self._last: dict[Request, float] = {}  # when its last token came, or it was submitted
        self._first, self._between = Histogram(), Histogram()
        self._seconds = {"prefill": 0.0, "decode": 0.0}
        self._tokens = {"prefill": 0, "decode": 0}
        self._generated, self._peak = 0, 0.0

    def submit(self, job: Job) -> None:
        """Check a body as the server does, and queue it."""
        try:
            requests, answer = self._prepare(job)
        except RequestError as error:
            code = "invalid_request_error"
            raise LineError(code, str(error), param=error.param) from None
        now = time.monotonic()
        running = _Running(job, answer, now, len(requests))
        for request in requests:
            self._engine.add(request)
            self._of[request], self._last[request] = running, now

    def _prepare(self, job: Job) -> tuple[list[Request], Callable[[], dict[str, Any]]]:
        """The engine's requests of a job, and what makes the answer of them."""
        engine, chatting = self._engine, job.url == CHAT
        body = ChatRequest.parse(job.body) if chatting else CompletionRequest.parse(job.body)
        if body.model not in (None, self._name):
            raise _unknown_model(body.model, self._name)
        answer_id = body.request_id or job.id.removeprefix("batch_req_")
        head: dict[str, Any] = {"model": self._name, "created": int(time.time())}
        head["answer_id"] = f"{'chatcmpl' if chatting else 'cmpl'}-{answer_id}"
        if isinstance(body, ChatRequest):
            prompt, requests = chat.make_requests(engine, body, job.request_id)
            return requests, partial(
                chat.chat_body, body, prompt, requests, engine.tokenizer, **head
            )
        requests = make_requests(engine, body, job.request_id)
        return requests, partial(completion_body, body, requests, engine.tokenizer, **head)

    def poll(self) -> list[Answer | Failure]:
        """Run one step."""
        before, start = self._engine.stats(), time.monotonic()
        outputs = self._engine.step()
        now, after = time.monotonic(), self._engine.stats()
        phase = "prefill" if after.prefill_tokens > before.prefill_tokens else "decode"
        self._seconds[phase] += now - start
        self._tokens["prefill"] += after.prefill_tokens - before.prefill_tokens
        if phase == "decode":
            self._tokens["decode"] += after.decode_tokens - before.decode_tokens
        self._peak = max(self._peak, before.kv_cache_usage, after.kv_cache_usage)
        answers: list[Answer | Failure] = []
        for output in outputs:
            self._count(output.request, len(output.token_ids), now)
            if output.finished:
                answers += self._finish(output.request, now)
        return answers

    def _count(self, request: Request, tokens: int, now: float) -> None:
        if tokens:
            first = len(request.output_token_ids) == tokens
            (self._first if first else self._between).add(now - self._last[request])
            self._last[request] = now
            self._generated += tokens

    def _finish(self, request: Request, now: float) -> list[Answer | Failure]:
        """The answer, if this was the last request of its job."""
        del self._last[request]
        running = self._of.pop(request)
        running.left -= 1
        if running.left:
            return []
        job, seconds = running.job, now - running.submitted
        return [Answer(job, running.answer(), seconds, job.request_id)]

    def load(self) -> Load:
        stats = self._engine.stats()
        return Load(stats.running, stats.waiting, stats.kv_cache_usage, self._generated)

    def figures(self) -> dict[str, Any]:
        """Prefill steps are those with any prompt token; tokens that such a step decodes beside
        them are in no rate. Times to the first token are from the submission, waiting included.
        """
        rates = {
            f"{phase}_tokens_per_second": round(self._tokens[phase] / seconds, 1)
            if seconds
            else None
            for phase, seconds in self._seconds.items()
        }
        return rates | {
            "prefill_seconds": round(self._seconds["prefill"], 3),
            "decode_seconds": round(self._seconds["decode"], 3),
            "ttft_ms": self._first.percentiles(),
            "itl_ms": self._between.percentiles(),
            "peak_kv_cache_usage": round(self._peak, 4),
            "preemptions": self._engine.stats().preemptions,
        }

    def close(self) -> None:
        """Abandon what is in flight."""
        for request in self._of:
            self._engine.abort(request)
        self._of.clear()
        self._last.clear()


def fingerprint(model: Path) -> str:
    """16 hex digits of a model's files: names, sizes and the last MiB of each."""
    files = sorted(model.glob("*.json")) + sorted(model.glob("*.safetensors"))
    digest = hashlib.sha256()
    for path in files if model.is_dir() else [model]:
        size = path.stat().st_size
        with path.open("rb") as file:
            file.seek(max(0, size - TAIL_BYTES))
            digest.update(f"{path.name} {size} ".encode() + file.read())
    return digest.hexdigest()[:16]


def _unknown_model(asked: str, served: str) -> LineError:
    message = f"model: {reprlib.repr(asked)} is not {served!r}"
    return LineError("model_not_found", message, status=404, param="model")
