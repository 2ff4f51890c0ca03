"""From an answer to a letter, and from letters to figures. Pure Python."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

from minidsv.questions import LETTERS

CHOICES = tuple(f" {letter}" for letter in LETTERS)  # what may follow "Answer:"
# The first match counts, as in openai/simple-evals (gpqa_eval.py); unlike there, a lower-case
# letter does too, which its pattern matches and its comparison then calls wrong.
ANSWER = re.compile(r"(?i)Answer[ \t]*:[ \t]*\$?([A-D])\$?")
Z95 = 1.959963984540054


def extract_letter(text: str) -> str | None:
    """The letter after the first `Answer:`, or None."""
    match = ANSWER.search(text)
    return match.group(1).upper() if match else None


def best_letter(scores: Sequence[float]) -> str:
    """The most probable choice; of equals the first."""
    return LETTERS[max(range(len(LETTERS)), key=lambda i: (scores[i], -i))]


def margin(scores: Sequence[float]) -> float:
    """How far the best choice is before the second, in nats."""
    second, first = sorted(scores)[-2:]
    return first - second


def centred(scores: Sequence[float]) -> list[float]:
    """Scores less their mean: what a softmax over them depends on."""
    mean = math.fsum(scores) / len(scores)
    return [score - mean for score in scores]


def shift(a: Sequence[float], b: Sequence[float]) -> float:
    """Root mean square difference of the centred scores, in nats."""
    pairs = zip(centred(a), centred(b), strict=True)
    return math.sqrt(math.fsum((x - y) ** 2 for x, y in pairs) / len(a))


def kl_divergence(a: Sequence[float], b: Sequence[float]) -> float:
    """KL(a || b) of the distributions over the choices, in nats."""
    log_a, log_b = log_softmax(a), log_softmax(b)
    total = math.fsum(math.exp(x) * (x - y) for x, y in zip(log_a, log_b, strict=True))
    return 0.0 if total < 0 else total  # rounding; NaN stays NaN


def log_softmax(scores: Sequence[float]) -> list[float]:
    top = max(scores)
    total = top + math.log(math.fsum(math.exp(score - top) for score in scores))
    return [score - total for score in scores]


def wilson(successes: float, n: int) -> tuple[float, float]:
    """95 % interval of a share (Wilson 1927); `successes` may be a sum of per-question means."""
    if n == 0:
        return 0.0, 1.0
    share, z2 = successes / n, Z95**2
    middle = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = Z95 * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n)) / (1 + z2 / n)
    return 0.0 if share == 0 else middle - half, 1.0 if share == 1 else middle + half


def mcnemar(lost: int, won: int) -> float:
    """Exact two-sided p-value of `lost` against `won` discordant pairs (binomial, 1/2)."""
    n, extreme = lost + won, max(lost, won)
    tail = sum(math.comb(n, k) for k in range(extreme, n + 1))
    return min(1.0, 2 * tail / 2**n)
