"""Tiles of the GEMM family, by tokens and the type of the weights. No torch, no triton in here.

    linear   block_m 1: the GEMV of gemv_triton; split > 1: gemm_triton's narrow form, one warp for
             each of `split` parts of 128 columns; else its wide form
    absorb   block_m tokens by block_n outputs of a head, block_k columns a step

A device holds a projection of few rows at once, which takes more bytes a program than many rows do.
"""

from dataclasses import dataclass

from minidsv.kernels.tile import Rule, Tile

FEW_ROWS = 4096  # fewer than these make too few programs in the tiles for many


@dataclass(frozen=True)
class Tiles:
    """Of one type of weights: the GEMV's and the narrow form's for few rows and many, the wide."""

    gemv: tuple[Tile, Tile]
    narrow: tuple[tuple[Tile, Tile], ...]
    wide: tuple[Tile, ...]

    def gemv_tiles(self, mixed: bool) -> tuple[Tile, ...]:
        """What a launch can take; one of `mixed` types, as fused_a_gemm is, has few rows."""
        return self.gemv[:1] if mixed else self.gemv

    def narrow_tiles(self, mixed: bool) -> tuple[Tile, ...]:
        few, many = zip(*self.narrow, strict=True)
        return few if mixed else few + many

    def wide_tiles(self, mixed: bool) -> tuple[Tile, ...]:
        return self.wide


FP8 = Tiles(
    gemv=(Tile(1, 4, 2048, num_stages=1), Tile(1, 8, 1024, num_stages=1)),
    narrow=(
        (Tile(8, 16, 128, split=4, num_stages=4), Tile(8, 32, 128, split=4)),
        (Tile(16, 16, 128, split=4, num_stages=4), Tile(16, 32, 128, split=4)),
    ),
    wide=(Tile(64, 64, 128), Tile(128, 128, 128, num_warps=8)),
)
BF16 = Tiles(
    gemv=(Tile(1, 4, 2048, num_stages=1), Tile(1, 8, 1024, num_stages=1)),
    narrow=(
        (Tile(8, 16, 128, split=4), Tile(8, 64, 128, split=4)),
        (Tile(16, 32, 128, split=4), Tile(16, 32, 128, split=4)),
    ),
    wide=(Tile(64, 64, 64, num_stages=4), Tile(128, 128, 64, num_warps=8)),
)
LINEAR = {1: FP8, 2: BF16}  # by bytes of a weight
ABSORB_SHORT = Tile(16, 128, 128, num_stages=2)  # heads that sum over at most 256 columns
ABSORB_LONG = Tile(16, 32, 512, num_stages=2)
ABSORB_MANY = (Tile(64, 128, 64), Tile(128, 128, 64, num_warps=8))


def _smallest(tiles: tuple[Tile, ...], m: int) -> Tile:
    """The first that holds m tokens; else the last."""
    return next((tile for tile in tiles if m <= tile.block_m), tiles[-1])


def linear(m: int, dims: tuple[int, ...]) -> Tile:
    """dims (bytes of a weight, rows of all projections)."""
    size, rows = dims
    tiles, many = LINEAR[size], rows >= FEW_ROWS
    if m <= 1:
        return tiles.gemv[many]
    narrow = tuple(pair[many] for pair in tiles.narrow)
    return _smallest(narrow if m <= narrow[-1].block_m else tiles.wide, m)


def absorb(m: int, dims: tuple[int, ...]) -> Tile:
    """dims (columns that a head sums over,)."""
    if m <= ABSORB_SHORT.block_m:
        return ABSORB_SHORT if dims[0] <= 256 else ABSORB_LONG
    return _smallest(ABSORB_MANY, m)


TILES: dict[str, Rule] = {"linear": linear, "absorb": absorb}
