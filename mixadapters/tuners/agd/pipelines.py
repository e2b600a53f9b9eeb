"""Trajectories from the parts of a diffusers pipeline: its prompts' encoders, its model and its scheduler."""

from __future__ import annotations

import inspect
import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mixadapters.tuners.agd.guidance import Conditions, Rule, classifier_free, denoiser
from mixadapters.tuners.agd.model import SITES
from mixadapters.tuners.agd.pipeline import denoiser_of
from mixadapters.tuners.agd.recording import TrajectoryPlan, record
from mixadapters.tuners.agd.trajectories import Trajectories


@torch.no_grad()
def encode_prompts(
    pipe: Any, prompts: Sequence[str], negative_prompt: str | None = None, batch_size: int = 16
) -> tuple[Conditions, Conditions]:
    """Conditions of the model for prompts, and for the unconditional pass (one row); on the CPU.

    For pipelines of Stable Diffusion 1, 2, XL and 3, and of PixArt. Prompts are encoded as the pipeline's own call
    does by default.

    Raises:
        ValueError: a pipeline whose `encode_prompt` gives something else.
    """
    model = known_model(pipe)
    call, takes = (inspect.signature(f).parameters for f in (type(pipe).__call__, pipe.encode_prompt))
    options = {name: call[name].default for name in takes if name in call and name != "prompt"}
    options |= {"device": pipe._execution_device, "num_images_per_prompt": 1, "do_classifier_free_guidance": True}
    options |= {name: None for name in ("prompt_2", "prompt_3") if name in takes}
    parts = []
    for start in range(0, len(prompts), batch_size):
        texts = list(prompts[start : start + batch_size])
        negative = {} if negative_prompt is None else {"negative_prompt": [negative_prompt] * len(texts)}
        parts.append([t.cpu() for t in pipe.encode_prompt(prompt=texts, **{**options, **negative})])
    columns = [torch.cat(column) for column in zip(*parts, strict=True)]
    names = _names_of(columns, model, pipe)
    conditions = {name: column for name, column in zip(names, columns, strict=True) if not name.startswith("-")}
    unconditional = {n[1:]: column[:1] for n, column in zip(names, columns, strict=True) if n.startswith("-")}
    side = model.config.sample_size * pipe.vae_scale_factor
    if "added_cond_kwargs.text_embeds" in names:
        sizes = torch.tensor([[side, side, 0, 0, side, side]], dtype=columns[0].dtype)
        conditions["added_cond_kwargs.time_ids"] = sizes.expand(len(prompts), -1)
    if getattr(model, "use_additional_conditions", False):  # PixArt of 1024 pixels
        resolution = torch.tensor([[side, side]], dtype=columns[0].dtype)
        conditions["added_cond_kwargs.resolution"] = resolution.expand(len(prompts), -1)
        conditions["added_cond_kwargs.aspect_ratio"] = torch.ones(len(prompts), 1, dtype=columns[0].dtype)
    return conditions, unconditional


def known_model(pipe: Any) -> nn.Module:
    """The model of a pipeline whose way of calling it is known here: with the scheduler's own timesteps, and no inputs
    beside the noisy one.

    Raises:
        ValueError: another one, with the remedy.
    """
    model = denoiser_of(pipe)
    channels = model.config.get("in_channels"), model.config.get("out_channels")
    if type(model).__name__ not in SITES or None in channels or channels[1] % channels[0]:
        raise ValueError(
            f"{type(pipe).__name__} ({type(model).__name__}, {channels[0]} channels to {channels[1]}): "
            f"record_pipeline knows how pipelines call {sorted(SITES)} that read the noisy image alone. For others "
            "use record() with conditions of your own, and a predict that calls the model as the pipeline does"
        )
    return model


def _names_of(columns: list[Tensor], model: nn.Module, pipe: Any) -> list[str]:
    """Arguments of the model for what `encode_prompt` gave, by form; "-" marks those of the unconditional pass."""
    kinds = "".join("E" if c.dim() == 3 else "P" if c.is_floating_point() else "M" for c in columns)
    arguments = inspect.signature(type(model).forward).parameters
    pooled = "pooled_projections" if "pooled_projections" in arguments else "added_cond_kwargs.text_embeds"
    text, mask = "encoder_hidden_states", "encoder_attention_mask"
    orders = {
        "EE": [text, f"-{text}"],
        "EEPP": [text, f"-{text}", pooled, f"-{pooled}"],
        "EMEM": [text, mask, f"-{text}", f"-{mask}"],
    }
    if kinds not in orders or (mask in orders[kinds] and mask not in arguments):
        raise ValueError(
            f"{type(pipe).__name__}.encode_prompt gives tensors {[tuple(c.shape) for c in columns]}; known are "
            "(prompt, negative), the same with pooled ones, and (prompt, mask, negative, mask). Use record() with "
            "conditions of your own"
        )
    return orders[kinds]


def record_pipeline(
    pipe: Any, prompts: Sequence[str] | None = None, folder: str | os.PathLike[str] | None = None, *,
    class_labels: Sequence[int] | None = None, negative_prompt: str | None = None, rule: Rule = classifier_free,
    scheduler: Any = None, **plan: Any,
) -> Trajectories:  # fmt: skip
    """Guided trajectories of a pipeline's model, one for each prompt or class label.

    Args:
        folder: see `record`.
        negative_prompt: of the unconditional pass, for all prompts; None: the pipeline's usual one.
        scheduler: None: the pipeline's.
        plan: fields of `TrajectoryPlan` besides `shape`, which the model tells.

    Raises:
        ValueError: neither prompts nor class labels, or both; and as `record`.
    """
    if (prompts is None) == (class_labels is None):
        raise ValueError("give either prompts or class_labels")
    model = known_model(pipe)
    if prompts is not None:
        conditions, unconditional = encode_prompts(pipe, prompts, negative_prompt)
    else:
        null = model.config.get("num_embeds_ada_norm")
        if null is None:
            raise ValueError(f"the config of {type(model).__name__} does not tell its null class; use record()")
        conditions = {"class_labels": torch.tensor(list(class_labels or ()))}
        unconditional = {"class_labels": torch.tensor([null])}
    scheduler = scheduler or pipe.scheduler
    side = model.config.sample_size
    sides = tuple(side) if isinstance(side, (list, tuple)) else (side, side)
    info = {
        "model_class": type(model).__name__,
        "model": str(getattr(model, "name_or_path", None) or getattr(pipe, "name_or_path", "")),
        "prediction_type": getattr(scheduler.config, "prediction_type", "flow"),
        "negative_prompt": negative_prompt,
    }
    return record(
        denoiser(model), scheduler, conditions, unconditional,
        TrajectoryPlan((model.config.in_channels, *sides), **plan), folder, rule=rule, info=info,
        device=pipe._execution_device,
    )  # fmt: skip
