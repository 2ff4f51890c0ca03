"""Tiles of the router and the MLPs, by tokens and weights. No torch, no triton in here.

`block_m` tokens, `block_n` rows of the weight, `block_k` columns a step.
"""

from minidsv.kernels.tile import Rule, Tile

# The router of one token; that of more is a `linear` of tiles_gemm.
ROUTER_TILE = Tile(block_n=2, num_warps=8)
NORM_ROUTER_TILE = Tile(block_n=2, block_k=64, num_warps=8)  # block_k: of the sum, to write

LONE_GATE_UP = Tile(block_m=1, block_n=4, block_k=1024, num_warps=4, num_stages=1)
LONE_DOWN = {  # by bytes of a weight
    1: Tile(block_m=1, block_n=4, block_k=1024, num_warps=2, num_stages=1),
    2: Tile(block_m=1, block_n=4, block_k=1024, num_warps=4, num_stages=1),
}
# of sums that would leave a step of LONE_DOWN half empty: 256 columns of each slot at once
LONE_DOWN_UNEVEN = Tile(block_m=1, block_n=4, block_k=2048, num_warps=8, num_stages=1)

DECODE = Tile(block_m=8, block_n=32, block_k=256, num_warps=2, num_stages=3)
DECODE_UNEVEN = Tile(block_m=8, block_n=32, block_k=128, num_warps=2, num_stages=6)
SOME = Tile(block_m=16, block_n=32, block_k=256, num_warps=2, num_stages=3)
SOME_UNEVEN = Tile(block_m=16, block_n=64, block_k=128, num_warps=4, num_stages=3)
MEDIUM = {  # by bytes of a weight
    1: Tile(block_m=32, block_n=128, block_k=128, num_warps=4, num_stages=2),
    2: Tile(block_m=32, block_n=128, block_k=64, num_warps=4, num_stages=4),
}
WIDE = {
    1: Tile(block_m=64, block_n=128, block_k=128, num_warps=4, num_stages=2),
    2: Tile(block_m=64, block_n=128, block_k=64, num_warps=4, num_stages=3),
}
PREFILL = Tile(block_m=128, block_n=128, block_k=64, num_warps=8, num_stages=3)
MLP_TILES = {
    size: (DECODE, DECODE_UNEVEN, SOME, SOME_UNEVEN, MEDIUM[size], WIDE[size], PREFILL)
    for size in (1, 2)
}

FP8_MLP = (  # with FP8 activations: gate_up, down
    (Tile(64, 256, 128, num_warps=8, num_stages=4), Tile(64, 256, 128, num_warps=8, num_stages=4)),
    (Tile(128, 256, 128, num_warps=16, num_stages=4), Tile(128, 256, 128, num_warps=16)),
)


def _by_tokens_an_expert(m: int, experts: int, top_k: int, columns: int, size: int) -> Tile:
    """A tile that the tokens of most experts fill once, so that weights are read once."""
    expected = m * top_k / experts
    most = (8, 16, 32, 80) if experts == 1 else (4, 12, 24, 80)
    even = columns % DECODE.block_k == 0
    few = (DECODE, SOME) if even else (DECODE_UNEVEN, SOME_UNEVEN)
    tiles = zip(most, (*few, MEDIUM[size], WIDE[size]), strict=True)
    return next((tile for limit, tile in tiles if expected <= limit), PREFILL)


def moe_gate_up(m: int, dims: tuple[int, ...]) -> Tile:
    """dims (experts, top_k, hidden, inner, bytes of a weight); block_m 1: moe_lone_triton's."""
    experts, top_k, hidden, _, size = dims
    if m == 1:
        return LONE_GATE_UP
    return _by_tokens_an_expert(m, experts, top_k, hidden, size)


def moe_down(m: int, dims: tuple[int, ...]) -> Tile:
    """dims as moe_gate_up's."""
    experts, top_k, _, inner, size = dims
    if m == 1:
        tile = LONE_DOWN[size]
        uneven = experts > 1 and inner > tile.block_k and inner % tile.block_k
        return LONE_DOWN_UNEVEN if uneven else tile
    return _by_tokens_an_expert(m, experts, top_k, inner, size)


def moe_gate_up_fp8(m: int, dims: tuple[int, ...]) -> Tile:
    """dims (experts, top_k)."""
    return FP8_MLP[m * dims[1] / dims[0] > 96][0]


def moe_down_fp8(m: int, dims: tuple[int, ...]) -> Tile:
    """dims as moe_gate_up_fp8's."""
    return FP8_MLP[m * dims[1] / dims[0] > 96][1]


TILES: dict[str, Rule] = {
    "moe_gate_up": moe_gate_up,
    "moe_down": moe_down,
    "moe_gate_up_fp8": moe_gate_up_fp8,
    "moe_down_fp8": moe_down_fp8,
}
