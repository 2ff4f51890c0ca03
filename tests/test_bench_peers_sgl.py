"""What scripts/bench_peers_sgl.py hands to sglang-kernel, with PyTorch in its place."""

import os
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import bench_peers
import bench_peers_sgl
from bench_inputs import Launch, tensors
from bench_peers import PEERS, peer_time, timed
from minidsv.kernels.quant import per_token_group_quant_fp8, per_token_group_quant_fp8_ref
from minidsv.kernels.router import grouped_topk, grouped_topk_ref, router_gemm
from minidsv.kernels.set_mla_kv_buffer import set_mla_kv_buffer_fp8_quant
from minidsv.kernels.sparse_mla import sparse_mla
from minidsv.kernels.topk import select_topk

GATE = {"top_k": 4, "n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5}


def randn(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def plan(lens: Tensor, queries: int, kv_heads: int, heads: int, is_fp8_kvcache: bool, topk: int
         ) -> tuple[Any, str]:  # fmt: skip
    assert (lens.dtype, lens.unique().tolist(), kv_heads) == (torch.int32, [topk], 1)
    assert queries == heads
    return (heads, topk), "splits"


def decode(
    q: Tensor, pages: Tensor, table: Tensor, lens: Tensor, c: int, made: Any, splits: str,
    softmax_scale: float, is_fp8_kvcache: bool, indices: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """FlashMLA's rows by their bytes: 512 e4m3, 4 fp32 scales, 64 bf16."""
    tokens, _, k = indices.shape
    assert made == (q.shape[2], k)
    assert (q.shape, q.dtype) == ((tokens, 1, made[0], 576), torch.bfloat16)
    assert (pages.shape[1:], pages.dtype) == ((64, 1, 656), torch.uint8)
    assert (indices.dtype, table.dtype, len(table)) == (torch.int32, torch.int32, tokens)
    at = indices[:, 0].long()
    latent, scales, rope = pages[at // 64, at % 64, 0].split((512, 16, 128), -1)
    scales = scales.contiguous().view(torch.float32).repeat_interleave(128, -1)
    ckv = latent.contiguous().view(torch.float8_e4m3fn).float() * scales
    keys = torch.cat((ckv, rope.contiguous().view(torch.bfloat16).float()), -1)
    scores = q[:, 0].float() @ keys.mT * softmax_scale
    return (scores.softmax(-1) @ ckv).to(q.dtype).unsqueeze(1), scores.logsumexp(-1)


def gemm(x: Tensor, weight: Tensor, out_dtype: torch.dtype) -> Tensor:
    if len(x) > 16:
        raise RuntimeError("num_tokens must be less than or equal to 16\nmore")
    return (x.float() @ weight.float().T).to(out_dtype)


def gate(logits: Tensor, bias: Tensor, groups: int, kept: int, k: int, shared: int, factor: float,
         on_output: bool) -> list[Tensor]:  # fmt: skip
    assert shared == 0
    weights, ids = grouped_topk_ref(logits, bias, k, groups, kept, True, factor if on_output else 1)
    return [weights, ids.int()]


def best(score: Tensor, lens: Tensor, table: Tensor, first: Tensor, k: int) -> Tensor:
    """In the order of the scores."""
    assert (lens.dtype, table.dtype, first.dtype) == (torch.int32,) * 3
    assert first.tolist() == list(range(len(table) + 1))
    return table.gather(1, score.topk(k).indices)


def quantize(x: Tensor, codes: Tensor, scale: Tensor, group: int, eps: float, *bounds: float
             ) -> None:  # fmt: skip
    assert (eps, bounds) == (1e-10, (-448.0, 448.0))
    for out, made in zip((codes, scale), per_token_group_quant_fp8_ref(x, group), strict=True):
        out.copy_(made)


@pytest.fixture(autouse=True)
def library(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    flash_mla = SimpleNamespace(get_mla_metadata=plan, flash_mla_with_kvcache=decode)
    package = SimpleNamespace(
        flash_mla=flash_mla,
        dsv3_router_gemm=gemm,
        moe_fused_gate=gate,
        fast_topk_transform_fused=best,
        sgl_per_token_group_quant_8bit=quantize,
    )
    monkeypatch.setitem(sys.modules, "sgl_kernel", package)
    monkeypatch.setenv("TRTLLM_ENABLE_PDL", "")
    monkeypatch.delenv("TRTLLM_ENABLE_PDL")
    monkeypatch.setattr(bench_peers, "product", lambda x, w: x.float() @ w.float().T)
    monkeypatch.setattr(bench_peers, "interleaved_us", lambda ours, theirs: (3.0, 2.0))
    return package


def attention(heads: int, dtype: torch.dtype = torch.uint8) -> Launch:
    """Two tokens over 40 of 128 slots."""
    rows, slots = randn(128, 576), torch.randperm(128, generator=torch.Generator().manual_seed(3))
    cache = rows
    if dtype == torch.uint8:
        cache = torch.empty(128, 656, dtype=dtype)
        set_mla_kv_buffer_fp8_quant(cache, torch.arange(128), *rows.split((512, 64), 1))
    indices = slots[:80].view(2, 40)
    return Launch(sparse_mla, randn(2, heads, 512), randn(2, heads, 64), cache, indices, 0.07)


TABLE = torch.randperm(8, generator=torch.Generator().manual_seed(1)).view(2, 4)
LAUNCHES = [
    attention(16),
    attention(80),
    Launch(router_gemm, randn(5, 256), randn(16, 256)),
    Launch(grouped_topk, randn(3, 32, dtype=torch.float32), randn(32, dtype=torch.float32),
           **GATE, norm_topk_prob=True),
    # 200 of the 256 tokens of four pages are scored
    Launch(select_topk, randn(2, 200, dtype=torch.float32), torch.full((2,), 200), 64, TABLE,
           torch.tensor([1, 0])),
    Launch(per_token_group_quant_fp8, randn(3, 256)),
]  # fmt: skip


def theirs(launch: Launch) -> Any:
    (build,) = (build for build in PEERS[launch.op] if build.__module__ == "bench_peers_sgl")
    return build


def test_every_peer_has_a_launch() -> None:
    every = {p for peers in PEERS.values() for p in peers if p.__module__ == "bench_peers_sgl"}
    assert {theirs(launch) for launch in LAUNCHES} == every


@pytest.mark.parametrize("launch", LAUNCHES, ids=lambda launch: launch.op.__name__)
def test_a_peer_computes_the_same(launch: Launch) -> None:
    time = timed(theirs(launch), [launch], tensors(launch(None)), "off")
    assert (time.us, time.ours_us) == (2.0, 3.0)
    assert time.name.startswith("sgl_kernel.")


@pytest.mark.parametrize(("heads", "padded"), [(16, 64), (64, 64), (80, 128)])
def test_flash_mla_sees_heads_that_it_has_kernels_for(heads: int, padded: int) -> None:
    launch = attention(heads)
    seen = bench_peers_sgl.flash_mla(*launch.args).launch()
    assert isinstance(seen, Tensor)
    assert seen.shape == (2, 1, padded, 512)


def test_a_wrong_slot_is_seen(library: SimpleNamespace) -> None:
    """Also one that lies between those of the table."""
    library.fast_topk_transform_fused = lambda *args: best(*args).add_(1)
    peer, reasons = peer_time([LAUNCHES[4]], "off")
    assert peer is not None
    assert peer.name == "torch.topk"
    assert "sgl_kernel.fast_topk_transform_fused: relative L2" in reasons[0]


@pytest.mark.parametrize(
    ("launch", "reason"),
    [
        (attention(16, torch.bfloat16),
         "ValueError: FlashMLA decodes over 656-byte FP8 rows, these are torch.bfloat16"),
        (Launch(grouped_topk, randn(3, 32, dtype=torch.float32), torch.zeros(32), **GATE,
                norm_topk_prob=False),
         "ValueError: moe_fused_gate always normalises, norm_topk_prob=False"),
    ],
)  # fmt: skip
def test_what_a_peer_does_not_compute_is_refused(launch: Launch, reason: str) -> None:
    assert peer_time([launch], "off") == (None, [reason])


@pytest.mark.parametrize("launch", LAUNCHES, ids=lambda launch: launch.op.__name__)
def test_without_the_package(launch: Launch, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sgl_kernel", None)
    peer, (reason,) = peer_time([launch], "off")
    assert (peer is None) == (len(PEERS[launch.op]) == 1)
    assert reason.startswith("ModuleNotFoundError: import of sgl_kernel halted")


@pytest.mark.parametrize(("torch_us", "sgl_us"), [(7.0, 3.0), (3.0, 7.0)])
def test_the_fastest_of_two_is_the_peer(
    torch_us: float, sgl_us: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    times = iter([(4.0, torch_us), (4.0, sgl_us)])
    monkeypatch.setattr(bench_peers, "interleaved_us", lambda ours, theirs: next(times))
    peer, refusals = peer_time([LAUNCHES[2]], "off")
    assert peer is not None
    assert refusals == []
    names = {torch_us: "torch.mm", sgl_us: "sgl_kernel.dsv3_router_gemm"}
    assert [(p.us, p.name) for p in (peer, *peer.others)] == sorted(names.items())


def test_where_one_of_two_refuses_the_other_is_the_peer() -> None:
    peer, refusals = peer_time([Launch(router_gemm, randn(17, 256), randn(16, 256))], "off")
    assert peer is not None
    assert (peer.name, peer.others) == ("torch.mm", ())
    assert refusals == ["RuntimeError: num_tokens must be less than or equal to 16"]


@pytest.mark.parametrize(("before", "after"), [(None, "1"), ("0", "0")])
def test_its_pdl_is_on_unless_told_otherwise(
    before: str | None, after: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if before is not None:
        monkeypatch.setenv("TRTLLM_ENABLE_PDL", before)
    bench_peers_sgl.sgl_kernel()
    assert os.environ["TRTLLM_ENABLE_PDL"] == after
