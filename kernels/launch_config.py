"""Tile, split, warps and stages of every op: `launch_config(op, m, dims)`, pure and tabled.

Each family's `tiles_*.py` maps an op's name to a rule over frozen tables; nothing is tuned at run
time, so an op's summation order depends on its shapes alone. No torch, no triton in here.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from minidsv.kernels import tiles_attention


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


def _sparse_mla(layout: str, m: int, dims: tuple[int, ...]) -> Tile:
    block_m, block_n, split, warps, stages = tiles_attention.fields(layout, m, *dims)
    return Tile(block_m, block_n, 1, split, warps, stages)


RULES: dict[str, Rule] = {
    f"sparse_mla_{layout}": partial(_sparse_mla, layout) for layout in tiles_attention.WIDE
}


def launch_config(op: str, m: int, dims: tuple[int, ...]) -> Tile:
    """How `op` runs on m tokens and weights or caches of `dims`; KeyError for an unknown op."""
    return RULES[op](m, dims)
