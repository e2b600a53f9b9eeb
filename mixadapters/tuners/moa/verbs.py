"""Experts that come and go in a mixture that exists, and those that leave as adapters of their own."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from mixadapters.core.fields import check_switches
from mixadapters.core.names import UNNAMED, check_known, of_active
from mixadapters.core.routes import row_numbers
from mixadapters.tuners.fitting import FittingVerbs
from mixadapters.tuners.gathering import Gathered
from mixadapters.tuners.moa.config import MoAConfig, check_experts, refuse_while_standing
from mixadapters.tuners.moa.layer import ExpertMixture, FollowRouter
from mixadapters.tuners.moa.sources import gather
from mixadapters.tuners.moa.weights import ExpertWeights
from mixadapters.tuners.posterior import PosteriorVerbs
from mixadapters.tuners.sources import check_new

CHANGING = ("experts", "num_experts", "expert_order", "target_modules")  # fields that coming and going changes
COPIED = ("ranks", "scales", "biases", "same_as")  # of an entry: a copy has no source of its own
NEW_ARM_SHARE = 0.05  # of the weight that an expert added later starts with


class ExpertVerbs(FittingVerbs, PosteriorVerbs, ExpertWeights):
    """Part of MoA's tuner. The model says where experts go and what they are made of."""

    _plan: Any
    _gathered: dict[str, Gathered]

    # --- what the model says ---------------------------------------------------------------------

    def chosen(self, config: MoAConfig, arms: int) -> int:
        raise NotImplementedError

    def expert_widths(self, config: MoAConfig, path: str) -> tuple[int, int]:
        raise NotImplementedError

    def _make_plan(self, config: MoAConfig, adapter_name: str, paths: list[str]) -> Any:
        raise NotImplementedError

    def _numbered_at(self, config: MoAConfig, path: str) -> dict[str, int]:
        raise NotImplementedError

    def _experts_at(self, config: MoAConfig, path: str) -> dict[str, int]:
        raise NotImplementedError

    def _expert_options(self, config: MoAConfig, path: str, name: str, rank: int) -> dict[str, Any]:
        raise NotImplementedError

    @of_active
    def expert_ids(self, names: list[str], adapter_name: str = UNNAMED) -> Tensor:
        """(B,) numbers for the batch field `expert_ids`, which routes each row to an expert; "__base__" is none."""
        config = self._moa(adapter_name)
        return row_numbers(names, [piece for name in config.all_names() for piece in config.pieces(name)], "expert")

    def row_arms(self, adapter_name: str) -> list[str]:
        config = self._moa(adapter_name)
        if config.segments > 1:
            raise ValueError(f"segments={config.segments}: a piece of an expert is no arm of its own")
        return config.all_names()

    # --- coming and going ------------------------------------------------------------------------

    @of_active
    @torch.no_grad()
    def add_expert(
        self,
        name: str,
        source: str | dict[str, Any] | None = None,
        *,
        r: int | None = None,
        like: str | None = None,
        share: float = NEW_ARM_SHARE,
        adapter_name: str = UNNAMED,
    ) -> None:
        """Add an expert, new (zero), trained, or a copy of another. The others and their logits do not change.

        Its arm starts with about `share` of the weight in a learned router. With `like` it begins with the modules,
        ranks and weights of that expert, from which it is then trained further. Make optimizers anew afterwards.

        Raises:
            ValueError: the name is taken, the source does not fit, there is no such expert to be like, the router
                cannot gain an arm, or share is not between 0 and 1.
        """
        config = self._moa(adapter_name)
        others = self.peft_config.keys() - {adapter_name}
        check_new("expert", name, config.all_names(), others, share=share, r=r, source=source, like=like)
        self._require(adapter_name, "add_expert")
        if like is not None:
            check_experts([name], from_file=False)
            self._add_copy(name, like, share, adapter_name)
        else:
            self._add_new(name, source, r, share, adapter_name)
        self.fit_router(adapter_name, missing_ok=True)
        self._settle(adapter_name)

    def _add_new(self, name: str, source: Any, r: int | None, share: float, adapter_name: str) -> None:
        """An expert of zeros, or one that is gathered from a source."""
        config = self._moa(adapter_name)
        spec = check_experts({name: source}, from_file=False)[name]
        found = gather(self, config, name, spec) if "source" in spec else None
        paths = [path for path, _ in self._mixtures(adapter_name)]
        if found is not None:
            spec |= {"ranks": found.ranks, "scales": found.scales}
            spec |= {"biases": found.biases} if config.expert_type == "lora" and found.biases else {}
        elif r is not None or isinstance(config.num_experts, dict):
            ranks = {path: r or self.rank_at(config, path, config.r) for path in paths}
            spec |= {"ranks": ranks, "scales": {path: config.scale_at(path, rank) for path, rank in ranks.items()}}
        self._add(name, spec, share, adapter_name)
        if found is not None:
            self.fill(adapter_name, name, found)

    def _add_copy(self, name: str, like: str, share: float, adapter_name: str) -> None:
        """A new expert with the modules, ranks and weights of another."""
        config = self._moa(adapter_name)
        self._name_experts(config, [path for path, _ in self._mixtures(adapter_name)])
        spec = {key: copy.copy(value) for key, value in config.experts[like].items() if key in COPIED}
        self._add(name, spec, share, adapter_name)
        for _, mixture in self._mixtures(adapter_name):
            for new, piece in zip(config.pieces(name), config.pieces(like), strict=True):
                if piece in mixture.bank.experts:
                    mixture.bank.copy(new, piece)

    def _add(self, name: str, spec: dict[str, Any], share: float, adapter_name: str) -> None:
        """A new expert of this entry in the config: into the config, the routers and the banks."""
        config = self._moa(adapter_name)
        paths = [path for path, _ in self._mixtures(adapter_name)]
        before = self._leaders(adapter_name)
        old = {field: copy.copy(getattr(config, field)) for field in CHANGING}
        self._name_experts(config, paths)
        config.experts[name] = spec
        try:
            self._widen(config, name, [path for path in spec.get("ranks", ()) if path not in paths])
            where = {*paths, *spec.get("ranks", ())}
            plan = self._make_plan(config, adapter_name, [p for p in self.places() if p in where])
            _refuse_other_leaders(plan, before)
        except ValueError:
            for field, value in old.items():
                setattr(config, field, value)
            raise
        config.expert_order = list(config.experts)
        self._insert(config, adapter_name, name, plan, before, share)

    def _widen(self, config: MoAConfig, name: str, paths: list[str]) -> None:
        """Add modules to those that the config adapts. Raises ValueError where it leaves them out on purpose."""
        if paths:
            old = config.target_modules
            exact = "|".join(re.escape(path) for path in paths)
            config.target_modules = f"(?:{old})|{exact}" if isinstance(old, str) else {*(old or ()), *paths}
        for path in paths:
            if not self._check_target_module_exists(config, path):
                raise ValueError(
                    f"expert {name!r} adapts {path!r}, which exclude_modules or layers_to_transform leave out; make a "
                    "mixture without these fields"
                )

    def _insert(
        self, config: MoAConfig, adapter_name: str, name: str, plan: Any, before: dict[str, Any], share: float
    ) -> None:
        """Its arm in every router of its scopes, and its weights at every module where it has some."""
        pieces = config.pieces(name)
        for leader, router in before.items():
            for piece in pieces:
                if piece in plan.experts[leader]:
                    router.add_expert(piece, share / len(pieces))
        self._plan, plan.routers = plan, dict(before)
        for path in plan.leader:
            ranks = {piece: rank for piece, rank in self._experts_at(config, path).items() if piece in pieces}
            host = self.host_at(path, missing_ok=True)
            if not ranks:
                continue
            if host is None or adapter_name not in host.adapters:
                self.place(config, adapter_name, path)
                continue
            mixture: ExpertMixture = host.adapters[adapter_name]
            like = next(mixture.bank.parameters())
            for piece, rank in ranks.items():
                place = len(mixture.bank.names) - mixture.shared
                options = self._expert_options(config, path, name, rank)
                mixture.bank.add(piece, rank, config.init_weights, place=place, **options)
                mixture.bank.experts[piece].to(like.device, like.dtype)

    @of_active
    def remove_expert(self, name: str, *, renormalize: bool = False, adapter_name: str = UNNAMED) -> None:
        """Remove an expert and its weights. Make optimizers anew afterwards.

        Where the router's weights compete, what it gave to this expert goes to a null arm, so that those of the others
        do not change; with `renormalize` it is shared out among them.

        Raises:
            ValueError: there is no such expert, it is the last, the router cannot lose an arm, or other layers share
                the router of a layer that has no other expert.
        """
        check_switches(renormalize=renormalize)
        config = self._moa(adapter_name)
        names = config.all_names()
        check_known("expert", name, names)
        if len(names) == 1:
            raise ValueError(f"expert {name!r} is the only one; delete the adapter instead")
        self._require(adapter_name, "remove_expert")
        refuse_while_standing(config, name)
        paths = [path for path, _ in self._mixtures(adapter_name)]
        pieces = config.pieces(name)
        _refuse_needed(name, pieces, dict(self._mixtures(adapter_name)))
        refuse_all_off(config, dict(self._mixtures(adapter_name)), lambda path: pieces)
        self._name_experts(config, paths)
        for path, mixture in list(self._mixtures(adapter_name)):
            for piece in pieces:
                if not isinstance(mixture.router, FollowRouter) and piece in mixture.router.experts:
                    if renormalize:
                        self._choose_among(config, mixture.router, len(mixture.router.arms) - 1)
                    mixture.router.remove_expert(piece, renormalize)
                mixture.stands.pop(piece, None)
                if piece in mixture.bank.experts:
                    mixture.bank.remove(piece)
            _note_null_arms(config, path, mixture.router)
            if len(mixture.bank.names) == mixture.shared:
                self._take_out(adapter_name, path)
                config.null_arms.pop(path, None)
        del config.experts[name]
        config.expert_order = list(config.experts)
        self.fit_router(adapter_name, missing_ok=True)
        self._settle(adapter_name)

    def _take_out(self, adapter_name: str, path: str) -> None:
        host = self.host_at(path)
        del host.adapters[adapter_name]
        if not host.adapters:
            self._remove_host(host)

    def _name_experts(self, config: MoAConfig, paths: list[str]) -> None:
        """Experts that were numbered have names of their own from now on."""
        if config.experts is not None:
            return
        named: dict[str, dict[str, Any]] = {name: {} for name in config.all_names()}
        if isinstance(config.num_experts, dict):
            for path in paths:
                for name, rank in self._numbered_at(config, path).items():
                    named[name].setdefault("ranks", {})[path] = rank
                    named[name].setdefault("scales", {})[path] = config.scale_at(path, rank)
        config.experts, config.num_experts = named, 8
        config.expert_order = list(config.experts)

    def _require(self, adapter_name: str, verb: str) -> None:
        self.refuse_in_blocks(verb, adapter_name)
        _require_verb(next(iter(self._leaders(adapter_name).values())), verb)

    def arms_changed(self, adapter_name: str) -> None:
        config = self._moa(adapter_name)
        for path, router in self._leaders(adapter_name).items():
            config.null_arms.pop(path, None)
            _note_null_arms(config, path, router)

    def _settle(self, adapter_name: str) -> None:
        """Number everything anew, and train what the stage trains."""
        config = self._moa(adapter_name)
        pieces = (piece for name in config.all_names() for piece in config.pieces(name))
        number_of = {piece: number for number, piece in enumerate(pieces)}
        for router in self._leaders(adapter_name).values():
            self._choose_among(config, router, len(router.arms))
        for _, mixture in self._mixtures(adapter_name):
            mixture.number()
            assert mixture.hard_routes is not None
            mixture.hard_routes.number([number_of[name] for name in mixture.expert_names], len(number_of))
        self.set_trainable(adapter_name)

    def _choose_among(self, config: MoAConfig, router: Any, arms: int) -> None:
        """As many experts per token as a router with so many arms has when it is loaded."""
        if getattr(router, "k", None) is not None and "k" in router.scheduled:
            router.set_option("k", self.chosen(config, arms))


