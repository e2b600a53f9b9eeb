"""What the verbs of surgery may be told, and what is wrong with an answer. Imports nothing that takes time."""

from __future__ import annotations

from typing import Any, Literal, get_args

from mixadapters.core.fields import finite

Criterion = Literal["saliency", "usage", "router_weighted_norm", "random"]  # what experts are kept by
CRITERIA: tuple[str, ...] = get_args(Criterion)
Scope = Literal["layer", "global"]  # of a budget
SCOPES: tuple[str, ...] = get_args(Scope)

Similarity = Literal["router_logits", "router_weight", "weight", "output"]
SIMILARITIES: tuple[str, ...] = get_args(Similarity)
Averaging = Literal["usage", "uniform", "dominant"]
AVERAGINGS: tuple[str, ...] = get_args(Averaging)
Grouping = Literal["dominant", "spectral"]
GROUPINGS: tuple[str, ...] = get_args(Grouping)

SCALES = ("minmax", "mean")
ROUNDINGS = ("gptq", "nearest")
CODECS = ("qmoe", "packed")  # words of the dictionary, or five weights to a byte
COMPRESSIONS: dict[str, dict[str, Any]] = {  # method -> its options, with their defaults
    "qmoe": {"scale": "minmax", "rounding": "gptq", "damping": 0.1, "codec": "qmoe"},
    "lowrank_sparse": {"share": 0.25, "keep": 0.1},
}


def check_tolerance(name: str, value: Any) -> None:
    """Raises ValueError where `value` is no distance between experts."""
    if not finite(value) or not 0 <= value <= 2:
        raise ValueError(
            f"{name}={value!r} must be a distance from 0 (the same) to 2 (nothing in common), such as 0.01"
        )
