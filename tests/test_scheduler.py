"""Policy under random traffic: pages conserved, keys never mistaken, every request ends."""

import sys
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minidsv.block_manager import BlockManager, pages_for
from minidsv.kernels.constants import PAGE_SIZE
from minidsv.request import Request, Status
from minidsv.scheduler import MAX_LOGIT_ROWS, Chunk, Scheduler
from policy import make, run_to_end


class Memory:
    """A cache whose slots remember the token they hold and all before it."""

    def __init__(self) -> None:
        self.slots: dict[int, int] = {}
        self._nodes: dict[tuple[object, int], int] = {}

    def contents(self, request: Request, end: int) -> dict[int, int]:
        """What the first `end` tokens of a request mean, by slot."""
        node: object = request.cache_salt
        contents = {}
        tokens = request.token_ids(0, end)
        if len(tokens) < end:  # pending
            tokens.append(output_token(len(request.output_token_ids)))
        for position, token in enumerate(tokens):
            node = self._nodes.setdefault((node, token), len(self._nodes))
            page = request.page_ids[position // PAGE_SIZE]
            contents[page * PAGE_SIZE + position % PAGE_SIZE] = node
        return contents

    def run(self, chunks: list[Chunk]) -> None:
        """Write what the chunks compute; then all that they see must be theirs."""
        seen = [self.contents(chunk.request, chunk.end) for chunk in chunks]
        for chunk, contents in zip(chunks, seen, strict=True):
            self.slots.update(list(contents.items())[chunk.start :])
        for contents in seen:
            assert contents.items() <= self.slots.items()


def output_token(position: int) -> int:
    return position % 3


def test_policy_needs_no_torch() -> None:
    import subprocess

    code = "import minidsv.scheduler, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@dataclass
class Traffic:
    """What arrives and is aborted at each step, and the pool it meets."""

    num_pages: int
    max_num_seqs: int
    budget: int
    prefix_caching: bool
    spare_pages: int
    ahead: bool  # a step is read after the next one is launched
    arrivals: list[list[Request]] = field(default_factory=list)
    aborts: list[int | None] = field(default_factory=list)


def read(scheduler: Scheduler, chunks: list[Chunk]) -> None:
    """The tokens of a step that ran arrive."""
    scheduler.commit(chunks)
    for chunk in chunks:
        request = chunk.request
        request.num_pending_tokens -= chunk.samples
        if chunk.samples and request.status is not Status.FINISHED:
            request.output_token_ids.append(output_token(len(request.output_token_ids)))
            if len(request.output_token_ids) == request.max_tokens:
                scheduler.finish(request)


@st.composite
def traffic(draw: st.DrawFn) -> Traffic:
    num_pages = draw(st.integers(1, 8))
    most = num_pages * PAGE_SIZE

    @st.composite
    def request(draw: st.DrawFn) -> Request:
        prompt = draw(st.integers(1, most - 1))
        output = draw(st.integers(1, min(40, most - prompt)))
        rows = {"prompt_logprobs": 1} if draw(st.booleans()) else {}
        request = make(prompt, output, **rows)
        request.cache_salt = draw(st.sampled_from([None, None, "salt"]))
        if (other := draw(st.integers(0, 2 * prompt))) < prompt:
            request.prompt_token_ids[other] = -1
        return request

    steps = draw(st.integers(1, 8))
    return Traffic(
        num_pages,
        draw(st.integers(1, 6)),
        draw(st.sampled_from([1, 3, 17, 64, 300, 8192])),
        draw(st.integers(0, 3)) > 0,
        draw(st.integers(0, 3)),
        draw(st.booleans()),
        [draw(st.lists(request(), max_size=3)) for _ in range(steps)],
        [draw(st.none() | st.integers(0, 20)) for _ in range(steps)],
    )


@given(traffic())
@settings(max_examples=200, deadline=None)
def test_every_request_ends(case: Traffic) -> None:
    """On keys that are its own, whatever was cached, shared, preempted or aborted on the way."""
    manager = BlockManager(case.num_pages, case.prefix_caching)
    scheduler = Scheduler(manager, case.max_num_seqs, case.budget)
    scheduler.spare_pages = case.spare_pages
    memory, requests = Memory(), list[Request]()
    step, idle, unread = 0, 0, list[list[Chunk]]()
    while step < len(case.arrivals) or scheduler.has_work:
        if step < len(case.arrivals):
            for request in case.arrivals[step]:
                requests.append(request)
                scheduler.add(request)
            victim = case.aborts[step]
            if victim is not None and victim < len(requests):
                scheduler.finish(requests[victim])
        chunks = scheduler.schedule()
        scheduler.check()
        assert sum(c.num_tokens for c in chunks) <= case.budget
        assert len({id(c.request) for c in chunks}) == len(chunks) <= case.max_num_seqs
        for chunk in chunks:
            assert chunk.num_tokens > 0
            assert chunk.start == chunk.request.num_computed_tokens
            assert pages_for(chunk.end) <= len(chunk.request.page_ids)
        memory.run(chunks)
        scheduler.advance(chunks)
        for chunk in chunks:
            request, known = chunk.request, chunk.request.prompt_logprobs
            if request.params.prompt_logprobs is not None:
                assert chunk.start <= len(known) or len(known) == len(request.prompt_token_ids)
                end = min(chunk.end + 1, len(request.prompt_token_ids))
                known += [None] * max(0, end - len(known))
            request.num_pending_tokens += chunk.samples
        unread.append(chunks)
        for launched in unread[: None if not case.ahead else -1]:
            read(scheduler, launched)
        unread = unread[-1:] if case.ahead and chunks else []
        scheduler.check()
        step += 1
        idle = 0 if chunks else idle + 1
        assert idle <= len(case.arrivals) + 1
    assert all(r.status is Status.FINISHED for r in requests)
    assert manager.num_free == case.num_pages
    assert manager.prefix_hits == sum(r.num_cached_tokens for r in requests)
    if not case.prefix_caching:
        assert manager.prefix_queries == manager.prefix_hits == 0


def test_first_come_first_served_and_newest_preempted() -> None:
    manager = BlockManager(3)
    scheduler = Scheduler(manager, 8, 8192)
    old, new = make(64, 30, "old"), make(60, 30, "new")
    scheduler.add(old)
    scheduler.add(new)
    scheduler.advance(scheduler.schedule())
    assert scheduler.running == [old, new]
    for request in (old, new):
        request.output_token_ids.append(0)
    chunks = scheduler.schedule()
    assert [c.request for c in chunks] == [old, new]  # old takes the last page
    scheduler.advance(chunks)
    new.output_token_ids += [0] * 4
    old.output_token_ids.append(0)
    chunks = scheduler.schedule()  # new needs a second page: it is the newest, and goes
    assert [c.request for c in chunks] == [old]
    assert (new.num_preemptions, scheduler.num_preemptions) == (1, 1)
    assert list(scheduler.waiting) == [new]
    assert new.num_computed_tokens == 0
    scheduler.finish(old)
    assert [(c.start, c.num_tokens) for c in scheduler.schedule()] == [(0, new.num_tokens)]


def test_a_start_leaves_pages_for_the_running() -> None:
    """1 % of the pages; the next in line waits, later ones behind it, and alone it gets all."""
    manager = BlockManager(200)
    scheduler = Scheduler(manager, 8, 200 * PAGE_SIZE)
    alone, big, small = make(200 * PAGE_SIZE - 2, 2), make(200, 1), make(1, 1)
    run_to_end(scheduler, alone)
    old = make(195 * PAGE_SIZE, 500)
    old.prompt_token_ids = [-t for t in old.prompt_token_ids]
    for request in (old, big, small):
        scheduler.add(request)
    chunks = scheduler.schedule()
    assert [c.request for c in chunks] == [old]
    assert manager.num_free == 5  # big's 4 pages would leave one, small's would leave 4
    scheduler.advance(chunks)
    scheduler.finish(big)
    old.output_token_ids.append(7)
    assert [c.request for c in scheduler.schedule()] == [old, small]
    assert (manager.num_free, scheduler.num_preemptions) == (3, 0)


def test_others_pass_one_that_waits_for_a_prefix() -> None:
    """It keeps its place; a shortage of pages still holds up everybody behind."""
    scheduler = Scheduler(BlockManager(8), 8, 8192)
    first, sibling, other = make(200, 1), make(200, 1), make(90, 1)
    big, small = make(400, 1), make(10, 1)
    for request, token in ((other, -1), (big, -2), (small, -3)):
        request.prompt_token_ids[0] = token
    for request in (first, sibling, other, big, small):
        scheduler.add(request)
    chunks = scheduler.schedule()
    assert [c.request for c in chunks] == [first, other]
    assert list(scheduler.waiting) == [sibling, big, small]
    scheduler.advance(chunks)
    scheduler.finish(first)
    scheduler.finish(other)
    (chunk,) = scheduler.schedule()
    assert (chunk.request, chunk.start) == (sibling, 192)
    assert list(scheduler.waiting) == [big, small]


def test_prompt_logprobs_are_rationed() -> None:
    """Logits of a step stay bounded however long the prompt is."""
    scheduler = Scheduler(BlockManager(200), 8, 8192)
    scheduler.add(make(5000, 1, "rows", prompt_logprobs=0))
    plain = make(3000, 1, "plain")
    plain.prompt_token_ids.reverse()
    scheduler.add(plain)
    sizes = {c.request.request_id: c.num_tokens for c in scheduler.schedule()}
    assert sizes == {"rows": MAX_LOGIT_ROWS, "plain": 3000}


@pytest.mark.parametrize("status", ["waiting", "running", "finished"])
def test_finish_from_any_state(status: str) -> None:
    manager = BlockManager(4)
    scheduler = Scheduler(manager, 2, 64)
    request = make(100, 5)
    scheduler.add(request)
    if status != "waiting":
        scheduler.schedule()
    if status == "finished":
        scheduler.finish(request)
    scheduler.finish(request)
    assert not scheduler.has_work
    assert manager.num_free == 4
