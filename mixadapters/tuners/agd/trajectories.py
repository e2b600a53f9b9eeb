"""Recorded states of guided trajectories, as a data set."""

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from mixadapters.core.hooks import names_of_arguments, root_of
from mixadapters.tuners.agd.calls import model_arguments
from mixadapters.tuners.agd.guidance import nested
from mixadapters.tuners.agd.storage import INDEX, read_index, read_shards


class Trajectories(Dataset):
    """Recorded states. An item has sample, target (C, ...), timestep, guidance_scale () and the conditions, by name;
    also "unconditional." and a name for each condition of the second pass, where trajectories differ in these.

    Attributes:
        info: how they were made; goes into `AGDConfig.teacher`.
    """

    def __init__(self, shards: list[dict[str, Tensor]], info: dict[str, Any]) -> None:
        if not shards:
            raise ValueError("a record without shards; was it interrupted before the first?")
        self.shards, self.info = shards, info
        self._ends = list(accumulate(s["timestep"].numel() for s in shards))

    def __repr__(self) -> str:
        return f"<Trajectories: {len(self):,} states in {len(self.shards)} shards>"

    @classmethod
    def open(cls, folder: str | os.PathLike[str]) -> Trajectories:
        """A record on disk. Its shards are mapped into memory, not read.

        Warns of a record that is not whole, of which it has what can be read.

        Raises:
            ValueError: no index, or no shards, of a record.
        """
        folder = Path(folder)
        info = read_index(folder / INDEX)
        return cls(read_shards(folder, info), info)

    @property
    def config_fields(self) -> dict[str, Any]:
        """Fields of an `AGDConfig` that follow from the data."""
        low, high = self.info["plan"]["scales"]
        fields = {"min_scale": low, "max_scale": high, "teacher": self.info}
        return fields | ({"negative": "distil"} if self.info.get("unconditional_varies") else {})

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
            elif name.startswith("unconditional."):
                item[name] = value[row]
            else:
                item[name] = value[row, step].float()
        for name in ("sample", "target"):
            check_finite(name, item[name], item["timestep"], f"state {index}, step {step} of", self.info)
        return item


def check_finite(name: str, value: Tensor, timestep: Tensor, where: str, info: dict[str, Any]) -> None:
    """Refuse inputs and targets that would turn weights to NaN. Earlier versions recorded them.

    Raises:
        ValueError: with the scheduler that made them, and the remedy.
    """
    if not value.isfinite().all():
        scheduler = info.get("scheduler") or {}
        raise ValueError(
            f"the {name} at timestep {float(timestep):g} ({where} a record by "
            f"{scheduler.get('class', 'an unknown scheduler')}) is not finite; record anew, which says what to change"
        )


class TrajectoryCollator:
    """Items of `Trajectories` -> arguments of a model's forward, with the targets."""

    def __init__(self, model: nn.Module) -> None:
        self.model = root_of(model)
        self.first = names_of_arguments(self.model)[0]

    def __call__(self, items: Sequence[dict[str, Tensor]]) -> dict[str, Any]:
        batch = {name: torch.stack([item[name] for item in items]) for name in items[0]}
        x = batch.pop("sample")
        if not (batch["timestep"] % 1).any():  # engines that cast arguments to 16 bits would round 749 to 748
            batch["timestep"] = batch["timestep"].long()
        return {**nested({self.first: x, **batch}), **model_arguments(self.model, x, batch["timestep"])}
