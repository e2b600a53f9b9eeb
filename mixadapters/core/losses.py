"""Auxiliary losses of a router: scalars, padding left out.

Shapes: probs (N, A) over A arms, logits (N, A), selected (N, A) bool, mask (N,) bool or None.
"""

from __future__ import annotations

from collections.abc import Sequence

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


def _shares(probs: Tensor, mask: Tensor | None, selected: Tensor | None) -> tuple[Tensor, Tensor]:
    """(A,) share of rows that select each arm, and its mean probability; selected None: each row its largest."""
    if selected is None:
        selected = torch.nn.functional.one_hot(probs.argmax(-1), probs.shape[-1])
    return masked_mean(selected.to(probs.dtype), mask), masked_mean(probs, mask)


def load_balance(probs: Tensor, mask: Tensor | None = None, selected: Tensor | None = None) -> Tensor:
    """A * sum_a f_a p_a, with p the mean probability and f the share of rows that select a.

    k when balanced, for rows that select k arms (Fedus et al. 2021, eq. 4, where k is 1; Transformers' form).
    """
    f, p = _shares(probs, mask, selected)
    return probs.shape[-1] * (f * p).sum()


def null_balance(probs: Tensor, mask: Tensor | None, selected: Tensor | None, nulls: slice) -> Tensor:
    """As `load_balance`, where all null arms have the mean of their shares: which of them is chosen is the same.

    Source: Zeng et al. 2024 (AdaMoE), eq. 6.
    """
    f, p = _shares(probs, mask, selected)
    if f[nulls].numel():
        f = torch.cat([f[: nulls.start], f[nulls].mean().expand(f[nulls].numel()), f[nulls.stop :]])
    return probs.shape[-1] * (f * p).sum()


def group_balance(
    probs: Tensor, mask: Tensor | None, selected: Tensor | None, groups: Sequence[Sequence[int]]
) -> Tensor:
    """As `load_balance`, between groups of arms: A * sum_g mean_{a in g} f_a * sum_{a in g} p_a.

    Source: Dai et al. 2024 (DeepSeekMoE), eqs. 15-17, whose f is ours * A / k.
    """
    f, p = _shares(probs, mask, selected)
    return probs.shape[-1] * torch.stack([f[list(g)].mean() * p[list(g)].sum() for g in groups]).sum()


def squared_variation(totals: Tensor) -> Tensor:
    """Squared coefficient of variation of totals (A,): 0 if and only if they are equal, A - 1 if all is of one arm."""
    mean = totals.mean()
    return (totals - mean).square().mean() / mean.square().clamp_min(1e-20)


def importance(probs: Tensor, mask: Tensor | None = None) -> Tensor:
    """CV^2 of the probability that arms get in sum (Shazeer et al. 2017, eq. 7)."""
    return squared_variation(masked_mean(probs, mask))


def load(chances: Tensor, mask: Tensor | None = None) -> Tensor:
    """CV^2 of the number of rows that arms are expected to get; chances (N, A) as of `win_chances`."""
    return squared_variation(masked_mean(chances, mask))


def win_chances(logits: Tensor, noisy: Tensor, k: int, deviation: float) -> Tensor:
    """(N, A): the probability that an arm is among the k largest when its noise alone is drawn again.

    Logits and threshold are both logits, without and with the noise (Riquelme et al. 2021, section A.2).
    """
    threshold = noisy.topk(k).values[:, -1:]
    return torch.special.ndtr((logits - threshold) / deviation)


def router_z(logits: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean squared log-sum-exp of the logits: keeps them small (Zoph et al. 2022, eq. 5)."""
    return masked_mean(logits.logsumexp(-1).square(), mask)


def entropy(probs: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean entropy of the rows, in nats. As a loss with a positive weight it makes the router decide."""
    return masked_mean(-(probs * probs.clamp_min(1e-9).log()).sum(-1), mask)
