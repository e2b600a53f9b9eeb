"""One product per expert over the rows that chose it.

Rows that stand together are read and written in place, as views; otherwise slots are sorted by expert once, and
gathered and scattered by blocks that stay in the cache. Only the hidden values are kept: backward gathers again.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import repeat
from typing import NamedTuple

import torch
from torch import Tensor

from mixadapters.kernels import chain, products
from mixadapters.kernels.problem import Problem
from mixadapters.kernels.sorting import keeps, sort_slots, sorted_weights

__all__ = ["backward", "forward", "keeps", "refuses"]

BLOCK = 1024  # rows gathered at a time: a block of x and one of y fit in a core's cache


class Piece(NamedTuple):
    expert: int
    at: slice  # of the slots, in the plan's order
    rows: slice | Tensor  # of x and y


class Plan(NamedTuple):
    """The slots' order: slot by slot, rows in place (order None), or sorted by expert."""

    pieces: list[Piece]
    sizes: list[int] | None  # of the pieces, where these are all rows, once and in order
    order: Tensor | None
    weights: Tensor | None  # (S,) of the slots, in that order
    scale: Tensor | None  # (S,)

    def taken(self, t: Tensor) -> Iterable[Tensor]:
        """The rows of t (N, d), by pieces; gathered one piece after the other where they do not stand together."""
        return t.split_with_sizes(self.sizes) if self.sizes else (_take(t, piece.rows) for piece in self.pieces)

    def views(self, t: Tensor) -> Iterable[Tensor | None]:
        """The rows of t (N, d), by pieces, where they stand together."""
        if self.sizes:
            return t.split_with_sizes(self.sizes)
        return (t[piece.rows] if isinstance(piece.rows, slice) else None for piece in self.pieces)

    def hidden(self, t: Tensor, ranks: tuple[int, ...]) -> Iterable[Tensor]:
        """The slots of t (S, r), by pieces, as wide as the experts."""
        parts = t.split_with_sizes(self.sizes) if self.sizes else (t[piece.at] for piece in self.pieces)
        if ranks.count(t.shape[1]) == len(ranks):
            return parts
        return (part[:, : ranks[piece.expert]] for part, piece in zip(parts, self.pieces, strict=True))


def refuses(p: Problem) -> str | None:
    return None


def forward(p: Problem, keep: bool) -> tuple[Tensor, tuple[Tensor, ...]]:
    return chain.forward(p, keep, Segments)


def backward(p: Problem, saved: tuple[Tensor, ...], grad: Tensor, needs: frozenset[str]) -> dict[str, Tensor]:
    return chain.backward(p, saved, grad, needs, Segments)


