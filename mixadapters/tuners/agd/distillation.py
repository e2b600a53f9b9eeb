"""Objectives that teach adapters to say in one pass what guidance says in two, and a measure of how well they do."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mixadapters.core.context import ForwardContext, Objective
from mixadapters.core.fields import check_number, finite, one_of
from mixadapters.core.media import generates_beside_media
from mixadapters.core.numbers import real_numbers
from mixadapters.tuners.agd.calls import timestep_factor
from mixadapters.tuners.agd.guidance import Rule, classifier_free, prediction_of

LOSSES = ("normalized", "native")
SPACES = ("noise", "sample", "velocity")
# Arguments of a forward that hold text or say what to do with it; the others, in a model that sees, are of images.
OF_TEXT = frozenset({"input_ids", "inputs_embeds", "attention_mask", "labels", "num_items_in_batch"})
BASE = {"guidance_scale": None}  # a forward without guidance, whatever is pinned


class GuidanceDistillation(Objective):
    """Makes the main loss the squared distance of a denoiser's prediction to its guided self.

        L = mean |student - target|^2 / ((w - 1)^2 + delta)         ("normalized"; "native": without the divisor)

    The guidance to be learned grows with w - 1; without the divisor, large scales make up nearly all of the loss.
    Predictions of whatever kind (noise, velocity, flow) will do, since guidance is linear.

    The target comes with the batch, or is made by the same model without adapters, where the batch has
    `unconditional`, the conditions of the second pass. Also in evaluation, where there is either.

    Args:
        loss: "normalized" or "native" (Jensen and Sadat 2025).
        delta: as above.
        timestep_weights: (T,) factors on the loss, by the scheduler's timestep; see `snr_weights` and `space_weights`.
        rule: guidance of the teacher, where the batch has no target.
    """

    takes: tuple[str, ...] = ("target", "unconditional")
    in_eval = True

    def __init__(
        self, loss: str = "normalized", delta: float = 0.25, timestep_weights: Tensor | None = None,
        rule: Rule = classifier_free,
    ) -> None:  # fmt: skip
        one_of("loss", loss, LOSSES)
        check_number("delta", delta, above=0)
        if timestep_weights is not None:
            weights = real_numbers("timestep_weights", timestep_weights)
            if weights.dim() != 1 or not bool((weights.isfinite() & (weights >= 0)).all()):
                raise ValueError(
                    f"timestep_weights of shape {tuple(weights.shape)} must be (T,) finite numbers of 0 or more, one "
                    "for each timestep of the scheduler"
                )
        if not callable(rule):
            raise ValueError(f"rule={rule!r:.80} must be a function such as classifier_free")
        self.loss, self.delta, self.timestep_weights, self.rule = loss, delta, timestep_weights, rule

    def after(self, context: ForwardContext, module: nn.Module, output: Any) -> Any:
        values, inputs = context.record.values, context.record.inputs
        if values.get("target") is None and values.get("unconditional") is None:
            if context.record.training:
                raise ValueError(
                    "the training batch has neither target nor unconditional, which GuidanceDistillation needs; use "
                    "TrajectoryCollator, and pass remove_unused_columns=False to TrainingArguments"
                )
            return output
        if values.get("guidance_scale") is None:
            raise ValueError("the batch has no guidance_scale, so there is nothing to distil")
        prediction = prediction_of(output).float()
        rows, device = len(prediction), prediction.device
        scale = real_numbers("guidance_scale", values["guidance_scale"], device).expand(rows)
        timestep = real_numbers("timestep", inputs["timestep"], device).expand(rows)
        target = values.get("target")
        if target is None:
            target = self._target(module, inputs, values["unconditional"], scale, timestep)
        if target.shape[0] != prediction.shape[0] or target.shape[2:] != prediction.shape[2:]:
            raise ValueError(f"target {tuple(target.shape)} does not fit the prediction {tuple(prediction.shape)}")
        _check_finite(target, timestep)
        # A learned variance, in further channels, is not guided.
        error = (prediction[:, : target.shape[1]] - target.float()).square().flatten(1).mean(1)
        if self.loss == "normalized":
            error = error / ((scale - 1).square() + self.delta)
        if self.timestep_weights is not None:
            table = self.timestep_weights.to(error.device)
            steps = timestep / timestep_factor(module)
            error = error * table[steps.round().long().clamp(0, len(table) - 1)]
        if isinstance(output, (Tensor, tuple)):
            output = {"sample": prediction_of(output)}
        context.set_loss(error.mean())
        return output

    @torch.no_grad()
    def _target(self, module: nn.Module, inputs: dict[str, Any], null: Any, scale: Tensor, timestep: Tensor) -> Tensor:
        conditional = prediction_of(module(**inputs, **BASE)).float()
        unconditional = prediction_of(module(**{**inputs, **null}, **BASE)).float()
        return self.rule(conditional, unconditional, scale, timestep)


def _check_finite(target: Tensor, timestep: Tensor) -> None:
    """ValueError for targets that would turn weights to NaN, while the log shows a loss of 0."""
    if torch.compiler.is_compiling():
        return
    bad = ~target.flatten(1).isfinite().all(1)
    if bad.any():
        raise ValueError(
            f"the target is not finite in rows {bad.nonzero().flatten().tolist()} of the batch, at timesteps "
            f"{timestep[bad].float().tolist()}; record anew, which says what to change in scheduler, model or dtype"
        )


def snr_weights(scheduler: Any, clip: float = 25.0) -> Tensor:
    """(T,) weights 1 / alpha_t^2, clipped: errors of a noise prediction as errors of the velocity it implies.

    Raises:
        ValueError: a scheduler of flow matching, whose models predict a velocity already.
    """
    check_number("clip", clip, above=0)
    alphas = getattr(scheduler, "alphas_cumprod", None)
    if alphas is None:
        raise ValueError(
            f"{type(scheduler).__name__} has no alphas_cumprod: models of flow matching predict a velocity already; "
            "leave out timestep_weights, or pass (T,) weights of your own"
        )
    return (1 / alphas).clamp(max=clip).float()


def space_weights(scheduler: Any, loss_space: str, clip: float = 25.0) -> Tensor:
    """(T,) weights, clipped, that make the loss on a model's predictions one on what they imply of `loss_space`.

    With x_t = alpha x_0 + sigma noise, a prediction of either of the two gives the other and the velocity at once, so
    errors differ by a factor of the timestep alone.

    Args:
        scheduler: that of the training data; says what the model predicts.
        loss_space: "noise", "sample" or "velocity" (alpha noise - sigma x_0; with flow matching noise - x_0).

    Raises:
        ValueError: another space, or a scheduler that does not say what its model predicts.
    """
    one_of("loss_space", loss_space, SPACES)
    check_number("clip", clip, above=0)
    if (alphas := getattr(scheduler, "alphas_cumprod", None)) is not None:
        alpha, sigma = alphas.sqrt(), (1 - alphas).sqrt()
        predicted = scheduler.config.get("prediction_type", "epsilon")
    else:
        sigma = torch.arange(scheduler.config.num_train_timesteps + 1) / scheduler.config.num_train_timesteps
        alpha, predicted = 1 - sigma, "v_prediction"
    # The error of each space for an error of 1 in the velocity, with x_t given.
    errors = {"noise": alpha, "sample": sigma, "velocity": torch.ones_like(sigma)}
    own = {"epsilon": "noise", "sample": "sample", "v_prediction": "velocity"}
    one_of("prediction_type of the scheduler", predicted, own)
    return (
        (errors[loss_space] / errors[own[predicted]])
        .square()
        .nan_to_num(nan=clip, posinf=clip)
        .clamp(max=clip)
        .float()
    )


@torch.no_grad()
def relative_error(
    model: nn.Module, batches: Iterable[dict[str, Any]], by: str = "guidance_scale", edges: Sequence[float] = ()
) -> list[float]:
    """R = sum |student - target|^2 / sum |base - target|^2 on batches with targets: 0 perfect, 1 no guidance learned.

    Args:
        batches: arguments of the model's forward, with `target`, as `TrajectoryCollator` makes them.
        by: "guidance_scale" or "timestep"; `edges` part its values into len(edges) + 1 bins, of which empty ones are
            NaN.
    """
    one_of("by", by, ("guidance_scale", "timestep"))
    bounds = real_numbers("edges", list(edges)).tolist()
    if not all(map(finite, bounds)) or bounds != sorted(bounds):
        raise ValueError(f"edges={list(edges)} must be finite numbers that rise")
    bins = torch.zeros(2, len(edges) + 1, dtype=torch.float64)
    for batch in batches:
        batch = dict(batch)
        target = batch.pop("target").float()
        _check_finite(target, batch["timestep"])
        place = torch.bucketize(batch[by].float(), torch.tensor(edges), right=True).cpu()
        for row, arguments in enumerate((batch, {**batch, **BASE, "unconditional": None})):
            prediction = prediction_of(model(**arguments)).float()[:, : target.shape[1]]
            error = (prediction - target).square().flatten(1).sum(1)
            bins[row].index_add_(0, place, error.double().cpu())
    return (bins[0] / bins[1]).tolist()


class LanguageGuidanceDistillation(Objective):
    """Makes the main loss KL(teacher || student) on the tokens that follow a prompt, for causal language models.

    The teacher is the guidance of `generate(guidance_scale=w)` (Sanchez et al. 2023): with log-probabilities c of the
    whole text and u of the text from the prompt's last token on, softmax(u + w (c - u)). Both are the same model
    without adapters. Batches have `guidance_scale` and `prompt_mask` (B, T), 1 on the prompt. Also in evaluation.

    Args:
        teacher: another model in place of the same one, such as a copy of it where all weights train.
    """

    takes: tuple[str, ...] = ()  # prompt_mask and guidance_scale are taken by the model
    in_eval = True

    def __init__(self, teacher: nn.Module | None = None) -> None:
        self.teacher = teacher

    def after(self, context: ForwardContext, module: nn.Module, output: Any) -> Any:
        record = context.record
        values, inputs = record.values, record.inputs
        if not record.training and "prompt_mask" in record.pinned:  # a step of `generate`, which has nothing to learn
            return output
        if missing := [n for n in ("prompt_mask", "guidance_scale") if values.get(n) is None]:
            if not context.record.training:
                return output
            raise ValueError(
                f"the training batch has no {missing}, which LanguageGuidanceDistillation needs; pass "
                "remove_unused_columns=False to TrainingArguments"
            )
        prompt = values["prompt_mask"].bool()
        real = inputs.get("attention_mask")
        real = torch.ones_like(prompt) if real is None else real.bool()
        teacher = module if self.teacher is None else self.teacher
        seen = seen_in(module, context, inputs, real & ~prompt)
        said = guided_log_probabilities(teacher, inputs["input_ids"], real, prompt, values["guidance_scale"], seen)
        student = output.logits.float().log_softmax(-1)
        distance = F.kl_div(student, said, reduction="none", log_target=True).sum(-1)  # (B, T)
        valid = real & ~prompt | _last(prompt)
        context.set_loss((distance * valid).sum() / valid.sum())
        return output


@torch.no_grad()
def guided_log_probabilities(
    module: nn.Module, tokens: Tensor, real: Tensor, prompt: Tensor, scale: Any, seen: Mapping[str, Any] | None = None
) -> Tensor:
    """(B, T, V) next-token log-probabilities of the guided model; of use from the prompt's last token on.

    tokens, real (False at padding), prompt: (B, T); scale: a number or (B,). seen: what the model is given of images
    or sounds, which belong to the prompt, and of positions; without these it counts them itself, as for a caller.
    """
    kept, seen = real & ~prompt | _last(prompt), seen or {}
    types = {n: v for n, v in seen.items() if n.endswith("token_type_ids")}  # Molmo2 wants them in training
    without = {} if isinstance(module, nn.Module) and ForwardContext.find(module) is None else BASE

    def predicted(mask: Tensor, given: Mapping[str, Any]) -> Tensor:
        output = module(input_ids=tokens, attention_mask=mask.long(), use_cache=False, **without, **given)
        return output.logits.float().log_softmax(-1)

    def counted(mask: Tensor) -> dict[str, Any]:
        return {**types, "position_ids": (mask.cumsum(1) - 1).clamp_min(0)}

    conditional = predicted(real, seen or counted(real))
    unconditional = predicted(kept, counted(kept))
    weight = real_numbers("guidance_scale", scale, tokens.device).expand(len(tokens)).view(-1, 1, 1)
    return (unconditional + weight * (conditional - unconditional)).log_softmax(-1)


def seen_in(module: nn.Module, context: ForwardContext, inputs: Mapping[str, Any], answer: Tensor) -> dict[str, Any]:
    """The arguments of a forward that hold images or sounds, or say where they are; {} in models of text.

    answer: (B, T) bool, the tokens that follow the prompt.

    Raises:
        ValueError: one of them stands in the answer, where the pass without the prompt would have to see it.
    """
    if not generates_beside_media(module):
        return {}
    tokens = inputs["input_ids"]
    places = torch.isin(tokens, torch.tensor(context.placeholders, device=tokens.device, dtype=tokens.dtype))
    if bool((places & answer).any()):
        raise ValueError(
            "an image or sound stands after the prompt, which guidance leaves out with all that it holds: prompt_mask "
            "must be 1 up to the last of them"
        )
    return {n: v for n, v in inputs.items() if isinstance(v, Tensor) and n not in OF_TEXT}


def _last(mask: Tensor) -> Tensor:
    """(B, T) bool: the last True of each row."""
    return mask & (mask.flip(1).cumsum(1).flip(1) == 1)
