"""Time of one launch, as peers-h100.md took it: many launches in one CUDA graph, replayed."""

import statistics
from collections.abc import Callable, Sequence

import torch

COLD_BYTES = 256 << 20  # rotate over more than the L2 (50 MB) holds, so weights come from HBM


def copies_for(nbytes: int, most: int = 64) -> int:
    """How many copies of a `nbytes` working set make a rotation cold."""
    return max(2, min(most, -(-COLD_BYTES // max(nbytes, 1))))


def graph_us(launches: Sequence[Callable[[], object]], chain: int = 64, replays: int = 20) -> float:
    """Median microseconds of one launch in a graph of about `chain` launches, taken in turn.

    Each of `launches` runs the op on buffers of its own, all allocated before.
    """
    rounds = max(1, chain // len(launches))
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for launch in launches:  # compile and warm up outside the capture
            launch()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for _ in range(rounds):
                for launch in launches:
                    launch()
        times = []
        for _ in range(replays + 2):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record(stream)
            graph.replay()
            end.record(stream)
            end.synchronize()
            times.append(start.elapsed_time(end) * 1e3 / (rounds * len(launches)))
    return statistics.median(times[2:])
