"""Times of steps, by CUDA events where there are such, and the memory's measured speed."""

import statistics
import time
from collections.abc import Callable

import torch

from minidsv.kernels.bandwidth import sum_pieces, sum_pieces_cost

READ_BYTES = {"cuda": 1 << 30, "cpu": 1 << 26}  # beyond any cache
READS = 20


def times_us(
    run: Callable[[], object], between: Callable[[], object], count: int, device: torch.device
) -> list[float]:
    """Microseconds of `count` runs, each followed by an untimed `between`.

    On CUDA the host does not wait in between: it runs ahead of the device, unless a run takes it
    longer than the device, and that is what is timed then.
    """
    if device.type != "cuda":
        return [_host_us(run, between) for _ in range(count)]
    events = []
    for _ in range(count):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        between()
        events.append((start, end))
    torch.cuda.synchronize(device)
    return [start.elapsed_time(end) * 1e3 for start, end in events]


def _host_us(run: Callable[[], object], between: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    seconds = time.perf_counter() - start
    between()
    return seconds * 1e6


def read_bandwidth(device: torch.device) -> float:
    """Bytes/s of a kernel that only reads (CPU: of a sum by PyTorch); the median of READS."""
    words = torch.zeros(READ_BYTES[device.type] // 4, dtype=torch.int32, device=device)
    times = times_us(lambda: sum_pieces(words, "off"), lambda: None, READS + 2, device)
    return sum_pieces_cost(words.numel())[0] / statistics.median(times[2:]) * 1e6
