"""FP8 quantisation: scales by exponent bits, groups, ragged blocks, the Hadamard rotation."""

import pytest
import torch

from compare import assert_close
from minidsv.kernels.quant import (
    dequantize_fp8_blocks,
    dequantize_groups,
    hadamard,
    hadamard_matrix,
    per_token_group_quant_fp8,
    quantize_fp8_blocks,
    round_scale_ue8m0,
)


def test_ue8m0_is_the_next_power_of_two() -> None:
    powers = torch.tensor([2.0**e for e in range(-100, 100)])
    assert torch.equal(round_scale_ue8m0(powers), powers)
    for ulps in (1, 2, 7):  # where 2 ** ceil(log2(s)) in fp32 would round down
        above = (powers.view(torch.int32) + ulps).view(torch.float32)
        assert torch.equal(round_scale_ue8m0(above), 2 * powers)


@pytest.mark.parametrize("ue8m0", [False, True])
def test_groups(ue8m0: bool) -> None:
    x = torch.randn(33, 512, generator=torch.Generator().manual_seed(0)) * torch.logspace(
        -6, 6, 512
    )
    x[3] = 0.0
    x[4] = 1e-9
    q, scale = per_token_group_quant_fp8(x, ue8m0=ue8m0)
    assert q.dtype == torch.float8_e4m3fn
    assert scale.shape == (33, 4)
    amax = x.unflatten(-1, (4, 128)).abs().amax(-1).clamp_min(1e-4)
    assert (scale * 448 >= amax * (1 - 1e-6)).all()
    back = dequantize_groups(q, scale)
    assert torch.isfinite(back).all()
    step = (amax / 448 * 2 if ue8m0 else amax / 448).repeat_interleave(128, 1)
    assert ((back - x).abs() <= x.abs() / 16 + step * 2.0**-9 + 1e-12).all()
    assert (back[3] == 0).all()


@pytest.mark.parametrize("shape", [(128, 128), (576, 256), (1, 1), (200, 130), (64, 384)])
def test_weight_blocks(shape: tuple[int, int]) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    q, scale = quantize_fp8_blocks(weight)
    assert scale.shape == (-(-shape[0] // 128), -(-shape[1] // 128))
    rows = torch.arange(shape[0]) // 128
    cols = torch.arange(shape[1]) // 128
    want = q.float() * scale[rows][:, cols]  # W[o, i] = w8[o, i] * scale[o // 128, i // 128]
    assert torch.equal(dequantize_fp8_blocks(q, scale), want)
    assert_close("round trip", want, weight, "fp8_weight")


def test_every_e4m3_number_is_dequantised_exactly() -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    numbers = codes[~codes.float().isnan()].view(1, -1)  # [1, 254]
    scale = torch.tensor([[0.5, 3.0]])
    want = numbers.float() * scale.repeat_interleave(128, 1)[:, :254]
    assert torch.equal(dequantize_fp8_blocks(numbers, scale), want)


def test_hadamard() -> None:
    matrix = hadamard_matrix(128)
    assert torch.equal(matrix, matrix.T)
    assert_close("H H = I", matrix @ matrix, torch.eye(128), "fp32")
    q, k = torch.randn(2, 5, 128, generator=torch.Generator().manual_seed(2))
    assert_close("dot products", hadamard(q) @ hadamard(k).T, q @ k.T, "fp32")
