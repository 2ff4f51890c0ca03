"""Selection in Triton against the reference, exactly: ties, NaN, every length, shuffled pages.

On a GPU in every PDL mode; `test_triton.py` runs the same file in Triton's interpreter, with small
tiles, so that short rows are thinned as well.
"""

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from minidsv.kernels import tiles_indexer
from minidsv.kernels.launch_config import RULES
from minidsv.kernels.pdl import is_interpreted
from minidsv.kernels.tile import Tile
from minidsv.kernels.topk import all_slots, all_slots_ref, select_topk, select_topk_ref

pytestmark = [] if is_interpreted() else [pytest.mark.gpu]
DEVICE = "cpu" if is_interpreted() else "cuda"
MODES = ("prefetch",) if is_interpreted() else ("off", "seed", "on", "prefetch")
NAN, INF = float("nan"), float("inf")
K = 24 if is_interpreted() else 2048
LENGTHS = (
    (0, 24, 25, 190)
    if is_interpreted()
    else (0, 1, 63, 64, 65, 2047, 2048, 2049, 4095, 4096, 4097, 8191, 8192, 8193, 40000)
)
KINDS: dict[str, Callable[[Tensor], Tensor]] = {
    "normal": lambda x: x,
    "constant": lambda x: torch.full_like(x, -1.5),
    "zeros": lambda x: torch.where(x > 0.5, x, torch.where(x > 0, 0.0, -0.0)),
    "heavy tails": lambda x: x.sign() * (x.abs() * 40).exp(),
    "infinities": lambda x: torch.where(x > 1.5, INF, torch.where(x < -1, -INF, x)),
    "nan": lambda x: torch.where(x.abs() > 1, NAN, x),
    "ascending": lambda x: x.sort().values,
    "few values": lambda x: (x * 2).round(),
    "all nan": lambda x: torch.full_like(x, NAN),
    "one bit apart": lambda x: ((x.abs() * 100).int() + 0x3F800000).view(torch.float32),
}


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def table_of(requests: int, pages: int) -> Tensor:
    """Shuffled pages, some numbered beyond 2**25 (slots beyond 2**31)."""
    table = torch.randperm(requests * pages, generator=generator(5)).view(requests, pages)
    return table + (table % 3 == 0) * (1 << 26)


def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Up to 128 scores a program in the interpreter, where a thousand take seconds."""
    if is_interpreted():
        monkeypatch.setitem(RULES, "select_topk", lambda m, dims: Tile(block_n=128))
        monkeypatch.setitem(RULES, "select_long", lambda m, dims: Tile(128, 128, 128, split=4))


def check(logits: Tensor, seq_lens: Tensor, k: int, table: Tensor, request_index: Tensor) -> None:
    """In every mode the reference's slots, whatever stands behind seq_lens."""
    hidden = torch.arange(logits.shape[1]) >= seq_lens.unsqueeze(1)
    on_device = [x.to(DEVICE) for x in (logits.masked_fill(hidden, NAN), table, request_index)]
    scores, pages, requests = on_device
    results = [
        select_topk(scores, seq_lens.to(DEVICE), k, pages, requests, pdl=mode) for mode in MODES
    ]
    again = scores.masked_fill(hidden.to(DEVICE), 1e30)
    results.append(select_topk(again, seq_lens.to(DEVICE), k, pages, requests, pdl=MODES[0]))
    want = select_topk_ref(logits, seq_lens, k, table, request_index)
    for got in results:
        assert torch.equal(got.cpu(), want)


