"""A router that is read off the experts' weights."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mixadapters.core.bank import Weights
from mixadapters.core.context import ForwardContext
from mixadapters.core.routing import Routing
from mixadapters.routers.base import ROUTERS
from mixadapters.routers.directions import DirectionRouter
from mixadapters.routers.score import exact, linear


class Prototypes(nn.Module):
    """A vector for each arm, 0 where it has none; a buffer, so no stage trains it."""

    weight: Tensor
    bias = None

    def __init__(self, in_features: int, arms: int) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, arms
        self.register_buffer("weight", torch.zeros(arms, in_features))


@ROUTERS.register("arrow")
class ArrowRouter(DirectionRouter):
    """Top-k by |x . v_e|, with v_e the direction to which expert e answers most; a softmax over the chosen.

    No training: `fit` takes v_e from the weights, the first right singular vector of up down. Ranks may differ. x is
    not scaled, as in PEFT. Source: Ostapenko et al. 2024 (arXiv 2405.11157).
    """

    learns, needs_fit = False, True
    made_by = "it is read off the experts' weights when the mixture is made, and by fit_router"
    without = DirectionRouter.without | {"jitter", "bias_update_rate"}

    def __init__(self, in_features: int, experts: list[str], **options: Any) -> None:
        super().__init__(in_features, experts, **options)
        self.output: Any = Prototypes(in_features, len(self.arms))
        self.fitted = False

    @torch.no_grad()
    def fit(self, weights: Mapping[str, Weights | None], kept: Collection[str] = ()) -> None:
        """weights: of each expert, by name; None where it has nothing here, and is never chosen. kept: as in `Router`.

        Raises:
            ValueError: other experts.
        """
        if weights.keys() != set(self.experts):
            raise ValueError(f"fit needs the weights of {self.experts}, and got those of {list(weights)}")
        for place, name in enumerate(self.experts):
            if name in kept:
                continue
            expert = weights[name]
            row = torch.zeros(self.in_features) if expert is None else direction(expert.down, expert.up)
            self.output.weight[place] = row.to(self.output.weight)
        self.fitted = True

    def forward(self, tokens: Tensor, context: ForwardContext) -> Routing:
        if not self.fitted and not torch.compiler.is_compiling():
            self.fitted = bool(self.output.weight.any())  # they may have come from a file
            if not self.fitted:
                raise ValueError(
                    f"router 'arrow' at {self.path!r} has not been fitted: its experts are all zero, or nobody has "
                    "called fit with their weights; train experts under another router, and fit this one afterwards"
                )
        return super().forward(tokens, context)

    def score(self, tokens: Tensor) -> Tensor:
        return linear(exact(tokens, normalize=False), self.output.weight, None).abs()


def direction(down: Tensor, up: Tensor) -> Tensor:
    """down (r, K), up (M, r) -> (K,), the first right singular vector of up @ down; 0 where that is 0.

    Of up @ down = up R^T Q^T, with down^T = Q R, it is Q times that of the small matrix up R^T.
    """
    q, r = torch.linalg.qr(down.double().t())
    _, sizes, vectors = torch.linalg.svd(torch.linalg.qr(up.double()).R @ r.t(), full_matrices=False)
    return (q @ vectors[0] * (sizes[0] > 0)).to(torch.float32)
