"""What the MLPs' Triton files share: the weights as they are launched, and two device functions."""

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


@triton.jit
def prefetch(rows, size, wanted, LINES: tl.constexpr):
    """The first LINES * 128 bytes of each row of `size` elements into the L2, if `wanted`."""
    step: tl.constexpr = 128 // (rows.dtype.scalar.element_ty.primitive_bitwidth // 8)
    lines = rows[:, None] + tl.minimum(tl.arange(0, LINES) * step, size - 1)[None, :]
    tl.inline_asm_elementwise(
        "{ .reg .pred p; setp.ne.s32 p, $2, 0; @p prefetch.global.L2 [$1]; mov.u32 $0, 0; }",
        "=r,l,r",
        [lines, tl.zeros_like(lines.to(tl.int64)).to(tl.int32) + wanted],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )
