"""A teacher in the first part of a run: what is small learns from what is large, and then by itself.

Source: Rajbhandari et al. 2022, DeepSpeed-MoE (arXiv 2201.05596), section 4.2: with a teacher to the end the student
falls behind one without, so distillation stops before.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import TrainerControl, TrainerState, TrainingArguments

from mixadapters.core.context import ForwardContext
from mixadapters.core.fields import check_number, check_share
from mixadapters.core.joining import ITEMS, predicts_next
from mixadapters.core.losses import masked_mean
from mixadapters.training.events import RunCallback, progress


class TeacherDistillation:
    """An objective: adds weight * T^2 * KL(teacher || student) to the loss, on what has a label.

    Args:
        teacher: a model, or what makes logits of the arguments of one.
        temperature: T, divides the logits of both.
    """

    takes: tuple[str, ...] = ()
    passing = True

    def __init__(self, teacher: nn.Module | Callable[..., Tensor], temperature: float = 1.0) -> None:
        if not callable(teacher):
            raise ValueError(f"teacher={teacher!r:.80} must be a model, or a function that makes logits")
        check_number("temperature", temperature, above=0)
        self.teacher, self.temperature, self.weight = teacher, temperature, 0.0

    def before(self, context: ForwardContext, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        return args, kwargs

    def after(self, context: ForwardContext, module: nn.Module, output: Any) -> Any:
        if not self.weight or not context.record.training:
            return output
        inputs = {name: value for name, value in context.record.inputs.items() if name not in ("labels", ITEMS)}
        labels = context.record.inputs.get("labels")
        with torch.no_grad():
            made = self.teacher(**inputs)
        if getattr(output, "logits", None) is None:
            raise ValueError(
                f"{type(output).__name__} has no logits, which StagedDistillCallback brings to the teacher's: give "
                "the model a head, such as AutoModelForCausalLM"
            )
        student, teacher = output.logits, made if isinstance(made, Tensor) else made.logits
        if teacher.shape != student.shape:
            raise ValueError(
                f"the teacher's logits {tuple(teacher.shape)} are not for the same words or labels as the student's, "
                f"{tuple(student.shape)}"
            )
        if student.dim() > 3 or student.shape[-1] < 2:
            raise ValueError(
                f"logits {tuple(student.shape)} are no distribution over classes in their last axis, which "
                "StagedDistillCallback brings to the teacher's: it is for classifiers and language models, not for "
                "segmentation or regression"
            )
        loss = distillation_loss(student, teacher, _labelled(labels, student, module), self.temperature)
        context.add_loss("distillation", loss, self.weight)
        return output


def distillation_loss(student: Tensor, teacher: Tensor, counts: Tensor | None, temperature: float = 1.0) -> Tensor:
    """T^2 * KL(teacher || student) of logits (..., C), the mean over rows; counts (...) bool: those that do."""
    ours, theirs = ((logits.float() / temperature).log_softmax(-1) for logits in (student, teacher))
    distance = temperature**2 * F.kl_div(ours, theirs, reduction="none", log_target=True).sum(-1)
    return masked_mean(distance.flatten(), None if counts is None else counts.flatten())


def _labelled(labels: Tensor | None, logits: Tensor, module: nn.Module) -> Tensor | None:
    """Which rows of logits have a label; in causal models the label of the next token. None: all."""
    if labels is None or labels.shape != logits.shape[:-1] or labels.dim() < 2:
        return None
    counts = labels != -100
    if predicts_next(module):
        counts = F.pad(counts[:, 1:], (0, 1))
    return counts


class StagedDistillCallback(RunCallback):
    """Adds alpha * T^2 * KL(teacher || student) to the loss until `stop_at` of the run, and nothing after.

    For models with adapters and bare ones, such as a base whose experts have been pruned. A run that is resumed goes
    on where it was.

    Args:
        teacher: a model, which is put in evaluation, or what makes logits of the arguments of one. It must not be, or
            share modules with, the model that trains.
        stop_at: share of the run's steps, from 0 to 1.
        alpha: weight.
        T: temperature.

    Raises:
        ValueError: a number out of range, or a teacher that trains itself.
    """

    def __init__(
        self, teacher: nn.Module | Callable[..., Tensor], stop_at: float = 0.75, alpha: float = 1.0, T: float = 1.0
    ) -> None:
        check_share("stop_at", stop_at)
        check_number("alpha", alpha, above=0)
        check_number("T", T, above=0)
        self.objective = TeacherDistillation(teacher, T)
        self.stop_at, self.alpha = stop_at, alpha
        self.made: ForwardContext | None = None  # for a model that had none before

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **_: Any
    ) -> None:
        teacher = self.objective.teacher
        if isinstance(teacher, nn.Module):
            if set(teacher.parameters()) & set(model.parameters()):
                raise ValueError(
                    "the teacher shares parameters with the model that trains, and would learn with it: load it anew, "
                    "or copy.deepcopy it before"
                )
            teacher.eval()
            device = next(model.parameters()).device
            if any(p.device != device for p in teacher.parameters()):
                teacher.to(device)
        found, context = ForwardContext.find(model), ForwardContext.of(model)
        self.made = context if found is None else self.made
        if self.objective not in context.objectives:  # as where Trainer begins anew with smaller batches
            context.objectives.append(self.objective)
        self._weigh(state)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **_: Any
    ) -> None:
        self._weigh(state)

    def _weigh(self, state: TrainerState) -> None:
        self.objective.weight = self.alpha if progress(state) < self.stop_at else 0.0

    def run_ended(self, model: nn.Module) -> None:
        context = ForwardContext.find(model)
        if context is None or self.objective not in context.objectives:  # the run did not come to its first step
            return
        context.objectives.remove(self.objective)
        if self.made is context and not context.hosted:  # nobody else's, whatever model an earlier run has trained
            context.detach(model)
