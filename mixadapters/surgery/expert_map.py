"""The experts that take the rows of a router's columns, where columns and experts are not the same."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mixadapters.core.bound_hooks import unhook


class ExpertMap(nn.Module):
    """Which expert takes the rows of each of the router's columns; -1: none does, and the row's weight is lost.

    A module of the experts' module, before whose forward it renumbers what the router has chosen.
    """

    numbers: Tensor

    def __init__(self, numbers: Sequence[int] | Tensor, device: torch.device | str | None = None) -> None:
        super().__init__()
        numbers = torch.as_tensor(numbers, dtype=torch.long, device=device)
        self.register_buffer("numbers", numbers, persistent=False)  # `save_pruned` says it; a plain load would not fit

    def forward(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        """Renumbers the arguments of the experts' module."""
        x, indices, weights = arguments(args, kwargs)
        found = self.numbers[indices]
        return (x, found.clamp_min(0), weights * (found >= 0)), {}

    def attach(self, experts: nn.Module) -> None:
        detach_map(experts)
        experts.expert_map = self
        experts.register_forward_pre_hook(self.forward, with_kwargs=True)


def detach_map(experts: nn.Module) -> None:
    """Take the map off, where there is one."""
    found = experts._modules.pop("expert_map", None)
    if found is not None:
        unhook(experts, found)


def arguments(args: tuple, kwargs: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, indices and weights: in this order everywhere, under several names."""
    x, indices, weights = (*args, *kwargs.values())
    return x, indices, weights