@pytest.mark.parametrize("kind", list(KINDS)[: 7 if is_interpreted() else None])
def test_select(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of every length in one call."""
    small_tiles(monkeypatch)
    width = 192 if is_interpreted() else 40960
    logits = KINDS[kind](torch.randn(len(LENGTHS), width, generator=generator(1)))
    request_index = torch.arange(len(LENGTHS)) % 3
    check(logits, torch.tensor(LENGTHS), K, table_of(3, width // 64), request_index)


@pytest.mark.parametrize("k", [1, 24])
@pytest.mark.parametrize("width", [64, 192])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_select_k(k: int, width: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    small_tiles(monkeypatch)
    width = width if is_interpreted() else width * 40
    seq_lens = torch.tensor([width, 3, width // 2 + 1, 64])
    logits = torch.randn(4, width, generator=generator(2)).round(decimals=1)
    table = table_of(2, width // 64) % (1 << 25)
    check(logits, seq_lens, k, table.to(dtype), torch.tensor([1, 0, 1, 1]))


@pytest.mark.skipif(is_interpreted(), reason="long rows")
@pytest.mark.parametrize("width", [2560, 4096, 8192, 16384, 131072, 1 << 20])
@pytest.mark.parametrize("kind", ["normal", "few values", "nan"])
def test_select_widths(kind: str, width: int) -> None:
    """Each tile, thinned never, once and twice."""
    logits = KINDS[kind](torch.randn(3, width, generator=generator(3)))
    seq_lens = torch.tensor([width, width - 1, width // 2])
    check(logits, seq_lens, K, table_of(1, width // 64), torch.zeros(3, dtype=torch.int64))


@pytest.mark.parametrize("width", [192] if is_interpreted() else [16384, 131072, 1 << 20])
@pytest.mark.parametrize("kind", ["normal", "ascending", "nan"])
def test_the_sample_is_representative(
    kind: str, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is sifted holds the best and can be held: no row is gone through twice."""
    from minidsv.kernels.topk_long_triton import LINE, select_long

    small_tiles(monkeypatch)
    logits = KINDS[kind](torch.randn(4, width, generator=generator(7))).to(DEVICE)
    rows = torch.arange(4, device=DEVICE)
    tables = {
        "seq_lens": torch.full((4,), width, device=DEVICE),
        "block_table": table_of(4, width // 64).to(DEVICE),
        "request_index": rows,
        "pages": width // 64,
    }
    slots = torch.empty(4, K, dtype=torch.int64, device=DEVICE)
    counts = select_long(logits, K, tables, slots, None, "off")
    lines = (counts + LINE - 1) // LINE
    assert int(counts.sum(1).min()) >= K
    assert int(lines.sum(1).max()) * LINE <= RULES["select_long"](4, (width, K)).block_n


def test_tickets_are_left_as_they_were_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that launch after launch can take the same; rows are fewer, and some of them empty."""
    small_tiles(monkeypatch)
    width = 192 if is_interpreted() else 40960
    logits = torch.randn(3, width, generator=generator(8))
    table, request_index = table_of(1, width // 64), torch.zeros(3, dtype=torch.int64)
    tickets = torch.zeros(5, dtype=torch.int32, device=DEVICE)
    for lens in ((width, 0, K + 1), (1, width - 1, width // 2)):
        args = (logits, torch.tensor(lens), K, table, request_index)
        on_device = [x.to(DEVICE) if isinstance(x, Tensor) else x for x in args]
        got = select_topk(*on_device, pdl=MODES[-1], tickets=tickets)
        assert torch.equal(got.cpu(), select_topk_ref(*args))
        assert not tickets.any()


@pytest.mark.skipif(is_interpreted(), reason="the reference's own rows")
@pytest.mark.parametrize("rows", [0, 1, 300])
def test_rows_of_a_wider_tensor(rows: int) -> None:
    """Strides other than the width; more rows than processors."""
    logits = torch.randn(rows, 4160, generator=generator(4))[:, :4100]
    seq_lens = torch.randint(1, 4100, (rows,), generator=generator(6))
    check(logits, seq_lens, K, table_of(5, 65), torch.arange(rows) % 5)


@pytest.mark.parametrize("width", [1, 64, 130])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_all_slots(width: int, dtype: torch.dtype) -> None:
    width = width if is_interpreted() else width * 15
    seq_lens = torch.tensor([0, 1, width // 2, width])
    table = (table_of(2, -(-width // 64)) % (1 << 25)).to(dtype)
    request_index = torch.tensor([0, 1, 1, 0])
    want = all_slots_ref(seq_lens, table, request_index, width)
    args = [x.to(DEVICE) for x in (seq_lens, table, request_index)]
    for mode in MODES:
        assert torch.equal(all_slots(*args, width, pdl=mode).cpu(), want)


def test_every_tile_has_a_row() -> None:
    from minidsv.kernels.topk_long_triton import SELECT_LONG
    from minidsv.kernels.topk_triton import SELECT

    blocks = {row.arguments["BLOCK"] for row in SELECT.rows}
    names = ("CHUNK", "BLOCK", "SAMPLE", "CHUNKS")
    long = {(*(row.arguments[n] for n in names), row.num_warps) for row in SELECT_LONG.rows}
    for k in (1, 64, 2048, 4096):
        for columns in (1, 1000, 4096, 8192):
            tile = tiles_indexer.select_topk(1, (columns, k))
            assert tile.block_n >= max(columns, k)
            assert tile.block_n in blocks
        for columns, m in itertools.product((8193, 40_000, 98_305, 131_073, 1 << 20), (1, 9, 64)):
            t = tiles_indexer.select_long(m, (columns, k))
            assert (t.block_m, t.block_n, t.block_k, t.split, t.num_warps) in long
            assert t.block_m * t.split >= columns
