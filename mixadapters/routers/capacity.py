"""A limit to the rows that an expert takes in a training step."""

from __future__ import annotations

import torch
from torch import Tensor


def within_capacity(
    indices: Tensor, experts: int, factor: float, mask: Tensor | None = None, order: Tensor | None = None
) -> Tensor:
    """indices (N, k) with -1 where an expert would take more than k * int(factor * N / experts) rows.

    First choices are served before second ones, and rows in their order, or those of the largest `order` (N,) first.
    Rows that are padding, False in mask (N,), neither count nor take. Source: Hwang et al. 2023 (Tutel), Riquelme et
    al. 2021, section 4.1.
    """
    rows, k = indices.shape
    mask = torch.ones(rows, dtype=torch.bool, device=indices.device) if mask is None else mask
    capacity = k * (factor * mask.sum() / experts).floor()
    served = (
        torch.arange(rows, device=indices.device) if order is None else order.argsort(descending=True, stable=True)
    )
    wanted = torch.where(mask[served].unsqueeze(1), indices[served], -1).t().reshape(-1)  # choice by choice
    one_hot = wanted.unsqueeze(1) == torch.arange(experts, device=indices.device)
    before = ((one_hot.cumsum(0) - 1) * one_hot).sum(1)
    fits = (before < capacity).view(k, rows).t()
    kept = torch.zeros_like(fits).index_put((served,), fits)
    return torch.where(kept, indices, -1)
