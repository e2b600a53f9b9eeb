"""The definition: every expert in turn on every row, weighted afterwards. Any dtype, any device, any derivative."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from mixadapters.kernels.activations import hidden
from mixadapters.kernels.problem import Problem


def refuses(p: Problem) -> str | None:
    return None


def forward(p: Problem) -> Tensor:
    """y (N, M) by plain differentiable operations: gradients, and theirs in turn, are autograd's own."""
    base, base_weight = p.base, p.base_weight
    p = p.cast()
    x = p.dropped(p.x)
    delta = x.new_zeros(x.shape[0], p.up.shape[0])
    for e, (start, rank) in enumerate(zip(p.starts, p.ranks, strict=True)):
        part = slice(start, start + rank)
        z = F.linear(x, p.down[part], None if p.b_down is None else p.b_down[part])
        v = None if p.gate is None else F.linear(x, p.gate[part], None if p.b_gate is None else p.b_gate[part])
        y = F.linear(hidden(p.act, z, v), p.up[:, part], None if p.b_up is None else p.b_up[e])
        if p.scale is not None:
            y = y * p.scale[e]
        if p.indices is None:
            delta = delta + (y if p.gates is None else y * p.gates[:, e : e + 1])
            continue
        hits = p.indices == e
        weight = (hits.to(x.dtype) if p.gates is None else p.gates * hits).sum(1, keepdim=True)
        # A row that has not chosen the expert stays free of it, even where its product is no number.
        delta = delta + torch.where(hits.any(1, keepdim=True), y * weight, 0)
    if base is None:
        return delta
    if base_weight is not None:
        base = base * base_weight.to(base.dtype).unsqueeze(1)
    return (
        torch.where(alone(p), base, base + delta.to(base.dtype))
        if p.indices is not None
        else base + delta.to(base.dtype)
    )


def alone(p: Problem) -> Tensor:
    """(N, 1) rows without any expert: they keep their base, bit for bit."""
    assert p.indices is not None
    return (p.indices < 0).all(1, keepdim=True)
