"""What a launch is told of its shape. No torch, no triton in here."""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Tile:
    """One program's share of an op; a kernel reads the fields it has a use for."""

    block_m: int = 1
    block_n: int = 1
    block_k: int = 1
    split: int = 1  # programs that share one output and are summed in a fixed order
    num_warps: int = 4
    num_stages: int = 3


Rule = Callable[[int, tuple[int, ...]], Tile]  # (m, dims) -> tile
