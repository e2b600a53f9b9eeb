"""The weights come to the rows: those that a sequence (or row) uses are copied together, and one batched product runs.

Pays where rows are few and their experts many, as in decoding; each row's product is its own.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mixadapters.kernels.activations import hidden, hidden_backward
from mixadapters.kernels.problem import Problem
from mixadapters.kernels.sorting import keeps

__all__ = ["backward", "forward", "keeps", "refuses"]


def refuses(p: Problem) -> str | None:
    if not p.x.is_cpu:
        return "its sums over rows of one expert have no fixed order on a GPU"
    return None


def forward(p: Problem, keep: bool) -> tuple[Tensor, tuple[Tensor, ...]]:
    p = p.cast()
    g = _Gathered(p)
    x = g.sequences(p.dropped(p.x))
    z = g.affine(x, p.down, p.b_down)
    v = None if p.gate is None else g.affine(x, p.gate, p.b_gate)
    h = g.weighted(hidden(p.act, z, v))
    up = g.rows_of(p.up.t())
    y = p.start()
    wide = g.sequences(y)
    if y.dtype == x.dtype:
        wide.baddbmm_(h, up)
    else:
        wide += torch.bmm(h, up)
    if p.b_up is not None:
        wide += torch.bmm(g.full_weights(), g.biases_of(p.b_up))
    if p.base is not None and g.none is not None:
        # Adding a zero turns -0.0 into 0.0.
        y = torch.where(g.none.all(1).view(-1, 1, 1), g.sequences(p.start()), wide).view_as(y)
    if not keep:
        return y, ()
    order = torch.zeros(p.x.shape[0] * p.slots, dtype=torch.int64)  # nothing is sorted
    shape = (order.shape[0], g.rank)
    return y, (z.reshape(shape), order) if v is None else (z.reshape(shape), order, v.reshape(shape))


def backward(p: Problem, saved: tuple[Tensor, ...], grad: Tensor, needs: frozenset[str]) -> dict[str, Tensor]:
    p = p.cast()
    g = _Gathered(p)
    width = p.slots * g.rank
    z = g.sequences(saved[0].view(p.x.shape[0], width))
    v = None if p.gate is None else g.sequences(saved[2].view(p.x.shape[0], width))
    grad = g.sequences(grad.to(p.x.dtype))
    h = hidden(p.act, z, v)
    u = torch.bmm(grad, g.rows_of(p.up.t()).transpose(1, 2))
    out = {}
    if "up" in needs:
        out["up"] = g.scattered(p.up.t(), torch.bmm(g.weighted(h).transpose(1, 2), grad)).t()
    if "b_up" in needs and p.b_up is not None:
        parts = torch.bmm(g.full_weights().transpose(1, 2), grad).flatten(0, 1)
        out["b_up"] = torch.zeros_like(p.b_up).index_add_(0, g.experts.reshape(-1), parts)
    if "gates" in needs or "scale" in needs:
        out |= _weight_gradients(p, g, g.without_lacking(u * h), grad, needs)
    if needs & {"x", "down", "b_down", "gate", "b_gate"}:
        dz, dv = hidden_backward(p.act, g.weighted(u), z, v)
        x = g.sequences(p.dropped(p.x) if needs & {"down", "gate"} else p.x)
        dx = None
        for d, weight, bias, name in ((dz, p.down, p.b_down, "down"), (dv, p.gate, p.b_gate, "gate")):
            if d is None or weight is None:
                continue
            if name in needs:
                out[name] = g.scattered(weight, torch.bmm(d.transpose(1, 2), x))
            if f"b_{name}" in needs:
                assert bias is not None
                out[f"b_{name}"] = g.scattered(bias, d.sum(1))
            if "x" in needs:
                part = torch.bmm(d, g.rows_of(weight))
                dx = part if dx is None else dx + part
        if dx is not None:
            out["x"] = p.dropped(dx.view(p.x.shape))
    return out


def _weight_gradients(
    p: Problem, g: _Gathered, products: Tensor, grad: Tensor, needs: frozenset[str]
) -> dict[str, Tensor]:
    per_slot = products.view(-1, p.slots, g.rank).sum(2)
    if p.b_up is not None:
        per_slot = per_slot + torch.bmm(grad, g.biases_of(p.b_up).transpose(1, 2)).view(-1, p.slots)
    if g.none is not None:
        per_slot = per_slot.view(-1, g.run, p.slots).masked_fill(g.none.unsqueeze(1), 0).view_as(per_slot)
    out = {}
    if "scale" in needs:
        by_gate = per_slot if p.gates is None else per_slot * p.gates
        owners = g.experts.repeat_interleave(g.run, 0).reshape(-1)
        out["scale"] = by_gate.new_zeros(len(p.ranks)).index_add_(0, owners, by_gate.reshape(-1))
    if "gates" in needs:
        scale = None if p.scale is None else p.scale[g.experts].repeat_interleave(g.run, 0)
        out["gates"] = per_slot if scale is None else per_slot * scale
    return out


class _Places(NamedTuple):
    """Where the weights of each sequence stand: what depends on the indices and the ranks alone."""

    run: int
    rank: int
    experts: Tensor  # (B, k)
    none: Tensor | None  # (B, k) where there is no expert, and the weights of expert 0 are read
    in_order: bool  # one sequence for each expert, one after the other: the weights are read where they lie
    # Of an expert narrower than the widest, the last row is read again in place of those it lacks.
    table: Tensor | None  # (E, r) rows of each expert
    lacking: Tensor | None  # (B, 1, k * r)


def _places(p: Problem, run: int) -> _Places:
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
    return _Places(run, rank, experts, none, in_order, table, lacking)


class _Gathered:
    """B = N / run sequences, each with the weights of its k slots side by side: k * r columns, r the widest rank."""

    def __init__(self, p: Problem) -> None:
        self.p, run = p, 1 if p.batch_invariant else p.run
        places = p.derived(("gathered", p.ranks, run), lambda: _places(p, run))
        self.run, self.rank, self.experts, self.none, self.in_order, self.table, self.lacking = places

    def sequences(self, t: Tensor) -> Tensor:
        """(N, d) -> (B, run, d)"""
        return t.view(-1, self.run, t.shape[1])

    def rows_of(self, weight: Tensor) -> Tensor:
        """(R, d) -> (B, k * r, d)"""
        width = self.p.slots * self.rank
        if self.table is None:
            stacked = weight.reshape(len(self.p.ranks), self.rank, -1)
            if self.in_order:
                return stacked
            return stacked.index_select(0, self.experts.reshape(-1)).view(-1, width, weight.shape[1])
        return weight.index_select(0, self.table[self.experts].reshape(-1)).view(-1, width, weight.shape[1])

    def biases_of(self, bias: Tensor) -> Tensor:
        """(E, M) -> (B, k, M)"""
        return bias.index_select(0, self.experts.reshape(-1)).view(*self.experts.shape, bias.shape[1])

    def scattered(self, weight: Tensor, parts: Tensor) -> Tensor:
        """Sums of parts (B, k * r, ...) over all who read a row of the weight."""
        total = weight.new_zeros(weight.shape, dtype=torch.promote_types(weight.dtype, torch.float32))
        parts = parts.flatten(0, 1).to(total.dtype)
        if self.table is not None:
            return total.index_add_(0, self.table[self.experts].reshape(-1), parts)
        stacked = total.view(len(self.p.ranks), self.rank, *total.shape[1:])
        stacked.index_add_(0, self.experts.reshape(-1), parts.view(-1, *stacked.shape[1:]))
        return total

    def affine(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        rows = self.rows_of(weight)
        # A matrix times a vector is the faster of two ways to say it, but one sequence alone gets other bits by it.
        if self.run == 1 and not self.p.batch_invariant:
            product = torch.bmm(rows, x.transpose(1, 2)).transpose(1, 2)
        else:
            product = torch.bmm(x, rows.transpose(1, 2))
        return product if bias is None else product + self.rows_of(bias.unsqueeze(1)).transpose(1, 2)

    def slot_weights(self) -> Tensor | None:
        """(B, run or 1, k) gate times scale, 0 where there is no expert; None where all are 1."""
        weights = None if self.p.gates is None else self.p.gates.view(-1, self.run, self.p.slots)
        if self.p.scale is not None:
            scale = self.p.scale.unsqueeze(1) if self.in_order else self.p.scale[self.experts]
            weights = scale.unsqueeze(1) if weights is None else weights * scale.unsqueeze(1)
        if self.none is None:
            return weights
        none = self.none.unsqueeze(1)
        return (~none).to(self.p.x.dtype) if weights is None else weights.masked_fill(none, 0)

    def full_weights(self) -> Tensor:
        """(B, run, k)"""
        weights = self.slot_weights()
        if weights is None:
            weights = self.p.x.new_ones(1, 1, 1)
        return weights.expand(self.experts.shape[0], self.run, self.p.slots)

    def weighted(self, h: Tensor) -> Tensor:
        """h (B, run, k * r) times the weight of its slot; exact zeros where there is no expert, or no such column."""
        weights = self.slot_weights()
        if weights is not None:
            slots = h.view(*h.shape[:2], self.p.slots, self.rank) * weights.unsqueeze(3)
            if self.none is not None:
                slots = slots.masked_fill_(self.none.view(-1, 1, self.p.slots, 1), 0)
            h = slots.flatten(2)
        return self.without_lacking(h)

    def without_lacking(self, h: Tensor) -> Tensor:
        return h if self.lacking is None else h.masked_fill(self.lacking, 0)
