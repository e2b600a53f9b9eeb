"""Against the collapse of a gate: a least weight for every arm, and experts that are absent at times in training."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mixadapters.core.context import ForwardContext
from mixadapters.routers.learned import LearnedRouter
from mixadapters.routers.options import check_options


class SpreadingRouter(LearnedRouter):
    """Part of gates that weigh every expert.

    Args:
        floor: the least weight of an expert, and of the frozen arm. Null arms have none.
        expert_dropout: in training, the probability with which an expert is absent from a whole sequence, at each
            layer by itself. Where weights compete the others share what it would get.

    Raises:
        ValueError: floors that leave nothing to decide.
    """

    scheduled: tuple[str, ...] = (*LearnedRouter.scheduled, "floor", "expert_dropout")

    def __init__(
        self, in_features: int, experts: list[str], *, floor: float = 0.0, expert_dropout: float = 0.0, **options: Any
    ) -> None:
        super().__init__(in_features, experts, **options)
        self.floor, self.expert_dropout = 0.0, expert_dropout
        check_options(floor=floor, expert_dropout=expert_dropout)
        self._check_floor(floor, len(self.experts))
        self.floor = floor

    def check_option(self, name: str, value: Any) -> None:
        super().check_option(name, value)
        if name == "floor":
            self._check_floor(value, len(self.experts))

    def add_expert(self, name: str, share: float) -> None:
        self._check_floor(self.floor, len(self.experts) + 1)
        super().add_expert(name, share)

    def _check_floor(self, floor: float, experts: int) -> None:
        arms = experts + self.has_frozen_arm
        if self.competes and floor and floor * arms >= 1:
            raise ValueError(
                f"floor={floor} for each of {arms} arms leaves nothing to decide; it must be below {1 / arms:.3g}"
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
        if not self.floor:
            return weights
        real = logits != -torch.inf  # what is absent stays at 0
        real[:, len(self.experts) : len(self.experts) + self.null_arms] = False
        left = 1 - self.floor * (real.sum(1, keepdim=True) if self.competes else 1)
        return left * weights + self.floor * real

    def spread(self, logits: Tensor) -> Tensor:
        """logits (N, A) -> weights (N, A) without a floor."""
        raise NotImplementedError
