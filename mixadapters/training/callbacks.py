"""Trainer callbacks: what trains in a stage, and how the routers spread their weight."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from mixadapters.core.config import MixtureConfig
from mixadapters.core.context import ForwardContext, Objective
from mixadapters.core.engines import loaded
from mixadapters.core.fields import check_kind, check_switches
from mixadapters.core.model import MixtureModel
from mixadapters.core.names import UNNAMED
from mixadapters.core.processes import gathered, several
from mixadapters.core.registry import nearest
from mixadapters.core.saving import restore_frozen
from mixadapters.core.trainers import check_best, check_columns, check_launched, trainer_above
from mixadapters.routers.base import COEFFICIENTS
from mixadapters.training.checkpoints import (
    STAGE_FILE,
    adapters_in,
    begun_anew,
    checkpoint_folder,
    fault,
    lay_out_moments,
    note_stages,
    stage_of,
)
from mixadapters.training.events import OfAdapter, RunCallback, find_tuner, progress
from mixadapters.training.objectives import require_pretrained_head


class StageCallback(OfAdapter, RunCallback):
    """Trains the parameters of one stage of a method, with the objectives of that stage.

    It acts at the end of `Trainer.__init__`, before the optimizer is made, so that frozen weights never enter it, and
    in the same way when a run is resumed. While it trains it moves what moves with the steps: options that the config
    has on a schedule, and biases that balance experts.

    Args:
        stage: a stage of the adapter's config, such as "domain" or "task".
        adapter_name: the adapter in the model.
        objectives: what changes inputs, outputs and loss. They stay on the model, so that `Trainer.evaluate` knows
            them after the run too, until the StageCallback of another Trainer replaces them.
        check_head: before the first step, refuse a language-model head that looks newly initialised.
        domain: the only domain that trains, in MixDA's stage "domain". Rows without `domain_ids` take it.

    Raises:
        ValueError: when it is made, a stage that no method has. When the Trainer is, an unknown adapter or domain, or
            a stage of another method; a Trainer that would drop columns which an objective or the adapter needs, or
            which the train dataset has and adapters read; load_best_model_at_end with another adapter than "default";
            reentrant activation checkpointing together with auxiliary losses. When it trains, a Trainer that was made
            without it, or before the model was set to another stage, or goes on from a checkpoint of another stage.
    """

    def __init__(
        self, stage: str, adapter_name: str = UNNAMED, objectives: Sequence[Objective] = (), check_head: bool = True,
        *, domain: str | None = None,
    ) -> None:  # fmt: skip
        check_switches(check_head=check_head)
        check_stage(stage)
        self.stage, self.domain = stage, domain
        self.is_for(adapter_name)
        self.noted = stage_in_words(stage, domain)  # in checkpoints
        such = "such as [PreservationObjective()] of mixadapters.training.objectives"
        check_kind("objectives", objectives, (list, tuple), f"a list of objectives, {such}")
        self.objectives, self.check_head = list(objectives), check_head
        for objective in self.objectives:
            if isinstance(objective, type) or not all(hasattr(objective, n) for n in ("takes", "before", "after")):
                reason = "a class, not an object of it" if isinstance(objective, type) else "no objective"
                raise ValueError(f"objectives hold {objective!r:.80}, which is {reason}: give a list {such}")
        self.trainer: Trainer | None = None
        self.set_up = False  # whether a Trainer has been made with it
        self.resumed: Path | None = None  # the checkpoint that the run goes on from

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **_: Any
    ) -> None:
        tuner = find_tuner(model)
        self.find_adapter(tuner)
        if self.adapter_name in tuner.peft_config:
            self._check(args, tuner)
        tuner.set_stage(self.stage, self.adapter_name, self.domain)  # refuses unknown names
        self._attach(tuner.context)
        self.set_up = True
        self._look_at_checkpoints(args)

    def _check(self, args: TrainingArguments, tuner: MixtureModel) -> None:
        """Refuses what would go wrong silently in the run."""
        check_launched(args)
        trainer = trainer_above()
        self._check_columns(args, tuner, trainer)
        if trainer is not None:
            check_saves(trainer)
            check_sharded_once(trainer)
        check_best(args, tuner.active_adapters[0], self.adapter_name)
        if self._has_auxiliary_losses(tuner) and (args.gradient_checkpointing_kwargs or {}).get("use_reentrant"):
            raise ValueError(
                "gradient_checkpointing_kwargs={'use_reentrant': True} drops the gradient of auxiliary losses; pass "
                "{'use_reentrant': False}"
            )

    def _check_columns(self, args: TrainingArguments, tuner: MixtureModel, trainer: Trainer | None) -> None:
        """Refuses a Trainer that drops what adapters and objectives read before they see it."""
        if not args.remove_unused_columns:
            return
        needed = set(type(tuner.peft_config[self.adapter_name]).needs).union(*(o.takes for o in self.objectives))
        if needed:
            raise ValueError(
                f"remove_unused_columns=True would drop the columns {sorted(needed)} that this stage needs; pass "
                "remove_unused_columns=False"
            )
        if trainer is not None:
            check_columns(trainer, tuner.context.own_fields.intersection(["adapter_names", *tuner.fields]))

    def _look_at_checkpoints(self, args: TrainingArguments) -> None:
        """Says, before a run, why it could not go on from the checkpoint that it would be given."""
        last = get_last_checkpoint(args.output_dir) if Path(args.output_dir).is_dir() else None
        for given in dict.fromkeys(filter(None, (last, args.resume_from_checkpoint))):
            folder = Path(given)
            if not folder.is_dir():
                continue
            if reason := fault(folder):
                warnings.warn(
                    f"no run can go on from the checkpoint {folder}: {reason}. Remove that folder, or pass an older "
                    "one as resume_from_checkpoint",
                    stacklevel=2,
                )
                continue
            if (folder / "latest").is_file() and not getattr(trainer_above(), "is_deepspeed_enabled", False):
                warnings.warn(
                    f"the checkpoint {folder} is DeepSpeed's: a run without it goes on from the adapter's weights, "
                    "with new moments of the optimizer",
                    stacklevel=2,
                )
            if (made := stage_of(folder, self.adapter_name)) not in (None, self.noted):
                warnings.warn(
                    f"the checkpoint {folder} was made in stage={made!r}; a run of stage={self.noted!r} cannot go on "
                    "from it. Load its adapter with PeftModel.from_pretrained(..., is_trainable=True), and give this "
                    "stage an output_dir of its own",
                    stacklevel=2,
                )

    def _attach(self, context: ForwardContext) -> None:
        """This stage's objectives in place of those of an earlier stage; what else is attached stays."""
        others = [o for o in context.objectives if o not in context.staged and o not in self.objectives]
        context.objectives[:] = [*others, *self.objectives]
        context.staged = list(self.objectives)

    def _has_auxiliary_losses(self, tuner: MixtureModel) -> bool:
        routers = tuner.routers_of(self.adapter_name)
        return bool(self.objectives) or any(getattr(r, name, 0) for r in routers for name in COEFFICIENTS)

    def run_begins(self, trainer: Trainer, resumed: Path | None) -> None:
        self.resumed = resumed
        if resumed is not None and self.set_up:
            check_resumed(resumed, trainer, self.adapter_name, self.noted)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None,
        optimizer: Any = None, train_dataloader: Any = None, **_: Any,
    ) -> None:  # fmt: skip
        self.trainer = trainer_above()
        tuner = find_tuner(model)
        self._refuse_other_stage(tuner)
        if self.resumed is None and state.global_step:  # a Trainer whose `train` does not call that of transformers
            folder = checkpoint_folder(args, state)
            if self.trainer is not None and folder.is_dir():
                self.run_begins(self.trainer, folder)
        if self.resumed is not None and shards(self.trainer):
            inside = self.resumed if self.adapter_name == "default" else self.resumed / self.adapter_name
            restore_frozen(model, self.adapter_name, inside)
        if optimizer is not None:
            with torch.no_grad():
                lay_out_moments(optimizer)
        self._attach(tuner.context)
        tuner.set_progress(progress(state), self.adapter_name)
        if self.check_head and self.stage == "domain" and state.global_step == 0:
            self._check_head(tuner.model, train_dataloader)

    def _refuse_other_stage(self, tuner: MixtureModel) -> None:
        """Raises ValueError where the model is in another stage than the Trainer was made for."""
        now, domain = tuner.stage.get(self.adapter_name), tuner.single_domain.get(self.adapter_name)
        if (now, domain) == (self.stage, self.domain):
            return
        if not self.set_up:
            raise ValueError(
                f"StageCallback({self.stage!r}) was added when the Trainer had been made, whose optimizer may hold "
                "other parameters than the stage's: pass it in Trainer(..., callbacks=[...])"
            )
        raise ValueError(
            f"the model has been set to stage={stage_in_words(now, domain)!r} since this Trainer was made for "
            f"stage={self.noted!r}; make the Trainer of a stage when the run before it has ended"
        )

    def _check_head(self, base: nn.Module, batches: Any) -> None:
        """Refuses a language model whose head has not been trained, by its loss on the first batch."""
        if not any(kind in type(base).__name__ for kind in ("MaskedLM", "CausalLM")):
            return
        with torch.random.fork_rng(enabled=True):
            batch = next(iter(batches))
        if "labels" in batch:
            device = next(base.parameters()).device
            named = {k: batch[k].to(device) for k in ("input_ids", "attention_mask", "labels") if k in batch}
            # What is sharded runs from its outermost module alone, which gathers it.
            require_pretrained_head(self.trainer.model_wrapped if self.trainer and several() else base, named)

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

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **_: Any
    ) -> None:
        find_tuner(model).update_biases(self.adapter_name)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **_: Any
    ) -> None:
        find_tuner(model).set_progress(progress(state), self.adapter_name)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        folder = checkpoint_folder(args, state)
        if args.should_save and folder.is_dir():
            callbacks = [self] if self.trainer is None else self.trainer.callback_handler.callbacks
            note_stages(folder, {c.adapter_name: c.noted for c in callbacks if isinstance(c, StageCallback)})

    def run_ended(self, model: nn.Module) -> None:
        context = find_tuner(model).context
        context.loss_scale = None
        context.steps.ended(self.adapter_name)
        self.resumed = None


