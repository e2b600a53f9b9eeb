"""Warns of a training whose routers need the verbs of `core/progress.py`, and in which nobody calls them."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

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
    """Which adapters have their routers moved along a training, by the verbs of `core/progress.py`.

    Attributes:
        told: (adapter, verb) that somebody has called, or whose lack has been warned of.
    """

    def __init__(self) -> None:
        self.told: set[tuple[str, str]] = set()
        self.began: dict[RoutingKey, int] = {}  # steps that optimizers had made at the first training forward

    def look(self, key: RoutingKey, router: Any) -> None:
        """Called in each training forward of a router. Warns once a step of an optimizer has come and nobody has moved
        the router."""
        if torch.compiler.is_compiling():  # which takes a property that is asked for with a default for itself
            return
        missing = [verb for verb in getattr(router, "moved_by", ()) if (key.adapter, verb) not in self.told]
        if not missing:
            return
        made = OPTIMIZERS.steps_made()
        if self.began.setdefault(key, made) == made:
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
        self.began = {key: made for key, made in self.began.items() if key.adapter != adapter}


class OptimizerSteps:
    """Counts the steps of all optimizers of torch, from when it is first asked."""

    def __init__(self) -> None:
        self._steps: int | None = None

    def steps_made(self) -> int:
        if self._steps is None:
            self._steps = 0
            # Fused optimizers change weights without a trace in their version counter.
            register_optimizer_step_post_hook(self._count)
        return self._steps

    def _count(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        self._steps = (self._steps or 0) + 1


OPTIMIZERS = OptimizerSteps()
