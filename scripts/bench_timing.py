"""Time of one launch, as peers-h100.md took it: many launches in one CUDA graph, replayed."""

import statistics
from collections.abc import Callable, Sequence

import torch

COLD_BYTES = 256 << 20  # rotate over more than the L2 (50 MB) holds, so weights come from HBM


def copies_for(nbytes: int, most: int = 64) -> int:
    """How many copies of a `nbytes` working set make a rotation cold."""
    return max(2, min(most, -(-COLD_BYTES // max(nbytes, 1))))


def replay_of(launches: Sequence[Callable[[], object]], chain: int = 64) -> Callable[[], float]:
    """Capture about `chain` launches, taken in turn; each call replays them, and gives the
    microseconds of one.

    Each of `launches` runs the op on buffers of its own, all allocated before.
    """
    rounds = max(1, chain // len(launches))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())  # which made the buffers
    with torch.cuda.stream(stream):
        for launch in launches:  # compile and warm up outside the capture
            launch()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for _ in range(rounds):
                for launch in launches:
                    launch()

    def replay() -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        with torch.cuda.stream(stream):
            start.record()
            graph.replay()
            end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e3 / (rounds * len(launches))

    return replay


def graph_us(launches: Sequence[Callable[[], object]], chain: int = 64, replays: int = 20) -> float:
    """Median microseconds of one launch in a graph of them."""
    replay = replay_of(launches, chain)
    return statistics.median([replay() for _ in range(replays + 2)][2:])


def interleaved_us(
    ours: Sequence[Callable[[], object]], theirs: Sequence[Callable[[], object]], runs: int = 5
) -> tuple[float, float]:
    """Medians of `runs` runs of each, taken in turn, so that clocks and heat are the same."""
    one, other = replay_of(ours), replay_of(theirs)
    pairs = [(one(), other()) for _ in range(runs + 1)][1:]
    return statistics.median(a for a, _ in pairs), statistics.median(b for _, b in pairs)
