"""Triton kernel under `embedding`: a program copies a piece of a token's row.

The table is constant, but which row is read is not: every access follows the wait.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import cdiv

from minidsv.kernels.launch import KernelSpec, Row, pdl_begin, pdl_end
from minidsv.kernels.launch_config import launch_config
from minidsv.kernels.pdl import PdlMode
from minidsv.kernels.tiles_small import TABLES


@triton.jit
def _gather_rows_kernel(
    input_ids, table, out, table_stride, D, BLOCK: tl.constexpr, PDL: tl.constexpr
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    pdl_begin(PDL)
    row = tl.load(input_ids + token).to(tl.int64)
    value = tl.load(table + row * table_stride + c, mask=c < D)
    tl.store(out + token * D + c, value, mask=c < D)
    pdl_end(PDL)


def _rows() -> tuple[Row, ...]:
    arguments: dict[str, str | int | float] = {"table": "*bf16:16", "out": "*bf16:16"}
    arguments |= {"table_stride": "i32:16", "D": "i32:16"}
    return tuple(
        Row(arguments | {"input_ids": f"*{ids}:16", "BLOCK": tile.block_n}, tile.num_warps)
        for ids in ("i64", "i32")
        for tile in TABLES["embedding"]
    )


GATHER_ROWS = KernelSpec(_gather_rows_kernel, _rows())
SPECS = (GATHER_ROWS,)


def gather_rows(input_ids: Tensor, table: Tensor, mode: PdlMode) -> Tensor:
    """input_ids [T] contiguous, table [V, D], last axis contiguous."""
    assert input_ids.is_contiguous(), f"input_ids have stride {input_ids.stride()}"
    assert table.stride(1) == 1, f"table strides {table.stride()}: want contiguous rows"
    tokens, dim = len(input_ids), table.shape[1]
    out = torch.empty((tokens, dim), dtype=table.dtype, device=table.device)
    tile = launch_config("embedding", tokens, (dim,))
    args = {"input_ids": input_ids, "table": table, "out": out, "table_stride": table.stride(0)}
    args |= {"D": dim, "BLOCK": tile.block_n}
    GATHER_ROWS.launch((tokens, cdiv(dim, tile.block_n)), mode, args, tile.num_warps)
    return out
