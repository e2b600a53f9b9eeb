"""Routers that do not look at their input."""

from __future__ import annotations

from collections.abc import Mapping
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

    Raises:
        ValueError: as many weights as experts are needed.
    """

    without = LOSS_OPTIONS

    def __init__(self, in_features: int, experts: list[str], weights: Any = None) -> None:
        super().__init__(in_features, experts)
        if isinstance(weights, Mapping):
            missing = [name for name in experts if name not in weights]
            unknown = [name for name in weights if name not in experts]
            if missing or unknown:
                remedies = [f"add {missing}, 0 for no weight"] if missing else []
                remedies += [f"take out {unknown}"] if unknown else []
                close = nearest(str(unknown[0]), missing) if unknown else ""
                raise ValueError(
                    f"weights={dict(weights)} must have one entry for each expert of {experts}, which this layer has: "
                    f"{' and '.join(remedies)}.{close}"
                )
            weights = [weights[name] for name in experts]
        weights = [1 / len(experts)] * len(experts) if weights is None else list(weights)
        if len(weights) != len(experts):
            raise ValueError(
                f"weights={weights} must have one entry for each expert of {experts}, which this layer has: give "
                f"{len(experts)}, or a dict of names to weights"
            )
        if not all(finite(weight) for weight in weights):
            raise ValueError(f"weights={weights} must be finite numbers")
        self.register_buffer("weights", torch.tensor(weights), persistent=False)

    def forward(self, tokens: Tensor, context: ForwardContext) -> Routing:
        rows = tokens.numel() // tokens.shape[-1]
        return Routing(weights=self.weights.expand(rows, -1))

    def constant(self) -> list[float] | None:
        return self.weights.tolist()
