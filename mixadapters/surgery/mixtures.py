"""The experts of our mixtures, of any method and behind any router."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mixadapters.core.bank import Weights, keeps
from mixadapters.core.hooks import root_of
from mixadapters.core.mixture import Mixture
from mixadapters.core.routing import Routing
from mixadapters.routers.arms import ArmSurgery
from mixadapters.routers.hash import HashRouter
from mixadapters.routers.modality import ModalityRouter
from mixadapters.routers.recurrent import RecurrentRouter
from mixadapters.routers.task import TaskRouter
from mixadapters.routers.tree import TreeRouter
from mixadapters.surgery.blocks import type_of
from mixadapters.surgery.function import expert_norms
from mixadapters.surgery.view import ExpertLayer, Routed, Watcher, check_map, check_model, check_order, expert_output
from mixadapters.surgery.watching import joined_logits

DENSE_AT_MOST = 8  # experts for each that a row uses, up to which those of all rows are computed together


def mixture_layers(model: nn.Module, adapter: str | None = None) -> list[ExpertLayer]:
    """The mixtures of a model's adapters, or of one; those whose router has nothing to decide are left out.

    Raises:
        ValueError: no such adapter.
    """
    check_model(model)
    found = [tuner for tuner in model.modules() if callable(getattr(tuner, "mixtures", None))]
    tuner: Any = found[0] if found else None
    have = list(tuner.peft_config) if tuner is not None else []
    if adapter is not None and tuner is None and hasattr(model, "peft_config"):
        types = sorted({getattr(config.peft_type, "value", config.peft_type) for config in model.peft_config.values()})
        raise ValueError(
            f"adapter={adapter!r}: the model's adapters are of {types}, which has no routed experts; put several side "
            "by side by MoAConfig(experts={...})"
        )
    if adapter is not None and adapter not in have:
        raise ValueError(f"adapter={adapter!r} is unknown; have {have}")
    mixtures = [] if tuner is None else tuner.mixtures().values()
    return [MixtureExperts(tuner, mixture) for mixture in mixtures if adapter in (None, mixture.key.adapter)]


class MixtureExperts(ExpertLayer):
    """The experts of one mixture. Those that have nothing here, and shared ones, are none of its."""

    kind = "bank"

    def __init__(self, tuner: Any, mixture: Mixture) -> None:
        self.tuner, self.mixture = tuner, mixture
        self.path, self.adapter, self.stack = mixture.key.path, mixture.key.adapter, mixture.stack

    @property
    def key(self) -> str:
        step = self.mixture.key.step
        others = [k for k in self.tuner.mixtures() if k[:4] == self.mixture.key[:4]]
        return f"{self.path}/{self.adapter}" if len(others) == 1 else f"{self.path}/{self.adapter}/{step}"

    @property
    def router(self) -> str:
        router: Any = self.mixture.router
        follows = "leader" in router.__dict__  # the key is where that publishes
        return f"{router.key.path}/{router.key.adapter}" if follows else self.key

    # --- what it is -------------------------------------------------------------------------------------------

    @property
    def places(self) -> list[int]:
        """The number in the bank of each expert."""
        return sorted({number for number in self.mixture.bank_numbers() if number >= 0})

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.mixture.bank.names[place] for place in self.places)

    @property
    def form(self) -> str:
        bank = self.mixture.bank
        return f"{type_of(root_of(self.tuner))}: {bank.in_features} to {bank.out_features}"

    @property
    def units(self) -> tuple[int, ...]:
        bank = self.mixture.bank
        return tuple(bank.experts[name].rank for name in self.names) if keeps(bank) else ()

    @property
    def top_k(self) -> int | None:
        router = deciding_router(self.mixture.router)
        if isinstance(router, (HashRouter, TaskRouter, ModalityRouter)):
            return 1
        k = None if isinstance(router, TreeRouter) else getattr(router, "k", None)
        return None if k is None else int(k)

    @property
    def width(self) -> int:
        return self.mixture.bank.in_features

    @property
    def activation(self) -> str:
        return self.mixture.bank.activation

    @property
    def competes(self) -> bool:  # type: ignore[override]
        router = deciding_router(self.mixture.router)
        whole = getattr(router, "norm_topk_prob", False) or getattr(router, "scoring_func", "softmax") == "sigmoid"
        return bool(getattr(router, "competes", False)) and not whole

    # --- weights ----------------------------------------------------------------------------------------------

    def weights(self, e: int) -> Weights:
        """Raises ValueError where the experts' weights are computed, and no parameters, or lie in other processes."""
        self.mixture.bank.refuse_change("surgery")
        if not keeps(self.mixture.bank):
            raise ValueError(f"the experts at {self.key!r} compute their weights, so none can be read or written")
        bank, name = self.mixture.bank, self.names[e]
        held = bank.experts[name].weights(bank.scales.get(name, bank.scale))
        parts = {part: value.detach() for part, value in held._asdict().items() if isinstance(value, Tensor)}
        norm = None if held.norm is None else (held.norm[0].detach(), held.norm[1].detach())
        return held._replace(**parts, norm=norm)

    @torch.no_grad()
    def set_weights(self, e: int, weights: Weights) -> None:
        """As `ExpertLayer.set_weights`. Another rank is taken; a scale other than the expert's goes into `up`."""
        self.refuse_merged()
        mine = self.weights(e)
        rank = weights.down.shape[0]
        if rank != mine.down.shape[0]:
            self._check(mine, weights, rank)
            self.tuner.resize_expert(self.path, self.names[e], rank, self.adapter)
            mine = self.weights(e)
        self._check(mine, weights, rank)
        factor = weights.scale / mine.scale
        moved = weights if isinstance(factor, float) and factor == 1 else weights._replace(
            up=weights.up * factor, b_up=None if weights.b_up is None else weights.b_up * factor)  # fmt: skip
        for old, new in zip(mine.tensors(), moved.tensors(), strict=True):
            old.copy_(new)

    def _check(self, mine: Weights, weights: Weights, rank: int) -> None:
        """Raise ValueError where `weights`, of this rank, have other parts or widths than the layer's experts."""
        old, new = mine.down.shape[0], rank
        shapes = [tuple(new if n == old and i == ax else n for i, n in enumerate(t.shape)) for t, ax in _ranked(mine)]
        given = [tuple(t.shape) for t, _ in _ranked(weights)]
        if shapes != given:
            raise ValueError(f"weights of shapes {given} do not fit the experts at {self.key!r}, whose are {shapes}")

    @torch.no_grad()
    def run(self, e: int, x: Tensor) -> Tensor:
        return expert_output(self.weights(e), self.activation, x)

    def router_rows(self) -> Tensor | None:
        router = deciding_router(self.mixture.router)
        if not isinstance(router, ArmSurgery) or isinstance(router, TreeRouter):
            return None
        numbers = self.mixture.bank_numbers()
        rows = router.output.weight.detach()
        return rows[[numbers.index(place) for place in self.places]]

    @property
    def router_entries(self) -> int:
        router: Any = self.mixture.router
        return 0 if "leader" in router.__dict__ else sum(p.numel() for p in router.parameters() if p.dim() == 2)

    # --- cutting ----------------------------------------------------------------------------------------------

    def keep(self, order: Sequence[int], preserve_mass: bool = False) -> None:
        """As `ExpertLayer.keep`, with all layers that go by the same router. Experts stay in the config's order."""
        self.check_keep(order, preserve_mass)
        lost = {name for e, name in enumerate(self.names) if e not in order}
        together = [layer for layer in mixture_layers(self.tuner, self.adapter) if layer.router == self.router]
        keep = {layer.path: [n for n in layer.names if n not in lost] for layer in together}
        self.tuner.keep_experts(keep, renormalize=not preserve_mass, adapter_name=self.adapter)

    def check_keep(self, order: Sequence[int], preserve_mass: bool = False) -> None:
        kept = check_order(self, order)
        if kept != sorted(kept):
            raise ValueError(
                f"order={list(order)} at {self.key!r}: experts of an adapter stand in the order of its config; keep "
                f"{sorted(kept)}"
            )
        fixed = deciding_router(self.mixture.router).fixed_experts
        if len(kept) < len(self.names) and not preserve_mass and fixed is not None:
            raise ValueError(f"the router at {self.key!r} cannot lose experts: {fixed}; or preserve their mass")

    def assign(self, expert_map: Sequence[int]) -> None:
        stands, names = check_map(self, expert_map), self.names
        moved = {names[e]: names[other] for e, other in enumerate(stands) if e != other}
        self.tuner.share_experts({self.path: moved}, self.adapter)

    # --- watching ---------------------------------------------------------------------------------------------

    def refuse_merged(self) -> None:
        """Raise ValueError where the frozen layer computes what the experts did: nothing would come by them."""
        for host in self.tuner.hosts():
            if host.path == self.path and self.adapter in host.merged_adapters:
                raise ValueError(
                    f"adapter {self.adapter!r} is merged into {self.path!r}: unmerge it first (unmerge_adapter)"
                )

    @contextmanager
    def watch(self, callback: Watcher, outputs: bool = False) -> Iterator[None]:
        self.refuse_merged()

        def tell(read: Tensor, routing: Routing, mask: Tensor | None) -> None:
            callback(self._routed(read.detach(), routing, mask, outputs))

        self.mixture.watchers.append(tell)
        try:
            yield
        finally:
            self.mixture.watchers.remove(tell)

    def _routed(self, read: Tensor, routing: Routing, mask: Tensor | None, outputs: bool) -> Routed:
        """A routing, which numbers what the router chooses among, in terms of the experts here."""
        place_of = {place: e for e, place in enumerate(self.places)}
        own = [place_of.get(n, -1) for n in self.mixture.bank_numbers()]
        numbers, arms, count = torch.tensor(own, device=read.device), len(own), len(read)
        indices = routing.indices
        chosen = torch.arange(arms, device=read.device).expand(count, -1) if indices is None else indices.long()
        indices = torch.where(chosen >= 0, numbers[chosen.clamp_min(0)], -1)
        weights = routing.weights
        weights = torch.ones_like(indices, dtype=read.dtype) if weights is None else weights.detach()
        logits, probs = routing.logits, routing.probs
        if logits is None or logits.shape[1] < arms or isinstance(deciding_router(self.mixture.router), TreeRouter):
            logits = None if probs is None else probs.float().clamp_min(1e-20).log()
        if logits is not None:
            logits = logits.detach()[:, :arms].float()
            logits = logits if own == list(range(arms)) else joined_logits(logits, numbers, len(self.places))
        each = None
        if outputs:
            each = _Outputs(self, read, indices)
        return Routed(
            read, indices, weights, logits, None if probs is None else probs.detach(), mask,
            None if each is None else each.norms, None if each is None else each.outputs,
        )  # fmt: skip


