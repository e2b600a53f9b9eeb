"""A mixture whose router may be shared with other layers, and may number other experts than lie in its bank."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mixadapters.core.adapter import Site
from mixadapters.core.bank import AdapterBank
from mixadapters.core.context import ForwardContext
from mixadapters.core.mixture import Mixture
from mixadapters.core.routing import NO_LAYER, Routing, RoutingKey
from mixadapters.routers.base import Router
from mixadapters.routers.score import exact, linear


class FollowRouter(Router):
    """Does as the router of another layer has decided in this forward: one routing for a block, or for a model.

    Args:
        leader: that router, which stays where it is.
        key: where it publishes.
    """

    follows = True  # its losses and its usage are the leader's

    def __init__(self, in_features: int, leader: Router, key: RoutingKey) -> None:
        self.__dict__["leader"] = leader  # no child: its parameters are the other layer's
        super().__init__(in_features, leader.experts)
        self.key, self.layer = key, NO_LAYER

    @property
    def experts(self) -> list[str]:
        return self.__dict__["leader"].experts

    @experts.setter
    def experts(self, names: list[str]) -> None:
        """They are the leader's."""

    @property
    def arms(self) -> list[str]:
        return self.__dict__["leader"].arms

    def bind(self, site: Site) -> None:
        super().bind(site)
        self.layer = site.layer

    def forward(self, tokens: Tensor, context: ForwardContext) -> Routing:
        """Raises RuntimeError where the leader has not run in this forward, or read other rows than this layer."""
        routing = context.record.routings.get(self.key)
        if routing is None and self.__dict__["leader"].anywhere:
            routing = self.__dict__["leader"](tokens, context)
        if routing is None:
            raise RuntimeError(
                f"{self.path!r} runs before {self.key.path!r}, whose router it shares: use router_scope='module', "
                "or leave one of the two out (exclude_modules)"
            )
        rows = tokens.numel() // tokens.shape[-1]
        given = next((t for t in (routing.indices, routing.weights, routing.probs) if t is not None), None)
        if given is not None and given.shape[0] != rows:
            raise RuntimeError(
                f"{self.path!r} reads {rows} tokens and {self.key.path!r}, whose router it shares, reads "
                f"{given.shape[0]}: use router_scope='module'"
            )
        self._refuse_reentrant(routing, context)
        return routing if given is None or given.device == tokens.device else routing.to(tokens.device)

    def _refuse_reentrant(self, routing: Routing, context: ForwardContext) -> None:
        """Where another layer's routing has lost its graph, the router would silently not learn from this layer."""
        weights = routing.weights
        if weights is None or weights.requires_grad or torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return
        trains = any(parameter.requires_grad for parameter in self.__dict__["leader"].parameters())
        if trains and context.records.again and self.key.layer != self.layer:
            raise RuntimeError(
                f"reentrant activation checkpointing cuts {self.path!r} off from the router that it shares with "
                f"{self.key.path!r}: pass gradient_checkpointing_kwargs={{'use_reentrant': False}}"
            )


class ExpertMixture(Mixture):
    """A mixture whose router numbers experts of its own, of which some may have nothing here; others are always on.

        y <- c_0 y + sum_k w_k E_k(source) + c_1 sum_s S_s(source)

    c_0 and c_1 are 1 without `residual`, which makes them 2 softmax(W source), of a source of unit root mean square: 1
    and 1 at the start (Rajbhandari et al. 2022, arXiv 2201.05596; the factor 2 leaves the base as it is then).

    Args:
        bank: the router's experts that have something here, in the router's order, then the shared ones.
        shared: how many shared experts there are, at the end of the bank.
        stands: of the router's experts that have no weights of their own here: whose they go by, None for nobody's.
        residual: weigh the frozen output against the shared experts.
    """

    bank_of: Tensor

    def __init__(
        self, router: Router, bank: AdapterBank, insertion: Any = "parallel", *, shared: int = 0,
        residual: bool = False, stands: Mapping[str, str | None] | None = None, **options: Any,
    ) -> None:  # fmt: skip
        super().__init__(router, bank, insertion, **options)
        self.shared, self.stands = shared, dict(stands or {})
        self.residual = nn.Linear(router.in_features, 2) if residual else None
        if self.residual is not None:
            nn.init.zeros_(self.residual.weight)
            nn.init.zeros_(self.residual.bias)
        self.register_buffer("bank_of", torch.zeros(0, dtype=torch.long), persistent=False)
        self.number()

    def number(self) -> None:
        """Number the router's experts by the bank's. Called again where experts have come or gone."""
        places = {name: i for i, name in enumerate(self.routed_names)}
        numbers = [places.get(self.holder_of(name) or "", -1) for name in self.expert_names]
        self.numbers, self.in_order = numbers, numbers == list(range(len(places)))
        self.present = [i for i, number in enumerate(numbers) if number >= 0]
        self.bank_of = torch.tensor([*numbers, -1], device=self.bank_of.device)  # the last is that of -1

    @property
    def expert_names(self) -> list[str]:
        return self.router.experts

    @property
    def routed_names(self) -> list[str]:
        """The experts of the bank among which the router chooses."""
        names = self.bank.names
        return names[: len(names) - self.shared]

    def holder_of(self, name: str) -> str | None:
        """The expert whose weights the rows of one of the router's experts go to; None where nobody's."""
        name = self.stands.get(name, name)  # type: ignore[assignment]
        return name if name in self.bank.experts else None

    def bank_numbers(self) -> list[int]:
        return self.numbers

    def dispatch(self, source: Tensor, context: ForwardContext) -> Routing:
        routing = self.route(source, context)
        if not self.in_order:
            routing = self._in_bank(routing, source.numel() // source.shape[-1])
        return self._with_shared(routing, source) if self.shared else routing

    def _in_bank(self, routing: Routing, rows: int) -> Routing:
        """The bank's numbers for the router's; -1 where an expert has nothing here."""
        if routing.indices is not None:
            return routing._replace(indices=self.bank_of.to(routing.indices.device)[routing.indices.long()])
        weights = routing.weights
        if not self.stands:
            return routing if weights is None else routing._replace(weights=weights[:, self.present])
        if weights is None:
            weights = torch.ones(rows, len(self.bank_of) - 1, device=self.bank_of.device)
        # The weights of those who go by the same expert add up.
        summed = weights.new_zeros(rows, len(self.routed_names))
        numbers = self.bank_of.to(weights.device)[self.present]
        return routing._replace(weights=summed.index_add(1, numbers, weights[:, self.present]))

    def _with_shared(self, routing: Routing, source: Tensor) -> Routing:
        """With the shared experts in the last slots."""
        rows, routed = source.numel() // source.shape[-1], len(self.bank.names) - self.shared
        weights, indices = routing.weights, routing.indices
        slots = routed if indices is None else indices.shape[1]
        ours = source.new_ones(rows, self.shared)
        base = routing.base_weight
        if self.residual is not None:
            read = exact(source.reshape(rows, -1), normalize=True)
            both = 2 * linear(read, self.residual.weight, self.residual.bias).softmax(-1)
            both = both.to(source.dtype)
            base = both[:, 0] if base is None else base * both[:, 0]
            ours = both[:, 1:].expand(-1, self.shared)
        if weights is None:
            weights = source.new_ones(rows, slots)
        if indices is not None:
            last = torch.arange(routed, routed + self.shared, device=indices.device)
            indices = torch.cat([indices.long(), last.expand(rows, -1)], 1)
        run = routing.run if self.residual is None else 1
        return routing._replace(indices=indices, weights=torch.cat([weights, ours], 1), base_weight=base, run=run)
