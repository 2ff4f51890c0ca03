"""Tiles of the indexer's scores and selection.

index_logits   dims (requests, max_seq_len, heads): block_m rows, block_n keys a program,
               `split` programs a row that take the blocks in turn
select_topk    dims (columns, k): block_n >= both, the whole of a row, or CHUNK
sift_topk      dims (columns, k): block_n scores a program, block_k in the row's sample
settle_topk    dims (columns, k): block_n scores in the end, of up to block_k sifting programs
all_slots      dims (): block_n positions a program
"""

from dataclasses import replace

from minidsv.kernels.tile import Rule, Tile

SMS = 132


def _of(block_n: int, block_k: int, num_warps: int) -> Tile:
    return Tile(block_n=block_n, block_k=block_k, num_warps=num_warps)


SELECT_WARPS = {1024: 2, 2048: 4, 4096: 8, 8192: 16}  # by scores in registers
CHUNK = 8192  # a longer row takes two launches
ANY = 1 << 30
LONG_ROWS = (  # up to so many columns and rows: sift_topk, settle_topk (H200)
    (32_768, ANY, _of(2048, 2048, 4), _of(4096, 16, 8)),
    (131_072, 2, _of(4096, 8192, 16), _of(4096, 32, 8)),
    (131_072, ANY, _of(4096, 2048, 8), _of(8192, 32, 16)),
    (1 << 20, ANY, _of(8192, 16384, 8), _of(8192, 128, 16)),
)
MAX_SCORES = LONG_ROWS[-1][0]  # of a row
MAX_LONG_TOPK = LONG_ROWS[-1][3].block_n // 2  # of rows beyond CHUNK
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


def _long_row(m: int, dims: tuple[int, ...]) -> tuple[Tile, Tile]:
    columns, k = dims
    for most_columns, most_rows, sift, settle in LONG_ROWS:
        if columns <= most_columns and m <= most_rows and 2 * k <= settle.block_n:
            return sift, settle
    raise ValueError(
        f"top {k} of {columns} scores: want k <= {MAX_LONG_TOPK} and at most {MAX_SCORES} scores"
    )


def sift_topk(m: int, dims: tuple[int, ...]) -> Tile:
    return _long_row(m, dims)[0]


def settle_topk(m: int, dims: tuple[int, ...]) -> Tile:
    return _long_row(m, dims)[1]


def all_slots(m: int, dims: tuple[int, ...]) -> Tile:
    return ALL_SLOTS_TILE


TILES: dict[str, Rule] = {
    "index_logits": index_logits,
    "select_topk": select_topk,
    "sift_topk": sift_topk,
    "settle_topk": settle_topk,
    "all_slots": all_slots,
}