def stage_in_words(stage: Any, domain: str | None) -> Any:
    """A stage as checkpoints and messages name it: with the domain that trains alone, if one does."""
    return stage if domain is None else f"{stage} {domain}"


def check_stage(stage: Any) -> None:
    """Raises ValueError where no method that is registered has such a stage; the model says whether its own has."""
    kinds = [kind for kind in PEFT_TYPE_TO_CONFIG_MAPPING.values() if issubclass(kind, MixtureConfig)]
    stages = sorted({name for kind in kinds for name in kind.stages})
    if stage not in stages:
        raise ValueError(
            f"stage={stage!r} is a stage of no method; there are {stages}.{nearest(str(stage), stages)} Stages of a "
            "method of your own are known once it is registered"
        )


def check_resumed(folder: Path, trainer: Trainer, adapter: str, stage: str) -> None:
    """Looks at a checkpoint before a run goes on from it; what begins anew is said in a warning.

    Args:
        stage: of `adapter`, as checkpoints note it.

    Raises:
        ValueError: a file of it is cut; it is of another stage, or holds no weights of the adapter.
    """
    if reason := fault(folder):
        raise ValueError(f"no run can go on from the checkpoint {folder}: {reason}. Give an older one")
    if (made := stage_of(folder, adapter)) not in (None, stage):
        raise ValueError(
            f"the checkpoint {folder} was made in stage={made!r}, so the state of the optimizer does not belong "
            f"to what stage={stage!r} trains; begin the stage without resume_from_checkpoint"
        )
    held = adapters_in(folder)
    if adapter not in held and (shards(trainer) or held not in ([], ["default"])):
        raise ValueError(
            f"the checkpoint {folder} holds weights of the adapters {held}, and none of {adapter!r}, which would not "
            "go on from it: give the adapter the name that it had, or another checkpoint"
        )
    if made is None:
        warnings.warn(
            f"the checkpoint {folder} has no {STAGE_FILE} that says which stage of adapter {adapter!r} made it: if it "
            f"was not {stage!r}, the optimizer goes on with the state of other parameters",
            stacklevel=2,
        )
    if anew := begun_anew(folder, trainer):
        warnings.warn(
            f"a run from the checkpoint {folder} ends elsewhere than one that is not interrupted: these begin anew: "
            f"{'; '.join(anew)}",
            stacklevel=2,
        )


