"""All experts as one product of rank R; the weights of the mixture scale the columns in between.

What a row has not chosen is weighed by 0, but the products still multiply it: 0 * inf is no number. So where something
is infinite or no number, what rows and experts share is computed again by `segments`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from mixadapters.kernels import chain, products, segments
from mixadapters.kernels.problem import Problem


def refuses(p: Problem) -> str | None:
    return None


def keeps(p: Problem) -> tuple[Tensor, ...]:
    z = p.x.new_empty(p.x.shape[0], p.down.shape[0])
    return (z,) if p.gate is None else (z, torch.empty_like(z))


def forward(p: Problem, keep: bool) -> tuple[Tensor, tuple[Tensor, ...]]:
    return chain.forward(p, keep, Dense)


def backward(p: Problem, saved: tuple[Tensor, ...], grad: Tensor, needs: frozenset[str]) -> dict[str, Tensor]:
    out = chain.backward(p, saved, grad, needs, Dense)
    if p.indices is not None:
        # That of `weights` is read off what rows have chosen.
        results = [gradient for name, gradient in out.items() if name not in ("x", "weights")]
        if "x" in out:
            # Hidden values that are infinite show in the gradients of all that made them.
            shown = "down" in out and (p.gate is None or "gate" in out)
            results += _smaller(p, out["x"], p.down, p.gate) if shown else [out["x"]]
        if not _finite(*results):
            _, kept = segments.forward(p, keep=True)
            return segments.backward(p, kept, grad, needs)
    return out


def _smaller(p: Problem, result: Tensor, *factors: Tensor | None) -> list[Tensor]:
    """What to look at for numbers that are infinite in a product of these factors: it, or them."""
    given = [factor for factor in factors if factor is not None]
    return [result] if p.x.shape[0] < p.down.shape[0] else given


def _finite(*tensors: Tensor) -> bool:
    # A sum is infinite, or no number, if one of its terms is. One that overflows costs time alone.
    return all(math.isfinite(t.sum(dtype=chain.wide_dtype(t)).item()) for t in tensors)


class Dense:
    """Rows (N, d), hidden values (N, R), slots (N, E): each expert has one in every row."""

    def __init__(self, p: Problem, saved: tuple[Tensor, ...] = ()) -> None:
        self.p, self.scale = p, p.scale
        self.weights = p.weights if p.indices is None else _weights(p)
        self.factors = chain.product(self.weights, p.scale)  # (N, E), (E,) or None

    def keep(self, z: Tensor, v: Tensor | None) -> tuple[Tensor, ...]:
        return (z,) if v is None else (z, v)

    def kept(self, saved: tuple[Tensor, ...]) -> tuple[Tensor, Tensor | None]:
        return saved[0], saved[1] if len(saved) > 1 else None

    def take(self, t: Tensor) -> Tensor:
        return t

    def affine(self, rows: Tensor, *maps: chain.Affine) -> list[Tensor]:
        return [products.mm(rows, weight.t(), bias) for weight, bias in maps]

    def weighted(self, h: Tensor) -> Tensor:
        return h if self.factors is None else _by_expert(h, self.p.ranks, self.factors)

    def cleared(self, h: Tensor) -> Tensor:
        return h  # it has been weighed

    def add_up(self, h: Tensor) -> Tensor:
        p = self.p
        if p.base is None or (p.base_weight is None and p.base.dtype == h.dtype):
            y = products.mm(h, p.up.t(), p.base)
        else:
            y = p.start()
            if y.dtype == h.dtype:
                products.mm(h, p.up.t(), y, out=y)
            else:
                y += products.mm(h, p.up.t())
        if p.b_up is not None:
            # The experts' own biases, one for each row that chose them.
            y += p.b_up.sum(0) if self.factors is None else self.factors.to(p.b_up.dtype) @ p.b_up
        if p.indices is not None and not _finite(*_smaller(p, y, h, p.up, p.b_up)):
            return segments.forward(p, keep=False)[0]
        if p.indices is not None and p.base is not None and not p.every_slot_chosen():
            none = (p.indices < 0).all(1, keepdim=True)
            # Adding a zero turns -0.0 into 0.0.
            if not none.is_cpu or none.any():
                y = torch.where(none, p.start(), y)
        return y

    def spread(self, pairs: list[tuple[Tensor, Tensor]]) -> Tensor:
        (h, weight), *more = pairs
        dx = products.mm(h, weight)
        for h, weight in more:
            products.mm(h, weight, dx, out=dx)
        return dx

    def outer(self, h: Tensor, rows: Tensor) -> Tensor:
        return products.outer(h, rows)

    def back(self, rows: Tensor, h: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return products.mm(rows, self.p.up), None if h is None else self.outer(h, rows)

    def sums(self, h: Tensor) -> Tensor:
        return h.sum(0, dtype=chain.wide_dtype(h))

    def shift_sums(self, rows: Tensor) -> Tensor:
        if self.factors is not None and self.factors.dim() == 2:
            return self.factors.to(rows.dtype).t() @ rows
        total = self.sums(rows).expand(len(self.p.ranks), -1)
        return total if self.factors is None else total * self.factors.unsqueeze(1)

    def dots(self, h: Tensor, rows: Tensor) -> Tensor:
        # Hidden columns of one expert lie side by side: its dot product is their sum.
        if _same(self.p.ranks):
            dots = h.view(-1, len(self.p.ranks), self.p.ranks[0]).sum(2)
        else:
            dots = torch.stack([part.sum(1) for part in h.split(self.p.ranks, dim=1)], dim=1)
        if self.p.b_up is not None:
            dots += rows @ self.p.b_up.t()
        return dots

    def by_row(self, dots: Tensor) -> Tensor:
        indices = self.p.indices
        if indices is None:
            return dots
        if self.p.every_slot_chosen():
            return dots.gather(1, indices.long())
        return dots.gather(1, indices.clamp_min(0).long()).masked_fill_(indices < 0, 0)

    def by_expert(self, dots: Tensor) -> Tensor:
        return dots.sum(0)


def _weights(p: Problem) -> Tensor:
    """(N, E) weight of each expert for each row, 0 for those that it has not chosen."""
    assert p.indices is not None
    columns, experts = p.indices.long(), len(p.ranks)
    given = p.x.new_ones(columns.shape) if p.weights is None else p.weights
    wide = chain.wide_dtype(given)
    # An expert that a row names in several slots has the sum of their weights.
    if p.every_slot_chosen():
        table = given.new_zeros(columns.shape[0], experts, dtype=wide).scatter_add_(1, columns, given.to(wide))
    else:  # "none" has a column of its own, cut off later
        columns = columns.where(columns >= 0, experts)
        table = given.new_zeros(columns.shape[0], experts + 1, dtype=wide)
        table = table.scatter_add_(1, columns, given.to(wide))[:, :experts]
    return table.to(p.x.dtype)


def _by_expert(h: Tensor, ranks: Sequence[int], factors: Tensor) -> Tensor:
    """h (N, R) times the factor of the expert that each column belongs to."""
    if len(ranks) == 1:
        return h * factors
    if _same(ranks):
        return (h.view(-1, len(ranks), ranks[0]) * factors.unsqueeze(-1)).view_as(h)
    return h * factors.index_select(-1, _owners(ranks, h.device))


def _same(ranks: Sequence[int]) -> bool:
    return ranks.count(ranks[0]) == len(ranks)


def _owners(ranks: Sequence[int], device: torch.device) -> Tensor:
    """(R,) expert of each column."""
    counts = torch.tensor(ranks, device=device)
    return torch.arange(len(ranks), device=device).repeat_interleave(counts, output_size=sum(ranks))
