"""Domains and task adapters of type LoRA: where they lie, and what trained ones are made of."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from copy import copy
from typing import Any

from torch import Tensor, nn

from mixadapters.core.adapter import Site
from mixadapters.core.bank import AdapterBank
from mixadapters.core.mixture import Mixture
from mixadapters.core.model import MixtureModel
from mixadapters.core.sites import ARCHITECTURES, Architecture, find_architecture, such_as
from mixadapters.routers import SingleRouter
from mixadapters.tuners.bottleneck.model import EXPERT
from mixadapters.tuners.lora import default_targets
from mixadapters.tuners.mixda.config import MixDAConfig
from mixadapters.tuners.mixda.sources import read_lora, read_source

LORA_DOMAIN, LORA_TASK = "domain", "task"  # roles of the modules that take them
LORA_RANK = 8  # of new ones, as in PEFT


class LoRADomains(MixtureModel):
    """Part of MixDA's tuner."""

    def bank_widths(self, config: MixDAConfig, path: str) -> tuple[int, int]:
        raise NotImplementedError

    def task_roles(self, config: MixDAConfig) -> tuple[str, ...]:
        raise NotImplementedError

    def domain_role(self, config: MixDAConfig) -> str:
        raise NotImplementedError

    def lora_sites(self, config: MixDAConfig, model_type: str, gathered: Collection[str]) -> dict[str, str]:
        """Role -> pattern of its modules, where the domains or the task adapter are LoRA.

        gathered: the modules of domains that have been trained.

        Raises:
            ValueError: PEFT's or our table does not know the architecture, and the config does not say.
        """
        sites: dict[str, str] = {}
        if config.domain_type == "lora":
            new = not gathered or any("source" not in spec for spec in config.domains.values())
            sites[LORA_DOMAIN] = lora_domain_pattern(
                config.target_modules, gathered, model_type, self.model if new else None
            )
        if config.task_adapter == "lora":
            sites[LORA_TASK] = lora_task_pattern(config.task_target_modules, model_type, self.model)
        wanted = {*self.roles(config), *self.taps(config)} - sites.keys()
        for role in wanted:
            pattern = getattr(find_architecture(model_type, self.model), role)
            if pattern is None:
                raise ValueError(
                    f"{model_type!r} models have no module for the role {role!r}, which this config needs; choose "
                    "another adapter_input or task_adapter"
                )
            sites[role] = pattern
        return sites

    def read(self, config: MixDAConfig, name: str, spec: dict[str, Any]) -> dict[str, dict[str, Tensor]]:
        """The weights of a domain that has been trained, by module; what they are is noted in its entry `spec`."""
        if config.domain_type == "lora":
            found = read_lora(self, config, name, spec)
            spec |= {"ranks": found.ranks, "scales": found.scales}
            spec |= {"biases": found.biases} if found.biases else {}
            return found.weights
        weights = read_source(self, config, name, spec)
        spec["ranks"] = {path: w["down.weight"].shape[0] for path, w in weights.items()}
        return weights

    def new_entry(self, config: MixDAConfig, ranks: dict[str, int]) -> dict[str, Any]:
        """The entry in the config of a new domain of these ranks."""
        entry: dict[str, Any] = {"ranks": dict(ranks)}
        if config.domain_type == "lora":
            entry["scales"] = {path: (config.lora_alpha or rank) / rank for path, rank in ranks.items()}
        return entry

    def widen(self, config: MixDAConfig, name: str, paths: Iterable[str]) -> None:
        """Have a LoRA domain's modules among those that the config adapts.

        Raises:
            ValueError: the config leaves one of them out on purpose.
        """
        assert config.sites is not None
        own = config.sites[LORA_DOMAIN]
        if not (more := [path for path in paths if not re.fullmatch(own, path)]):
            return
        wider = copy(config)
        wider.sites = {**config.sites, LORA_DOMAIN: f"(?:{own})|{pattern_of(more)}"}
        wider.target_modules = self.union_of(wider)
        if outside := [path for path in more if not self._check_target_module_exists(wider, path)]:
            raise ValueError(
                f"domain {name!r} adapts {outside[0]!r}, which exclude_modules or layers_to_transform leave out; make "
                "a mixture without these fields"
            )
        config.sites, config.target_modules = wider.sites, wider.target_modules


def lora_task(config: MixDAConfig, site: Site) -> Mixture:
    """The LoRA of the task at one module: scale * up(down x), which starts as zero."""
    rank = config.task_r or LORA_RANK
    bank = AdapterBank(site.in_features, site.out_features, activation="identity", bias=False,
                       scale=(config.task_lora_alpha or rank) / rank)  # fmt: skip
    bank.add(EXPERT, rank, config.init_weights)
    return Mixture(SingleRouter(site.in_features, [EXPERT]), bank, "parallel")


def lora_domain_pattern(targets: Any, gathered: Collection[str], model_type: str, model: nn.Module | None) -> str:
    """Of the modules that take LoRA domains.

    Args:
        targets: `target_modules` of the config.
        gathered: modules of domains that have been trained.
        model: where there are new domains, which lie where PEFT puts LoRA in it.
    """
    if targets is not None:
        return suffixes(targets)
    parts = [pattern_of(gathered)] if gathered else []
    if model is not None:
        parts.append(suffixes(default_targets(model_type, model)))
    return "|".join(f"(?:{part})" for part in parts)


def lora_task_pattern(targets: Any, model_type: str, model: nn.Module) -> str:
    """Of the modules that take the LoRA of the task: the attention's query and value, where `targets` is None."""
    if targets is not None:
        return suffixes(targets)
    row = ARCHITECTURES.get(model_type, Architecture())
    wanted = (row.query, row.value) if row.value else (row.qkv,)
    found = [pattern for pattern in wanted if pattern]
    if not found:
        raise ValueError(f"{model_type!r} models have no modules of query and value that the table knows; pass "
                         f"task_target_modules{such_as(model)}")  # fmt: skip
    return "|".join(f"(?:{pattern})" for pattern in found)


def suffixes(targets: Any) -> str:
    """The pattern that `target_modules` stands for: as it is, or of whole paths that end so."""
    if isinstance(targets, str):
        return targets
    return rf"(?:.*\.)?(?:{'|'.join(re.escape(target) for target in sorted(targets))})"


def pattern_of(paths: Iterable[str]) -> str:
    """Of exactly these modules; those that differ in the number of their layer only are written once."""
    layers: dict[tuple[str, str], list[str]] = {}
    for path in paths:
        found = re.fullmatch(r"(.*?(?:^|\.))(\d+)((?:\..*)?)", path)
        before, number, after = found.groups() if found else (path, "", "")
        layers.setdefault((before, after), []).append(number)
    parts = (
        f"{re.escape(before)}(?:{'|'.join(numbers)}){re.escape(after)}" for (before, after), numbers in layers.items()
    )
    return "|".join(parts)