def shards(trainer: Trainer | None) -> bool:
    """Whether a Trainer runs on an engine that shards, and resumes from its own files."""
    return bool(getattr(trainer, "is_fsdp_enabled", 0) or getattr(trainer, "is_deepspeed_enabled", 0))


def check_saves(trainer: Trainer) -> None:
    """Raises ValueError where the engine that shards the model would write no adapter."""
    state = trainer.accelerator.state
    fsdp = getattr(state, "fsdp_plugin", None)
    if fsdp is not None and "FULL_STATE_DICT" not in str(fsdp.state_dict_type):
        raise ValueError(
            f"with state_dict_type={str(fsdp.state_dict_type).rpartition('.')[2]!r} of FSDP no checkpoint and no end "
            "of a run holds the adapter as a file: set fsdp_state_dict_type: FULL_STATE_DICT"
        )
    zero = getattr(getattr(state, "deepspeed_plugin", None), "deepspeed_config", {}).get("zero_optimization", {})
    if zero.get("stage") == 3 and not zero.get("stage3_gather_16bit_weights_on_model_save"):
        raise ValueError(
            "without stage3_gather_16bit_weights_on_model_save of DeepSpeed no checkpoint and no end of a run holds "
            "the adapter as a file: set zero3_save_16bit_model: true"
        )


