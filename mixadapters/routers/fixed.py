"""Routers that do not look at their input."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mixadapters.core.context import ForwardContext
from mixadapters.core.fields import finite
from mixadapters.core.registry import nearest
from mixadapters.core.routing import Routing
from mixadapters.routers.base import LOSS_OPTIONS, ROUTERS, Router


@ROUTERS.register("single")
class SingleRouter(Router):
    """The only expert, with weight 1. Raises ValueError for several."""

    always_first = True
    without = LOSS_OPTIONS

    def __init__(self, in_features: int, experts: list[str]) -> None:
        super().__init__(in_features, experts)
        if len(self.experts) > 1:
            raise ValueError(f"a SingleRouter has one expert, not {self.experts}")

    def forward(self, tokens: Tensor, context: ForwardContext) -> Routing:
        return Routing()

    def constant(self) -> list[float] | None:
        return [1.0]


@ROUTERS.register("constant")
class ConstantRouter(Router):
    """Every expert with a weight fixed by the user: in their order, or by name. None: the mean.

    Where layers of a mixture have different experts, the weights are those of all; each layer takes those of its own.

    Raises:
        ValueError: as many weights as experts are needed.
    """

    without = LOSS_OPTIONS

    def __init__(self, in_features: int, experts: list[str], weights: Any = None) -> None:
        super().__init__(in_features, experts)
        named = dict.fromkeys(experts, 1 / len(experts)) if weights is None else by_name(weights, experts)
        weights = [named[name] for name in experts]
        if not all(finite(weight) for weight in weights):
            raise ValueError(f"weights={weights} must be finite numbers")
        self.register_buffer("weights", torch.tensor(weights), persistent=False)

    def forward(self, tokens: Tensor, context: ForwardContext) -> Routing:
        rows = tokens.numel() // tokens.shape[-1]
        return Routing(weights=self.weights.expand(rows, -1))

    def constant(self) -> list[float] | None:
        return self.weights.tolist()

    @classmethod
    def among(cls, options: Mapping[str, Any], experts: Sequence[str], everyone: Sequence[str]) -> dict[str, Any]:
        if options.get("weights") is None:
            return dict(options)
        named = by_name(options["weights"], everyone)
        return {**options, "weights": {name: named[name] for name in experts}}


def by_name(weights: Any, experts: Sequence[str]) -> dict[str, Any]:
    """Weights in the order of `experts`, or by name, as {name: weight}. Raises ValueError for others than theirs."""
    if isinstance(weights, str) or not isinstance(weights, Iterable):
        raise ValueError(
            f"weights={weights!r:.80} must be a list of numbers, one for each expert, or a dict of names to them"
        )
    if not isinstance(weights, Mapping):
        weights = list(weights)
        if len(weights) != len(experts):
            raise ValueError(
                f"weights={weights} must have one entry for each expert of {list(experts)}: give {len(experts)}, or a "
                "dict of names to weights"
            )
        return dict(zip(experts, weights, strict=True))
    missing = [name for name in experts if name not in weights]
    unknown = [name for name in weights if name not in experts]
    if missing or unknown:
        remedies = [f"add {missing}, 0 for no weight"] if missing else []
        remedies += [f"take out {unknown}"] if unknown else []
        close = nearest(str(unknown[0]), missing) if unknown else ""
        raise ValueError(
            f"weights={dict(weights)} must have one entry for each expert of {list(experts)}: "
            f"{' and '.join(remedies)}.{close}"
        )
    return {name: weights[name] for name in experts}
