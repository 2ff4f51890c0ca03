"""Index logits and sparse MLA against loops written out, over poisoned and shuffled caches."""

import pytest
import torch
from torch import Tensor

from compare import assert_close
from minidsv.kernels import sparse_mla as sparse_mla_module
from minidsv.kernels.index_cache import set_index_k_buffer
from minidsv.kernels.indexer_logits import paged_index_logits
from minidsv.kernels.set_mla_kv_buffer import (
    fp8_row_bytes,
    read_mla_kv_buffer,
    set_mla_kv_buffer,
    set_mla_kv_buffer_fp8_quant,
)
from minidsv.kernels.sparse_mla import sparse_mla

LENGTHS = [1, 63, 64, 65, 130]
C, R, HEADS = 128, 64, 5


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def paged_requests() -> tuple[Tensor, list[Tensor]]:
    """A shuffled block table for requests of LENGTHS tokens, and each one's slots by position."""
    pages = torch.randperm(12, generator=generator(0))
    table, slots, first = torch.zeros(len(LENGTHS), 3, dtype=torch.int64), [], 0
    for row, length in enumerate(LENGTHS):
        count = -(-length // 64)
        table[row, :count] = pages[first : first + count]
        first += count
        position = torch.arange(length)
        slots.append(table[row, position // 64] * 64 + position % 64)
    return table, slots


def test_index_logits() -> None:
    table, slots = paged_requests()
    buffer = torch.full((12, 64, 128), float("nan"))
    keys = [torch.randn(n, 128, generator=generator(n)) for n in LENGTHS]
    for slot, key in zip(slots, keys, strict=True):
        set_index_k_buffer(buffer, slot, key)
    seq_lens = torch.tensor([*LENGTHS, 60, 130, 7])  # the last three see part of requests 3, 4, 4
    request_index = torch.tensor([0, 1, 2, 3, 4, 3, 4, 4])
    q = torch.randn(8, HEADS, 128, generator=generator(1))
    weights = torch.randn(8, HEADS, generator=generator(2))
    got = paged_index_logits(q, weights, buffer, table, seq_lens, request_index, 130)
    want = torch.full((8, 130), float("-inf"))
    for t, (length, request) in enumerate(
        zip(seq_lens.tolist(), request_index.tolist(), strict=True)
    ):
        for s in range(length):
            dots = (q[t] @ keys[request][s]).relu()
            want[t, s] = (weights[t] * dots).sum()
    assert_close("logits", got, want, "fp32_logits")


def cache(dtype: str, slots: int) -> Tensor:
    if dtype == "fp8":
        return torch.full((slots, fp8_row_bytes(C, R)), 0xFF, dtype=torch.uint8)
    if dtype == "fp8_flat":
        return torch.full((slots, C + R), 0xFF, dtype=torch.uint8).view(torch.float8_e4m3fn)
    return torch.full((slots, C + R), float("nan"), dtype=getattr(torch, dtype))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "fp8", "fp8_flat"])
@pytest.mark.parametrize("chunk", [1, 1 << 22])
def test_sparse_mla(dtype: str, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sparse_mla_module, "CHUNK_ELEMENTS", chunk)
    buffer = cache(dtype, 640)
    written = torch.randperm(640, generator=generator(3))[:200]
    written = written[written != 0]  # slot 0 stays poison: padding must not read it
    rows = torch.randn(len(written), C + R, generator=generator(4))
    write = set_mla_kv_buffer_fp8_quant if "fp8" in dtype else set_mla_kv_buffer
    write(buffer, written, rows[:, :C], rows[:, C:])
    counts = [0, 1, 64, 80, 33]
    indices = torch.full((len(counts), 80), -1)
    for t, count in enumerate(counts):
        where = torch.randperm(80, generator=generator(t))[:count]  # holes anywhere
        indices[t, where] = written[
            torch.randperm(len(written), generator=generator(9 + t))[:count]
        ]
    q_latent = torch.randn(len(counts), HEADS, C, generator=generator(5))
    q_pe = torch.randn(len(counts), HEADS, R, generator=generator(6))
    got = sparse_mla(q_latent, q_pe, buffer, indices, scale=0.1)
    for t in range(len(counts)):
        slots = indices[t][indices[t] >= 0]
        keys = read_mla_kv_buffer(buffer, slots, C)
        scores = (q_latent[t] @ keys[:, :C].T + q_pe[t] @ keys[:, C:].T) * 0.1
        want = scores.softmax(-1) @ keys[:, :C] if len(slots) else torch.zeros(HEADS, C)
        assert_close(f"token {t}", got[t], want, "fp32_logits")
