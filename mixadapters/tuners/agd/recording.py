"""Recording of the states that a guided diffusion model meets on its way from noise to a sample."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, dataclass, field
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers.utils import logging

from mixadapters.tuners.agd.guidance import Conditions, Predict, Rule, classifier_free, guided, sample, scale_at
from mixadapters.tuners.agd.trajectories import FORMAT_VERSION, Trajectories


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
