"""States of a diffusion model on its way from noise to a sample, as its guided self makes them.

One sampler loop over `predict(x, timestep, conditions)`, for models of diffusers and others: pipelines differ in the
order of their conditional and unconditional halves. Schedulers are those of diffusers, or objects like them.
"""

from __future__ import annotations

import copy
import hashlib
import inspect
import json
import os
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import accumulate
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers.utils import logging

Conditions = dict[str, Tensor]  # argument of the model's forward -> (B, ...); "a.b" is entry b of a dict argument a
Predict = Callable[[Tensor, Tensor, Conditions], Tensor]  # x (B, ...), timestep (B,), conditions -> prediction
Rule = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]  # conditional, unconditional, scale (B,), timestep (B,)

FORMAT_VERSION = 1


# --- the teacher --------------------------------------------------------------------------------------------------


def denoiser(model: nn.Module) -> Predict:
    """`predict` of a model that takes its noisy input first and `timestep` by name; computes in the model's dtype."""
    floating = (p.dtype for name, p in model.named_parameters() if "adapters." not in name and p.is_floating_point())
    dtype = next(floating, torch.float32)

    def predict(x: Tensor, timestep: Tensor, conditions: Conditions) -> Tensor:
        return prediction_of(model(x.to(dtype), timestep=timestep, **nested(conditions))).float()

    return predict


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
    **schedule: Any,
) -> Tensor:  # fmt: skip
    """Runs a scheduler of diffusers from standard noise (B, C, ...) to a sample.

    Args:
        step: x, timestep (B,) -> prediction. Channels beyond those of x (a learned variance) are left aside.
        scheduler: not changed; a copy runs.
        visit: called with (index, model input, timesteps (B,), prediction) at every step.
        schedule: further arguments of `set_timesteps`, such as `mu` of flow matching.
    """
    scheduler = copy.deepcopy(scheduler)
    scheduler.set_timesteps(steps, device=noise.device, **schedule)
    takes = inspect.signature(scheduler.step).parameters
    options = {"generator": generator} if "generator" in takes else {}
    x = noise * getattr(scheduler, "init_noise_sigma", 1.0)
    for index, timestep in enumerate(scheduler.timesteps):
        given = scheduler.scale_model_input(x, timestep) if hasattr(scheduler, "scale_model_input") else x
        rows = timestep.to(x.device).expand(len(x))
        prediction = step(given, rows)[:, : x.shape[1]]
        if visit is not None:
            visit(index, given, rows, prediction)
        x = scheduler.step(prediction, timestep, x, return_dict=False, **options)[0]
    return x


# --- recording ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TrajectoryPlan:
    """What to record.

    Attributes:
        shape: of one noisy input, (C, ...).
        scales: guidance scales are drawn uniformly from this range, one for each trajectory.
        keep: states kept of each trajectory, at random; None: all.
        interval: timesteps at which the teacher is guided; elsewhere the recorded scale is 1.
        batch_size: trajectories sampled together, and stored in one shard.
        dtype: of inputs and targets on disk.
        max_bytes: refuse to begin if the record would be larger.
        schedule: further arguments of the scheduler's `set_timesteps`.
    """

    shape: tuple[int, ...]
    scales: tuple[float, float] = (1.0, 6.0)
    steps: int = 50
    keep: int | None = None
    interval: tuple[float, float] | None = None
    batch_size: int = 16
    seed: int = 0
    dtype: str = "float16"
    max_bytes: int = 20 * 2**30
    schedule: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not 0 < self.scales[0] <= self.scales[1]:
            raise ValueError(f"scales={self.scales} is no range of positive numbers")
        if self.keep is not None and not 0 < self.keep <= self.steps:
            raise ValueError(f"keep={self.keep} must lie between 1 and steps={self.steps}")
        if self.dtype not in ("float16", "bfloat16", "float32"):
            raise ValueError(f"dtype={self.dtype!r} is unknown; choose float16, bfloat16 or float32")

    def bytes_of(self, conditions: Conditions) -> int:
        """Size of the whole record."""
        rows = len(next(iter(conditions.values())))
        state = 2 * prod(self.shape) * getattr(torch, self.dtype).itemsize + 8
        return rows * (self.keep or self.steps) * state + sum(v.nbytes for v in conditions.values())


