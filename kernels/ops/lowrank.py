"""The one operation: low-rank, bottleneck and gated experts, mixed or routed, added to a frozen layer's output.

Axes: N rows, k experts chosen per row, E experts, R = sum of their ranks, K width in, M width out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from mixadapters.kernels.backends import choose_backend


def _gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda x: x,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": _gelu_tanh,
    "silu": F.silu,
    "tanh": torch.tanh,
}


def lowrank(
    x: Tensor,
    w_down: Tensor,
    w_up: Tensor,
    ranks: Sequence[int],
    *,
    b_down: Tensor | None = None,
    b_up: Tensor | None = None,
    w_gate: Tensor | None = None,
    b_gate: Tensor | None = None,
    indices: Tensor | None = None,
    gates: Tensor | None = None,
    scale: Tensor | None = None,
    base: Tensor | None = None,
    base_weight: Tensor | None = None,
    act: str = "gelu",
) -> Tensor:
    """y = base_weight * base + sum_s gate_s * scale_e * (up_e(act(down_e x)) + b_up_e), with e = indices_s.

    With `w_gate` the experts are gated: `act(gate_e x) * down_e x` takes the place of `act(down_e x)`.
    Every tensor may require a gradient. Weights are used in the dtype of `x`.

    Args:
        x: (N, K) input rows.
        w_down: (R, K) the experts' down projections, one below the other.
        w_up: (M, R) their up projections, side by side.
        ranks: E ranks, in the order of the rows of `w_down`; they sum to R.
        b_down, b_gate: (R,). b_up: (E, M). w_gate: (R, K).
        indices: (N, k) int, -1 for "no expert": such a slot adds nothing. None: every expert for every row.
        gates: (N, k), or (N, E) where indices is None; differentiable. None means 1.
        scale: (E,) factor per expert. None means 1.
        base: (N, M) the frozen layer's output. None means 0.
        base_weight: (N,) its weight. None means 1. A row without expert then equals its base, bit for bit.
        act: one of ACTIVATIONS.

    Returns:
        (N, M), in the dtype of `base` (of `x` without a base).

    Raises:
        ValueError: shapes do not fit together, or the activation is unknown.
    """
    if act not in ACTIVATIONS:
        raise ValueError(f"act={act!r} is unknown; choose one of {sorted(ACTIVATIONS)}")
    if sum(ranks) != w_down.shape[0] or w_up.shape[1] != w_down.shape[0] or x.shape[-1] != w_down.shape[1]:
        raise ValueError(
            f"x {tuple(x.shape)}, w_down {tuple(w_down.shape)}, w_up {tuple(w_up.shape)} and ranks={list(ranks)} "
            "do not fit: expected x (N, K), w_down (R, K), w_up (M, R) with R = sum(ranks)"
        )
    if x.dim() != 2 or (indices is not None and indices.shape[0] != x.shape[0]):
        shape = None if indices is None else tuple(indices.shape)
        raise ValueError(f"x must be (N, K) and indices (N, k), got {tuple(x.shape)} and {shape}")
    slots = len(ranks) if indices is None else indices.shape[1]
    if gates is not None and gates.shape != (x.shape[0], slots):
        raise ValueError(f"gates must be {(x.shape[0], slots)}, one for each row and slot, got {tuple(gates.shape)}")
    down, up, b_down, b_up, w_gate, b_gate, scale, gates = (
        None if t is None else t.to(x.dtype) for t in (w_down, w_up, b_down, b_up, w_gate, b_gate, scale, gates)
    )
    backend = choose_backend(x.shape[0], slots, len(ranks), w_down.shape[0], x.dtype)
    run = {"dense": _dense, "segments": _segments, "reference": _reference}[backend]
    delta = run(x, down, up, ranks, b_down, b_up, w_gate, b_gate, indices, gates, scale, ACTIVATIONS[act])
    if base is None:
        return delta
    if base_weight is not None:
        base = base * base_weight.to(base.dtype).unsqueeze(-1)
    return base + delta.to(base.dtype)


def _hidden(x, down, b_down, w_gate, b_gate, act):  # (N, R)
    h = F.linear(x, down, b_down)
    return act(h) if w_gate is None else act(F.linear(x, w_gate, b_gate)) * h


def _dense(x, down, up, ranks, b_down, b_up, w_gate, b_gate, indices, gates, scale, act) -> Tensor:
    """Every expert for every row as one product; the weights of the mixture scale the columns in between."""
    h = _hidden(x, down, b_down, w_gate, b_gate, act)
    weights = gates  # (N, E) or (E,) or None
    if indices is not None:
        chosen = indices >= 0
        gates = chosen.to(x.dtype) if gates is None else gates * chosen
        weights = x.new_zeros(x.shape[0], len(ranks)).scatter_add(1, indices.clamp_min(0).long(), gates)
    if scale is not None:
        weights = scale if weights is None else weights * scale
    if weights is None:
        return F.linear(h, up, None if b_up is None else b_up.sum(0))
    h = _scale_columns(h, weights, ranks)
    if b_up is None:
        return F.linear(h, up)
    # `addmm` would do for (N, E) weights, but (E,) weights broadcast.
    shift: Tensor = weights @ b_up
    return F.linear(h, up) + shift


def _scale_columns(h: Tensor, weights: Tensor, ranks: Sequence[int]) -> Tensor:
    """h (N, R) times the weight (N, E) or (E,) of the expert that each column belongs to."""
    if len(ranks) == 1:
        return h * weights
    if len(set(ranks)) == 1:
        return (h.unflatten(1, (len(ranks), ranks[0])) * weights.unsqueeze(-1)).flatten(1)
    parts = weights.unsqueeze(-1).unbind(-2)
    return torch.cat([part * w for part, w in zip(h.split(list(ranks), dim=1), parts, strict=True)], dim=1)


def _segments(x, down, up, ranks, b_down, b_up, w_gate, b_gate, indices, gates, scale, act) -> Tensor:
    """One product per expert over the rows that chose it; rows are sorted by expert once."""
    out = x.new_zeros(x.shape[0], up.shape[0])
    if indices is None:
        indices = torch.arange(len(ranks), device=x.device).expand(x.shape[0], -1)
    k = indices.shape[1]
    experts, order = indices.reshape(-1).sort(stable=True)
    counts = torch.bincount(experts + 1, minlength=len(ranks) + 1).tolist()
    rows = order // k
    weights = None if gates is None else gates.reshape(-1)
    # `split`, not indexing: under autograd an indexed slice would allocate a full-size gradient per expert.
    downs, ups = down.split(list(ranks)), up.split(list(ranks), dim=1)
    gate_w = (None,) * len(ranks) if w_gate is None else w_gate.split(list(ranks))
    down_b = (None,) * len(ranks) if b_down is None else b_down.split(list(ranks))
    gate_b = (None,) * len(ranks) if b_gate is None else b_gate.split(list(ranks))
    up_b = (None,) * len(ranks) if b_up is None else b_up.unbind()
    scales = (None,) * len(ranks) if scale is None else scale.unbind()
    pieces, start = [], counts[0]
    for e, count in enumerate(counts[1:]):
        if count:
            here = slice(start, start + count)
            y = _hidden(x[rows[here]], downs[e], down_b[e], gate_w[e], gate_b[e], act)
            y = F.linear(y, ups[e], up_b[e])
            factor = scales[e]
            if factor is not None:
                y = y * factor
            pieces.append(y if weights is None else y * weights[order[here]].unsqueeze(-1))
        start += count
    if not pieces:
        return out
    # Under autocast the products come in its dtype, not in that of `x`.
    return out.index_add(0, rows[counts[0] :], torch.cat(pieces).to(out.dtype))


def _reference(x, down, up, ranks, b_down, b_up, w_gate, b_gate, indices, gates, scale, act) -> Tensor:
    """The definition: a loop over experts, every row through each, weighted afterwards."""
    out = x.new_zeros(x.shape[0], up.shape[0])
    start = 0
    for e, rank in enumerate(ranks):
        part = slice(start, start + rank)
        start += rank
        y = _hidden(
            x, down[part], None if b_down is None else b_down[part], None if w_gate is None else w_gate[part],
            None if b_gate is None else b_gate[part], act,
        )  # fmt: skip
        y = F.linear(y, up[:, part], None if b_up is None else b_up[e])
        if scale is not None:
            y = y * scale[e]
        if indices is None:
            weight = torch.ones_like(x[:, 0]) if gates is None else gates[:, e]
        else:
            hits = indices == e
            weight = (hits.to(x.dtype) if gates is None else gates * hits).sum(1)
        out = out + y * weight.unsqueeze(-1)
    return out
