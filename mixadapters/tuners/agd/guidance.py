"""The teacher: guided predictions of a model, and the sampler loop over them.

One loop over `predict(x, timestep, conditions)`, for models of diffusers and others: pipelines differ in the order of
their conditional and unconditional halves. Schedulers are those of diffusers, or objects like them.
"""

from __future__ import annotations

import copy
import hashlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mixadapters.core.fields import check_integer, check_number, check_share
from mixadapters.core.hooks import root_of
from mixadapters.tuners.agd.calls import model_arguments, timestep_factor

Conditions = dict[str, Tensor]  # argument of the model's forward -> (B, ...); "a.b" is entry b of a dict argument a
Predict = Callable[[Tensor, Tensor, Conditions], Tensor]  # x (B, ...), timestep (B,), conditions -> prediction
Rule = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]  # conditional, unconditional, scale (B,), timestep (B,)


class Denoiser:
    """`predict` of a model; knows the model again by its weights."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.timestep_factor = model, timestep_factor(model)
        self.dtype = next((p.dtype for _, p in self._frozen() if p.is_floating_point()), torch.float32)

    def __call__(self, x: Tensor, timestep: Tensor, conditions: Conditions) -> Tensor:
        x = x.to(self.dtype)
        return prediction_of(self.model(x, **model_arguments(self.model, x, timestep), **nested(conditions))).float()

    def digest(self) -> str:
        """Of class and weights, without adapters of ours: integer sums, which do not depend on device or order."""
        found = hashlib.sha256(type(root_of(self.model)).__name__.encode())
        for name, tensor in sorted(self._frozen(), key=lambda item: item[0]):
            found.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
            if tensor.is_meta or type(tensor) not in (Tensor, nn.Parameter):  # offloaded; quantized
                continue
            bits = tensor.detach().contiguous().reshape(-1)
            bits = bits.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[bits.itemsize])
            found.update(f"{int(bits.sum(dtype=torch.int64))} {bits[:: 1 + len(bits) // 256].tolist()}".encode())
        return found.hexdigest()[:16]

    def dtypes(self) -> list[str]:
        """Of the weights; in others the same weights have another digest."""
        return sorted({f"{type(p).__name__} of {p.dtype}" for _, p in self._frozen()})

    def _frozen(self) -> Iterator[tuple[str, Tensor]]:
        return ((name, p) for name, p in root_of(self.model).named_parameters() if "adapters." not in name)


def denoiser(model: nn.Module) -> Denoiser:
    """`predict` of a model that takes its noisy input first and `timestep` by name; computes in the model's dtype."""
    return Denoiser(model)


def refuse_another_model(model: nn.Module, teacher: dict[str, Any]) -> None:
    """ValueError where a record (`Trajectories.info`) says that it was made by other weights than the model's.

    Weights in another dtype, or quantized, are not compared, and nothing is where an older record does not say.
    """
    made_by, name = teacher.get("model_class"), type(root_of(model)).__name__
    if made_by not in (None, name):
        raise ValueError(f"the record was made by a {made_by}, and teaches no {name}; record() with this model")
    asked = Denoiser(model)
    if teacher.get("model_dtypes") == asked.dtypes() and teacher.get("model_digest") not in (None, asked.digest()):
        raise ValueError(
            f"the record was made by a {name} of other weights, whose guidance is not that of this model; record() "
            "with this one, or leave out `teacher` of the AGDConfig to train on it all the same"
        )


def prediction_of(output: Any) -> Tensor:
    """The prediction in what a denoiser returns: a tensor, a tuple, or an output whose first entry it is."""
    if isinstance(output, Tensor):
        return output
    return output[0] if isinstance(output, tuple) else next(v for k, v in output.items() if k != "loss")


def nested(flat: dict[str, Any]) -> dict[str, Any]:
    """{"a.b": x} -> {"a": {"b": x}}."""
    found: dict[str, Any] = {}
    for path, value in flat.items():
        *parents, last = path.split(".")
        place = found
        for part in parents:
            place = place.setdefault(part, {})
        place[last] = value
    return found


