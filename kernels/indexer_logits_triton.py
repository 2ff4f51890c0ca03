"""Triton kernel under `paged_index_logits`.

A program scores ROWS consecutive rows against every `num_programs(1)`-th block of keys: one product
keys [BLOCK, D] x queries [D, ROWS * H] on the tensor cores (e4m3 x e4m3 for an fp8 cache, whose 128
products a tensor core sums with about 14 bits), ReLU, gates, the sum over heads, the keys' scales.
With one row it streams the cache; with several, rows of one request share its keys, and a program
that meets several requests goes through them in turn. Pages are looked up key by key, in int64.
Nothing is constant over a replay, so every access follows the wait.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from minidsv.kernels.constants import PAGE_SIZE
from minidsv.kernels.launch import KernelSpec, Row, pdl_begin, pdl_end
from minidsv.kernels.launch_config import launch_config
from minidsv.kernels.pdl import PdlMode
from minidsv.kernels.tile import Tile
from minidsv.kernels.tiles_indexer import LOGITS_TILES


@triton.jit
def _score(
    dots, gates, BLOCK: tl.constexpr, ROWS: tl.constexpr, H: tl.constexpr
):  # dots [BLOCK, ROWS * H], gates [ROWS * H]
    """sum over heads of gate * relu(dot), NaN kept: [BLOCK, ROWS]."""
    gated = tl.maximum(dots, 0.0, propagate_nan=tl.PropagateNan.ALL) * gates[None, :]
    if ROWS == 1:
        return tl.sum(gated, 1)[:, None]
    return tl.sum(tl.reshape(gated, (BLOCK, ROWS, H)), 2)


@triton.jit(
    do_not_specialize=["num_rows", "pages"],
    do_not_specialize_on_alignment=["block_table", "seq_lens", "request_index"],
)
def _index_logits_kernel(
    logits, q, weights, keys, scales, block_table, seq_lens, request_index,
    num_rows, logits_stride, page_stride, pages,
    H: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    PAGE: tl.constexpr, SCALED: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    program = tl.num_programs(0) - 1 - tl.program_id(0)  # a prompt's last rows see most: first
    first = program.to(tl.int64) * ROWS
    step = tl.num_programs(1) * BLOCK
    rows, d = first + tl.arange(0, ROWS), tl.arange(0, D)
    heads = first * H + tl.arange(0, ROWS * H)
    real = heads < num_rows * H
    STREAM: tl.constexpr = BLOCK > 64  # of long contexts, all SMs to the end: faster alone
    pdl_begin(PDL, LATE=STREAM)
    lengths = tl.load(seq_lens + rows, mask=rows < num_rows, other=0).to(tl.int32)
    requests = tl.load(request_index + rows, mask=rows < num_rows, other=-1)
    queries = tl.load(q + heads[:, None] * D + d[None, :], mask=real[:, None], other=0.0)
    gates = tl.load(weights + heads, mask=real, other=0.0)
    for lead in range(ROWS):
        row = tl.minimum(first + lead, num_rows - 1)
        request = tl.load(request_index + row).to(tl.int64)
        new = (lead == 0) | (request != tl.load(request_index + tl.maximum(row - 1, first)))
        if new & (first + lead < num_rows):
            mine = requests == request
            length = tl.max(tl.where(mine, lengths, 0), 0)
            for start in tl.range(tl.program_id(1) * BLOCK, length, step, num_stages=STAGES):
                s = start + tl.arange(0, BLOCK)
                page = tl.load(
                    block_table + request * pages + s // PAGE, mask=s < length, other=0
                ).to(tl.int64)
                key = keys + page * page_stride + s % PAGE * D
                dots = tl.dot(
                    tl.load(key[:, None] + d[None, :]), tl.trans(queries), input_precision="ieee"
                )
                score = _score(dots, gates, BLOCK, ROWS, H)
                if SCALED:
                    scale = scales + page * (page_stride // 4) + PAGE * D // 4 + s % PAGE
                    score *= tl.load(scale)[:, None]
                seen = mine[None, :] & (s[:, None] < lengths[None, :])
                tl.store(logits + rows[None, :] * logits_stride + s[:, None], score, mask=seen)
    pdl_end(PDL, LATE=STREAM)


def _row(tile: Tile, heads: int, keys: str, table: str = "*i64") -> Row:
    arguments: dict[str, str | int | float] = {
        "logits": "*fp32:16",
        "q": f"*{keys}:16",
        "weights": "*fp32:16",
        "keys": f"*{keys}:16",
        "scales": "*fp32:16",
        "block_table": table,
        "seq_lens": "*i64",
        "request_index": "*i64",
        "num_rows": "i32",
        "logits_stride": "i32:16",
        "page_stride": "i32:16",
        "pages": "i32",
    }
    sizes = _constants(tile, heads, 128, keys == "fp8e4nv")
    return Row(arguments | sizes, tile.num_warps, tile.num_stages)


def _constants(tile: Tile, heads: int, dim: int, scaled: bool) -> dict[str, int]:
    tiles = {"ROWS": tile.block_m, "BLOCK": tile.block_n, "STAGES": tile.num_stages}
    return tiles | {"H": heads, "D": dim, "PAGE": PAGE_SIZE, "SCALED": scaled}


_ROWS = [(tile, heads) for tile in LOGITS_TILES for heads in (64, 32)]
FP8 = KernelSpec(
    _index_logits_kernel,
    (
        *(_row(tile, heads, "fp8e4nv") for tile, heads in _ROWS),
        _row(LOGITS_TILES[0], 64, "fp8e4nv", "*i32"),
    ),
    fp_fusion=True,
)
BF16 = KernelSpec(
    _index_logits_kernel,
    (
        *(_row(tile, heads, "bf16") for tile, heads in _ROWS),
        _row(LOGITS_TILES[0], 64, "bf16", "*i32"),
    ),
    fp_fusion=True,
)
SPECS = (FP8, BF16)


def score(
    q: Tensor,
    weights: Tensor,
    buffer: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    request_index: Tensor,
    max_seq_len: int,
    mode: PdlMode,
) -> Tensor:
    """q [T, H, D] in the dtype of the keys -> fp32 [T, max_seq_len], rows 256 bytes aligned."""
    rows, heads, dim = q.shape
    scaled = buffer.dtype == torch.uint8
    keys = buffer.view(torch.float8_e4m3fn) if scaled else buffer
    assert q.dtype == keys.dtype, f"q {q.dtype}, keys {keys.dtype}"
    for name, x in (("q", q), ("weights", weights), ("buffer", buffer), ("seq_lens", seq_lens)):
        assert x.is_contiguous(), f"{name} has strides {x.stride()}: want contiguous"
    assert request_index.is_contiguous(), f"request_index has stride {request_index.stride()}"
    assert block_table.stride(1) == 1, f"block_table strides {block_table.stride()}"
    tile = launch_config("index_logits", rows, (block_table.shape[0], max_seq_len, heads))
    width = -(-max_seq_len // PAGE_SIZE) * PAGE_SIZE
    logits = torch.empty(rows, width, dtype=torch.float32, device=q.device)
    args = {
        "logits": logits,
        "q": q,
        "weights": weights,
        "keys": keys,
        "scales": buffer.view(torch.float32) if scaled else weights,
        "block_table": block_table,
        "seq_lens": seq_lens,
        "request_index": request_index,
        "num_rows": rows,
        "logits_stride": width,
        "page_stride": buffer.stride(0),
        "pages": block_table.stride(0),
    }
    spec = FP8 if scaled else BF16
    args |= _constants(tile, heads, dim, scaled)
    grid = (-(-rows // tile.block_m), tile.split)
    spec.launch(grid, mode, args, tile.num_warps, tile.num_stages)
    return logits[:, :max_seq_len]
