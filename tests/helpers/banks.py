"""Banks and mixtures with weights in every part, for tests of the core."""

from __future__ import annotations

import torch
from torch import Tensor

from mixadapters.core.bank import AdapterBank
from mixadapters.core.context import ForwardContext
from mixadapters.core.mixture import Mixture
from mixadapters.core.routing import Routing
from mixadapters.routers import Router, SingleRouter

WIDTH = 6


def bank_of(*ranks: int, seed: int = 0, width_in: int = WIDTH, width_out: int = WIDTH, **form) -> AdapterBank:
    """Experts named by place."""
    bank = AdapterBank(width_in, width_out, **form)
    for i, rank in enumerate(ranks):
        bank.add(f"expert{i}", rank, init_weights=False)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in bank.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)
    return bank


class Given(Router):
    """Routes as it was told."""

    def __init__(self, experts: list[str], routing: Routing) -> None:
        super().__init__(WIDTH, experts)
        self.routing = routing

    def forward(self, tokens: Tensor, context: ForwardContext) -> Routing:
        return self.routing


def single(rank: int, seed: int = 0, insertion: str = "parallel", **form) -> Mixture:
    return Mixture(SingleRouter(WIDTH, ["expert0"]), bank_of(rank, seed=seed, **form), insertion)


def routed(routing: Routing, *ranks: int, seed: int = 0) -> Mixture:
    bank = bank_of(*ranks, seed=seed)
    return Mixture(Given(bank.names, routing), bank)
