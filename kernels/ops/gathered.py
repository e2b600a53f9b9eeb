"""The weights come to the rows: those that a sequence (or row) uses are copied together, and one batched product runs.

Pays where rows are few and their experts many, as in decoding; each row's product is its own. And for sequences that
name one adapter each: where nothing else is asked, `by_runs` does it by products that torch differentiates itself, a
call of which takes half of what the operation's takes besides its products.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mixadapters.kernels import chain
from mixadapters.kernels.activations import hidden
from mixadapters.kernels.problem import Problem
from mixadapters.kernels.sorting import keeps

__all__ = ["backward", "by_runs", "differentiable", "forward", "keeps", "plain", "refuses", "takes"]

# For its gradients `by_runs` keeps the weights of each sequence, unless it reads them where they lie: at most this
# part of what its rows are.
KEPT = 1 / 8

_unsafe_view = torch.ops.aten._unsafe_view.default


def refuses(p: Problem) -> str | None:
    if not p.x.is_cpu:
        return "its sums over rows of one expert have no fixed order on a GPU"
    return None


def forward(p: Problem, keep: bool) -> tuple[Tensor, tuple[Tensor, ...]]:
    if not keep and plain(p, training=False):
        return differentiable(p), ()
    return chain.forward(p, keep, Gathered)


def backward(p: Problem, saved: tuple[Tensor, ...], grad: Tensor, needs: frozenset[str]) -> dict[str, Tensor]:
    return chain.backward(p, saved, grad, needs, Gathered)


def plain(p: Problem, training: bool) -> bool:
    """Whether `differentiable` runs the problem and keeps what the operation promises."""
    indices, run = p.indices, p.run
    if indices is None or p.dropout or p.batch_invariant or p.equal_rank is None or not indices.numel() or run == 1:
        return False
    least, most = p.bounds()
    if least < 0 or most >= len(p.ranks):
        return False
    half = chain.wide_dtype(p.x) is not p.x.dtype
    return takes(run, p.slots * p.ranks[0], half, training) or (training and not half and _chosen(p, run).in_order)


def takes(run: int, columns: int, half: bool, training: bool) -> bool:
    """Whether `differentiable` runs sequences of `run` rows of so many hidden columns, where nothing else is asked."""
    if training and half:  # torch would add up gradients in half precision
        return False
    return run > 1 and (not training or columns <= run * KEPT)


def differentiable(p: Problem) -> Tensor:
    """The output by operations that torch differentiates; for what `plain` takes."""
    choice = _chosen(p, p.run)
    return by_runs(p.cast(), choice.experts, in_order=choice.in_order)


def by_runs(p: Problem, experts: Tensor, none: Tensor | None = None, in_order: bool = False) -> Tensor:
    """The output of experts of one rank: B = N / run sequences, each with the weights of its k slots side by side.

    Args: as the fields of `Choice`; no number in `experts` is below 0.
    """
    run, (sequences, slots), rank = p.run, experts.shape, p.ranks[0]
    flat = None if in_order else experts.reshape(-1)
    rows = p.x.view(sequences, run, p.x.shape[1])  # not -1, which is no size where there are no rows
    z = _mapped(p, rows, flat, p.down, p.b_down)
    h = hidden(p.act, z, None if p.gate is None else _mapped(p, rows, flat, p.gate, p.b_gate))
    scale = p.scale if p.scale is None or flat is None else p.scale.index_select(0, flat)
    factors = None if p.weights is None else p.weights.view(sequences, run, slots)
    if scale is not None:
        scale = scale.view(sequences, 1, slots)
        factors = scale if factors is None else factors * scale
    if factors is not None:
        h = h * factors if slots == 1 else (h.view(sequences, run, slots, rank) * factors.unsqueeze(3)).flatten(2)
    ups = _of_sequences(p, p.up.t(), flat)
    if none is not None:  # what stands in for a slot without expert may be infinite, and 0 * inf is no number
        h = h.view(sequences, run, slots, rank).masked_fill(none[:, None, :, None], 0).flatten(2)
        ups = ups.view(sequences * slots, rank, ups.shape[2]).masked_fill(none.view(-1, 1, 1), 0).view_as(ups)
    shift = None if p.b_up is None else _shifts(p, factors, flat, none)
    if p.base is None:
        return _as_rows(torch.bmm(h, ups) if shift is None else torch.baddbmm(shift, h, ups))
    start = p.base if p.base_weight is None else p.base * p.base_weight.to(p.base.dtype).unsqueeze(1)
    start = start.view(sequences, run, start.shape[1])
    if none is None and start.dtype == h.dtype:
        y = torch.baddbmm(start, h, ups)
        return _as_rows(y if shift is None else y + shift)
    delta = torch.bmm(h, ups)
    y = (start + (delta if shift is None else delta + shift)).to(start.dtype)
    # Adding a zero turns -0.0 into 0.0.
    return _as_rows(y if none is None else torch.where(none.all(1)[:, None, None], start, y))


def _as_rows(y: Tensor) -> Tensor:
    """(B, run, M) -> (N, M), no view: a view that was made without gradients could not be changed in place with them.

    Nobody else has the tensor.
    """
    return _unsafe_view(y.contiguous(), (y.shape[0] * y.shape[1], y.shape[2]))


def _of_sequences(p: Problem, weight: Tensor, flat: Tensor | None) -> Tensor:
    """(E * n, d) -> (B, k * n, d): of each slot's expert; flat (B * k,), or None where the experts are in order."""
    each, width = weight.shape[0] // len(p.ranks), weight.shape[1]
    by_expert = weight.view(len(p.ranks), each, width)
    if flat is None:
        return by_expert
    found = by_expert.index_select(0, flat)
    return found if p.slots == 1 else found.view(p.x.shape[0] // p.run, p.slots * each, width)


def _mapped(p: Problem, rows: Tensor, flat: Tensor | None, weight: Tensor, bias: Tensor | None) -> Tensor:
    """(B, run, k * r)"""
    own = _of_sequences(p, weight, flat)
    z = _Mapped.apply(rows, own) if torch.is_grad_enabled() else torch.bmm(rows, own.transpose(1, 2))
    return z if bias is None else z + _of_sequences(p, bias.unsqueeze(1), flat).transpose(1, 2)


class _Mapped(torch.autograd.Function):
    """rows (B, run, d) by the transposes of own (B, n, d).

    The gradient of the second factor of `bmm` comes with its rows as columns, and that of `own` would be copied to
    lie as `own` does: 4 % of a training call.
    """

    @staticmethod
    def forward(ctx, rows, own):
        ctx.save_for_backward(rows, own)
        return torch.bmm(rows, own.transpose(1, 2))

    @staticmethod
    def backward(ctx, grad):
        rows, own = ctx.saved_tensors
        of_rows, of_own = ctx.needs_input_grad
        return (
            torch.bmm(grad, own) if of_rows else None,
            torch.bmm(grad.transpose(1, 2), rows) if of_own else None,
        )


def _shifts(p: Problem, factors: Tensor | None, flat: Tensor | None, none: Tensor | None) -> Tensor:
    """(B, run, M): what the biases of the outputs add; factors (B, run or 1, k)."""
    assert p.b_up is not None
    biases = _of_sequences(p, p.b_up, flat)  # (B, k, M)
    if factors is None:
        factors = biases.new_ones(1, 1, 1)
    factors = factors.expand(biases.shape[0], p.run, p.slots)
    if none is not None:
        biases, factors = biases.masked_fill(none.unsqueeze(2), 0), factors.masked_fill(none.unsqueeze(1), 0)
    return torch.bmm(factors, biases)


class Choice(NamedTuple):
    """Which weights each sequence uses: what depends on the indices and the ranks alone."""

    run: int
    rank: int
    experts: Tensor  # (B, k)
    none: Tensor | None  # (B, k) where there is no expert, and `experts` is 0
    # One sequence for each expert, one after the other: the weights are read where they are.
    in_order: bool
    # Of an expert narrower than the widest, the last row is read again instead of those it lacks.
    table: Tensor | None  # (E, r) rows of each expert
    lacking: Tensor | None  # (B, 1, k * r)


def _chosen(p: Problem, run: int) -> Choice:
    return p.derived(("gathered", p.ranks, run), lambda: _choose(p, run))


def _choose(p: Problem, run: int) -> Choice:
    count, rank = len(p.ranks), max(p.ranks)
    everyone = torch.arange(count)
    none = None
    if p.indices is None:
        experts = everyone.expand(p.x.shape[0] // run, -1)
    else:
        experts = p.indices[::run].long()
        if p.indices.numel() and p.bounds()[0] < 0:
            experts, none = experts.clamp_min(0), experts < 0
    in_order = none is None and torch.equal(experts, everyone.unsqueeze(1))
    table = lacking = None
    if p.equal_rank is None:
        column = torch.arange(rank)
        ranks = torch.tensor(p.ranks).unsqueeze(1)
        table = torch.tensor(p.starts).unsqueeze(1) + column.minimum(ranks - 1)
        lacking = (column >= ranks)[experts].flatten(1).unsqueeze(1)
    return Choice(run, rank, experts, none, in_order, table, lacking)


class Gathered:
    """B = N / run sequences, each with the weights of its k slots side by side.

    Rows (B, run, d), hidden values (B, run, k * r) with r the widest rank, slots (B, run, k). A slot without expert
    gets weights of 0, and gives none of its gradients.
    """

    def __init__(self, p: Problem, saved: tuple[Tensor, ...] = ()) -> None:
        self.p, run = p, 1 if p.batch_invariant else p.run
        self.run, self.rank, self.experts, self.none, self.in_order, self.table, self.lacking = _chosen(p, run)
        self.weights = None if p.weights is None else p.weights.view(-1, run, p.slots)
        self.scale = None
        if p.scale is not None:
            # A slot without expert has read expert 0's: a 1 in its place, which no infinity comes out of.
            scale = p.scale.unsqueeze(1) if self.in_order else p.scale[self.experts]
            self.scale = (scale if self.none is None else scale.masked_fill(self.none, 1)).unsqueeze(1)
        self.factors = chain.product(self.weights, self.scale)  # (B, run or 1, k), or None
        if self.none is not None:
            none = self.none.unsqueeze(1)
            self.factors = (~none).to(p.x.dtype) if self.factors is None else self.factors.masked_fill(none, 0)

    def keep(self, z: Tensor, v: Tensor | None) -> tuple[Tensor, ...]:
        order = torch.zeros(self.p.x.shape[0] * self.p.slots, dtype=torch.int64)  # nothing is sorted
        shape = (order.shape[0], self.rank)
        return (z.reshape(shape), order) if v is None else (z.reshape(shape), order, v.reshape(shape))

    def kept(self, saved: tuple[Tensor, ...]) -> tuple[Tensor, Tensor | None]:
        z, v = saved[0], saved[2] if len(saved) > 2 else None
        shape = (-1, self.run, self.p.slots * self.rank)
        return z.view(shape), None if v is None else v.view(shape)

    def take(self, t: Tensor) -> Tensor:
        return t.view(-1, self.run, t.shape[1])

    def affine(self, rows: Tensor, *maps: chain.Affine) -> list[Tensor]:
        return [self._affine(rows, *each) for each in maps]

    def _affine(self, rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        own = self._rows_of(weight)
        # A matrix times a vector is the faster of two ways to say it, but one sequence alone gets other bits by it.
        if self.run == 1 and not self.p.batch_invariant:
            product = torch.bmm(own, rows.transpose(1, 2)).transpose(1, 2)
        else:
            product = torch.bmm(rows, own.transpose(1, 2))
        return product if bias is None else product + self._rows_of(bias.unsqueeze(1)).transpose(1, 2)

    def weighted(self, h: Tensor) -> Tensor:
        if self.factors is None:
            return h if self.lacking is None else h.masked_fill(self.lacking, 0)
        return self.cleared((h.view(*h.shape[:2], self.p.slots, self.rank) * self.factors.unsqueeze(3)).flatten(2))

    def cleared(self, h: Tensor) -> Tensor:
        if self.none is not None:
            h.view(*h.shape[:2], self.p.slots, self.rank).masked_fill_(self.none[:, None, :, None], 0)
        return h if self.lacking is None else h.masked_fill_(self.lacking, 0)

    def add_up(self, h: Tensor) -> Tensor:
        p = self.p
        y, up = p.start(), self._rows_of(p.up.t())
        rows = self.take(y)
        if y.dtype == h.dtype:
            rows.baddbmm_(h, up)
        else:
            rows += torch.bmm(h, up)
        if p.b_up is not None:
            rows += torch.bmm(self._all_factors(), self._biases_of(p.b_up))
        if p.base is not None and self.none is not None:
            # Adding a zero turns -0.0 into 0.0.
            y = torch.where(self.none.all(1).view(-1, 1, 1), self.take(p.start()), rows).view_as(y)
        return y

    def spread(self, pairs: list[tuple[Tensor, Tensor]]) -> Tensor:
        (h, weight), *more = pairs
        dx = torch.bmm(h, self._rows_of(weight))
        for h, weight in more:
            dx = dx + torch.bmm(h, self._rows_of(weight))
        return dx.view(self.p.x.shape)

    def outer(self, h: Tensor, rows: Tensor) -> Tensor:
        return self._collected(torch.bmm(h.transpose(1, 2), rows))

    def back(self, rows: Tensor, h: Tensor | None) -> tuple[Tensor, Tensor | None]:
        u = torch.bmm(rows, self._rows_of(self.p.up.t()).transpose(1, 2))
        return u, None if h is None else self.outer(h, rows)

    def sums(self, h: Tensor) -> Tensor:
        return self._collected(h.sum(1, dtype=chain.wide_dtype(h)))

    def shift_sums(self, rows: Tensor) -> Tensor:
        parts = torch.bmm(self._all_factors().transpose(1, 2), rows).flatten(0, 1)
        return self._by_number(parts)

    def dots(self, h: Tensor, rows: Tensor) -> Tensor:
        dots = self.cleared(h).view(*h.shape[:2], self.p.slots, self.rank).sum(3)
        if self.p.b_up is not None:
            dots += torch.bmm(rows, self._biases_of(self.p.b_up).transpose(1, 2))
        return dots if self.none is None else dots.masked_fill_(self.none.unsqueeze(1), 0)

    def by_row(self, dots: Tensor) -> Tensor:
        return dots.view(-1, self.p.slots)

    def by_expert(self, dots: Tensor) -> Tensor:
        return self._by_number(dots.sum(1).flatten())

    # --- weights to rows, and back ----------------------------------------------------------------------------

    def _rows_of(self, weight: Tensor) -> Tensor:
        """(R, d) -> (B, k * r, d)"""
        width = self.p.slots * self.rank
        if self.table is not None:
            found = weight.index_select(0, self.table[self.experts].reshape(-1))
        else:
            by_number = weight.reshape(len(self.p.ranks), self.rank, -1)
            if self.in_order:
                return by_number
            found = by_number.index_select(0, self.experts.reshape(-1))
        return self._without_none(found).view(-1, width, weight.shape[1])

    def _biases_of(self, bias: Tensor) -> Tensor:
        """(E, M) -> (B, k, M)"""
        found = self._without_none(bias.index_select(0, self.experts.reshape(-1)))
        return found.view(*self.experts.shape, bias.shape[1])

    def _without_none(self, parts: Tensor) -> Tensor:
        """(B * k, ...) or (B * k * r, ...): 0 where there is no expert, in place."""
        if self.none is not None:
            parts.view(self.none.numel(), -1)[self.none.reshape(-1)] = 0
        return parts

    def _all_factors(self) -> Tensor:
        """(B, run, k)"""
        factors = self.p.x.new_ones(1, 1, 1) if self.factors is None else self.factors
        return factors.expand(self.experts.shape[0], self.run, self.p.slots)

    def _collected(self, parts: Tensor) -> Tensor:
        """(B, k * r, ...) -> (R, ...): summed over all that have read a row of the weight."""
        parts = parts.flatten(0, 1)
        if self.table is None:
            return self._by_number(parts.view(-1, self.rank, *parts.shape[1:])).flatten(0, 1)
        # Columns that a narrower expert lacks repeat its last one: they were cleared, and so add 0 to it here.
        parts = chain.wide(self._without_none(parts))
        total = parts.new_zeros(sum(self.p.ranks), *parts.shape[1:])
        return total.index_add_(0, self.table[self.experts].reshape(-1), parts)

    def _by_number(self, parts: Tensor) -> Tensor:
        """(B * k, ...) -> (E, ...): summed over the slots of each expert."""
        parts = chain.wide(self._without_none(parts))
        return parts.new_zeros(len(self.p.ranks), *parts.shape[1:]).index_add_(0, self.experts.reshape(-1), parts)
