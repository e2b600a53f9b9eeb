"""A routed bank as an adapter."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from mixadapters.core.adapter import Adapter, Site
from mixadapters.core.bank import AdapterBank
from mixadapters.core.context import ForwardContext
from mixadapters.core.routes import pinned_routing, real_rows
from mixadapters.core.routing import Routing, RoutingKey

Insertion = Literal["parallel", "sequential"]


class Mixture(Adapter):
    """Adds to a layer's output what routed experts make of the layer's input, or of the output itself.

        y <- keep * y + sum_k w_k E_k(source),   source = x (parallel), y (sequential) or a tapped input

    Args:
        router: tokens, context -> Routing.
        bank: the experts.
        insertion: "parallel" or "sequential".
        tap: path of a tapped module whose input takes the place of x.
        dropout: on what the experts read, in training.
        observes: whether losses on the base model's stream see the experts.
        replaces: experts stand beside the layer (each is a full substitute for y), not on top of it.
    """

    def __init__(
        self,
        router: nn.Module,
        bank: AdapterBank,
        insertion: Insertion = "parallel",
        *,
        tap: str | None = None,
        dropout: float = 0.0,
        observes: bool = False,
        replaces: bool = False,
    ) -> None:
        super().__init__()
        self.router, self.bank = router, bank
        self.insertion, self.tap = insertion, tap
        self.dropout = nn.Dropout(dropout)
        self.observes, self.replaces = observes, replaces
        self.kind = (bank.kind, insertion, tap)  # what mixtures that run in one call have in common
        self.key, self.stack = RoutingKey(), ""

    def bind(self, site: Site, step: str = "") -> None:
        self.key = RoutingKey(site.adapter, site.group, site.layer, site.path, step)
        self.stack = site.stack

    @property
    def always_first(self) -> bool:
        """Whether every row uses expert 0 with weight 1, so that there is nothing to decide, to pin or to publish."""
        return getattr(self.router, "always_first", False)

    @property
    def rate(self) -> float:
        """The probability of dropout, 0 in evaluation. The op drops, by a hash that is computed again in backward."""
        dropout = self.dropout
        return dropout.p if dropout.training else 0.0

    def source(self, x: Tensor, y: Tensor, context: ForwardContext) -> Tensor:
        """What the experts read: (..., K)."""
        if self.insertion == "sequential":
            return y
        return x if self.tap is None else context.tap(self.tap)

    def forward(self, x: Tensor, y: Tensor, context: ForwardContext) -> Tensor:
        source = self.source(x, y, context).to(y.dtype)
        routing = self.route(source, context)
        tokens, base = source.reshape(-1, source.shape[-1]), y.reshape(-1, y.shape[-1])
        return self.bank(tokens, routing, context, base, routing.keep, self.rate).view_as(y)

    def route(self, source: Tensor, context: ForwardContext) -> Routing:
        """The routing of the N rows of source (..., K): the pinned one, or else the router's. It is published."""
        if self.always_first and not context.observers:
            return self.router(source, context)
        rows = source.numel() // source.shape[-1]
        routing = pinned_routing(self.key, rows, context, self.stack, source.device)
        if routing is None:
            routing = self.router(source, context)
        if not self.always_first:
            context.record.routings[self.key] = routing
        if context.observers and not context.record.closed:  # not where checkpointing runs the layer again
            mask = real_rows(context, self.stack, rows)
            for observer in context.observers:
                observer(self.key, routing, mask)
        return routing

    def observe(self, x: Tensor, y: Tensor, context: ForwardContext) -> list[Tensor]:
        source = self.source(x, y, context).to(y.dtype)
        tokens = source.reshape(-1, source.shape[-1])
        deltas = []
        for i, expert in enumerate(self.bank.experts.values()):
            if not any(p.requires_grad for p in expert.parameters()):
                continue
            only = Routing(torch.full((tokens.shape[0], 1), i, device=tokens.device))
            alone = self.bank(tokens, only, context).view_as(y)
            deltas.append(alone - y.detach() if self.replaces else alone)
        return deltas

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Exact where experts are linear and the routing is a constant: W + sum s w U D, or (1 + sum s w U D) W."""
        weights = getattr(self.router, "constant", lambda: None)()
        if weights is None:
            raise ValueError("its gate depends on the input, so no single weight equals it")
        bank = self.bank
        if bank.activation != "identity" or bank.glu or bank.layer_norm:
            what = "LayerNorm" if bank.layer_norm else "activation"
            raise ValueError(f"a bottleneck with its own {what} is not linear, so no single weight equals it")
        if self.tap is not None or (self.insertion == "parallel" and weight.shape[1] != bank.in_features):
            raise ValueError("its input is not the input of the layer that it would be folded into")
        delta = weight.new_zeros(bank.out_features, bank.in_features)
        shift = weight.new_zeros(bank.out_features)
        for expert, w in zip(bank.weights(None), weights, strict=True):
            factor = w * (expert.scale.to(weight.dtype) if isinstance(expert.scale, Tensor) else expert.scale)
            up = expert.up.to(weight.dtype)
            delta = delta + factor * (up @ expert.down.to(weight.dtype))
            if expert.b_down is not None and expert.b_up is not None:
                shift = shift + factor * (up @ expert.b_down.to(weight.dtype) + expert.b_up.to(weight.dtype))
        old = weight.new_zeros(bank.out_features) if bias is None else bias
        if self.insertion == "parallel":
            weight, new = weight + delta, old + shift
        else:
            weight, new = weight + delta @ weight, old + delta @ old + shift
        return weight, new if bias is not None or bool(shift.any()) else None
