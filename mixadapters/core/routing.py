"""What a router decides, and under which name others find it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mixadapters.core.showing import brief

FROZEN = "frozen"  # the arm of the frozen layer's own output
NO_LAYER = -1  # of a module that lies in no numbered layer


class Routing(NamedTuple):
    """Which experts each of N rows uses, and how much. Experts are numbered as in the bank."""

    indices: Tensor | None = None  # (N, k) int, -1 selects nothing; None: every expert, in order
    weights: Tensor | None = None  # (N, k), or (N, E) where indices is None; differentiable; None: 1
    base_weight: Tensor | None = None  # (N,) weight of the frozen layer's own output; None: 1
    probs: Tensor | None = None  # (N, A) the router's distribution over its arms, for losses and usage only
    run: int = 1  # `indices` are constant over every so many consecutive rows
    logits: Tensor | None = None  # (N, A) what the distribution was made of, for the router z-loss
    arms: tuple[str, ...] = ()  # names of the columns of probs; filled in for observers
    selected: Tensor | None = None  # (N, A) bool: the arms that were chosen; None: the router chooses none
    chances: Tensor | None = None  # (N, A) how probable each arm's choice was, where noise is drawn; for the load loss

    def __repr__(self) -> str:
        return brief(self)

    def to(self, device: torch.device | str) -> Routing:
        """The same on another device: layers of one model may lie on several."""
        moved: dict[str, Any] = {n: part.to(device) for n, part in self._asdict().items() if isinstance(part, Tensor)}
        return self._replace(**moved)


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


def with_distribution(
    routing: Routing, experts: Sequence[str], arms: Sequence[str], rows: int, device: torch.device
) -> Routing:
    """The routing with the names of its arms; and with probs (rows, A), made of its weights where it has none.

    Then the arms are the experts, and where rows may be left to the frozen layer, that. Where indices say which were
    chosen, and nothing else does, `selected` is made of them.
    """
    indices, weights, base_weight = routing.indices, routing.weights, routing.base_weight
    if routing.probs is not None:
        count = routing.probs.shape[-1]
        names = [*arms, *(f"arm{i}" for i in range(len(arms), count))]
        if routing.selected is None and indices is not None and len(experts) <= count:
            chosen = chosen_experts(indices, len(experts))
            routing = routing._replace(selected=torch.nn.functional.pad(chosen, (0, count - len(experts))))
        return routing._replace(arms=tuple(names[:count]))
    if indices is None:
        probs = torch.ones(rows, len(experts), device=device) if weights is None else weights
        return routing._replace(probs=probs, arms=tuple(experts))
    chosen = indices >= 0
    weights = chosen.float() if weights is None else weights.float() * chosen
    probs = weights.new_zeros(rows, len(experts)).scatter_add(1, indices.clamp_min(0).long(), weights)
    none = ~chosen.any(1, keepdim=True)
    frozen = none.float() if base_weight is None else base_weight.float().unsqueeze(1)
    selected = torch.cat([chosen_experts(indices, len(experts)), none], 1)
    return routing._replace(probs=torch.cat([probs, frozen], 1), arms=(*experts, FROZEN), selected=selected)


def chosen_experts(indices: Tensor, experts: int) -> Tensor:
    """indices (N, k), -1 for none -> (N, E) bool, which experts are among them."""
    last = torch.where(indices >= 0, indices, experts).long()
    found = torch.zeros(len(indices), experts + 1, dtype=torch.bool, device=indices.device)
    return found.scatter(1, last, True)[:, :experts]


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
