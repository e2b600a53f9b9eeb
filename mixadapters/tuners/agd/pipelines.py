"""Trajectories from the parts of a diffusers pipeline: its prompts' encoders, its model and its scheduler."""

from __future__ import annotations

import inspect
import os
from collections.abc import Sequence
from typing import Any

import torch

from mixadapters.tuners.agd.guidance import Conditions, Rule, classifier_free, denoiser
from mixadapters.tuners.agd.pipeline import denoiser_of
from mixadapters.tuners.agd.recording import TrajectoryPlan, record
from mixadapters.tuners.agd.trajectories import Trajectories


@torch.no_grad()
def encode_prompts(
    pipe: Any, prompts: Sequence[str], negative_prompt: str | None = None, batch_size: int = 16
) -> tuple[Conditions, Conditions]:
    """Conditions of the model for prompts, and for the unconditional pass (one row); on the CPU.

    For pipelines whose `encode_prompt` gives (prompt, negative) or (prompt, negative, pooled, negative pooled): those
    of Stable Diffusion 1, 2, XL and 3.
    """
    takes = inspect.signature(pipe.encode_prompt).parameters
    options = {"device": pipe._execution_device, "num_images_per_prompt": 1, "do_classifier_free_guidance": True}
    options |= {name: None for name in ("prompt_2", "prompt_3") if name in takes}
    model = denoiser_of(pipe)
    parts = []
    for start in range(0, len(prompts), batch_size):
        texts = list(prompts[start : start + batch_size])
        negative = None if negative_prompt is None else [negative_prompt] * len(texts)
        parts.append([t.cpu() for t in pipe.encode_prompt(prompt=texts, negative_prompt=negative, **options)])
    columns = [torch.cat(column) for column in zip(*parts, strict=True)]
    names = ["encoder_hidden_states"]
    if len(columns) == 4:
        pooled = "pooled_projections" if "pooled_projections" in inspect.signature(model.forward).parameters else None
        names.append(pooled or "added_cond_kwargs.text_embeds")
    elif len(columns) != 2:
        raise ValueError(
            f"{type(pipe).__name__}.encode_prompt gives {len(columns)} tensors; use record() and your own"
        )
    conditions = {name: columns[2 * i] for i, name in enumerate(names)}
    unconditional = {name: columns[2 * i + 1][:1] for i, name in enumerate(names)}
    if "added_cond_kwargs.text_embeds" in names:
        side = model.config.sample_size * pipe.vae_scale_factor
        sizes = torch.tensor([[side, side, 0, 0, side, side]], dtype=columns[0].dtype)
        conditions["added_cond_kwargs.time_ids"] = sizes.expand(len(prompts), -1)
    return conditions, unconditional


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
    model = denoiser_of(pipe)
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
