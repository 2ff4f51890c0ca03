"""Tile, split, warps and stages of every op: `launch_config(op, m, dims)`, pure and tabled.

Each family's `tiles_*.py` maps an op's name to a rule over frozen tables; nothing is tuned at run
time, so an op's summation order depends on its shapes alone. No torch, no triton in here.
"""

import functools
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


@functools.cache
def rules() -> dict[str, Rule]:
    """Every op's rule; the families' tables import `Tile` from here."""
    from minidsv.kernels import tiles_small

    return {**tiles_small.TILES}


def launch_config(op: str, m: int, dims: tuple[int, ...]) -> Tile:
    """How `op` runs on m tokens and weights or caches of `dims`; KeyError for an unknown op."""
    return rules()[op](m, dims)
