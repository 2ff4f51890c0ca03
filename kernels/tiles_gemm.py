"""Tiles of the GEMM family, by tokens and the type of the weights. No torch, no triton in here.

linear   block_m 1: the GEMV of gemv_triton; split > 1: gemm_triton's narrow form, one warp for
         each of `split` parts of 128 columns; else its wide form
absorb   block_m tokens by block_n outputs of a head, block_k columns a step
"""

from minidsv.kernels.tile import Rule, Tile

GEMV = {1: Tile(1, 4, 2048, num_stages=1), 2: Tile(1, 4, 1024, num_stages=1)}  # by bytes a weight
NARROW = {
    1: (Tile(8, 16, 128, split=4, num_stages=4), Tile(16, 16, 128, split=4, num_stages=4)),
    2: (Tile(8, 16, 128, split=4), Tile(16, 16, 128, split=4)),
}
WIDE = {
    1: (Tile(64, 64, 128, num_stages=3), Tile(128, 128, 128, num_warps=8)),
    2: (Tile(64, 64, 64, num_stages=4), Tile(128, 128, 64, num_warps=8)),
}
ABSORB_FEW = (Tile(16, 128, 128, num_stages=2), Tile(16, 32, 512, num_stages=2))  # K to 256, above
ABSORB_MANY = (Tile(64, 128, 64), Tile(128, 128, 64, num_warps=8))


def _smallest(tiles: tuple[Tile, ...], m: int) -> Tile:
    """The first that holds m tokens; else the last."""
    return next((tile for tile in tiles if m <= tile.block_m), tiles[-1])


def linear(m: int, dims: tuple[int, ...]) -> Tile:
    """dims: (bytes of a weight,)."""
    size = dims[0]
    if m <= 1:
        return GEMV[size]
    narrow = NARROW[size]
    return _smallest(narrow if m <= narrow[-1].block_m else WIDE[size], m)


def absorb(m: int, dims: tuple[int, ...]) -> Tile:
    """dims: (columns that a head sums over,)."""
    if m <= ABSORB_FEW[0].block_m:
        return ABSORB_FEW[dims[0] > 256]
    return _smallest(ABSORB_MANY, m)


TILES: dict[str, Rule] = {"linear": linear, "absorb": absorb}
