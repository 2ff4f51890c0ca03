"""What the MLPs' Triton files share: the weights as they are launched, and how numbers round."""

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor


@dataclass(frozen=True)
class Weights:
    """One MLP's or a stack's weights: gate_up [..., 2, I, hidden], down [..., hidden, I]."""

    gate_up: Tensor
    gate_up_scale: Tensor | None
    down: Tensor
    down_scale: Tensor | None

    def __post_init__(self) -> None:
        for tensor in (self.gate_up, self.gate_up_scale, self.down, self.down_scale):
            assert tensor is None or tensor.is_contiguous(), f"weight strides {tensor.stride()}"

    @property
    def inner(self) -> int:
        return self.down.shape[-1]


def arguments(
    weight: Tensor, scale: Tensor | None, shared: Tensor, shared_scale: Tensor | None
) -> dict[str, Tensor]:
    """The kernels' pointers to weights and scales, which BF16 weights stand for."""
    return {
        "weight": weight, "scale": weight if scale is None else scale, "shared_weight": shared,
        "shared_scale": shared if shared_scale is None else shared_scale,
    }  # fmt: skip


def pointees(fp8: bool) -> dict[str, str | int | float]:
    """The types of `arguments`."""
    weight = "*fp8e4nv:16" if fp8 else "*bf16:16"
    scale = "*fp32:16" if fp8 else weight
    return {"weight": weight, "scale": scale, "shared_weight": weight, "shared_scale": scale}


@triton.jit
def rounded(x, BF16: tl.constexpr):
    """fp32 values as the activations' dtype holds them."""
    return x.to(tl.bfloat16).to(tl.float32) if BF16 else x
