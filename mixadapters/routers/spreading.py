"""Against the collapse of a router: a least weight for every arm, and experts that are absent at times in training."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mixadapters.core.context import ForwardContext
from mixadapters.routers.learned import LearnedRouter
from mixadapters.routers.options import check_options


class SpreadingRouter(LearnedRouter):
    """Part of routers that weigh every expert.

    Args:
        min_weight: the least weight of an expert, and of the frozen arm. Null arms have none.
        expert_dropout: in training, the probability with which an expert is absent from a whole sequence, at each
            layer by itself. Where weights compete the others share what it would get.

    Raises:
        ValueError: least weights that leave nothing to decide.
    """

    scheduled: tuple[str, ...] = (*LearnedRouter.scheduled, "min_weight", "expert_dropout")

    def __init__(
        self,
        in_features: int,
        experts: list[str],
        *,
        min_weight: float = 0.0,
        expert_dropout: float = 0.0,
        **options: Any,
    ) -> None:
        super().__init__(in_features, experts, **options)
        self.min_weight, self.expert_dropout = 0.0, expert_dropout
        check_options(min_weight=min_weight, expert_dropout=expert_dropout)
        self._check_least(min_weight, len(self.experts))
        self.min_weight = min_weight

    def check_option(self, name: str, value: Any) -> None:
        super().check_option(name, value)
        if name == "min_weight":
            self._check_least(value, len(self.experts))

    def add_expert(self, name: str, share: float) -> None:
        self._check_least(self.min_weight, len(self.experts) + 1)
        super().add_expert(name, share)

    def _check_least(self, min_weight: float, experts: int) -> None:
        arms = experts + self.has_frozen_arm
        if self.competes and min_weight and min_weight * arms >= 1:
            raise ValueError(
                f"min_weight={min_weight} for each of {arms} arms leaves nothing to decide; it must be below "
                f"{1 / arms:.3g}"
            )

    def disturbed(self, logits: Tensor, context: ForwardContext) -> Tensor:
        logits = super().disturbed(logits, context)
        if not (self.training and self.expert_dropout):
            return logits
        rows, sequences = len(logits), context.stream(self.stack).batch
        count = sequences if sequences and rows % sequences == 0 else rows
        absent = logits.new_empty(count, logits.shape[1]).uniform_() < self.expert_dropout
        absent[:, len(self.experts) :] = False
        if self.competes:
            absent &= ~absent.all(1, keepdim=True)  # where there is no other arm, all stay
        return logits.masked_fill(absent.repeat_interleave(rows // count, dim=0), -torch.inf)

    def weigh(self, logits: Tensor) -> Tensor:
        weights = self.spread(logits)
        if not self.min_weight:
            return weights
        real = logits != -torch.inf  # what is absent stays at 0
        real[:, len(self.experts) : len(self.experts) + self.null_arms] = False
        left = 1 - self.min_weight * (real.sum(1, keepdim=True) if self.competes else 1)
        return left * weights + self.min_weight * real

    def spread(self, logits: Tensor) -> Tensor:
        """logits (N, A) -> weights (N, A) without a least weight."""
        raise NotImplementedError
