"""Guidance in one pass for pipelines of diffusers."""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mixadapters.core.config import one_of
from mixadapters.core.context import ForwardContext
from mixadapters.core.layer import AdapterHost
from mixadapters.tuners.agd.layer import GuidanceAdapter, check_scale

NEGATIVE_PROMPTS = ("refuse", "ignore", "two_passes")


def denoiser_of(pipe: Any) -> nn.Module:
    """The model of a pipeline that predicts noise or velocity, without what wraps it."""
    model = getattr(pipe, "unet", None) or getattr(pipe, "transformer", None)
    if model is None:
        raise ValueError(f"{type(pipe).__name__} has neither unet nor transformer")
    model = getattr(model, "_orig_mod", model)
    return model.get_base_model() if hasattr(model, "get_base_model") else model


class OnePass:
    """Makes a pipeline guide by its adapters, in one pass per step:

        with OnePass(pipe, 5.0):
            images = pipe("a cat").images

    or `handle = OnePass(pipe)`, then `pipe("a cat", guidance_scale=5.0)`, and `handle.remove()` at the end. The
    pipeline runs as if without guidance, and the adapters are given its scale.

    Args:
        scale: a number, or one for each prompt. None: the call's `guidance_scale`.
        negative_prompts: what to do with those that are not empty, since adapters have learned one unconditional
            prediction: "refuse", "ignore" (with a warning), or "two_passes" of the model without adapters.
        interval: timesteps at which to guide, both ends inclusive.

    Raises:
        ValueError: the pipeline's model has no guidance adapter, or embeds the guidance scale; one is on already.
    """

    def __init__(
        self, pipe: Any, scale: float | Sequence[float] | Tensor | None = None, *,
        negative_prompts: Literal["refuse", "ignore", "two_passes"] = "refuse",
        interval: tuple[float, float] | None = None,
    ) -> None:  # fmt: skip
        one_of("negative_prompts", negative_prompts, NEGATIVE_PROMPTS)
        plain = type(pipe)
        if hasattr(plain, "one_pass"):
            raise ValueError("this pipeline guides in one pass already; remove() that first")
        if "guidance_scale" not in inspect.signature(plain.__call__).parameters:
            raise ValueError(f"{plain.__name__} takes no guidance_scale")
        model = denoiser_of(pipe)
        config = getattr(model, "config", {})
        if config.get("guidance_embeds") or config.get("time_cond_proj_dim"):
            raise ValueError(f"{type(model).__name__} embeds the guidance scale itself, so there is no second pass")
        self.pipe, self.plain, self.model = pipe, plain, model
        self.scale, self.negative_prompts, self.interval = scale, negative_prompts, interval
        self.adapters()
        call = functools.wraps(plain.__call__)(lambda pipe, *args, **kwargs: self.call(*args, **kwargs))
        same = {"__module__": plain.__module__, "__qualname__": plain.__qualname__}  # it is saved under its own name
        pipe.__class__ = type(plain.__name__, (plain,), {"one_pass": self, "__call__": call, **same})

    def adapters(self) -> list[GuidanceAdapter]:
        """The active adapters; ValueError where there are none."""
        hosts = [m for m in self.model.modules() if isinstance(m, AdapterHost)]
        active = [a for h in hosts for name, a in h.adapters.items() if name in h.active_adapters]
        found = [a for a in active if isinstance(a, GuidanceAdapter)]
        if ForwardContext.find(self.model) is None or not found:
            raise ValueError(
                f"{type(self.model).__name__} has no active guidance adapter; load one by PeftModel.from_pretrained, "
                "or make one by get_peft_model(model, AGDConfig(...))"
            )
        if any(h.disable_adapters for h in hosts):
            raise ValueError(
                "the guidance adapters are disabled; enable_adapters() or enable_lora() of diffusers ends it"
            )
        return found

    def call(self, *args: Any, **kwargs: Any) -> Any:
        given = inspect.signature(self.plain.__call__).bind(self.pipe, *args, **kwargs)
        given.apply_defaults()
        arguments = given.arguments
        scale = arguments["guidance_scale"] if self.scale is None else self.scale
        context = ForwardContext.of(self.model)
        negative = [n for n, v in arguments.items() if n.startswith("negative_prompt") and not _is_empty(v)]
        if negative and self.negative_prompts == "two_passes":
            arguments["guidance_scale"] = scale
            with context.pin_in_thread(guidance_scale=None):
                return self.plain.__call__(*given.args, **given.kwargs)
        if negative and self.negative_prompts == "refuse":
            raise ValueError(
                f"{negative}: adapters imitate guidance against the unconditional prediction that they were trained "
                "with. Leave them out, or choose OnePass(pipe, negative_prompts='two_passes') or 'ignore'"
            )
        if negative:
            warnings.warn(f"{negative} are ignored: guidance comes from adapters", stacklevel=3)
            arguments.update(dict.fromkeys(negative))
        for adapter in self.adapters():
            check_scale(scale, adapter.config)
        rows = torch.as_tensor(scale, dtype=torch.float32, device=getattr(self.pipe, "_execution_device", None))
        if rows.dim():
            rows = rows.repeat_interleave(arguments.get("num_images_per_prompt") or 1)
        arguments["guidance_scale"] = 1.0
        with context.pin_in_thread(guidance_scale=rows, guidance_interval=self.interval):
            return self.plain.__call__(*given.args, **given.kwargs)

    def remove(self) -> None:
        """The pipeline as it was."""
        self.pipe.__class__ = self.plain

    def __enter__(self) -> OnePass:
        return self

    def __exit__(self, *error: Any) -> None:
        self.remove()


def _is_empty(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(_is_empty(v) for v in value)
    return value is None or (isinstance(value, str) and not value.strip())
