"""The definition: every expert in turn on every row, weighted afterwards. Any dtype, any device, any derivative."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from mixadapters.kernels.activations import hidden
from mixadapters.kernels.problem import Problem, without_autocast


def refuses(p: Problem) -> str | None:
    return None


def forward(p: Problem) -> Tensor:
    """y (N, M) by plain differentiable operations: gradients, and theirs in turn, are autograd's own.

    Computed in float32 at least. A row meets the experts that it has chosen and no others, there and back: be they
    infinite, or the row. That is what `torch.where` is for, since 0 * inf is no number.
    """
    result = p.x.dtype if p.base is None else p.base.dtype
    base, base_weight = p.base, p.base_weight
    with without_autocast(p.x):
        p = p._replace(x=p.x.to(torch.promote_types(p.x.dtype, torch.float32))).cast()
        x = p.dropped(p.x)
        delta = x.new_zeros(x.shape[0], p.up.shape[0])
        for e, (first, rank) in enumerate(zip(p.starts, p.ranks, strict=True)):
            delta = delta + _expert(p, x, e, slice(first, first + rank))
        if base is None:
            return delta.to(result)
        start = base if base_weight is None else base * base_weight.to(base.dtype).unsqueeze(1)
        y = (start + delta).to(result)
        return y if p.indices is None else torch.where(alone(p), start, y)


def _expert(p: Problem, x: Tensor, e: int, part: slice) -> Tensor:
    """(N, M) what one expert adds."""
    hits = None if p.indices is None else p.indices == e
    chose = None if hits is None else hits.any(1, keepdim=True)

    def own(t: Tensor) -> Tensor:
        return t if chose is None else torch.where(chose, t, 0)

    x = own(x)
    z = own(F.linear(x, p.down[part], None if p.b_down is None else p.b_down[part]))
    v = None if p.gate is None else own(F.linear(x, p.gate[part], None if p.b_gate is None else p.b_gate[part]))
    y = own(F.linear(hidden(p.act, z, v), p.up[:, part], None if p.b_up is None else p.b_up[e]))
    if p.scale is not None:
        y = own(y * p.scale[e])
    if hits is None:
        return y if p.weights is None else y * p.weights[:, e : e + 1]
    weight = hits.to(x.dtype) if p.weights is None else torch.where(hits, p.weights, 0)
    return own(y * weight.sum(1, keepdim=True))


def alone(p: Problem) -> Tensor:
    """(N, 1) rows without any expert: they keep their base, bit for bit."""
    assert p.indices is not None
    return (p.indices < 0).all(1, keepdim=True)
