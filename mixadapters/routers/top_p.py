"""As many experts as a row needs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mixadapters.routers.base import ROUTERS
from mixadapters.routers.options import check_options
from mixadapters.routers.sparse import SparseRouter


@ROUTERS.register("top_p")
class TopPRouter(SparseRouter):
    """The fewest arms whose probabilities sum to p or more, weighed by them.

    Source: Huang et al. 2024 (arXiv 2403.07652), which trains it with balance_coef=1e-2 and entropy_coef=1e-4: without
    a price on entropy a router spreads to use more experts. With few experts p must exceed the usual top-1
    probability.

    Args:
        p: the probability to be reached.
        max_experts: no more than these; None: no limit.
    """

    scheduled: tuple[str, ...] = (*SparseRouter.scheduled, "p", "max_experts")
    without = frozenset({"scoring_func"})

    def __init__(
        self, in_features: int, experts: list[str], *, p: float = 0.4, max_experts: int | None = None, **options: Any
    ) -> None:
        super().__init__(in_features, experts, **options)
        check_options(p=p, max_experts=max_experts)
        self.p, self.max_experts = p, max_experts

    def select(self, scores: Tensor) -> Tensor:
        ordered, arms = torch.sort(scores, dim=-1, descending=True, stable=True)
        reached = ordered.cumsum(-1) - ordered >= self.p  # by those before it
        chosen = torch.where(reached, -1, arms) if self.p < 1 else arms
        return chosen[:, : self.max_experts]