class Segments:
    """Rows (N, d), hidden values (S, r) with r the widest rank, slots (S,), in the order of the plan."""

    def __init__(self, p: Problem, saved: tuple[Tensor, ...] = ()) -> None:
        self.p = p
        self.plan = _plan(p, saved[1] if saved else None)
        self.weights, self.scale = self.plan.weights, self.plan.scale
        self.factors = chain.product(self.weights, self.scale)

    def keep(self, z: Tensor, v: Tensor | None) -> tuple[Tensor, ...]:
        order = self.plan.order
        if order is None:
            order = torch.zeros(z.shape[0], dtype=torch.int64, device=z.device)
        return (z, order) if v is None else (z, order, v)

    def kept(self, saved: tuple[Tensor, ...]) -> tuple[Tensor, Tensor | None]:
        return saved[0], saved[2] if len(saved) > 2 else None

    def take(self, t: Tensor) -> Tensor:
        return t  # gathered by pieces, each time

    def empty(self) -> Tensor:
        """Hidden values of 0, which slots without expert keep."""
        return self.p.x.new_zeros(self.p.x.shape[0] * self.p.slots, max(self.p.ranks, default=0))

    def affine(self, rows: Tensor, *maps: chain.Affine) -> list[Tensor]:
        ranks, found = self.p.ranks, [self.empty() for _ in maps]
        into = [
            (iter(self.plan.hidden(out, ranks)), weight.split(ranks), None if bias is None else bias.split(ranks))
            for out, (weight, bias) in zip(found, maps, strict=True)
        ]
        for piece, taken in zip(self.plan.pieces, self.plan.taken(rows), strict=True):
            e = piece.expert
            for parts, matrices, biases in into:
                products.mm(taken, matrices[e].t(), None if biases is None else biases[e], out=next(parts))
        return found

    def weighted(self, h: Tensor) -> Tensor:
        return h if self.factors is None else h * self.factors.unsqueeze(1)

    def cleared(self, h: Tensor) -> Tensor:
        return h  # pieces are all that is read, and they are as wide as their experts

    def add_up(self, h: Tensor) -> Tensor:
        p, plan = self.p, self.plan
        # The base comes in piece by piece, each while it is in the cache.
        base = p.base if plan.sizes and p.base_weight is None else None
        if base is not None and base.dtype != h.dtype:
            base = None
        y = p.start() if base is None else base.new_empty(base.shape)
        total = y if p.slots == 1 else chain.wide(y)
        starts = repeat(None) if base is None else plan.views(base)
        ups = p.up.t().split(p.ranks)
        for piece, here, start, part in zip(
            plan.pieces, plan.views(total), starts, plan.hidden(h, p.ranks), strict=False
        ):
            shift = None
            if p.b_up is not None:
                shift = (p.b_up[piece.expert], None if self.factors is None else self.factors[piece.at])
            _add_product(total, piece.rows, here, part, ups[piece.expert], shift, start)
        return total.to(y.dtype)

    def spread(self, pairs: list[tuple[Tensor, Tensor]]) -> Tensor:
        p, plan = self.p, self.plan
        # Where each row stands in one piece, its gradient is written, not added to.
        dx = p.x.new_empty(p.x.shape) if plan.sizes else p.x.new_zeros(p.x.shape)
        total = dx if p.slots == 1 else chain.wide(dx)
        for i, (h, weight) in enumerate(pairs):
            matrices = weight.split(p.ranks)
            for piece, part, here in zip(plan.pieces, plan.hidden(h, p.ranks), plan.views(total), strict=True):
                if here is not None and plan.sizes and i == 0 and total is dx:
                    products.mm(part, matrices[piece.expert], out=here)
                else:
                    _add_product(total, piece.rows, here, part, matrices[piece.expert])
        return total.to(dx.dtype)

    def outer(self, h: Tensor, rows: Tensor) -> Tensor:
        total = self._total(rows)
        totals = total.split(self.p.ranks)
        for piece, part, taken in zip(
            self.plan.pieces, self.plan.hidden(h, self.p.ranks), self.plan.taken(rows), strict=True
        ):
            _accumulate(totals[piece.expert], part, taken)
        return total

    def back(self, rows: Tensor, h: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """In one pass over the rows, which are gathered once."""
        if h is None:
            return self.affine(rows, (self.p.up.t(), None))[0], None
        ranks, u, total = self.p.ranks, self.empty(), self._total(rows)
        ups, totals = self.p.up.t().split(ranks), total.split(ranks)
        parts = zip(self.plan.taken(rows), self.plan.hidden(u, ranks), self.plan.hidden(h, ranks), strict=True)
        for piece, (taken, into, part) in zip(self.plan.pieces, parts, strict=True):
            products.mm(taken, ups[piece.expert].t(), out=into)
            _accumulate(totals[piece.expert], part, taken)
        return u, total

    def _total(self, rows: Tensor) -> Tensor:
        return rows.new_zeros(sum(self.p.ranks), rows.shape[1], dtype=chain.wide_dtype(rows))

    def sums(self, h: Tensor) -> Tensor:
        total = h.new_zeros(sum(self.p.ranks), dtype=chain.wide_dtype(h))
        totals = total.split(self.p.ranks)
        for piece, part in zip(self.plan.pieces, self.plan.hidden(h, self.p.ranks), strict=True):
            totals[piece.expert].add_(part.sum(0, dtype=total.dtype))
        return total

    def shift_sums(self, rows: Tensor) -> Tensor:
        total = rows.new_zeros(len(self.p.ranks), rows.shape[1], dtype=chain.wide_dtype(rows))
        for piece, taken in zip(self.plan.pieces, self.plan.taken(rows), strict=True):
            if self.factors is None:
                total[piece.expert] += taken.sum(0, dtype=total.dtype)
            else:
                total[piece.expert] += torch.mm(self.factors[None, piece.at], taken)[0]
        return total

    def dots(self, h: Tensor, rows: Tensor) -> Tensor:
        dots = h.sum(1)
        if self.p.b_up is not None:
            for piece, taken in zip(self.plan.pieces, self.plan.taken(rows), strict=True):
                dots[piece.at] += torch.mv(taken, self.p.b_up[piece.expert])
        return dots

    def by_row(self, dots: Tensor) -> Tensor:
        if self.plan.order is None:
            return dots.view(self.p.slots, -1).t()
        return torch.empty_like(dots).index_copy_(0, self.plan.order, dots).view(-1, self.p.slots)

    def by_expert(self, dots: Tensor) -> Tensor:
        total = dots.new_zeros(len(self.p.ranks))
        for piece in self.plan.pieces:
            total[piece.expert] += dots[piece.at].sum()
        return total


def _plan(p: Problem, order: Tensor | None = None) -> Plan:
    number = len(p.ranks)
    pieces = p.derived(("pieces", number, p.run), lambda: _pieces_in_place(p))
    if pieces is None:
        by = sort_slots(p, order)
        pieces = p.derived(("sorted pieces", number), lambda: _sorted_pieces(by.rows, by.counts.tolist()))
        return Plan(pieces, None, by.order, *sorted_weights(p, by))
    # Slot by slot: the slots of an order in place are the columns of `indices` and `weights` one after the other.
    sizes = [piece.at.stop - piece.at.start for piece in pieces] if p.slots == 1 else []
    weights = None if p.weights is None else p.weights.t().reshape(-1)
    scale = p.scale
    if scale is not None:
        if p.indices is None:
            scale = scale.repeat_interleave(p.x.shape[0])
        else:
            indices = p.indices.t().reshape(-1)
            if p.every_slot_chosen():
                scale = scale.index_select(0, indices)
            else:
                scale = scale.index_select(0, indices.clamp_min(0)).masked_fill_(indices < 0, 1)
    return Plan(pieces, sizes if sum(sizes) == p.x.shape[0] else None, None, weights, scale)


def _pieces_in_place(p: Problem) -> list[Piece] | None:
    """None where rows of one expert are too scattered for it."""
    n, slots = p.x.shape[0], p.slots
    if p.indices is None:
        return [Piece(e, slice(e * n, e * n + n), slice(0, n)) for e in range(slots)]
    if p.run == 1 and slots != 1:
        return None
    pieces = []
    most = max(2 * len(p.ranks), n // 64)
    for slot in range(slots):
        experts, counts = torch.unique_consecutive(p.indices[:: p.run, slot], return_counts=True)
        if experts.shape[0] > most:
            return None
        start = 0
        for e, count in zip(experts.tolist(), counts.tolist(), strict=True):
            stop = start + count * p.run
            if e >= 0:
                pieces.append(Piece(e, slice(slot * n + start, slot * n + stop), slice(start, stop)))
            start = stop
    return pieces


def _sorted_pieces(rows: Tensor, counts: list[int]) -> list[Piece]:
    pieces, start = [], 0
    for e, count in enumerate(counts):
        stop = start + count
        for first in range(start, stop, BLOCK):
            at = slice(first, min(first + BLOCK, stop))
            pieces.append(Piece(e, at, rows[at]))
        start = stop
    return pieces


def _take(t: Tensor, rows: slice | Tensor) -> Tensor:
    return t[rows] if isinstance(rows, slice) else t.index_select(0, rows)


def _add_product(
    y: Tensor, rows: slice | Tensor, here: Tensor | None, h: Tensor, up: Tensor,
    shift: tuple[Tensor, Tensor | None] | None = None, start: Tensor | None = None,
) -> None:  # fmt: skip
    """y[rows] += h @ up, plus a bias times a weight per row; `here` is y[rows] if that is a view.

    start: y[rows] is that plus the product, whatever it was.
    """
    if here is not None and y.dtype == h.dtype:
        products.mm(h, up, here if start is None else start, out=here)
        if shift is not None:
            here += shift[0] if shift[1] is None else torch.outer(shift[1], shift[0])
        return
    delta = products.mm(h, up)
    if shift is not None:
        delta += shift[0] if shift[1] is None else torch.outer(shift[1], shift[0])
    if here is not None:
        here += delta
    else:
        assert isinstance(rows, Tensor)
        y.index_add_(0, rows, delta.to(y.dtype))


def _accumulate(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a^T @ b; a total of half-precision products is kept in float32."""
    if total.dtype == a.dtype:
        products.outer(a, b, total)
    else:
        total += torch.mm(a.t(), b)
