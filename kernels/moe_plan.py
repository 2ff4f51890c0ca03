"""Which program of the expert GEMMs computes what; `route` and `moe_experts` hand it to them.

A tile is tokens of one expert. Up to FEW_TOKENS tokens every expert named is one tile whose column
t is token t, so that one program may sum a token's experts; more are listed densely.
"""

from typing import NamedTuple

from torch import Tensor


class FewPlan(NamedTuple):
    """Of at most FEW_TOKENS tokens, the number of a tile's columns."""

    entries: Tensor  # int32 [1 + tiles]: how many, then expert << FEW_TOKENS | tokens' bits, rising
    shares: Tensor  # fp32 [tiles, FEW_TOKENS]: the weight of the expert's output, where it has one


class ManyPlan(NamedTuple):
    """Of any number of tokens."""

    tiles: Tensor  # int32 [tiles, 3]: expert, begin, end of entries of `order`; unused: empty
    order: Tensor  # int32 [T * k]: slots (token * k + choice) by expert, then by slot


Plan = FewPlan | ManyPlan
