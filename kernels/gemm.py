"""Linear layers: dense weights, FP8 weights in 128x128 blocks, and the fp32-out GEMM of the small
gates.

linear:      y[t, o] = sum_i x[t, i] w[o, i]                          rounded once, to x's dtype
FP8:         w[o, i] = w8[o, i] * scale[o // 128, i // 128]           activations stay unquantised
(W8A16)
gate_gemm:   the same with fp32 inputs and output: the router, the indexer's weights_proj, lm_head
"""

import torch.nn.functional as F
from torch import Tensor

from minidsv.kernels.quant import dequantize_fp8_blocks


def linear(x: Tensor, weight: Tensor, scale: Tensor | None = None) -> Tensor:
    """x [T, in], weight [out, in] in x's dtype, or e4m3 with block scales -> [T, out]."""
    if scale is None:
        assert weight.dtype == x.dtype, f"{weight.dtype=} {x.dtype=}"
        return F.linear(x, weight)
    return F.linear(x.float(), dequantize_fp8_blocks(weight, scale)).to(x.dtype)


def gate_gemm(x: Tensor, weight: Tensor) -> Tensor:
    """x [T, in], weight [out, in] -> fp32 [T, out], accumulated in fp32."""
    return F.linear(x.float(), weight.float())
