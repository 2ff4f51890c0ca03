"""Tiles of sparse attention: `launch_config("sparse_mla_" + layout, tokens, (heads, topk))`.

block_m heads of one token a program, block_n slots a step, `split` programs a token's slots. Below
64 heads a program runs on mma, from 64 on warpgroup mma; splits fill the SMs of an H100 once.
"""

from functools import partial

from minidsv.kernels.tile import Rule, Tile

SMS = 132
MOST_SPLITS = 32
Field = tuple[int, int, int, int]  # block_m, block_n, num_warps, num_stages
WIDE: dict[str, Field] = {"bf16": (64, 64, 8, 2), "fp8": (64, 64, 8, 3), "flat": (64, 64, 8, 3)}
NARROW: dict[str, Field] = {"bf16": (16, 64, 8, 3), "fp8": (16, 64, 8, 3), "flat": (16, 64, 8, 3)}


def split_for(programs: int, steps: int) -> int:
    """The largest power of two that keeps `programs` times it within one wave and `steps` >= 1."""
    split = 1
    while split < MOST_SPLITS and 2 * split <= steps and 2 * split * programs <= SMS:
        split *= 2
    return split


def _rule(layout: str, tokens: int, dims: tuple[int, ...]) -> Tile:
    heads, topk = dims
    wide = heads > 32 and tokens * -(-heads // 64) >= 16
    block_m, block_n, warps, stages = (WIDE if wide else NARROW)[layout]
    programs = max(1, tokens * -(-heads // block_m))
    return Tile(block_m, block_n, 1, split_for(programs, -(-topk // block_n)), warps, stages)


TILES: dict[str, Rule] = {f"sparse_mla_{layout}": partial(_rule, layout) for layout in WIDE}
