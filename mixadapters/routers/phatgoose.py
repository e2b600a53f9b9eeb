"""Gate vectors that are trained one at a time, each with its own expert."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from mixadapters.core.routing import Routing
from mixadapters.routers.base import ROUTERS
from mixadapters.routers.directions import DirectionRouter
from mixadapters.routers.score import exact, linear


@ROUTERS.register("phatgoose")
class PhatgooseRouter(DirectionRouter):
    """Top-k by the product of standardized x and gate vector v_e over sqrt(d); a softmax over the chosen.

    With `expert_ids` in the batch a row's expert has the weight sigmoid(v_e . x): so gate vectors are trained, each on
    its own task, with experts frozen. Until then no expert is chosen. Source: Muqeeth et al. 2024 (arXiv 2402.05859).
    """

    fields = ("expert_ids",)

    def __init__(self, in_features: int, experts: list[str], **options: Any) -> None:
        super().__init__(in_features, experts, **options)
        self.output = nn.Linear(in_features, len(self.arms), bias=False)
        nn.init.zeros_(self.output.weight)

    def project(self, read: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        width = (read.shape[-1],)
        x, v = (F.layer_norm(part, width, eps=1e-20) for part in (read, weight.to(read.dtype)))
        return linear(x, v, None) / read.shape[-1] ** 0.5

    def weigh_given(self, routing: Routing, tokens: Tensor) -> Routing:
        assert routing.indices is not None
        read = exact(tokens, normalize=False).reshape(-1, self.in_features)
        vectors = self.output.weight.to(read.dtype)[routing.indices.clamp_min(0)]  # (N, k, d)
        return routing._replace(weights=(vectors * read.unsqueeze(1)).sum(-1).sigmoid())
