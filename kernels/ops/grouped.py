"""torch.nn.functional.grouped_mm over rows sorted by expert: few calls, whatever the number of experts."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.functional import grouped_mm

from mixadapters.kernels import chain
from mixadapters.kernels.problem import Problem
from mixadapters.kernels.sorting import keeps, sort_slots, sorted_weights

__all__ = ["backward", "forward", "keeps", "refuses"]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def refuses(p: Problem) -> str | None:
    x = p.x
    if x.dtype not in _DTYPES:
        return f"grouped_mm knows no {x.dtype}"
    if x.is_cuda and (x.dtype != torch.bfloat16 or torch.cuda.get_device_capability(x.device) < (8, 0)):
        return "on a GPU grouped_mm needs bfloat16 and compute capability 8.0 or more"
    if p.equal_rank is None:
        return f"it needs experts of one rank, and the ranks are {sorted(set(p.ranks))}"
    widths = {"K": x.shape[1], "rank": p.equal_rank, "M": p.up.shape[0]}
    odd = [f"{name}={width}" for name, width in widths.items() if width * x.dtype.itemsize % 16]
    return f"rows must be multiples of 16 bytes, and {', '.join(odd)} in {x.dtype} is not" if odd else None


def forward(p: Problem, keep: bool) -> tuple[Tensor, tuple[Tensor, ...]]:
    return chain.forward(p, keep, Grouped)


def backward(p: Problem, saved: tuple[Tensor, ...], grad: Tensor, needs: frozenset[str]) -> dict[str, Tensor]:
    return chain.backward(p, saved, grad, needs, Grouped)


class Grouped:
    """Rows (C, d), hidden values (C, r) and slots (C,) of the C slots that have an expert, sorted by it."""

    def __init__(self, p: Problem, saved: tuple[Tensor, ...] = ()) -> None:
        self.p, self.rank = p, p.ranks[0]
        self.by = by = sort_slots(p, saved[1] if saved else None)
        self.sizes = by.counts.tolist()
        self.count = count = sum(self.sizes)
        self.rows, self.experts = by.rows[:count], by.experts[:count]
        self.ends = by.counts.cumsum(0).to(torch.int32)
        weights, scale = sorted_weights(p, by)
        self.weights = None if weights is None else weights[:count]
        self.scale = None if scale is None else scale[:count]
        self.factors = chain.product(self.weights, self.scale)

    def keep(self, z: Tensor, v: Tensor | None) -> tuple[Tensor, ...]:
        missing = self.by.order.shape[0] - self.count  # slots without expert
        z, *gated = (F.pad(t, (0, 0, 0, missing)) if missing else t for t in (z, v) if t is not None)
        return (z, self.by.order, *gated)

    def kept(self, saved: tuple[Tensor, ...]) -> tuple[Tensor, Tensor | None]:
        return saved[0][: self.count], saved[2][: self.count] if len(saved) > 2 else None

    def take(self, t: Tensor) -> Tensor:
        return t.index_select(0, self.rows)

    def affine(self, rows: Tensor, *maps: chain.Affine) -> list[Tensor]:
        found = []
        for weight, bias in maps:
            z = grouped_mm(rows, self._stacked(weight).transpose(1, 2), offs=self.ends)
            if bias is not None:
                z += bias.view(-1, self.rank).index_select(0, self.experts)
            found.append(z)
        return found

    def weighted(self, h: Tensor) -> Tensor:
        return h if self.factors is None else h * self.factors.unsqueeze(1)

    def cleared(self, h: Tensor) -> Tensor:
        return h  # slots without expert are left out

    def add_up(self, h: Tensor) -> Tensor:
        p = self.p
        delta = grouped_mm(h, self._stacked(p.up.t()), offs=self.ends)
        if p.b_up is not None:
            shift = p.b_up.index_select(0, self.experts)
            delta += shift if self.factors is None else shift * self.factors.unsqueeze(1)
        return self._added(p.start(), delta)

    def spread(self, pairs: list[tuple[Tensor, Tensor]]) -> Tensor:
        parts = [grouped_mm(h, self._stacked(weight), offs=self.ends) for h, weight in pairs]
        return self._added(self.p.x.new_zeros(self.p.x.shape), sum(parts[1:], parts[0]))

    def _added(self, total: Tensor, parts: Tensor) -> Tensor:
        """total (N, d) plus the parts (C, d) of its rows."""
        if self.p.slots == 1:
            return total.index_add_(0, self.rows, parts.to(total.dtype))
        summed = chain.wide(total)
        return summed.index_add_(0, self.rows, parts.to(summed.dtype)).to(total.dtype)

    def outer(self, h: Tensor, rows: Tensor) -> Tensor:
        out = grouped_mm(h.t(), rows, offs=self.ends)
        if 0 in self.sizes:  # a group without rows may not have been written
            out.masked_fill_((self.by.counts == 0).view(-1, 1, 1), 0)
        return out.flatten(0, 1)

    def back(self, rows: Tensor, h: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return self.affine(rows, (self.p.up.t(), None))[0], None if h is None else self.outer(h, rows)

    def sums(self, h: Tensor) -> Tensor:
        return self._sums(h).reshape(-1)

    def shift_sums(self, rows: Tensor) -> Tensor:
        return self._sums(rows if self.factors is None else rows * self.factors.unsqueeze(1))

    def dots(self, h: Tensor, rows: Tensor) -> Tensor:
        dots = h.sum(1)
        if self.p.b_up is not None:
            dots += (rows * self.p.b_up.index_select(0, self.experts)).sum(1, dtype=dots.dtype)
        return dots

    def by_row(self, dots: Tensor) -> Tensor:
        order = self.by.order
        return dots.new_zeros(order.shape[0]).index_copy_(0, order[: self.count], dots).view(-1, self.p.slots)

    def by_expert(self, dots: Tensor) -> Tensor:
        return self._sums(dots.unsqueeze(1)).squeeze(1)

    def _stacked(self, weight: Tensor) -> Tensor:
        """(R, d) -> (E, r, d)"""
        return weight.reshape(len(self.sizes), self.rank, -1)

    def _sums(self, t: Tensor) -> Tensor:
        """(C, d) -> (E, d): sum over each group."""
        return torch.stack([part.sum(0, dtype=chain.wide_dtype(t)) for part in t.split(self.sizes)])
