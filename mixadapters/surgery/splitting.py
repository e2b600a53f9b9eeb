"""An expert as several smaller ones whose outputs sum to its own, and back: exact.

Source: Dai et al. 2024, DeepSeekMoE (arXiv 2401.06066), section 3.1; Yang et al. 2025, UoE (arXiv 2503.02495), section
3.1. What an expert adds is a sum over its hidden units, so any partition of these will do.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mixadapters.core.bank import Weights
from mixadapters.core.fields import check_integer, check_kind
from mixadapters.core.numbers import whole_numbers

ROWS = ("down", "gate", "b_down", "b_gate")  # of `Weights`: one entry for each hidden unit; `up` has a column


def segment(key: str, tensor: Tensor, i: int, count: int) -> Tensor:
    """The i-th of `count` slices of an expert's parameter: all of them together are the expert, exactly."""
    if count == 1:
        return tensor
    if key == "up.weight":
        return tensor.chunk(count, 1)[i]
    return tensor / count if key == "up.bias" else tensor.chunk(count, 0)[i]


def split_expert(weights: Weights, parts: int | Sequence[Tensor]) -> list[Weights]:
    """Experts whose outputs sum to that of the given one. What all share (LayerNorm, scale) each has.

    Args:
        parts: how many, of equal widths; or the hidden units of each, as (n,) int64.

    Raises:
        ValueError: the width cannot be parted so, or the units are no partition of it.
    """
    check_kind("weights", weights, Weights, "the Weights of an expert")
    width, device = weights.down.shape[0], weights.down.device
    if not isinstance(parts, Sequence):
        check_integer("parts", parts)
        if parts < 1 or width % parts:
            raise ValueError(f"parts={parts} does not divide the expert's width of {width}")
        units = list(torch.arange(width, device=device).chunk(parts))
    else:
        units = [whole_numbers("parts", part).to(device).long() for part in parts]
        named = sorted(unit for part in units for unit in part.reshape(-1).tolist())
        if named != list(range(width)) or not all(part.dim() == 1 and len(part) for part in units):
            raise ValueError(f"parts must name each of the {width} hidden units once, and none may be empty")
    return [_part(weights, part, len(units)) for part in units]


def _part(weights: Weights, units: Tensor, count: int) -> Weights:
    rows: dict[str, Any] = {name: None if (given := getattr(weights, name)) is None else given[units] for name in ROWS}
    b_up = None if weights.b_up is None else weights.b_up / count
    return weights._replace(**rows, up=weights.up[:, units], b_up=b_up)


def join_experts(parts: Sequence[Weights]) -> Weights:
    """One expert whose output is the sum of those of `parts`. Where their scales differ they go into `up`.

    Raises:
        ValueError: no parts, or they are of different kinds: gated or not, biased or not, with LayerNorms that differ.
    """
    check_kind("parts", parts, Sequence, "a list of the Weights of experts")
    if not parts:
        raise ValueError("parts=[] are no experts to join")
    for i, part in enumerate(parts):
        check_kind(f"parts[{i}]", part, Weights, "the Weights of an expert")
    first = parts[0]
    for i, other in enumerate(parts):
        odd = [n for n in Weights._fields if (getattr(first, n) is None) != (getattr(other, n) is None)]
        if odd or other.down.shape[1] != first.down.shape[1] or other.up.shape[0] != first.up.shape[0]:
            raise ValueError(f"parts[{i}] differs from parts[0] in {odd or 'its widths'}, so they are no one expert")
        if first.norm is not None and not all(map(torch.equal, first.norm, other.norm or ())):
            raise ValueError(f"parts[{i}] has another LayerNorm than parts[0]: one expert has one")
    scales = [torch.as_tensor(part.scale, dtype=first.up.dtype, device=first.up.device) for part in parts]
    same = all(torch.equal(scale, scales[0]) for scale in scales)
    ups = [part.up if same else part.up * scale for part, scale in zip(parts, scales, strict=True)]
    shifts = [part.b_up if same or part.b_up is None else part.b_up * s for part, s in zip(parts, scales, strict=True)]
    rows: dict[str, Any] = {
        n: None if getattr(first, n) is None else torch.cat([getattr(part, n) for part in parts]) for n in ROWS
    }
    b_up = None if first.b_up is None else torch.stack([shift for shift in shifts if shift is not None]).sum(0)
    return first._replace(**rows, up=torch.cat(ups, 1), b_up=b_up, scale=first.scale if same else 1.0)
