"""Engine: requests in, tokens and text out, a step at a time. One thread owns it."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from minidsv.block_manager import BlockManager, pages_for
from minidsv.checkpoint import Weight, fill, load_checkpoint
from minidsv.config import ModelConfig
from minidsv.engine_config import EngineConfig, model_path, tokenizer_folder
from minidsv.errors import ConfigError, RequestError
from minidsv.intake import Intake
from minidsv.logprobs import RowLogprobs
from minidsv.output_text import OutputText
from minidsv.random_weights import random_tensors
from minidsv.request import Logprob, LogprobDict, Request, SamplingParams
from minidsv.resolve import resolve
from minidsv.runner import LaunchedStep, ModelRunner
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
    prefix_cache_queries: int  # tokens of the requests that looked for a cached prefix
    prefix_cache_hits: int  # those that they found
    decode_steps: int  # in which every request decoded one token
    graph_steps: int  # those that replayed a CUDA graph
    graph_rows: int  # rows that these computed
    padding_rows: int  # rows of these that were nobody's


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
            load_weights(self.config, self.model_config),
            self.eos_token_ids,
        )
        self.block_manager = BlockManager(self.runner.num_pages, self.config.enable_prefix_caching)
        self.scheduler = Scheduler(
            self.block_manager, self.config.max_num_seqs, self.config.max_num_batched_tokens
        )
        assert self.config.max_model_len is not None
        self.intake = Intake(
            self.model_config.vocab_size,
            self.config.max_model_len,
            self.runner.num_pages,
            self.config.seed,
        )
        self._texts: dict[Request, OutputText] = {}
        self._in_flight: LaunchedStep | None = None
        self._prefill_tokens = self._decode_tokens = 0

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work

    def make_requests(
        self,
        token_ids: list[int],
        params: SamplingParams,
        prompt: str | None = None,
        request_id: str | None = None,
        cache_salt: str | None = None,
    ) -> list[Request]:
        """Check a prompt and make its `params.n` requests; raises RequestError, with the numbers,
        if they can never run."""
        return self.intake.requests(token_ids, params, prompt, request_id, cache_salt)

    def make_request(
        self,
        token_ids: list[int],
        params: SamplingParams,
        prompt: str | None = None,
        request_id: str | None = None,
        cache_salt: str | None = None,
    ) -> Request:
        """`make_requests` for a single output."""
        if params.n != 1:
            raise RequestError("n", f"{params.n} outputs are not one request")
        return self.make_requests(token_ids, params, prompt, request_id, cache_salt)[0]

    def add(self, request: Request) -> None:
        """Queue a request made by `make_requests`."""
        self._texts[request] = OutputText(
            self.tokenizer.stream(request.prompt_token_ids),
            request.params.stop_strings,
            request.params.include_stop_str_in_output,
        )
        self.scheduler.add(request)

    def abort(self, request: Request) -> None:
        """Stop a request wherever it is and free its pages; does nothing if it has ended."""
        if request in self._texts:
            self._finish(request, "abort")

    def step(self) -> list[StepOutput]:
        """Run one step; returns what came of it for each request that got a token or ended.

        On a GPU a step is launched before the tokens of the one before it are read, so that the
        device does not wait for the host: what is returned is then one step old. Only a step that
        brings more than tokens is read at once. A request that turns out to have ended is computed
        once more, in vain.
        """
        launched = self._launch()
        earlier, self._in_flight = self._in_flight, launched
        outputs = [] if earlier is None else self._collect(earlier)
        if launched is not None and not (self.runner.runs_ahead and launched.only_tokens):
            self._in_flight = None
            outputs += self._collect(launched)
        return outputs

    def _launch(self) -> LaunchedStep | None:
        chunks = self.scheduler.schedule()
        if not chunks:
            return None
        launched = self.runner.execute(chunks)
        self.scheduler.advance(chunks)
        for chunk in chunks:
            chunk.request.num_pending_tokens += chunk.samples
        self._count(chunks)
        return launched

    def _collect(self, launched: LaunchedStep) -> list[StepOutput]:
        """Read a step's results; requests that have ended since it was launched take nothing."""
        result, chunks = launched.read(), launched.chunks
        self.scheduler.commit(chunks)
        for chunk, rows in zip(chunks, result.prompt_logprobs, strict=True):
            chunk.request.prompt_logprobs += [self._logprobs(row) for row in rows]
        for request, selection in result.indexer_topk.items():
            request.indexer_topk.append(selection)
        now = time.monotonic()
        scored = [chunk.request for chunk in chunks if chunk.scores]
        sampled = [chunk.request for chunk in chunks if chunk.samples]
        for request, token in zip(sampled, result.token_ids, strict=True):
            request.num_pending_tokens -= 1
            if request in self._texts:
                request.output_token_ids.append(token)
                request.first_token_time = request.first_token_time or now
        return [self._scored(request) for request in scored] + [
            self._output(request, logprobs)
            for request, logprobs in zip(sampled, result.logprobs, strict=True)
            if request in self._texts
        ]

    def prompt_logits(self, token_ids: list[int]) -> Tensor:
        """fp32 logits [len(token_ids), vocab]: one forward, in chunks of the token budget."""
        self.intake.check_prompt(token_ids, room=0)
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
            prefix_cache_queries=pages.prefix_queries,
            prefix_cache_hits=pages.prefix_hits,
            **vars(self.runner.counts),
        )

    def _count(self, chunks: Sequence[Chunk]) -> None:
        for chunk in chunks:
            decoding = chunk.num_tokens == 1 and chunk.start >= len(chunk.request.prompt_token_ids)
            self._decode_tokens += decoding
            self._prefill_tokens += 0 if decoding else chunk.num_tokens

    def _scored(self, request: Request) -> StepOutput:
        """The whole prompt is computed, and that was all."""
        self._finish(request, "length")
        return StepOutput(request, "", [], finished=True)

    def _output(self, request: Request, logprobs: RowLogprobs | None) -> StepOutput:
        """Take in the request's newest token: logprobs, text, and whether it is the last."""
        text, params, token = self._texts[request], request.params, request.output_token_ids[-1]
        if logprobs is not None:
            request.logprobs.append(self._logprobs(logprobs))
        may_stop = len(request.output_token_ids) > params.min_tokens
        if may_stop and token in (params.stop_token_ids or ()):
            request.stop_reason = token
            if params.include_stop_str_in_output:
                text.push(token, may_stop=False)
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
        request.finish_reason, request.finished_time = reason, time.monotonic()
        self.scheduler.finish(request)

    def _logprobs(self, row: RowLogprobs) -> LogprobDict:
        entries = {
            token: Logprob(value, rank, self.tokenizer.token_text(token))
            for rank, (token, value) in enumerate(row.best, 1)
        }
        for token, value, rank in row.named:
            entries.setdefault(token, Logprob(value, rank, self.tokenizer.token_text(token)))
        return entries


def _folder(config: EngineConfig) -> Path:
    """The model's folder; with random weights a config.json will do."""
    path = model_path(config)
    if config.load_format == "auto" and not path.is_dir():
        raise ConfigError(f"model: {path} is not a folder with a checkpoint")
    return path


def load_weights(config: EngineConfig, model: ModelConfig) -> dict[str, Weight]:
    """The parameters as a resolved config wants them: read, or random."""
    device, dtype = torch.device(config.device), getattr(torch, config.dtype)
    if config.load_format == "random":
        tensors = random_tensors(model, seed=config.seed, fp8=model.fp8_weights, device=device)
        return fill(tensors, device=device, dtype=dtype, quantization=config.quantization)
    return load_checkpoint(
        model_path(config), model, device=device, dtype=dtype, quantization=config.quantization
    )
