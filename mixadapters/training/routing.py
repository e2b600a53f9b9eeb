"""Trainer callbacks that move what moves with the steps of a training: options, biases, permutations of routers.

`StageCallback` does the first two by itself. Each goes on exactly where it was when a run is resumed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn
from transformers import TrainerControl, TrainerState, TrainingArguments

from mixadapters.core.fields import check_number, finite
from mixadapters.core.model import MixtureModel
from mixadapters.core.names import UNNAMED
from mixadapters.routers.permutation import assignment
from mixadapters.routers.schedules import Points, check_schedules
from mixadapters.training.events import OfAdapter, RunCallback, find_tuner, progress


class _MovesRouters(OfAdapter, RunCallback):
    """Part of a callback that moves something of the routers of an adapter with the steps of a run."""

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **_: Any
    ) -> None:
        tuner = find_tuner(model)
        self.find_adapter(tuner)
        self.prepare(tuner)

    def prepare(self, tuner: MixtureModel) -> None:
        """Called when a Trainer is made. Raises ValueError where the adapter has nothing that this would move."""
        raise NotImplementedError

    def run_ended(self, model: nn.Module) -> None:
        find_tuner(model).context.steps.ended(self.adapter_name)


class RouterScheduleCallback(_MovesRouters):
    """Lets options of routers follow the training: `{"temperature": [[0, 2.0], [0.6, 0.3]]}`, piecewise linear over
    step / max_steps, for temperature, k, p, noise, jitter and the coefficients of losses.

    Routers with a schedule of their own ("dense_to_sparse") are told the progress too. The config keeps the schedules
    and says what options are now, so that a checkpoint that is loaded routes as it did when it was saved.

    Args:
        schedules: in place of those of the config (MoAConfig.schedules). None: these.
        adapter_name: the adapter in the model; not given: the active one.

    Raises:
        ValueError: no schedule, points that are none, an option that the router has not or that may not change in
            training, or nothing in the model that follows one.
    """

    def __init__(self, schedules: Mapping[str, Points] | None = None, adapter_name: str = UNNAMED) -> None:
        if schedules is not None:
            check_schedules(schedules)
        self.schedules = schedules
        self.is_for(adapter_name)

    def prepare(self, tuner: MixtureModel) -> None:
        if self.schedules is not None:
            tuner.set_schedules(self.schedules, self.adapter_name)
        if not any("set_progress" in getattr(r, "moved_by", ()) for r in tuner.routers_of(self.adapter_name)):
            raise ValueError(
                f"adapter {self.adapter_name!r} has no schedule to follow: give schedules={{option: [[0, value], "
                "[1, value]]}, here or in the config"
            )

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **_: Any
    ) -> None:
        find_tuner(model).set_progress(progress(state), self.adapter_name)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **_: Any
    ) -> None:
        # Before the Trainer saves: a checkpoint after step n holds what step n + 1 is to begin with.
        find_tuner(model).set_progress(progress(state), self.adapter_name)


class BalanceBiasCallback(_MovesRouters):
    """After each step of the optimizer moves the biases by which routers balance their experts (`bias_update_rate`),
    by the rows that all processes have routed in the step, accumulated micro-batches included.

    Args:
        adapter_name: the adapter in the model; not given: the active one.

    Raises:
        ValueError: no router of the adapter balances by a bias.
    """

    def __init__(self, adapter_name: str = UNNAMED) -> None:
        self.is_for(adapter_name)

    def prepare(self, tuner: MixtureModel) -> None:
        if not any(getattr(r, "balancing", None) for r in tuner.routers_of(self.adapter_name)):
            raise ValueError(
                f"no router of adapter {self.adapter_name!r} balances by a bias: set router_bias_update_rate, or "
                "the option bias_update_rate of a top_k router, or leave BalanceBiasCallback out"
            )

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **_: Any
    ) -> None:
        find_tuner(model).update_biases(self.adapter_name)


class PermutationSearchCallback(_MovesRouters):
    """Searches the permutations that routers learn ("tree" with `learn_permutation`) in the first part of a run.

    tau and the number of Sinkhorn iterations go from their first to their last value, log-linearly; then each
    permutation is made hard, and stays (Ibrahim et al. 2023, section 4).

    Args:
        fraction: of the run, for the search; above 0 and below 1.
        tau, iterations: at its start and its end.
        adapter_name: the adapter in the model; not given: the active one.

    Raises:
        ValueError: a value out of range, or no router that learns a permutation.
        ImportError: SciPy, which makes permutations hard, is missing.
    """

    def __init__(
        self,
        fraction: float = 0.05,
        tau: tuple[float, float] = (1e-3, 1e-7),
        iterations: tuple[int, int] = (20, 150),
        adapter_name: str = UNNAMED,
    ) -> None:
        check_number("fraction", fraction, above=0, below=1)
        if not _is_pair(tau) or not all(finite(value) and value > 0 for value in tau):
            raise ValueError(f"tau={tau!r} must be two finite numbers above 0: at the start and the end of the search")
        if not _is_pair(iterations) or not all(type(count) is int and count > 0 for count in iterations):
            raise ValueError(f"iterations={iterations!r} must be two positive integers, at the start and the end")
        self.fraction, self.tau, self.iterations = fraction, tau, iterations
        self.is_for(adapter_name)

    def prepare(self, tuner: MixtureModel) -> None:
        if not any(getattr(r, "permutation", None) for r in tuner.routers_of(self.adapter_name)):
            raise ValueError(
                f"no router of adapter {self.adapter_name!r} learns a permutation: use "
                "router={'kind': 'tree', 'learn_permutation': True}, or leave PermutationSearchCallback out"
            )
        assignment()  # now, and not when the search is over

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **_: Any
    ) -> None:
        self._search(state, model)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **_: Any
    ) -> None:
        self._search(state, model)

    def _search(self, state: TrainerState, model: Any) -> None:
        find_tuner(model).search_permutation(
            progress(state) / self.fraction, tau=self.tau, iterations=self.iterations, adapter_name=self.adapter_name
        )


def _is_pair(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and len(value) == 2
