"""What moves with the steps of a training: scheduled options, balancing biases, searched permutations.

The callbacks of `training` call these verbs; so does a training loop of one's own. `core/steps.py` warns where nobody
does.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

from mixadapters.core.context import ForwardContext
from mixadapters.core.fields import check_number, check_share
from mixadapters.core.mixture import Mixture
from mixadapters.core.names import UNNAMED, of_active
from mixadapters.core.processes import sum_in_place
from mixadapters.core.routing import RoutingKey


class StepVerbs:
    """Part of a tuner."""

    @property
    def context(self) -> ForwardContext:
        raise NotImplementedError

    def mixtures(self, adapter_name: str | None = None) -> dict[RoutingKey, Mixture]:
        raise NotImplementedError

    def config_of(self, adapter_name: str) -> Any:
        raise NotImplementedError

    def routers_of(self, adapter_name: str) -> Iterator[Any]:
        """The routers of an adapter that decide for themselves. Raises ValueError where there is no such adapter."""
        self.config_of(adapter_name)
        for mixture in self.mixtures(adapter_name).values():
            if not getattr(mixture.router, "follows", False):
                yield mixture.router

    @of_active
    def set_schedules(self, schedules: Any, adapter_name: str = UNNAMED) -> None:
        """Let options of an adapter's routers change along the training; the config keeps the schedules.

        schedules: option -> [[progress from 0 to 1, value], ...], in place of those that it has.

        Raises:
            ValueError: no such option, a value that the routers do not take, or a config that keeps no schedules.
        """
        config = self.config_of(adapter_name)
        if not hasattr(config, "schedules"):
            raise ValueError(
                f"adapter {adapter_name!r} is a {config.peft_type.value} adapter, whose config keeps no schedules for "
                "its router; MoAConfig does"
            )
        config.check_schedules(schedules)
        routers = list(self.routers_of(adapter_name))
        for name, points in schedules.items():
            for point in points:
                _check_value(routers, name, point)
        config.schedules = {name: [list(point) for point in points] for name, points in schedules.items()}
        for router in routers:
            router.has_schedules = bool(schedules)

    @of_active
    def set_progress(self, done: float, adapter_name: str = UNNAMED) -> None:
        """Before a training step: options of routers become what the config's `schedules` say, which it notes.

        done: the share of the training that is done, from 0 to 1.
        """
        check_share("done", done)
        config = self.config_of(adapter_name)
        schedules = getattr(config, "schedules", {})
        for router in self.routers_of(adapter_name):
            if hasattr(router, "at_progress"):
                router.at_progress(done)
            for name, points in schedules.items():
                router.set_option(name, router.option_at(name, points, done))
        if schedules:
            config.note_progress(done)
        self.context.steps.told.add((adapter_name, "set_progress"))

    @of_active
    def update_biases(self, adapter_name: str = UNNAMED) -> None:
        """After a step of the optimizer: move the biases of routers that balance by them (`bias_update_rate`), by the
        rows that all processes have routed since the last call. All processes call it."""
        routers = [r for r in self.routers_of(adapter_name) if getattr(r, "balancing", None) is not None]
        sum_in_place([router.balancing.counts for router in routers])
        for router in routers:
            router.update_bias()
        self.context.steps.told.add((adapter_name, "update_biases"))

    @of_active
    def search_permutation(
        self,
        done: float,
        *,
        tau: tuple[float, float] = (1e-3, 1e-7),
        iterations: tuple[int, int] = (20, 150),
        adapter_name: str = UNNAMED,
    ) -> None:
        """Before a training step: how sharp permutations that routers learn are now; at the end they are made hard.

        done: the share of the search that is done; from 1 on permutations are hard.
        tau, iterations: at the start and the end, log-linear between them (Ibrahim et al. 2023, section 4).
        """
        check_number("done", done, least=0)
        permutations = [getattr(router, "permutation", None) for router in self.routers_of(adapter_name)]
        for permutation in permutations:
            if permutation is None or permutation.hard:
                continue
            permutation.tau = between(*tau, min(done, 1.0))
            permutation.iterations = round(between(*iterations, min(done, 1.0)))
            if done >= 1:
                permutation.harden()
        self.context.steps.told.add((adapter_name, "search_permutation"))


def _check_value(routers: Sequence[Any], name: str, point: Sequence[float]) -> None:
    """Raise ValueError if no router takes the value of a point, or one does not take what it makes of it."""
    refused = []
    for router in routers:
        router.check_option(name, router.option_at(name, [point], point[0]))
        try:
            router.check_option(name, point[1])
        except ValueError as error:
            refused.append(error)
    if refused and len(refused) == len(routers):
        raise ValueError(f"schedules[{name!r}]: {refused[0]}") from None


def between(start: float, end: float, done: float) -> float:
    """Log-linear; exact at the ends."""
    if done in (0, 1):
        return end if done else start
    return math.exp(math.log(start) + (math.log(end) - math.log(start)) * done)
