"""A permutation of a router's arms that is searched by gradients, and then made hard."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class Permutation(nn.Module):
    """Sinkhorn(L / tau), a matrix whose rows and columns sum to 1, with learned L; once hard, a permutation.

    Source: Ibrahim et al. 2023 (COMET), section 4. `tau` falls and `iterations` grow while it is searched.

    Attributes:
        entropy_coef: weight of the entropy of its rows and columns, which drives it to a permutation.
    """

    order: Tensor

    def __init__(self, arms: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(arms, arms).uniform_(-0.05, 0.05))
        self.register_buffer("order", torch.full((arms,), -1))  # arm -> where it goes, once that is settled
        self.tau, self.iterations, self.entropy_coef = 1e-3, 20, 1e-4
        self.hard = False

    def forward(self, scores: Tensor) -> Tensor:
        """scores (N, A) of arms before the permutation -> after it."""
        return scores[:, self.order.argsort()] if self.hard else scores @ self.matrix().to(scores.dtype)

    def matrix(self) -> Tensor:
        """(A, A), what of each arm goes where."""
        logits = self.weight.float() / self.tau
        for _ in range(self.iterations):
            logits = logits - logits.logsumexp(1, keepdim=True)
            logits = logits - logits.logsumexp(0, keepdim=True)
        return logits.exp()

    def entropy(self) -> Tensor:
        """Of its rows and columns, in nats, summed: 0 for a permutation."""
        matrix = self.matrix()
        return -2 * (matrix * matrix.clamp_min(1e-9).log()).sum()

    @torch.no_grad()
    def harden(self) -> None:
        """Make it the permutation of the largest sum, and L constant. Raises ImportError without SciPy."""
        _, places = assignment()(self.matrix().cpu().numpy(), maximize=True)
        self.order.copy_(torch.as_tensor(places))
        self.weight.requires_grad_(False)
        self.hard = True

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: object) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        order = state_dict.get(f"{prefix}order")
        self.hard = order is not None and bool((order >= 0).all())


def assignment() -> Any:
    """SciPy's solver of assignments, which makes a permutation hard. Raises ImportError without SciPy."""
    try:
        from scipy.optimize import linear_sum_assignment
    except ImportError:
        raise ImportError("to make a permutation hard needs SciPy: pip install scipy") from None
    return linear_sum_assignment
