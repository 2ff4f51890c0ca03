"""Tiles of the indexer's scores and selection.

index_logits   dims (requests, max_seq_len, heads): block_m rows, block_n keys a program,
               `split` programs a row that take the blocks in turn
select_topk    dims (columns, k): block_n >= both, the whole of a row, or CHUNK
select_long    dims (columns, k): block_m scores a program, `split` programs a row at most, block_k
               scores in a row's sample, block_n in the end
all_slots      dims (): block_n positions a program
"""

from dataclasses import replace

from minidsv.kernels.tile import Rule, Tile

SMS = 132
SELECT_WARPS = {1024: 2, 2048: 4, 4096: 8, 8192: 16}  # by scores in registers
CHUNK = 8192  # a longer row takes several programs
ANY = 1 << 30
LONG_ROWS = (  # up to so many columns and rows (H200); samples that mislead one row in 1000 at most
    (32_768, 16, Tile(2048, 4096, 2048, split=16, num_warps=16)),
    (32_768, ANY, Tile(8192, 4096, 2048, split=4, num_warps=16)),
    (98_304, 2, Tile(2048, 4096, 4096, split=64, num_warps=16)),
    (131_072, 2, Tile(4096, 4096, 8192, split=32, num_warps=16)),
    (131_072, 16, Tile(8192, 4096, 8192, split=16, num_warps=16)),
    (131_072, ANY, Tile(8192, 8192, 2048, split=16, num_warps=16)),
    (1 << 20, ANY, Tile(8192, 8192, 8192, split=128, num_warps=16)),
)
MAX_SCORES = LONG_ROWS[-1][0]  # of a row
MAX_LONG_TOPK = LONG_ROWS[-1][2].block_n // 2  # of rows beyond CHUNK
ALL_SLOTS_TILE = Tile(block_n=1024)

ONE = Tile(1, 64, num_warps=4, num_stages=3)
STREAM = Tile(1, 128, num_warps=4, num_stages=2)
SHARED = Tile(4, 64, num_warps=4, num_stages=2)
LOGITS_TILES = (ONE, STREAM, SHARED)


def index_logits(m: int, dims: tuple[int, ...]) -> Tile:
    """One row a program while requests bring few, else several that share a request's keys."""
    requests, length, _ = dims
    few = STREAM if m * length > 128 * SMS else ONE
    tile = SHARED if m >= 4 * requests else few
    blocks = -(-length // tile.block_n)
    share = -(-blocks * -(-m // tile.block_m) // (4 * SMS))  # blocks a program: 4 of them an SM
    return replace(tile, split=-(-blocks // max(1, share)))


def select_topk(m: int, dims: tuple[int, ...]) -> Tile:
    block = min((b for b in SELECT_WARPS if b >= max(dims)), default=CHUNK)
    return Tile(block_n=block, num_warps=SELECT_WARPS[block])


def select_long(m: int, dims: tuple[int, ...]) -> Tile:
    columns, k = dims
    for most_columns, most_rows, tile in LONG_ROWS:
        if columns <= most_columns and m <= most_rows and 2 * k <= tile.block_n:
            return tile
    raise ValueError(
        f"top {k} of {columns} scores: want k <= {MAX_LONG_TOPK} and at most {MAX_SCORES} scores"
    )


def all_slots(m: int, dims: tuple[int, ...]) -> Tile:
    return ALL_SLOTS_TILE


TILES: dict[str, Rule] = {
    "index_logits": index_logits,
    "select_topk": select_topk,
    "select_long": select_long,
    "all_slots": all_slots,
}
