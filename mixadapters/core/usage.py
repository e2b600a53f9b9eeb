"""How a gate spreads its weight, kept in running buffers: no synchronisation, nothing saved."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mixadapters.core.losses import entropy


class GateUsage(nn.Module):
    """Running mean weight and entropy of a gate over named arms, since the last `reset`."""

    def __init__(self, arms: Sequence[str]) -> None:
        super().__init__()
        self.arms = tuple(arms)
        self.register_buffer("weight", torch.zeros(len(arms)), persistent=False)
        self.register_buffer("entropy", torch.zeros(()), persistent=False)
        self.register_buffer("count", torch.zeros(()), persistent=False)

    def _apply(self, fn: Any, *args: Any, **kwargs: Any) -> GateUsage:
        super()._apply(fn, *args, **kwargs)
        for name, buffer in self.named_buffers():
            setattr(self, name, buffer.float())  # counts do not survive half precision
        return self

    @torch.no_grad()
    def add(self, probs: Tensor, mask: Tensor | None) -> None:
        """probs (N, A), mask (N,) bool or None."""
        rows = mask.sum() if mask is not None else probs.new_tensor(float(probs.shape[0]))
        probs = probs.detach().float()
        real = probs if mask is None else probs * mask.unsqueeze(-1)
        self.weight += real.sum(0)
        self.entropy += entropy(probs, mask) * rows
        self.count += rows

    def summary(self, dead_below: float = 0.01) -> dict[str, float]:
        """Mean weight per arm, mean entropy in nats, and how many arms get less than `dead_below` of the weight."""
        count = max(float(self.count), 1.0)
        shares = [float(w) / count for w in self.weight]
        report = {f"weight/{arm}": share for arm, share in zip(self.arms, shares, strict=True)}
        report["entropy"] = float(self.entropy) / count
        report["dead"] = float(sum(share < dead_below for share in shares))
        return report

    def reset(self) -> None:
        for buffer in self.buffers():
            buffer.zero_()
