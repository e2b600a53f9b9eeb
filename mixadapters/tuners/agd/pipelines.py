"""Trajectories from the parts of a diffusers pipeline: its prompts' encoders, its model and its scheduler."""

from __future__ import annotations

import inspect
import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mixadapters.tuners.agd.calls import CALLS, denoiser_of, null_class, refuse_distilled
from mixadapters.tuners.agd.encoding import encode_both
from mixadapters.tuners.agd.guidance import Conditions, Rule, classifier_free, denoiser
from mixadapters.tuners.agd.pipeline import refuse_two_models
from mixadapters.tuners.agd.recording import TrajectoryPlan, record
from mixadapters.tuners.agd.trajectories import Trajectories


def encode_prompts(
    pipe: Any, prompts: Sequence[str], negative_prompt: str | Sequence[str | None] | None = None, batch_size: int = 16,
    size: tuple[int, int] | None = None,
) -> tuple[Conditions, Conditions]:  # fmt: skip
    """Conditions of the model for prompts, and for the unconditional pass; on the CPU.

    For pipelines with a model of `CALLS`. Prompts are encoded as the pipeline's own call does by default.

    Args:
        negative_prompt: None: the pipeline's usual one. A list has one for each prompt.
        size: height and width of the pictures in pixels, which some models read; None: the model's usual ones.

    Returns:
        Conditions of as many rows as prompts; those of the unconditional pass of one row, or of as many where
        `negative_prompt` is a list.

    Raises:
        ValueError: a pipeline that calls its model otherwise, or whose `encode_prompt` gives something else; a list of
            another length.
    """
    model = known_model(pipe)
    call = CALLS[type(model).__name__]
    if not call.encodings(model.config):
        raise ValueError(f"{type(pipe).__name__} takes no prompts; give class_labels")
    alike = negative_prompt is None or isinstance(negative_prompt, str)
    negatives = _negatives(prompts, negative_prompt)
    order: list[int] = []
    parts: list[tuple[Conditions, Conditions]] = []
    # None is not the empty prompt: SDXL has zeros for it.
    for rows in ([i for i, n in enumerate(negatives) if (n is None) is usual] for usual in (True, False)):
        for start in range(0, len(rows), batch_size):
            chunk = rows[start : start + batch_size]
            given: dict[str, Any] = {"prompt": [prompts[i] for i in chunk]}
            if negatives[chunk[0]] is not None:
                given["negative_prompt"] = [negatives[i] for i in chunk]
            parts.append(encode_both(pipe, given))
            order += chunk
    back = torch.tensor(order).argsort()
    conditions = _joined([first for first, _ in parts], back)
    unconditional = _joined([second for _, second in parts], back)
    if alike:
        unconditional = {name: value[:1] for name, value in unconditional.items()}
    height, width = size or (side * _pixels_of(pipe) for side in usual_shape(pipe, model)[-2:])
    dtype = next(v.dtype for v in conditions.values() if v.is_floating_point())
    for name, value in call.sizes(model, height, width).items():
        row = value.to(dtype) if name != "style" else value
        conditions[name] = row.expand(len(prompts), *row.shape[1:])
    return conditions, unconditional


def _negatives(prompts: Any, negative_prompt: Any) -> list[str | None]:
    """A negative prompt for each prompt. Raises ValueError where one of both is no text, or their numbers differ."""
    if isinstance(prompts, str) or not prompts:
        raise ValueError(f"prompts={prompts!r}: give a list of one or several, a trajectory for each")
    alike = negative_prompt is None or isinstance(negative_prompt, str)
    negatives = [negative_prompt] * len(prompts) if alike else list(negative_prompt or ())
    for name, texts in (("prompts", list(prompts)), ("negative_prompt", [n for n in negatives if n is not None])):
        if wrong := [text for text in texts if not isinstance(text, str)]:
            raise ValueError(f"{name} holds {wrong[0]!r}, which is no text")
    if len(negatives) != len(prompts):
        raise ValueError(f"negative_prompt has {len(negatives)} entries for {len(prompts)} prompts; give one for each")
    return negatives


def _joined(parts: Sequence[Conditions], order: Tensor) -> Conditions:
    """The rows of all parts, on the CPU, in this order."""
    return {name: torch.cat([part[name].cpu() for part in parts])[order] for name in parts[0]}


