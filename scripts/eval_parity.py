"""Two runs over the same items, compared: is B as good as A, and as near as its dtypes allow?"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any, Literal

from eval_records import Record
from eval_scoring import kl_divergence, margin, mcnemar, shift

Tier = Literal["same", "fp32", "bf16", "fp8_index", "fp8", "fp8_flat"]
ALPHA = 0.01


@dataclass(frozen=True)
class Limits:
    """What a gate allows. Nats; measured on clean pairs, with room (docs/ACCURACY.md)."""

    sure: float  # a choice or token this far before the second best may not change
    mean_kl: float  # over the four choices
    mean_shift: float  # of the choices' centred scores
    token_shift: float  # mean over generated tokens of the change of their log-probability

    def by_figure(self) -> dict[str, float]:
        """What each figure of a Verdict may be at most; p_value: at least."""
        return {
            "p_value": ALPHA,
            "sure_flips": 0,
            "sure_divergences": 0,
            "mean_kl": self.mean_kl,
            "mean_shift": self.mean_shift,
            "token_shift": self.token_shift,
        }


LIMITS: dict[Tier, Limits] = {
    "same": Limits(0.0, 0.0, 0.0, 0.0),
    "fp32": Limits(0.01, 1e-8, 2e-4, 1e-4),
    "bf16": Limits(0.5, 1e-6, 0.05, 3e-3),
    "fp8_index": Limits(0.5, 3e-8, 0.015, 3e-3),
    "fp8": Limits(0.5, 2e-6, 0.08, 3e-3),
    "fp8_flat": Limits(1.0, 1e-4, 0.15, 1e-2),
}


@dataclass(frozen=True)
class Pair:
    """One item in both runs."""

    a: Record
    b: Record
    margin_a: float  # best less second-best choice
    margin_b: float
    kl: float
    shift: float
    divergence: int | None  # number of the first generated token that differs
    token_shift: float  # mean over the tokens that both generated

    @property
    def flipped(self) -> bool:
        return self.a.letter != self.b.letter

    @property
    def token_margin(self) -> float:
        """A's, at the first token that differs; 0 without one."""
        at = self.divergence
        return self.a.token_margins[at] if at is not None and at < len(self.a.tokens) else 0.0

    def as_line(self) -> dict[str, Any]:
        """The pair as a line of JSON."""
        return {
            **{
                name: getattr(self.a, name) for name in ("id", "repeat", "topic", "order", "answer")
            },
            **{name: getattr(self, name) for name in ("kl", "shift", "divergence", "token_shift")},
            "letters": (self.a.letter, self.b.letter),
            "scores": (self.a.scores, self.b.scores),
            "margins": (self.margin_a, self.margin_b),
            "tokens": (self.a.tokens, self.b.tokens),
        }


def compare(a: Record, b: Record) -> Pair:
    assert a.scores is not None
    assert b.scores is not None
    common = sum(
        1 for _ in takewhile(lambda p: p[0] == p[1], zip(a.tokens, b.tokens, strict=False))
    )
    differs = common < max(len(a.tokens), len(b.tokens))
    changes = [
        abs(x - y)
        for x, y in zip(a.token_logprobs[:common], b.token_logprobs[:common], strict=True)
    ]
    return Pair(
        a,
        b,
        margin(a.scores),
        margin(b.scores),
        kl_divergence(a.scores, b.scores),
        shift(a.scores, b.scores),
        common if differs else None,
        math.fsum(changes) / max(len(changes), 1),
    )


@dataclass(frozen=True)
class Verdict:
    """The figures of a comparison, and what is wrong with them."""

    items: int
    accuracy_a: float
    accuracy_b: float
    flips: int
    lost: int  # right in A, wrong in B
    won: int
    p_value: float  # exact McNemar
    sure_flips: int  # letters that changed though A was sure
    sure_divergences: int  # the same of generated tokens
    divergences: int
    mean_kl: float
    max_kl: float
    mean_shift: float
    max_shift: float
    token_shift: float
    reasons: tuple[str, ...]

    @property
    def green(self) -> bool:
        return not self.reasons


def judge(pairs: Sequence[Pair], limits: Limits) -> Verdict:
    """Figures over all pairs, and a reason for each limit that they pass."""
    n = len(pairs)
    lost = sum(p.a.correct and not p.b.correct for p in pairs)
    won = sum(p.b.correct and not p.a.correct for p in pairs)
    figures: dict[str, float] = {
        "p_value": mcnemar(lost, won),
        "sure_flips": sum(p.flipped and p.margin_a > limits.sure for p in pairs),
        "sure_divergences": sum(
            p.divergence is not None and p.token_margin > limits.sure for p in pairs
        ),
        "mean_kl": _mean([p.kl for p in pairs]),
        "mean_shift": _mean([p.shift for p in pairs]),
        "token_shift": _mean([p.token_shift for p in pairs]),
    }
    reasons = [
        f"{name} {figures[name]:.3g} > {most:g}"
        for name, most in limits.by_figure().items()
        if name != "p_value" and not figures[name] <= most  # NaN is red
    ]
    if figures["p_value"] < ALPHA:
        reasons.insert(0, f"p_value {figures['p_value']:.3g} < {ALPHA} ({lost} lost, {won} won)")
    return Verdict(
        items=n,
        accuracy_a=_mean([float(p.a.correct) for p in pairs]),
        accuracy_b=_mean([float(p.b.correct) for p in pairs]),
        flips=sum(p.flipped for p in pairs),
        lost=lost,
        won=won,
        divergences=sum(p.divergence is not None for p in pairs),
        max_kl=max(p.kl for p in pairs),
        max_shift=max(p.shift for p in pairs),
        reasons=tuple(reasons),
        **figures,
    )


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)
