"""How many threads PyTorch gives a model on the CPU."""

import torch

SMALL_MODEL_BYTES = 64 * 2**20


def limit_threads(device: str, weight_bytes: int) -> None:
    """Give a small model on CPU one thread.

    A second one brings it nothing, and spins for a core where another process has it: 3 tokens/s
    in place of 60 (docs/LOG.md).
    """
    if device == "cpu" and weight_bytes < SMALL_MODEL_BYTES:
        torch.set_num_threads(1)
