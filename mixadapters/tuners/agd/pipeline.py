"""Guidance in one pass for pipelines of diffusers."""

from __future__ import annotations

import functools
import inspect
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

from torch import Tensor, nn

from mixadapters.core.context import ForwardContext
from mixadapters.core.fields import one_of
from mixadapters.core.layer import AdapterHost
from mixadapters.core.numbers import real_numbers
from mixadapters.tuners.agd.calls import CALLS, denoiser_of, null_class, refuse_distilled
from mixadapters.tuners.agd.encoding import encode_both
from mixadapters.tuners.agd.guidance import nested
from mixadapters.tuners.agd.layer import GuidanceAdapter, check_interval, check_scale

NEGATIVE_PROMPTS = ("refuse", "ignore", "two_passes")
# Arguments of diffusers' pipelines (0.42) that act where a second pass is made, and only there: what that pass is
# conditioned on, and what is done with the two predictions. tests/tuners/test_agd_pipeline.py reads them all.
SECOND_PASS = re.compile(
    r"neg(ative)?_\w+|(\w+_)?(guidance|cfg)(_\w+)?|(sld|edit|sem)_\w+|reverse_editing_direction|guess_mode"
    r"|use_zero_init|zero_steps|pag_\w+|sag_scale|(\w+_)?stg_scale"
)
# Of these, what acts by default, and its value that does not: passes of perturbed attention, around the others.
OFF = {"pag_scale": 0.0, "sag_scale": 0.0, "stg_scale": 0.0, "audio_stg_scale": 0.0}
# Named like them, and at work in any pass; the first is what OnePass takes over.
ANY_PASS = frozenset(
    {
        "guidance_scale",
        "control_guidance_start",
        "control_guidance_end",
        "prior_guidance_scale",
        "guidance_latents",
        "input_frames_guidance",
        "cross_attention_guidance_amount",
    }
)


def refuse_two_models(pipe: Any) -> None:
    """ValueError for pipelines of two models, one for each part of the timesteps, as Wan 2.2."""
    if getattr(pipe, "transformer_2", None) is not None:
        raise ValueError(
            f"{type(pipe).__name__} has a second denoiser, transformer_2, for a part of the timesteps; guidance in "
            "one pass is for pipelines of one model"
        )


def guidance_adapters(model: nn.Module) -> list[GuidanceAdapter]:
    """The active guidance adapters of a model; ValueError where there are none."""
    hosts = [m for m in model.modules() if isinstance(m, AdapterHost)]
    active = [a for h in hosts for name, a in h.adapters.items() if name in h.active_adapters]
    found = [a for a in active if isinstance(a, GuidanceAdapter)]
    if ForwardContext.find(model) is None or not found:
        raise ValueError(
            f"{type(model).__name__} has no active guidance adapter; load one by PeftModel.from_pretrained, "
            "or make one by get_peft_model(model, AGDConfig(...))"
        )
    if any(h.disable_adapters for h in hosts):
        raise ValueError("the guidance adapters are disabled; enable_adapters() or enable_lora() of diffusers ends it")
    return found


