"""A Trainer callback that makes several experts of one in the middle of a run."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from mixadapters.core.fields import check_integer, check_number
from mixadapters.core.names import UNNAMED
from mixadapters.core.trainers import trainer_above
from mixadapters.training.events import OfAdapter, find_tuner, plain_optimizer
from mixadapters.tuners.moa.spawning import ExpertSpawning


class ExpertSpawnCallback(OfAdapter, TrainerCallback):
    """Trains one expert, and after `at_step` steps makes `n` of it, of which each has lost other weights.

    The optimizer goes on: new parameters, and those whose meaning has changed (the copied expert's, the router's
    output), begin without moments; the others keep theirs. To resume after that step, make the model from the
    checkpoint: PeftModel.from_pretrained(base, checkpoint, is_trainable=True).

    Args:
        at_step: steps of the optimizer before it happens.
        n: experts that come of the one.
        mask_fraction, noise: see `spawn_experts`.
        from_expert: None: the only one.
        adapter_name: the adapter in the model, of MoA.

    Raises:
        ValueError: a number out of range, no such expert or no MoA adapter, a run that ends before, several processes
            (what gathers gradients knows the parameters of the start), or a resumed run whose model has not the
            experts of its checkpoint.
    """

    def __init__(
        self, at_step: int, n: int, mask_fraction: float = 0.5, noise: float = 0.0, from_expert: str | None = None,
        adapter_name: str = UNNAMED,
    ) -> None:  # fmt: skip
        check_integer("at_step", at_step, least=1)
        check_integer("n", n, least=2)
        check_number("mask_fraction", mask_fraction, least=0, below=1)
        check_number("noise", noise, least=0)
        self.at_step, self.n, self.mask_fraction, self.noise = at_step, n, mask_fraction, noise
        self.from_expert = from_expert
        self.is_for(adapter_name)
        self.trainer: Trainer | None = None

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **_: Any
    ) -> None:
        tuner = find_tuner(model)
        self.find_adapter(tuner)
        if not isinstance(tuner, ExpertSpawning):
            kind = tuner.config_of(self.adapter_name).peft_type.value
            raise ValueError(f"ExpertSpawnCallback is for MoA, and adapter {self.adapter_name!r} is of type {kind}")
        if args.world_size > 1 or getattr(args, "deepspeed", None):
            raise ValueError(
                "ExpertSpawnCallback makes parameters in the middle of a run, which what runs in several processes "
                "does not see; train one expert first, then call model.base_model.spawn_experts, then train again"
            )
        self._names(tuner)

    def _names(self, tuner: Any) -> tuple[str, list[str]]:
        """The expert, and the names that its copies get."""
        have = tuner.config_of(self.adapter_name).all_names()
        first = have[0] if self.from_expert is None else self.from_expert
        if first not in have:
            raise ValueError(f"from_expert={first!r} is unknown; have {have}")
        stem = first.rstrip("0123456789")
        number = int(first[len(stem) :] or 0)
        copies = [f"{stem}{number + i}" for i in range(1, self.n)]
        if self.from_expert is None and have not in ([first], [first, *copies]):
            raise ValueError(f"from_expert=None means the only expert, and there are {have}; name one")
        return first, copies

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **_: Any
    ) -> None:
        self.trainer = trainer_above()
        if self.at_step >= state.max_steps:
            raise ValueError(f"at_step={self.at_step} is not before the end of this run of {state.max_steps} steps")
        tuner = find_tuner(model)
        first, copies = self._names(tuner)
        spawned = set(copies) <= set(tuner.config_of(self.adapter_name).all_names())
        if spawned != (state.global_step >= self.at_step):
            raise ValueError(
                f"after step {state.global_step} the copies {copies} of expert {first!r} should "
                f"{'not ' if spawned else ''}be there, which come at step {self.at_step}: make the model from the "
                "checkpoint, PeftModel.from_pretrained(base, checkpoint, is_trainable=True)"
            )

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None,
        optimizer: Any = None, **_: Any,
    ) -> None:  # fmt: skip
        if state.global_step != self.at_step:
            return
        tuner: Any = find_tuner(model)
        before = dict(model.named_parameters())
        first, copies = self._names(tuner)
        tuner.spawn_experts(
            first, copies, mask_fraction=self.mask_fraction, noise=self.noise, adapter_name=self.adapter_name
        )
        pieces = tuner.config_of(self.adapter_name).pieces(first)
        changed = {name for name in before if any(f".experts.{piece}." in name for piece in pieces)}
        assert self.trainer is not None
        take_up(plain_optimizer(optimizer), model, before, changed, self.trainer)


def take_up(
    optimizer: torch.optim.Optimizer, model: nn.Module, before: dict[str, nn.Parameter], changed: set[str],
    trainer: Trainer,
) -> None:  # fmt: skip
    """Let an optimizer go on with the parameters that a model has now, in the order in which Trainer lists them.

    A parameter that took the place of another, of the same name, goes to its group; a new one to the group of those
    that decay as it does. So an optimizer that is made for the model as it is now reads what this one saves.

    Args:
        before: parameters by name, as they were.
        changed: names of those that stay, but shall begin without moments.
    """
    decays = set(trainer.get_decay_parameter_names(model))
    group_of: dict[str, int] = {}
    numbers = {id(p): i for i, settings in enumerate(optimizer.param_groups) for p in settings["params"]}
    like: dict[bool, int] = {}
    for name, parameter in before.items():
        if id(parameter) in numbers:
            group_of[name] = numbers[id(parameter)]
            like.setdefault(name in decays, group_of[name])
    params: list[list[nn.Parameter]] = [[] for _ in optimizer.param_groups]
    kept: set[int] = set()
    for name, parameter in model.named_parameters():
        if name in group_of or (name not in before and parameter.requires_grad):
            group = group_of.get(name, like.get(name in decays, 0 if name in decays else len(params) - 1))
            params[group].append(parameter)
            if before.get(name) is parameter and name not in changed:
                kept.add(id(parameter))
    for old in [p for p in optimizer.state if id(p) not in kept]:
        del optimizer.state[old]
    for settings, members in zip(optimizer.param_groups, params, strict=True):
        settings["params"] = members
