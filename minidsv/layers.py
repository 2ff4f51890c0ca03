"""The small layers: a linear over one parameter, norms, the dense MLP."""

from dataclasses import dataclass

from torch import Tensor

from minidsv.checkpoint import Weight
from minidsv.kernels.gemm import linear
from minidsv.kernels.moe import swiglu_mlp
from minidsv.kernels.norm import rms_norm


@dataclass
class Linear:
    """y = x w^T; w is [out, in], float or FP8 with block scales."""

    weight: Weight

    def __call__(self, x: Tensor) -> Tensor:
        return linear(x, self.weight.data, self.weight.scale)


@dataclass
class RMSNorm:
    weight: Tensor
    eps: float

    def __call__(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


@dataclass
class MLP:
    """SwiGLU over gate_up [2, I, hidden] and down [hidden, I]."""

    gate_up: Weight
    down: Weight

    def __call__(self, x: Tensor) -> Tensor:
        return swiglu_mlp(x, self.gate_up.data, self.gate_up.scale, self.down.data, self.down.scale)


class LayerWeights:
    """The parameters of one layer, by their name inside it."""

    def __init__(self, weights: dict[str, Weight], layer: int):
        self._weights, self._prefix = weights, f"layers.{layer}."

    def __getitem__(self, name: str) -> Weight:
        return self._weights[self._prefix + name]

    def linear(self, name: str) -> Linear:
        return Linear(self[name])

    def norm(self, name: str, eps: float) -> RMSNorm:
        return RMSNorm(self[name].data, eps)

    def mlp(self, name: str) -> MLP:
        return MLP(self[f"{name}.gate_up_proj"], self[f"{name}.down_proj"])
