"""Other libraries' kernels on the inputs of our operators, for `bench_kernels.py`.

    DeepGEMM (sgl-deep-gemm 0.1.4)  FP8 projections, experts, index logits
    FlashInfer 0.6.12               norms, rotation and quantisation of MLA
    sglang-kernel 0.4.4             sparse MLA (FlashMLA), selections and more: bench_peers_sgl.py
    torch                           BF16 products, top-k

Where several compute the same, the fastest is the peer, and the others are kept beside it. Each is
timed as its users call it in a decode graph, but without what they launch around it: the
activations of DeepGEMM's products come quantised, its experts are the two grouped products alone,
without activation and combination, and its index logits have their schedule.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import bench_peers_sgl as sgl
from bench_inputs import FP8, Launch, Peer, Run, relative_error, tensors
from bench_timing import interleaved_us
from minidsv.kernels.absorb import absorb_q, absorb_v
from minidsv.kernels.constants import PAGE_SIZE
from minidsv.kernels.gemm import Segment, fused_linear
from minidsv.kernels.indexer_logits import paged_index_logits
from minidsv.kernels.moe import moe_experts
from minidsv.kernels.norm import add_rms_norm, rms_norm
from minidsv.kernels.pdl import PdlMode
from minidsv.kernels.quant import per_token_group_quant_fp8
from minidsv.kernels.rope_quant import mla_rope_quantize_fp8
from minidsv.kernels.router import grouped_topk, router_gemm
from minidsv.kernels.sparse_mla import sparse_mla
from minidsv.kernels.topk import select_topk

QUANTISED = 6e-2  # relative L2 where activations are e4m3 too: about 0.026 a product
MASKED_ROWS = 128  # DeepGEMM's largest block of rows in a masked product


def deep_gemm() -> Any:
    import deep_gemm

    deep_gemm.set_pdl(True)
    return deep_gemm


def column_major(scale: Tensor) -> Tensor:
    """Scales [..., M, G] as DeepGEMM's TMA reads them, so that it launches nothing to turn them."""
    turned = deep_gemm().get_mn_major_tma_aligned_tensor(scale)
    return turned if isinstance(turned, Tensor) else torch.from_dlpack(turned)


def product(x: Tensor, weight: Tensor) -> Tensor:
    """x [M, K] times weight [N, K], fp32."""
    return torch.mm(x, weight.T, out_dtype=torch.float32)


def linear(x: Tensor, segments: Sequence[Segment]) -> Peer:
    """The FP8 rows as one product of DeepGEMM's, the others as torch's."""
    quantised = [s for s in segments if s.scale is not None]
    dense = [s.weight for s in segments if s.scale is None]
    if not quantised:
        return Peer("torch.mm", lambda: [product(x, w) for w in dense],
                    lambda: [product(x, w) for w in dense])  # fmt: skip
    library = deep_gemm()
    quantised.sort(key=lambda s: s.weight.shape[0] % 128 != 0)  # a cut block can only be the last
    weight = torch.cat([s.weight.view(torch.uint8) for s in quantised]).view(torch.float8_e4m3fn)
    scale = torch.cat([s.scale for s in quantised if s.scale is not None])
    codes, groups = per_token_group_quant_fp8(x)
    groups, out = column_major(groups), x.new_empty(len(x), len(weight))

    def launch() -> list[Tensor]:
        library.fp8_gemm_nt((codes, groups), (weight, scale), out)
        return [product(x, w) for w in dense]

    def outputs() -> list[Tensor]:
        others = iter(launch())
        sizes = [len(s.weight) for s in quantised]
        mine = dict(zip(map(id, quantised), out.split(sizes, 1), strict=True))
        return [mine[id(s)] if s.scale is not None else next(others) for s in segments]

    name = "deep_gemm.fp8_gemm_nt" + (" + torch.mm" if dense else "")
    return Peer(name, launch, outputs, QUANTISED)


