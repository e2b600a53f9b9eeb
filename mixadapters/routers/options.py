"""What the options of routers may be: one table, asked when a router is made and when an option is set later."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from mixadapters.core.fields import check_integer, check_number, check_share, check_switches, fits
from mixadapters.core.registry import nearest
from mixadapters.routers.pooling import GRANULARITIES, POOLS
from mixadapters.routers.score import ACTIVATIONS

Check = Callable[[str, Any], None]  # of an option's name and its value; raises ValueError where that will not do

# A config may be a stranger's: what is made for each of these takes time before its weights are looked at.
MOST_ARMS, DEEPEST = 4096, 64


def _check_switch(name: str, value: Any) -> None:
    check_switches(**{name: value})


def _check_widths(name: str, value: Any) -> None:
    listed = isinstance(value, (list, tuple)) and len(value) <= DEEPEST
    if not listed or not all(fits(width, int) and width > 0 for width in value):
        raise ValueError(f"{name}={value!r:.200} must be a list of up to {DEEPEST} positive widths, such as [768]")


def _or(other: Any, check: Check) -> Check:
    def checked(name: str, value: Any) -> None:
        try:
            if value != other:
                check(name, value)
        except ValueError as error:
            raise ValueError(f"{error}, or {other!r}") from None

    return checked


POSITIVE: Check = partial(check_number, above=0)
NOT_NEGATIVE: Check = partial(check_number, least=0)
UP_TO_ONE: Check = partial(check_number, above=0, most=1)
BELOW_ONE: Check = partial(check_number, least=0, below=1)
COUNT: Check = partial(check_integer, least=1)
CHECKS: dict[str, Check] = {
    "temperature": POSITIVE, "temperature_min": POSITIVE, "gamma": POSITIVE, "smoothing": POSITIVE,
    "routed_scaling_factor": POSITIVE,
    "noise": NOT_NEGATIVE, "init_range": NOT_NEGATIVE, "capacity_factor": NOT_NEGATIVE,
    "bias_update_rate": NOT_NEGATIVE, "balance_coef": NOT_NEGATIVE, "z_coef": NOT_NEGATIVE,
    "importance_coef": NOT_NEGATIVE, "load_coef": NOT_NEGATIVE,
    "entropy_coef": check_number, "frozen_bias": check_number,
    "dropout": BELOW_ONE, "jitter": BELOW_ONE, "min_weight": BELOW_ONE, "expert_dropout": BELOW_ONE,
    "p": UP_TO_ONE, "duration": UP_TO_ONE, "threshold": _or("mean", BELOW_ONE), "hard_after": _or(None, check_share),
    "k": _or(None, COUNT), "max_experts": _or(None, COUNT),
    "null_arms": partial(check_integer, least=0, most=MOST_ARMS),
    "projection": COUNT, "width": COUNT, "vocab_size": COUNT, "trees": COUNT, "seed": check_integer,
    "hidden": _check_widths,
    "normalize": _check_switch, "convex": _check_switch, "norm_topk_prob": _check_switch,
    "batch_prioritized": _check_switch, "gumbel": _check_switch, "learnable_temperature": _check_switch,
    "learn_permutation": _check_switch,
}  # fmt: skip
WHOLE = frozenset({"k", "max_experts"})  # options that are whole numbers and may change in training
CHOICES: dict[str, tuple[Any, ...]] = {
    "granularity": GRANULARITIES, "pool": POOLS, "scoring_func": ("softmax", "sigmoid"), "cell": ("gru", "rnn"),
    "schedule": ("linear", "exp"), "activation": (None, *ACTIVATIONS),
}  # fmt: skip


def check_options(**options: Any) -> None:
    """Raise ValueError for the first option that is not what it must be: its name, its value, what it takes."""
    for name, value in options.items():
        if name in CHOICES and not any(type(value) is type(one) and value == one for one in CHOICES[name]):
            near = nearest(str(value), CHOICES[name])
            raise ValueError(f"{name}={value!r} is unknown; choose one of {list(CHOICES[name])}.{near}")
        if name in CHECKS:
            CHECKS[name](name, value)
