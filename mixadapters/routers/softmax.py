"""Weights that compete."""

from __future__ import annotations

import torch
from torch import Tensor

from mixadapters.routers.base import ROUTERS
from mixadapters.routers.spreading import SpreadingRouter


@ROUTERS.register("softmax")
class SoftmaxGate(SpreadingRouter):
    """Weights that sum to 1 over experts and the frozen arm."""

    def spread(self, logits: Tensor) -> Tensor:
        return logits.softmax(-1)

    def _insert_row(self, place: int, share: float) -> None:
        # The new arm takes its mass from the frozen arm alone: exp(l) is split into share and 1 - share of it.
        frozen = self.output.bias[-1:].clone()
        self.output.bias[-1] += torch.log1p(frozen.new_tensor(-share))
        self._insert(place, self.output.weight[-1:], frozen + torch.log(frozen.new_tensor([share])))

    @torch.no_grad()
    def start_at(self, share: float) -> None:
        self.output.bias.copy_(self.output.bias.new_tensor([share, 1 - share]).log())