def classifier_free(
    conditional: Tensor, unconditional: Tensor, scale: Tensor, timestep: Tensor, *, channels: int | None = None,
    rescale: float = 0.0,
) -> Tensor:  # fmt: skip
    """Classifier-free guidance (Ho and Salimans 2022): u + w (c - u).

    Args:
        channels: guide the first channels only, the others are the conditional ones (DiT's own sampler: 3 of 4).
        rescale: share of the result that takes the conditional prediction's deviation (Lin et al. 2023, section 3.4).
    """
    check_share("rescale", rescale)
    if channels is not None:
        check_integer("channels", channels, least=1, most=conditional.shape[1])
    weight = scale.view(-1, *[1] * (conditional.dim() - 1)).to(conditional.dtype)
    guided = unconditional + weight * (conditional - unconditional)
    if rescale:
        axes = tuple(range(1, guided.dim()))
        like = guided * (conditional.std(axes, keepdim=True) / guided.std(axes, keepdim=True))
        guided = rescale * like + (1 - rescale) * guided
    # exactly the conditional prediction at w = 1, as the student
    guided = torch.where(weight == 1, conditional, guided)
    return guided if channels is None else torch.cat([guided[:, :channels], conditional[:, channels:]], 1)


def scale_at(scale: Tensor, timestep: Tensor, interval: Sequence[float] | None) -> Tensor:
    """(B,) scales: 1 at timesteps outside `interval` (Kynkaanniemi et al. 2024), both ends inclusive."""
    if interval is None:
        return scale
    return torch.where((timestep >= interval[0]) & (timestep <= interval[1]), scale, 1.0)


def guided(
    predict: Predict, conditions: Conditions, unconditional: Conditions, scale: Tensor, rule: Rule = classifier_free,
    interval: Sequence[float] | None = None,
) -> Callable[[Tensor, Tensor], Tensor]:  # fmt: skip
    """(x, timestep) -> the guided prediction, by one call of `predict` on both halves.

    unconditional: a tensor of one row, or of as many as `conditions`, for each condition that differs.
    """
    if unknown := sorted(unconditional.keys() - conditions.keys()):
        raise ValueError(f"unconditional has {unknown}, which conditions have not: {sorted(conditions)}")
    rows = len(scale)
    null = {name: unconditional.get(name, value).expand_as(value) for name, value in conditions.items()}
    both = {name: torch.cat([conditions[name], null[name]]) for name in conditions}

    def step(x: Tensor, timestep: Tensor) -> Tensor:
        prediction = predict(torch.cat([x, x]), torch.cat([timestep, timestep]), both)
        return rule(prediction[:rows], prediction[rows:], scale_at(scale, timestep, interval), timestep)

    return step


@torch.no_grad()
def sample(
    step: Callable[[Tensor, Tensor], Tensor], scheduler: Any, noise: Tensor, steps: int, *,
    generator: torch.Generator | None = None, visit: Callable[[int, Tensor, Tensor, Tensor], None] | None = None,
    timestep_factor: float = 1.0, **schedule: Any,
) -> Tensor:  # fmt: skip
    """Runs a scheduler of diffusers from standard noise (B, C, ...) to a sample.

    Args:
        step: x, timestep (B,) -> prediction. Channels beyond those of x (a learned variance) are left aside.
        scheduler: not changed; a copy runs.
        visit: called with (index, model input, timesteps (B,), prediction) at every step.
        timestep_factor: of the timesteps that `step` is given, the scheduler's being 1; `Denoiser` knows its model's.
        schedule: further arguments of `set_timesteps`, such as `mu` of flow matching.
    """
    check_integer("steps", steps, least=1)
    check_number("timestep_factor", timestep_factor, above=0)
    scheduler = copy.deepcopy(scheduler)
    scheduler.set_timesteps(steps, device=noise.device, **schedule)
    takes = inspect.signature(scheduler.step).parameters
    options = {"generator": generator} if "generator" in takes else {}
    x = noise * getattr(scheduler, "init_noise_sigma", 1.0)
    for index, timestep in enumerate(scheduler.timesteps):
        given = scheduler.scale_model_input(x, timestep) if hasattr(scheduler, "scale_model_input") else x
        rows = timestep.to(x.device).expand(len(x))
        rows = rows if timestep_factor == 1 else rows * timestep_factor
        prediction = step(given, rows)[:, : x.shape[1]]
        if visit is not None:
            visit(index, given, rows, prediction)
        x = scheduler.step(prediction, timestep, x, return_dict=False, **options)[0]
    return x
