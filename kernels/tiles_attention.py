"""Tiles of sparse attention.

sparse_mla_<layout>  dims (heads, topk): block_m heads of one token a program, block_n slots a step,
                     `split` programs a token's slots. Narrow tiles run on mma, wide ones on
                     warpgroup mma; splits fill the SMs of an H100 once
LONE                 a lone token's splits with W_UV: block_n outputs of one head a program, room
                     for `split` splits

Every tile is one that ptxas of Triton 3.6 and of 3.9 compiles without spilling.
"""

from dataclasses import replace
from functools import partial

from minidsv.kernels.tile import Rule, Tile

SMS = 132
SPLITS = (1, 2, 4, 8, 16, 32)
NARROW = {
    "bf16": Tile(16, 32, num_warps=4, num_stages=3),
    "fp8": Tile(16, 64, num_warps=8, num_stages=1),
    "flat": Tile(16, 64, num_warps=8, num_stages=1),
}
WIDE = {
    "bf16": Tile(64, 64, num_warps=8, num_stages=2),
    "fp8": Tile(64, 64, num_warps=8, num_stages=1),
    "flat": Tile(64, 64, num_warps=8, num_stages=1),
}


def split_for(programs: int, steps: int) -> int:
    """The most splits that keep `programs` times them within one wave, and a step for each."""
    return max(s for s in SPLITS if s == 1 or (s <= steps and s * programs <= SMS))


def _rule(layout: str, tokens: int, dims: tuple[int, ...]) -> Tile:
    heads, topk = dims
    tile = (WIDE if heads > 32 else NARROW)[layout]
    programs = max(1, tokens * -(-heads // tile.block_m))
    return replace(tile, split=split_for(programs, -(-topk // tile.block_n)))


COMBINE_WARPS = 2  # each thread holds every split of its columns
LONE = Tile(1, 32, split=SPLITS[-1])
TILES: dict[str, Rule] = {f"sparse_mla_{layout}": partial(_rule, layout) for layout in WIDE}