class Masked:
    """Rows of tokens in DeepGEMM's masked layout [E, rows, *], sorted by their expert."""

    def __init__(self, ids: Tensor, experts: int):
        flat = ids.flatten().long()
        counts = torch.bincount(flat, minlength=experts)
        self.choice = flat.argsort(stable=True)  # of all T * k
        self.expert = flat[self.choice]
        first = counts.cumsum(0) - counts
        self.row = torch.arange(len(flat), device=ids.device) - first[self.expert]
        self.counts = counts.int()
        self.expected = -(-len(flat) // experts)
        rows = -(-int(counts.max()) // MASKED_ROWS) * MASKED_ROWS
        self.shape = (experts, rows)

    def quantised(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [T * k, D], in the order of `choice`."""
        codes, scale = per_token_group_quant_fp8(x)
        a = torch.zeros(*self.shape, x.shape[1], dtype=torch.uint8, device=x.device)
        a[self.expert, self.row] = codes.view(torch.uint8)
        groups = torch.ones(*self.shape, scale.shape[1], device=x.device)
        groups[self.expert, self.row] = scale
        return a.view(torch.float8_e4m3fn), column_major(groups)


def experts(
    x: Tensor,
    weights: Tensor,
    ids: Tensor,
    gate_up: Tensor,
    gate_up_scale: Tensor,
    down: Tensor,
    down_scale: Tensor,
    *shared: None,
) -> Peer:
    """The two grouped products; what lies between and behind them is torch's, and not timed."""
    library, top_k = deep_gemm(), ids.shape[1]
    masked = Masked(ids, len(gate_up))
    token = masked.choice // top_k
    first = masked.quantised(x[token])
    gate_up, gate_up_scale = gate_up.flatten(1, 2), gate_up_scale.flatten(1, 2)
    hidden = x.new_empty(*masked.shape, gate_up.shape[1])
    out = x.new_empty(*masked.shape, down.shape[1])

    def grouped(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor], d: Tensor) -> None:
        library.m_grouped_fp8_fp4_gemm_nt_masked(a, b, d, masked.counts, masked.expected)

    grouped(first, (gate_up, gate_up_scale), hidden)
    gate, up = hidden[masked.expert, masked.row].float().chunk(2, -1)
    second = masked.quantised((F.silu(gate) * up).to(x.dtype))

    def launch() -> None:
        grouped(first, (gate_up, gate_up_scale), hidden)
        grouped(second, (down, down_scale), out)

    def outputs() -> list[Tensor]:
        launch()
        y = out[masked.expert, masked.row].float() * weights.flatten()[masked.choice, None]
        total = torch.zeros(x.shape, device=x.device).index_add_(0, token, y)
        return [total.to(x.dtype)]

    return Peer("deep_gemm masked x 2", launch, outputs, QUANTISED)


def index_logits(
    q: Tensor,
    weights: Tensor,
    cache: Tensor,
    table: Tensor,
    lens: Tensor,
    rows: Tensor,
    context: int,
) -> Peer:
    library = deep_gemm()
    lengths, pages = lens.int().unsqueeze(1), table[rows].int()
    plan = library.get_paged_mqa_logits_metadata(lengths, PAGE_SIZE, library.get_num_sms())
    keys = cache.view(len(cache), PAGE_SIZE, 1, -1)

    def launch() -> Any:
        return library.fp8_paged_mqa_logits(
            q.unsqueeze(1), keys, weights, lengths, pages, plan, context
        )

    def outputs() -> list[Tensor]:
        logits = launch()
        logits = logits if isinstance(logits, Tensor) else torch.from_dlpack(logits)
        return [logits[:, :context]]

    return Peer("deep_gemm.fp8_paged_mqa_logits", launch, outputs)


def topk(
    logits: Tensor,
    lens: Tensor,
    k: int,
    table: Tensor,
    rows: Tensor,
    tickets: Tensor | None = None,  # is ours alone
) -> Peer:
    """Where every row is visible whole."""

    def launch() -> Tensor:
        return torch.topk(logits, k, sorted=False).indices

    def outputs() -> list[Tensor]:
        positions = launch().sort().values
        return [table[rows].gather(1, positions // PAGE_SIZE) * PAGE_SIZE + positions % PAGE_SIZE]

    return Peer("torch.topk", launch, outputs, 1e-2)  # of equal scores it may take another


def router(x: Tensor, weight: Tensor) -> Peer:
    return linear(x, [Segment(weight, out_dtype=torch.float32)])


def absorbed(x: Tensor, weight: Tensor, turned: bool) -> Peer:
    """x [M, H, K] by heads; weight [H, K, N], or [H, N, K] if `turned`."""
    by_head, matrix = x.transpose(0, 1), weight.mT if turned else weight

    def launch() -> Tensor:
        return torch.bmm(by_head, matrix)

    def outputs() -> list[Tensor]:
        out = launch().transpose(0, 1)
        return [out.flatten(1) if turned else out]

    return Peer("torch.bmm", launch, outputs)


def norm(x: Tensor, gain: Tensor, eps: float) -> Peer:
    from flashinfer.norm import rmsnorm

    gain, out = gain.to(x.dtype), torch.empty_like(x)

    def launch() -> None:
        rmsnorm(x, gain, eps, out=out, enable_pdl=True)

    def outputs() -> list[Tensor]:
        launch()
        return [out]

    return Peer("flashinfer.rmsnorm", launch, outputs)


def add_norm(x: Tensor, residual: Tensor, gain: Tensor, eps: float) -> Peer:
    """It writes both results over its inputs."""
    from flashinfer.norm import fused_add_rmsnorm

    gain = gain.to(x.dtype)
    mine = (x.clone(), residual.clone())

    def outputs() -> tuple[Tensor, ...]:
        both = (x.clone(), residual.clone())
        fused_add_rmsnorm(*both, gain, eps, enable_pdl=True)
        return both

    return Peer(
        "flashinfer.fused_add_rmsnorm",
        lambda: fused_add_rmsnorm(*mine, gain, eps, enable_pdl=True),
        outputs,
    )


def rope_quantize(
    q_nope: Tensor, q_pe: Tensor, k_nope: Tensor, k_pe: Tensor, cos: Tensor, sin: Tensor
) -> Peer:
    """Its cache has a row of cos, then sin, a position: here a row a token."""
    from flashinfer.rope import mla_rope_quantize_fp8 as op

    table = torch.cat((cos, sin), -1)
    tokens = torch.arange(len(cos), device=cos.device, dtype=torch.int32)
    outs = [torch.empty_like(t, dtype=torch.float8_e4m3fn) for t in (q_pe, k_pe, q_nope, k_nope)]

    def launch() -> None:
        op(q_pe, k_pe, q_nope, k_nope, table, tokens, is_neox=False, quant_scale_q=1.0,
           quant_scale_kv=1.0, quantize_dtype=torch.float8_e4m3fn, q_rope_out=outs[0],
           k_rope_out=outs[1], q_nope_out=outs[2], k_nope_out=outs[3], enable_pdl=True)  # fmt: skip

    def outputs() -> list[Tensor]:
        launch()
        return [outs[2], outs[0], outs[3], outs[1]]

    return Peer("flashinfer.mla_rope_quantize_fp8", launch, outputs, FP8)


PEERS: dict[Callable[..., object], tuple[Callable[..., Peer], ...]] = {
    fused_linear: (linear,),
    moe_experts: (experts,),
    paged_index_logits: (index_logits,),
    select_topk: (topk, sgl.topk),
    sparse_mla: (sgl.flash_mla,),
    router_gemm: (router, sgl.router),
    grouped_topk: (sgl.fused_gate,),
    absorb_q: (lambda x, weight: absorbed(x, weight, turned=False),),
    absorb_v: (lambda x, weight: absorbed(x, weight, turned=True),),
    rms_norm: (norm,),
    add_rms_norm: (add_norm,),
    mla_rope_quantize_fp8: (rope_quantize,),
    per_token_group_quant_fp8: (sgl.group_quant,),
}


@dataclass(frozen=True)
class PeerTime:
    """What was measured of a peer beside our operator."""

    name: str
    us: float
    ours_us: float  # in turn with it
    error: float  # relative L2 against our reference
    others: tuple["PeerTime", ...] = ()  # slower ones


class Refused(Exception):
    """There is no figure of this peer here; says why."""


def peer_time(runs: Sequence[Run], mode: PdlMode) -> tuple[PeerTime | None, list[str]]:
    """The fastest peer of these runs beside our operator, if any has a figure, and why others
    have none."""
    ours = [run for run in runs if isinstance(run, Launch) and run.op in PEERS]
    if not ours:
        return None, []
    want = [t.clone() for t in tensors(ours[0](None))]
    times, refusals = list[PeerTime](), list[str]()
    for build in PEERS[ours[0].op]:
        try:
            times.append(timed(build, ours, want, mode))
        except Refused as refused:
            refusals.append(str(refused))
    times.sort(key=lambda time: time.us / time.ours_us)  # ours ran as hot
    return (replace(times[0], others=tuple(times[1:])) if times else None), refusals


def timed(
    build: Callable[..., Peer], ours: Sequence[Launch], want: Sequence[Tensor], mode: PdlMode
) -> PeerTime:
    """A peer held to `want`, our reference of the first of its runs, then both timed in turn.

    Raises Refused, whatever goes wrong inside the other library.
    """
    try:
        peers = [build(*run.args, **run.options) for run in ours]
        got = [t.to(w.dtype) for t, w in zip(peers[0].outputs(), want, strict=True)]
        error = relative_error(got, list(want))
        if not error <= peers[0].tolerance:
            raise Refused(f"{peers[0].name}: relative L2 {error:.3g} against our reference")
        launches = [functools.partial(run, mode) for run in ours]
        ours_us, us = interleaved_us(launches, [peer.launch for peer in peers])
    except Refused:
        raise
    except Exception as failure:  # another library's: an import, a compiler, a refused shape
        message = (str(failure).strip() or repr(failure)).splitlines()[0]
        raise Refused(f"{type(failure).__name__}: {message}") from failure
    return PeerTime(peers[0].name, us, ours_us, error)
