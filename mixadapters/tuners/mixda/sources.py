"""Domain adapters that have been trained on their own: read from a folder or the hub, or refused with the reason."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor

from mixadapters.core.registry import nearest
from mixadapters.tuners.bottleneck.model import EXPERT
from mixadapters.tuners.gathering import (
    BaseModules,
    Gathered,
    check_tensors,
    experts_in,
    gathered,
    lora_experts,
    own_weights,
    refuse_other_fields,
)
from mixadapters.tuners.mixda.config import MixDAConfig
from mixadapters.tuners.sources import check_base_model, places_of, rank_of, read_folder


class LoRASites(BaseModules, Protocol):
    """What a tuner knows of the places that can hold LoRA domains."""

    def bank_widths(self, config: MixDAConfig, path: str) -> tuple[int, int]: ...


class DomainSites(BaseModules, Protocol):
    """What a tuner knows of the places that can hold domain adapters."""

    def domain_paths(self, config: MixDAConfig) -> list[str]: ...

    def bank_widths(self, config: MixDAConfig, path: str) -> tuple[int, int]: ...

    def _check_target_module_exists(self, config: Any, key: str) -> Any: ...


def read_source(
    tuner: DomainSites, config: MixDAConfig, name: str, spec: dict[str, Any]
) -> dict[str, dict[str, Tensor]]:
    """{module of this model: {parameter of an expert: tensor}} of a trained domain adapter.

    Raises:
        ValueError: not a domain adapter, made for another base model or with other fields, or of other modules.
    """
    where = f"domains[{name!r}]: {spec['source']!r}"
    saved, weights = read_folder(where, spec)
    expert = _check_source(config, name, saved, where)
    check_base_model(tuner.model, saved, spec, where)
    paths, prefix = tuner.domain_paths(config), f"{saved.peft_type.value.lower()}_adapters."
    # A mixture has other domains too, a gate and a task adapter.
    mark = f".{prefix}" if saved.peft_type.value == "MIXDA" else f".{prefix}{expert}."
    found = experts_in(own_weights(tuner, saved, weights, spec, where, mark), f"{prefix}{expert}")
    if not found:
        raise ValueError(f"{where} holds no weights of a domain adapter: none of its {len(weights)} keys fits")
    by_path: dict[str, dict[str, Tensor]] = {}
    for path, places in places_of(found, paths).items():
        if len(places) != 1:
            raise ValueError(f"{where} adapts {path!r}, which is no domain site of this model; those are {paths}")
        by_path[places[0]] = found[path]
    for path, tensors in by_path.items():
        check_tensors(tuner.bank_widths(config, path), config.bank_options(), path, tensors, where)
    if missing := [p for p in _paths_of_source(tuner, saved, name, paths) if p not in by_path]:
        raise ValueError(f"{where} lacks the weights of {missing}, which its own config says that it adapts")
    return by_path


def read_lora(tuner: LoRASites, config: MixDAConfig, name: str, spec: dict[str, Any]) -> Gathered:
    """A stock LoRA of PEFT as a domain, by module of this model.

    Raises:
        ValueError: another type of adapter, or one that no domain equals exactly.
    """
    where = f"domains[{name!r}]: {spec['source']!r}"
    saved, weights = read_folder(where, spec)
    kind = getattr(saved.peft_type, "value", saved.peft_type)
    if kind != "LORA":
        remedy = "; write the domain as a LoRA folder first (export_domain)" if kind == "MIXDA" else ""
        raise ValueError(f"{where} is a {kind} adapter; domain_type='lora' gathers LORA adapters{remedy}")
    check_base_model(tuner.model, saved, spec, where)
    scales, found = lora_experts(tuner, saved, weights, spec, where)
    return gathered(
        tuner,
        saved,
        scales,
        found,
        spec,
        where,
        widths=lambda path: tuner.bank_widths(config, path),
        options=config.bank_options(),
    )


def _paths_of_source(tuner: DomainSites, saved: Any, name: str, paths: list[str]) -> list[str]:
    """Those of our `paths` that a source adapts by its own config."""
    if saved.peft_type.value == "MIXDA":
        spec = saved.domains.get(name) or next(iter(saved.domains.values()))
        return [p for p in paths if rank_of(spec.get("ranks", {}), p)]
    return [p for p in paths if saved.target_modules and tuner._check_target_module_exists(saved, p)]


def _check_source(config: MixDAConfig, name: str, saved: Any, where: str) -> str:
    """Refuse a source whose fields do not fit; return where its expert's parameters lie in its keys."""
    kind = getattr(saved.peft_type, "value", saved.peft_type)
    if kind == "BOTTLENECK":
        expert = f"bank.experts.{EXPERT}"
        theirs = {**saved.bank_options(), "adapter_input": saved.adapter_input, "placement": saved.placement,
                  "combine": "delta"}  # fmt: skip
        ours = {**config.bank_options(), "bias": True, "placement": "parallel", "combine": config.combine}
    elif kind == "MIXDA":
        one = next(iter(saved.domains)) if len(saved.domains) == 1 else name
        if one not in saved.domains:
            raise ValueError(
                f"{where} has no domain {name!r}; it has {list(saved.domains)}.{nearest(name, saved.domains)}"
            )
        expert = f"domain.bank.experts.{one}"
        theirs = {**saved.bank_options(), "adapter_input": saved.adapter_input, "combine": saved.combine}
        ours = {**config.bank_options(), "combine": config.combine}
    else:
        remedy = "; for LoRA folders say domain_type='lora'" if kind == "LORA" else ""
        raise ValueError(
            f"{where} is a {kind} adapter; domains are gathered from BOTTLENECK or MIXDA adapters{remedy}"
        )
    if kind == "MIXDA" and saved.domain_type != config.domain_type:
        raise ValueError(f"{where} has domains of type {saved.domain_type!r}, this mixture {config.domain_type!r}")
    ours |= {"adapter_input": config.adapter_input}
    fields = {name: f"adapter_{name}={theirs[name]!r}" for name in ("glu", "layer_norm") if name in theirs}
    refuse_other_fields(theirs, ours, where, config, fields)
    return expert
