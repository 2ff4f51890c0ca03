"""Triton kernel under `attention_prep`: five jobs side by side, by program id.

    rope of q_pe       BH heads of a token      rope_triton
    index queries      BH heads of a token      indexer_prep_triton
    a latent's row     a token                  mla_prep_triton
    index keys         BT tokens                indexer_prep_triton
    W_UK               the rest                 absorb_triton

The short ones come first, so that the products, which wait for memory, run beside them; their
weights are loaded before the wait. Where a layer has no indexer, or scores nothing, there are no
programs for it, and its pointers stand for others of their type.
"""

from collections.abc import Iterator
from itertools import product
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import cdiv

from minidsv.kernels.absorb_triton import load_weights, multiply_block
from minidsv.kernels.attention_prep import Angles, IndexKeys, IndexQueries, LatentRows
from minidsv.kernels.constants import PAGE_SIZE
from minidsv.kernels.indexer_prep_triton import (
    constants,
    half_of,
    load_vector,
    prepare_queries,
    typed,
    write_keys,
)
from minidsv.kernels.launch import KernelSpec, Row, pdl_begin, pdl_end
from minidsv.kernels.launch_config import launch_config
from minidsv.kernels.mla_prep_triton import normed, turned
from minidsv.kernels.pdl import PdlMode
from minidsv.kernels.rope_triton import rotate
from minidsv.kernels.set_mla_kv_buffer import fp8_row_bytes
from minidsv.kernels.set_mla_kv_buffer_triton import DIMS, store_fp8_row, store_plain_row
from minidsv.kernels.tile import Tile
from minidsv.kernels.tiles_gemm import PREPARE

HEADS, KEYS = 16, 16  # heads of a token, tokens whose keys: a program of the short jobs


