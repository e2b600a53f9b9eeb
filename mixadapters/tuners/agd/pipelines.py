"""Trajectories from the parts of a diffusers pipeline: its prompts' encoders, its model and its scheduler."""

from __future__ import annotations

import inspect
import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mixadapters.tuners.agd.calls import CALLS, Encoding, refuse_distilled
from mixadapters.tuners.agd.guidance import Conditions, Rule, classifier_free, denoiser
from mixadapters.tuners.agd.pipeline import denoiser_of, refuse_two_models
from mixadapters.tuners.agd.recording import TrajectoryPlan, record
from mixadapters.tuners.agd.trajectories import Trajectories


@torch.no_grad()
def encode_prompts(
    pipe: Any, prompts: Sequence[str], negative_prompt: str | None = None, batch_size: int = 16,
    size: tuple[int, int] | None = None,
) -> tuple[Conditions, Conditions]:  # fmt: skip
    """Conditions of the model for prompts, and for the unconditional pass (one row); on the CPU.

    For pipelines with a model of `CALLS`. Prompts are encoded as the pipeline's own call does by default.

    Args:
        size: height and width of the pictures in pixels, which some models read; None: the model's usual ones.

    Raises:
        ValueError: a pipeline that calls its model otherwise, or whose `encode_prompt` gives something else.
    """
    model = known_model(pipe)
    call = CALLS[type(model).__name__]
    conditions: Conditions = {}
    unconditional: Conditions = {}
    for encoding in call.encodings(model.config):
        parts = []
        for start in range(0, len(prompts), batch_size):
            parts.append(_encode(pipe, encoding, list(prompts[start : start + batch_size]), negative_prompt))
        for name, column in zip(encoding.returns, zip(*parts, strict=True), strict=True):
            if name.startswith("-"):
                unconditional[name[1:]] = column[0][:1]
            elif name:
                conditions[name] = torch.cat(column)
    if not conditions:
        raise ValueError(f"{type(pipe).__name__} takes no prompts; give class_labels")
    height, width = size or (side * _pixels_of(pipe) for side in usual_shape(pipe, model)[-2:])
    dtype = next(v.dtype for v in conditions.values() if v.is_floating_point())
    for name, value in call.sizes(model, height, width).items():
        row = value.to(dtype) if name != "style" else value
        conditions[name] = row.expand(len(prompts), *row.shape[1:])
    return conditions, unconditional


def _encode(pipe: Any, encoding: Encoding, prompts: list[str], negative_prompt: str | None) -> list[Tensor]:
    """What `encode_prompt` returns for the conditional and the unconditional pass, on the CPU."""
    call, takes = (inspect.signature(f).parameters for f in (type(pipe).__call__, pipe.encode_prompt))
    options = {name: call[name].default for name in takes if name in call and name != "prompt"}
    options |= {"device": pipe._execution_device, "do_classifier_free_guidance": True}
    options |= {f"num_{what}_per_prompt": 1 for what in ("images", "videos") if f"num_{what}_per_prompt" in takes}
    options |= {name: None for name in ("prompt_2", "prompt_3") if name in takes}
    options |= encoding.options
    if negative_prompt is not None:
        options["negative_prompt"] = [negative_prompt] * len(prompts)
    given = pipe.encode_prompt(prompt=prompts, **options)
    if len(given) != len(encoding.returns) or not all(map(_fits, encoding.returns, given)):
        raise ValueError(
            f"{type(pipe).__name__}.encode_prompt gives {[tuple(getattr(t, 'shape', ())) for t in given]}, not what "
            f"its model is known to be given, {list(encoding.returns)} ('-': of the unconditional pass). Use record() "
            "with conditions of your own"
        )
    return [tensor.cpu() for tensor in given]


def _fits(name: str, value: Any) -> bool:
    """Whether a tensor may be what it is said to be: tokens (B, T, d), their mask (B, T), or one vector (B, d)."""
    if not name:
        return True
    if not isinstance(value, Tensor):
        return False
    return value.dim() == (3 if "hidden_states" in name else 2) and value.is_floating_point() != ("mask" in name)


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
    class_labels: Sequence[int] | None = None, negative_prompt: str | None = None, rule: Rule = classifier_free,
    scheduler: Any = None, shape: Sequence[int] | None = None, **plan: Any,
) -> Trajectories:  # fmt: skip
    """Guided trajectories of a pipeline's model, one for each prompt or class label.

    Args:
        folder: see `record`.
        negative_prompt: of the unconditional pass, for all prompts; None: the pipeline's usual one.
        scheduler: None: the pipeline's.
        shape: (C, ...) of a noisy input, for pictures or films of another size than the pipeline's usual one.
        plan: further fields of `TrajectoryPlan`.

    Raises:
        ValueError: neither prompts nor class labels, or both; and as `record`.
    """
    if (prompts is None) == (class_labels is None):
        raise ValueError("give either prompts or class_labels")
    model = known_model(pipe)
    shape = usual_shape(pipe, model) if shape is None else tuple(shape)
    if prompts is not None:
        size = shape[-2] * _pixels_of(pipe), shape[-1] * _pixels_of(pipe)
        conditions, unconditional = encode_prompts(pipe, prompts, negative_prompt, size=size)
    else:
        null = model.config.get("num_embeds_ada_norm")
        if null is None:
            raise ValueError(f"the config of {type(model).__name__} does not tell its null class; use record()")
        conditions = {"class_labels": torch.tensor(list(class_labels or ()))}
        unconditional = {"class_labels": torch.tensor([null])}
    scheduler = scheduler or pipe.scheduler
    info = {
        "model": str(getattr(model, "name_or_path", None) or getattr(pipe, "name_or_path", "")),
        "prediction_type": getattr(scheduler.config, "prediction_type", "flow"),
        "negative_prompt": negative_prompt,
    }
    return record(
        denoiser(model), scheduler, conditions, unconditional,
        TrajectoryPlan(shape, **plan), folder, rule=rule, info=info,
        device=pipe._execution_device,
    )  # fmt: skip
