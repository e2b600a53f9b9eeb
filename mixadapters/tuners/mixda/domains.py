"""Domains that come and go in a mixture that exists."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from copy import copy
from glob import escape
from typing import Any

import torch
from torch import Tensor

from mixadapters.core.adapter import Chain, Site
from mixadapters.core.fields import check_switches
from mixadapters.core.mixture import Mixture
from mixadapters.core.model import MixtureModel
from mixadapters.core.names import UNNAMED, check_known, of_active
from mixadapters.core.registry import nearest
from mixadapters.core.routes import row_numbers
from mixadapters.routers.counts import CountsRouter
from mixadapters.tuners.fitting import FittingVerbs
from mixadapters.tuners.mixda.config import MixDAConfig
from mixadapters.tuners.mixda.router import require_surgery
from mixadapters.tuners.posterior import PosteriorVerbs
from mixadapters.tuners.sources import check_new, same_module
from mixadapters.tuners.surgery import SurgeryVerbs

BY_MODULE = ("ranks", "scales", "biases")  # entries of a domain
NEW_ARM_SHARE = 0.05  # of the frozen arm's mass that a domain added later starts with


class DomainVerbs(FittingVerbs, PosteriorVerbs, SurgeryVerbs, MixtureModel):
    """Part of MixDA's tuner. The model says where domains go and what they are made of."""

    def domain_paths(self, config: MixDAConfig) -> list[str]:
        raise NotImplementedError

    def bank_widths(self, config: MixDAConfig, path: str) -> tuple[int, int]:
        raise NotImplementedError

    def new_ranks(self, config: MixDAConfig, rank: int | None = None, beside: Collection[str] = ()) -> dict[str, int]:
        raise NotImplementedError

    def mixture(self, config: MixDAConfig, site: Site, ranks: dict[str, int]) -> Mixture:
        raise NotImplementedError

    def read(self, config: MixDAConfig, name: str, spec: dict[str, Any]) -> dict[str, dict[str, Tensor]]:
        raise NotImplementedError

    def new_entry(self, config: MixDAConfig, ranks: dict[str, int]) -> dict[str, Any]:
        raise NotImplementedError

    def widen(self, config: MixDAConfig, name: str, paths: Iterable[str]) -> None:
        raise NotImplementedError

    @torch.no_grad()
    def fill(self, adapter_name: str, name: str, weights: dict[str, dict[str, Tensor]]) -> None:
        """Copy the weights of a gathered domain into its experts."""
        for path, tensors in weights.items():
            expert = self.host_at(path).adapters[adapter_name].domain.bank.experts[name]
            for key, parameter in expert.named_parameters():
                if parameter.is_meta:
                    raise ValueError("domains with a source need low_cpu_mem_usage=False")
                parameter.copy_(tensors[key])

    @of_active
    def domain_ids(self, names: list[str], adapter_name: str = UNNAMED) -> Tensor:
        """(B,) numbers for the batch field `domain_ids`, which routes each row to a domain; "__base__" is none."""
        return row_numbers(names, list(self.config_of(adapter_name).domains), "domain")

    def row_arms(self, adapter_name: str) -> list[str]:
        return list(self.config_of(adapter_name).domains)

    @of_active
    @torch.no_grad()
    def add_domain(
        self,
        name: str,
        source: str | dict[str, Any] | None = None,
        *,
        r: int | None = None,
        like: str | None = None,
        share: float = NEW_ARM_SHARE,
        adapter_name: str = UNNAMED,
    ) -> None:
        """Add a domain, new (zero), trained, or a copy of another, to a mixture. The others' weights do not change.

        A new one lies where the others do, unless `domain_layers` says where. With `like` it begins with the layers,
        ranks and weights of that domain, from which it is then trained further.

        Its arm takes `share` of what a softmax gate gives to the frozen layer (for a sigmoid gate, and at layers that
        had no gate: starts at `share`). So with combine="delta" a new domain leaves the output as it was. Make
        optimizers anew afterwards.

        Raises:
            ValueError: the name is taken, the source does not fit or comes with r, there is no such domain to be like,
                or share is not between 0 and 1.
        """
        config = self.config_of(adapter_name)
        require_surgery(config, "add_domain")
        self.refuse_in_blocks("add_domain", adapter_name)
        others_of_model = self.peft_config.keys() - {adapter_name}
        check_new("domain", name, list(config.domains), others_of_model, share=share, r=r, source=source, like=like)
        given = MixDAConfig(domains={name: source}, r=r, domain_type=config.domain_type)  # checks them
        spec = dict(given.domains[name])
        weights = self.read(config, name, spec) if "source" in spec else None
        if weights is not None and config.domain_type == "lora":
            self.widen(config, name, weights)
        elif like is not None:
            spec |= {entry: copy(config.domains[like][entry]) for entry in BY_MODULE if entry in config.domains[like]}
        elif weights is None:
            others = {module for other in config.domains.values() for module in other["ranks"]}
            spec |= self.new_entry(config, self.new_ranks(config, r, others if config.domain_layers is None else ()))
        config.domains[name] = spec
        config.domain_order = list(config.domains)
        for path, rank in spec["ranks"].items():
            self._add_expert(adapter_name, path, name, rank, share)
        if weights is not None:
            self.fill(adapter_name, name, weights)
        if like is not None:
            for _, mixture in self._mixtures(adapter_name):
                if like in mixture.bank.experts:
                    mixture.bank.copy(name, like)
        self.arms_changed(adapter_name)
        self._renumber(adapter_name)

    def _add_expert(self, adapter_name: str, path: str, name: str, rank: int, share: float) -> None:
        config = self.config_of(adapter_name)
        own = (p for adapter in self.placed(adapter_name).values() for p in adapter.parameters())
        dtype = next((p.dtype for p in own), None)
        host = self.host_at(path, missing_ok=True)
        new: Any
        if host is None or adapter_name not in host.adapters:
            self.place(config, adapter_name, path)
            host = self.host_at(path)
            new = host.adapters[adapter_name]
            new.domain.router.start_at(share)
        elif "domain" in (chain := host.adapters[adapter_name]).steps:
            chain.domain.bank.add(name, rank, config.init_weights, **config.expert_options(name, path))
            chain.domain.router.add_expert(name, share)
            new = chain.domain.bank.experts[name]
        else:
            site = self._site(config, adapter_name, host.get_base_layer(), path)
            new = self.mixture(config, site, {name: rank})
            new.router.start_at(share)
            host.adapters[adapter_name] = Chain(domain=new, **chain.steps)
            host.adapters[adapter_name].bind(site)
        device, base_dtype = host._get_base_layer_device_and_dtype(host.get_base_layer())
        new.to(device, dtype or base_dtype)

    @of_active
    def remove_domain(self, name: str, *, renormalize: bool = False, adapter_name: str = UNNAMED) -> None:
        """Remove a domain and its weights. Make optimizers anew afterwards.

        What a softmax gate gave to it goes to the frozen layer, so that the other domains' weights do not change; with
        `renormalize` it is shared out among all.

        Raises:
            ValueError: there is no such domain.
        """
        check_switches(renormalize=renormalize)
        config = self.config_of(adapter_name)
        check_known("domain", name, config.domains)
        require_surgery(config, "remove_domain")
        self.refuse_in_blocks("remove_domain", adapter_name)
        for path, mixture in list(self._mixtures(adapter_name)):
            if name in mixture.bank.experts:
                self._take_domain(config, path, mixture, name, renormalize, everywhere=True)
        self._forget_domains(config, [name], adapter_name)

    @of_active
    def keep_experts(
        self, kept: Mapping[str, Sequence[str]], *, renormalize: bool = True, adapter_name: str = UNNAMED
    ) -> None:
        """As `CuttingVerbs.keep_experts`, of domains. Make optimizers anew afterwards."""
        check_switches(renormalize=renormalize)
        config, mixtures = self.config_of(adapter_name), dict(self._mixtures(adapter_name))
        require_surgery(config, "remove_domain")
        self.refuse_in_blocks("cutting domains", adapter_name)
        lost: dict[str, list[str]] = {}
        for path, names in kept.items():
            have = mixtures[path].bank.names if path in mixtures else []
            if not names or len(set(names)) < len(names) or set(names) - set(have):
                raise ValueError(f"kept={list(names)} at {path!r} must name different domains that are there, {have}")
            lost[path] = [name for name in have if name not in names]
        stay = {name for path, m in mixtures.items() for name in m.bank.names if name not in lost.get(path, ())}
        for path, names in lost.items():
            for name in names:
                self._take_domain(config, path, mixtures[path], name, renormalize, everywhere=name not in stay)
        self._forget_domains(config, [name for name in config.domains if name not in stay], adapter_name)

    def _take_domain(
        self, config: MixDAConfig, path: str, mixture: Mixture, name: str, renormalize: bool, everywhere: bool
    ) -> None:
        """Take a domain's expert from one module, and its arm from the router there."""
        mixture.bank.remove(name)
        if isinstance(mixture.router, CountsRouter) and not everywhere:  # whose counts serve other modules
            mixture.router.experts.remove(name)
        else:
            mixture.router.remove_expert(name, renormalize)
        entry = config.domains[name]
        for by_module in (entry[key] for key in BY_MODULE if key in entry):
            for module in [m for m in by_module if same_module(m, path)]:
                if isinstance(by_module, list):
                    by_module.remove(module)
                else:
                    del by_module[module]
        if mixture.bank.names:
            config.null_arms[path] = getattr(mixture.router, "null_arms", 0)
        else:
            del self.host_at(path).adapters[mixture.key.adapter].domain
            config.null_arms.pop(path, None)

    def _forget_domains(self, config: MixDAConfig, names: Sequence[str], adapter_name: str) -> None:
        """Drop from the config the domains that are nowhere any more, and number the others anew."""
        config.null_arms = {path: count for path, count in config.null_arms.items() if count}
        for name in names:
            del config.domains[name]
        config.domain_order = list(config.domains)
        self.arms_changed(adapter_name)
        self._renumber(adapter_name)

    def arms_changed(self, adapter_name: str) -> None:
        config = self.config_of(adapter_name)
        null_arms = self.settle_counts(adapter_name, config.domains)
        if null_arms is not None:
            config.null_arms = null_arms

    def _renumber(self, adapter_name: str) -> None:
        number_of = {name: number for number, name in enumerate(self.config_of(adapter_name).domains)}
        for _, mixture in self._mixtures(adapter_name):
            assert mixture.hard_routes is not None
            mixture.hard_routes.number([number_of[name] for name in mixture.bank.names], len(number_of))
        stage, domain = self.stage.get(adapter_name), self.single_domain.get(adapter_name)
        if self.config_of(adapter_name).inference_mode:
            for adapter in self.placed(adapter_name).values():
                adapter.requires_grad_(False)
        elif stage is not None and number_of:
            self.set_stage(stage, adapter_name, domain if domain in number_of else None)

    # --- one domain of several ---------------------------------------------------------------------------------

    @of_active
    def set_stage(self, stage: str, adapter_name: str = UNNAMED, domain: str | None = None) -> None:
        """As every method's; with `domain` that domain alone trains.

        As long as the stage is set, rows to which the batch gives no `domain_ids` take that domain, past the gate.
        """
        super().set_stage(stage, adapter_name, domain)
        names = list(self.config_of(adapter_name).domains)
        for _, mixture in self._mixtures(adapter_name):
            assert mixture.hard_routes is not None
            mixture.hard_routes.usual = -1 if domain is None else names.index(domain)

    def patterns_of(self, stage: str, adapter_name: str, domain: str | None = None) -> tuple[str, ...]:
        config = self.config_of(adapter_name)
        if domain is None:
            return config.trained_in(stage)
        if stage != "domain":
            raise ValueError(f"domain={domain!r}: one domain trains alone in the stage 'domain', not in {stage!r}")
        if domain not in config.domains:
            raise ValueError(f"domain={domain!r} is unknown; have {list(config.domains)}."
                             f"{nearest(domain, config.domains)}")  # fmt: skip
        return (f"domain.bank.experts.{escape(domain)}.*",)

    def _mixtures(self, adapter_name: str) -> Iterator[tuple[str, Mixture]]:
        chains = self.placed(adapter_name).items()
        return ((host.path, chain.domain) for host, chain in chains if "domain" in chain.steps)
