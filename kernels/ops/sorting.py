"""Slots of rows in the order of their experts: what `segments` and `grouped` share."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mixadapters.kernels.problem import Problem


class Sorted(NamedTuple):
    """S = N * k slots, sorted by expert; those without expert come last."""

    order: Tensor  # (S,) slot n * k + s at each place
    rows: Tensor  # (S,) its row n
    experts: Tensor  # (S,) its expert, E for none
    counts: Tensor  # (E,) slots of each expert


def sort_slots(p: Problem, order: Tensor | None = None) -> Sorted:
    """`order` is that of an earlier call: sorting is a good part of the time of small problems."""
    return p.derived(("sorted", len(p.ranks)), lambda: _sort_slots(p, order))


def _sort_slots(p: Problem, order: Tensor | None) -> Sorted:
    number = len(p.ranks)
    if p.indices is None:
        experts = torch.arange(number, device=p.x.device).expand(p.x.shape[0], -1).reshape(-1)
    else:
        experts = p.indices.where(p.indices >= 0, number).reshape(-1)
    if order is None:
        order = experts.argsort(stable=True)
    slots = max(p.slots, 1)
    rows = order if slots == 1 else order // slots
    counts = torch.bincount(experts, minlength=number + 1)[:number]
    return Sorted(order, rows, experts.index_select(0, order), counts)


def sorted_weights(p: Problem, by: Sorted) -> tuple[Tensor | None, Tensor | None]:
    """(S,) weight and scale of each slot in sorted order."""
    weights = None if p.weights is None else p.weights.reshape(-1).index_select(0, by.order)
    scale = None
    if p.scale is not None:  # 1 where there is no expert
        scale = torch.cat([p.scale, p.scale.new_ones(1)]).index_select(0, by.experts)
    return weights, scale


def keeps(p: Problem) -> tuple[Tensor, ...]:
    """Hidden values by slot, as wide as the widest expert, and the order of the slots."""
    slots = p.x.shape[0] * p.slots
    z = p.x.new_empty(slots, max(p.ranks, default=0))
    order = torch.empty(slots, dtype=torch.int64, device=p.x.device)
    return (z, order) if p.gate is None else (z, order, torch.empty_like(z))
