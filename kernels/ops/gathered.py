"""The weights come to the rows: those that a sequence (or row) uses are copied together, and one batched product runs.

Pays where rows are few and their experts many, as in decoding; each row's product is its own.
"""

from __future__ import annotations

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
        weights = g.sequences(g.slot_weights())
        wide += torch.bmm(weights, g.biases_of(p.b_up))
    if p.base is not None and g.none is not None:
        y = torch.where(g.none.all(1, keepdim=True), p.start(), y)  # adding a zero turns -0.0 into 0.0
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
        parts = torch.bmm(g.sequences(g.slot_weights()).transpose(1, 2), grad).flatten(0, 1)
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
        per_slot = per_slot.masked_fill(g.none, 0)
    out = {}
    if "scale" in needs:
        by_gate = per_slot if p.gates is None else per_slot * p.gates
        owners = g.experts.repeat_interleave(g.run, 0).reshape(-1)
        out["scale"] = by_gate.new_zeros(len(p.ranks)).index_add_(0, owners, by_gate.reshape(-1))
    if "gates" in needs:
        scale = None if p.scale is None else p.scale[g.experts].repeat_interleave(g.run, 0)
        out["gates"] = per_slot if scale is None else per_slot * scale
    return out


class _Gathered:
    """B = N / run sequences, each with the weights of its k slots side by side: k * r columns, r the widest rank."""

    def __init__(self, p: Problem) -> None:
        self.p, self.rank = p, max(p.ranks)
        self.run = 1 if p.batch_invariant else p.run
        self.none = None
        if p.indices is None:
            count = p.x.shape[0] // self.run
            self.experts = torch.arange(len(p.ranks)).expand(count, -1)
        else:
            experts = p.indices[:: self.run].long()
            if (experts < 0).any():
                experts, self.none = experts.clamp_min(0), p.indices < 0
            self.experts = experts
        # One sequence for each expert, in order: the weights are read where they lie.
        everyone = torch.arange(len(p.ranks)).unsqueeze(1)
        self.in_order = self.none is None and torch.equal(self.experts, everyone)
        # Of an expert narrower than the widest, the last row is read again in place of those it lacks.
        self.table = self.lacking = None
        if p.equal_rank is None:
            column = torch.arange(self.rank)
            ranks = torch.tensor(p.ranks).unsqueeze(1)
            self.table = torch.tensor(p.starts).unsqueeze(1) + column.minimum(ranks - 1)
            self.lacking = (column >= ranks)[self.experts]  # (B, k, r)

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
        product = torch.bmm(x, self.rows_of(weight).transpose(1, 2))
        return product if bias is None else product + self.rows_of(bias.unsqueeze(1)).transpose(1, 2)

    def slot_weights(self) -> Tensor:
        """(N, k) gate times scale, 0 where there is no expert."""
        p = self.p
        weights = p.x.new_ones(p.x.shape[0], p.slots) if p.gates is None else p.gates
        if p.scale is not None:
            scale = p.scale[self.experts]
            weights = weights * (scale if self.run == 1 else scale.repeat_interleave(self.run, 0))
        return weights if self.none is None else weights.masked_fill(self.none, 0)

    def weighted(self, h: Tensor) -> Tensor:
        """h (B, run, k * r) times the weight of its slot; exact zeros where there is no expert, or no such column."""
        if self.p.gates is not None or self.p.scale is not None:
            h = (h.reshape(-1, self.p.slots, self.rank) * self.slot_weights().unsqueeze(2)).view_as(h)
        if self.none is not None:
            h = h.reshape(-1, self.p.slots, self.rank).masked_fill(self.none.unsqueeze(2), 0).view_as(h)
        return self.without_lacking(h)

    def without_lacking(self, h: Tensor) -> Tensor:
        return h if self.lacking is None else h.masked_fill(self.lacking.flatten(1).unsqueeze(1), 0)
