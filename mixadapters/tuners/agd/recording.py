"""Recording of the states that a guided diffusion model meets on its way from noise to a sample."""

from __future__ import annotations

import copy
import hashlib
import json
import os
from dataclasses import asdict, dataclass, field
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.utils import logging

from mixadapters.core.fields import check_integer, fits, one_of
from mixadapters.core.hooks import root_of
from mixadapters.tuners.agd.guidance import (
    Conditions,
    Denoiser,
    Predict,
    Rule,
    classifier_free,
    guided,
    sample,
    scale_at,
)  # fmt: skip
from mixadapters.tuners.agd.layer import check_interval
from mixadapters.tuners.agd.storage import FORMAT_VERSION, claim, shard_file, shard_stands, write_shard
from mixadapters.tuners.agd.trajectories import Trajectories


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
        if not fits(self.scales, list[float]) or len(self.scales) != 2:
            raise ValueError(f"scales={self.scales!r} must be two numbers, the least scale and the largest")
        if self.interval is not None:
            check_interval("interval", self.interval)
        if not fits(self.shape, list[int]) or not self.shape or min(self.shape) < 1:
            raise ValueError(f"shape={self.shape!r} must be positive sizes of one noisy input, (C, ...)")
        for name in ("steps", "batch_size", "max_bytes", *(() if self.keep is None else ("keep",))):
            check_integer(name, getattr(self, name), least=None if name == "keep" else 1)
        check_integer("seed", self.seed)
        if not isinstance(self.schedule, dict):
            raise ValueError(f"schedule={self.schedule!r} must be a dict: argument of set_timesteps -> value")
        if not 0 < self.scales[0] <= self.scales[1]:
            raise ValueError(f"scales={self.scales} is no range of positive numbers")
        if self.keep is not None and not 0 < self.keep <= self.steps:
            raise ValueError(f"keep={self.keep} must lie between 1 and steps={self.steps}")
        one_of("dtype", self.dtype, ("float16", "bfloat16", "float32"))

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
    again with the same arguments, an interrupted record goes on where it stopped, by the same model only. `denoiser`
    tells models apart by their weights; other functions are asked for a prediction.

    Args:
        predict: the model as it is to be imitated; see `denoiser`.
        conditions, unconditional: see `guided`; rows on the CPU.
        folder: for shards and `index.json`; None keeps them in memory.
        info: facts for the record, such as the name of the model; with those of the plan they become
            `AGDConfig.teacher`.

    Raises:
        ValueError: the record would exceed `plan.max_bytes`; conditions of different lengths; `folder` holds a record
            that was made otherwise; a state that is not finite, or not so in `plan.dtype`.
    """
    lengths = {name: len(value) for name, value in conditions.items()}
    if len(set(lengths.values())) != 1:
        raise ValueError(f"conditions need the same number of rows, one for each trajectory; have {lengths}")
    if (size := plan.bytes_of(conditions)) > plan.max_bytes:
        raise ValueError(
            f"the record would take {size / 2**30:.2f} GiB, more than max_bytes={plan.max_bytes}; keep fewer steps of "
            "each trajectory (keep), record fewer, or raise max_bytes"
        )
    recorder = Recorder(predict, scheduler, conditions, unconditional, plan, rule, torch.device(device))
    facts = recorder.facts(info or {})
    numbers = range(-(-next(iter(lengths.values())) // plan.batch_size))
    place = None if folder is None else Path(folder)
    if place is not None:
        facts = claim(place, facts, len(numbers))
    shards = []
    for number in logging.tqdm(numbers, desc="trajectories", unit="shard"):
        if place is None:
            shards.append(recorder.shard(number))
        elif not shard_stands(shard_file(place, number), facts):
            write_shard(shard_file(place, number), recorder.shard(number), facts)
    return Trajectories(shards, facts) if place is None else Trajectories.open(place)


@dataclass(frozen=True)
class Recorder:
    """What a record is made of; see `record`."""

    predict: Predict
    scheduler: Any
    conditions: Conditions
    unconditional: Conditions
    plan: TrajectoryPlan
    rule: Rule
    device: torch.device

    def facts(self, info: dict[str, Any]) -> dict[str, Any]:
        """What tells one record from another, as JSON keeps it."""
        digest = getattr(self.predict, "digest", None)
        facts = {
            "format_version": FORMAT_VERSION,
            "trajectories": len(next(iter(self.conditions.values()))),
            "plan": {k: v for k, v in asdict(self.plan).items() if k != "max_bytes"},
            "rule": _rule_name(self.rule),
            "scheduler": _scheduler_facts(self.scheduler),
            "conditions": {n: _digest(v) for n, v in sorted(self.conditions.items())},
            "unconditional": {n: _digest(v) for n, v in sorted(self.unconditional.items())},
            **({"unconditional_varies": True} if self.unconditional_varies else {}),
            **({"model_says": self._words()} if digest is None else {"model_digest": digest()}),
        }
        if isinstance(self.predict, Denoiser):
            facts |= {"model_class": type(root_of(self.predict.model)).__name__}
            facts |= {"model_dtypes": self.predict.dtypes()}
        if taken := sorted(info.keys() & facts):
            raise ValueError(f"info={info}: {taken} are facts of the record itself; give them other names")
        return json.loads(json.dumps({**facts, **info}, default=str))

    @property
    def unconditional_varies(self) -> bool:
        """Whether trajectories differ in what the second pass is conditioned on."""
        return any(bool((v != v[:1]).any()) for v in self.unconditional.values())

    @property
    def _timestep_factor(self) -> float:
        return getattr(self.predict, "timestep_factor", 1.0)

    def part(self, number: int) -> tuple[Conditions, Conditions]:
        """Conditional and unconditional conditions of the shard `number`."""
        rows = slice(number * self.plan.batch_size, (number + 1) * self.plan.batch_size)
        conditions = {name: value[rows].to(self.device) for name, value in self.conditions.items()}
        null = {n: v if len(v) == 1 else v[rows] for n, v in self.unconditional.items()}
        return conditions, {name: value.to(self.device) for name, value in null.items()}

    @torch.no_grad()
    def _words(self) -> list[float]:
        """Some values of one prediction, by which a function of unknown origin is known again."""
        conditions = {name: value[:1] for name, value in self.part(0)[0].items()}
        scheduler = copy.deepcopy(self.scheduler)
        scheduler.set_timesteps(self.plan.steps, device=self.device, **self.plan.schedule)
        timestep = scheduler.timesteps[len(scheduler.timesteps) // 2].to(self.device).expand(1)
        timestep = timestep if self._timestep_factor == 1 else timestep * self._timestep_factor
        x = torch.randn(1, *self.plan.shape, generator=torch.Generator().manual_seed(0)).to(self.device)
        values = self.predict(x, timestep, conditions).flatten().float().cpu()
        return values[:: max(1, len(values) // 16)].tolist()

    def shard(self, number: int) -> dict[str, Tensor]:
        """The states of one batch of trajectories."""
        plan, device = self.plan, self.device
        conditions, null = self.part(number)
        rows = len(next(iter(conditions.values())))
        generator = torch.Generator().manual_seed((plan.seed << 20) + number)
        noise = torch.randn(rows, *plan.shape, generator=generator).to(device)
        low, high = plan.scales
        scale = (low + (high - low) * torch.rand(rows, generator=generator)).to(device)
        kept = plan.keep or plan.steps
        chosen: Tensor | None = None  # (rows, kept) indices of steps, in order
        seen: dict[str, list[Tensor]] = {"sample": [], "target": [], "timestep": [], "guidance_scale": []}

        def visit(index: int, x: Tensor, timestep: Tensor, prediction: Tensor) -> None:
            stored = (self._stored("sample", index, timestep, x), self._stored("target", index, timestep, prediction))
            values = (*stored, timestep.float(), scale_at(scale, timestep, plan.interval))
            for store, value in zip(seen.values(), values, strict=True):
                store.append(value.cpu())

        noise_generator = torch.Generator(device).manual_seed((plan.seed << 20) + number)
        sample(
            guided(self.predict, conditions, null, scale, self.rule, plan.interval), self.scheduler, noise, plan.steps,
            generator=noise_generator, visit=visit, timestep_factor=self._timestep_factor, **plan.schedule,
        )  # fmt: skip
        taken = len(seen["timestep"])  # schedulers of second order visit more states than steps
        if plan.keep is not None or taken != plan.steps:
            chosen = torch.rand(rows, taken, generator=generator).argsort(1)[:, :kept].sort(1).values
        shard = {}
        for name, values in seen.items():
            stacked = torch.stack(values, 1)
            stacked = stacked if chosen is None else stacked[torch.arange(rows).unsqueeze(1), chosen]
            shard[name] = stacked.contiguous()
        kept_conditions = {f"condition.{name}": value for name, value in conditions.items()}
        if self.unconditional_varies:
            kept_conditions |= {f"unconditional.{n}": v.expand(rows, *v.shape[1:]) for n, v in null.items()}
        return shard | {name: value.cpu().contiguous() for name, value in kept_conditions.items()}

    def _stored(self, name: str, index: int, timestep: Tensor, value: Tensor) -> Tensor:
        """value (B, ...) in the plan's dtype; ValueError where it is not finite before or after."""
        stored = value.to(getattr(torch, self.plan.dtype))
        if stored.isfinite().all():
            return stored
        where = f"step {index} (timestep {float(timestep[0]):g}) of {type(self.scheduler).__name__}"
        if value.isfinite().all():
            raise ValueError(
                f"the {name} at {where} reaches {float(value.abs().max()):g}, more than dtype={self.plan.dtype!r} "
                "holds; record with TrajectoryPlan(dtype='bfloat16') or 'float32'"
            )
        config = dict(getattr(self.scheduler, "config", {}))
        settings = {n: config[n] for n in ("prediction_type", "rescale_betas_zero_snr") if n in config}
        raise ValueError(
            f"the {name} at {where} is not finite in {int((~value.isfinite()).sum())} places of {value.numel()}, so "
            f"there is nothing to imitate. The scheduler has {settings}: without signal (rescale_betas_zero_snr, "
            "timestep_spacing='trailing') a noise prediction has no sample, so use a model and scheduler of "
            "v_prediction, or start below the last timestep; else see whether the model overflows in half precision, "
            "or lower scales"
        )


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
