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
    sizes: list[int] | None  # of the pieces, where these are all rows, once and in order
    order: Tensor | None
    gates: Tensor | None  # (S,) of the slots, in that order
    scale: Tensor | None  # (S,)

    @property
    def weights(self) -> Tensor | None:
        if self.gates is None or self.scale is None:
            return self.scale if self.gates is None else self.gates
        return self.gates * self.scale

    def taken(self, t: Tensor) -> Iterable[Tensor]:
        """The rows of t (N, d), by pieces; gathered one piece after the other where they do not stand together."""
        return t.split(self.sizes) if self.sizes else (_take(t, piece.rows) for piece in self.pieces)

    def views(self, t: Tensor) -> Iterable[Tensor | None]:
        """The rows of t (N, d), by pieces, where they stand together."""
        if self.sizes:
            return t.split(self.sizes)
        return (t[piece.rows] if isinstance(piece.rows, slice) else None for piece in self.pieces)

    def hidden(self, t: Tensor, ranks: tuple[int, ...]) -> Iterable[Tensor]:
        """The slots of t (S, r), by pieces, as wide as the experts."""
        parts = t.split(self.sizes) if self.sizes else (t[piece.at] for piece in self.pieces)
        if ranks.count(t.shape[1]) == len(ranks):
            return parts
        return (part[:, : ranks[piece.expert]] for part, piece in zip(parts, self.pieces, strict=True))


def refuses(p: Problem) -> str | None:
    return None


def forward(p: Problem, keep: bool) -> tuple[Tensor, tuple[Tensor, ...]]:
    p = p.cast()
    plan = _plan(p)
    z = p.x.new_zeros(p.x.shape[0] * p.slots, max(p.ranks, default=0))
    v = None if p.gate is None else torch.zeros_like(z)
    _affine(p, plan, z, v)
    weights = plan.weights
    h = _weighted(hidden(p.act, z, v), weights)
    # The base comes in piece by piece, each while it is in the cache.
    base = p.base if plan.sizes and p.base_weight is None else None
    if base is not None and base.dtype != h.dtype:
        base = None
    y = p.start() if base is None else base.new_empty(base.shape)
    starts = repeat(None) if base is None else plan.views(base)
    ups = p.up.t().split(p.ranks)
    for piece, here, start, part in zip(plan.pieces, plan.views(y), starts, plan.hidden(h, p.ranks), strict=False):
        shift = None
        if p.b_up is not None:
            shift = (p.b_up[piece.expert], None if weights is None else weights[piece.at])
        _add_product(y, piece.rows, here, part, ups[piece.expert], shift, start)
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
    parts = zip(plan.taken(grad), plan.hidden(u, p.ranks), plan.hidden(used, p.ranks), strict=True)
    for piece, (g, du, used_part) in zip(plan.pieces, parts, strict=True):
        e, at = piece.expert, piece.at
        products.mm(g, ups[e].t(), out=du)
        if dups:
            _accumulate(dups[e], used_part, g)
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
        return Plan(pieces, None, by.order, *sorted_weights(p, by))
    sizes = [piece.at.stop - piece.at.start for piece in pieces] if p.slots == 1 else []
    gates = None if p.gates is None else p.gates.t().reshape(-1)
    scale = p.scale
    if scale is not None:
        if p.indices is None:
            scale = scale.repeat_interleave(p.x.shape[0])
        else:
            scale = scale.index_select(0, p.indices.t().reshape(-1).clamp_min(0))
    return Plan(pieces, sizes if sum(sizes) == p.x.shape[0] else None, None, gates, scale)


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


def _affine(p: Problem, plan: Plan, z: Tensor, v: Tensor | None) -> None:
    """Write what the down and the gate projections make of x."""
    into = []
    for out, weight, bias in ((z, p.down, p.b_down), (v, p.gate, p.b_gate)):
        if out is not None and weight is not None:
            biases = None if bias is None else bias.split(p.ranks)
            into.append((iter(plan.hidden(out, p.ranks)), weight.split(p.ranks), biases))
    for piece, taken in zip(plan.pieces, plan.taken(p.x), strict=True):
        e, x = piece.expert, p.dropped(taken, piece.rows)
        for parts, weights, biases in into:
            products.mm(x, weights[e].t(), None if biases is None else biases[e], out=next(parts))


def _take(t: Tensor, rows: slice | Tensor) -> Tensor:
    return t[rows] if isinstance(rows, slice) else t.index_select(0, rows)


def _weighted(h: Tensor, weights: Tensor | None) -> Tensor:
    return h if weights is None else h * weights.unsqueeze(1)


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
    dx = None
    if "x" in needs:  # where each row stands in one piece, its gradient is written, not added to
        dx = p.x.new_empty(p.x.shape) if plan.sizes else p.x.new_zeros(p.x.shape)
    for grads, weight, weight_name, bias_name in ((dz, p.down, "down", "b_down"), (dv, p.gate, "gate", "b_gate")):
        if grads is None:
            continue
        assert weight is not None
        weights = weight.split(p.ranks)
        if weight_name in needs:
            totals = out[weight_name].split(p.ranks)
            for piece, d, x in zip(plan.pieces, plan.hidden(grads, p.ranks), plan.taken(p.x), strict=True):
                _accumulate(totals[piece.expert], d, p.dropped(x, piece.rows))
        if bias_name in needs:
            shifts = out[bias_name].split(p.ranks)
            for piece, d in zip(plan.pieces, plan.hidden(grads, p.ranks), strict=True):
                shifts[piece.expert].add_(d.sum(0))
        if dx is not None:
            for piece, d, here in zip(plan.pieces, plan.hidden(grads, p.ranks), plan.views(dx), strict=True):
                if here is not None and plan.sizes and grads is dz:
                    products.mm(d, weights[piece.expert], out=here)
                else:
                    _add_product(dx, piece.rows, here, d, weights[piece.expert])
    if dx is not None:
        out["x"] = p.dropped(dx)
