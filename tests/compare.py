"""assert_close: one comparison with named tolerances; nothing in the environment loosens it."""

from typing import NamedTuple

import torch
from torch import Tensor


class Tolerance(NamedTuple):
    """Elementwise |got - want| <= atol + rtol |want|, and 1 - cosine similarity <= cosine."""

    atol: float
    rtol: float
    cosine: float


TOLERANCES = {
    "exact": Tolerance(0.0, 0.0, 0.0),
    "fp32": Tolerance(2e-6, 2e-5, 1e-9),
    "fp32_logits": Tolerance(5e-5, 1e-4, 1e-10),
    "bf16": Tolerance(1e-2, 1.6e-2, 1e-4),
    "bf16_terms": Tolerance(2e-2, 1.6e-2, 1e-4),  # a term of up to 4 rounded the other way: 2^-6
    "fp8_weight": Tolerance(2e-2, 6.5e-2, 1e-3),
    "fp8_step": Tolerance(2e-2, 0.126, 1e-3),  # rounded to the other neighbour
}


def assert_close(name: str, got: Tensor, want: Tensor, tol: str) -> None:
    """Compare shape, dtype, inf and nan masks, elements, direction; names the worst element."""
    limit = TOLERANCES[tol]
    assert got.shape == want.shape, f"{name}: shape {tuple(got.shape)}, want {tuple(want.shape)}"
    assert got.dtype == want.dtype, f"{name}: dtype {got.dtype}, want {want.dtype}"
    a, b = got.double().flatten(), want.double().flatten()
    for mask in (torch.isnan, torch.isposinf, torch.isneginf):
        assert torch.equal(mask(a), mask(b)), f"{name}: {mask.__name__} differs"
    a, b = a.nan_to_num(0.0, 0.0, 0.0), b.nan_to_num(0.0, 0.0, 0.0)
    if not a.numel():
        return
    excess = (a - b).abs() - limit.atol - limit.rtol * b.abs()
    worst = int(excess.argmax())
    assert excess[worst] <= 0, (
        f"{name}: element {worst} of {tuple(got.shape)} is {a[worst]:.9g}, want {b[worst]:.9g} "
        f"({int((excess > 0).sum())} of {a.numel()} outside {tol})"
    )
    if norm := float(a.norm() * b.norm()):
        distance = 1 - float(a @ b) / norm
        assert distance <= max(limit.cosine, 1e-12), f"{name}: 1 - cosine is {distance:.3g}"


def relative_l2(got: Tensor, want: Tensor) -> float:
    """||got - want|| / ||want||; NaN where got has one, so that no comparison passes on it."""
    return float((got.double() - want.double()).norm() / want.double().norm())