def record(
    predict: Predict, scheduler: Any, conditions: Conditions, unconditional: Conditions, plan: TrajectoryPlan,
    folder: str | os.PathLike[str] | None = None, *, rule: Rule = classifier_free, info: dict[str, Any] | None = None,
    device: torch.device | str = "cpu",
) -> Trajectories:  # fmt: skip
    """Samples one guided trajectory for each row of `conditions`, and keeps what the model was given and should say.

    A shard is written whole or not at all, and its random numbers depend on the seed and its number alone: called
    again with the same arguments, an interrupted record goes on where it stopped.

    Args:
        predict: the model as it is to be imitated; see `denoiser`.
        conditions, unconditional: see `guided`; rows on the CPU.
        folder: for shards and `index.json`; None keeps them in memory.
        info: facts for the record, such as the name of the model; with those of the plan they become
            `AGDConfig.teacher`.

    Raises:
        ValueError: the record would exceed `plan.max_bytes`; conditions of different lengths; `folder` holds a record
            that was made otherwise.
    """
    lengths = {name: len(value) for name, value in conditions.items()}
    if len(set(lengths.values())) != 1:
        raise ValueError(f"conditions need the same number of rows, one for each trajectory; have {lengths}")
    if (size := plan.bytes_of(conditions)) > plan.max_bytes:
        raise ValueError(
            f"the record would take {size / 2**30:.2f} GiB, more than max_bytes={plan.max_bytes}; keep fewer steps of "
            "each trajectory (keep), record fewer, or raise max_bytes"
        )
    facts = {
        "format_version": FORMAT_VERSION,
        "plan": {k: v for k, v in asdict(plan).items() if k != "max_bytes"},
        "rule": _rule_name(rule),
        "scheduler": _scheduler_facts(scheduler),
        "conditions": {n: _digest(v) for n, v in sorted(conditions.items())},
        "unconditional": {n: _digest(v) for n, v in sorted(unconditional.items())},
        **(info or {}),
    }
    facts = json.loads(json.dumps(facts, default=str))
    folder = None if folder is None else Path(folder)
    if folder is not None:
        _claim(folder, facts)
    count = next(iter(lengths.values()))
    starts = range(0, count, plan.batch_size)
    shards = []
    for number, start in enumerate(logging.tqdm(starts, desc="trajectories", unit="shard")):
        file = None if folder is None else folder / f"{number:05d}.safetensors"
        if file is not None and file.exists():
            continue
        part = {name: value[start : start + plan.batch_size].to(device) for name, value in conditions.items()}
        null = {n: v if len(v) == 1 else v[start : start + plan.batch_size] for n, v in unconditional.items()}
        null = {name: value.to(device) for name, value in null.items()}
        shard = _shard(predict, scheduler, part, null, plan, number, rule, torch.device(device))
        if file is None:
            shards.append(shard)
        else:
            save_file(shard, file.with_suffix(".part"))
            os.replace(file.with_suffix(".part"), file)
    return Trajectories(shards, facts) if folder is None else Trajectories.open(folder)


def _shard(
    predict: Predict, scheduler: Any, conditions: Conditions, unconditional: Conditions, plan: TrajectoryPlan,
    number: int, rule: Rule, device: torch.device,
) -> dict[str, Tensor]:  # fmt: skip
    rows = len(next(iter(conditions.values())))
    generator = torch.Generator().manual_seed((plan.seed << 20) + number)
    noise = torch.randn(rows, *plan.shape, generator=generator).to(device)
    low, high = plan.scales
    scale = (low + (high - low) * torch.rand(rows, generator=generator)).to(device)
    kept = plan.keep or plan.steps
    dtype = getattr(torch, plan.dtype)
    chosen: Tensor | None = None  # (rows, kept) indices of steps, in order
    seen: dict[str, list[Tensor]] = {"sample": [], "target": [], "timestep": [], "guidance_scale": []}

    def visit(index: int, x: Tensor, timestep: Tensor, prediction: Tensor) -> None:
        values = (x.to(dtype), prediction.to(dtype), timestep.float(), scale_at(scale, timestep, plan.interval))
        for store, value in zip(seen.values(), values, strict=True):
            store.append(value.cpu())

    noise_generator = torch.Generator(device).manual_seed((plan.seed << 20) + number)
    sample(
        guided(predict, conditions, unconditional, scale, rule, plan.interval), scheduler, noise, plan.steps,
        generator=noise_generator, visit=visit, **plan.schedule,
    )  # fmt: skip
    taken = len(seen["timestep"])  # schedulers of second order visit more states than steps
    if plan.keep is not None or taken != plan.steps:
        chosen = torch.rand(rows, taken, generator=generator).argsort(1)[:, :kept].sort(1).values
    shard = {}
    for name, values in seen.items():
        stacked = torch.stack(values, 1)
        shard[name] = stacked if chosen is None else stacked[torch.arange(rows).unsqueeze(1), chosen].contiguous()
    return shard | {f"condition.{name}": value.cpu().contiguous() for name, value in conditions.items()}


