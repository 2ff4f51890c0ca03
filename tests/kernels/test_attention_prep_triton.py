"""attention_prep's one launch against the references of its five operators, in buffers of NaN.

On a GPU DeepSeek-V3.2 with caches alike in every PDL mode, which must agree in every bit; the rest
(GLM-5, interleaved; the bundled model; unlike caches; more tokens) in one. `test_triton.py` runs
the same file in Triton's interpreter, where activations are fp32 and nothing is quantised.
"""

import functools
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from compare import assert_close
from minidsv.kernels.attention_prep import IndexKeys, IndexQueries, LatentRows, attention_prep
from minidsv.kernels.index_cache import fp8_page_bytes, read_index_k_buffer
from minidsv.kernels.pdl import is_interpreted
from minidsv.kernels.set_mla_kv_buffer import fp8_row_bytes, read_mla_kv_buffer
from minidsv.kernels.tiles_gemm import PREPARED_TOKENS

pytestmark = [] if is_interpreted() else [pytest.mark.gpu]
DEVICE = "cpu" if is_interpreted() else "cuda"
MODES = ("prefetch",) if is_interpreted() else ("off", "seed", "on", "prefetch")
DTYPE = torch.float32 if is_interpreted() else torch.bfloat16
TOKENS = (0, 1, 18) if is_interpreted() else (0, 1, 8, 17, 64, 65)
CACHES = ("plain",) if is_interpreted() else ("plain", "fp8")
# (heads, n, v, C, r, index heads), whether the indexer's rope is interleaved
TINY, FULL = (3, 24, 16, 128, 32, 20), (128, 128, 128, 512, 64, 64)
SHAPES = [(FULL, False), ((64, 192, 256, 512, 64, 32), True), ((8, 64, 64, 128, 64, 32), False)]
SHAPES = [(TINY, False), (TINY, True)] if is_interpreted() else SHAPES
PAGES, PAGE = 5, 64


