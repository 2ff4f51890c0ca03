"""Tile, split, warps and stages of every op: `launch_config(op, m, dims)`, pure and tabled.

Each family's `tiles_*.py` maps an op's name to a rule over frozen tables; nothing is tuned at run
time, so an op's summation order depends on its shapes alone. No torch, no triton in here.
"""

from minidsv.kernels import (
    tiles_attention,
    tiles_gemm,
    tiles_indexer,
    tiles_moe,
    tiles_small,
)
from minidsv.kernels.tile import Rule, Tile

FAMILIES = (tiles_attention, tiles_gemm, tiles_indexer, tiles_moe, tiles_small)
RULES: dict[str, Rule] = {op: rule for family in FAMILIES for op, rule in family.TILES.items()}


def launch_config(op: str, m: int, dims: tuple[int, ...]) -> Tile:
    """How `op` runs on m tokens and weights or caches of `dims`; KeyError for an unknown op."""
    return RULES[op](m, dims)