def _note_null_arms(config: MoAConfig, path: str, router: Any) -> None:
    """Have the config say how many null arms removed experts have left in the router at `path`, if any."""
    if left := getattr(router, "null_arms", 0) - config.num_null_experts:
        config.null_arms[path] = left


def _refuse_other_leaders(plan: Any, before: dict[str, Any]) -> None:
    """A router stays at the first layer of its scope, also when the mixture is loaded again."""
    for path, leader in plan.leader.items():
        if leader not in before and any(plan.leader.get(old) == leader for old in before):
            raise ValueError(
                f"the new expert adapts {path!r}, which runs before the layer whose router it would share; make "
                "the mixture anew from all experts, or use router_scope='module'"
            )


def _require_verb(router: Any, verb: str) -> None:
    """Raise ValueError where a router cannot change its arms."""
    if router.fixed_experts is not None:
        raise ValueError(f"{verb}: {type(router).__name__} cannot: {router.fixed_experts}")
    if not hasattr(router, verb):
        raise ValueError(
            f"{verb} needs a router that can change its arms, and {type(router).__name__} has no {verb}; make a new "
            "mixture"
        )


def refuse_all_off(config: MoAConfig, mixtures: Mapping[str, ExpertMixture], leaving: Callable[[str], Any]) -> None:
    """Raise ValueError where those that stay at a module have all been switched off: such a mixture cannot be loaded.

    leaving: path -> the names of those that go there.
    """
    off = {tuple(place) for place in config.expert_overrides.get("off", ())}
    if not off:  # as in most mixtures, and `leaving` need not be asked
        return
    for path, mixture in mixtures.items():
        gone = leaving(path)
        stay = [name for name in mixture.routed_names if name not in gone]
        if stay and all((path, name) in off for name in stay):
            raise ValueError(
                f"{sorted(gone)} would leave {path!r} to {stay}, which override_experts has switched off: switch them "
                "on first (override_experts without arguments), or let another one go"
            )


def _refuse_needed(name: str, pieces: list[str], mixtures: dict[str, ExpertMixture]) -> None:
    """Raise ValueError where an expert is the only one of a layer whose router others share."""
    followed = {m.router.key.path for m in mixtures.values() if isinstance(m.router, FollowRouter)}
    for path, mixture in mixtures.items():
        if path in followed and set(mixture.bank.names) <= set(pieces):
            raise ValueError(
                f"expert {name!r} is the only one at {path!r}, whose router other layers share; make a mixture of "
                "the other experts instead"
            )
