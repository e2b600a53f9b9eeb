"""The router of MoA's config: the field `router`, and the fields that stand for its options."""

from __future__ import annotations

from dataclasses import MISSING, fields
from typing import Any

from mixadapters.core.registry import LIBRARY
from mixadapters.routers.base import Router, options_of, read_spec
from mixadapters.routers.options import check_options

OPTION_OF = {  # field -> the option of the router that it stands for
    "num_experts_per_tok": "k", "granularity": "granularity", "norm_topk_prob": "norm_topk_prob",
    "routed_scaling_factor": "routed_scaling_factor", "scoring_func": "scoring_func",
    "router_temperature": "temperature", "router_hidden": "hidden", "router_jitter_noise": "jitter",
    "router_init_range": "init_range", "router_aux_loss_coef": "balance_coef", "router_z_loss_coef": "z_coef",
    "router_entropy_coef": "entropy_coef", "router_importance_coef": "importance_coef",
    "router_bias_update_rate": "bias_update_rate", "num_null_experts": "null_arms",
    "capacity_factor": "capacity_factor", "batch_prioritized": "batch_prioritized",
}  # fmt: skip
PASSED = ("num_experts_per_tok", "router_aux_loss_coef")  # whose defaults are not those of the routers themselves


def router_spec(config: Any) -> tuple[type[Router], dict[str, Any]]:
    """Its class, and its options: those of `router`, and the fields that it takes.

    Raises:
        ValueError: a field that has been set, and that this router does not take, or that `router` gives too; a value
            out of range.
    """
    spec: Any = config.router
    cls, given = read_spec(spec)
    takes = options_of(cls, given)
    options = dict(given)
    for name, option in OPTION_OF.items():
        value = getattr(config, name)
        if value == default_of(config, name):
            if name in PASSED and option in takes and option not in given and (cls.learns or option == "k"):
                options[option] = value
        elif option not in takes and value is not None:  # None asks for nothing
            raise ValueError(
                f"{name}={value!r}: router {spec['kind']!r} has no option {option!r}; leave the field out, or "
                "choose another router"
            )
        elif option not in takes:
            continue
        elif option in given and given[option] != value:
            raise ValueError(f"router says {option}={given[option]!r} and {name} says {value!r}; say it once")
        else:
            options[option] = value
    if cls.__module__.startswith(f"{LIBRARY}."):  # options of others may be called so and mean something else
        check_options(**options)
    return cls, options


def default_of(config: Any, name: str) -> Any:
    """What a field of a config is where nobody has set it."""
    own = next(f for f in fields(config) if f.name == name)
    return own.default if own.default_factory is MISSING else own.default_factory()
