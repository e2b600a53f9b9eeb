"""One product per expert over the rows that chose it.

Rows that stand together are read and written in place, as views; otherwise slots are sorted by expert once, and
gathered and scattered by blocks that stay in the cache. Only the hidden values are kept: backward gathers again.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mixadapters.kernels import products
from mixadapters.kernels.activations import hidden, hidden_backward
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
    order: Tensor | None
    gates: Tensor | None  # (S,) of the slots, in that order
    scale: Tensor | None  # (S,)

    @property
    def weights(self) -> Tensor | None:
        if self.gates is None or self.scale is None:
            return self.scale if self.gates is None else self.gates
        return self.gates * self.scale

    def once(self, p: Problem) -> bool:
        """Each row stands in one piece, in place: its result is written, not added to."""
        places = sum(at.stop - at.start for _, at, _ in self.pieces)
        return p.slots == 1 and self.order is None and places == p.x.shape[0]


def refuses(p: Problem) -> str | None:
    return None


def forward(p: Problem, keep: bool) -> tuple[Tensor, tuple[Tensor, ...]]:
    p = p.cast()
    plan = _plan(p)
    z = p.x.new_zeros(p.x.shape[0] * p.slots, max(p.ranks, default=0))
    v = None if p.gate is None else torch.zeros_like(z)
    downs, gates = _Cut(p, p.down, p.b_down), _Cut(p, p.gate, p.b_gate)
    for piece in plan.pieces:
        x = p.dropped(_take(p.x, piece.rows), piece.rows)
        downs.affine(piece.expert, x, z[piece.at])
        if v is not None:
            gates.affine(piece.expert, x, v[piece.at])
    weights = plan.weights
    h = _weighted(hidden(p.act, z, v), weights)
    # The base comes in piece by piece, each while it is in the cache.
    base = p.base if p.base_weight is None and plan.once(p) else None
    if base is not None and base.dtype != h.dtype:
        base = None
    y = p.start() if base is None else base.new_empty(base.shape)
    ups = p.up.t().split(p.ranks)
    for piece in plan.pieces:
        e, at = piece.expert, piece.at
        shift = None if p.b_up is None else (p.b_up[e], None if weights is None else weights[at])
        _add_product(y, piece.rows, h[at, : p.ranks[e]], ups[e], shift, base)
    if not keep:
        return y, ()
    order = torch.zeros(z.shape[0], dtype=torch.int64, device=z.device) if plan.order is None else plan.order
    return y, (z, order) if v is None else (z, order, v)


def backward(p: Problem, saved: tuple[Tensor, ...], grad: Tensor, needs: frozenset[str]) -> dict[str, Tensor]:
    p = p.cast()
    z, order, v = saved[0], saved[1], saved[2] if len(saved) > 2 else None
    plan = _plan(p, order)
    grad = grad.to(p.x.dtype)
    weights = plan.weights
    h = hidden(p.act, z, v)
    used = _weighted(h, weights) if "up" in needs else h
    u = torch.zeros_like(z)  # gradient of the hidden values, before their weight
    shifts = None if p.b_up is None else p.x.new_zeros(z.shape[0])
    out = _buffers(p, needs)
    ups = p.up.t().split(p.ranks)
    dups = out["up"].t().split(p.ranks) if "up" in needs else ()
    for piece in plan.pieces:
        e, at = piece.expert, piece.at
        g = _take(grad, piece.rows)
        products.mm(g, ups[e].t(), out=u[at, : p.ranks[e]])
        if dups:
            _accumulate(dups[e], used[at, : p.ranks[e]], g)
        if "b_up" in needs:
            out["b_up"][e] += g.sum(0) if weights is None else torch.mv(g.t(), weights[at])
        if shifts is not None:
            assert p.b_up is not None
            torch.mv(g, p.b_up[e], out=shifts[at])
    if "gates" in needs or "scale" in needs:
        per_slot = (u * h).sum(1)
        out |= _weight_gradients(p, plan, per_slot if shifts is None else per_slot + shifts, needs)
    if needs & {"x", "down", "b_down", "gate", "b_gate"}:
        dz, dv = hidden_backward(p.act, _weighted(u, weights), z, v)
        _input_gradients(p, plan, dz, dv, out, needs)
    return out


def _plan(p: Problem, order: Tensor | None = None) -> Plan:
    number = len(p.ranks)
    pieces = p.derived(("pieces", number, p.run), lambda: _pieces_in_place(p))
    if pieces is None:
        by = sort_slots(p, order)
        pieces = p.derived(("sorted pieces", number), lambda: _sorted_pieces(by.rows, by.counts.tolist()))
        return Plan(pieces, by.order, *sorted_weights(p, by))
    gates = None if p.gates is None else p.gates.t().reshape(-1)
    scale = p.scale
    if scale is not None:
        if p.indices is None:
            scale = scale.repeat_interleave(p.x.shape[0])
        else:
            scale = scale.index_select(0, p.indices.t().reshape(-1).clamp_min(0))
    return Plan(pieces, None, gates, scale)


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


class _Cut:
    """A weight (R, K) and its bias (R,), by expert."""

    def __init__(self, p: Problem, weight: Tensor | None, bias: Tensor | None) -> None:
        self.ranks = p.ranks
        self.weights = () if weight is None else weight.split(p.ranks)
        self.biases = None if bias is None else bias.split(p.ranks)

    def affine(self, e: int, x: Tensor, out: Tensor) -> None:
        bias = None if self.biases is None else self.biases[e]
        products.mm(x, self.weights[e].t(), bias, out=out[:, : self.ranks[e]])


def _take(t: Tensor, rows: slice | Tensor) -> Tensor:
    return t[rows] if isinstance(rows, slice) else t.index_select(0, rows)


def _weighted(h: Tensor, weights: Tensor | None) -> Tensor:
    return h if weights is None else h * weights.unsqueeze(1)


def _add_product(
    y: Tensor,
    rows: slice | Tensor,
    h: Tensor,
    up: Tensor,
    shift: tuple[Tensor, Tensor | None] | None = None,
    base: Tensor | None = None,
) -> None:
    """y[rows] += h @ up, plus a bias times a weight per row; with a base, y[rows] = base[rows] + that."""
    if isinstance(rows, slice) and y.dtype == h.dtype:
        here = y[rows]
        products.mm(h, up, here if base is None else base[rows], out=here)
        if shift is not None:
            here += shift[0] if shift[1] is None else torch.outer(shift[1], shift[0])
        return
    delta = products.mm(h, up)
    if shift is not None:
        delta += shift[0] if shift[1] is None else torch.outer(shift[1], shift[0])
    if isinstance(rows, slice):
        y[rows] += delta
    else:
        y.index_add_(0, rows, delta.to(y.dtype))


def _accumulate(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a^T @ b; a total of half-precision products is kept in float32."""
    if total.dtype == a.dtype:
        products.outer(a, b, total)
    else:
        total += torch.mm(a.t(), b)


