"""What the options of routers may be: one table, asked when a router is made and when an option is set later."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mixadapters.core.fields import finite
from mixadapters.core.registry import nearest
from mixadapters.routers.pooling import GRANULARITIES, POOLS
from mixadapters.routers.score import ACTIVATIONS

Check = tuple[Callable[[Any], bool], str]  # whether a value fits, and what it must be


# A config may be a stranger's: what is made for each of these takes time before its weights are looked at.
MOST_ARMS, DEEPEST = 4096, 64


def _whole(value: Any) -> bool:
    return type(value) is int


POSITIVE: Check = (lambda v: finite(v) and v > 0, "a finite number above 0, from 1e-30 to 1e30")
NOT_NEGATIVE: Check = (lambda v: finite(v) and v >= 0, "a finite number, not below 0")
NUMBER: Check = (finite, "a finite number")
SHARE: Check = (lambda v: finite(v) and 0 <= v < 1, "at least 0 and below 1")
COUNT: Check = (lambda v: _whole(v) and v > 0, "a positive integer")
SWITCH: Check = (lambda v: isinstance(v, bool), "True or False")
WIDTHS: Check = (
    lambda v: isinstance(v, (list, tuple)) and len(v) <= DEEPEST and all(_whole(width) and width > 0 for width in v),
    f"a list of up to {DEEPEST} positive widths, such as [768]",
)
CHECKS: dict[str, Check] = {
    "temperature": POSITIVE, "temperature_min": POSITIVE, "gamma": POSITIVE, "smoothing": POSITIVE,
    "routed_scaling_factor": POSITIVE,
    "noise": NOT_NEGATIVE, "init_range": NOT_NEGATIVE, "capacity_factor": NOT_NEGATIVE,
    "bias_update_rate": NOT_NEGATIVE, "balance_coef": NOT_NEGATIVE, "z_coef": NOT_NEGATIVE, "entropy_coef": NUMBER,
    "importance_coef": NOT_NEGATIVE, "load_coef": NOT_NEGATIVE, "frozen_bias": NUMBER, "dropout": SHARE,
    "jitter": SHARE, "min_weight": SHARE, "expert_dropout": SHARE,
    "p": (lambda v: finite(v) and 0 < v <= 1, "above 0 and at most 1"),
    "duration": (lambda v: finite(v) and 0 < v <= 1, "above 0 and at most 1"),
    "threshold": (lambda v: v == "mean" or (finite(v) and 0 <= v < 1), "'mean', or at least 0 and below 1"),
    "hard_after": (lambda v: v is None or (finite(v) and 0 <= v <= 1), "None, or between 0 and 1"),
    "k": (lambda v: v is None or (_whole(v) and v > 0), "a positive integer, or None for all"),
    "max_experts": (lambda v: v is None or (_whole(v) and v > 0), "a positive integer, or None"),
    "null_arms": (lambda v: _whole(v) and 0 <= v <= MOST_ARMS, f"a number of arms, {MOST_ARMS} at most"),
    "hidden": WIDTHS,
    "projection": COUNT, "width": COUNT, "vocab_size": COUNT, "trees": COUNT, "seed": (_whole, "an integer"),
    "normalize": SWITCH, "convex": SWITCH, "norm_topk_prob": SWITCH, "batch_prioritized": SWITCH, "gumbel": SWITCH,
    "learnable_temperature": SWITCH, "learn_permutation": SWITCH,
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
        if name in CHECKS and not CHECKS[name][0](value):
            raise ValueError(f"{name}={value!r:.200} must be {CHECKS[name][1]}")
