"""The one operation: low-rank, bottleneck and gated experts, mixed or routed, added to a frozen layer's output.

Axes: N rows, k experts chosen per row, E experts, R = sum of their ranks, K width in, M width out.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mixadapters.kernels import backends, reference, registration
from mixadapters.kernels.activations import ACTIVATIONS
from mixadapters.kernels.problem import Problem, autocasts


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
    weights: Tensor | None = None,
    scale: Tensor | None = None,
    base: Tensor | None = None,
    base_weight: Tensor | None = None,
    act: str = "gelu",
    dropout: float = 0.0,
    seed: Tensor | None = None,
    run: int = 1,
) -> Tensor:
    """y = base_weight * base + sum_s weight_s * scale_e * (up_e(act(down_e x)) + b_up_e), with e = indices_s.

    With `w_gate` the experts are gated: `act(gate_e x) * down_e x` takes the place of `act(down_e x)`.
    Every float tensor may require a gradient. Computed in the dtype of `x`, under autocast in that of autocast,
    whatever the dtypes of the weights; gradients have the dtypes of what they belong to. Where they are to be
    differentiated in turn (`create_graph`) or are many at a time (`is_grads_batched`), and under transforms of
    `torch.func` (`vmap`, `jvp`, `grad` ...), the definition runs, `reference`: slower, and with any derivative.

    Args:
        x: (N, K) input rows.
        w_down: (R, K) the experts' down projections, one below the other.
        w_up: (M, R) their up projections, side by side. Best as the transpose of contiguous rows (R, M).
        ranks: E ranks, in the order of the rows of `w_down`; they sum to R.
        b_down, b_gate: (R,). b_up: (E, M). w_gate: (R, K).
        indices: (N, k) int, -1 for "no expert": such a slot adds nothing. None: every expert for every row.
        weights: (N, k), or (N, E) where indices is None; differentiable. None means 1.
        scale: (E,) factor per expert. None means 1.
        base: (N, M) the frozen layer's output. None means 0.
        base_weight: (N,) its weight. None means 1. A row without expert then equals its base, bit for bit.
        act: one of ACTIVATIONS.
        dropout: probability that an element of x is read as 0, by a hash of seed, row and column.
        seed: int64 scalar, on the device of x; needed with dropout.
        run: `indices` are constant over every `run` consecutive rows, as where each sequence names its adapter. A
            promise, not checked.

    Returns:
        (N, M), in the dtype of `base` (of the computation without a base).

    Raises:
        ValueError: shapes do not fit together, an index names no expert, the activation is unknown, dropout has no
            seed, or a forced backend cannot run the problem.
    """
    if act not in ACTIVATIONS:
        raise ValueError(f"act={act!r} is unknown; choose one of {sorted(ACTIVATIONS)}")
    ranks = tuple(ranks)
    if autocasts(x) and x.dtype != torch.float64:
        x = x.to(torch.get_autocast_dtype(x.device.type))
    if x.dim() == 2 and x.stride(1) != 1:
        x = x.contiguous()
    backend, batch_invariant = backends.settings()
    p = Problem(
        x, w_down, w_up, ranks, b_down, b_up, w_gate, b_gate, indices, weights, scale, base, base_weight, act, dropout,
        seed, run, batch_invariant,
    )  # fmt: skip
    p.check()
    if backend == "reference" or not ranks or p.slots == 0:
        if not torch.compiler.is_compiling():  # which cannot read values
            p.check_indices()
        return reference.forward(p)
    return registration.call(p, backend)
