"""Trees whose splits saturate: dense at first, at most k experts in the end, differentiable throughout."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mixadapters.core.losses import masked_mean, router_z
from mixadapters.core.routing import Routing
from mixadapters.routers.base import ROUTERS
from mixadapters.routers.options import check_options
from mixadapters.routers.permutation import Permutation
from mixadapters.routers.score import linear
from mixadapters.routers.sparse import SparseRouter

SMALLEST = 1e-5  # probability of a leaf below which it is out of reach


@ROUTERS.register("tree")
class TreeRouter(SparseRouter):
    """k trees with a leaf for each arm, whose splits are 0 or 1 outside a band; one softmax over all leaves.

    Source: Ibrahim et al. 2023 (COMET, arXiv 2306.02824). `entropy_coef` is the price of the entropy of the leaves'
    probabilities, which drives splits to saturate.

    Args:
        k: trees. Once all splits are saturated a row uses at most k experts.
        gamma: width of the band in which a split is between 0 and 1. Wide ones stay dense for longer.
        learn_permutation: let a permutation of the arms be learned too (`permutation`), until it is made hard.
    """

    without = frozenset({"scoring_func", "init_range", "noise"})
    fixed_experts = "its trees have as many leaves as there are experts, so none can come or go; make a new router"

    def __init__(
        self,
        in_features: int,
        experts: list[str],
        *,
        k: int = 2,
        gamma: float = 1.0,
        learn_permutation: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(in_features, experts, **options)
        check_options(trees=k, gamma=gamma, learn_permutation=learn_permutation)
        width, arms = self.output.in_features, len(self.arms)
        if arms < 2:
            raise ValueError(f"a tree needs two arms at least, and has {self.arms}")
        self.k, self.gamma = k, gamma
        self.splits = nn.Linear(width, k * (arms - 1), bias=False)
        self.output = nn.Linear(width, k * arms)
        nn.init.uniform_(self.splits.weight, -gamma / 100, gamma / 100)
        nn.init.uniform_(self.output.weight, -0.05, 0.05)
        nn.init.zeros_(self.output.bias)
        self.permutation = Permutation(arms) if learn_permutation else None

    @property
    def moved_by(self) -> tuple[str, ...]:
        searches = self.permutation is not None and not self.permutation.hard
        return (*super().moved_by, "search_permutation") if searches else super().moved_by

    def logits(
        self, read: Tensor, weight: Tensor, bias: Tensor | None, log_temperature: Tensor | None = None
    ) -> Tensor:
        """(..., k (A - 1) + k A): what splits read, and the leaves' logits."""
        return torch.cat(
            [linear(read, self.splits.weight, None), super().logits(read, weight, bias, log_temperature)], -1
        )

    def tempered(self, logits: Tensor) -> Tensor:
        splits, leaves = self.parts(logits)
        return torch.cat([splits.flatten(1), super().tempered(leaves.flatten(1))], 1)

    def parts(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """(N, k, A - 1) of the splits, (N, k, A) of the leaves."""
        count = self.splits.out_features
        return logits[:, :count].unflatten(1, (self.k, -1)), logits[:, count:].unflatten(1, (self.k, -1))

    def reached(self, splits: Tensor) -> Tensor:
        """(N, k, A - 1) -> (N, k, A) probability of each leaf. Node i of the heap has the children 2 i and 2 i + 1."""
        chance = smooth_step(splits, self.gamma)
        nodes = [torch.ones_like(chance[..., 0])]  # from number 1 on
        for i in range(chance.shape[-1]):
            nodes += [nodes[i] * chance[..., i], nodes[i] * (1 - chance[..., i])]
        return torch.stack(nodes[chance.shape[-1] :], -1)

    def choose(self, logits: Tensor) -> Routing:
        splits, leaves = self.parts(logits)
        reached = self.reached(splits)
        out = torch.where(reached < SMALLEST, -torch.inf, leaves + reached.clamp_min(SMALLEST).log())
        scores = out.flatten(1).softmax(-1).unflatten(1, (self.k, -1)).sum(1)
        scores = scores if self.permutation is None else self.permutation(scores)
        return self.routed(scores, self.select(scores))

    def select(self, scores: Tensor) -> Tensor:
        ordered, arms = torch.sort(scores, dim=-1, descending=True, stable=True)
        return torch.where(ordered > 0, arms, -1)

    def loss(self, name: str, routing: Routing, mask: Tensor | None) -> Tensor:
        if name not in ("entropy", "z") or routing.logits is None:
            return super().loss(name, routing, mask)
        splits, leaves = self.parts(routing.logits)
        if name == "z":
            return router_z(leaves.flatten(1), mask)
        reached = self.reached(splits)
        return masked_mean(-(reached * reached.clamp_min(1e-9).log()).sum((1, 2)), mask)

    def losses(self, routing: Routing, mask: Tensor | None) -> dict[str, tuple[Tensor, float]]:
        losses = super().losses(routing, mask)
        if self.permutation is not None and not self.permutation.hard:
            losses["permutation"] = (self.permutation.entropy(), self.permutation.entropy_coef)
        return losses


def smooth_step(z: Tensor, gamma: float) -> Tensor:
    """0 up to -gamma / 2, 1 from gamma / 2 on, a cubic between them; its derivative is continuous."""
    x = (z / gamma).clamp(-0.5, 0.5)
    return -2 * x**3 + 1.5 * x + 0.5
