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

from mixadapters.kernels import dense, gathered
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
    if not torch.compiler.is_compiling() or _exporting() or not p.x.is_cpu or p.batch_invariant:
        return None
    with without_autocast(p.x):
        if p.indices is None:
            return dense.forward(p, keep=False)[0] if statically_known_true(p.x.shape[0] <= FEW_ROWS) else None
        return by_runs(p.cast()) if _pays(p) else None


@torch.compiler.assume_constant_result
def _exporting() -> bool:
    """Whether the graph is for `torch.export`: what the compiler of torch 2.11 itself says of every graph."""
    return torch.compiler.is_exporting()


def _pays(p: Problem) -> bool:
    if p.equal_rank is None or p.dropout:
        return False
    columns = p.slots * p.ranks[0]
    if statically_known_true(p.run == 1):
        return columns <= MOST_COLUMNS or statically_known_true(p.x.shape[0] <= FEW_ROWS)
    return statically_known_true(p.run * columns * p.x.shape[1] <= MOST_OF_A_RUN)


def by_runs(p: Problem) -> Tensor:
    """The output of experts of one rank that rows choose, or not.

    Raises:
        RuntimeError: an index names no expert.
    """
    assert p.indices is not None
    count = len(p.ranks)
    torch._assert_async(
        ((p.indices >= -1) & (p.indices < count)).all(),
        f"indices must run from -1 (no expert) to {count - 1}, one less than the {count} experts",
    )
    experts = p.indices[:: p.run].long()
    return gathered.by_runs(p, experts.clamp_min(0), none=experts < 0)
