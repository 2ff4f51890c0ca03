"""Engine: requests in, tokens and text out, one step at a time. Not thread-safe: one thread owns
it.
"""

from dataclasses import dataclass
from itertools import count

import torch
from torch import Tensor

from minidsv.block_manager import PAGE_SIZE, BlockManager, pages_for
from minidsv.checkpoint import Weight, fill, load_checkpoint
from minidsv.config import ModelConfig
from minidsv.engine_config import EngineConfig, model_path, tokenizer_folder
from minidsv.errors import RequestError
from minidsv.random_weights import random_tensors
from minidsv.request import SEED_BITS, Logprob, LogprobDict, Request, SamplingParams
from minidsv.resolve import resolve
from minidsv.runner import ModelRunner, RowLogprobs
from minidsv.scheduler import Chunk, Scheduler
from minidsv.tokenizer import DetokenizerStream, Tokenizer, eos_token_ids


@dataclass(frozen=True)
class StepOutput:
    """What one step brought one request."""

    request: Request
    text: str  # new text, with what may still become a stop string held back
    token_ids: list[int]  # new tokens
    finished: bool


class Engine:
    """Schedule, run, sample, detokenise."""

    def __init__(self, config: EngineConfig):
        folder = model_path(config)
        self.model_config = ModelConfig.from_path(folder)
        self.config = resolve(config, self.model_config)
        self.tokenizer = Tokenizer(tokenizer_folder(self.config))
        self.eos_token_ids = eos_token_ids(folder, self.model_config.eos_token_ids)
        self.runner = ModelRunner(
            self.model_config,
            self.config,
            _load(self.config, self.model_config),
            self.eos_token_ids,
        )
        self.block_manager = BlockManager(self.runner.num_pages)
        self.scheduler = Scheduler(
            self.block_manager, self.config.max_num_seqs, self.config.max_num_batched_tokens
        )
        self._texts: dict[Request, _TextState] = {}
        self._ids = count()

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work

    def make_request(
        self,
        token_ids: list[int],
        params: SamplingParams,
        prompt: str | None = None,
        request_id: str | None = None,
    ) -> Request:
        """Check a prompt against the model and the pool; raises RequestError, with the numbers, if
        it can never run.
        """
        self._check_prompt(token_ids)
        vocab = self.model_config.vocab_size
        for name in ("logprobs", "prompt_logprobs"):
            if (getattr(params, name) or 0) > vocab:
                raise RequestError(
                    name, f"{getattr(params, name)} is more than the vocabulary of {vocab}"
                )
        max_tokens = self._max_tokens(len(token_ids), params)
        number = next(self._ids)
        seed = params.seed if params.seed is not None else _derive_seed(self.config.seed, number)
        return Request(
            request_id or f"req-{number}", list(token_ids), params, seed, max_tokens, prompt
        )

    def add(self, request: Request) -> None:
        """Queue a request made by `make_request`."""
        self._texts[request] = _TextState(self.tokenizer.stream(request.prompt_token_ids))
        self.scheduler.add(request)

    def abort(self, request: Request) -> None:
        """Stop a request wherever it is and free its pages; does nothing if it has ended."""
        if request.finish_reason is None:
            self._finish(request, "abort")

    def step(self) -> list[StepOutput]:
        """Run one step; returns what it brought each request that got a token. Empty only without
        work.
        """
        chunks = self.scheduler.schedule()
        if not chunks:
            return []
        result = self.runner.execute(chunks)
        self.scheduler.advance(chunks)
        for chunk, rows in zip(chunks, result.prompt_logprobs, strict=True):
            chunk.request.prompt_logprobs += [self._logprobs(row) for row in rows]
        sampled = [chunk for chunk in chunks if chunk.samples]
        return [
            self._append(chunk, token, logprobs)
            for chunk, token, logprobs in zip(
                sampled, result.token_ids, result.logprobs, strict=True
            )
        ]

    def prompt_logits(self, token_ids: list[int]) -> Tensor:
        """fp32 logits [len(token_ids), vocab]: one forward, in chunks of the token budget."""
        self._check_prompt(token_ids)
        request = Request("prompt_logits", token_ids, SamplingParams(), seed=0, max_tokens=0)
        if not self.block_manager.grow(request, len(token_ids)):
            free = self.block_manager.num_free
            raise RequestError(
                "prompt", f"needs {pages_for(len(token_ids))} pages, {free} are free now"
            )
        budget = self.config.max_num_batched_tokens
        try:
            parts = []
            for start in range(0, len(token_ids), budget):
                chunk = Chunk(request, start, min(budget, len(token_ids) - start))
                step = self.runner.prepare([chunk], list(range(chunk.num_tokens)))
                parts.append(self.runner.model.forward(step)[1])
            return torch.cat(parts)
        finally:
            self.block_manager.free(request)

    def _check_prompt(self, token_ids: list[int]) -> None:
        vocab = self.model_config.vocab_size
        if not token_ids:
            raise RequestError("prompt", "is empty; at least one token is needed")
        for token in token_ids:
            if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < vocab:
                raise RequestError("prompt", f"{token!r} is not a token id from 0 to {vocab - 1}")
        self._check_room("prompt", len(token_ids), f"{len(token_ids)} tokens")

    def _check_room(self, field: str, num_tokens: int, what: str) -> None:
        limit, pages = self.config.max_model_len, self.runner.num_pages
        assert limit is not None
        if num_tokens > limit:
            raise RequestError(field, f"{what} exceed max_model_len {limit}")
        if pages_for(num_tokens) > pages:
            raise RequestError(
                field, f"{what} need {pages_for(num_tokens)} pages of 64, the cache has {pages}"
            )

    def _max_tokens(self, num_prompt: int, params: SamplingParams) -> int:
        """params.max_tokens, or what context and pool leave; refused if the sum never fits."""
        if params.max_tokens is not None:
            wanted = params.max_tokens
        else:
            assert self.config.max_model_len is not None
            wanted = max(
                1, min(self.config.max_model_len, self.runner.num_pages * PAGE_SIZE) - num_prompt
            )
        total = num_prompt + wanted
        what = f"{num_prompt} prompt tokens + {wanted} to generate, {total} in all,"
        self._check_room("max_tokens", total, what)
        return wanted

    def _append(self, chunk: Chunk, token: int, logprobs: RowLogprobs | None) -> StepOutput:
        request = chunk.request
        state = self._texts[request]
        request.output_token_ids.append(token)
        if logprobs is not None:
            request.logprobs.append(self._logprobs(logprobs))
        reason = self._stop_token(request, token)
        if reason is None:
            text = state.push(request, token)
            if state.stopped(request, text):
                reason = "stop"
            elif len(request.output_token_ids) >= request.max_tokens:
                reason = "length"
        if reason is not None:
            self._finish(request, reason)
        return StepOutput(request, state.release(request), [token], reason is not None)

    def _stop_token(self, request: Request, token: int) -> str | None:
        params = request.params
        if len(request.output_token_ids) <= params.min_tokens:
            return None
        if token in (params.stop_token_ids or ()):
            request.stop_reason = token
            return "stop"
        return "stop" if token in self.eos_token_ids and not params.ignore_eos else None

    def _finish(self, request: Request, reason: str) -> None:
        state = self._texts.pop(request)
        if request.stop_reason is None or isinstance(request.stop_reason, int):
            request.text += state.stream.flush()
        request.finish_reason = reason
        self.scheduler.finish(request)

    def _logprobs(self, row: RowLogprobs) -> LogprobDict:
        entries = {
            token: Logprob(value, rank, self.tokenizer.token_text(token))
            for rank, (token, value) in enumerate(row.best, 1)
        }
        token, value, rank = row.taken
        entries.setdefault(token, Logprob(value, rank, self.tokenizer.token_text(token)))
        return entries


