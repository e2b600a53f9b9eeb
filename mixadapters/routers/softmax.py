"""Weights that compete."""

from __future__ import annotations

import torch
from torch import Tensor

from mixadapters.routers.base import ROUTERS
from mixadapters.routers.learned import LearnedRouter


@ROUTERS.register("softmax")
class SoftmaxGate(LearnedRouter):
    """Weights that sum to 1 over experts and the frozen arm."""

    def weigh(self, logits: Tensor) -> Tensor:
        return logits.softmax(-1)

    def _insert_row(self, place: int, share: float) -> None:
        # The new arm takes its mass from the frozen arm alone: exp(l) is split into share and 1 - share of it.
        weight, bias = self.output.weight, self.output.bias.clone()
        new_bias = bias[-1:] + torch.log(bias.new_tensor([share]))
        bias[-1] += torch.log1p(bias.new_tensor(-share))
        self._set_rows(
            torch.cat([weight[:place], weight[-1:], weight[place:]]), torch.cat([bias[:place], new_bias, bias[place:]])
        )

    @torch.no_grad()
    def start_at(self, share: float) -> None:
        self.output.bias.copy_(self.output.bias.new_tensor([share, 1 - share]).log())
