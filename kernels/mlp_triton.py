"""What the Triton kernels of the MLPs share: SwiGLU, weights drawn into the L2 early, arguments."""

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def as_held(x, like):
    """x rounded to the type of `like`'s memory, in fp32."""
    return x.to(like.dtype.element_ty).to(tl.float32)


@triton.jit
def swiglu(gate, up, like):
    """silu(gate) * up in fp32, of linears' sums, which are rounded first."""
    gate, up = as_held(gate, like), as_held(up, like)
    return gate / (1.0 + tl.exp(-gate)) * up


@triton.jit
def prefetch(rows, size, wanted, LINES: tl.constexpr):
    """The first LINES * 128 bytes of each row of `size` into the L2, if `wanted`."""
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


def gate_up_arguments(routed: Weights, shared: Weights) -> dict[str, Tensor]:
    return _arguments(routed.gate_up, routed.gate_up_scale, "") | _arguments(
        shared.gate_up, shared.gate_up_scale, "shared_"
    )


def down_arguments(routed: Weights, shared: Weights) -> dict[str, Tensor]:
    return _arguments(routed.down, routed.down_scale, "") | _arguments(
        shared.down, shared.down_scale, "shared_"
    )


def _arguments(weight: Tensor, scale: Tensor | None, prefix: str) -> dict[str, Tensor]:
    return {f"{prefix}weight": weight, f"{prefix}scale": weight if scale is None else scale}


def weight_types(fp8: bool) -> dict[str, str]:
    """Of a row: `gate_up_arguments` or `down_arguments`."""
    weight = "*fp8e4nv:16" if fp8 else "*bf16:16"
    scale = "*fp32:16" if fp8 else weight
    return {
        "weight": weight, "shared_weight": weight, "scale": scale, "shared_scale": scale,
    }  # fmt: skip
