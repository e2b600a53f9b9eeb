"""What fields of MixDA's config mean for domains and task adapters of one type only: refused for the other."""

from __future__ import annotations

from typing import Any

from mixadapters.core.fields import default_of

OF_BOTTLENECKS = ("reduction_factor", "adapter_input", "activation", "adapter_glu", "adapter_layer_norm", "gate_input")
OF_LORA = ("lora_alpha",)
ENTRIES_OF_LORA = ("scale", "scales", "biases")  # of a domain
OF_BOTTLENECK_TASKS = ("task_reduction_factor", "task_activation")
OF_LORA_TASKS = ("task_lora_alpha", "task_target_modules")


def refuse_fields_of_others(config: Any) -> None:
    """Refuse what domains, or the task adapter, of the config's types would pass over.

    Raises:
        ValueError: the field, its value, and the type that it is for.
    """
    lora, task = config.domain_type == "lora", config.task_adapter == "lora"
    _refuse(config, OF_BOTTLENECKS if lora else OF_LORA, f"domain_type={config.domain_type!r}")
    _refuse(config, OF_BOTTLENECK_TASKS if task else OF_LORA_TASKS, f"task_adapter={config.task_adapter!r}")
    if lora and config.combine == "convex":
        raise ValueError("combine='convex' needs domains that stand for the layer's output, and a LoRA is a change of "
                         "it; use combine='delta'")  # fmt: skip
    if task and not lora and config.target_modules is not None and config.sites is None:
        raise ValueError(
            f"target_modules={config.target_modules!r} with task_adapter='lora': there is no telling which of them "
            "are the domains'; pass sites={'ffn_output': <regular expression>, 'task': <regular expression>}"
        )
    for name, spec in config.domains.items():
        for entry in ENTRIES_OF_LORA:
            if entry in spec and not lora:
                raise ValueError(f"domains[{name!r}]: {entry}={spec[entry]!r} is for domain_type='lora'")
        ranks, scales = spec.get("ranks", {}), spec.get("scales", {})
        if lora and (scales.keys() != ranks.keys() or set(spec.get("biases", ())) - ranks.keys()):
            raise ValueError(f"domains[{name!r}]: `scales` must name the modules of `ranks`, `biases` some of them")


def _refuse(config: Any, names: tuple[str, ...], because: str) -> None:
    for name in names:
        if getattr(config, name) != default_of(config, name):
            raise ValueError(f"{name}={getattr(config, name)!r} means nothing with {because}; leave it out")
