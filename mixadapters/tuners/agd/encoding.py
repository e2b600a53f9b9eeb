"""What the text encoders of a diffusers pipeline make of prompts, as the arguments of its model."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from mixadapters.tuners.agd.calls import CALLS, Encoding, denoiser_of

ATTENTION_ARGUMENTS = ("cross_attention_kwargs", "joint_attention_kwargs", "attention_kwargs")  # with LoRA's scale
Encoded = dict[str, Tensor]  # argument of the model's forward -> (B, ...); "a.b" is entry b of a dict argument a


@torch.no_grad()
def encode_both(pipe: Any, given: dict[str, Any]) -> tuple[Encoded, Encoded]:
    """Conditions of the first and of the second pass, a row for each prompt.

    Args:
        given: arguments of the pipeline's call by name; for the rest its defaults.

    Raises:
        ValueError: `encode_prompt` of the pipeline gives something else than its model is known to be given.
    """
    model = denoiser_of(pipe)
    first: Encoded = {}
    second: Encoded = {}
    for encoding in CALLS[type(model).__name__].encodings(model.config):
        for name, value in zip(encoding.returns, _encode(pipe, encoding, given), strict=True):
            if name.startswith("-"):
                second[name[1:]] = value
            elif name:
                first[name] = value
    return first, second


def _encode(pipe: Any, encoding: Encoding, given: dict[str, Any]) -> tuple[Any, ...]:
    """What one call of `encode_prompt` returns."""
    call, takes = (inspect.signature(f).parameters for f in (type(pipe).__call__, pipe.encode_prompt))
    options = {name: given.get(name, call[name].default) for name in takes if name in call and name != "prompt"}
    if "lora_scale" in takes:
        passed = [given.get(name) or {} for name in ATTENTION_ARGUMENTS]
        options["lora_scale"] = next((kwargs["scale"] for kwargs in passed if "scale" in kwargs), None)
    options |= {"device": pipe._execution_device, "do_classifier_free_guidance": True}
    options |= {f"num_{what}_per_prompt": 1 for what in ("images", "videos") if f"num_{what}_per_prompt" in takes}
    options |= encoding.options
    found = pipe.encode_prompt(prompt=given.get("prompt"), **options)
    if len(found) != len(encoding.returns) or not all(map(_fits, encoding.returns, found)):
        raise ValueError(
            f"{type(pipe).__name__}.encode_prompt gives {[tuple(getattr(t, 'shape', ())) for t in found]}, not what "
            f"its model is known to be given, {list(encoding.returns)} ('-': of the unconditional pass). Use record() "
            "with conditions of your own"
        )
    return tuple(found)


def _fits(name: str, value: Any) -> bool:
    """Whether a tensor may be what it is said to be: tokens (B, T, d), their mask (B, T), or one vector (B, d)."""
    if not name:
        return True
    if not isinstance(value, Tensor):
        return False
    return value.dim() == (3 if "hidden_states" in name else 2) and value.is_floating_point() != ("mask" in name)
