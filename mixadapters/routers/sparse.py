"""Sparse routers: each row uses a few experts. A subclass says which arms a row takes, by `select`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mixadapters import kernels
from mixadapters.core.context import ForwardContext
from mixadapters.core.routes import real_rows
from mixadapters.core.routing import Routing, chosen_experts
from mixadapters.routers.capacity import within_capacity
from mixadapters.routers.learned import LearnedRouter
from mixadapters.routers.options import check_options


class SparseRouter(LearnedRouter):
    """A learned router that chooses. What falls to arms without expert, and to none, is left to the frozen layer.

    Weights start as N(0, init_range^2): the logits of a router of zeros are tied, and ties always go to the first.

    Args:
        scoring_func: what weighs the arms: "softmax" over them, or "sigmoid" of each.
        norm_topk_prob: make the weights of the chosen arms of each row sum to 1. False: where a router is undecided
            less is added to the frozen layer.
        routed_scaling_factor: multiplies the weights.
        capacity_factor: in training, an expert takes at most capacity_factor * k * N / E of the N rows; others are
            dropped: they lose this expert. Rows then depend on each other. 0: nothing is dropped. In evaluation
            nothing ever is, since a sequence would depend on its batch and on the steps in which it is decoded.
        batch_prioritized: the rows of the largest weight are served first, and not the first of the batch (Riquelme
            et al. 2021, section 4.1).

    Raises:
        ValueError: a value out of range; `batch_prioritized` without a capacity; or `convex` where weights may sum to
            more than 1.
    """

    frozen_arm = False
    norm_of_experts = False  # whether `norm_topk_prob` leaves out arms without expert
    fills_slots: Any = False  # whether `select` gives an arm for each slot, and never -1

    def __init__(
        self,
        in_features: int,
        experts: list[str],
        *,
        init_range: float = 0.02,
        scoring_func: str = "softmax",
        norm_topk_prob: bool = False,
        routed_scaling_factor: float = 1.0,
        capacity_factor: float = 0.0,
        batch_prioritized: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(in_features, experts, init_range=init_range, **options)
        check_options(
            scoring_func=scoring_func, norm_topk_prob=norm_topk_prob, routed_scaling_factor=routed_scaling_factor,
            capacity_factor=capacity_factor, batch_prioritized=batch_prioritized,
        )  # fmt: skip
        if batch_prioritized and not capacity_factor:
            raise ValueError(
                "batch_prioritized=True says which rows keep an expert that is full, and with capacity_factor=0 none "
                "is; set a capacity_factor, or leave it out"
            )
        if self.convex and (scoring_func != "softmax" or norm_topk_prob or routed_scaling_factor != 1):
            raise ValueError(
                f"convex weights sum to 1 with that of the frozen layer, but scoring_func={scoring_func!r}, "
                f"norm_topk_prob={norm_topk_prob} and routed_scaling_factor={routed_scaling_factor} make others; leave"
                " these out, or do not mix convexly"
            )
        self.init_range, self.scoring_func = init_range, scoring_func
        self.norm_topk_prob, self.routed_scaling_factor = norm_topk_prob, routed_scaling_factor
        self.capacity_factor, self.batch_prioritized = capacity_factor, batch_prioritized

    def weigh(self, logits: Tensor) -> Tensor:
        return logits.softmax(-1) if self.scoring_func == "softmax" else logits.sigmoid()

    def select(self, scores: Tensor) -> Tensor:
        """scores (N, A) -> (N, k) numbers of the chosen arms, the largest first, -1 for none."""
        raise NotImplementedError

    def choose(self, logits: Tensor) -> Routing:
        scores = self.weigh(logits)
        return self.routed(scores, self.select(scores), full=self.fills_slots)

    def routed(self, scores: Tensor, arms: Tensor, full: bool = False) -> Routing:
        """The routing to the arms (N, k), -1 for none, weighed by scores (N, A). full: there is no -1."""
        count = scores.shape[1]
        if full and count == len(self.experts):  # an expert in each slot: nothing is to be left out
            indices, weights = arms, scores.gather(1, arms)
            chosen, bounds = weights, (0, count - 1)
        else:
            bounds = None
            indices = torch.where(arms < len(self.experts), arms, -1)
            chosen = torch.where(arms >= 0, scores.gather(1, arms.clamp_min(0)), 0.0)
            weights = torch.where(indices >= 0, chosen, 0.0)
        if self.norm_topk_prob:
            whole = (weights if self.norm_of_experts else chosen).sum(1, keepdim=True)
            weights = weights / whole.clamp_min(torch.finfo(weights.dtype).tiny)
        if self.routed_scaling_factor != 1:
            weights = weights * self.routed_scaling_factor
        base_weight = 1 - weights.sum(1) if self.convex else None
        probs = scores if self.scoring_func == "softmax" else scores / scores.sum(1, keepdim=True)
        # Where nothing trains, who asks what was chosen reads it off the indices, unless these leave arms out.
        read_off = not (self.training or torch.is_grad_enabled()) and count == len(self.experts)
        selected = None if read_off else chosen_experts(arms, count)
        # New here, and changed by nobody: layers that share the routing share what is derived from its choices.
        return Routing(kernels.constant(indices, bounds), weights, base_weight, probs, selected=selected)

    def completed(self, routing: Routing, noisy: Tensor, context: ForwardContext) -> Routing:
        if not (self.training and self.capacity_factor):
            return routing
        assert routing.indices is not None
        assert routing.weights is not None
        assert routing.probs is not None
        mask = real_rows(context, self.stack, len(noisy), noisy.device)
        order = routing.probs.detach().amax(1) if self.batch_prioritized else None
        indices = within_capacity(routing.indices, len(self.experts), self.capacity_factor, mask, order)
        weights = torch.where(indices >= 0, routing.weights, 0.0)
        return routing._replace(
            indices=indices, weights=weights, base_weight=1 - weights.sum(1) if self.convex else None
        )

    def _insert_row(self, place: int, share: float) -> None:
        weight, bias = self.output.weight, self.output.bias
        row = torch.empty_like(weight[:1]).normal_(std=self.init_range)
        new = torch.logit(bias.new_tensor([share]))
        self._insert(place, row, new + bias.logsumexp(0) if self.scoring_func == "softmax" else new)
