"""ModelRunner: the model and its caches; turns scheduled chunks into a StepBatch and runs it."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from minidsv.backend import pdl_mode
from minidsv.batch import StepBatch
from minidsv.block_manager import pages_for
from minidsv.checkpoint import Weight
from minidsv.config import ModelConfig
from minidsv.engine_config import EngineConfig
from minidsv.errors import ConfigError
from minidsv.kernels.constants import PAGE_SIZE
from minidsv.kernels.rope_quant import RopeQuantBackend
from minidsv.kv_cache import KVCache, bytes_per_token
from minidsv.layers import Operators
from minidsv.logprobs import LogitRows, RowLogprobs
from minidsv.model import DeepseekV32
from minidsv.request import IndexerTopk, Request
from minidsv.resolve import free_memory
from minidsv.sampler import Sampler
from minidsv.scheduler import Chunk
from minidsv.selections import read_selections, selection_recorder
from minidsv.upload import upload, upload_rows

CACHE_SHARE = 0.25  # of the free memory, the most that a page pool of default size takes


@dataclass
class StepResult:
    """What a step gives back to the host."""

    token_ids: list[int]  # one a sampling chunk, in their order
    logprobs: list[RowLogprobs | None]  # the same rows
    prompt_logprobs: list[list[RowLogprobs]]  # one list a chunk
    indexer_topk: dict[Request, IndexerTopk] = field(default_factory=dict)  # of those who asked


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
        self.sampler = Sampler(model_config.vocab_size, eos_token_ids, self.device)
        self.weight_bytes = sum(w.nbytes for w in weights.values())
        self.page_bytes = PAGE_SIZE * bytes_per_token(
            model_config, config.kv_cache_dtype, config.index_cache_dtype
        )
        self.num_pages = config.num_pages or self._default_pages(config, config.max_model_len)
        try:
            self.cache = KVCache.allocate(
                model_config,
                self.num_pages,
                config.kv_cache_dtype,
                config.index_cache_dtype,
                self.device,
            )
        except RuntimeError:  # torch's allocators on CPU and CUDA
            raise ConfigError(
                f"num_pages: {self.num_pages} pages of {self.page_bytes} bytes do not fit in memory"
            ) from None
        rope_quant: RopeQuantBackend = "flashinfer" if config.backend == "flashinfer" else "triton"
        operators = Operators(pdl_mode(config), rope_quant)
        self.model = DeepseekV32(model_config, weights, self.cache, operators)

    def describe(self) -> str:
        """One line: what runs where, in which types, and what it takes."""
        c, cache_bytes = self.config, self.num_pages * self.page_bytes
        return (
            f"{self.model_config.model_type} on {c.device}: compute {c.dtype}, latent cache "
            f"{c.kv_cache_dtype}, indexer cache {c.index_cache_dtype}; weights "
            f"{self.weight_bytes / 1e6:,.1f} MB, {self.num_pages} pages of {PAGE_SIZE} tokens "
            f"({cache_bytes / 1e6:,.1f} MB)"
        )

    def _default_pages(self, config: EngineConfig, max_model_len: int) -> int:
        """Room for max_num_seqs requests of full length, within a share of the free memory."""
        affordable = int(free_memory(config.device) * CACHE_SHARE) // self.page_bytes
        if affordable < 1:
            raise ConfigError(
                f"num_pages: no room for one page of {self.page_bytes} bytes; give num_pages"
            )
        return min(config.max_num_seqs * pages_for(max_model_len), affordable)

    def execute(self, chunks: Sequence[Chunk]) -> StepResult:
        """Compute the chunks, choose a token for each that samples, bring it to the host."""
        rows = LogitRows.of(chunks)
        step = self.prepare(chunks, rows.tokens)
        step.selections = selection_recorder(chunks, self.model_config, self.device)
        _, logits = self.model.forward(step)
        requests = [chunk.request for chunk in chunks if chunk.samples]
        ids = self.sampler(logits[self._tensor(rows.sampling)], requests)
        logprobs, prompt_logprobs = rows.logprobs(chunks, logits, ids)
        selections = read_selections(chunks, step.selections, self.model_config)
        return StepResult(ids.tolist(), logprobs, prompt_logprobs, selections)

    def prepare(self, chunks: Sequence[Chunk], logits_index: list[int]) -> StepBatch:
        """Build the step's metadata on the host, then copy it."""
        input_ids: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        request_index: list[int] = []
        for row, chunk in enumerate(chunks):
            pages = chunk.request.page_ids
            span = range(chunk.start, chunk.end)
            input_ids += chunk.request.token_ids(chunk.start, chunk.end)
            positions += span
            slots += [pages[p // PAGE_SIZE] * PAGE_SIZE + p % PAGE_SIZE for p in span]
            request_index += [row] * chunk.num_tokens
        position_tensor = self._tensor(positions)
        return StepBatch(
            input_ids=self._tensor(input_ids),
            positions=position_tensor,
            slot_mapping=self._tensor(slots),
            seq_lens=position_tensor + 1,
            request_index=self._tensor(request_index),
            block_table=upload_rows([chunk.request.page_ids for chunk in chunks], self.device),
            logits_index=self._tensor(logits_index),
            max_seq_len=max(chunk.end for chunk in chunks),
        )

    def _tensor(self, values: list[int]) -> Tensor:
        return upload(values, torch.int64, self.device)
