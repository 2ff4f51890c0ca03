"""Tiles of the small operators, by tokens and sizes. No torch, no triton in here.

`block_m` rows (heads, groups, tokens) and `block_n` columns a program.
"""

from minidsv.kernels.tile import Rule, Tile

NORM_TILES: dict[str, tuple[Tile, ...]] = {
    "rms_norm": (
        Tile(block_n=128, num_warps=1),
        Tile(block_n=512, num_warps=2),
        Tile(block_n=2048, num_warps=8),
        Tile(block_n=8192, num_warps=16),
    ),
    "add_rms_norm": (
        Tile(block_n=256, num_warps=1),
        Tile(block_n=2048, num_warps=8),
        Tile(block_n=8192, num_warps=16),
    ),
    "layer_norm": (Tile(block_n=128, num_warps=1),),
}

TABLES: dict[str, tuple[Tile, ...]] = {
    "apply_rope": (Tile(block_m=16, num_warps=4),),
    "rope_cos_sin": (Tile(block_m=4, num_warps=4),),
    "quantize_groups": (Tile(block_m=4, num_warps=2), Tile(block_m=16, num_warps=4)),
    "rope_quantize": (Tile(block_m=4, num_warps=4), Tile(block_m=16, num_warps=4)),
    "set_mla_kv_buffer": (Tile(num_warps=4),),
    "norm_rope_set_mla_kv_buffer": (Tile(num_warps=4),),
    "index_q_prep": (Tile(block_m=16, num_warps=4), Tile(block_m=32, num_warps=4)),
    "index_k_write": (Tile(block_m=16, num_warps=4),),
    "embedding": (Tile(block_n=256, num_warps=1), Tile(block_n=1024, num_warps=4)),
    "argmax": (Tile(block_n=1024, num_warps=4), Tile(block_n=4096, num_warps=8)),
}


def _norm(op: str) -> Rule:
    """dims (D,): the smallest tile that holds a row; a longer row widens the last one."""

    def rule(m: int, dims: tuple[int, ...]) -> Tile:
        for tile in NORM_TILES[op]:
            if dims[0] <= tile.block_n:
                return tile
        return Tile(block_n=1 << (dims[0] - 1).bit_length(), num_warps=16)

    return rule


def _few_or_many(op: str, most: int) -> Rule:
    """The first tile up to `most` tokens, the last beyond."""

    def rule(m: int, dims: tuple[int, ...]) -> Tile:
        return TABLES[op][0 if m <= most else -1]

    return rule


TILES: dict[str, Rule] = {op: _norm(op) for op in NORM_TILES} | {
    op: _few_or_many(op, 8) for op in TABLES
}
