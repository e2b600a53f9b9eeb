"""Auxiliary losses of a router: scalars, padding left out.

Shapes: probs (N, A) over A arms, logits (N, A), mask (N,) bool or None.
"""

from __future__ import annotations

import torch
from torch import Tensor


def masked_mean(values: Tensor, mask: Tensor | None) -> Tensor:
    """Mean over axis 0 of values (N, ...), of the rows where mask (N,) is True; 0 where there is none."""
    if mask is None:
        return values.mean(0)
    return real_only(values, mask).sum(0) / mask.sum().clamp_min(1)


def real_only(values: Tensor, mask: Tensor) -> Tensor:
    """values with 0 where mask is False, whatever they hold: 0 * NaN would stay NaN.

    Shapes: values (N, ...) and mask (N,), or values (B, T, d) and mask (B * T,).
    """
    if mask.shape[0] == values.shape[0]:
        return torch.where(mask.view(-1, *[1] * (values.dim() - 1)), values, 0.0)
    return torch.where(mask.view(*values.shape[:-1], 1), values, 0.0)


def load_balance(probs: Tensor, mask: Tensor | None = None) -> Tensor:
    """A * sum_a f_a p_a, with p the mean probability and f the share of rows whose largest is a.

    1 when balanced, A when all rows agree on one arm (Fedus et al. 2021, eq. 4).
    """
    arms = probs.shape[-1]
    first = torch.nn.functional.one_hot(probs.argmax(-1), arms).to(probs.dtype)
    return arms * (masked_mean(first, mask) * masked_mean(probs, mask)).sum()


def router_z(logits: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean squared log-sum-exp of the logits: keeps them small (Zoph et al. 2022, eq. 5)."""
    return masked_mean(logits.logsumexp(-1).square(), mask)


def entropy(probs: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean entropy of the rows, in nats. As a loss with a positive weight it makes the router decide."""
    return masked_mean(-(probs * probs.clamp_min(1e-9).log()).sum(-1), mask)