def normal(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(dtype).to(DEVICE)


def poisoned(fp8: bool, plain: tuple[int, ...], packed: tuple[int, ...]) -> Tensor:
    if fp8:
        return torch.full(packed, 0xFF, dtype=torch.uint8, device=DEVICE)
    return torch.full(plain, float("nan"), dtype=DTYPE, device=DEVICE)


@functools.cache
def key_weights(heads: int, n: int, v: int, c: int) -> Tensor:
    """w_uk [H, n, C], a view as the model's."""
    return (normal(heads, n + v, c, seed=2) / 8).to(DTYPE)[:, :n]


class Layer:
    """Inputs of one call, over caches of its own."""

    def __init__(self, tokens: int, dims: tuple[int, ...], kv: str, index: str, part: str):
        heads, n, v, c, r, index_heads = dims
        d = 2 * r
        self.q = normal(tokens, heads, n + r, seed=1, dtype=DTYPE)
        self.w_uk = key_weights(heads, n, v, c)
        slots = PAGES * PAGE
        self.kv = poisoned(kv == "fp8", (slots, c + r), (slots, fp8_row_bytes(c, r)))
        self.index = poisoned(index == "fp8", (PAGES, PAGE, d), (PAGES, fp8_page_bytes(d)))
        rows, gain = normal(tokens, c + r, seed=3, dtype=DTYPE), normal(c, seed=4)
        self.latents = LatentRows(self.kv, rows, gain, 1e-6)
        k = normal(tokens, d, seed=5, dtype=DTYPE)
        self.keys = IndexKeys(self.index, k, normal(d, seed=6), normal(d, seed=7), 1e-6)
        index_q = normal(tokens, index_heads, d, seed=8, dtype=DTYPE)
        gate = normal(tokens, index_heads, seed=9)
        self.queries = IndexQueries(index_q, gate, 0.3, 0.7)
        self.parts = (
            None if part == "neither" else self.keys,
            self.queries if part == "queries" else None,
        )
        angle = normal(tokens, r // 2, seed=10)
        self.rope = angle.cos(), angle.sin()
        self.loc = torch.randperm(slots, generator=torch.Generator().manual_seed(11))[:tokens]
        self.loc = self.loc.to(DEVICE)

    def run(self, interleaved: bool, mode: str | None) -> Iterator[Tensor]:
        """Every result, the caches last."""
        q_latent, q_pe, index = attention_prep(
            self.q, self.w_uk, self.latents, *self.parts, self.loc, self.rope, interleaved, mode
        )
        yield from (q_latent, q_pe, *([] if index is None else index))
        yield from (self.kv, self.index)

    def written(self) -> tuple[Tensor, Tensor]:
        """The rows of both caches as numbers."""
        c, d = self.latents.gain.shape[0], self.keys.k.shape[1]
        keys = read_index_k_buffer(self.index, torch.arange(PAGES, device=DEVICE), d)
        return read_mla_kv_buffer(self.kv, self.loc, c), keys[self.loc]


PARTS = [(index, part) for index in CACHES for part in ("queries", "keys")]


@pytest.mark.parametrize(("index", "part"), [*PARTS, ("plain", "neither")])
@pytest.mark.parametrize("kv", CACHES)
@pytest.mark.parametrize(("dims", "interleaved"), SHAPES)
def test_against_the_operators(dims, interleaved: bool, kv: str, index: str, part: str) -> None:
    for tokens in TOKENS:
        one_launch = dims == FULL and kv == index and tokens <= PREPARED_TOKENS
        modes = MODES if one_launch else MODES[-1:]
        want = Layer(tokens, dims, kv, index, part)
        expected = list(want.run(interleaved, None))
        results = []
        for mode in modes:
            layer = Layer(tokens, dims, kv, index, part)
            results.append([*layer.run(interleaved, mode)])
            for one, other in zip(results[0], results[-1], strict=True):
                same = torch.equal(*(t.contiguous().view(torch.uint8) for t in (one, other)))
                assert same or not one.numel(), f"{mode} differs from {modes[0]}"
        tol = "fp32_logits" if torch.float32 == DTYPE else "bf16"
        names = ("q_latent", "q_pe", "index q", "weights")[: len(expected) - 2]
        for name, got, wanted in zip(names, results[0], expected, strict=False):
            coarse = "fp8_step" if got.dtype == torch.float8_e4m3fn else tol
            assert_close(f"{name} of {tokens}", got.float(), wanted.float(), coarse)
        rows, keys = layer.written()
        want_rows, want_keys = want.written()
        assert_close("rows", rows, want_rows, "fp8_step" if kv == "fp8" else tol)
        if part == "neither":
            assert torch.equal(layer.index.view(torch.uint8), want.index.view(torch.uint8))
        else:
            assert_close("keys", keys, want_keys, "fp8_step" if index == "fp8" else tol)
        others = torch.ones(PAGES * PAGE, dtype=torch.bool, device=DEVICE)
        others[layer.loc] = False
        untouched = layer.kv.view(torch.uint8)[others] == want.kv.view(torch.uint8)[others]
        assert untouched.all()


def test_fp8_rows_of_exact_numbers() -> None:
    """Latents whose amax is 448, so that their scale is 1 and every code is a gain."""
    layer = Layer(5, SHAPES[-1][0], "fp8", "plain", "keys")
    c, r = layer.latents.gain.shape[0], layer.q.shape[2] - layer.w_uk.shape[1]
    gain = torch.tensor([448.0, -3.5, 0.0, 26.0]).repeat(c // 4).to(DEVICE)
    rows = torch.full((5, c + r), 2.0)
    rows[:, c:] = torch.arange(r) % 7 - 3
    quarter = torch.zeros(5, r // 2, device=DEVICE), torch.ones(5, r // 2, device=DEVICE)
    layer.latents = LatentRows(layer.kv, rows.to(DEVICE, DTYPE), gain, 0.0)
    layer.rope = quarter
    list(layer.run(False, MODES[-1]))
    got, _ = layer.written()
    assert torch.equal(got[:, :c], gain.expand(5, c))
    turned = torch.stack((-rows[:, c + 1 :: 2], rows[:, c::2]), -1).flatten(1)
    assert torch.equal(got[:, c:].cpu(), turned)
