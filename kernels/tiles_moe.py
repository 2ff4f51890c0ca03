"""Tiles of the router and the MLPs, by tokens and weights. No torch, no triton in here.

`block_m` tokens, `block_n` rows of the weight, `block_k` columns a step.
"""

from minidsv.kernels.tile import Rule, Tile

# The router of one token; that of more is a `linear` of tiles_gemm.
ROUTER_TILE = Tile(block_n=2, num_warps=8)
NORM_ROUTER_TILE = Tile(block_n=2, block_k=64, num_warps=8)  # block_k: of the sum, to write

LONE_MANY = Tile(block_m=1, block_n=4, block_k=1024, num_warps=4, num_stages=1)
LONE_FEW = Tile(block_m=1, block_n=2, block_k=2048, num_warps=4, num_stages=1)
LONE_GATE_UP_SUMS = (  # with the columns that they are launched for
    (LONE_MANY, 7168),
    (LONE_FEW, 7168),
    (LONE_FEW, 256),  # the bundled model
)
LONE_DOWN = Tile(block_m=1, block_n=4, block_k=2048, num_warps=4, num_stages=1)
LONE_DOWN_NARROW = Tile(block_m=1, block_n=2, block_k=2048, num_warps=1, num_stages=1)
LONE_DOWN_SUMS = (  # with (inner, slots) that they are launched for
    (LONE_DOWN, 2048, 8),
    (LONE_DOWN, 18432, 0),
    (LONE_DOWN, 512, 0),  # the bundled model's dense layer
    (LONE_DOWN_NARROW, 256, 8),  # a shard of 8
    (LONE_DOWN_NARROW, 128, 2),  # the bundled model
)

DECODE = Tile(block_m=8, block_n=32, block_k=256, num_warps=2, num_stages=3)
DECODE_UNEVEN = Tile(block_m=8, block_n=32, block_k=128, num_warps=2, num_stages=6)
SOME = Tile(block_m=16, block_n=64, block_k=128, num_warps=4, num_stages=3)
MEDIUM = Tile(block_m=32, block_n=128, block_k=128, num_warps=4, num_stages=4)
WIDE = Tile(block_m=64, block_n=128, block_k=128, num_warps=8, num_stages=3)
PREFILL = Tile(block_m=128, block_n=128, block_k=128, num_warps=8, num_stages=3)
MLP_TILES = (DECODE, DECODE_UNEVEN, SOME, MEDIUM, WIDE, PREFILL)


def _by_tokens_an_expert(m: int, experts: int, top_k: int, columns: int) -> Tile:
    """A tile that the tokens of most experts fill once, so that weights are read once."""
    expected = m * top_k / experts
    most = (8, 16, 32, 80) if experts == 1 else (4, 6, 24, 80)
    decode = DECODE if columns % DECODE.block_k == 0 else DECODE_UNEVEN
    tiles = zip(most, (decode, SOME, MEDIUM, WIDE), strict=True)
    return next((tile for limit, tile in tiles if expected <= limit), PREFILL)


def moe_gate_up(m: int, dims: tuple[int, ...]) -> Tile:
    """dims (experts, top_k, hidden, inner); block_m 1: moe_lone_triton's."""
    experts, top_k, hidden, inner = dims
    if m == 1:
        return LONE_MANY if top_k * inner >= 8192 else LONE_FEW
    return _by_tokens_an_expert(m, experts, top_k, hidden)


def moe_down(m: int, dims: tuple[int, ...]) -> Tile:
    """dims (experts, top_k, hidden, inner); block_m 1: moe_lone_triton's."""
    experts, top_k, _, inner = dims
    if m == 1:
        return LONE_DOWN if inner > 256 else LONE_DOWN_NARROW
    return _by_tokens_an_expert(m, experts, top_k, inner)


TILES: dict[str, Rule] = {
    "moe_gate_up": moe_gate_up,
    "moe_down": moe_down,
}
