"""A top-k with arms that do nothing."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from mixadapters.core.losses import null_balance
from mixadapters.routers.base import ROUTERS
from mixadapters.routers.top_k import TopKRouter


@ROUTERS.register("null")
class NullRouter(TopKRouter):
    """Top-k over experts and null arms: how many experts a row uses depends on the row.

    Source: Zeng et al. 2024 (AdaMoE, arXiv 2406.13233). Balanced, a row uses k E / (E + null_arms) experts, so k is
    larger than usual. `norm_topk_prob` is over the chosen experts, as in the paper, where it is on: there a row that
    chooses null arms loses nothing of its weight. Here it is off, since doing nothing is what the frozen layer does.

    Args:
        null_arms: how many there are.
    """

    norm_of_experts = True
    usual_null_arms = 8

    def __init__(
        self, in_features: int, experts: list[str], *, null_arms: int = usual_null_arms, **options: Any
    ) -> None:
        super().__init__(in_features, experts, null_arms=null_arms, **options)

    def balance(self, probs: Tensor, mask: Tensor | None, selected: Tensor | None) -> Tensor:
        if self.balance_groups is not None:
            return super().balance(probs, mask, selected)
        start = len(self.experts)
        return null_balance(probs, mask, selected, slice(start, start + self.null_arms))
