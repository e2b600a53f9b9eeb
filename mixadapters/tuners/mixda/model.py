from __future__ import annotations

import re
from collections.abc import Collection
from copy import copy
from typing import Any

from torch import Tensor

from mixadapters.core.adapter import Adapter, Chain, Site
from mixadapters.core.bank import AdapterBank
from mixadapters.core.mixture import Mixture
from mixadapters.core.routes import HardRoutes
from mixadapters.core.sites import layer_index, stack_of
from mixadapters.routers import CountsRouter
from mixadapters.tuners.bottleneck.config import bottleneck_width, placement_roles
from mixadapters.tuners.bottleneck.model import bottleneck
from mixadapters.tuners.mixda.config import MixDAConfig
from mixadapters.tuners.mixda.domains import DomainVerbs
from mixadapters.tuners.mixda.forms import DomainForms
from mixadapters.tuners.mixda.lora import LORA_DOMAIN, LORA_RANK, LORA_TASK, LoRADomains, lora_task
from mixadapters.tuners.mixda.router import mixture_router
from mixadapters.tuners.sources import rank_of, same_module, warn_of_unused


class MixDAModel(LoRADomains, DomainVerbs, DomainForms):
    """The tuner of MixDA: where domain and task adapters lie, and what they are made of.

    What can be done with domains afterwards is in its bases.
    """

    fields = ("domain_ids", "prompt_mask")

    # --- sites ------------------------------------------------------------------------------------------------

    def domain_role(self, config: MixDAConfig) -> str:
        if config.domain_type == "lora":
            return LORA_DOMAIN
        return placement_roles("parallel", config.adapter_input, self.known_roles(config))[0]

    def task_roles(self, config: MixDAConfig) -> tuple[str, ...]:
        """Roles of the modules that take the task adapter."""
        if config.task_adapter in (None, "lora"):
            return () if config.task_adapter is None else (LORA_TASK,)
        known = self.known_roles(config)
        roles = placement_roles(config.task_adapter, "ffn_input", known)
        if config.domain_type == "bottleneck":  # those of the FFN share the domain adapters' module
            return tuple(self.domain_role(config) if role.startswith("ffn") else role for role in roles)
        # Not the whole FFN, in which LoRA may lie.
        return tuple("ffn_output" if role == "ffn" and "ffn_output" in known else role for role in roles)

    def roles(self, config: MixDAConfig) -> tuple[str, ...]:
        return tuple(dict.fromkeys((self.domain_role(config), *self.task_roles(config))))

    def taps(self, config: MixDAConfig) -> tuple[str, ...]:
        inputs = (config.gate_input, config.adapter_input if config.domain_type == "bottleneck" else None)
        reads_input = "ffn_input" in inputs or config.task_adapter == "parallel"
        return ("ffn_input",) if reads_input and "ffn_output" in self.roles(config) else ()

    def domain_paths(self, config: MixDAConfig) -> list[str]:
        """Modules that can hold domain adapters, by name."""
        chosen = [name for name in self.places() if self._check_target_module_exists(config, name)]
        if config.sites is None:
            return chosen
        return [n for n in chosen if re.fullmatch(config.sites[self.domain_role(config)], n)]

    def ranked(self, config: MixDAConfig) -> list[str]:
        return self.domain_paths(config)

    def new_ranks(self, config: MixDAConfig, rank: int | None = None, beside: Collection[str] = ()) -> dict[str, int]:
        """{module: rank} of a new domain. beside: the modules that it lies at; none: those that the config says."""
        paths = self.domain_paths(config)
        depth: dict[str, int] = {}  # of the whole model, whichever layers are chosen
        everywhere = copy(config)  # checked already: `replace` would check all domains once more
        everywhere.layers_to_transform = everywhere.layers_pattern = None
        for path in self.domain_paths(everywhere):
            stack = stack_of(path, self.model)
            depth[stack] = max(depth.get(stack, 0), (layer_index(path) or 0) + 1)
        chosen = {}
        for path in paths:
            index = layer_index(path)
            if beside:
                here = any(same_module(module, path) for module in beside)
            elif (config.domain_layers is None and self._chosen_by_user(config)) or index is None:
                here = True
            else:
                here = index in config.layers(depth[stack_of(path, self.model)])
            if here:
                width, _ = self.bank_widths(config, path)
                usual = LORA_RANK if config.domain_type == "lora" else bottleneck_width(width, config.reduction_factor)
                chosen[path] = self.rank_at(config, path, rank or config.r or usual)
        if not chosen:
            raise ValueError(
                f"domain_layers={config.domain_layers} and layers_to_transform={config.layers_to_transform} leave no "
                f"place for domain adapters; their sites are {self.domain_paths(config)}"
            )
        return chosen

    def _chosen_by_user(self, config: MixDAConfig) -> bool:
        """Whether `target_modules` says where new domains lie; LoRA lies in all layers in any case."""
        return config.sites is None or config.domain_type == "lora"

    def bank_widths(self, config: MixDAConfig, path: str) -> tuple[int, int]:
        """Widths in and out of domain adapters at `path`."""
        width_in, width_out = self._widths(config, self._unwrapped(path), path)
        tapped = config.sites is not None and config.adapter_input == "ffn_input" and bool(self.taps(config))
        return (width_out if tapped else width_in), width_out

    def _first_path(self, config: MixDAConfig) -> str | None:
        """The first module that has domain adapters: its router holds what serves those of all."""
        ranks = [spec["ranks"] for spec in config.domains.values()]
        return next((p for p in self.domain_paths(config) if any(rank_of(r, p) for r in ranks)), None)

    # --- injection --------------------------------------------------------------------------------------------

    def resolve(self, config: MixDAConfig, model_config: dict[str, Any]) -> None:
        self._gathered: dict[str, dict[str, dict[str, Tensor]]] = {}
        # Not of domain_layers, which says where those that add_domain makes lie beside gathered ones.
        warn_of_unused(config, config.domains, ("r", "reduction_factor", "lora_alpha"), "domain", "add_domain")
        if config.domain_type == "lora":
            for name, spec in config.domains.items():
                if "source" in spec:
                    self._gathered[name] = self.read(config, name, spec)
        if config.sites is None and "lora" in (config.domain_type, config.task_adapter):
            paths = {path for weights in self._gathered.values() for path in weights}
            config.sites = self.lora_sites(config, model_config.get("model_type", "custom"), paths)
            config.target_modules = None
        super().resolve(config, model_config)
        if config.sites is None and config.gate_input == "ffn_input" and config.adapter_input != "ffn_input":
            raise ValueError(
                "gate_input='ffn_input' with target_modules: there is no telling where the FFN's input is; pass "
                "sites={'ffn_output': ..., 'ffn_input': ...} instead, or leave gate_input=None"
            )

    def before_injection(self, config: MixDAConfig, adapter_name: str) -> None:
        new_ranks: dict[str, int] | None = None  # the same for all new domains
        for name, spec in config.domains.items():
            if "source" in spec and name not in self._gathered:
                self._gathered[name] = self.read(config, name, spec)
            elif "ranks" not in spec:
                new_ranks = self.new_ranks(config) if new_ranks is None else new_ranks
                spec |= self.new_entry(config, new_ranks)
        self._refuse_absent_modules(config)
        super().before_injection(config, adapter_name)

    def _refuse_absent_modules(self, config: MixDAConfig) -> None:
        """Refuse ranks of modules that take no domain adapter, and null arms of modules that have no gate."""
        paths = self.domain_paths(config)
        gated: set[str] = set()
        for name, spec in config.domains.items():
            here = {module: [path for path in paths if same_module(module, path)] for module in spec["ranks"]}
            if absent := [module for module, found in here.items() if not found]:
                raise ValueError(
                    f"domains[{name!r}]: ranks={spec['ranks']} name {absent}, which take no domain adapters; those "
                    f"that do are {paths}"
                )
            gated.update(path for found in here.values() for path in found)
        if absent := [m for m in config.null_arms if not any(same_module(m, path) for path in gated)]:
            raise ValueError(
                f"null_arms={config.null_arms} name {absent}, which have no gate; those that have are {sorted(gated)}"
            )

    def after_injection(self, config: MixDAConfig, adapter_name: str) -> None:
        super().after_injection(config, adapter_name)
        for name, weights in self._gathered.items():
            self.fill(adapter_name, name, weights)
        self._gathered = {}
        self.arms_changed(adapter_name)

    def build(self, config: MixDAConfig, site: Site) -> Adapter | None:
        steps: dict[str, Adapter] = {}
        ranks = {name: rank for name, spec in config.domains.items() if (rank := rank_of(spec["ranks"], site.path))}
        if ranks:
            steps["domain"] = self.mixture(config, site, ranks)
        if self._takes_task(config, site.path):
            steps["task"] = self.task(config, site)
        return Chain(**steps) if steps else None

    def _takes_task(self, config: MixDAConfig, path: str) -> bool:
        if config.sites is None:
            return config.task_adapter is not None
        return any(re.fullmatch(config.sites[role], path) for role in self.task_roles(config))

    def task(self, config: MixDAConfig, site: Site) -> Mixture:
        if config.task_adapter == "lora":
            return lora_task(config, site)
        tap = site.tap("ffn_input") if config.task_adapter == "parallel" else None
        task = bottleneck(config.task_config(), site, config.task_r or 0, tap)
        task.observes = False
        return task

    def mixture(self, config: MixDAConfig, site: Site, ranks: dict[str, int]) -> Mixture:
        tap = site.tap("ffn_input") if config.domain_type == "bottleneck" else None
        reads = tap if config.adapter_input == "ffn_input" else None
        width = site.in_features if reads is None else site.out_features
        bank = AdapterBank(width, site.out_features, **config.bank_options())
        for name, rank in ranks.items():
            bank.add(name, rank, config.init_weights, **config.expert_options(name, site.path))
        gate_tap = tap if config.gate_input == "ffn_input" and reads is None else None
        number_of = {name: number for number, name in enumerate(config.domains)}
        router = mixture_router(
            config, site.out_features if gate_tap else width, list(ranks), rank_of(config.null_arms, site.path)
        )
        self.context.fields.update(router.fields)
        if isinstance(router, CountsRouter) and site.path == self._first_path(config):
            router.lead(list(number_of), self.vocab_size())
        return Mixture(
            router, bank, "parallel", tap=reads, router_tap=gate_tap, dropout=config.adapter_dropout, observes=True,
            hard_routes=HardRoutes("domain_ids", [number_of[name] for name in ranks], len(number_of)),
            replaces=config.combine == "convex",
        )  # fmt: skip
