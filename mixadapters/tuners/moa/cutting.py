"""Experts that leave single modules, and those that stand for others there: what surgery asks of a mixture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from mixadapters.core.bank import Expert
from mixadapters.core.fields import check_integer, check_switches
from mixadapters.core.names import UNNAMED, of_active
from mixadapters.core.registry import nearest
from mixadapters.routers.counts import CountsRouter
from mixadapters.tuners.moa.config import MoAConfig
from mixadapters.tuners.moa.layer import ExpertMixture, FollowRouter
from mixadapters.tuners.moa.verbs import ExpertVerbs, refuse_all_off
from mixadapters.tuners.sources import key_of, same_module
from mixadapters.tuners.surgery import SurgeryVerbs


class ExpertCutting(SurgeryVerbs, ExpertVerbs):
    """Part of MoA's tuner."""

    @of_active
    @torch.no_grad()
    def keep_experts(
        self, kept: Mapping[str, Sequence[str]], *, renormalize: bool = True, adapter_name: str = UNNAMED
    ) -> None:
        """As `CuttingVerbs.keep_experts`. Make optimizers anew afterwards.

        An arm of a router leaves it once no module under it has the expert. Where the router cannot lose arms, or with
        `renormalize` False, an arm without expert takes what it is given.
        """
        check_switches(renormalize=renormalize)
        config, mixtures = self._ready(kept, adapter_name)
        lost = {path: self._lost(path, mixtures[path], names) for path, names in kept.items()}
        refuse_all_off(config, mixtures, lambda path: lost.get(path, ()))
        gone = self._arms_gone(mixtures, lost)
        for path, names in gone.items():
            router = mixtures[path].router
            if names and renormalize and (router.fixed_experts is not None or not hasattr(router, "remove_expert")):
                reason = router.fixed_experts or "it has no remove_expert"
                raise ValueError(
                    f"{type(router).__name__} at {path!r} cannot lose the experts {names}: {reason}. Preserve their "
                    "mass (renormalize=False): then rows that choose them get nothing"
                )
        self._name_experts(config, list(mixtures))
        for path, names in lost.items():
            for name in names:
                self._take(config, path, name, mixtures[path], None)
        for path, names in gone.items():
            router = mixtures[path].router
            if router.fixed_experts is None and hasattr(router, "remove_expert"):
                for name in names:
                    self._remove_arm(config, router, name, renormalize, mixtures)
        self._forget(config, mixtures)
        self.arms_changed(adapter_name)
        self._settle(adapter_name)

    @of_active
    @torch.no_grad()
    def share_experts(self, stands: Mapping[str, Mapping[str, str]], adapter_name: str = UNNAMED) -> None:
        """As `CuttingVerbs.share_experts`. Make optimizers anew afterwards."""
        config, mixtures = self._ready(stands, adapter_name)
        for path, moved in stands.items():
            have = mixtures[path].routed_names
            for name, other in moved.items():
                if name not in have or other not in have or other in moved:
                    raise ValueError(
                        f"stands={dict(moved)} at {path!r} must name experts that are there, {have}, and no expert "
                        "that goes may stand for another"
                    )
        refuse_all_off(config, mixtures, lambda path: stands.get(path, {}))
        self._name_experts(config, list(mixtures))
        for path, moved in stands.items():
            for name, other in moved.items():
                self._take(config, path, name, mixtures[path], other)
        self._settle(adapter_name)

    @of_active
    @torch.no_grad()
    def resize_expert(self, path: str, name: str, rank: int, adapter_name: str = UNNAMED) -> None:
        """As `CuttingVerbs.resize_expert`. Make optimizers anew afterwards."""
        config, mixtures = self._ready({path: [name]}, adapter_name)
        mixture = mixtures[path]
        if name not in mixture.routed_names:
            raise ValueError(f"unknown expert {name!r} at {path!r}; have {mixture.routed_names}")
        check_integer("rank", rank, least=1)
        self._name_experts(config, list(mixtures))
        self._spell_out(config, name, mixtures)
        spec, bank = config.experts[name], mixture.bank
        old, scale = bank.experts[name], bank.scales.get(name, bank.scale)
        spec["ranks"] = {**spec["ranks"], key_of(spec["ranks"], path): rank}
        new = Expert(bank, rank, True, up_bias=old.up.bias is not None)
        new.to(old.up.weight.device, old.up.weight.dtype).requires_grad_(old.up.weight.requires_grad)
        bank.experts[name] = new
        if scale is not None:  # what the config would give to another rank is not what the others have
            bank.scales[name] = scale

    def _ready(self, paths: Mapping[str, Any], adapter_name: str) -> tuple[MoAConfig, dict[str, ExpertMixture]]:
        """The config and the mixtures by path. Raises ValueError where nothing may be cut now."""
        config = self._moa(adapter_name)
        hosts = {host.path: host for host in self.placed(adapter_name)}
        for path in paths:
            if path not in hosts:
                raise ValueError(f"{path!r} has no experts of {adapter_name!r}.{nearest(path, list(hosts))}")
            if adapter_name in hosts[path].merged_adapters:
                raise ValueError(
                    f"adapter {adapter_name!r} is merged into {path!r}: unmerge it first (unmerge_adapter)"
                )
        if config.segments > 1:
            raise ValueError(
                f"segments={config.segments}: pieces of one expert cannot leave by themselves; use remove_expert, or "
                "a mixture without segments"
            )
        self.refuse_in_blocks("cutting experts", adapter_name)
        return config, dict(self._mixtures(adapter_name))

    def _lost(self, path: str, mixture: ExpertMixture, kept: Sequence[str]) -> list[str]:
        have = mixture.routed_names
        if not kept or len(set(kept)) < len(kept) or set(kept) - set(have):
            raise ValueError(f"kept={list(kept)} at {path!r} must name different experts that are there, {have}")
        return [name for name in have if name not in kept]

    def _arms_gone(
        self, mixtures: Mapping[str, ExpertMixture], lost: Mapping[str, Sequence[str]]
    ) -> dict[str, list[str]]:
        """By the path of a router that decides: the arms that have no expert any more at any of its modules."""
        stay: dict[str, set[str]] = {}
        gone: dict[str, set[str]] = {}
        for path, mixture in mixtures.items():
            leader = mixture.router.key.path if isinstance(mixture.router, FollowRouter) else path
            for arm in mixture.expert_names:
                if (holder := mixture.holder_of(arm)) is not None:
                    (gone if holder in lost.get(path, ()) else stay).setdefault(leader, set()).add(arm)
        return {path: [n for n in mixtures[path].router.experts if n in names - stay.get(path, set())]
                for path, names in gone.items()}  # fmt: skip

    def _take(self, config: MoAConfig, path: str, name: str, mixture: ExpertMixture, stands: str | None) -> None:
        """Take an expert's weights from a module. Its rows, and those it stood for, go to `stands`, or to none."""
        self._spell_out(config, name, dict(self._mixtures(mixture.key.adapter)))
        mixture.bank.remove(name)
        spec = config.experts[name]
        key = key_of(spec["ranks"], path)
        for entry in ("ranks", "scales"):
            spec[entry] = {module: value for module, value in spec[entry].items() if module != key}
        if "biases" in spec:
            spec["biases"] = [module for module in spec["biases"] if not same_module(module, path)]
        for arm in [name, *(arm for arm, other in mixture.stands.items() if other == name)]:
            mixture.stands[arm] = stands
            config.experts[arm]["same_as"] = {**config.experts[arm].get("same_as", {}), path: stands}

    def _spell_out(self, config: MoAConfig, name: str, mixtures: Mapping[str, ExpertMixture]) -> None:
        """Have the config say at which modules an expert is, with which rank and scale."""
        spec = config.experts[name]
        if "ranks" in spec:
            return
        held = {path: m.bank for path, m in mixtures.items() if name in m.bank.experts}
        spec["ranks"] = {path: bank.experts[name].rank for path, bank in held.items()}
        spec["scales"] = {path: float(bank.scales.get(name, bank.scale) or 1.0) for path, bank in held.items()}

    def _remove_arm(
        self, config: MoAConfig, router: Any, name: str, renormalize: bool, mixtures: Mapping[str, ExpertMixture]
    ) -> None:
        """Take an arm that has no expert from a router, and from what the config and its modules say of it."""
        if renormalize:
            self._choose_among(config, router, len(router.arms) - 1)
        assert not isinstance(router, CountsRouter) or router.first is router  # of MoA, one for the whole model
        router.remove_expert(name, renormalize)
        for path, mixture in mixtures.items():
            deciding = mixture.router.__dict__.get("leader", mixture.router)
            if deciding is router and name in mixture.stands:
                del mixture.stands[name]
                same = config.experts[name].get("same_as", {})
                config.experts[name]["same_as"] = {module: other for module, other in same.items() if module != path}

    def _forget(self, config: MoAConfig, mixtures: Mapping[str, ExpertMixture]) -> None:
        """Drop from the config the experts that are nowhere, and empty entries."""
        arms = {arm for mixture in mixtures.values() for arm in mixture.expert_names}
        for name in list(config.experts):
            if not config.experts[name].get("same_as", True):
                del config.experts[name]["same_as"]
            if name not in arms:
                del config.experts[name]
        config.expert_order = list(config.experts)
