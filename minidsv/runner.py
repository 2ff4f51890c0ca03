"""ModelRunner: the model, its caches and graphs; turns scheduled chunks into a step and runs it.

A step is launched, and read later: with its tokens still on the device the next one can follow at
once, if nothing but tokens is wanted of it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from minidsv.backend import activations_of, pdl_mode
from minidsv.batch import StepBatch, StepBuffers
from minidsv.block_manager import pages_for
from minidsv.checkpoint import Weight
from minidsv.config import ModelConfig
from minidsv.engine_config import EngineConfig
from minidsv.errors import ConfigError
from minidsv.graph import DecodeGraphs, batch_sizes, context_bounds
from minidsv.kernels.constants import PAGE_SIZE
from minidsv.kernels.indexer_prep import warm_up_folding
from minidsv.kernels.rope_quant import RopeQuantBackend
from minidsv.kv_cache import KVCache
from minidsv.layers import Operators
from minidsv.logprobs import LogitRows, RowLogprobs
from minidsv.memory import MemoryPlan, plan_memory
from minidsv.model import DeepseekV32
from minidsv.request import IndexerTopk, Request
from minidsv.resolve import free_memory
from minidsv.sampler import Sampler
from minidsv.scheduler import Chunk
from minidsv.selections import read_selections, selection_recorder
from minidsv.upload import Download, upload, upload_rows
from minidsv.warmup import warm_up_steps


@dataclass
class StepResult:
    """What a step gives back to the host."""

    token_ids: list[int]  # one a sampling chunk, in their order
    logprobs: list[RowLogprobs | None]  # the same rows
    prompt_logprobs: list[list[RowLogprobs]]  # one list a chunk
    indexer_topk: dict[Request, IndexerTopk] = field(default_factory=dict)  # of those who asked


@dataclass
class LaunchedStep:
    """A step that the device has been given."""

    chunks: Sequence[Chunk]
    only_tokens: bool  # the next step needs nothing of it that is not on the device
    read: Callable[[], StepResult]  # waits for it


@dataclass
class StepCounts:
    """Steps in which every request decoded one token, since the start."""

    decode_steps: int = 0
    graph_steps: int = 0  # those that replayed a graph
    padding_rows: int = 0  # rows of theirs beyond the requests
    graph_rows: int = 0  # all rows of theirs


class ModelRunner:
    """Runs steps; `config` is resolved."""

    def __init__(
        self,
        model_config: ModelConfig,
        config: EngineConfig,
        weights: dict[str, Weight],
        eos_token_ids: tuple[int, ...],
    ):
        assert config.max_model_len is not None
        self.model_config, self.config = model_config, config
        self.device = torch.device(config.device)
        self.pdl = pdl_mode(config)
        self.sampler = Sampler(model_config.vocab_size, eos_token_ids, self.device, self.pdl)
        self.weight_bytes = sum(w.nbytes for w in weights.values())
        self.plan = self._plan_memory()
        self.num_pages = self.plan.num_pages
        try:
            self.cache = KVCache.allocate(
                model_config,
                self.num_pages + 1,  # the last one is nobody's: graphs write their padding to it
                config.kv_cache_dtype,
                config.index_cache_dtype,
                self.device,
            )
        except RuntimeError:  # torch's allocators on CPU and CUDA
            raise ConfigError(
                f"num_pages: {self.num_pages} pages of {self.plan.page_bytes} bytes do not fit in "
                "memory"
            ) from None
        rope_quant: RopeQuantBackend = "flashinfer" if config.backend == "flashinfer" else "triton"
        operators = Operators(self.pdl, rope_quant, activations_of(config, model_config))
        self.model = DeepseekV32(model_config, weights, self.cache, operators)
        self.runs_ahead = self.device.type == "cuda"
        self.counts = StepCounts()
        self.graphs: DecodeGraphs | None = None
        if config.backend == "torch" and config.index_cache_dtype == "fp8":
            heads, dim = model_config.index_n_heads, model_config.index_head_dim
            warm_up_folding(heads, dim**-0.5, self.device)
        if config.cuda_graph == "on":
            self.graphs = self.decode_graphs()
            self._warm_up(self.graphs.bounds)
            self.graphs.capture()
        self._sampled_rows: dict[Request, int] = {}  # of the last step, in _sampled_ids
        self._sampled_ids: Tensor | None = None

    def describe(self) -> str:
        """One line: what runs where, in which types, and what it takes."""
        c = self.config
        quantised = ", FP8 activations in long steps" if c.activations == "fp8" else ""
        return (
            f"{self.model_config.model_type} on {c.device}: compute {c.dtype}{quantised}, "
            f"latent cache {c.kv_cache_dtype}, indexer cache {c.index_cache_dtype}; "
            f"{self.plan.describe()}"
        )

    def _plan_memory(self) -> MemoryPlan:
        """With the weights in place."""
        c, topk = self.config, self.model_config.index_topk
        assert c.max_model_len is not None
        free = free_memory(c.device)
        on_gpu, graphs = self.device.type == "cuda", c.cuda_graph == "on"
        paths = context_bounds(topk, c.max_model_len) if graphs else ()
        return plan_memory(
            self.model_config,
            c,
            weight_bytes=self.weight_bytes,
            free_bytes=free,
            total_bytes=torch.cuda.mem_get_info(self.device)[1] if on_gpu else free,
            graph_sizes=[size for _ in paths for size in batch_sizes(c.max_num_seqs)],
        )

    def decode_graphs(self) -> DecodeGraphs:
        """For max_num_seqs requests of up to max_model_len tokens; nothing is captured yet."""
        most, longest = self.config.max_num_seqs, self.config.max_model_len
        assert longest is not None
        buffers = StepBuffers(most, pages_for(longest), self.num_pages, self.device)
        bounds = context_bounds(self.model_config.index_topk, longest)
        return DecodeGraphs(self.model, buffers, bounds, most)

    def _warm_up(self, bounds: Sequence[int]) -> None:
        """Nothing compiles in a request, and none is the first to need all the memory."""
        from minidsv.kernels.launch import compiling_only  # imports triton

        model = self.model.abridged()

        def run() -> None:
            c = self.config
            for step in warm_up_steps(
                bounds, c.max_num_seqs, c.max_num_batched_tokens, self.num_pages, self.device
            ):
                model.greedy(step)

        with compiling_only():
            run()
        run()

    def execute(self, chunks: Sequence[Chunk]) -> LaunchedStep:
        """Start computing the chunks and choosing a token for each that samples."""
        rows = LogitRows.of(chunks)
        requests = [chunk.request for chunk in chunks if chunk.samples]
        step = self.prepare(chunks, rows.tokens)
        step.selections = selection_recorder(chunks, self.model_config, self.device)
        best, logits = self._compute(chunks, step)
        every = len(rows.sampling) == len(rows.tokens)
        drawn = slice(None) if every else self._tensor(rows.sampling)
        ids = self.sampler(logits[drawn], requests, best[drawn])
        self._sampled_ids, copy = ids, Download(ids)
        self._sampled_rows = {request: row for row, request in enumerate(requests)}

        def read() -> StepResult:
            logprobs, prompt_logprobs = rows.logprobs(chunks, logits, ids)
            selections = read_selections(chunks, step.selections, self.model_config)
            return StepResult(copy.read(), logprobs, prompt_logprobs, selections)

        only_tokens = not any(chunk.scores or chunk.request.params.needs_host for chunk in chunks)
        return LaunchedStep(chunks, only_tokens, read)

    def _compute(self, chunks: Sequence[Chunk], step: StepBatch) -> tuple[Tensor, Tensor]:
        """(argmax ids [L], logits [L, vocab]): by a graph, if each request decodes one token."""
        if all(chunk.samples and chunk.num_tokens == 1 for chunk in chunks):
            self.counts.decode_steps += 1
            key = self.graphs.key(step) if self.graphs and step.selections is None else None
            if self.graphs is not None and key is not None:
                self.counts.graph_steps += 1
                self.counts.graph_rows += key.requests
                self.counts.padding_rows += key.requests - len(chunks)
                return self.graphs.replay(step)
        return self.model.greedy(step)

    def prepare(self, chunks: Sequence[Chunk], logits_index: list[int]) -> StepBatch:
        """Build the step's metadata on the host, then copy it."""
        input_ids: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        request_index: list[int] = []
        pending: list[tuple[int, int]] = []  # token of this step, row of the last one's ids
        for row, chunk in enumerate(chunks):
            pages = chunk.request.page_ids
            span = range(chunk.start, chunk.end)
            input_ids += chunk.request.token_ids(chunk.start, chunk.end)
            if len(input_ids) < len(positions) + len(span):
                pending.append((len(input_ids), self._sampled_rows[chunk.request]))
                input_ids.append(0)
            positions += span
            slots += [pages[p // PAGE_SIZE] * PAGE_SIZE + p % PAGE_SIZE for p in span]
            request_index += [row] * chunk.num_tokens
        position_tensor = self._tensor(positions)
        return StepBatch(
            input_ids=self._with_pending(self._tensor(input_ids), pending),
            positions=position_tensor,
            slot_mapping=self._tensor(slots),
            seq_lens=position_tensor + 1,
            request_index=self._tensor(request_index),
            block_table=upload_rows([chunk.request.page_ids for chunk in chunks], self.device),
            logits_index=self._tensor(logits_index),
            max_seq_len=max(chunk.end for chunk in chunks),
        )

    def _with_pending(self, input_ids: Tensor, pending: list[tuple[int, int]]) -> Tensor:
        """Put the last step's ids where the host knows none yet."""
        if not pending:
            return input_ids
        assert self._sampled_ids is not None, "a step before this one sampled"
        tokens, rows = upload(list(zip(*pending, strict=True)), torch.int64, self.device)
        return input_ids.index_copy_(0, tokens, self._sampled_ids[rows])

    def _tensor(self, values: list[int]) -> Tensor:
        return upload(values, torch.int64, self.device)
