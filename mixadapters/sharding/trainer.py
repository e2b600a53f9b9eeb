"""Experts spread over the processes of transformers' Trainer, and dealt anew while it trains."""

from __future__ import annotations

import warnings
from typing import Any

from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments

from mixadapters.core.fields import check_integer, check_number
from mixadapters.core.names import UNNAMED
from mixadapters.core.trainers import trainer_above
from mixadapters.sharding.bank import ShardedBank
from mixadapters.sharding.experts import ExpertSharding, keep_from_ddp, mixtures_to_spread, shard_experts
from mixadapters.training.events import OfAdapter, RunCallback, find_tuner, plain_optimizer


class SameBatchesMixin:
    """Every process trains on the same batches, which is what experts need that are spread over processes.

        class ExpertTrainer(SameBatchesMixin, Trainer): ...

    A step has the rows of one process. Evaluation and prediction share rows out, as in any Trainer. Warns where no
    experts are spread, so that all processes would do the same work.
    """

    args: TrainingArguments
    accelerator: Any
    model: nn.Module
    callback_handler: Any

    def get_train_dataloader(self) -> DataLoader:
        parts: Any = super()
        if self.args.world_size == 1:
            return parts.get_train_dataloader()
        watched = any(isinstance(callback, ExpertShardingCallback) for callback in self.callback_handler.callbacks)
        if not watched and not any(isinstance(module, ShardedBank) for module in self.model.modules()):
            warnings.warn(
                f"{type(self).__name__} gives all {self.args.world_size} processes the same rows, and no experts are "
                "spread over them, so that they do the same work: add ExpertShardingCallback(), or leave "
                "SameBatchesMixin out",
                stacklevel=2,
            )
        state = self.accelerator.state
        before = state.device_mesh
        # How accelerate is told of processes that read the same batch, whatever they do with it.
        state.device_mesh = init_device_mesh(self.args.device.type, (self.args.world_size,), mesh_dim_names=("tp",))
        try:
            return parts.get_train_dataloader()
        finally:
            state.device_mesh = before  # all Accelerators of the process share it

    def get_total_train_batch_size(self, args: TrainingArguments) -> int:
        parts: Any = super()
        return parts.get_total_train_batch_size(args) // args.world_size