class OnePass:
    """Makes a pipeline guide by its adapters, in one pass per step:

        with OnePass(pipe, 5.0):
            images = pipe("a cat").images

    or `handle = OnePass(pipe)`, then `pipe("a cat", guidance_scale=5.0)`, and `handle.remove()` at the end. The
    pipeline runs as if without guidance, and the adapters are given its scale. Copies of the pipeline that are made
    meanwhile are guided too, each with parts of its own, until the handle is removed.

    `callback_on_step_end` finds the scale in `pipe.guidance_scale`, and may change it for the steps that follow by
    `pipe._guidance_scale`; a scale of 1 or less is no guidance, as everywhere in diffusers.

    Args:
        scale: a number, or one for each prompt. None: the call's `guidance_scale`.
        negative_prompts: what to do with whatever acts in a second pass alone (`guidance_rescale`,
            `skip_guidance_layers`, `negative_original_size` ...), since adapters have learned one rule, and with
            negative prompts, unless all adapters read these (`AGDConfig(negative="distil")`): "refuse", "ignore" (with
            a warning), or "two_passes" of the model without adapters.
        interval: timesteps at which to guide, both ends inclusive.

    Raises:
        ValueError: the pipeline's model has no guidance adapter, or embeds the guidance scale; one is on already; the
            scale is no number, or the interval no pair of them.
    """

    def __init__(
        self, pipe: Any, scale: float | Sequence[float] | Tensor | None = None, *,
        negative_prompts: Literal["refuse", "ignore", "two_passes"] = "refuse",
        interval: tuple[float, float] | None = None,
    ) -> None:  # fmt: skip
        one_of("negative_prompts", negative_prompts, NEGATIVE_PROMPTS)
        plain = type(pipe)
        before = vars(pipe).get("one_pass")
        if before is not None and before.on:
            raise ValueError("this pipeline guides in one pass already; remove() that first")
        if "guidance_scale" not in inspect.signature(plain.__call__).parameters:
            raise ValueError(f"{plain.__name__} takes no guidance_scale")
        model = denoiser_of(pipe)
        refuse_distilled(model)
        refuse_two_models(pipe)
        guidance_adapters(model)
        if scale is not None:
            real_numbers("scale", scale)
        if interval is not None:
            check_interval("interval", interval)
        self.pipe, self.scale, self.negative_prompts, self.interval = pipe, scale, negative_prompts, interval
        self.on = True
        _listen(plain)
        pipe.one_pass = self

    def __deepcopy__(self, memo: Any) -> OnePass:
        return self  # a copy of the pipeline ends with the handle, as a shallow one does

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        _listen(type(self.pipe))  # in another process nobody has

    def call(self, pipe: Any, plain: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> Any:
        """`plain`, the call of a pipeline's class, of `pipe` with guidance by its adapters."""
        given = inspect.signature(plain).bind(pipe, *args, **kwargs)
        given.apply_defaults()
        arguments = given.arguments
        scale = arguments["guidance_scale"] if self.scale is None else self.scale
        if scale is None:
            raise ValueError("guidance_scale=None: give OnePass a scale, or the call a guidance_scale")
        model = denoiser_of(pipe)
        context = ForwardContext.of(model)
        reads_negatives = [adapter.config.negative == "distil" for adapter in guidance_adapters(model)]
        second = dict(_of_second_pass(plain, arguments))
        encodes = getattr(pipe, "encode_prompt", None) if all(reads_negatives) else None
        served = inspect.signature(encodes).parameters if encodes else {}
        given_negatives = {name: arguments[name] for name in second if name in served}
        asked = [n for n, (value, default) in second.items() if n not in served and not _is_default(value, default)]
        if asked and self.negative_prompts == "two_passes":
            if real_numbers("guidance_scale", scale).numel() != 1:
                raise ValueError(f"scale={scale}: two passes, for {asked}, take one number")
            arguments["guidance_scale"] = scale
            with context.pin_in_thread(guidance_scale=None):
                return plain(*given.args, **given.kwargs)
        if asked:
            self._pass_over(asked)
        arguments.update({name: default for name, (_, default) in second.items() if name in arguments})
        if "true_cfg_scale" in arguments:  # an empty negative prompt would have asked for a second pass
            arguments["true_cfg_scale"] = 1.0
        _refuse_doubled_images(arguments)
        rows = self._rows(pipe, model, scale, arguments)
        held: dict[str, Any] = {"guidance_scale": rows, "guidance_interval": self.interval}
        prompted = any(arguments.get(name) is not None for name in ("prompt", "prompt_embeds", "class_labels"))
        if any(reads_negatives) and prompted:  # else the pipeline says what it wants
            held["unconditional"] = _second_conditions(pipe, {**arguments, **given_negatives})
        arguments["guidance_scale"] = 1.0
        _watch_callbacks(pipe, arguments, rows)
        with context.pin_in_thread(**held):
            return plain(*given.args, **given.kwargs)

    def _pass_over(self, asked: list[str]) -> None:
        """Say that arguments of a second pass do nothing. Raises ValueError where that is to be refused."""
        if self.negative_prompts == "refuse":
            raise ValueError(
                f"{asked} would do nothing: they belong to a second pass, and adapters imitate guidance by the rule "
                "and against the unconditional prediction that they were trained with. Leave them out"
                f"{_off(asked)}, or choose "
                "OnePass(pipe, negative_prompts='two_passes') or 'ignore'; record(rule=...) distils other rules"
            )
        warnings.warn(f"{asked} are ignored: guidance comes from adapters", stacklevel=4)

    def _rows(self, pipe: Any, model: nn.Module, scale: Any, arguments: dict[str, Any]) -> Tensor:
        """The scale as a tensor of its own, () or (B,)."""
        rows = real_numbers("guidance_scale", scale, getattr(pipe, "_execution_device", None)).clone()
        if not rows.isfinite().all():
            raise ValueError(f"guidance_scale={scale} must be finite")
        if self.scale is None:
            rows = rows.where(rows > 1, 1.0)  # what a pipeline takes for no guidance
        for adapter in guidance_adapters(model):
            check_scale(rows, adapter.config)
        return rows.repeat_interleave(_copies(arguments)) if rows.dim() else rows

    def remove(self) -> None:
        """The pipeline as it was, and copies that were made meanwhile likewise."""
        self.on = False
        vars(self.pipe).pop("one_pass", None)

    def __enter__(self) -> OnePass:
        return self

    def __exit__(self, *error: Any) -> None:
        self.remove()


def _listen(plain: type) -> None:
    """Wrap `plain.__call__`, once and for good: pipelines that hold a `OnePass` are called by it.

    Python looks for `__call__` on the class. What a pipeline is to do is kept by the pipeline, so that others of its
    class, and copies, are what they are.
    """
    original: Any = plain.__call__
    if getattr(vars(plain).get("__call__"), "listens", False):
        return

    @functools.wraps(original)
    def call(pipe: Any, *args: Any, **kwargs: Any) -> Any:
        handle = vars(pipe).get("one_pass")
        # A class that calls its parent's __call__ has been through this already.
        if handle is None or not handle.on or type(pipe).__call__ is not call:
            return original(pipe, *args, **kwargs)
        return handle.call(pipe, original, args, kwargs)

    call.listens = True  # type: ignore[attr-defined]
    plain.__call__ = call  # type: ignore[method-assign]


# --- what acts in a second pass only ------------------------------------------------------------------------------


def acts_in_second_pass(name: str) -> bool:
    """Whether an argument of a pipeline acts in a pass besides the conditional one, and only there."""
    return name not in ANY_PASS and SECOND_PASS.fullmatch(name) is not None


def _of_second_pass(plain: Callable[..., Any], arguments: dict[str, Any]) -> Iterator[tuple[str, tuple[Any, Any]]]:
    """(name, (value, the one without effect)) of the arguments that act in a second pass only."""
    for name, parameter in inspect.signature(plain).parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            yield from ((n, (v, None)) for n, v in arguments[name].items() if acts_in_second_pass(n))
        elif acts_in_second_pass(name):
            yield name, (arguments[name], OFF.get(name, parameter.default))


def _off(asked: list[str]) -> str:
    values = ", ".join(f"{name}={OFF[name]:g}" for name in asked if name in OFF)
    return f" (where they act by default, pass {values})" if values else ""


def _is_default(value: Any, default: Any) -> bool:
    if value is default or _is_empty(value):
        return True
    return not isinstance(value, Tensor) and not isinstance(default, Tensor) and bool(value == default)


def _is_empty(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(_is_empty(v) for v in value)
    return value is None or (isinstance(value, str) and not value.strip())


def _copies(arguments: dict[str, Any]) -> int:
    """How many pictures, or films, each prompt is to have."""
    counts = (arguments.get(f"num_{what}_per_prompt") for what in ("images", "videos", "waveforms"))
    return next((n for n in counts if n), 1)


def _second_conditions(pipe: Any, arguments: dict[str, Any]) -> dict[str, Any]:
    """What the second pass of a call would be conditioned on: arguments of the model, nested, of (B, ...).

    Raises:
        ValueError: a pipeline whose way of encoding prompts is not known; a negative prompt as words and embeddings.
    """
    for name, value in arguments.items():
        if name.startswith("negative") and value is not None and arguments.get(f"{name}_embeds") is not None:
            raise ValueError(f"{name} and {name}_embeds are given; give one of them")
    model = denoiser_of(pipe)
    call = CALLS.get(type(model).__name__)
    if call is None:
        raise ValueError(
            f"the adapters read negative prompts (negative='distil'), and how {type(pipe).__name__} encodes them for "
            f"a {type(model).__name__} is not known. Call it with guidance_scale=1 inside "
            "ForwardContext.of(model).pin(guidance_scale=..., unconditional=...)"
        )
    if not call.encodings(model.config):
        return {"class_labels": null_class(model)}
    copies = _copies(arguments)
    second = encode_both(pipe, arguments)[1]
    return nested({name: value.repeat_interleave(copies, 0) for name, value in second.items()})


def _refuse_doubled_images(arguments: dict[str, Any]) -> None:
    """Embeddings for an IP-Adapter that hold those of the second pass, which pipelines take for more rows here."""
    prompt, embeds = arguments.get("prompt"), arguments.get("prompt_embeds")
    given = (prompt or ()) if embeds is None else embeds
    count = 1 if isinstance(prompt, str) else len(given)
    for value in arguments.get("ip_adapter_image_embeds") or ():
        if count and len(value) == 2 * count:
            raise ValueError(
                f"ip_adapter_image_embeds of {len(value)} rows for {count} prompts: they hold the negative embeddings "
                "of a second pass; pass the positive ones alone, value.chunk(2)[1]"
            )


# --- callbacks ----------------------------------------------------------------------------------------------------


def _watch_callbacks(pipe: Any, arguments: dict[str, Any], rows: Tensor) -> None:
    """Let the callbacks of a call see and change the scale `rows` as that of the pipeline."""
    callback = arguments.get("callback_on_step_end")
    if callback is not None:
        if hasattr(callback, "tensor_inputs"):  # a PipelineCallback: the pipeline asks it what it reads
            arguments["callback_on_step_end_tensor_inputs"] = callback.tensor_inputs
        arguments["callback_on_step_end"] = functools.partial(_step, callback, pipe, rows)
    for place in (arguments, arguments.get("kwargs") or {}):
        if place.get("callback") is not None:
            place["callback"] = functools.partial(_step, place["callback"], pipe, rows)


def _step(callback: Callable[..., Any], pipe: Any, rows: Tensor, *args: Any, **kwargs: Any) -> Any:
    """One call of a callback, during which the pipeline tells the scale of the adapters."""
    if "_guidance_scale" not in vars(pipe):  # it keeps the scale to itself
        return callback(*args, **kwargs)
    held = [dict(a) for a in (*args, *kwargs.values()) if isinstance(a, dict)]
    settings = {n: v for n, v in vars(pipe).items() if acts_in_second_pass(n.removeprefix("_"))}
    shown = float(rows) if rows.dim() == 0 else rows.clone()
    pipe._guidance_scale = shown
    try:
        result = callback(*args, **kwargs)
        if pipe._guidance_scale is not shown:
            _change_scale(pipe, rows)
    finally:
        pipe._guidance_scale = 1.0
    changed = [n for n, v in settings.items() if vars(pipe).get(n) is not v]
    if changed:
        raise ValueError(f"the callback has set {changed}, which act in a second pass only; there is none in OnePass")
    if held and isinstance(result, dict):
        _check_tensors(held[0], result)
    return result


def _change_scale(pipe: Any, rows: Tensor) -> None:
    new = real_numbers("_guidance_scale", pipe._guidance_scale, rows.device)
    if new.numel() != 1 and new.shape != rows.shape:
        raise ValueError(f"the callback has set _guidance_scale={pipe._guidance_scale}; give a number")
    for adapter in guidance_adapters(denoiser_of(pipe)):
        check_scale(new.where(new > 1, 1.0), adapter.config)
    rows.copy_(new.where(new > 1, 1.0).reshape(new.shape if new.dim() == rows.dim() else ()))


def _check_tensors(given: dict[str, Any], returned: dict[str, Any]) -> None:
    """Refuse tensors of a callback that count on the rows of a second pass."""
    for name, value in returned.items():
        before = given.get(name)
        if acts_in_second_pass(name) and value is not before:
            raise ValueError(f"the callback has changed {name}, which acts in a second pass only; there is none here")
        if isinstance(value, Tensor) and isinstance(before, Tensor) and value.shape[:1] != before.shape[:1]:
            raise ValueError(
                f"the callback has returned {name} of {len(value)} rows for {len(before)}: in OnePass there are no "
                "rows of a second pass to cut off"
            )
