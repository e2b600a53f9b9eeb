"""What a router decides."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Routing(NamedTuple):
    """Which experts each of N rows uses, and how much. Experts are numbered as in the bank."""

    indices: Tensor | None = None  # (N, k) int, -1 selects nothing; None: every expert, in order
    weights: Tensor | None = None  # (N, k), or (N, E) where indices is None; differentiable; None: 1
    keep: Tensor | None = None  # (N,) weight of the frozen layer's own output; None: 1
    probs: Tensor | None = None  # (N, A) the gate's distribution over its arms, for losses and usage only
    run: int = 1  # `indices` are constant over every so many consecutive rows
