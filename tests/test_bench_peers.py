"""What scripts/bench_peers.py hands to other libraries, with PyTorch in their place."""

import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import bench_kernels
import bench_peers
from bench_inputs import Case, Launch, Peer, Run, relative_error, tensors
from bench_kernels import measure, report
from bench_peers import PEERS, PeerTime, Refused, peer_time, timed
from minidsv.kernels.absorb import absorb_q, absorb_v
from minidsv.kernels.gemm import Segment, fused_linear
from minidsv.kernels.index_cache import fp8_page_bytes, read_index_k_buffer
from minidsv.kernels.indexer_logits import paged_index_logits
from minidsv.kernels.moe import moe_experts
from minidsv.kernels.norm import add_rms_norm, rms_norm, rms_norm_ref
from minidsv.kernels.pdl import PDL_MODES
from minidsv.kernels.quant import (
    dequantize_fp8_blocks,
    dequantize_groups,
    quantize_fp8_blocks,
)
from minidsv.kernels.rope import apply_rope_ref
from minidsv.kernels.rope_quant import mla_rope_quantize_fp8
from minidsv.kernels.router import router_gemm
from minidsv.kernels.topk import select_topk

Pair = tuple[Tensor, Tensor]


def randn(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def fp8_product(a: Pair, b: Pair, d: Tensor) -> None:
    d.copy_(dequantize_groups(*a) @ dequantize_fp8_blocks(*b).T)


def masked_product(a: Pair, b: Pair, d: Tensor, counts: Tensor, expected: int) -> None:
    assert (a[0].shape[1] % 128, counts.dtype, expected > 0) == (0, torch.int32, True)
    d.fill_(float("nan"))  # no row behind the counts may be used
    for expert, count in enumerate(counts.tolist()):
        rows = slice(0, count)
        one = d[expert, rows]
        fp8_product((a[0][expert, rows], a[1][expert, rows]), (b[0][expert], b[1][expert]), one)


def logits(q: Tensor, keys: Tensor, w: Tensor, lens: Tensor, table: Tensor, plan: Any, most: int
           ) -> Tensor:  # fmt: skip
    assert (q.dim(), keys.shape[1:], lens.dim(), table.dtype) == (4, (64, 1, 132), 2, torch.int32)
    out = torch.full((len(q), most + 64), float("nan"))
    for row, length in enumerate(lens[:, 0].tolist()):
        k = read_index_k_buffer(keys.flatten(1), table[row].long(), 128)[:length]
        out[row, :length] = w[row] @ (q[row, 0].float() @ k.T).relu()
    return out


@pytest.fixture(autouse=True)
def libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    deep_gemm = SimpleNamespace(
        set_pdl=lambda _: None,
        get_num_sms=lambda: 132,
        get_mn_major_tma_aligned_tensor=lambda scale: scale.mT.contiguous().mT,
        fp8_gemm_nt=fp8_product,
        m_grouped_fp8_fp4_gemm_nt_masked=masked_product,
        get_paged_mqa_logits_metadata=lambda *_: None,
        fp8_paged_mqa_logits=logits,
    )

    def rmsnorm(x: Tensor, gain: Tensor, eps: float, out: Tensor, enable_pdl: bool) -> None:
        out.copy_(rms_norm_ref(x, gain, eps))

    def add(x: Tensor, residual: Tensor, gain: Tensor, eps: float, enable_pdl: bool) -> None:
        residual += x
        x.copy_(rms_norm_ref(residual, gain, eps))

    def quantize(q_pe: Tensor, k_pe: Tensor, q: Tensor, k: Tensor, table: Tensor, at: Tensor,
                 **o: Any) -> None:  # fmt: skip
        cos, sin = table[at.long()].chunk(2, -1)
        o["q_rope_out"].copy_(apply_rope_ref(q_pe.float(), cos, sin, interleaved=True))
        o["k_rope_out"].copy_(apply_rope_ref(k_pe.float(), cos, sin, interleaved=True))
        o["q_nope_out"].copy_(q)
        o["k_nope_out"].copy_(k)

    norm = SimpleNamespace(rmsnorm=rmsnorm, fused_add_rmsnorm=add)
    rope = SimpleNamespace(mla_rope_quantize_fp8=quantize)
    for name, module in (
        ("deep_gemm", deep_gemm),
        ("flashinfer", SimpleNamespace(norm=norm, rope=rope)),
        ("flashinfer.norm", norm),
        ("flashinfer.rope", rope),
    ):
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(bench_peers, "product", lambda x, w: x.float() @ w.float().T)
    monkeypatch.setattr(bench_peers, "interleaved_us", lambda ours, theirs: (3.0, 2.0))


def segment(rows: int) -> Segment:
    return Segment(*quantize_fp8_blocks(randn(rows, 256)))


def stacks(experts: int, inner: int, hidden: int) -> tuple[Tensor, ...]:
    pairs = [
        [quantize_fp8_blocks(randn(*shape, dtype=torch.float32) * (1 + i)) for i in range(count)]
        for shape, count in (((inner, hidden), 2 * experts), ((hidden, inner), experts))
    ]
    gate_up, down = ([torch.stack(part) for part in zip(*pair, strict=True)] for pair in pairs)
    return *(part.unflatten(0, (experts, 2)) for part in gate_up), *down


def index_cache() -> Tensor:
    cache = torch.zeros(8, fp8_page_bytes(128), dtype=torch.uint8)
    cache[:, : 64 * 128] = randn(8, 64 * 128).to(torch.float8_e4m3fn).view(torch.uint8)
    cache[:, 64 * 128 :].view(torch.float32).fill_(0.5)
    return cache


TABLE = torch.randperm(8, generator=torch.Generator().manual_seed(1)).view(2, 4)
LENS, ROWS = torch.full((2,), 200), torch.tensor([1, 0])
ANGLES = randn(3, 4, dtype=torch.float32)
LAUNCHES = [
    # 192 rows cut a block: they have to come last in DeepGEMM's one matrix
    Launch(fused_linear, randn(5, 256), [segment(256), segment(192), segment(128),
                                         Segment(randn(8, 256), out_dtype=torch.float32)]),
    Launch(fused_linear, randn(5, 256), [Segment(randn(8, 256), out_dtype=torch.float32)]),
    Launch(router_gemm, randn(5, 256), randn(16, 256)),
    Launch(moe_experts, randn(3, 256), torch.rand(3, 2), torch.tensor([[4, 1], [1, 0], [1, 4]]),
           *stacks(6, 128, 256), None, None, None, None),
    Launch(paged_index_logits, randn(2, 64, 128).to(torch.float8_e4m3fn),
           randn(2, 64, dtype=torch.float32), index_cache(), TABLE, LENS, ROWS, 200),
    Launch(select_topk, randn(2, 200, dtype=torch.float32), LENS, 64, TABLE, ROWS),
    Launch(absorb_q, randn(3, 4, 16), randn(4, 16, 32)),
    Launch(absorb_v, randn(3, 4, 32), randn(4, 16, 32)),
    Launch(rms_norm, randn(3, 64), 1 + randn(64, dtype=torch.float32) / 9, 1e-6),
    Launch(add_rms_norm, randn(3, 64), randn(3, 64) / 2, torch.ones(64), 1e-6),
    Launch(mla_rope_quantize_fp8, randn(3, 4, 16), randn(3, 4, 8), randn(3, 16), randn(3, 8),
           ANGLES.cos(), ANGLES.sin()),
]  # fmt: skip


def peers_of(module: str, launches: list[Launch]) -> list[tuple[Launch, Callable[..., Peer]]]:
    """The launches with each peer that the module has for them."""
    pairs = [(launch, build) for launch in launches for build in PEERS[launch.op]]
    return [(launch, build) for launch, build in pairs if build.__module__ == module]


def test_every_peer_has_a_launch() -> None:
    here = {build for _, build in peers_of("bench_peers", LAUNCHES)}
    assert here == {p for ps in PEERS.values() for p in ps if p.__module__ == "bench_peers"}


@pytest.mark.parametrize(
    ("launch", "build"),
    peers_of("bench_peers", LAUNCHES),
    ids=lambda part: getattr(part, "__name__", ""),
)
def test_a_peer_computes_the_same(launch: Launch, build: Callable[..., Peer]) -> None:
    want = tensors(launch(None))
    time = timed(build, [launch], want, "off")
    assert (time.us, time.ours_us) == (2.0, 3.0)
    got = build(*launch.args).outputs()
    assert time.error == relative_error(
        [g.to(w.dtype) for g, w in zip(got, want, strict=True)], want
    )


def test_an_operator_without_a_peer() -> None:
    runs: list[Run] = [lambda pdl: None, Launch(print)]
    assert peer_time(runs, "off") == (None, [])


@pytest.mark.parametrize(
    ("attribute", "value", "message"),
    [
        ("fp8_gemm_nt", lambda a, b, d: d.zero_(), "relative L2 1 against our reference"),
        ("set_pdl", None, "TypeError: 'NoneType' object is not callable"),
    ],
)
def test_a_peer_that_does_not_work_is_refused(
    attribute: str, value: Any, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules["deep_gemm"], attribute, value)
    launch = Launch(fused_linear, randn(5, 256), [segment(256)])
    with pytest.raises(Refused, match=message):
        timed(*PEERS[fused_linear], [launch], tensors(launch(None)), "off")
    peer, (reason,) = peer_time([launch], "off")
    assert peer is None
    assert message in reason


def test_a_library_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "deep_gemm", None)
    peer, (reason,) = peer_time([LAUNCHES[0]], "off")
    assert peer is None
    assert reason.startswith("ModuleNotFoundError: import of deep_gemm halted")


def test_a_row_with_and_without_its_peer(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As bench_kernels.py prints and writes them; why a peer is missing is said once."""
    monkeypatch.setattr(bench_kernels, "graph_us", lambda runs: float(len(runs)))
    case = Case("rms_norm", "M=3", (10**9, 1), lambda seed: LAUNCHES[8])
    refusals = set[str]()
    row = measure("full", case, PDL_MODES, refusals)
    assert row.peer == PeerTime("flashinfer.rmsnorm", 2.0, 3.0, pytest.approx(0, abs=8e-3))
    assert json.loads(json.dumps(asdict(row)))["peer"]["us"] == 2.0
    assert report(row, 3000.0).endswith("2.00  1.50x flashinfer.rmsnorm")
    monkeypatch.setitem(sys.modules, "flashinfer.norm", None)
    assert measure("full", case, PDL_MODES, None).peer is None
    assert capsys.readouterr().err == ""
    rows = [measure("full", case, PDL_MODES, refusals) for _ in range(2)]
    assert [row.peer for row in rows] == [None, None]
    assert report(rows[0], 3000.0).endswith("x")
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1
    assert said[0].startswith(
        "a peer of rms_norm is left out: ModuleNotFoundError: import of flash"
    )
