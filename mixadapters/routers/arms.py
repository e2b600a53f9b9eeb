"""Experts that come and go: a learned router gains, loses and reorders arms, and the other weights stay."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mixadapters.core.names import check_free
from mixadapters.routers.base import Router


class ArmSurgery(Router):
    """Part of a learned router, whose output layer has one row for each arm.

    Rows are those of the experts in order, then of the null arms, then of the frozen layer where it has an arm.
    """

    competes = True  # what one arm gets the others lack: where an expert goes, a null arm must hold its place
    null_arms: int
    output: nn.Linear

    @torch.no_grad()
    def add_expert(self, name: str, share: float) -> None:
        """A new arm before the null arms, without changing the logits of the other experts.

        share: about how much of the weight it is to get.

        Raises:
            ValueError: the name is taken, or the router's experts cannot change.
        """
        self._may_change()
        check_free("expert", name, self.arms)
        place = len(self.experts)
        self._insert_row(place, share)
        self.experts.insert(place, name)

    def start_at(self, share: float) -> None:
        """Make `share` the weight of the one expert of a new router."""
        raise NotImplementedError

    @torch.no_grad()
    def remove_expert(self, name: str, renormalize: bool) -> None:
        """Drop an arm: its mass goes to a null arm, or to the others where `renormalize`."""
        self._may_change()
        place = self.experts.index(name)
        order = [i for i in range(self.output.weight.shape[0]) if i != place]
        if not renormalize and self.competes:
            order.insert(len(self.experts) - 1 + self.null_arms, place)
            self.null_arms += 1
        self._take_rows(order)
        self.experts.remove(name)
        if self.balance_groups is not None:
            groups = [[other for other in group if other != name] for group in self.balance_groups]
            self.balance_groups = [group for group in groups if group]

    @torch.no_grad()
    def reorder(self, names: list[str]) -> None:
        """Put the experts' arms into the order of `names`; each keeps its weight.

        Raises:
            ValueError: other names than those of the experts.
        """
        self._may_change()
        if sorted(names) != sorted(self.experts):
            raise ValueError(f"names={list(names)} must be the experts {self.experts}, in any order")
        order = [self.experts.index(name) for name in names]
        self._take_rows([*order, *range(len(names), self.output.weight.shape[0])])
        self.experts = list(names)

    def _may_change(self) -> None:
        if self.fixed_experts is not None:
            raise ValueError(f"{type(self).__name__}: {self.fixed_experts}")

    def _insert_row(self, place: int, share: float) -> None:
        raise NotImplementedError

    def _insert(self, place: int, row: Tensor, bias: Tensor | None) -> None:
        """A new arm at `place`, of these weights (1, h) and this bias (1,)."""
        old: Tensor | None = self.output.bias
        biases = None if old is None or bias is None else torch.cat([old[:place], bias, old[place:]])
        weight = self.output.weight
        order = [*range(place), -1, *range(place, len(weight))]
        self._set_rows(torch.cat([weight[:place], row.to(weight), weight[place:]]), biases, order)

    def _take_rows(self, order: list[int]) -> None:
        weight, bias = self.output.weight, self.output.bias
        self._set_rows(weight[order], None if bias is None else bias[order], order)

    def _set_rows(self, weight: Tensor, bias: Tensor | None, order: list[int]) -> None:
        """order: which arm each was, -1 for a new one. What else is kept by arm follows in subclasses."""
        for name, rows in (("weight", weight), ("bias", bias)):
            old = getattr(self.output, name)
            if rows is not None:
                rows = nn.Parameter(rows, old.requires_grad) if isinstance(old, nn.Parameter) else rows
                setattr(self.output, name, rows)
        self.output.out_features = len(weight)
