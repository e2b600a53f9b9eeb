"""Experts that come and go: a learned router gains, loses and reorders arms, and the other weights stay."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mixadapters.routers.base import Router


class ArmSurgery(Router):
    """Part of a learned router, whose output layer has one row for each arm.

    Rows are those of the experts in order, then of the null arms, then of the frozen layer where it has an arm.
    """

    frozen_arm: bool
    null_arms: int
    output: nn.Linear

    @torch.no_grad()
    def add_expert(self, name: str, share: float) -> None:
        """A new arm before the null arms, without changing the weights of the other experts."""
        place = len(self.experts)
        self._insert_row(place, share)
        self.experts.insert(place, name)

    def start_at(self, share: float) -> None:
        """Make `share` the weight of the one expert of a new router."""
        raise NotImplementedError

    @torch.no_grad()
    def remove_expert(self, name: str, renormalize: bool) -> None:
        """Drop an arm: its mass goes to a null arm, or to the others where `renormalize`."""
        place = self.experts.index(name)
        weight, bias = self.output.weight, self.output.bias
        order = [i for i in range(weight.shape[0]) if i != place]
        if not renormalize and self.frozen_arm:
            order.insert(len(self.experts) - 1 + self.null_arms, place)
            self.null_arms += 1
        self._set_rows(weight[order], bias[order])
        self.experts.remove(name)

    @torch.no_grad()
    def reorder(self, names: list[str]) -> None:
        """Put the experts' arms into the order of `names`; each keeps its weight.

        Raises:
            ValueError: other names than those of the experts.
        """
        if sorted(names) != sorted(self.experts):
            raise ValueError(f"names={list(names)} must be the experts {self.experts}, in any order")
        order = [self.experts.index(name) for name in names]
        order += range(len(names), self.output.out_features)
        self._set_rows(self.output.weight[order], self.output.bias[order])
        self.experts = list(names)

    def _insert_row(self, place: int, share: float) -> None:
        raise NotImplementedError

    def _set_rows(self, weight: Tensor, bias: Tensor) -> None:
        trainable = self.output.weight.requires_grad
        output = nn.Linear(weight.shape[1], weight.shape[0], device=weight.device, dtype=weight.dtype)
        output.weight.copy_(weight)
        output.bias.copy_(bias)
        self.output = output.requires_grad_(trainable)
