"""Tiles of the router and the MLPs, by tokens and weights. No torch, no triton in here.

`block_m` tokens, `block_n` rows of the weight, `block_k` columns a step.
"""

from minidsv.kernels.tile import Rule, Tile

GEMV_TOKENS = 16  # most tokens that the router multiplies on CUDA cores

ROUTER_LONE = Tile(block_m=1, block_n=2, num_warps=8)
ROUTER_FEW = Tile(block_m=4, block_n=2, num_warps=8)
ROUTER_MANY = Tile(block_m=16, block_n=32, block_k=256, num_warps=4, num_stages=4)
ROUTER_PREFILL = Tile(block_m=64, block_n=128, block_k=64, num_warps=4, num_stages=4)
ROUTER_TILES = (ROUTER_LONE, ROUTER_FEW, ROUTER_MANY, ROUTER_PREFILL)

# With the norm before: block_k columns of the sum a program writes, split parts of K as below.
NORM_ROUTER_LONE = Tile(block_m=1, block_n=2, block_k=64, num_warps=8)
NORM_ROUTER_FEW = Tile(block_m=4, block_n=2, block_k=64, num_warps=16)
NORM_ROUTER_SOME = Tile(block_m=16, block_n=8, block_k=256, split=4, num_warps=4, num_stages=3)
NORM_ROUTER_TILES = (NORM_ROUTER_LONE, NORM_ROUTER_FEW, NORM_ROUTER_SOME)
NORM_ROUTER_TOKENS = 64  # more: the norm has a launch of its own, the sum is read once

FEW_TOKENS = 8  # columns of the tiles for few tokens, whose experts one program sums

# By bytes of a weight. `split` parts of 128 columns a step, one a warp; gate_up has block_n rows of
# gate and as many of up. All of down's programs run at once: few stages, for two a multiprocessor.
FEW_GATE_UP: dict[int, tuple[Tile, ...]] = {
    1: (Tile(FEW_TOKENS, 16, split=4, num_stages=4),),
    2: (Tile(FEW_TOKENS, 16, split=4, num_stages=3),),
}
FEW_DOWN: dict[int, tuple[Tile, ...]] = {
    1: (Tile(FEW_TOKENS, 32, split=4, num_stages=4), Tile(FEW_TOKENS, 16, split=4, num_stages=4)),
    2: (Tile(FEW_TOKENS, 32, split=4, num_stages=3), Tile(FEW_TOKENS, 16, split=4, num_stages=3)),
}

DECODE = Tile(block_m=16, block_n=64, block_k=128, num_warps=4, num_stages=5)
MEDIUM = Tile(block_m=32, block_n=128, block_k=128, num_warps=4, num_stages=4)
WIDE = Tile(block_m=64, block_n=128, block_k=128, num_warps=8, num_stages=3)
PREFILL = Tile(block_m=128, block_n=128, block_k=128, num_warps=8, num_stages=3)
MLP_TILES = (DECODE, MEDIUM, WIDE, PREFILL)


def router_gemm(m: int, dims: tuple[int, ...]) -> Tile:
    """dims (hidden, experts): all of K at once for few tokens, then tensor cores."""
    if m <= GEMV_TOKENS:
        return ROUTER_LONE if m <= 1 else ROUTER_FEW
    return ROUTER_MANY if m <= 512 else ROUTER_PREFILL


def norm_router_gemm(m: int, dims: tuple[int, ...]) -> Tile:
    """dims (hidden, experts), up to NORM_ROUTER_TOKENS."""
    if m <= GEMV_TOKENS:
        return NORM_ROUTER_LONE if m <= 1 else NORM_ROUTER_FEW
    return NORM_ROUTER_SOME


def _by_tokens_an_expert(m: int, experts: int, top_k: int) -> Tile:
    """A tile that the tokens of an expert fill once, so that its weights are read once."""
    expected = m * top_k / experts
    for most, tile in ((6, DECODE), (24, MEDIUM), (80, WIDE)):
        if expected <= most:
            return tile
    return PREFILL


def few_gate_up(m: int, dims: tuple[int, ...]) -> Tile:
    """dims (bytes of a weight, hidden)."""
    return FEW_GATE_UP[dims[0]][0]


def few_down(m: int, dims: tuple[int, ...]) -> Tile:
    """dims (bytes of a weight, hidden): fewer rows a program where there are few in all."""
    return FEW_DOWN[dims[0]][dims[1] < 4096]


def moe(m: int, dims: tuple[int, ...]) -> Tile:
    """dims (experts, top_k): gate_up and down beyond FEW_TOKENS."""
    return _by_tokens_an_expert(m, *dims)


TILES: dict[str, Rule] = {
    "router_gemm": router_gemm,
    "norm_router_gemm": norm_router_gemm,
    "few_gate_up": few_gate_up,
    "few_down": few_down,
    "moe": moe,
}
