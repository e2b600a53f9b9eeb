"""The chain rule of the backends that call torch, once. A backend is a `Layout`: how it brings rows to their experts.

Every sum over rows, hidden columns or slots is a float32 sum at least. A row meets the experts that it has chosen and
no others, in both directions: what a row has not chosen is an exact 0, even where it would be infinite. A weight of 0
is still a choice: 0 * inf is no number, for the rows that chose so.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from mixadapters.kernels.activations import hidden, hidden_backward
from mixadapters.kernels.problem import Problem

Saved = tuple[Tensor, ...]
Affine = tuple[Tensor, Tensor | None]  # weight (R, d) and bias (R,)


class Layout(Protocol):
    """One problem as a backend lays it out, under a name for each kind of tensor:

    rows: (N, d) as the products read them. hidden: values by row, slot and hidden column. slots: values by row and
    slot, float32 at least. What stands in for a slot without expert, or for columns that an expert lacks, is never
    read.
    """

    weights: Tensor | None  # slots; None: all 1
    scale: Tensor | None  # slots

    def __init__(self, p: Problem, saved: Saved = ()) -> None:
        """saved: what `keep` has kept of the forward."""

    def keep(self, z: Tensor, v: Tensor | None) -> Saved: ...
    def kept(self, saved: Saved) -> tuple[Tensor, Tensor | None]: ...

    def take(self, t: Tensor) -> Tensor:
        """t (N, d) -> rows."""

    def affine(self, rows: Tensor, *maps: Affine) -> list[Tensor]:
        """rows @ weight^T + bias, with the weights of each row's experts: hidden, for each map."""

    def weighted(self, h: Tensor) -> Tensor:
        """Hidden times weight and scale of its slot; 0 where there is nothing. A new tensor, unless all are 1."""

    def cleared(self, h: Tensor) -> Tensor:
        """0 where there is nothing, in place."""

    def add_up(self, h: Tensor) -> Tensor:
        """(N, M): the output, from hidden values that are weighted. Rows without expert are their base's bits."""

    def spread(self, pairs: list[tuple[Tensor, Tensor]]) -> Tensor:
        """(N, K): sum of h @ weight over pairs of hidden values and a weight (R, K)."""

    def outer(self, h: Tensor, rows: Tensor) -> Tensor:
        """(R, d): sum of h^T rows over the rows of each expert."""

    def back(self, rows: Tensor, h: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """`affine` with the transpose of `up`, and `outer` of h if there is one: both read the output's gradient."""

    def sums(self, h: Tensor) -> Tensor:
        """(R,): sum over the rows of each expert."""

    def shift_sums(self, rows: Tensor) -> Tensor:
        """(E, M): sum of rows times weight and scale, over the rows of each expert."""

    def dots(self, h: Tensor, rows: Tensor) -> Tensor:
        """Slots: sum over the hidden columns of h, plus the product of rows with `b_up` where there is one."""

    def by_row(self, dots: Tensor) -> Tensor:
        """Slots -> (N, k)."""

    def by_expert(self, dots: Tensor) -> Tensor:
        """Slots -> (E,), summed."""


def forward(p: Problem, keep: bool, layout: type[Layout]) -> tuple[Tensor, Saved]:
    p = p.cast()
    by = layout(p)
    maps: list[Affine] = [(p.down, p.b_down)] if p.gate is None else [(p.down, p.b_down), (p.gate, p.b_gate)]
    z, *gated = by.affine(by.take(p.dropped(p.x)), *maps)
    v = gated[0] if gated else None
    y = by.add_up(by.weighted(hidden(p.act, z, v)))
    return y, by.keep(z, v) if keep else ()


def backward(p: Problem, saved: Saved, grad: Tensor, needs: frozenset[str], layout: type[Layout]) -> dict[str, Tensor]:
    p = p.cast()
    by = layout(p, saved)
    z, v = by.kept(saved)
    rows = by.take(grad.to(p.x.dtype))
    h = hidden(p.act, z, v)
    u, up = by.back(rows, by.weighted(h) if "up" in needs else None)  # u: of the hidden values, before their weight
    out: dict[str, Tensor] = {} if up is None else {"up": up.t()}
    if "b_up" in needs:
        out["b_up"] = by.shift_sums(rows)
    if needs & {"weights", "scale"}:
        # What a slot would add with a weight and a scale of 1, times the gradient: each of the two lacks the other.
        dots = by.dots(wide(u) * h, rows)
        if "scale" in needs:
            out["scale"] = by.by_expert(dots if by.weights is None else dots * by.weights)
        if "weights" in needs:
            out["weights"] = by.by_row(dots if by.scale is None else dots * by.scale)
    if needs & {"x", "down", "b_down", "gate", "b_gate"}:
        out |= _of_the_input(p, by, hidden_backward(p.act, by.weighted(u), z, v), needs)
    return out


def _of_the_input(
    p: Problem, by: Layout, of_hidden: tuple[Tensor, Tensor | None], needs: frozenset[str]
) -> dict[str, Tensor]:
    """The gradients of x and of the projections that read it, from those of what they give."""
    out: dict[str, Tensor] = {}
    pairs: list[tuple[Tensor, Tensor]] = []
    x = by.take(p.dropped(p.x)) if needs & {"down", "gate"} else None
    for name, weight, d in zip(("down", "gate"), (p.down, p.gate), of_hidden, strict=True):
        if d is None or weight is None:
            continue
        d = by.cleared(d)  # no weight may see what a slot without expert has left, be it infinite
        pairs.append((d, weight))
        if x is not None and name in needs:
            out[name] = by.outer(d, x)
        if f"b_{name}" in needs:
            out[f"b_{name}"] = by.sums(d)
    if "x" in needs:
        out["x"] = p.dropped(by.spread(pairs))
    return out


def wide(t: Tensor) -> Tensor:
    """In float32 at least."""
    return t.to(wide_dtype(t))


def wide_dtype(t: Tensor) -> torch.dtype:
    return torch.promote_types(t.dtype, torch.float32)


def product(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    """a * b, where None stands for 1."""
    if a is None or b is None:
        return b if a is None else a
    return a * b
