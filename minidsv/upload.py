"""Numbers to the device and back, with a GPU through pinned memory: the host does not wait."""

from array import array
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor


def upload(values: Sequence[Any], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor of (lists of) numbers."""
    if device.type == "cpu":
        return torch.tensor(values, dtype=dtype)
    return torch.tensor(values, dtype=dtype, pin_memory=True).to(device, non_blocking=True)


def upload_rows(rows: "Sequence[array[int]]", device: torch.device) -> Tensor:
    """int64 [rows, longest] of arrays of type "q", 0 behind the shorter ones; copies bytes only."""
    width = max(map(len, rows)) * 8
    data = bytearray().join(row.tobytes().ljust(width, b"\0") for row in rows)
    table = torch.frombuffer(data, dtype=torch.int64).view(len(rows), -1)
    return table if device.type == "cpu" else table.pin_memory().to(device, non_blocking=True)


class Download:
    """A copy of a device tensor to the host, begun at once; `read` waits for it."""

    def __init__(self, x: Tensor):
        on_gpu = x.device.type != "cpu"
        self._host = torch.empty(x.shape, dtype=x.dtype, pin_memory=on_gpu)
        self._host.copy_(x, non_blocking=True)
        self._done = torch.cuda.current_stream(x.device).record_event() if on_gpu else None

    def read(self) -> list[int]:
        if self._done is not None:
            self._done.synchronize()
        return cast(list[int], self._host.tolist())
