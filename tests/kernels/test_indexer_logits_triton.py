"""Index logits in Triton against the reference, over shuffled pages among pages of NaN.

On a GPU in every PDL mode; `test_triton.py` runs the same file in Triton's interpreter, whose bf16
is wrong.
"""

import pytest
import torch
from torch import Tensor

from compare import assert_close
from minidsv.kernels.index_cache import fp8_page_bytes, rotate_quantize, set_index_k_buffer
from minidsv.kernels.indexer_logits import paged_index_logits, paged_index_logits_ref
from minidsv.kernels.pdl import is_interpreted

pytestmark = [] if is_interpreted() else [pytest.mark.gpu]
DEVICE = "cpu" if is_interpreted() else "cuda"
MODES = ("prefetch",) if is_interpreted() else ("off", "seed", "on", "prefetch")
CACHES = ("float32", "fp8") if is_interpreted() else ("bfloat16", "fp8")
TOLERANCE = {"float32": "fp32_logits", "bfloat16": "fp32_logits", "fp8": "bf16"}
DIM = 128


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def requests(lengths: list[int], cache: str) -> tuple[Tensor, Tensor]:
    """A cache that is NaN but for the requests' keys, and a shuffled block table."""
    counts = [-(-length // 64) for length in lengths]
    pages = torch.randperm(sum(counts) + 3, generator=generator(0))
    table, first = torch.zeros(len(lengths), max(counts), dtype=torch.int64), 0
    if cache == "fp8":
        buffer = torch.full((len(pages), fp8_page_bytes(DIM)), 0xFF, dtype=torch.uint8)
    else:
        buffer = torch.full((len(pages), 64, DIM), float("nan"), dtype=getattr(torch, cache))
    for row, (length, count) in enumerate(zip(lengths, counts, strict=True)):
        table[row, :count] = pages[first : first + count]
        first += count
        position = torch.arange(length)
        keys = torch.randn(length, DIM, generator=generator(row)) * (1 + row)
        set_index_k_buffer(buffer, table[row, position // 64] * 64 + position % 64, keys)
    return buffer, table


def visible(logits: Tensor, seq_lens: Tensor) -> Tensor:
    """What stands behind a row's last key is the reference's -inf, or was never written."""
    hidden = torch.arange(logits.shape[1]) >= seq_lens.unsqueeze(1)
    return logits.cpu().masked_fill(hidden, float("-inf"))


def in_rms(logits: Tensor, want: Tensor) -> Tensor:
    """Logits in units of their row's root mean square: sums over heads of either sign cancel, so
    errors are small against their terms only (of FP8 products the tensor cores keep 14 bits)."""
    finite = want.nan_to_num(0.0, 0.0, 0.0)
    rms = (finite.square().sum(1) / (finite != 0).sum(1).clamp_min(1)).sqrt()
    return logits / rms.where(rms > 0, 1.0).unsqueeze(1)


def check(lengths: list[int], seq_lens: Tensor, request_index: Tensor, heads: int, cache: str):
    buffer, table = requests(lengths, cache)
    rows, width = len(seq_lens), max(lengths)
    q = torch.randn(rows, heads, DIM, generator=generator(7))
    q = rotate_quantize(q)[0] if cache == "fp8" else q.to(buffer.dtype)
    weights = torch.randn(rows, heads, generator=generator(8))
    if rows > 2:
        weights[2] = float("nan")  # stays in its row
    args = [x.to(DEVICE) for x in (q, weights, buffer, table, seq_lens, request_index)]
    results = [paged_index_logits(*args, width, pdl=mode) for mode in MODES]
    want = paged_index_logits_ref(q, weights, buffer, table, seq_lens, request_index, width)
    first = visible(results[0], seq_lens)
    assert_close(f"{cache} {heads}", in_rms(first, want), in_rms(want, want), TOLERANCE[cache])
    for mode, got in zip(MODES, results, strict=True):
        assert torch.equal(visible(got, seq_lens).nan_to_num(7.0), first.nan_to_num(7.0)), mode


@pytest.mark.parametrize("heads", [32, 64])
@pytest.mark.parametrize("cache", CACHES)
def test_decode(cache: str, heads: int) -> None:
    """One row a request."""
    lengths = [1, 63, 64, 65, 200] if is_interpreted() else [1, 63, 64, 65, 2049, 9000, 130]
    check(lengths, torch.tensor(lengths), torch.arange(len(lengths)), heads, cache)


@pytest.mark.parametrize("heads", [32, 64])
@pytest.mark.parametrize("cache", CACHES)
def test_prefill(cache: str, heads: int) -> None:
    """Rows share a request's keys; a program may meet several requests, or rows that see none."""
    lengths = [70, 3, 150] if is_interpreted() else [700, 3, 1500]
    counts = [6, 3, 9] if is_interpreted() else [77, 3, 201]
    index = torch.arange(3).repeat_interleave(torch.tensor(counts))
    seen = [torch.arange(length - n + 1, length + 1) for length, n in zip(lengths, counts)]  # noqa: B905
    seq_lens = torch.cat(seen)
    seq_lens[0] = 0
    check(lengths, seq_lens, index, heads, cache)


@pytest.mark.skipif(is_interpreted(), reason="a long row")
@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("rows", [1, 64])
def test_long_rows(cache: str, rows: int) -> None:
    """More blocks than programs, so each program takes several."""
    lengths = [131072 // rows - 5 * i for i in range(rows)]
    check(lengths, torch.tensor(lengths), torch.arange(rows), 64, cache)


@pytest.mark.skipif(is_interpreted(), reason="bf16")
def test_no_rows_and_narrow_tables() -> None:
    buffer, table = requests([64], "bfloat16")
    q = torch.zeros(0, 64, DIM, dtype=torch.bfloat16, device="cuda")
    none = torch.zeros(0, dtype=torch.int64, device="cuda")
    args = (q, q.new_zeros(0, 64).float(), buffer.cuda(), table.to("cuda", torch.int32), none, none)
    assert paged_index_logits(*args, 64, pdl="on").shape == (0, 64)
