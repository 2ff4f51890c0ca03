"""Tiles of the router and the MLPs, by tokens and weights. No torch, no triton in here.

`block_m` tokens, `block_n` rows of the weight, `block_k` columns a step.
"""

from minidsv.kernels.tile import Rule, Tile

# The router of one token; that of more is a `linear` of tiles_gemm.
ROUTER_TILE = Tile(block_n=2, num_warps=8)
NORM_ROUTER_TILE = Tile(block_n=2, block_k=64, num_warps=8)  # block_k: of the sum, to write

DECODE = Tile(block_m=16, block_n=64, block_k=128, num_warps=4, num_stages=5)
NARROW = Tile(block_m=16, block_n=32, block_k=128, num_warps=4, num_stages=6)
MEDIUM = Tile(block_m=32, block_n=128, block_k=128, num_warps=4, num_stages=4)
WIDE = Tile(block_m=64, block_n=128, block_k=128, num_warps=8, num_stages=3)
PREFILL = Tile(block_m=128, block_n=128, block_k=128, num_warps=8, num_stages=3)
MLP_TILES = (DECODE, NARROW, MEDIUM, WIDE, PREFILL)


def _by_tokens_an_expert(m: int, experts: int, top_k: int) -> Tile:
    """A tile that the tokens of an expert fill once, so that its weights are read once."""
    expected = m * top_k / experts
    for most, tile in ((6, DECODE), (24, MEDIUM), (80, WIDE)):
        if expected <= most:
            return tile
    return PREFILL


def moe_gate_up(m: int, dims: tuple[int, ...]) -> Tile:
    """dims (experts, top_k, hidden, inner): few rows make many programs for a narrow shard."""
    experts, top_k, _, inner = dims
    tile = _by_tokens_an_expert(m, experts, top_k)
    return NARROW if tile is DECODE and m * top_k * inner <= 8 * 512 else tile


def moe_down(m: int, dims: tuple[int, ...]) -> Tile:
    """dims (experts, top_k, hidden, inner)."""
    return _by_tokens_an_expert(m, *dims[:2])


TILES: dict[str, Rule] = {
    "moe_gate_up": moe_gate_up,
    "moe_down": moe_down,
}
