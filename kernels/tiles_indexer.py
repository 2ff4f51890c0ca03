"""Tiles of the indexer's scores and selection.

index_logits   dims (requests, max_seq_len, heads): block_m rows, block_n keys a program,
               `split` programs a row that take the blocks in turn
thin_topk      dims (columns, k): block_n scores a chunk, of which k are kept
select_topk    dims (columns, k): block_n >= both, the whole of a row
all_slots      dims (): block_n positions a program
"""

from dataclasses import replace

from minidsv.kernels.tile import Rule, Tile

SMS = 132
SELECT_WARPS = {1024: 4, 2048: 4, 4096: 8, 8192: 16}  # by scores in registers
CHUNK = 8192  # a longer row is thinned, so many scores a program
ALL_SLOTS_TILE = Tile(block_n=1024)

ONE = Tile(1, 64, num_warps=4, num_stages=3)
STREAM = Tile(1, 128, num_warps=4, num_stages=3)
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


def thin_topk(m: int, dims: tuple[int, ...]) -> Tile:
    return Tile(block_n=CHUNK, num_warps=SELECT_WARPS[CHUNK])


def select_topk(m: int, dims: tuple[int, ...]) -> Tile:
    block = min(b for b in SELECT_WARPS if b >= max(dims))
    return Tile(block_n=block, num_warps=SELECT_WARPS[block])


def all_slots(m: int, dims: tuple[int, ...]) -> Tile:
    return ALL_SLOTS_TILE


TILES: dict[str, Rule] = {
    "index_logits": index_logits,
    "thin_topk": thin_topk,
    "select_topk": select_topk,
    "all_slots": all_slots,
}