class _Outputs:
    """What each expert makes of the rows that use it, when it is asked for."""

    def __init__(self, layer: MixtureExperts, read: Tensor, indices: Tensor) -> None:
        self.layer, self.read, self.indices = layer, read, indices

    def _by_expert(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Rows and slots that use an expert, and (n, M) what it makes of them."""
        for e in range(len(self.layer.names)):
            rows, slots = (self.indices == e).nonzero(as_tuple=True)
            if len(rows):
                yield rows, slots, self.layer.run(e, self.read[rows])

    @torch.no_grad()
    def norms(self) -> Tensor:
        every = [self.layer.weights(e) for e in range(len(self.layer.names))]
        if len(every) <= DENSE_AT_MOST * self.indices.shape[1] and len({w.down.shape[0] for w in every}) == 1:
            used, norms = self.indices >= 0, expert_norms(every, self.layer.activation, self.read)
            return torch.where(used, norms.gather(1, self.indices.clamp_min(0)), 0.0)
        found = torch.zeros(self.indices.shape, device=self.read.device)
        for rows, slots, output in self._by_expert():
            found[rows, slots] = output.float().norm(dim=-1)
        return found

    def outputs(self) -> Tensor:
        found = self.read.new_zeros(*self.indices.shape, self.layer.mixture.bank.out_features)
        for rows, slots, output in self._by_expert():
            found[rows, slots] = output.to(found.dtype)
        return found


def deciding_router(router: Any) -> Any:
    """The router that decides: of another layer, or inside one that only reads for it."""
    router = router.__dict__.get("leader", router)
    return router.base if isinstance(router, RecurrentRouter) else router


def _ranked(weights: Weights) -> list[tuple[Tensor, int]]:
    """The tensors of an expert, and the axis of each that is the rank; -1 where none is."""
    parts = [(weights.down, 0), (weights.up, 1), (weights.b_down, 0), (weights.b_up, -1), (weights.gate, 0),
             (weights.b_gate, 0), *((t, -1) for t in weights.norm or ())]  # fmt: skip
    return [(t, axis) for t, axis in parts if t is not None]