def _rule_name(rule: Any) -> Any:
    if isinstance(rule, partial):
        return {"name": _rule_name(rule.func), **rule.keywords}
    return getattr(rule, "__name__", type(rule).__name__)


def _scheduler_facts(scheduler: Any) -> dict[str, Any]:
    """Class and settings of a scheduler, without what only says who wrote them."""
    settings = {k: v for k, v in dict(getattr(scheduler, "config", {})).items() if not k.startswith("_")}
    return {"class": type(scheduler).__name__, **settings}


def _digest(value: Tensor) -> str:
    raw = value.detach().cpu().contiguous().view(torch.uint8) if value.dim() else value.reshape(1).view(torch.uint8)
    return f"{tuple(value.shape)} {hashlib.sha256(raw.numpy().tobytes()).hexdigest()[:16]}"


def _claim(folder: Path, facts: dict[str, Any]) -> None:
    """Make `folder` the record of these facts, or go on with one that has begun."""
    index = folder / "index.json"
    if not index.exists():
        if folder.exists() and any(folder.iterdir()):
            raise ValueError(f"folder={str(folder)!r} holds other files; give an empty one for the record")
        folder.mkdir(parents=True, exist_ok=True)
        index.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
        return
    before = json.loads(index.read_text(encoding="utf-8"))
    differs = [k for k in {**before, **facts} if before.get(k) != facts.get(k)]
    if differs:
        raise ValueError(
            f"folder={str(folder)!r} holds a record with other {differs}: {[before.get(k) for k in differs]}, now "
            f"{[facts.get(k) for k in differs]}; give another folder"
        )


# --- reading ------------------------------------------------------------------------------------------------------


class Trajectories(Dataset):
    """Recorded states. An item has sample, target (C, ...), timestep, guidance_scale () and the conditions, by name.

    Attributes:
        info: how they were made; goes into `AGDConfig.teacher`.
    """

    def __init__(self, shards: list[dict[str, Tensor]], info: dict[str, Any]) -> None:
        if not shards:
            raise ValueError("a record without shards; was it interrupted before the first?")
        self.shards, self.info = shards, info
        self._ends = list(accumulate(s["timestep"].numel() for s in shards))

    @classmethod
    def open(cls, folder: str | os.PathLike[str]) -> Trajectories:
        """A record on disk. Its shards are mapped into memory, not read."""
        info = json.loads((Path(folder) / "index.json").read_text(encoding="utf-8"))
        if info["format_version"] > FORMAT_VERSION:
            raise ValueError(f"format_version={info['format_version']} is newer than this mixadapters reads")
        return cls([load_file(file) for file in sorted(Path(folder).glob("*.safetensors"))], info)

    @property
    def config_fields(self) -> dict[str, Any]:
        """Fields of an `AGDConfig` that follow from the data."""
        low, high = self.info["plan"]["scales"]
        return {"min_scale": low, "max_scale": high, "teacher": self.info}

    def split(self, held_out: int) -> tuple[Trajectories, Trajectories]:
        """The record without its last `held_out` trajectories, and those."""
        total = sum(len(s["timestep"]) for s in self.shards)
        if not 0 < held_out < total:
            raise ValueError(f"held_out={held_out} must lie between 0 and the number of trajectories, {total}")
        first, second, room = [], [], total - held_out
        for shard in self.shards:
            here = min(room, len(shard["timestep"]))
            room -= here
            if here:
                first.append({k: v[:here] for k, v in shard.items()})
            if here < len(shard["timestep"]):
                second.append({k: v[here:] for k, v in shard.items()})
        return Trajectories(first, self.info), Trajectories(second, self.info)

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"index={index}: there are {len(self)} states")
        index %= len(self)
        number = bisect_right(self._ends, index)
        shard = self.shards[number]
        row, step = divmod(index - (self._ends[number - 1] if number else 0), shard["timestep"].shape[1])
        item = {}
        for name, value in shard.items():
            if name.startswith("condition."):
                item[name.removeprefix("condition.")] = value[row]
            else:
                item[name] = value[row, step].float()
        return item


class TrajectoryCollator:
    """Items of `Trajectories` -> arguments of a model's forward, with the targets."""

    def __init__(self, model: nn.Module) -> None:
        model = model.get_base_model() if hasattr(model, "get_base_model") else model
        self.first = list(inspect.signature(type(model).forward).parameters)[1]

    def __call__(self, items: Sequence[dict[str, Tensor]]) -> dict[str, Any]:
        batch = {name: torch.stack([item[name] for item in items]) for name in items[0]}
        return nested({self.first: batch.pop("sample"), **batch})
