"""Experts choose their tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mixadapters.core.adapter import Site
from mixadapters.core.context import ForwardContext
from mixadapters.core.routing import Routing
from mixadapters.routers.base import ROUTERS
from mixadapters.routers.pooling import known_mask, mask_of, refuse_documents
from mixadapters.routers.sparse import SparseRouter


@ROUTERS.register("expert_choice")
class ExpertChoiceRouter(SparseRouter):
    """Each expert takes the tokens of a sequence that weigh it most: load is balanced without a loss.

    Source: Zhou et al. 2022 (arXiv 2202.09368), whose experts choose among all tokens of a batch. Here they choose
    within each sequence, so that rows do not depend on their batch. A token's experts depend on later tokens, so it is
    refused in causal models.

    Args:
        capacity_factor: experts per token on average; each takes ceil(capacity_factor * T / E) of T real tokens.
    """

    without = frozenset({"granularity", "pool", "batch_prioritized", "scoring_func"})
    refuses_packed = "router 'expert_choice'"

    def __init__(self, in_features: int, experts: list[str], *, capacity_factor: float = 2.0, **options: Any) -> None:
        super().__init__(in_features, experts, capacity_factor=capacity_factor, **options)
        if capacity_factor == 0:
            raise ValueError("capacity_factor=0: no expert would take a token; 2 is two experts per token on average")

    def bind(self, site: Site) -> None:
        """Raises ValueError at causal sites."""
        if site.causal:
            raise ValueError(
                f"router 'expert_choice' at {site.path!r}: whether an expert takes a token depends on those after it, "
                "and a causal model must not see the future; choose another router, such as 'top_k'"
            )
        super().bind(site)

    def select(self, scores: Tensor) -> Tensor:
        return torch.sort(scores, dim=-1, descending=True, stable=True).indices

    def completed(self, routing: Routing, noisy: Tensor, context: ForwardContext) -> Routing:
        scores, count = routing.probs, len(self.experts)
        assert scores is not None
        stream = context.stream(self.stack)
        refuse_documents(stream, "router 'expert_choice'", "choose another router")
        by_sequence = context.as_sequences(scores, self.stack)[..., :count]  # (B, T, E)
        mask = known_mask(by_sequence, mask_of(by_sequence, stream), stream, "router 'expert_choice'").unsqueeze(-1)
        order = torch.argsort(torch.where(mask, by_sequence, -1.0), dim=1, descending=True, stable=True)
        rank = order.argsort(1)
        capacity = (self.capacity_factor * mask.sum(1, keepdim=True) / count).ceil()
        taken = torch.nn.functional.pad(((rank < capacity) & mask).flatten(0, 1), (0, scores.shape[1] - count))
        arms = self.select(scores)
        return self.routed(scores, torch.where(taken.gather(1, arms), arms, -1))._replace(logits=routing.logits)
