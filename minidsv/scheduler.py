"""Scheduler: which tokens of which requests run in the next step. Pure Python; first come, first
served.

A step mixes decode tokens and prefill chunks under one token budget. A request is only ever behind
by `num_needed_tokens - num_computed_tokens`: one for a decoding request, many for a new or a
preempted one, so the same loop serves all. The next step may be scheduled while the device computes
this one: its tokens are then needed, but not known yet. A request starts when there are pages for
all its tokens, behind those that a cached prefix saves it. When pages run out the newest running
request is preempted: it loses its pages and is computed again later, but for what is still cached
by then.
"""

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice

from minidsv.block_manager import BlockManager
from minidsv.kernels.constants import PAGE_SIZE
from minidsv.request import Request, Status

WATERMARK = 0.01  # share of the pages that stays free when a request starts beside others
MAX_LOGIT_ROWS = 1024  # prompt positions whose logits one step may compute for prompt_logprobs


@dataclass(eq=False)
class Chunk:
    """Tokens [start, end) of a request, to be computed in one step."""

    request: Request
    start: int
    num_tokens: int
    end: int = field(init=False)
    samples: bool = field(init=False)  # reaches the last known token: its logits choose the next
    scores: bool = field(init=False)  # ends a prompt that nothing is to follow

    def __post_init__(self) -> None:
        self.end = self.start + self.num_tokens
        last = self.end == self.request.num_needed_tokens
        self.samples = last and self.request.max_tokens > 0
        self.scores = last and self.request.max_tokens == 0


class Scheduler:
    """Owns the queues; `schedule` picks a step's chunks, `advance` books them as computed."""

    def __init__(self, block_manager: BlockManager, max_num_seqs: int, max_num_batched_tokens: int):
        self.block_manager = block_manager
        self.max_num_seqs, self.max_num_batched_tokens = max_num_seqs, max_num_batched_tokens
        self.spare_pages = int(WATERMARK * block_manager.num_pages)
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []  # oldest first
        self.num_preemptions = 0

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    def add(self, request: Request) -> None:
        self.waiting.append(request)

    def finish(self, request: Request) -> None:
        """Remove a request, wherever it is, and free its pages."""
        if request.status is Status.RUNNING:
            self.running.remove(request)
        elif request in self.waiting:
            self.waiting.remove(request)
        self.block_manager.free(request)
        request.status = Status.FINISHED

    def schedule(self) -> list[Chunk]:
        """The next step's chunks, with pages; none if all that runs waits for its last token."""
        budget = _Budget(self.max_num_batched_tokens, MAX_LOGIT_ROWS)
        chunks: list[Chunk] = []
        preempted = False
        for request in list(self.running):
            if request.status is not Status.RUNNING or budget.tokens == 0:
                continue
            size = budget.chunk_size(request)
            if size == 0:
                continue
            while not self.block_manager.grow(request, request.num_computed_tokens + size):
                preempted = True
                if self._preempt_newest() is request:
                    break
            else:
                chunks.append(budget.take(request, size))
        if not preempted:
            chunks += self._start(budget)
        pending = any(request.num_pending_tokens for request in self.running)
        assert chunks or pending or not self.has_work, "requests wait and none can run"
        return chunks

    def advance(self, chunks: Sequence[Chunk]) -> None:
        """The chunks are computed before any later step: their keys are as good as in the cache."""
        for chunk in chunks:
            chunk.request.num_computed_tokens = chunk.end
            if chunk.end <= chunk.request.num_tokens:
                self.block_manager.cache(chunk.request, chunk.start, chunk.end)

    def commit(self, chunks: Sequence[Chunk]) -> None:
        """Tokens that the chunks began with are known by now: their pages can be cached too."""
        for chunk in chunks:
            request = chunk.request
            if request.status is Status.RUNNING and request.num_computed_tokens >= chunk.end:
                self.block_manager.cache(request, chunk.start, chunk.end)

    def _start(self, budget: "_Budget") -> list[Chunk]:
        """Chunks of waiting requests, in their order, until there are too few pages for one.

        A request whose prefix a running one computes further keeps its place, and those behind it
        may start: of many prompts with a common beginning, or many outputs of one, the first
        computes it. No more are looked at than may run, however many wait.
        """
        chunks = []
        for request in list(islice(self.waiting, self.max_num_seqs)):
            if not budget.tokens or len(self.running) == self.max_num_seqs:
                break
            if self.block_manager.comes_next(request, self.running):
                continue
            if not self._admit(request):
                break
            chunks.append(budget.take(request, budget.chunk_size(request)))
        return chunks

    def _admit(self, request: Request) -> bool:
        """Run a waiting request, if there are pages for all its tokens and some to spare.

        The spare ones are for the running requests' next tokens; alone, a request needs none.
        """
        cached = self.block_manager.admit(request, self.spare_pages if self.running else 0)
        if cached is None:
            return False
        self.waiting.remove(request)
        self.running.append(request)
        request.status, request.num_computed_tokens = Status.RUNNING, cached
        if request.first_scheduled_time is None:
            request.first_scheduled_time = time.monotonic()
            request.num_cached_tokens = cached
        return True

    def _preempt_newest(self) -> Request:
        request = self.running.pop()
        self.block_manager.free(request)
        request.status, request.num_computed_tokens = Status.WAITING, 0
        request.num_preemptions += 1
        self.num_preemptions += 1
        self.waiting.appendleft(request)
        return request

    def check(self) -> None:
        """Assert that queues, states and pages agree."""
        self.block_manager.check(self.running)
        assert all(r.status is Status.WAITING and not r.page_ids for r in self.waiting)
        assert all(r.status is Status.RUNNING for r in self.running)
        assert len(self.running) <= self.max_num_seqs
        for request in self.running:
            assert len(request.page_ids) * PAGE_SIZE >= request.num_computed_tokens


@dataclass
class _Budget:
    """What is left of a step: tokens, and rows of logits for prompt_logprobs."""

    tokens: int
    logit_rows: int

    def chunk_size(self, request: Request) -> int:
        size = min(request.num_needed_tokens - request.num_computed_tokens, self.tokens)
        return min(size, max(1, self.logit_rows)) if request.wants_prompt_logprobs else size

    def take(self, request: Request, size: int) -> Chunk:
        assert size > 0, f"{request.request_id} has nothing to compute"
        self.tokens -= size
        if request.wants_prompt_logprobs:
            self.logit_rows -= size
        return Chunk(request, request.num_computed_tokens, size)
