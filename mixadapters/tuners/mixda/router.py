"""The router of MixDA's config: the field `router`, and the older fields that say the same one by one."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from typing import Any

import torch

from mixadapters.core.fields import check_number, one_of
from mixadapters.core.registry import nearest
from mixadapters.routers import ROUTERS, Router, SoftmaxGate, build_router
from mixadapters.routers.arms import ArmSurgery
from mixadapters.routers.base import options_of, read_spec
from mixadapters.routers.counts import refuse_null_arms
from mixadapters.routers.pooling import name_field
from mixadapters.tuners.bottleneck.config import INPUTS
from mixadapters.tuners.sources import refuse_unsaveable

OPTION_OF = {  # field -> the option of `router` that it stands for
    "gate": "kind", "gate_granularity": "granularity", "gate_input": "input", "gate_hidden": "hidden",
    "gate_dropout": "dropout", "gate_pool": "pool", "gate_normalize": "normalize", "gate_frozen_bias": "frozen_bias",
    "temperature": "temperature", "balance_coef": "balance_coef", "z_coef": "z_coef", "entropy_coef": "entropy_coef",
}  # fmt: skip
DEFAULTS: dict[str, Any] = {
    "kind": "softmax", "granularity": "token", "input": None, "hidden": [], "dropout": 0.0, "pool": "masked_mean",
    "normalize": True, "frozen_bias": None, "temperature": 1.0, "balance_coef": 0.0, "z_coef": 0.0,
    "entropy_coef": 0.0,
}  # fmt: skip
SURGERY = {"add_domain": ("add_expert", "start_at", "_insert_row"), "remove_domain": ("remove_expert",)}


def read_router(config: Any) -> None:
    """Make the field `router` and the older fields of a config agree. With `router` they say what it says.

    Raises:
        ValueError: they disagree, or the router is unknown or does not take what is said.
    """
    said = {o: getattr(config, name) for name, o in OPTION_OF.items() if getattr(config, name) is not None}
    if config.router is None:
        spec = {**DEFAULTS, **said}
        if spec["kind"] not in ROUTERS:
            raise ValueError(
                f"gate={spec['kind']!r} is unknown; have {sorted(ROUTERS)}.{nearest(spec['kind'], ROUTERS)} "
                f"{ROUTERS.hint}"
            )
        if spec["kind"] not in ("softmax", "sigmoid"):
            takes = options_of(ROUTERS[spec["kind"]])  # older files have every field, at its default
            config.router = {"kind": spec["kind"], **{o: v for o, v in said.items() if v != DEFAULTS[o] or o in takes}}
    else:
        given = {"kind": config.router} if isinstance(config.router, str) else dict(config.router)
        for name, option in OPTION_OF.items():
            if option in said and option in given and said[option] != given[option]:
                raise ValueError(
                    f"router says {option}={given[option]!r} and {name} says {said[option]!r}; say it once, in router"
                )
        config.router = {**said, **given}
    if config.router is not None:
        spec = dict(config.router)
        for option, value in spec.items():
            refuse_unsaveable(f"router: {option}", value)
    for name, option in OPTION_OF.items():
        setattr(config, name, deepcopy(spec.get(option)))
    if config.gate_input is not None:
        one_of("router: input", config.gate_input, INPUTS)
    cls, options = read_spec(router_spec(config))
    refuse_null_arms(cls, options)
    if config.combine == "convex" and "convex" not in options_of(cls):
        raise ValueError(
            f"combine='convex' needs a router that weighs the frozen layer's output (Routing.base_weight), by an "
            f"option `convex`, which {cls.__name__} does not take; use combine='delta'"
        )
    if config.domains:
        trial_router(config, list(config.domains))


def router_spec(config: Any) -> dict[str, Any]:
    """{"kind": name, option: value} for `build_router`.

    Raises:
        ValueError: an older field has been changed since, beside a `router` that says something else.
    """
    fields = {option: getattr(config, name) for name, option in OPTION_OF.items()}
    if config.router is None:
        spec: Mapping[str, Any] = fields
    else:
        spec = config.router
        for name, option in OPTION_OF.items():
            if fields[option] is not spec.get(option) and fields[option] != spec.get(option):
                raise ValueError(f"{name}={fields[option]!r} was set, but router={config.router} decides; change that")
    return {option: value for option, value in spec.items() if option != "input" and value is not None}


def mixture_router(config: Any, in_features: int, experts: list[str], null_arms: int = 0) -> Router:
    """The router of one layer, over the domains that it has."""
    spec = router_spec(config)
    if spec["kind"] == "constant" and spec.get("weights") is not None:
        spec["weights"] = weights_of(spec["weights"], experts, list(config.domains))
    defaults = {"frozen_bias": config.frozen_bias(len(experts)), "convex": config.combine == "convex"}
    if null_arms:
        defaults["null_arms"] = null_arms
    router = build_router(spec, in_features, experts, **defaults)
    name_field(router, "gate_granularity")
    return router


def weights_of(weights: Any, experts: list[str], domains: list[str]) -> list[float]:
    """The fixed weights of the domains that lie at one layer, in order.

    Args:
        weights: by name, 0 for those that are not named; or a list, in the order of the domains.

    Raises:
        ValueError: an unknown domain, or a list of another length.
    """
    if not isinstance(weights, Mapping):
        if not isinstance(weights, (list, tuple)) or len(weights) != len(domains):
            raise ValueError(f"router: weights={weights!r} must have one entry for each domain of {domains}, or be a "
                             "dict of domains to weights")  # fmt: skip
        weights = dict(zip(domains, weights, strict=True))
    for name, weight in weights.items():
        if name not in domains:
            raise ValueError(f"weights: unknown domain {name!r}; have {domains}.{nearest(str(name), domains)}")
        check_number(f"weights[{name!r}]", weight)
    return [float(weights.get(name, 0.0)) for name in experts]


def trial_router(config: Any, experts: list[str]) -> Router:
    """A router without memory, to find out what is wrong before anything is changed."""
    with torch.device("meta"):
        return mixture_router(config, 8, experts)


def competes(config: Any) -> bool:
    """Whether the weights of the router sum to 1 with that of the frozen layer."""
    return issubclass(ROUTERS[config.gate], SoftmaxGate)


def require_surgery(config: Any, verb: str) -> None:
    """Raise ValueError where the router has not what `verb` needs."""
    cls = ROUTERS[config.gate]
    if isinstance(cls.fixed_experts, str):
        raise ValueError(f"{verb}: {cls.__name__} cannot: {cls.fixed_experts}")
    lacking = [name for name in SURGERY[verb] if not _has(cls, name)]
    if lacking:
        raise ValueError(
            f"{verb} needs a router that can change its arms, and {cls.__name__} ({config.gate!r}) has no "
            f"{' and no '.join(lacking)}; give it these methods (see routers/arms.py), or make a new mixture"
        )


def _has(cls: type[Router], name: str) -> bool:
    """Whether a class has a method that does something."""
    if name == "_insert_row" and not issubclass(cls, ArmSurgery):
        return True  # a detail of ours
    method = getattr(cls, name, None)
    abstract = name in ("start_at", "_insert_row") and method is getattr(ArmSurgery, name)
    return method is not None and not abstract
