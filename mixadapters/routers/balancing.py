"""Balancing without a loss: a bias of each arm, for choosing alone, moved against its load."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class ChoiceBias(nn.Module):
    """What is added to the scores of arms when a router chooses, and not when it weighs.

    Source: Wang et al. 2024 (arXiv 2408.15664), algorithm 1. Arms without expert keep 0.
    """

    bias: Tensor

    def __init__(self, arms: int) -> None:
        super().__init__()
        self.register_buffer("bias", torch.zeros(arms))  # (A,)
        self._counts: Tensor | None = None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        # In half precision steps of 0.001 would be lost: casts go past it, moves do not.
        kept = self.bias
        super()._apply(fn, recurse)
        if self.bias.dtype != kept.dtype:
            self.bias = kept.to(self.bias.device)
        return self

    @property
    def counts(self) -> Tensor:
        """(A,) how many rows have chosen each arm since the last update; to be summed over processes in place.

        No buffer: data parallelism would give all processes those of the first.
        """
        if self._counts is None or self._counts.device != self.bias.device:
            before = self._counts
            self._counts = torch.zeros_like(self.bias, dtype=torch.long)
            if before is not None:
                self._counts += before.to(self._counts.device)
        return self._counts

    @torch.no_grad()
    def count(self, selected: Tensor, mask: Tensor | None) -> None:
        """selected (N, A) bool, mask (N,) bool or None."""
        self._counts = self.counts + (selected if mask is None else selected & mask.unsqueeze(1)).sum(0)

    @torch.no_grad()
    def update(self, rate: float, experts: int) -> None:
        """Move the biases of the experts by `rate`, up where fewer rows than the mean took them; forget the counts."""
        counts = self.counts[:experts].to(self.bias.dtype)
        self.bias[:experts] += rate * (counts.mean() - counts).sign()
        self._counts = None

    def follow(self, order: list[int]) -> None:
        """Arms have been reordered: which each was, -1 for a new one."""
        index = torch.tensor(order, device=self.bias.device)
        self.bias = torch.where(index >= 0, self.bias[index.clamp_min(0)], 0.0)
        self._counts = None
