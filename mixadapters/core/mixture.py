"""A routed bank as an adapter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mixadapters.core.adapter import Adapter, Site
from mixadapters.core.bank import AdapterBank, keeps
from mixadapters.core.context import ROUTES, ForwardContext, Observer
from mixadapters.core.losses import real_only
from mixadapters.core.routes import HardRoutes, pinned_routing, real_rows
from mixadapters.core.routing import Routing, RoutingKey, with_distribution

Insertion = Literal["parallel", "sequential"]
# Called with what the experts of one mixture read, (N, K), its routing and the mask (N,) of the rows that count.
Watcher = Callable[[Tensor, Routing, "Tensor | None"], None]
# What is made of a router's routing, whose experts have these names.
Tuning = Callable[[Routing, "list[str]"], Routing]
# Rows, or entries of the output, up to which the products of one expert, called one by one, cost less than a call of
# the op, which passes over the output once less: measured at widths 256 to 5632, 64 to 1024 rows.
FEW, SMALL = 64, 2**19


class Mixture(Adapter):
    """Adds to a layer's output what routed experts make of the layer's input, or of the output itself.

        y <- base_weight * y + sum_k w_k E_k(source),   source = x (parallel), y (sequential) or a tapped input

    Args:
        router: tokens, context -> Routing.
        bank: the experts.
        insertion: "parallel" or "sequential".
        tap: path of a tapped module whose input takes the place of x.
        router_tap: path of a tapped module whose input the router reads. None: what the experts read.
        hard_routes: experts by numbers of the batch, which go before the router where they are given.
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
        router_tap: str | None = None,
        hard_routes: HardRoutes | None = None,
        dropout: float = 0.0,
        observes: bool = False,
        replaces: bool = False,
    ) -> None:
        super().__init__()
        self.router, self.bank = router, bank
        self.insertion, self.tap, self.router_tap = insertion, tap, router_tap
        self.hard_routes = hard_routes
        self.dropout = nn.Dropout(dropout)
        self.observes, self.replaces = observes, replaces
        plain = type(self).forward is Mixture.forward and type(bank).forward is AdapterBank.forward and keeps(bank)
        self.lone = plain and self.always_first and tap is None and not bank.layer_norm and not bank.scales
        self.kind = (bank.kind, insertion, tap)  # what mixtures that run in one call have in common
        self.key, self.stack = RoutingKey(), ""
        self.watchers: list[Watcher] = []
        self.tunings: list[Tuning] = []  # in order, on what the router decides; not on what callers and batches do

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "watchers": []}  # they watch this mixture, not its copies

    def bind(self, site: Site, step: str = "") -> None:
        self.key = RoutingKey(site.adapter, site.group, site.layer, site.path, step)
        self.stack = site.stack
        if hasattr(self.router, "bind"):
            self.router.bind(site)

    @property
    def always_first(self) -> bool:
        """Whether every row uses expert 0 with weight 1, so that there is nothing to decide, to pin or to publish."""
        return getattr(self.router, "always_first", False) and self.hard_routes is None

    @property
    def rate(self) -> float:
        """The probability of dropout, 0 in evaluation. The op drops, by a hash that is computed again in backward."""
        dropout = self._modules["dropout"]
        return dropout.p if dropout.training else 0.0

    def source(self, x: Tensor, y: Tensor, context: ForwardContext) -> Tensor:
        """What the experts read: (..., K)."""
        if self.insertion == "sequential":
            return y
        return x if self.tap is None else context.tap(self.tap)

    def alone(self, x: Tensor, y: Any) -> Tensor | None:
        if type(y) is not Tensor or not y.is_cpu:
            return None
        entries = y.numel()
        # A graph adds the products up in loops that it has anyway, however many the rows.
        if entries > SMALL and entries > FEW * y.shape[-1] and not torch.compiler.is_compiling():
            return None
        modules = self._modules
        dropout = modules["dropout"]  # as in `rate`
        if self.watchers or self._forward_hooks or self._forward_pre_hooks or (dropout.training and dropout.p):
            return None
        return modules["bank"].alone(x if self.insertion == "parallel" else y, y)

    def forward(self, x: Tensor, y: Tensor, context: ForwardContext) -> Tensor:
        source = self.source(x, y, context)
        source = source if source.dtype == y.dtype else source.to(y.dtype)
        routing = self.dispatch(source, context)
        tokens, base = source.reshape(-1, source.shape[-1]), y.reshape(-1, y.shape[-1])
        packed = self._modules["bank"].pack(context)
        return packed(tokens, routing, base, routing.base_weight, self.rate).view_as(y)

    @property
    def expert_names(self) -> list[str]:
        """Names of the experts that the router numbers."""
        return self.bank.names

    def bank_numbers(self) -> list[int]:
        """The number in the bank of each of the experts that the router numbers; -1 where it has nothing here."""
        return list(range(len(self.bank.names)))

    def dispatch(self, source: Tensor, context: ForwardContext) -> Routing:
        """As `route`, with the experts numbered as in the bank."""
        return self.route(source, context)

    def route(self, source: Tensor, context: ForwardContext) -> Routing:
        """The routing of the N rows of source (..., K), published: pinned, by the batch's numbers, or the router's."""
        router = self._modules["router"]  # past `nn.Module.__getattr__`: a decoding step comes here in every layer
        watched = context.observers or self.watchers
        if self.hard_routes is None and not watched and getattr(router, "always_first", False):
            return router(source, context)
        record, rows = context.record, source.numel() // source.shape[-1]
        fixed = self.hard_routes is not None and self.hard_routes.usual >= 0
        plain = record.plain and not (record.grad or fixed or torch.compiler.is_compiling())
        if plain and not (self.tunings or self.watchers):  # nobody has a say in it, and nobody asks
            reads = source if self.router_tap is None else context.tap(self.router_tap)
            brief = getattr(router, "brief", None)  # which a router that is none of ours has not
            decided = None if brief is None else brief(reads)
            if decided is None:
                decided = self._checked(router(reads, context), rows)
            record.routings[self.key] = decided = _in_dtype(decided, source.dtype)
            return decided
        routing = None if plain else self._given(rows, source, context)
        decides = routing is None and not getattr(router, "follows", False)
        trains = decides and record.training and record.grad  # not in a reference pass
        if routing is None:
            routing = self._checked(router(self._read(source, context), context), rows)
            for tuning in self.tunings:
                routing = tuning(routing, self.expert_names)
            change = context.record.values.get(ROUTES, {}).get(self.key)
            if callable(change):
                routing = self._beside(self._checked(change(routing), rows), source.dtype)
        routing = _in_dtype(routing, source.dtype)
        if not self.always_first:
            record.routings[self.key] = Routing(*routing)  # torch 2.11 cannot make again what `_replace` has made
        if trains or context.observers or self.watchers:
            mask = real_rows(context, self.stack, rows, source.device)
            if trains:
                self._add_losses(routing, mask, context)
                context.steps.look(self.key, router)
            if not record.closed:  # checkpointing that runs the layer again tells nothing new
                self._tell(routing, mask, context, source, trains)
        return routing

    def _read(self, source: Tensor, context: ForwardContext) -> Tensor:
        """What the router reads: (..., d)."""
        reads, own = source if self.router_tap is None else context.tap(self.router_tap), context.record.own_rows
        # What is broken in other rows must not reach this router's gradients.
        return reads if own is None or not torch.is_grad_enabled() else real_only(reads, own)

    def _checked(self, routing: Any, rows: int) -> Routing:
        """What a router has returned, if that is a routing of `rows` rows."""
        if not isinstance(routing, Routing):
            raise self._refusal(type(routing).__name__, "return a Routing")
        for name, given in (("indices", routing.indices), ("weights", routing.weights)):
            if given is not None and (given.dim() != 2 or given.shape[0] != rows):
                what = f"{name} {tuple(given.shape)} for {rows} rows"
                raise self._refusal(what, "return (N, k), with N = B * T rows")
        return routing

    def _refusal(self, what: str, remedy: str) -> ValueError:
        return ValueError(f"router {type(self.router).__name__} at {self.key.path!r} returned {what}; {remedy}")

    def _given(self, rows: int, source: Tensor, context: ForwardContext) -> Routing | None:
        """What a caller or the batch has decided before the router; None where it is the router's to decide."""
        routing = pinned_routing(self.key, rows, context, self.stack, source.device)
        if routing is None and self.hard_routes is not None:
            routing = self.hard_routes(context, rows, self.key, self.stack)
            if routing is not None and hasattr(self.router, "weigh_given"):
                routing = self.router.weigh_given(routing, self._read(source, context))
        return None if routing is None else self._beside(routing, source.dtype)

    def _beside(self, routing: Routing, dtype: torch.dtype) -> Routing:
        """With the layer's own output only in rows without expert, where experts stand beside it."""
        if self.replaces and routing.indices is not None and routing.base_weight is None:
            return routing._replace(base_weight=(routing.indices < 0).all(1).to(dtype))
        return routing

    def _add_losses(self, routing: Routing, mask: Tensor | None, context: ForwardContext) -> None:
        losses = getattr(self.router, "losses", None)
        if losses is None:  # a router that is none of ours
            return
        for name, (value, weight) in losses(routing, mask).items():
            context.add_loss(name, value, weight)

    def _tell(
        self, routing: Routing, mask: Tensor | None, context: ForwardContext, source: Tensor, trains: bool
    ) -> None:
        """Tell observers, of which usage in training is one, and those who watch this mixture."""
        names, read = self.expert_names, source.reshape(-1, source.shape[-1])
        routing = with_distribution(routing, names, getattr(self.router, "arms", names), len(read), source.device)
        observers: list[Observer] = [context.usage, *context.observers] if trains else context.observers
        for observer in observers:
            observer(self.key, routing, mask)
        for watcher in self.watchers:
            watcher(read, routing, mask)

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
            raise ValueError("its router depends on the input, so no single weight equals it")
        bank = self.bank
        if bank.activation != "identity" or bank.glu or bank.layer_norm:
            what = "LayerNorm" if bank.layer_norm else "activation"
            raise ValueError(f"a bottleneck with its own {what} is not linear, so no single weight equals it")
        if self.tap is not None or (self.insertion == "parallel" and weight.shape[1] != bank.in_features):
            raise ValueError("its input is not the input of the layer that it would be folded into")
        delta, shift = self._sum_of_experts(weights, weight)
        old = weight.new_zeros(bank.out_features) if bias is None else bias
        if self.insertion == "parallel":
            weight, new = weight + delta, old + shift
        else:
            weight, new = weight + delta @ weight, old + delta @ old + shift
        return weight, new if bias is not None or bool(shift.any()) else None

    def _sum_of_experts(self, weights: list[float], like: Tensor) -> tuple[Tensor, Tensor]:
        """Product (M, K) and bias (M,) of the linear experts at these weights, in the dtype of `like`."""
        delta = like.new_zeros(self.bank.out_features, self.bank.in_features)
        shift = like.new_zeros(self.bank.out_features)
        for expert, w in zip(self.bank.weights(None), weights, strict=True):
            factor = w * (expert.scale.to(like.dtype) if isinstance(expert.scale, Tensor) else expert.scale)
            up = expert.up.to(like.dtype)
            delta = delta + factor * (up @ expert.down.to(like.dtype))
            if expert.b_down is not None:
                shift = shift + factor * (up @ expert.b_down.to(like.dtype))
            if expert.b_up is not None:
                shift = shift + factor * expert.b_up.to(like.dtype)
        return delta, shift


def _in_dtype(routing: Routing, dtype: torch.dtype) -> Routing:
    """With weights and base_weight in the dtype of what the experts read."""
    weights, base_weight = routing.weights, routing.base_weight
    if (weights is None or weights.dtype == dtype) and (base_weight is None or base_weight.dtype == dtype):
        return routing
    return routing._replace(
        weights=None if weights is None else weights.to(dtype),
        base_weight=None if base_weight is None else base_weight.to(dtype),
    )
