"""All experts as one product of rank R; the weights of the mixture scale the columns in between."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mixadapters.kernels import products
from mixadapters.kernels.activations import hidden, hidden_backward
from mixadapters.kernels.problem import Problem


def refuses(p: Problem) -> str | None:
    return None


def keeps(p: Problem) -> tuple[Tensor, ...]:
    z = p.x.new_empty(p.x.shape[0], p.down.shape[0])
    return (z,) if p.gate is None else (z, torch.empty_like(z))


def forward(p: Problem, keep: bool) -> tuple[Tensor, tuple[Tensor, ...]]:
    p = p.cast()
    x = p.dropped(p.x)
    z = products.mm(x, p.down.t(), p.b_down)
    v = None if p.gate is None else products.mm(x, p.gate.t(), p.b_gate)
    weights, _, chosen = _weights(p)
    h = _weighted(hidden(p.act, z, v), weights, chosen, p.ranks)
    if p.base is None or (p.base_weight is None and p.base.dtype == x.dtype):
        y = products.mm(h, p.up.t(), p.base)
    else:
        y = p.start()
        if y.dtype == x.dtype:
            products.mm(h, p.up.t(), y, out=y)
        else:
            y += products.mm(h, p.up.t())
    if p.b_up is not None:
        y += p.b_up.sum(0) if weights is None else weights @ p.b_up
    if p.indices is not None and p.base is not None:
        none = (p.indices < 0).all(1, keepdim=True)
        # Adding a zero turns -0.0 into 0.0.
        if not none.is_cpu or none.any():
            y = torch.where(none, p.start(), y)
    return y, (() if not keep else (z,) if v is None else (z, v))


def backward(p: Problem, saved: tuple[Tensor, ...], grad: Tensor, needs: frozenset[str]) -> dict[str, Tensor]:
    p = p.cast()
    z, v = saved[0], saved[1] if len(saved) > 1 else None
    grad = grad.to(p.x.dtype)
    out: dict[str, Tensor] = {}
    weights, gates, chosen = _weights(p)
    h = hidden(p.act, z, v)
    if "up" in needs:
        used = _weighted(h, weights, chosen, p.ranks)
        out["up"] = products.outer(used, grad).t() if p.up.stride(0) == 1 else products.outer(grad, used)
    if "b_up" in needs:
        if weights is not None and weights.dim() == 2:
            out["b_up"] = weights.t() @ grad
        else:
            total = grad.sum(0).expand(len(p.ranks), -1)
            out["b_up"] = total if weights is None else total * weights.unsqueeze(1)
    u = products.mm(grad, p.up)
    if "gates" in needs or "scale" in needs:
        out |= _weight_gradients(p, u, h, grad, gates, chosen, needs)
    if not needs & {"x", "down", "b_down", "gate", "b_gate"}:
        return out
    dz, dv = hidden_backward(p.act, _weighted(u, weights, chosen, p.ranks), z, v)
    if chosen is not None:
        for part in (dz, dv):
            if part is not None:
                _mask(part, chosen, p.ranks)
    x = p.dropped(p.x) if needs & {"down", "gate"} else p.x
    if "down" in needs:
        out["down"] = products.outer(dz, x)
    if "b_down" in needs:
        out["b_down"] = dz.sum(0)
    if dv is not None and "gate" in needs:
        out["gate"] = products.outer(dv, x)
    if dv is not None and "b_gate" in needs:
        out["b_gate"] = dv.sum(0)
    if "x" in needs:
        dx = products.mm(dz, p.down)
        if dv is not None:
            assert p.gate is not None
            products.mm(dv, p.gate, dx, out=dx)
        out["x"] = p.dropped(dx)
    return out


def _weights(p: Problem) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Weight of each expert, (N, E), (E,) or None; the gates in it (N, E); and which experts a row chose (N, E)."""
    gates, chosen = p.gates, None
    if p.indices is not None:
        experts = len(p.ranks)
        if p.slots == 1:
            chosen = p.indices == torch.arange(experts, device=p.x.device)
            gates = chosen.to(p.x.dtype) if gates is None else gates * chosen
        else:
            columns = p.indices.where(p.indices >= 0, experts).long()  # "none" has a column of its own, cut off later
            ones = torch.ones_like(columns, dtype=p.x.dtype) if gates is None else gates
            table = ones.new_zeros(columns.shape[0], experts + 1)
            gates = table.scatter_add_(1, columns, ones)[:, :experts]
            chosen = table.new_zeros(table.shape, dtype=torch.bool).scatter_(1, columns, True)[:, :experts]
    if p.scale is None:
        return gates, gates, chosen
    return (p.scale if gates is None else gates * p.scale), gates, chosen


def _weighted(h: Tensor, weights: Tensor | None, chosen: Tensor | None, ranks: Sequence[int]) -> Tensor:
    """h (N, R) times the weight of the expert that each column belongs to; exact zeros where it was not chosen."""
    if weights is None:
        return h
    h = h * weights if len(ranks) == 1 else _by_expert(h, ranks, weights)
    return h if chosen is None else _mask(h, chosen, ranks)


def _by_expert(h: Tensor, ranks: Sequence[int], weights: Tensor) -> Tensor:
    if _same(ranks):
        return (h.view(-1, len(ranks), ranks[0]) * weights.unsqueeze(-1)).view_as(h)
    return h * weights.index_select(-1, _owners(ranks, h.device))


def _mask(h: Tensor, chosen: Tensor, ranks: Sequence[int]) -> Tensor:
    """In place: what a row has not chosen is 0, also where it was no number."""
    if _same(ranks):
        h.view(-1, len(ranks), ranks[0]).masked_fill_(~chosen.unsqueeze(2), 0)
        return h
    return h.masked_fill_(~chosen.index_select(1, _owners(ranks, h.device)), 0)


def _same(ranks: Sequence[int]) -> bool:
    return ranks.count(ranks[0]) == len(ranks)


def _owners(ranks: Sequence[int], device: torch.device) -> Tensor:
    """(R,) expert of each column."""
    counts = torch.tensor(ranks, device=device)
    return torch.arange(len(ranks), device=device).repeat_interleave(counts, output_size=sum(ranks))


def _weight_gradients(
    p: Problem, u: Tensor, h: Tensor, grad: Tensor, gates: Tensor | None, chosen: Tensor | None, needs: frozenset[str]
) -> dict[str, Tensor]:
    products = u * h
    if _same(p.ranks):
        per_expert = products.view(-1, len(p.ranks), p.ranks[0]).sum(2)
    else:
        per_expert = torch.stack([part.sum(1) for part in products.split(p.ranks, dim=1)], dim=1)
    if p.b_up is not None:
        per_expert = per_expert.addmm_(grad, p.b_up.t())
    if chosen is not None:
        per_expert = per_expert.masked_fill_(~chosen, 0)
    out = {}
    if "scale" in needs:
        out["scale"] = (per_expert if gates is None else per_expert * gates).sum(0)
    if "gates" in needs:
        if p.scale is not None:
            per_expert = per_expert * p.scale
        if p.indices is not None:
            slots = p.indices.clamp_min(0).long()
            per_expert = per_expert.gather(1, slots).masked_fill_(p.indices < 0, 0)
        out["gates"] = per_expert
    return out