@triton.jit
def _write_latent(
    kv_buffer, loc, row, gain, cos, sin, token, eps,
    C: tl.constexpr, R: tl.constexpr, MAX: tl.constexpr, FLOOR: tl.constexpr,
):  # fmt: skip
    """One token's row; the buffer's type says which."""
    slot = tl.load(loc + token).to(tl.int64)
    r = tl.arange(0, R)
    rope = turned(row + C, cos, sin, token, R, R)
    if kv_buffer.dtype.element_ty.is_fp8():
        ROW: tl.constexpr = C + C // 32 + 2 * R
        g = tl.arange(0, C // 128)
        c = g[:, None] * 128 + tl.arange(0, 128)[None, :]
        store_fp8_row(
            kv_buffer + slot * ROW,
            kv_buffer.to(tl.pointer_type(tl.float32)) + slot * (ROW // 4),
            kv_buffer.to(tl.pointer_type(tl.bfloat16)) + slot * (ROW // 2),
            normed(row, tl.load(gain + c), c, eps, C), rope, g, c, r, C, R, MAX, FLOOR,
        )  # fmt: skip
    else:
        i = tl.arange(0, C)
        nope = normed(row, tl.load(gain + i), i, eps, C)
        store_plain_row(kv_buffer + slot * (C + R), nope, rope, i, r, C, R)


@triton.jit(do_not_specialize=("m", "key_tokens", "heads", "index_heads"))
def _attention_prep_kernel(
    q, w_uk, q_latent, q_pe, latent, gain, kv_buffer, loc, cos, sin,
    index_k, k_gain, k_bias, keys, index_q, gate, index_out, weights,
    m, key_tokens, heads, index_heads, nope, w_head, eps, k_eps, head_scale, softmax_scale,
    C: tl.constexpr, R: tl.constexpr, NORM: tl.constexpr, HALF: tl.constexpr,
    INTERLEAVED: tl.constexpr, MAX: tl.constexpr, FLOOR: tl.constexpr, PAGE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    BH: tl.constexpr, BT: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    D: tl.constexpr = 4 * HALF
    job = tl.program_id(0)
    groups, index_groups = tl.cdiv(heads, BH), tl.cdiv(index_heads, BH)
    first_index = m * groups
    first_latent = first_index + m * index_groups
    first_key = first_latent + m
    first_block = first_key + tl.cdiv(key_tokens, BT)
    BLOCKS: tl.constexpr = (C + BLOCK_N - 1) // BLOCK_N
    block = tl.maximum(job - first_block, 0)
    head = (block // BLOCKS % heads).to(tl.int64)
    start = block // BLOCKS // heads * BLOCK_M
    n = tl.where(job < first_block, 0, C)  # other jobs read no weights
    w = w_uk + head * w_head
    if PDL == "prefetch":
        tile = load_weights(w, block % BLOCKS, n, nope, 1, C, BLOCK_N, BLOCK_K)
    pdl_begin(PDL)
    if PDL != "prefetch":
        tile = load_weights(w, block % BLOCKS, n, nope, 1, C, BLOCK_N, BLOCK_K)
    width = nope + R
    if job < first_index:
        token = (job // groups).to(tl.int64)
        h = (job % groups * BH + tl.arange(0, BH))[:, None]
        rows = token * heads + h
        rotate(
            q + rows * width + nope, q_pe + rows * R, h < heads, cos, sin, token, R // 2, R // 2,
            True,
        )  # fmt: skip
    elif job < first_latent:
        token = ((job - first_index) // index_groups).to(tl.int64)
        h = (job - first_index) % index_groups * BH + tl.arange(0, BH)
        prepare_queries(
            index_q + (token * index_heads + h[:, None]) * D, gate + token * index_heads,
            cos, sin, index_out, weights, token, h, index_heads, head_scale, softmax_scale,
            NORM, HALF, INTERLEAVED, MAX, FLOOR,
        )  # fmt: skip
    elif job < first_key:
        token = (job - first_latent).to(tl.int64)
        row = latent + token * (C + R)
        _write_latent(kv_buffer, loc, row, gain, cos, sin, token, eps, C, R, MAX, FLOOR)
    elif job < first_block:
        tokens = (job - first_key).to(tl.int64) * BT + tl.arange(0, BT)
        write_keys(
            keys, loc, index_k + tokens[:, None] * D, load_vector(k_gain, HALF, INTERLEAVED),
            load_vector(k_bias, HALF, INTERLEAVED), cos, sin, tokens, m, k_eps,
            NORM, HALF, INTERLEAVED, PAGE, MAX, FLOOR,
        )  # fmt: skip
    else:
        multiply_block(
            tile, w, q + head * width, q_latent + head * C, block % BLOCKS, start, m, C, nope,
            heads * width, heads * C, 1, C, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
    pdl_end(PDL)


def _sizes(tile: Tile, c: int, r: int, interleaved: bool) -> dict[str, Any]:
    blocks = {"BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "BLOCK_K": tile.block_k}
    return (
        {"C": c, "R": r, "PAGE": PAGE_SIZE, "BH": HEADS, "BT": KEYS}
        | blocks
        | constants(r // 2, interleaved)
    )


_MODELS = (*((d, i) for d in DIMS[:1] for i in (False, True)), (DIMS[1], False))


def _rows() -> Iterator[Row]:
    """DeepSeek-V3.2, GLM-5 (interleaved) and the bundled model, by both caches' types."""
    bf16 = ("q", "w_uk", "q_latent", "q_pe", "latent", "index_k", "index_q")
    arguments: dict[str, str | int | float] = dict.fromkeys(bf16, "*bf16:16")
    fp32 = ("gain", "cos", "sin", "k_gain", "k_bias", "gate", "weights")
    arguments |= dict.fromkeys(fp32, "*fp32:16") | {"loc": "*i64:16"}
    arguments |= dict.fromkeys(("m", "key_tokens", "heads", "index_heads"), "i32")
    arguments |= dict.fromkeys(("nope", "w_head"), "i32:16")
    arguments |= dict.fromkeys(("eps", "k_eps", "head_scale", "softmax_scale"), "fp32")
    types = ("bf16", "fp8e4nv")
    for cache, index, (dims, interleaved), tile in product(types, types, _MODELS, PREPARE):
        pointers = {
            "kv_buffer": f"*{cache}:16",
            "keys": f"*{index}:16",
            "index_out": f"*{index}:16",
        }
        sizes = _sizes(tile, *dims, interleaved)
        yield Row(arguments | pointers | sizes, tile.num_warps, tile.num_stages)


PREP = KernelSpec(
    _attention_prep_kernel, tuple(_rows()), frozenset({"w_uk", "gain", "k_gain", "k_bias"}), True
)
SPECS = (PREP,)


def prepare(
    q: Tensor, w_uk: Tensor, latents: LatentRows, keys: IndexKeys | None,
    queries: IndexQueries | None, loc: Tensor, rope: Angles, interleaved: bool, mode: PdlMode,
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor] | None]:  # fmt: skip
    """As `attention_prep`; every tensor contiguous but w_uk, whose heads may lie apart."""
    (tokens, heads, width), (nope, c) = q.shape, w_uk.shape[1:]
    r = width - nope
    assert r in (32, 64), f"{r} rope channels: the Triton kernel takes 32 or 64"
    assert w_uk.stride()[1:] == (c, 1), f"w_uk strides {w_uk.stride()}: want contiguous heads"
    buffer = latents.kv_buffer
    row = fp8_row_bytes(c, r) if buffer.dtype == torch.uint8 else c + r
    assert buffer.shape[1:] == (row,), f"kv_buffer {tuple(buffer.shape)}: want rows of {row}"
    assert latents.rows.shape == (tokens, c + r), f"rows {tuple(latents.rows.shape)}"
    q_latent = q.new_empty(tokens, heads, c)
    q_pe = q.new_empty(tokens, heads, r)
    args: dict[str, Any] = {"q": q, "w_uk": w_uk, "q_latent": q_latent, "q_pe": q_pe, "loc": loc}
    args |= {"latent": latents.rows, "gain": latents.gain, "eps": latents.eps}
    args |= {"kv_buffer": typed(buffer), "cos": rope[0], "sin": rope[1]}
    args |= {"m": tokens, "heads": heads, "nope": nope, "w_head": w_uk.stride(0)}
    args |= _key_arguments(keys, q, latents.gain, r)
    index, index_args = _query_arguments(queries, q, rope[0], args["keys"])
    args |= index_args
    for name, x in args.items():
        if isinstance(x, Tensor) and name != "w_uk":
            assert x.is_contiguous(), f"{name} strides {x.stride()}: want contiguous"
    tile = launch_config("attention_prep", tokens, (heads, c))
    args |= _sizes(tile, c, r, interleaved and keys is not None)
    short = tokens * (cdiv(heads, HEADS) + cdiv(args["index_heads"], HEADS) + 1)
    short += cdiv(args["key_tokens"], KEYS)
    blocks = cdiv(c, tile.block_n) * heads * cdiv(tokens, tile.block_m)
    PREP.launch((short + blocks if tokens else 0,), mode, args, tile.num_warps, tile.num_stages)
    return q_latent, q_pe, index


def _key_arguments(keys: IndexKeys | None, q: Tensor, gain: Tensor, r: int) -> dict[str, Any]:
    if keys is None:
        pointers = {"index_k": q, "k_gain": gain, "k_bias": gain, "keys": q}
        return pointers | {"key_tokens": 0, "k_eps": 0.0}
    assert keys.k.shape == (len(q), 2 * r), f"k {tuple(keys.k.shape)} is not [{len(q)}, {2 * r}]"
    pointers = {"index_k": keys.k, "k_gain": keys.gain, "k_bias": keys.bias}
    return pointers | {"keys": typed(keys.buffer), "key_tokens": len(q), "k_eps": keys.eps}


def _query_arguments(
    queries: IndexQueries | None, q: Tensor, cos: Tensor, keys: Tensor
) -> tuple[tuple[Tensor, Tensor] | None, dict[str, Any]]:
    """(what is prepared, the arguments for it)."""
    if queries is None:
        pointers = {"index_q": q, "gate": cos, "index_out": keys, "weights": cos}
        return None, pointers | {"index_heads": 0, "head_scale": 0.0, "softmax_scale": 0.0}
    half_of(queries.q.shape[2], cos)
    fp8 = keys.dtype == torch.float8_e4m3fn
    out = torch.empty_like(queries.q, dtype=keys.dtype if fp8 else q.dtype)
    weights = torch.empty_like(queries.gate)
    pointers = {"index_q": queries.q, "gate": queries.gate, "index_out": out, "weights": weights}
    scales = {"head_scale": queries.head_scale, "softmax_scale": queries.softmax_scale}
    return (out, weights), pointers | scales | {"index_heads": queries.q.shape[1]}
