"""torch.nn.functional.grouped_mm over rows sorted by expert: few calls, whatever the number of experts."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import grouped_mm

from mixadapters.kernels.activations import hidden, hidden_backward
from mixadapters.kernels.problem import Problem
from mixadapters.kernels.sorting import Sorted, keeps, sort_slots, sorted_weights

__all__ = ["backward", "forward", "keeps", "refuses"]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def refuses(p: Problem) -> str | None:
    x = p.x
    if x.dtype not in _DTYPES:
        return f"grouped_mm knows no {x.dtype}"
    if x.is_cuda and (x.dtype != torch.bfloat16 or torch.cuda.get_device_capability(x.device) < (8, 0)):
        return "on a GPU grouped_mm needs bfloat16 and compute capability 8.0 or more"
    if p.equal_rank is None:
        return f"it needs experts of one rank, and the ranks are {sorted(set(p.ranks))}"
    widths = {"K": x.shape[1], "rank": p.equal_rank, "M": p.up.shape[0]}
    odd = [f"{name}={width}" for name, width in widths.items() if width * x.dtype.itemsize % 16]
    return f"rows must be multiples of 16 bytes, and {', '.join(odd)} in {x.dtype} is not" if odd else None


def forward(p: Problem, keep: bool) -> tuple[Tensor, tuple[Tensor, ...]]:
    p = p.cast()
    g = _Groups(p, sort_slots(p))
    x = p.dropped(p.x).index_select(0, g.rows)
    z = g.affine(x, p.down, p.b_down)
    v = None if p.gate is None else g.affine(x, p.gate, p.b_gate)
    h = hidden(p.act, z[: g.count], None if v is None else v[: g.count])
    delta = grouped_mm(h if g.weights is None else h * g.weights.unsqueeze(1), g.stacked(p.up.t()), offs=g.ends)
    if p.b_up is not None:
        shift = p.b_up.index_select(0, g.experts)
        delta += shift if g.weights is None else shift * g.weights.unsqueeze(1)
    y = p.start()
    y.index_add_(0, g.rows, delta.to(y.dtype))
    return y, (() if not keep else (z, g.by.order) if v is None else (z, g.by.order, v))


def backward(p: Problem, saved: tuple[Tensor, ...], grad: Tensor, needs: frozenset[str]) -> dict[str, Tensor]:
    p = p.cast()
    z, order, v = saved[0], saved[1], saved[2] if len(saved) > 2 else None
    g = _Groups(p, sort_slots(p, order))
    z = z[: g.count]
    v = None if v is None else v[: g.count]
    grad = grad.to(p.x.dtype).index_select(0, g.rows)
    h = hidden(p.act, z, v)
    u = grouped_mm(grad, g.stacked(p.up.t()).transpose(1, 2), offs=g.ends)
    out = {}
    if "up" in needs:
        out["up"] = g.outer(h if g.weights is None else h * g.weights.unsqueeze(1), grad).t()
    if "b_up" in needs:
        out["b_up"] = g.sums(grad if g.weights is None else grad * g.weights.unsqueeze(1))
    if "gates" in needs or "scale" in needs:
        per_slot = (u * h).sum(1)
        if p.b_up is not None:
            per_slot += (grad * p.b_up.index_select(0, g.experts)).sum(1)
        if "scale" in needs:
            out["scale"] = g.sums((per_slot if g.gates is None else per_slot * g.gates).unsqueeze(1)).squeeze(1)
        if "gates" in needs:
            by_scale = per_slot if g.scale is None else per_slot * g.scale
            gates = by_scale.new_zeros(order.shape[0]).index_copy_(0, order[: g.count], by_scale)
            out["gates"] = gates.view(-1, p.slots)
    if needs & {"x", "down", "b_down", "gate", "b_gate"}:
        dz, dv = hidden_backward(p.act, u if g.weights is None else u * g.weights.unsqueeze(1), z, v)
        out |= _input_gradients(p, g, dz, dv, needs)
    return out


def _input_gradients(
    p: Problem, g: _Groups, dz: Tensor, dv: Tensor | None, needs: frozenset[str]
) -> dict[str, Tensor]:
    out = {}
    x = p.dropped(p.x).index_select(0, g.rows) if needs & {"down", "gate"} else p.x
    dx = None
    for d, weight, weight_name, bias_name in ((dz, p.down, "down", "b_down"), (dv, p.gate, "gate", "b_gate")):
        if d is None or weight is None:
            continue
        if weight_name in needs:
            out[weight_name] = g.outer(d, x)
        if bias_name in needs:
            out[bias_name] = g.sums(d).reshape(-1)
        if "x" in needs:
            part = grouped_mm(d, g.stacked(weight), offs=g.ends)
            dx = part if dx is None else dx + part
    if dx is not None:
        out["x"] = p.dropped(p.x.new_zeros(p.x.shape).index_add_(0, g.rows, dx))
    return out


class _Groups:
    """The slots that have an expert, by expert, and products over them."""

    def __init__(self, p: Problem, by: Sorted) -> None:
        self.by, self.rank = by, p.ranks[0]
        self.sizes = by.counts.tolist()
        self.count = count = sum(self.sizes)
        self.rows, self.experts = by.rows[:count], by.experts[:count]
        self.ends = by.counts.cumsum(0).to(torch.int32)
        gates, scale = sorted_weights(p, by)
        self.gates = None if gates is None else gates[:count]
        self.scale = None if scale is None else scale[:count]
        if self.gates is None or self.scale is None:
            self.weights = self.scale if self.gates is None else self.gates
        else:
            self.weights = self.gates * self.scale

    def stacked(self, weight: Tensor) -> Tensor:
        """(R, d) -> (E, r, d)."""
        return weight.reshape(len(self.sizes), self.rank, -1)

    def affine(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """(S, r); the slots without expert, past the end, are 0."""
        out = x.new_zeros(self.by.order.shape[0], self.rank)
        z = out[: self.count].copy_(grouped_mm(x, self.stacked(weight).transpose(1, 2), offs=self.ends))
        if bias is not None:
            z += bias.view(-1, self.rank).index_select(0, self.experts)
        return out

    def outer(self, a: Tensor, b: Tensor) -> Tensor:
        """a^T b of each group, (R, d)."""
        out = grouped_mm(a.t(), b, offs=self.ends)
        if 0 in self.sizes:  # a group without rows may not have been written
            out.masked_fill_((self.by.counts == 0).view(-1, 1, 1), 0)
        return out.flatten(0, 1)

    def sums(self, t: Tensor) -> Tensor:
        """Sum over each group, (E, d)."""
        return torch.stack([part.sum(0) for part in t.split(self.sizes)])
