"""What layers are made of: whose operators run, a layer's parameters by name, the dense MLP."""

from dataclasses import dataclass

from torch import Tensor

from minidsv.checkpoint import Weight
from minidsv.kernels.gemm import Segment
from minidsv.kernels.moe import swiglu_mlp
from minidsv.kernels.norm import PreNorm, pre_norm
from minidsv.kernels.pdl import PdlMode
from minidsv.kernels.quant import Activations
from minidsv.kernels.rope_quant import RopeQuantBackend

FP8_ACTIVATION_TOKENS = 256  # a shorter step's time is that of reading its weights


@dataclass(frozen=True)
class Operators:
    """Whose operators a model runs: the references, or Triton's kernels in a PDL mode."""

    pdl: PdlMode | None = None
    rope_quant: RopeQuantBackend = "triton"  # for flat FP8 caches
    activations: Activations = "none"  # beside FP8 weights, in long steps

    def activations_of(self, x: PreNorm) -> Activations:
        """Those of a step with the tokens of x."""
        return self.activations if len(x.residual) >= FP8_ACTIVATION_TOKENS else "none"


@dataclass
class MLP:
    """SwiGLU over gate_up [2, I, hidden] and down [hidden, I]."""

    gate_up: Weight
    down: Weight
    operators: Operators

    def __call__(self, x: PreNorm) -> tuple[Tensor, Tensor]:
        """x [T, hidden] -> (down of it [T, hidden], the residual)."""
        gate_up, down = self.gate_up, self.down
        pdl, activations = self.operators.pdl, self.operators.activations_of(x)
        normed, residual = pre_norm(x, pdl)
        weights = gate_up.data, gate_up.scale, down.data, down.scale
        return swiglu_mlp(normed, *weights, pdl, activations), residual


class LayerWeights:
    """The parameters of one layer, by their name inside it."""

    def __init__(self, weights: dict[str, Weight], layer: int):
        self._weights, self._prefix = weights, f"layers.{layer}."

    def __getitem__(self, name: str) -> Weight:
        return self._weights[self._prefix + name]

    @property
    def signature(self) -> frozenset[tuple[object, ...]]:
        """Names, shapes and types: layers of which one says all about another."""
        return frozenset(
            (name.removeprefix(self._prefix), weight.data.shape, weight.data.dtype)
            for name, weight in self._weights.items()
            if name.startswith(self._prefix)
        )

    def linear(self, name: str) -> Segment:
        weight = self[name]
        return Segment(weight.data, weight.scale)

    def mlp(self, name: str, operators: Operators) -> MLP:
        return MLP(self[f"{name}.gate_up_proj"], self[f"{name}.down_proj"], operators)
