"""Tiles of the GEMM family; no torch, no triton."""

from minidsv.kernels.tile import Rule, Tile


def linear(m: int, dims: tuple[int, ...]) -> Tile:
    """dims: (rows of all projections, K, bytes of a weight)."""
    rows, k, size = dims
    if m <= 1:
        return Tile(1, 8, 2048 // size, num_stages=1)
    if m <= 16:
        return Tile(8 if m <= 8 else 16, 16, 128, split=4)
    block_k = 128 // size
    if m <= 64:
        return Tile(64, 64, block_k, num_warps=4, num_stages=4)
    return Tile(128, 128, block_k, num_warps=8)


def absorb(m: int, dims: tuple[int, ...]) -> Tile:
    """dims: (outputs, K) of a head."""
    n, k = dims
    if m <= 16:
        return Tile(16, *((32, 512) if k > 256 else (128, 128)), num_warps=4)
    return Tile(64 if m <= 64 else 128, 128, 64, num_warps=4 if m <= 64 else 8)


TILES: dict[str, Rule] = {"linear": linear, "absorb": absorb}
