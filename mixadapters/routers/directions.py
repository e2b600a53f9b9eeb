"""Top-k by a vector of each expert, where experts without one are never chosen."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mixadapters.core.routing import Routing
from mixadapters.routers.top_k import TopKRouter


class DirectionRouter(TopKRouter):
    """The k experts whose vectors answer most to x, under a softmax over the chosen.

    An expert whose vector is 0 is never chosen: it has nothing here, is new, or has not been trained.
    """

    scopes = frozenset({"module"})
    without = frozenset({
        "hidden", "dropout", "normalize", "frozen_bias", "convex", "init_range", "activation",
        "learnable_temperature", "scoring_func", "norm_topk_prob",
    })  # fmt: skip

    def __init__(self, in_features: int, experts: list[str], **options: Any) -> None:
        super().__init__(in_features, experts, norm_topk_prob=True, init_range=0.0, **options)

    def choose(self, logits: Tensor) -> Routing:
        absent = ~self.output.weight.any(1)
        scores = self.weigh(logits.masked_fill(absent, torch.finfo(logits.dtype).min))
        arms = self.select(scores)
        return self.routed(scores, torch.where(absent[arms], -1, arms))

    def _insert_row(self, place: int, share: float) -> None:
        self._insert(place, torch.zeros_like(self.output.weight[:1]), None)
