"""DecodeGraphs: a decode step, from the embedding to logits and argmax ids, as one CUDA graph.

One graph a batch size and path, where a path is the largest context that it serves: up to
index_topk nothing is scored, up to ONE_CHUNK a program chooses the top K of a row alone. A step
runs in the smallest graph that holds it. The largest is captured first, and all share a memory
pool: only one runs at a time.
"""

from bisect import bisect_left
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from minidsv.batch import StepBatch, StepBuffers
from minidsv.kernels.tiles_indexer import CHUNK as ONE_CHUNK
from minidsv.model import DeepseekV32


class GraphKey(NamedTuple):
    """What one graph serves."""

    requests: int
    tokens: int  # a request
    max_seq_len: int


def batch_sizes(most: int) -> tuple[int, ...]:
    """1, 2, 4, 8, then steps of 8, 16 and 64, up to `most` itself."""
    sizes = {1, 2, 4, *range(8, 32, 8), *range(32, 64, 16), *range(64, most, 64)}
    return (*sorted(size for size in sizes if size < most), most)


def context_bounds(index_topk: int, max_model_len: int) -> tuple[int, ...]:
    """The largest contexts of the paths."""
    bounds = {index_topk, max(index_topk, ONE_CHUNK)}
    return (*sorted(bound for bound in bounds if bound < max_model_len), max_model_len)


class DecodeGraphs:
    """The captured decode steps of a model; nothing runs before `capture`."""

    def __init__(
        self,
        model: DeepseekV32,
        buffers: StepBuffers,
        bounds: Sequence[int],
        max_batch: int,
        keep_graph: bool = False,
    ):
        """`keep_graph` keeps what was captured readable, for reports."""
        self.model, self.buffers, self.keep_graph = model, buffers, keep_graph
        self.buckets, self.bounds = batch_sizes(max_batch), tuple(bounds)
        self.device = buffers.input_ids.device
        self.graphs: dict[GraphKey, torch.cuda.CUDAGraph] = {}
        self._outputs: dict[GraphKey, tuple[Tensor, Tensor]] = {}

    def capture(self) -> None:
        """Capture every size and path, each after a run that compiles its kernels."""
        keys = [GraphKey(size, 1, bound) for size in self.buckets for bound in self.bounds]
        with torch.cuda.device(self.device), torch.inference_mode():
            pool = torch.cuda.graph_pool_handle()
            for key in sorted(keys, reverse=True):
                self._compute(key)
                graph = torch.cuda.CUDAGraph(keep_graph=self.keep_graph)
                with torch.cuda.graph(graph, pool=pool):
                    self._outputs[key] = self._compute(key)
                self.graphs[key] = graph

    def key(self, step: StepBatch) -> GraphKey | None:
        """The graph for a step of one token a request; None if it has too many."""
        count = len(step.input_ids)
        if count > self.buckets[-1] or step.max_seq_len > self.bounds[-1]:
            return None
        size = self.buckets[bisect_left(self.buckets, count)]
        return GraphKey(size, 1, self.bounds[bisect_left(self.bounds, step.max_seq_len)])

    def replay(self, step: StepBatch) -> tuple[Tensor, Tensor]:
        """(argmax ids int64 [T], logits fp32 [T, vocab]) of a step that has a key; they hold until
        the next replay."""
        key = self._fill(step)
        with torch.cuda.device(self.device):
            self.graphs[key].replay()
        ids, logits = self._outputs[key]
        return ids[: len(step.input_ids)], logits[: len(step.input_ids)]

    def eager(self, step: StepBatch) -> tuple[Tensor, Tensor]:
        """The same without the graph, bit for bit."""
        ids, logits = self._compute(self._fill(step))
        return ids[: len(step.input_ids)], logits[: len(step.input_ids)]

    def _fill(self, step: StepBatch) -> GraphKey:
        key = self.key(step)
        assert key is not None, f"{len(step.input_ids)} requests, max_seq_len {step.max_seq_len}"
        self.buffers.fill(step, key.requests)
        return key

    def _compute(self, key: GraphKey) -> tuple[Tensor, Tensor]:
        return self.model.greedy(self.buffers.batch(key.requests, key.max_seq_len))
