"""Random weights in the official layout, for `load_format="random"` and the tests."""

from collections.abc import Iterator

import torch
from torch import Tensor

from minidsv.config import ModelConfig
from minidsv.kernels.quant import quantize_fp8_blocks
from minidsv.tensor_table import TensorSpec, tensor_table


def random_tensors(
    config: ModelConfig, *, seed: int, fp8: bool, device: torch.device
) -> Iterator[tuple[str, TensorSpec, Tensor, Tensor | None]]:
    """Yield (name, spec, data, scale) for every tensor of the name table, reproducibly for one
    device type.

    Matrices are N(0, 1/fan_in) so that activations keep their size, gains are near 1, biases near
    0. Linears come as FP8 with power-of-two block scales if `fp8`, else BF16; gains and biases
    FP32; the rest BF16, as in DeepSeek-V3.2.
    """
    generator = torch.Generator(device).manual_seed(seed)
    for name, spec in tensor_table(config).items():
        data = torch.randn(spec.shape, generator=generator, device=device)
        if spec.kind == "gain":
            data = data * 0.05 if name.endswith("bias") else 1 + 0.1 * data
            yield name, spec, data, None
            continue
        data *= spec.shape[-1] ** -0.5
        if spec.may_be_fp8 and fp8:
            yield name, spec, *quantize_fp8_blocks(data)
        else:
            yield name, spec, data.to(torch.bfloat16), None