def known_model(pipe: Any) -> nn.Module:
    """The model of a pipeline whose way of calling it is known here: one model, with a timestep for each row, and no
    inputs beside the noisy one.

    Raises:
        ValueError: another one, with the remedy; one that has been distilled already.
    """
    model = denoiser_of(pipe)
    refuse_distilled(model)
    channels = model.config.get("in_channels"), model.config.get("out_channels") or getattr(model, "out_channels", 0)
    what = f"{type(pipe).__name__} ({type(model).__name__}, {channels[0]} channels to {channels[1]})"
    remedy = (
        "For others use record() with conditions of your own, and a predict that calls the model as the pipeline does"
    )
    if type(model).__name__ not in CALLS or not channels[0] or not channels[1] or channels[1] % channels[0]:
        raise ValueError(
            f"{what}: record_pipeline knows how pipelines call {sorted(CALLS)} that read the noisy image alone. "
            f"{remedy}"
        )
    refuse_two_models(pipe)
    if pipe.config.get("expand_timesteps"):
        raise ValueError(f"{what} gives every token a timestep of its own (expand_timesteps). {remedy}")
    return model


def usual_shape(pipe: Any, model: nn.Module) -> tuple[int, ...]:
    """(C, ...) of a noisy input as the pipeline makes it by default."""
    channels, side = model.config.in_channels, model.config.get("sample_size")
    if side is not None:
        return (channels, *(tuple(side) if isinstance(side, (list, tuple)) else (side, side)))
    call = inspect.signature(type(pipe).__call__).parameters
    height, width = (call[name].default // _pixels_of(pipe) for name in ("height", "width"))
    frames = (call["num_frames"].default - 1) // pipe.vae_scale_factor_temporal + 1
    return channels, frames, height, width


def _pixels_of(pipe: Any) -> int:
    """How many pixels one place of a noisy input stands for, along each side."""
    return getattr(pipe, "vae_scale_factor", None) or pipe.vae_scale_factor_spatial


def record_pipeline(
    pipe: Any, prompts: Sequence[str] | None = None, folder: str | os.PathLike[str] | None = None, *,
    class_labels: Sequence[int] | None = None, negative_prompt: str | Sequence[str | None] | None = None,
    rule: Rule = classifier_free, scheduler: Any = None, shape: Sequence[int] | None = None, **plan: Any,
) -> Trajectories:  # fmt: skip
    """Guided trajectories of a pipeline's model, one for each prompt or class label.

    Args:
        folder: see `record`.
        negative_prompt: of the unconditional pass, for all prompts; None: the pipeline's usual one. A list has one for
            each prompt, and teaches adapters that read them (`AGDConfig(negative="distil")`).
        scheduler: None: the pipeline's.
        shape: (C, ...) of a noisy input, for pictures or films of another size than the pipeline's usual one.
        plan: further fields of `TrajectoryPlan`.

    Raises:
        ValueError: neither prompts nor class labels, or both; and as `record`.
    """
    if (prompts is None) == (class_labels is None):
        raise ValueError("give either prompts or class_labels")
    if prompts is None and negative_prompt is not None:
        raise ValueError(
            f"negative_prompt={negative_prompt!r} belongs to prompts; by classes the second pass has none"
        )
    model = known_model(pipe)
    shape = usual_shape(pipe, model) if shape is None else tuple(shape)
    if prompts is not None:
        size = shape[-2] * _pixels_of(pipe), shape[-1] * _pixels_of(pipe)
        conditions, unconditional = encode_prompts(pipe, prompts, negative_prompt, size=size)
    else:
        unconditional = {"class_labels": null_class(model)}
        conditions = {"class_labels": torch.tensor(list(class_labels or ()))}
    scheduler = scheduler or pipe.scheduler
    info = {
        "model": str(getattr(model, "name_or_path", None) or getattr(pipe, "name_or_path", "")),
        "prediction_type": getattr(scheduler.config, "prediction_type", "flow"),
        "negative_prompt": negative_prompt if isinstance(negative_prompt, str) else None,
    }
    return record(
        denoiser(model), scheduler, conditions, unconditional,
        TrajectoryPlan(shape, **plan), folder, rule=rule, info=info,
        device=pipe._execution_device,
    )  # fmt: skip