def check_sharded_once(trainer: Trainer) -> None:
    """Raises ValueError where FSDP has sharded the model in an earlier Trainer: it finds no blocks in it again."""
    loads = getattr(trainer, "is_distributed_loading_by_transformers", False)  # sharded once, by `from_pretrained`
    sharded = any(
        isinstance(module, loaded("torch.distributed.fsdp", "FSDPModule")) for module in trainer.model.modules()
    )
    if sharded and getattr(trainer, "is_fsdp_enabled", False) and not loads:
        raise ValueError(
            "the Trainer of an earlier stage has sharded this model by FSDP, and no other Trainer can take it: save "
            "the adapter, and make the model of the next stage anew, PeftModel.from_pretrained(base, folder, "
            "is_trainable=True)"
        )


class GateUsageCallback(TrainerCallback):
    """Reports through the Trainer's own loggers (TensorBoard, W&B and the rest) how each router spread its weight and
    what it chose, and the auxiliary losses by name.

    After every entry of the Trainer with a training loss (each `logging_steps`, or epoch) and at the end of the run
    follows one of `gate/<layer>/<name>`, their means over layers `gate/mean/<name>`, and `loss/<name>`, each a mean
    since the last report, of the training batches of all processes. Names are `weight/<arm>`, `entropy` (nats), `cv`
    (the coefficient of variation of the experts' weights) and `dead` (arms with less than 1 % of the weight). Of
    routers that choose also `load/<arm>` (its share of choices), `max_over_mean` (the largest load of an expert over
    their mean), `active` (experts that a token uses), `null` (share of choices without an expert); `dead` are then
    experts with less than 1 % of the mean load.

    Args:
        trainer: as in `trainer.add_callback(GateUsageCallback(trainer))`; its `log` takes the report.
        per_layer: report single layers too, not only means.

    Warns where the adapters have no router that decides, and no auxiliary loss.

    Raises:
        ValueError: at the beginning of a run whose model holds no adapter of this library.
    """

    def __init__(self, trainer: Trainer, per_layer: bool = False) -> None:
        check_switches(per_layer=per_layer)
        check_kind("trainer", trainer, Trainer, "the Trainer, whose log takes the report")
        self.trainer, self.per_layer = trainer, per_layer
        self._silent = True  # whether this run has had nothing to report so far, and nobody has been told

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **_: Any
    ) -> None:
        context = context_within(model)
        if context is None:
            raise ValueError(
                f"GateUsageCallback: {type(model).__name__} holds no adapter of mixadapters, so that no router "
                "spreads any weight: leave the callback out"
            )
        context.usage.reset()  # what a run that has failed, or a loop, has left
        context.loss_log.clear()
        self._silent = True

    # Not `on_step_end`: to log there would take the place of the Trainer's own entry.
    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None,
        logs: dict[str, Any] | None = None, **_: Any,
    ) -> None:  # fmt: skip
        if logs and ("loss" in logs or "train_loss" in logs):  # of evaluation or of others there is more to come
            report = collect_usage(model, self.per_layer)
            if report:
                self.trainer.log(report)
            elif self._silent:
                warnings.warn(
                    "GateUsageCallback has nothing to report: no adapter that trains here has a router that decides "
                    "anything, or an auxiliary loss. Leave it out",
                    stacklevel=2,
                )
            self._silent = False


def context_within(model: nn.Module) -> ForwardContext | None:
    check_kind("model", model, nn.Module, "a model")
    return next((found for module in model.modules() if (found := ForwardContext.find(module))), None)


def collect_usage(model: nn.Module, per_layer: bool = False) -> dict[str, float]:
    """The router usage and auxiliary losses of `model`, reset by reading: of all processes, which all call this."""
    context = context_within(model)
    if context is None:
        return {}
    report = context.usage.over_processes().report(per_layer)
    context.usage.reset()
    mine = {name: (float(total), count) for name, (total, count) in context.loss_log.items()}
    context.loss_log.clear()
    sums: dict[str, tuple[float, int]] = {}
    for losses in gathered(mine):
        for name, (total, count) in losses.items():
            before = sums.get(name, (0.0, 0))
            sums[name] = before[0] + total, before[1] + count
    return report | {f"loss/{name}": total / count for name, (total, count) in sums.items()}
