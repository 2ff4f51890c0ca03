"""Policy under random traffic: pages conserved, never owned twice, every request ends."""

import sys
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minidsv.block_manager import BlockManager, pages_for
from minidsv.kernels.constants import PAGE_SIZE
from minidsv.request import Request, SamplingParams, Status
from minidsv.scheduler import MAX_LOGIT_ROWS, Scheduler


def make(prompt: int, output: int, name: str = "r", **params: int) -> Request:
    return Request(
        name, list(range(prompt)), SamplingParams(max_tokens=output, **params), 0, output
    )


def test_policy_needs_no_torch() -> None:
    import subprocess

    code = "import minidsv.scheduler, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(1, 700)), max_size=60), st.integers(1, 12))
@settings(deadline=None)
def test_block_manager(actions: list[tuple[int, int]], num_pages: int) -> None:
    """grow gives exactly the pages that are needed or none; free gives all back."""
    manager = BlockManager(num_pages)
    requests = [make(1, 1, str(i)) for i in range(4)]
    for which, tokens in actions:
        if which == 4:
            manager.free(requests[tokens % 4])
        else:
            request = requests[which]
            before, free = list(request.page_ids), manager.num_free
            grown = manager.grow(request, tokens)
            wanted = max(len(before), pages_for(tokens))
            assert grown == (wanted - len(before) <= free)
            assert len(request.page_ids) == (wanted if grown else len(before))
            assert request.page_ids[: len(before)] == before
        manager.check()
    for request in requests:
        manager.free(request)
    assert manager.num_free == num_pages


@dataclass
class Traffic:
    """What arrives and is aborted at each step, and the pool it meets."""

    num_pages: int
    max_num_seqs: int
    budget: int
    arrivals: list[list[tuple[int, int, bool]]] = field(default_factory=list)
    aborts: list[int | None] = field(default_factory=list)


@st.composite
def traffic(draw: st.DrawFn) -> Traffic:
    num_pages = draw(st.integers(1, 8))
    most = num_pages * PAGE_SIZE

    @st.composite
    def request(draw: st.DrawFn) -> tuple[int, int, bool]:
        prompt = draw(st.integers(1, most - 1))
        output = draw(st.integers(1, min(40, most - prompt)))
        return prompt, output, draw(st.booleans())

    steps = draw(st.integers(1, 8))
    return Traffic(
        num_pages,
        draw(st.integers(1, 6)),
        draw(st.sampled_from([1, 3, 17, 64, 300, 8192])),
        [draw(st.lists(request(), max_size=3)) for _ in range(steps)],
        [draw(st.none() | st.integers(0, 20)) for _ in range(steps)],
    )


@given(traffic())
@settings(max_examples=150, deadline=None)
def test_every_request_ends(case: Traffic) -> None:
    manager = BlockManager(case.num_pages)
    scheduler = Scheduler(manager, case.max_num_seqs, case.budget)
    requests: list[Request] = []
    step, idle = 0, 0
    while step < len(case.arrivals) or scheduler.has_work:
        if step < len(case.arrivals):
            for prompt, output, rows in case.arrivals[step]:
                extra = {"prompt_logprobs": 1} if rows else {}
                requests.append(make(prompt, output, str(len(requests)), **extra))
                scheduler.add(requests[-1])
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
        scheduler.advance(chunks)
        for chunk in chunks:
            request = chunk.request
            if chunk.end == request.num_tokens:
                request.output_token_ids.append(0)
                if len(request.output_token_ids) == request.max_tokens:
                    scheduler.finish(request)
        scheduler.check()
        step += 1
        idle = 0 if chunks else idle + 1
        assert idle <= len(case.arrivals) + 1
    assert all(r.status is Status.FINISHED for r in requests)
    assert manager.num_free == case.num_pages


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


def test_prompt_logprobs_are_rationed() -> None:
    """Logits of a step stay bounded however long the prompt is."""
    scheduler = Scheduler(BlockManager(200), 8, 8192)
    scheduler.add(make(5000, 1, "rows", prompt_logprobs=0))
    scheduler.add(make(3000, 1, "plain"))
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