def _buffers(p: Problem, needs: frozenset[str]) -> dict[str, Tensor]:
    dtype = torch.float32 if p.x.dtype.itemsize < 4 else p.x.dtype
    return {
        name: torch.zeros_like(getattr(p, name), dtype=dtype)
        for name in ("down", "up", "b_down", "b_up", "gate", "b_gate")
        if name in needs
    }


def _weight_gradients(p: Problem, plan: Plan, per_slot: Tensor, needs: frozenset[str]) -> dict[str, Tensor]:
    out = {}
    if "scale" in needs:
        by_gate = per_slot if plan.gates is None else per_slot * plan.gates
        total = by_gate.new_zeros(len(p.ranks))
        for piece in plan.pieces:
            total[piece.expert] += by_gate[piece.at].sum()
        out["scale"] = total
    if "gates" in needs:
        by_scale = per_slot if plan.scale is None else per_slot * plan.scale
        if plan.order is None:
            out["gates"] = by_scale.view(p.slots, -1).t()
        else:
            out["gates"] = torch.empty_like(by_scale).index_copy_(0, plan.order, by_scale).view(-1, p.slots)
    return out


def _input_gradients(
    p: Problem, plan: Plan, dz: Tensor, dv: Tensor | None, out: dict[str, Tensor], needs: frozenset[str]
) -> None:
    once = plan.once(p)
    dx = None if "x" not in needs else p.x.new_empty(p.x.shape) if once else p.x.new_zeros(p.x.shape)
    for grads, weight, weight_name, bias_name in ((dz, p.down, "down", "b_down"), (dv, p.gate, "gate", "b_gate")):
        if grads is None:
            continue
        assert weight is not None
        weights = weight.split(p.ranks)
        totals = out[weight_name].split(p.ranks) if weight_name in needs else ()
        shifts = out[bias_name].split(p.ranks) if bias_name in needs else ()
        for piece in plan.pieces:
            e = piece.expert
            d = grads[piece.at, : p.ranks[e]]
            if totals:
                _accumulate(totals[e], d, p.dropped(_take(p.x, piece.rows), piece.rows))
            if shifts:
                shifts[e].add_(d.sum(0))
            if dx is not None and once and grads is dz:
                products.mm(d, weights[e], out=dx[piece.rows])
            elif dx is not None:
                _add_product(dx, piece.rows, d, weights[e])
    if dx is not None:
        out["x"] = p.dropped(dx)
