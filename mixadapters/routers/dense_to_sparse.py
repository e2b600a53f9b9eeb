"""A router that starts dense and ends sparse."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mixadapters.core.context import ForwardContext
from mixadapters.routers.base import ROUTERS
from mixadapters.routers.options import check_options
from mixadapters.routers.sparse import SparseRouter


@ROUTERS.register("dense_to_sparse")
class DenseToSparseRouter(SparseRouter):
    """The arms whose probability is above a threshold, and always the largest, under a temperature that falls.

    Source: Nie et al. 2021 (EvoMoE, arXiv 2112.14397). The temperature follows the progress of the training
    (`at_progress`); where nobody tells it, it stays. Evaluation is at `temperature_min`, as the training ends.

    Args:
        temperature: at the start. At `duration`, a share of the training, it has come to `temperature_min`.
        schedule: "linear", or "exp"onential.
        threshold: "mean" is 1 / A.
        gumbel: add Gumbel noise to the logits in training.
        hard_after: share of the training after which, and in evaluation, only the largest arm is kept. None: never.
    """

    without = frozenset({"scoring_func", "learnable_temperature"})
    scheduled: tuple[str, ...] = (*SparseRouter.scheduled, "threshold")

    def __init__(
        self,
        in_features: int,
        experts: list[str],
        *,
        temperature: float = 2.0,
        temperature_min: float = 0.3,
        schedule: str = "linear",
        duration: float = 0.6,
        threshold: str | float = "mean",
        gumbel: bool = True,
        hard_after: float | None = None,
        **options: Any,
    ) -> None:
        super().__init__(in_features, experts, temperature=temperature, **options)
        check_options(
            temperature_min=temperature_min, schedule=schedule, duration=duration, threshold=threshold, gumbel=gumbel,
            hard_after=hard_after,
        )  # fmt: skip
        self.temperature_max, self.temperature_min = temperature, temperature_min
        self.schedule, self.duration, self.hard_after = schedule, duration, hard_after
        self.threshold, self.gumbel, self.hard = threshold, gumbel, False

    def temperature_at(self, progress: float) -> float:
        """The temperature at a share of the training; exact at the ends."""
        done, high, low = min(progress / self.duration, 1.0), self.temperature_max, self.temperature_min
        if done == 1:
            return low
        return high * (low / high) ** done if self.schedule == "exp" else high - done * (high - low)

    def at_progress(self, progress: float) -> None:
        self.temperature = self.temperature_at(progress)
        self.hard = self.hard_after is not None and progress >= self.hard_after

    @property
    def current_temperature(self) -> float:
        return self.temperature if self.training else self.temperature_min

    def disturbed(self, logits: Tensor, context: ForwardContext) -> Tensor:
        logits = super().disturbed(logits, context)
        if not (self.training and self.gumbel):
            return logits
        return logits - self.drawn_for(logits, context, Tensor.exponential_).log()

    def select(self, scores: Tensor) -> Tensor:
        ordered, arms = torch.sort(scores, dim=-1, descending=True, stable=True)
        if self.hard if self.training else self.hard_after is not None:
            return arms[:, :1]
        threshold = self.threshold if isinstance(self.threshold, (int, float)) else 1 / scores.shape[1]
        kept = (ordered > threshold).index_fill(1, torch.zeros(1, dtype=torch.long, device=arms.device), True)
        return torch.where(kept, arms, -1)
