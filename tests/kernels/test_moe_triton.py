"""The MLPs' Triton kernels against the references, over full, empty and uneven experts.

On a GPU in every PDL mode, bitwise equal; `test_triton.py` runs the file in Triton's interpreter.
"""

import pytest
import torch
from torch import Tensor

from compare import assert_close, relative_l2
from minidsv.kernels.moe import moe_experts, moe_experts_ref, swiglu_mlp, swiglu_mlp_ref
from minidsv.kernels.pdl import is_interpreted, triton_mode
from minidsv.kernels.quant import quantize_fp8_blocks
from minidsv.kernels.tile import Tile

pytestmark = [] if is_interpreted() else [pytest.mark.gpu]
DEVICE = "cpu" if is_interpreted() else "cuda"
MODES = ("prefetch",) if is_interpreted() else ("off", "seed", "on", "prefetch")
DTYPE = torch.float32 if is_interpreted() else torch.bfloat16
TOLERANCE = "fp32_logits" if is_interpreted() else "bf16"
SUMS = "fp32_logits" if is_interpreted() else "bf16_terms"
# tokens, experts, top_k, hidden, inner, inner of the shared expert (0: none)
CASES = [
    (1, 4, 2, 128, 128, 128),
    (3, 4, 2, 160, 96, 32),
    (21, 3, 1, 128, 64, 0),
    (140, 2, 1, 144, 64, 32),
    (260, 2, 1, 64, 80, 32),
]  # a few tokens in a tile of many
if not is_interpreted():
    CASES = [(0, 8, 2, 256, 128, 128), (1, 8, 2, 256, 128, 128), (1, 256, 8, 7168, 256, 256),
             (1, 64, 6, 2048, 1408, 2816), (2, 8, 2, 256, 128, 0), (3, 64, 6, 2048, 1408, 2816),
             (33, 8, 2, 256, 128, 128), (64, 256, 8, 1024, 256, 256), (700, 64, 6, 512, 128, 256),
             (1040, 8, 2, 256, 128, 128), (150, 8, 2, 256, 384, 128), (17, 16, 4, 272, 144, 80),
             (2100, 64, 6, 2048, 1408, 2816)]  # fmt: skip
MLPS = [(1, 128, 64), (19, 96, 160)]
if not is_interpreted():
    MLPS = [(0, 256, 512), (1, 7168, 2304), (8, 7168, 2304), (64, 2048, 10944), (130, 256, 512),
            (1000, 2048, 1408), (5, 272, 144)]  # fmt: skip