class ExpertShardingCallback(OfAdapter, RunCallback):
    """Spreads the experts of an adapter over the processes of a Trainer (`shard_experts`), and deals them anew by
    their load after every so many steps, with what the optimizer keeps for them.

        class ExpertTrainer(SameBatchesMixin, Trainer): ...

        arguments = TrainingArguments("out", max_grad_norm=0.0)
        ExpertTrainer(model, arguments, train_dataset=rows, callbacks=[ExpertShardingCallback(every=100)]).train()

    While Trainer evaluates or saves, and after the run, every process holds all experts: checkpoints are ordinary
    ones, from which any number of processes goes on, experts dealt evenly at first.

    A run that fails leaves the experts where they lie, since processes that have ended can give none back. Where all
    are still there, `callback.sharding.close(trainer.optimizer)` in each of them gathers the experts; else go on from
    the last checkpoint. A warning says so.

    Args:
        every: steps between deals; 0: they stay as they are dealt at first, evenly.
        copies: see `shard_experts`.
        max_grad_norm: what gradients are clipped to, in place of TrainingArguments.max_grad_norm; 0: nothing.
        adapter_name: the adapter in the model; not given: the active one.

    Attributes:
        sharding: of the run; None outside of it, unless it has failed.

    Raises:
        ValueError: a number out of range; one process; FSDP, DeepSpeed or another engine that takes parameters apart,
            float16 or torch.compile; a Trainer without SameBatchesMixin, or that clips gradients itself; an adapter
            whose experts cannot be spread.
    """

    def __init__(
        self, every: int = 100, copies: int = 0, max_grad_norm: float = 1.0, adapter_name: str = UNNAMED
    ) -> None:
        check_integer("every", every, least=0)
        check_integer("copies", copies, least=0)
        check_number("max_grad_norm", max_grad_norm, least=0)
        self.every, self.copies, self.max_grad_norm = every, copies, max_grad_norm
        self.is_for(adapter_name)
        self.sharding: ExpertSharding | None = None

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **_: Any
    ) -> None:
        trainer = trainer_above()
        assert trainer is not None
        check(args, trainer)
        tuner = find_tuner(model)
        self.find_adapter(tuner)
        mixtures = mixtures_to_spread(tuner, self.adapter_name)
        keep_from_ddp(model, [mixture.bank for mixture in mixtures.values()])  # before Trainer wraps the model

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None,
        optimizer: Any = None, **_: Any,
    ) -> None:  # fmt: skip
        if self.sharding is None:  # not earlier: Trainer may have evaluated before its first step
            self.sharding = shard_experts(
                model,
                every=self.every,
                copies=self.copies,
                optimizer=plain_optimizer(optimizer),
                adapter_name=self.adapter_name,
            )
        elif self.sharding.is_whole:
            self.sharding.spread(plain_optimizer(optimizer))

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        if self.sharding is not None and self.max_grad_norm:
            self.sharding.clip_grad_norm(self.max_grad_norm)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, optimizer: Any = None, **_: Any
    ) -> None:
        if self.sharding is not None and self.every and state.global_step % self.every == 0:
            self.sharding.reshard(plain_optimizer(optimizer))
        self._before_pause(control, optimizer)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, optimizer: Any = None, **_: Any
    ) -> None:
        self._before_pause(control, optimizer)

    def _before_pause(self, control: TrainerControl, optimizer: Any) -> None:
        """Gathers the experts where Trainer is about to evaluate, to save or to end."""
        pauses = control.should_evaluate or control.should_save or control.should_training_stop
        if self.sharding is not None and pauses and not self.sharding.is_whole:
            self.sharding.gather(plain_optimizer(optimizer))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None,
        optimizer: Any = None, **_: Any,
    ) -> None:  # fmt: skip
        if self.sharding is not None:
            self.sharding.close(plain_optimizer(optimizer))
            self.sharding = None

    def run_ended(self, model: nn.Module) -> None:
        if self.sharding is not None and not self.sharding.is_whole:
            warnings.warn(
                "the run has ended before its time, and the experts are still spread over the processes: where all of "
                "these go on, call callback.sharding.close(trainer.optimizer) in each of them, callback being this "
                "ExpertShardingCallback; else make the model anew, and go on from the last checkpoint",
                stacklevel=2,
            )


def check(args: TrainingArguments, trainer: Trainer) -> None:
    """Refuses, before the first step, what the experts cannot be spread under."""
    name = "ExpertShardingCallback"
    if args.world_size < 2:
        raise ValueError(f"{name} spreads experts over processes, and there is one: leave it out")
    for engine, on in (("FSDP", trainer.is_fsdp_enabled), ("DeepSpeed", trainer.is_deepspeed_enabled)):
        if on:
            raise ValueError(
                f"{name} cannot run under {engine}, which takes the parameters of experts apart: use one of them"
            )
    if getattr(trainer.accelerator, "parallelism_config", None) is not None and (
        trainer.accelerator.parallelism_config.total_size > 1
    ):
        raise ValueError(f"{name} cannot run under parallelism_config, which deals with processes its own way")
    if args.fp16:
        raise ValueError(
            f"{name} cannot run with fp16=True, whose scaler leaves out steps in one process alone: use bf16=True"
        )
    if args.torch_compile:
        raise ValueError(f"{name} cannot run with torch_compile=True: experts that are spread cannot be compiled")
    if not isinstance(trainer, SameBatchesMixin):
        raise ValueError(
            f"{name} needs the same batches in all processes, and {type(trainer).__name__} gives each its own: make a "
            "class ExpertTrainer(SameBatchesMixin, Trainer), with mixadapters.sharding.SameBatchesMixin"
        )
    order = type(trainer).__mro__
    if order.index(SameBatchesMixin) > order.index(Trainer):
        raise ValueError(
            f"{type(trainer).__name__} has SameBatchesMixin after Trainer among its bases, where it changes nothing: "
            "write class ExpertTrainer(SameBatchesMixin, Trainer)"
        )
    if args.max_grad_norm:
        raise ValueError(
            f"max_grad_norm={args.max_grad_norm!r} of TrainingArguments would clip by the norm of the gradients that "
            f"one process has: pass max_grad_norm=0.0 there, and {name}(max_grad_norm={args.max_grad_norm!r})"
        )
