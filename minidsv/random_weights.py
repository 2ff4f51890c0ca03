"""Random weights in the official layout, for `load_format="random"` and the tests.

They are drawn on the device, at most `SLAB` numbers at a time, so that a model takes the memory of
its parameters and little more.
"""

import math
from collections.abc import Iterator

import torch

from minidsv.checkpoint import Piece
from minidsv.config import ModelConfig
from minidsv.kernels.constants import FP8_BLOCK
from minidsv.kernels.quant import quantize_fp8_blocks
from minidsv.tensor_table import tensor_table

ROUTER_BIAS = "mlp.gate.e_score_correction_bias"
ROUTER_BIAS_STD = 0.01  # it equals the experts' load; random rows are chosen about equally already
SLAB = 1 << 24  # numbers: 64 MiB in fp32, about five times that while they are quantised


def random_tensors(
    config: ModelConfig, *, seed: int, fp8: bool, device: torch.device
) -> Iterator[Piece]:
    """Yield every tensor of the name table by whole rows of blocks, reproducibly for one device
    type.

    Matrices are N(0, 1/fan_in) so that activations keep their size, gains are near 1, biases near
    0, the router's nearest: tokens spread over the experts as over a trained model's. Linears come
    as FP8 with power-of-two block scales if `fp8`, else BF16; gains and biases FP32; the rest BF16,
    as in DeepSeek-V3.2.
    """
    generator = torch.Generator(device).manual_seed(seed)
    for name, spec in tensor_table(config).items():
        rows, *columns = spec.shape
        step = max(1, SLAB // (FP8_BLOCK * math.prod(columns))) * FP8_BLOCK
        for row in range(0, rows, step):
            shape = (min(step, rows - row), *columns)
            data = torch.randn(shape, generator=generator, device=device)
            if spec.kind == "gain":
                std = ROUTER_BIAS_STD if name.endswith(ROUTER_BIAS) else 0.05
                data = std * data if name.endswith("bias") else 1 + 0.1 * data
                yield Piece(name, spec, data, None, row)
                continue
            data *= spec.shape[-1] ** -0.5
            if spec.may_be_fp8 and fp8:
                yield Piece(name, spec, *quantize_fp8_blocks(data), row)
            else:
                yield Piece(name, spec, data.to(torch.bfloat16), None, row)
