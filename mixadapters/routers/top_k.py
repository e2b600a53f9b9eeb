"""The k experts of the largest scores."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mixadapters import kernels
from mixadapters.core.context import ForwardContext
from mixadapters.core.losses import win_chances
from mixadapters.core.routes import real_rows
from mixadapters.core.routing import Routing
from mixadapters.routers.balancing import ChoiceBias
from mixadapters.routers.base import ROUTERS
from mixadapters.routers.options import check_options
from mixadapters.routers.schedules import Points
from mixadapters.routers.score import exact, linear
from mixadapters.routers.sparse import SparseRouter

# The options of a router that asks for nothing: a softmax of W x + b for each token, and an expert for each arm.
PLAIN = ("softmax", False, 1.0, 1.0, None, False, 0, None, (), "token", 1)


@ROUTERS.register("top_k")
class TopKRouter(SparseRouter):
    """The k arms of the largest scores, weighed by them (Shazeer et al. 2017; Fedus et al. 2021).

    Args:
        k: arms per row; None: all.
        bias_update_rate: above 0: balance by a bias of each expert that is added for choosing and not for weighing,
            and which `update_bias` moves by this much (Wang et al. 2024). It is to be small beside the differences
            between scores: those of a softmax over many experts are small.

    Raises:
        ValueError: more than there are arms.
    """

    scheduled: tuple[str, ...] = (*SparseRouter.scheduled, "k", "bias_update_rate")

    def __init__(
        self, in_features: int, experts: list[str], *, k: int | None = 2, bias_update_rate: float = 0.0, **options: Any
    ) -> None:
        super().__init__(in_features, experts, **options)
        check_options(k=k, bias_update_rate=bias_update_rate)
        self._check_k(k, len(self.arms))
        self.k, self.bias_update_rate = k, bias_update_rate
        self.balancing = ChoiceBias(len(self.arms)) if bias_update_rate else None

    def brief(self, tokens: Tensor) -> Routing | None:
        """For a linear router without options, as most are: a step of decoding passes here once for each layer."""
        parts: Any = self._modules
        layers, output = parts["hidden"]._modules, parts["output"]
        said = (
            self.scoring_func, self.norm_topk_prob, self.routed_scaling_factor, self.temperature, self.activation,
            self.convex, self.null_arms, self.balancing, self.masked, self.granularity, len(layers),
        )  # fmt: skip
        hooked = self._forward_hooks or self._forward_pre_hooks
        if type(self) is not TopKRouter or said != PLAIN or self.training or hooked:
            return None
        rows = tokens.reshape(-1, tokens.shape[-1])
        logits = linear(exact(rows, self.normalize), output.weight, output.bias)
        scores = logits.softmax(-1)
        indices = scores.topk(scores.shape[1] if self.k is None else self.k).indices
        indices = kernels.constant(indices, (0, scores.shape[1] - 1))
        return Routing(indices, scores.gather(1, indices), None, scores, logits=logits)

    @property
    def fills_slots(self) -> bool:
        return type(self).select is TopKRouter.select

    def select(self, scores: Tensor) -> Tensor:
        k = scores.shape[1] if self.k is None else self.k
        ranked = scores if self.balancing is None else scores + self.balancing.bias.to(scores)
        if self.masked:  # a score of 0 may not be the last
            ranked = ranked.masked_fill(self.masked_columns(scores), -torch.inf)
        return ranked.topk(k).indices

    def completed(self, routing: Routing, noisy: Tensor, context: ForwardContext) -> Routing:
        record = context.record
        if self.balancing is not None and record.training and record.grad and not record.closed:
            assert routing.selected is not None
            self.balancing.count(routing.selected, real_rows(context, self.stack, len(noisy), noisy.device))
        if self.training and self.load_coef and self.noise:
            assert routing.logits is not None
            k, deviation = self.k or noisy.shape[1], self.noise / noisy.shape[1]
            routing = routing._replace(chances=win_chances(routing.logits, noisy, k, deviation))
        return super().completed(routing, noisy, context)

    def loss(self, name: str, routing: Routing, mask: Tensor | None) -> Tensor:
        if name == "load" and not self.noise:
            raise ValueError(
                f"load_coef={self.load_coef} needs noise above 0: it counts what rows may choose by noise"
            )
        return super().loss(name, routing, mask)

    def update_bias(self) -> None:
        """After an optimizer step, once `balancing.counts` have been summed over the processes."""
        if self.balancing is None:
            raise ValueError("bias_update_rate=0 when this router was made: it has no bias to move; set it from there")
        self.balancing.update(self.bias_update_rate, len(self.experts))

    @property
    def moved_by(self) -> tuple[str, ...]:
        return super().moved_by if self.balancing is None else (*super().moved_by, "update_biases")

    def check_option(self, name: str, value: Any) -> None:
        if name == "k":
            check_options(k=value)
            self._check_k(value, len(self.arms))
        if name == "bias_update_rate" and self.balancing is None:
            raise ValueError(f"bias_update_rate={value!r}: this router was made without a bias; make it with a rate")
        super().check_option(name, value)

    def option_at(self, name: str, points: Points, progress: float) -> Any:
        value = super().option_at(name, points, progress)
        return min(value, len(self.arms)) if name == "k" else value  # as where k is a field: layers may have fewer

    def remove_expert(self, name: str, renormalize: bool) -> None:
        if renormalize:
            self._check_k(self.k, len(self.arms) - 1)
        super().remove_expert(name, renormalize)

    def _set_rows(self, weight: Tensor, bias: Tensor | None, order: list[int]) -> None:
        super()._set_rows(weight, bias, order)
        if self.balancing is not None:
            self.balancing.follow(order)

    @staticmethod
    def _check_k(k: int | None, arms: int) -> None:
        if k is not None and k > arms:
            raise ValueError(f"k={k} is more than the {arms} arms; choose one of 1 to {arms}, or None for all")
