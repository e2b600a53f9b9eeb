"""Notices a training in which nobody moves what moves with its steps."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from mixadapters.core.routing import RoutingKey

# verb -> (what waits for it, when it is to be called, the callback that does it)
CALLED = {
    "set_progress": (
        "options that follow the progress of the training",
        "set_progress(done) before each step, with the share of the training that is done",
        "RouterScheduleCallback",
    ),
    "update_biases": (
        "a bias that balances its experts after each step",
        "update_biases() after each step of the optimizer",
        "BalanceBiasCallback",
    ),
    "search_permutation": (
        "a permutation that is searched, and then made hard",
        "search_permutation(done) before each step, with the share of the search that is done",
        "PermutationSearchCallback",
    ),
}


class Steps:
    """Who moves what moves with the steps of a training: the verbs of `core/progress.py`, which somebody must call.

    Attributes:
        told: (adapter, verb) that somebody has called, or whose lack has been warned of.
    """

    def __init__(self) -> None:
        self.told: set[tuple[str, str]] = set()
        self.versions: dict[RoutingKey, int] = {}  # of the parameters at the first training forward

    def look(self, key: RoutingKey, router: Any, parameters: Iterable[Tensor]) -> None:
        """Called in each training forward of a router; warns where one comes after a step, and nobody moves it."""
        missing = [verb for verb in getattr(router, "moved_by", ()) if (key.adapter, verb) not in self.told]
        if not missing or torch.compiler.is_compiling():
            return
        version = sum(parameter._version for parameter in parameters)  # counts up as an optimizer writes
        if self.versions.setdefault(key, version) == version:
            return
        self.told.update((key.adapter, verb) for verb in missing)
        for verb in missing:
            what, when, callback = CALLED[verb]
            warnings.warn(
                f"the router of adapter {key.adapter!r} has {what}, and nobody moves it in this training: add "
                f"{callback} to the Trainer; in a loop of your own, call model.base_model.{when}",
                stacklevel=2,
            )

    def ended(self, adapter: str) -> None:
        """The training of an adapter has ended: the next one is warned again."""
        self.told -= {(adapter, verb) for verb in CALLED}
        self.versions = {key: version for key, version in self.versions.items() if key.adapter != adapter}
