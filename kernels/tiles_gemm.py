"""Tiles of the GEMM family, by tokens and the type of the weights. No torch, no triton in here.

    linear   block_m 1: the GEMV of gemv_triton; split > 1: gemm_triton's narrow form, one warp for
             each of `split` parts of 128 columns; else its wide form
    absorb   block_m tokens by block_n outputs of a head, block_k columns a step; so attention_prep

A device holds a projection of few rows at once, which takes more bytes a program than many rows do.
"""

from dataclasses import dataclass

from minidsv.kernels.tile import Rule, Tile

SHORT = 2048  # columns of a short sum
FEW_ROWS = 4096  # fewer than these make too few programs in the tiles for many
NORMED_TOKENS = 1  # each program would read the residual of more tokens, and the update, from L2


@dataclass(frozen=True)
class Tiles:
    """Of projections of one type of weight and few or many rows."""

    gemv: tuple[Tile, Tile]  # of short and of long sums
    narrow: tuple[Tile, ...]  # rising block_m
    wide: tuple[Tile, ...]

    def for_tokens(self, m: int, columns: int) -> Tile:
        """The first that holds m tokens; else the last."""
        if m <= 1:
            return self.gemv[columns > SHORT]
        tiles = (*self.narrow, *self.wide)
        return next((tile for tile in tiles if m <= tile.block_m), tiles[-1])


LONG_SUM = Tile(1, 4, 2048, num_stages=1)
FP8_WIDE = (Tile(64, 64, 128), Tile(128, 128, 128, num_warps=8))
BF16_WIDE = (Tile(64, 64, 64, num_stages=4), Tile(128, 128, 64, num_warps=8))
LINEAR = {  # by bytes of a weight; few rows, many rows
    1: (
        Tiles(
            (LONG_SUM, LONG_SUM),
            (
                Tile(8, 16, 128, split=4, num_stages=4),
                Tile(16, 16, 128, split=4, num_stages=4),
                Tile(32, 32, 128, split=4),
            ),
            FP8_WIDE,
        ),
        Tiles(
            (Tile(1, 8, 512, num_warps=2, num_stages=1), LONG_SUM),
            (Tile(8, 32, 128, split=4), Tile(16, 32, 128, split=4)),
            FP8_WIDE,
        ),
    ),
    2: (
        Tiles(
            (LONG_SUM, LONG_SUM),
            (Tile(8, 16, 128, split=4), Tile(16, 32, 128, split=4)),
            BF16_WIDE,
        ),
        Tiles(
            (Tile(1, 8, 1024, num_stages=1), Tile(1, 8, 1024, num_stages=1)),
            (Tile(8, 64, 128, split=4), Tile(16, 32, 128, split=4)),
            BF16_WIDE,
        ),
    ),
}
ABSORB_SHORT = Tile(16, 128, 128, num_stages=1)  # heads that sum over at most 256 columns
ABSORB_LONG = Tile(16, 32, 512, num_stages=1)
ABSORB_MANY = (Tile(64, 128, 64), Tile(128, 128, 64, num_warps=8))
PREPARE = (ABSORB_SHORT, Tile(64, 128, 64, num_stages=2))
PREPARED_TOKENS = PREPARE[-1].block_m  # most that attention_prep takes in one launch


def linear(m: int, dims: tuple[int, ...]) -> Tile:
    """dims (bytes of a weight, rows of all projections, columns)."""
    size, rows, columns = dims
    return LINEAR[size][rows >= FEW_ROWS].for_tokens(m, columns)


def takes_norm(tile: Tile) -> bool:
    """Whether a projection in this tile norms its operand itself; else a launch of its own does."""
    return tile.block_m <= NORMED_TOKENS


def absorb(m: int, dims: tuple[int, ...]) -> Tile:
    """dims (columns that a head sums over,)."""
    if m <= ABSORB_SHORT.block_m:
        return ABSORB_SHORT if dims[0] <= 256 else ABSORB_LONG
    return ABSORB_MANY[m > ABSORB_MANY[0].block_m]


def attention_prep(m: int, dims: tuple[int, ...]) -> Tile:
    """dims (heads, C): W_UK's, which most programs multiply."""
    return PREPARE[m > PREPARE[0].block_m]


TILES: dict[str, Rule] = {"linear": linear, "absorb": absorb, "attention_prep": attention_prep}