def randn(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator(DEVICE).manual_seed(seed)
    return torch.randn(shape, generator=generator, device=DEVICE)


def stack(fp8: bool, *shape: int, seed: int) -> tuple[Tensor, Tensor | None]:
    """Weights of unit gain [..., out, in], quantised block by block if wanted."""
    weight = randn(*shape, seed=seed) * shape[-1] ** -0.5
    if not fp8:
        return weight.to(DTYPE), None
    parts = [quantize_fp8_blocks(w, ue8m0=False) for w in weight.flatten(0, -3)]
    data = torch.stack([q.view(torch.uint8) for q, _ in parts]).view(torch.float8_e4m3fn)
    scale = torch.stack([s for _, s in parts])
    return data.view(weight.shape), scale.view(*weight.shape[:-2], *scale.shape[1:])


def mlp(fp8: bool, experts: int, hidden: int, inner: int, seed: int) -> tuple[Tensor | None, ...]:
    gate_up = stack(fp8, experts, 2, inner, hidden, seed=seed)
    return *gate_up, *stack(fp8, experts, hidden, inner, seed=seed + 1)


def one(weights: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    return tuple(None if w is None else w[0] for w in weights)


def tokens_of(count: int, hidden: int) -> Tensor:
    """x with NaN in the rows behind it."""
    whole = torch.full((count + 2, hidden), float("nan"), dtype=DTYPE, device=DEVICE)
    whole[:count] = randn(count, hidden).to(DTYPE)
    return whole[:count]


@pytest.mark.parametrize("fp8", [True, False])
@pytest.mark.parametrize(("tokens", "experts", "top_k", "hidden", "inner", "shared"), CASES)
def test_moe_experts(
    tokens: int, experts: int, top_k: int, hidden: int, inner: int, shared: int, fp8: bool
) -> None:
    x = tokens_of(tokens, hidden)
    stacks = mlp(fp8, experts, hidden, inner, seed=1)
    shared_mlp = one(mlp(fp8, 1, hidden, shared, seed=3)) if shared else (None,) * 4
    favour = randn(tokens, experts, seed=5) + 2 * randn(experts, seed=6)  # busy and idle experts
    ids = favour.topk(top_k).indices
    weights = torch.rand(tokens, top_k, device=DEVICE) + 0.1
    results = [moe_experts(x, weights, ids, *stacks, *shared_mlp, pdl=mode) for mode in MODES]
    want = moe_experts_ref(x, weights, ids, *stacks, *shared_mlp)
    terms = (weights.square().sum(1, keepdim=True) + (shared > 0)).sqrt()  # what roundings add to
    for got in results:
        assert got.dtype == want.dtype
        assert_close("experts", got.float() / terms, want.float() / terms, SUMS)
        assert torch.equal(got, results[0])


@pytest.mark.parametrize("fp8", [True, False])
@pytest.mark.parametrize(("top_k", "shared"), [(3, 592), (5, 0), (0, 592)])
def test_lone_token_in_short_steps(top_k: int, shared: int, fp8: bool) -> None:
    """Several of each sum, whose slots are no multiple of those that share a step."""
    from minidsv.kernels.moe_lone_triton import lone
    from minidsv.kernels.moe_weights_triton import Weights

    x, stacks = tokens_of(1, 48), mlp(fp8, 6, 48, 320, seed=1)
    own = one(mlp(fp8, 1, 48, shared, seed=3)) if shared else (None,) * 4
    ids = torch.tensor([[4, 0, 5, 1, 2][:top_k]], dtype=torch.int64, device=DEVICE)
    weights = torch.rand(1, top_k, device=DEVICE) + 0.1
    want = moe_experts_ref(x, weights, ids, *stacks, *own)
    experts = Weights(*own) if shared else None
    routed = Weights(*stacks) if top_k else experts
    tiles = Tile(block_n=32, block_k=32, num_stages=1), Tile(block_n=8, block_k=512, num_stages=1)
    terms = (weights.square().sum() + (shared > 0)).sqrt()
    for mode in MODES:
        got = lone(x, weights, ids, routed, experts, tiles, triton_mode(x, mode))
        assert_close("experts", got.float() / terms, want.float() / terms, SUMS)


@pytest.mark.parametrize("fp8", [True, False])
@pytest.mark.parametrize(("tokens", "hidden", "inner"), MLPS)
def test_swiglu_mlp(tokens: int, hidden: int, inner: int, fp8: bool) -> None:
    x, weights = tokens_of(tokens, hidden), one(mlp(fp8, 1, hidden, inner, seed=1))
    results = [swiglu_mlp(x, *weights, pdl=mode) for mode in MODES]
    want = swiglu_mlp_ref(x, *weights)
    for got in results:
        assert_close("mlp", got, want, TOLERANCE)
        assert torch.equal(got, results[0])


@pytest.mark.parametrize("tokens", [1, 5])
def test_faint_tokens_keep_their_bits(tokens: int) -> None:
    """Their activations are below what f16 holds."""
    x, weights = tokens_of(tokens, 128) * 3e-4, one(mlp(True, 1, 128, 256, seed=1))
    want = swiglu_mlp_ref(x, *weights)
    assert want.abs().max() < 1e-6
    for mode in MODES:
        assert relative_l2(swiglu_mlp(x, *weights, pdl=mode), want) < 1e-2


@pytest.mark.parametrize(("slots", "experts", "bt"), [(1, 4, 8), (600, 5, 32), (5000, 3, 128)])
def test_plan(slots: int, experts: int, bt: int) -> None:
    """Slots by expert, in order; tiles of one expert each, the unused ones empty."""
    from minidsv.kernels.moe_plan_triton import max_tiles, prepare

    ids = (randn(slots, 1).abs() * 1.2).long().clamp_max(experts - 1)  # the last ones are rare
    for mode in MODES:
        plan, order = prepare(ids, experts, bt, triton_mode(ids, mode))
        assert torch.equal(order.long(), ids.flatten().sort(stable=True).indices)
        tiles = [tile for tile in plan.tolist() if tile[1] < tile[2]]
        assert plan.tolist() == tiles + [[0, 0, 0]] * (max_tiles(slots, experts, bt) - len(tiles))
        named = ids.flatten()[order.long()].tolist()
        covered = [e for e, begin, end in tiles for _ in range(begin, end)]
        assert covered == named
        assert all(0 < end - begin <= bt for _, begin, end in tiles)
        assert len(tiles) == sum(-(-named.count(e) // bt) for e in range(experts))
