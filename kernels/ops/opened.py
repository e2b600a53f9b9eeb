"""What a compiled graph does in place of the operator, which it cannot see into: plain products.

For one expert, and for a mixture of all, those of `dense`. Where rows choose, each run of rows meets the weights of
its own experts, as in `gathered`; the compiler makes loops of it that read the weights where they are. All that the
operator promises holds: numbers of no expert are refused, a slot without expert adds an exact 0 whatever stands in
for it, and a row of such slots alone is its base.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

from mixadapters.kernels import dense
from mixadapters.kernels.activations import hidden
from mixadapters.kernels.problem import Problem, without_autocast

FEW_ROWS = 64  # above, the products outweigh the call
# The compiler's loops over single rows are faster than products by expert up to so many hidden columns of a row, or
# where rows are few; and one batched product over runs of rows up to so many multiplications for each. Measured at
# width 768: 16 columns at 64 to 8192 rows, 64 at 64 but not at 512; 3.1 million, but not 12.6.
MOST_COLUMNS, MOST_OF_A_RUN = 16, 4e6


def forward(p: Problem) -> Tensor | None:
    """Without gradient, under the compiler; None where the graph is better off with the operator.

    The rows must be known to be few, so that no graph is compiled for few rows beside that for many.
    """
    if not torch.compiler.is_compiling() or torch.compiler.is_exporting() or not p.x.is_cpu or p.batch_invariant:
        return None
    with without_autocast(p.x):
        if p.indices is None:
            return dense.forward(p, keep=False)[0] if statically_known_true(p.x.shape[0] <= FEW_ROWS) else None
        return by_runs(p.cast()) if _pays(p) else None


def _pays(p: Problem) -> bool:
    if p.equal_rank is None or p.dropout:
        return False
    columns = p.slots * p.ranks[0]
    if statically_known_true(p.run == 1):
        return columns <= MOST_COLUMNS or statically_known_true(p.x.shape[0] <= FEW_ROWS)
    return statically_known_true(p.run * columns * p.x.shape[1] <= MOST_OF_A_RUN)


def by_runs(p: Problem) -> Tensor:
    """The output of experts of one rank that rows choose: B = N / run sequences, each with the weights of its k slots.

    Raises:
        RuntimeError: an index names no expert.
    """
    assert p.indices is not None
    count, rank, run = len(p.ranks), p.ranks[0], p.run
    torch._assert_async(
        ((p.indices >= -1) & (p.indices < count)).all(),
        f"indices must run from -1 (no expert) to {count - 1}, one less than the {count} experts",
    )
    experts = p.indices[::run].long()  # (B, k)
    none, chosen = experts < 0, experts.clamp_min(0)
    rows = p.x.unflatten(0, (-1, run))
    z = _affine(p, rows, chosen, p.down, p.b_down)
    v = None if p.gate is None else _affine(p, rows, chosen, p.gate, p.b_gate)
    factors = rows.new_ones(1, 1, 1) if p.weights is None else p.weights.unflatten(0, (-1, run))
    if p.scale is not None:
        factors = factors * p.scale[chosen].unsqueeze(1)  # (B, run or 1, k)
    h = hidden(p.act, z, v).unflatten(2, (-1, rank)) * factors.unsqueeze(3)
    h = h.masked_fill(none[:, None, :, None], 0).flatten(2)
    # What stands in for a slot without expert may be infinite, and 0 * inf is no number.
    ups = p.up.t().unflatten(0, (count, rank))[chosen].masked_fill(none[:, :, None, None], 0)
    delta = torch.bmm(h, ups.flatten(1, 2))
    if p.b_up is not None:
        biases = p.b_up[chosen].masked_fill(none.unsqueeze(2), 0)
        factors = factors.expand(chosen.shape[0], run, -1).masked_fill(none.unsqueeze(1), 0)
        delta = delta + torch.bmm(factors, biases)
    start = p.start().unflatten(0, (-1, run))
    # Adding a zero turns -0.0 into 0.0.
    y = torch.where(none.all(1)[:, None, None], start, (start + delta).to(start.dtype))
    return y.flatten(0, 1)


def _affine(p: Problem, rows: Tensor, chosen: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """rows (B, run, K) by the maps of each sequence's experts (B, k): (B, run, k * r)."""
    by_expert = (len(p.ranks), p.ranks[0])
    z = torch.bmm(rows, weight.unflatten(0, by_expert)[chosen].flatten(1, 2).transpose(1, 2))
    return z if bias is None else z + bias.unflatten(0, by_expert)[chosen].flatten(1).unsqueeze(1)
