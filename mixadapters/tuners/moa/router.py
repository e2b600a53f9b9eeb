"""The router of MoA's config: the field `router`, and the fields that stand for its options."""

from __future__ import annotations

from inspect import signature
from typing import Any

from mixadapters.core.fields import default_of
from mixadapters.core.registry import LIBRARY
from mixadapters.routers.base import Router, options_of, read_spec
from mixadapters.routers.options import check_options

GATHERED = "arrow"  # the router of gathered LoRA where none is named
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
# What fields that say nothing stand for under a router that is named. Saved configs hold these values, as those of
# earlier versions did, in which nobody could tell a field that says nothing from one that says just this.
USUAL = {"num_experts_per_tok": 2, "granularity": "token"}


def router_spec(config: Any) -> tuple[type[Router], dict[str, Any]]:
    """Its class, and its options: those of `router`, and the fields that it takes.

    Raises:
        ValueError: a field that has been set, and that this router does not take, or that `router` gives too; a value
            out of range.
    """
    spec: Any = {"kind": GATHERED} if config.router is None else config.router
    cls, given = read_spec(spec)
    takes = options_of(cls, given)
    options = dict(given)
    for name, option in OPTION_OF.items():
        value = getattr(config, name)
        if value == default_of(config, name):
            if name in PASSED and option in takes and option not in given and (cls.learns or option == "k"):
                options[option] = USUAL.get(name, value)
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


def router_in_words(config: Any) -> list[str]:
    """The router for a model card: its name, its options, and for how many layers it decides once."""
    _, options = router_spec(config)
    said = [f"{name}={value!r}" for name, value in options.items() if (name, value) != ("k", None)]
    everyone = ["all experts"] if options.get("k", 0) is None else []
    return [_kind_of(config), *everyone, *said, f"router_scope={config.router_scope!r}"]


def _kind_of(config: Any) -> str:
    """The name of the router, also while the config of gathered LoRA names none."""
    return GATHERED if config.router is None else config.router["kind"]


def says_granularity(config: Any) -> bool:
    """Whether the field says the usual granularity where that is not what the router takes by itself."""
    cls, given = read_spec(config.router)
    own = (signature(base.__dict__["__init__"]).parameters for base in cls.__mro__ if "__init__" in base.__dict__)
    default = next((found["granularity"].default for found in own if "granularity" in found), USUAL["granularity"])
    return bool(config.granularity == USUAL["granularity"] != default and "granularity" not in given)


def spelled_out(config: Any) -> dict[str, Any]:
    """`router` as files have it: with the granularity that the field says where USUAL would not say it."""
    return {**config.router, **({"granularity": config.granularity} if says_granularity(config) else {})}


def check_scope(config: Any, cls: type[Router]) -> None:
    """Raise ValueError if a router of this class cannot decide for as many layers as the config's `router_scope`."""
    if config.router_scope not in cls.scopes:
        by = "by what each layer's experts hold" if "module" in cls.scopes else "once for all layers"
        raise ValueError(
            f"router_scope={config.router_scope!r} does not go with router {_kind_of(config)!r}, which decides {by}; "
            f"use router_scope={sorted(cls.scopes)[0]!r}"
        )


def name_router(config: Any, causal: bool) -> None:
    """Have the config of gathered LoRA that names no router say which it is: Arrow with all experts, over the text so
    far, which was level with their mean where Arrow by token and with two experts was 10 % behind (docs/results.md).
    What fields say goes before.

    causal: whether all of its layers see earlier tokens alone. Elsewhere "so far" means nothing: each token decides by
        itself.
    """
    if config.router is not None:
        return
    config.router = {"kind": GATHERED}
    if config.num_experts_per_tok == default_of(config, "num_experts_per_tok"):
        config.num_experts_per_tok = None
    if config.granularity is None and causal:
        config.granularity = "causal_prefix"
