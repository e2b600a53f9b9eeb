"""What a router decides, and under which name others find it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor

NO_LAYER = -1  # of a module that lies in no numbered layer


class Routing(NamedTuple):
    """Which experts each of N rows uses, and how much. Experts are numbered as in the bank."""

    indices: Tensor | None = None  # (N, k) int, -1 selects nothing; None: every expert, in order
    weights: Tensor | None = None  # (N, k), or (N, E) where indices is None; differentiable; None: 1
    keep: Tensor | None = None  # (N,) weight of the frozen layer's own output; None: 1
    probs: Tensor | None = None  # (N, A) the gate's distribution over its arms, for losses and usage only
    run: int = 1  # `indices` are constant over every so many consecutive rows
    logits: Tensor | None = None  # (N, A) what the distribution was made of, for the router z-loss


class RoutingKey(NamedTuple):
    """Where a routing was decided. `path` and `step` tell apart what one adapter decides in one part of a layer."""

    adapter: str = ""
    group: str = ""  # the sublayer: "attention", "cross_attention" or "ffn"; "" where that cannot be told
    layer: int = NO_LAYER
    path: str = ""  # of the adapted module
    step: str = ""  # of a chain of adapters

    def __str__(self) -> str:
        step = f", step {self.step!r}" if self.step else ""
        return f"adapter {self.adapter!r}, {self.group or 'no sublayer'}, layer {self.layer} ({self.path!r}{step})"

    def covers(self, other: RoutingKey) -> bool:
        """Whether this key, in which `path` and `step` may be left out, means `other`."""
        return self[:3] == other[:3] and self.path in ("", other.path) and self.step in ("", other.step)


def find_routing(routings: Mapping[RoutingKey, Routing], key: RoutingKey) -> Routing:
    """The one routing that `key` means; its `path` and `step` may be left out where there is only one.

    Raises:
        RuntimeError: no router has decided it yet in this forward, or several have.
    """
    if key in routings:
        return routings[key]
    found = [other for other in routings if key.covers(other)]
    if len(found) != 1:
        have = "; ".join(str(other) for other in found or routings) or "none"
        raise RuntimeError(
            f"{'several routings have' if found else 'no routing has'} been published under {key}; there are: {have}"
        )
    return routings[found[0]]
