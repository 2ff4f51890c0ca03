"""Pages: who owns them, what they are cached for, and in which order they are given up."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minidsv.block_manager import BlockManager, pages_for
from minidsv.request import Request, SamplingParams
from minidsv.scheduler import Scheduler
from policy import make, run_to_end


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
            assert list(request.page_ids[: len(before)]) == before
        manager.check(requests)
    for request in requests:
        manager.free(request)
    assert manager.num_free == num_pages


@pytest.mark.parametrize(
    ("length", "cached"), [(63, 0), (64, 0), (65, 64), (127, 64), (128, 64), (129, 128)]
)
def test_a_full_hit_leaves_a_token_to_compute(length: int, cached: int) -> None:
    scheduler = Scheduler(BlockManager(8), 8, 8192)
    assert run_to_end(scheduler, make(length, 1)) == length
    again = make(length, 1)
    assert run_to_end(scheduler, again) == length - cached
    assert again.num_cached_tokens == cached


@pytest.mark.parametrize("budget", [8192, 100])
def test_a_burst_computes_its_common_prefix_once(budget: int) -> None:
    """Requests wait while another computes what they share, and for nothing else."""
    scheduler = Scheduler(BlockManager(80), 16, budget)
    burst = [make(length, 3) for length in (300, 300, 290, 64, 400)]
    burst[4].prompt_token_ids[200] = -1
    computed = run_to_end(scheduler, *burst)
    assert [r.num_cached_tokens for r in burst] == [0, 256, 256, 0, 192]
    assert computed == 300 + 44 + 34 + 64 + 208 + 5 * 2


def test_a_burst_outlives_the_one_it_waits_for() -> None:
    scheduler = Scheduler(BlockManager(80), 16, 100)
    first, second = make(300, 3), make(300, 3)
    scheduler.add(first)
    scheduler.add(second)
    for _ in range(2):
        scheduler.advance(scheduler.schedule())
    assert scheduler.running == [first]
    scheduler.finish(first)
    assert run_to_end(scheduler) == 300 + 2 - 192
    assert second.num_cached_tokens == 192


def test_outputs_are_cached_too() -> None:
    scheduler = Scheduler(BlockManager(8), 8, 8192)
    first = make(60, 80)
    run_to_end(scheduler, first)
    dialogue = make(200, 1)
    dialogue.prompt_token_ids[:140] = first.token_ids(0, 140)
    run_to_end(scheduler, dialogue)
    assert dialogue.num_cached_tokens == 128  # of the 139 that were computed


def test_salts_and_prompt_logprobs_do_not_share() -> None:
    manager = BlockManager(16)
    scheduler = Scheduler(manager, 8, 8192)
    run_to_end(scheduler, make(130, 1))
    salted, twin = make(130, 1), make(130, 1)
    salted.cache_salt, twin.cache_salt = "a", "a"
    rows = make(130, 1, prompt_logprobs=1)
    for request, cached in ((salted, 0), (twin, 128), (rows, 0), (make(130, 1), 128)):
        run_to_end(scheduler, request)
        assert request.num_cached_tokens == cached
    assert (manager.prefix_queries, manager.prefix_hits) == (4 * 130, 2 * 128)


def test_least_recently_used_pages_go_first_and_ends_before_beginnings() -> None:
    manager = BlockManager(6)
    scheduler = Scheduler(manager, 8, 8192)
    old, new = make(129, 1), make(129, 1)
    new.prompt_token_ids = [-t for t in new.prompt_token_ids]
    other = [1000 + t for t in range(193)]
    for request in (old, new):
        run_to_end(scheduler, request)  # 2 pages each, and 2 without a hash
    run_to_end(scheduler, Request("r", other[:129], SamplingParams(), 0, 1))  # takes old's last
    for prompt, cached in ((new.prompt_token_ids, 128), (old.prompt_token_ids, 64)):
        again = Request("r", list(prompt), SamplingParams(), 0, 1)
        run_to_end(scheduler, again)
        assert again.num_cached_tokens == cached


def test_shared_pages_outlive_every_owner_but_the_last() -> None:
    manager = BlockManager(8)
    scheduler = Scheduler(manager, 8, 8192)
    run_to_end(scheduler, make(129, 1))
    sharers = [make(129, 9) for _ in range(4)]
    for request in sharers:
        scheduler.add(request)
    scheduler.advance(scheduler.schedule())
    assert manager.num_free == 8 - 2 - 4
    for ended, request in enumerate(sharers, 1):
        scheduler.finish(request)
        scheduler.check()
        assert manager.num_free == (8 if ended == 4 else 8 - 2 - (4 - ended))


def test_a_preempted_request_finds_its_own_pages() -> None:
    manager = BlockManager(4)
    scheduler = Scheduler(manager, 8, 8192)
    old, new = make(60, 60), make(130, 60)
    new.prompt_token_ids = [-t for t in new.prompt_token_ids]
    computed = run_to_end(scheduler, old, new)
    assert new.num_preemptions == 1
    again = 134 - 128  # what it had computed beyond its full pages
    assert computed == 60 + 59 + 130 + 59 + again
    assert (new.num_cached_tokens, manager.prefix_hits) == (0, 0)
