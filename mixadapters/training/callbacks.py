"""Trainer callbacks: what trains in a stage, and how the gates spread their weight."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from mixadapters.core.context import ForwardContext, Objective
from mixadapters.core.model import MixtureModel
from mixadapters.core.usage import GateUsage
from mixadapters.training.objectives import require_pretrained_head


class StageCallback(TrainerCallback):
    """Trains the parameters of one stage of a method, with the objectives of that stage.

    It acts at the end of `Trainer.__init__`, before the optimizer is made, so that frozen weights never enter it, and
    in the same way when a run is resumed.

    Args:
        stage: a stage of the adapter's config, such as "domain" or "task".
        adapter_name: the adapter in the model.
        objectives: what changes inputs, outputs and loss. They stay on the model, so that `Trainer.evaluate` knows
            them after the run too, until the StageCallback of another Trainer replaces them.
        check_head: before the first step, refuse a language-model head that looks newly initialised.

    Raises:
        ValueError: unknown adapter or stage; a Trainer that would drop columns which an objective or the adapter
            needs; reentrant activation checkpointing together with auxiliary losses; a Trainer that trains after the
            model was set to another stage.
    """

    def __init__(
        self, stage: str, adapter_name: str = "default", objectives: Sequence[Objective] = (), check_head: bool = True
    ) -> None:
        self.stage, self.adapter_name = stage, adapter_name
        self.objectives, self.check_head = list(objectives), check_head
        self.trainer: Trainer | None = None

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **_: Any
    ) -> None:
        tuner = find_tuner(model)
        tuner.set_stage(self.stage, self.adapter_name)
        needed = set(type(tuner.peft_config[self.adapter_name]).needs).union(*(o.takes for o in self.objectives))
        if needed and args.remove_unused_columns:
            raise ValueError(
                f"remove_unused_columns=True would drop the columns {sorted(needed)} that this stage needs; pass "
                "remove_unused_columns=False"
            )
        if self._has_auxiliary_losses(tuner) and (args.gradient_checkpointing_kwargs or {}).get("use_reentrant"):
            raise ValueError(
                "gradient_checkpointing_kwargs={'use_reentrant': True} drops the gradient of auxiliary losses; pass "
                "{'use_reentrant': False}"
            )
        self._attach(tuner.context)

    def _attach(self, context: ForwardContext) -> None:
        """This stage's objectives in place of those of an earlier stage; what else is attached stays."""
        others = [o for o in context.objectives if o not in context.staged and o not in self.objectives]
        context.objectives[:] = [*others, *self.objectives]
        context.staged = list(self.objectives)

    def _has_auxiliary_losses(self, tuner: MixtureModel) -> bool:
        config = tuner.peft_config[self.adapter_name]
        return bool(self.objectives) or any(getattr(config, c, 0) for c in ("balance_coef", "z_coef", "entropy_coef"))

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None,
        optimizer: Any = None, train_dataloader: Any = None, **_: Any,
    ) -> None:  # fmt: skip
        self.trainer = trainer_of_event()
        tuner = find_tuner(model)
        if (now := tuner.stage.get(self.adapter_name)) != self.stage:
            raise ValueError(
                f"the model has been set to stage={now!r} since this Trainer was made for stage={self.stage!r}; make "
                "the Trainer of a stage when the run before it has ended"
            )
        self._attach(tuner.context)
        base = tuner.model
        has_head = "MaskedLM" in type(base).__name__ or "CausalLM" in type(base).__name__
        if self.check_head and self.stage == "domain" and has_head and state.global_step == 0:
            with torch.random.fork_rng(enabled=True):
                batch = next(iter(train_dataloader))
            if "labels" in batch:
                device = next(base.parameters()).device
                named = {k: batch[k].to(device) for k in ("input_ids", "attention_mask", "labels") if k in batch}
                require_pretrained_head(base, named)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **_: Any
    ) -> None:
        """The weight of auxiliary losses that ride on the outputs: one part of the step, scaled as its loss is."""
        steps = getattr(self.trainer, "current_gradient_accumulation_steps", args.gradient_accumulation_steps)
        scale: Tensor | float = 1 / steps  # an epoch's last step may accumulate fewer micro-batches
        scaler = getattr(getattr(self.trainer, "accelerator", None), "scaler", None)
        if scaler is not None and scaler.is_enabled():  # of float16: what the optimizer divides gradients by
            scale = scaler.scale(torch.tensor(1 / steps, device=args.device))
        find_tuner(model).context.loss_scale = scale

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **_: Any
    ) -> None:
        find_tuner(model).context.loss_scale = None


class GateUsageCallback(TrainerCallback):
    """Reports through the Trainer's own loggers how each gate spread its weight, and the auxiliary losses by name.

    Logged with every `logging_steps`: `gate/<layer>/weight/<arm>`, `gate/<layer>/entropy` (nats), `gate/<layer>/dead`
    (arms with less than 1 % of the weight), their means over layers under `gate/mean/...`, and `loss/<name>`, each a
    mean since the last report. Gates see training batches only.

    Args:
        trainer: as in `trainer.add_callback(GateUsageCallback(trainer))`; its `log` takes the report.
        per_layer: report single layers too, not only means.
    """

    def __init__(self, trainer: Trainer, per_layer: bool = False) -> None:
        self.trainer, self.per_layer = trainer, per_layer

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **_: Any
    ) -> None:
        if control.should_log:
            report = collect_usage(model, self.per_layer)
            if report:
                self.trainer.log(report)


def collect_usage(model: nn.Module, per_layer: bool = False) -> dict[str, float]:
    """The running gate usage and auxiliary losses of `model`, reset by reading."""
    report: dict[str, float] = {}
    sums: dict[str, list[float]] = {}
    for path, usage in model.named_modules():
        if isinstance(usage, GateUsage) and float(usage.count) > 0:
            layer = path.split("_adapters.")[0].removeprefix("base_model.model.").rpartition(".")[0]
            for name, value in usage.summary().items():
                sums.setdefault(name, []).append(value)
                if per_layer:
                    report[f"gate/{layer}/{name}"] = value
            usage.reset()
    report.update({f"gate/mean/{name}": sum(values) / len(values) for name, values in sums.items()})
    context = ForwardContext.find(find_tuner(model).model)
    if context is not None:
        report.update({f"loss/{name}": float(total) / count for name, (total, count) in context.loss_log.items()})
        context.loss_log.clear()
    return report


def trainer_of_event() -> Trainer | None:
    """The Trainer that is calling its callbacks. Events do not say whose they are, and only it knows the columns of
    its dataset and how many micro-batches a step has."""
    frame = inspect.currentframe()
    while frame is not None:
        owner = frame.f_locals.get("self")
        if isinstance(owner, Trainer):
            return owner
        frame = frame.f_back
    return None


def find_tuner(model: nn.Module) -> MixtureModel:
    """The tuner inside a PeftModel (or around it: DDP, torch.compile). Raises ValueError where there is none."""
    for module in model.modules():
        if isinstance(module, MixtureModel):
            return module
    raise ValueError(
        f"{type(model).__name__} holds no adapter of mixadapters; pass the result of get_peft_model(model, config)"
    )