@dataclass
class _TextState:
    """The text side of a running request."""

    stream: DetokenizerStream
    released: int = 0  # characters of request.text that were handed out

    def push(self, request: Request, token: int) -> int:
        """Append the token's text; returns where it begins."""
        begin = len(request.text)
        request.text += self.stream.push(token)
        return begin

    def stopped(self, request: Request, begin: int) -> bool:
        """Cut the text at the stop string that completes first in what was appended at `begin`, if
        any.
        """
        if len(request.output_token_ids) <= request.params.min_tokens or begin == len(request.text):
            return False
        matches = []
        for stop in request.params.stop_strings:
            at = request.text.find(stop, max(0, begin - len(stop) + 1))
            if at >= 0:
                matches.append((at + len(stop), at, stop))
        if matches:
            _, at, stop = min(matches)
            request.text, request.stop_reason = request.text[:at], stop
        return bool(matches)

    def release(self, request: Request) -> str:
        """New text that can no longer become part of a stop string."""
        held = 0
        if request.finish_reason is None and request.params.stop_strings:
            held = max(map(len, request.params.stop_strings)) - 1
        end = max(self.released, len(request.text) - held)
        text, self.released = request.text[self.released : end], end
        return text


def _derive_seed(seed: int, number: int) -> int:
    return ((seed + 1) * 0x9E3779B97F4A7C15 + number * 0xD1B54A32D192ED03) % 2**SEED_BITS


def _load(config: EngineConfig, model: ModelConfig) -> dict[str, Weight]:
    device, dtype = torch.device(config.device), getattr(torch, config.dtype)
    if config.load_format == "random":
        tensors = random_tensors(model, seed=config.seed, fp8=False, device=device)
        return fill(tensors, device=device, dtype=dtype, quantization=config.quantization)
    return load_checkpoint(
        model_path(config), model, device=device, dtype=dtype, quantization=config.quantization
    )
