"""Tiles of the GEMM family, by tokens and the type of the weights. No torch, no triton in here.

    linear   block_m 1: the GEMV of gemv_triton; block_k > 128: gemm_triton's narrow form, a warp
             for each 128 columns of a step; else its wide form; `split` programs share a sum
    absorb   block_m tokens by block_n outputs of a head, block_k columns a step; so attention_prep

A device holds a projection of few rows at once, which takes more bytes a program than many rows do.
"""

from dataclasses import dataclass, replace

from minidsv.kernels.tile import Rule, Tile

MAX_PARTS = 16  # of a sum
FEW_ROWS = 4096  # fewer than these make too few programs in the tiles for many
SHORT = 2048  # columns of a sum that is not shared out
HUGE_TOKENS = 512  # fewer make too few programs in the widest tiles
NORMED_TOKENS = 1  # each program would read the residual of more tokens, and the update, from L2


@dataclass(frozen=True)
class Tiles:
    """Of projections of one type of weight, few or many rows, long or short sums."""

    gemv: Tile
    narrow: tuple[Tile, ...]  # rising block_m
    wide: tuple[Tile, ...]
    huge: tuple[Tile, ...] = ()  # one, or none

    def for_tokens(self, m: int) -> Tile:
        """The first that holds m tokens; else the last, or from HUGE_TOKENS on the huge one."""
        if self.huge and m >= HUGE_TOKENS:
            return self.huge[0]
        tiles = (self.gemv, *self.narrow, *self.wide)
        return next((tile for tile in tiles if m <= tile.block_m), tiles[-1])


LONG_SUM = Tile(1, 4, 2048, num_stages=1)
BF16_SUM = Tile(1, 8, 1024, num_stages=1)
LAST = Tile(128, 128, 64, num_warps=8)  # two programs fit a processor
HUGE = Tile(256, 128, 64, num_warps=8, num_stages=4)
FEW_LAST = Tile(128, 64, 128, num_stages=2)
BF16_SOME = Tile(64, 64, 64, num_stages=6)
FP8_FEW_LONG = Tiles(
    LONG_SUM,
    (Tile(8, 16, 512, split=2),),
    (
        Tile(16, 64, 128, split=7, num_stages=4),
        Tile(32, 64, 128, split=14),
        Tile(64, 64, 128, split=7),
        FEW_LAST,
    ),
)
FP8_FEW_SHORT = Tiles(
    LONG_SUM,
    (Tile(8, 16, 512, num_stages=4),),
    (Tile(16, 64, 128, num_stages=4), Tile(64, 64, 128), FEW_LAST),
)
FP8_MANY_LONG = Tiles(
    LONG_SUM,
    (Tile(8, 16, 512, num_stages=4), Tile(16, 32, 256, split=2, num_warps=2, num_stages=4)),
    (
        Tile(32, 64, 128, split=7, num_stages=4),
        Tile(64, 128, 128, split=7, num_warps=8, num_stages=2),
        LAST,
    ),
    (HUGE,),
)
FP8_MANY_SHORT = Tiles(
    Tile(1, 8, 512, num_warps=2, num_stages=1),
    (Tile(8, 32, 256, num_warps=2, num_stages=4), Tile(16, 32, 256, num_warps=2, num_stages=4)),
    (Tile(32, 128, 64, num_stages=4), Tile(64, 128, 64), LAST),
    (HUGE,),
)
BF16_FEW_LONG = Tiles(
    LONG_SUM,
    (Tile(8, 16, 512, split=7), Tile(16, 16, 256, split=14, num_warps=2)),
    (replace(BF16_SOME, split=14), LAST),
)
BF16_FEW_SHORT = Tiles(LONG_SUM, (Tile(8, 16, 512), Tile(16, 16, 256, num_warps=2)), (BF16_SOME,))
BF16_MANY = Tiles(
    BF16_SUM,
    (Tile(8, 32, 256, num_warps=2, num_stages=4),),
    (
        Tile(16, 64, 128, num_stages=4),
        Tile(32, 64, 128, num_stages=4),
        Tile(64, 128, 64, num_stages=4),
        LAST,
    ),
)
LINEAR = {  # by bytes of a weight; few rows, many rows; long sums, short sums
    1: ((FP8_FEW_LONG, FP8_FEW_SHORT), (FP8_MANY_LONG, FP8_MANY_SHORT)),
    2: ((BF16_FEW_LONG, BF16_FEW_SHORT), (BF16_MANY, BF16_MANY)),
}
FP8_LINEAR = Tile(64, 128, 128)  # with FP8 activations
TOKEN_TILES = 16  # that programs which run together share, there
ABSORB_SHORT = Tile(16, 128, 128, num_stages=1)  # heads that sum over at most 256 columns
ABSORB_LONG = Tile(16, 32, 512, num_stages=1)
ABSORB_MANY = (Tile(64, 128, 64), Tile(128, 128, 64, num_warps=8))  # in one pipeline
PREPARE = (ABSORB_SHORT, Tile(64, 128, 64, num_stages=2))
PREPARED_TOKENS = PREPARE[-1].block_m  # most that attention_prep takes in one launch


def linear(m: int, dims: tuple[int, ...]) -> Tile:
    """dims (bytes of a weight, rows of all projections, columns)."""
    size, rows, columns = dims
    return LINEAR[size][rows >= FEW_ROWS][columns <= SHORT].for_tokens(m)


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
