"""Engine: requests in, tokens and text out, a step at a time. One thread owns it."""

from dataclasses import dataclass
from itertools import count
from pathlib import Path

import torch
from torch import Tensor

from minidsv.block_manager import BlockManager, pages_for
from minidsv.checkpoint import Weight, fill, load_checkpoint
from minidsv.config import ModelConfig
from minidsv.engine_config import EngineConfig, model_path, tokenizer_folder
from minidsv.errors import ConfigError, RequestError
from minidsv.kernels.constants import PAGE_SIZE
from minidsv.output_text import OutputText
from minidsv.random_weights import random_tensors
from minidsv.request import MAX_INT, Logprob, LogprobDict, Request, SamplingParams
from minidsv.resolve import resolve
from minidsv.runner import ModelRunner, RowLogprobs
from minidsv.scheduler import Chunk, Scheduler
from minidsv.tokenizer import Tokenizer, eos_token_ids


@dataclass(frozen=True)
class StepOutput:
    """What one step brought one request."""

    request: Request
    text: str  # new text, with what may still become a stop string held back
    token_ids: list[int]  # new tokens
    finished: bool


@dataclass(frozen=True)
class EngineStats:
    """The load now, and totals since the engine started."""

    running: int  # requests
    waiting: int
    kv_cache_usage: float  # share of the pages that have an owner, 0 to 1
    prefill_tokens: int  # computed in prefill chunks, a preempted request's again
    decode_tokens: int  # computed one a request and step
    preemptions: int


class Engine:
    """Schedule, run, sample, detokenise."""

    def __init__(self, config: EngineConfig):
        folder = _folder(config)
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
        self._texts: dict[Request, OutputText] = {}
        self._ids = count()
        self._prefill_tokens = self._decode_tokens = 0

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
        """Check a prompt; raises RequestError, with the numbers, if it can never run."""
        self._check_prompt(token_ids, room=1)
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
        self._texts[request] = OutputText(
            self.tokenizer.stream(request.prompt_token_ids), request.params.stop_strings
        )
        self.scheduler.add(request)

    def abort(self, request: Request) -> None:
        """Stop a request wherever it is and free its pages; does nothing if it has ended."""
        if request in self._texts:
            self._finish(request, "abort")

    def step(self) -> list[StepOutput]:
        """Run one step; returns what it brought each request that got a token."""
        chunks = self.scheduler.schedule()
        if not chunks:
            return []
        result = self.runner.execute(chunks)
        self.scheduler.advance(chunks)
        self._count(chunks)
        for chunk, rows in zip(chunks, result.prompt_logprobs, strict=True):
            chunk.request.prompt_logprobs += [self._logprobs(row) for row in rows]
        sampled = [chunk.request for chunk in chunks if chunk.samples]
        for request, token in zip(sampled, result.token_ids, strict=True):
            request.output_token_ids.append(token)
        for request, selection in result.indexer_topk.items():
            request.indexer_topk.append(selection)
        return [
            self._output(request, logprobs)
            for request, logprobs in zip(sampled, result.logprobs, strict=True)
        ]

    def prompt_logits(self, token_ids: list[int]) -> Tensor:
        """fp32 logits [len(token_ids), vocab]: one forward, in chunks of the token budget."""
        self._check_prompt(token_ids, room=0)
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

    def stats(self) -> EngineStats:
        """Load and totals; cheap enough for every step."""
        pages = self.block_manager
        return EngineStats(
            running=len(self.scheduler.running),
            waiting=len(self.scheduler.waiting),
            kv_cache_usage=1 - pages.num_free / pages.num_pages,
            prefill_tokens=self._prefill_tokens,
            decode_tokens=self._decode_tokens,
            preemptions=self.scheduler.num_preemptions,
        )

    @property
    def max_request_tokens(self) -> int:
        """The longest prompt + output: the context, or what the whole pool holds."""
        assert self.config.max_model_len is not None
        return min(self.config.max_model_len, self.runner.num_pages * PAGE_SIZE)

    def _count(self, chunks: list[Chunk]) -> None:
        for chunk in chunks:
            decoding = chunk.num_tokens == 1 and chunk.start >= len(chunk.request.prompt_token_ids)
            self._decode_tokens += decoding
            self._prefill_tokens += 0 if decoding else chunk.num_tokens

    def _check_prompt(self, token_ids: list[int], room: int) -> None:
        """Raise RequestError unless these are token ids and leave `room` tokens for an output."""
        vocab = self.model_config.vocab_size
        if not token_ids:
            raise RequestError("prompt", "is empty; at least one token is needed")
        for token in token_ids:
            if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < vocab:
                raise RequestError("prompt", f"{token!r} is not a token id from 0 to {vocab - 1}")
        if len(token_ids) + room > self.max_request_tokens:
            raise RequestError("prompt", f"{len(token_ids)} tokens are too many; {self._limits()}")

    def _max_tokens(self, num_prompt: int, params: SamplingParams) -> int:
        """params.max_tokens, or what is left; refused if prompt + output can never fit."""
        room = self.max_request_tokens - num_prompt
        if params.max_tokens is not None and params.max_tokens > room:
            total = num_prompt + params.max_tokens
            raise RequestError(
                "max_tokens",
                f"{num_prompt} prompt tokens + {params.max_tokens} to generate are {total}, too "
                f"many; {self._limits()}",
            )
        return room if params.max_tokens is None else params.max_tokens

    def _limits(self) -> str:
        pages = self.runner.num_pages
        return (
            f"max_model_len is {self.config.max_model_len}, and the cache's {pages} pages of "
            f"{PAGE_SIZE} hold {pages * PAGE_SIZE}"
        )

    def _output(self, request: Request, logprobs: RowLogprobs | None) -> StepOutput:
        """Take in the request's newest token: logprobs, text, and whether it is the last."""
        text, params, token = self._texts[request], request.params, request.output_token_ids[-1]
        if logprobs is not None:
            request.logprobs.append(self._logprobs(logprobs))
        may_stop = len(request.output_token_ids) > params.min_tokens
        if may_stop and token in (params.stop_token_ids or ()):
            request.stop_reason = token
            self._finish(request, "stop")
        elif may_stop and token in self.eos_token_ids and not params.ignore_eos:
            self._finish(request, "stop")
        elif (stop := text.push(token, may_stop)) is not None:
            request.stop_reason = stop
            self._finish(request, "stop")
        elif len(request.output_token_ids) >= request.max_tokens:
            self._finish(request, "length")
        return StepOutput(request, text.release(), [token], request.finish_reason is not None)

    def _finish(self, request: Request, reason: str) -> None:
        request.text = self._texts.pop(request).finish()
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


def _derive_seed(seed: int, number: int) -> int:
    return ((seed + 1) * 0x9E3779B97F4A7C15 + number * 0xD1B54A32D192ED03) % (MAX_INT + 1)


def _folder(config: EngineConfig) -> Path:
    """The model's folder; with random weights a config.json will do."""
    path = model_path(config)
    if config.load_format == "auto" and not path.is_dir():
        raise ConfigError(f"model: {path} is not a folder with a checkpoint")
    return path


def _load(config: EngineConfig, model: ModelConfig) -> dict[str, Weight]:
    device, dtype = torch.device(config.device), getattr(torch, config.dtype)
    if config.load_format == "random":
        tensors = random_tensors(model, seed=config.seed, fp8=model.fp8_weights, device=device)
        return fill(tensors, device=device, dtype=dtype, quantization=config.quantization)
    return load_checkpoint(
        model_path(config), model, device=device, dtype=dtype, quantization=config.quantization
    )
