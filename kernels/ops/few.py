"""A few rows without gradient, as in decoding: the products of `dense` alone, for weights that many calls share.

A call of the operation costs more there than its products. What depends on the weights is looked at once, when they
are packed; what a call must still be asked is asked in the order of its price, and any doubt leaves it to the
operation.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from mixadapters.kernels import backends, registration
from mixadapters.kernels.activations import hidden
from mixadapters.kernels.chain import wide_dtype
from mixadapters.kernels.problem import bounds_of

ROWS = 64  # above, the products outweigh the call


class Few:
    """The experts of a bank for calls of a few rows. `arguments` are those of `lowrank` that say what experts are."""

    def __init__(self, act: str, arguments: dict[str, Any]) -> None:
        self.act = act
        self.down, self.up, self.ranks = arguments["w_down"], arguments["w_up"].t(), arguments["ranks"]
        self.b_down, self.b_up = arguments.get("b_down"), arguments.get("b_up")
        self.gate, self.b_gate = arguments.get("w_gate"), arguments.get("b_gate")
        self.scale = arguments.get("scale")
        tensors = [t for t in arguments.values() if isinstance(t, Tensor)]
        self.dtype, self.wide = self.down.dtype, wide_dtype(self.down)
        self.fits = (
            self.ranks.count(self.ranks[0]) == len(self.ranks) > 1
            and all(type(t.detach()) is Tensor and t.is_cpu and t.dtype == self.dtype for t in tensors)
        )  # fmt: skip
        self._dense: dict[tuple[int, int], bool] = {}  # (slots, run) -> what the rule says

    def __call__(
        self, x: Tensor, indices: Tensor | None, weights: Tensor | None, base: Tensor | None,
        base_weight: Tensor | None, run: int,
    ) -> Tensor | None:  # fmt: skip
        """As `lowrank` of x (N, K) without dropout; None where it takes the operation."""
        rows, experts = x.shape[0], len(self.ranks)
        if not self.fits or torch.is_grad_enabled() or not 0 < rows <= ROWS or not registration.nobody_looks_on(x):
            return None
        if base is None or not x.dtype == base.dtype == self.dtype or backends.overridden():
            return None
        factors = self._factors(rows, indices, weights, run)
        if factors is None:
            return None
        h = F.linear(x, self.down, self.b_down)
        if self.gate is not None or self.act != "identity":
            h = hidden(self.act, h, None if self.gate is None else F.linear(x, self.gate, self.b_gate))
        h.view(rows, experts, -1).mul_(factors.unsqueeze(2))
        y = base if base_weight is None else base * base_weight.to(base.dtype).unsqueeze(1)
        y = torch.addmm(y, h, self.up)
        if self.b_up is not None:  # in the order of `dense`, whose bits these are
            y += factors @ self.b_up
        # What is broken stays with those who chose it: the operation sees to that.
        return y if indices is None or math.isfinite(y.sum(dtype=self.wide).item()) else None

    def _factors(self, rows: int, indices: Tensor | None, weights: Tensor | None, run: int) -> Tensor | None:
        """(N, E) what each expert is multiplied by in each row; None where the rule chooses another way."""
        experts, given = len(self.ranks), weights if indices is None else indices
        if given is None or given.dim() != 2 or not given.shape[1] or not self._by_one_product(given.shape[1], run):
            return None
        if indices is None:
            if given.shape != (rows, experts) or given.dtype != self.dtype:
                return None
            return given if self.scale is None else given * self.scale
        least, most = bounds_of(indices)
        if least < 0 or most >= experts:  # a row without expert keeps the bits of its base
            return None
        if weights is None:
            weights = self.down.new_ones(indices.shape)
        if indices.shape[0] != rows or weights.shape != indices.shape:
            return None  # the operation says what is wrong
        # An expert that a row names in several slots has the sum of their weights.
        if self.wide is self.dtype:
            factors = weights.new_zeros(rows, experts).scatter_add_(1, indices.long(), weights)
        else:
            table = weights.new_zeros(rows, experts, dtype=self.wide)
            factors = table.scatter_add_(1, indices.long(), weights.to(self.wide)).to(self.dtype)
        return factors if self.scale is None else factors * self.scale

    def _by_one_product(self, slots: int, run: int) -> bool:
        key = (slots, run)
        if key not in self._dense:
            width = (self.down.shape[1] + self.up.shape[1]) // 2
            chosen = backends.choose_backend(
                ROWS, slots, len(self.ranks), self.down.shape[0], self.dtype, run=run, width=width
            )
            self._dense[key] = chosen == "dense"
        return self._dense[key]
