"""Weights that do not compete."""

from __future__ import annotations

import torch
from torch import Tensor

from mixadapters.routers.base import ROUTERS
from mixadapters.routers.spreading import SpreadingRouter


@ROUTERS.register("sigmoid")
class SigmoidGate(SpreadingRouter):
    """Each weight on its own, between 0 and 1 (the paper's formula). Without `convex` there is no frozen arm."""

    frozen_arm = competes = False

    def spread(self, logits: Tensor) -> Tensor:
        return logits.sigmoid()

    def _insert_row(self, place: int, share: float) -> None:
        weight, bias = self.output.weight, self.output.bias
        self._insert(place, torch.zeros_like(weight[:1]), torch.logit(bias.new_tensor([share])))

    @torch.no_grad()
    def start_at(self, share: float) -> None:
        self.output.bias[0] = torch.logit(self.output.bias.new_tensor(share))
