"""Checkpoint folders of Trainer: which stage of an adapter made them, and whether a run can go on from them."""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft.utils.constants import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from torch import Tensor
from transformers import TrainerState, TrainingArguments
from transformers.trainer import OPTIMIZER_NAME, SCALER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from mixadapters.core.folders import written_aside

STAGE_FILE = "stage.json"  # {"stages": {adapter: stage}}; of earlier versions {"adapter": name, "stage": name}
TORCH_FILES = frozenset({".pt", ".pth", ".bin"})
READ = ("optimizer", "scheduler", "scaler", "rng_state", "adapter_model", "pytorch_model")  # how those begin
LEGACY = b"\x80\x02"  # begins a file of torch that is no zip archive
LONGEST_HEADER = 100_000_000  # bytes; what safetensors itself takes


def checkpoint_folder(args: TrainingArguments, state: TrainerState) -> Path:
    """Where Trainer saves at the step that it has made."""
    return Path(str(args.output_dir)) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"


def note_stages(folder: Path, stages: Mapping[str, str]) -> None:
    """Say in a checkpoint which stage of each adapter that trains made it: whole or not at all, also where the process
    is killed.

    stages: adapter -> stage.
    """
    with written_aside(folder / STAGE_FILE) as aside:
        aside.write_text(json.dumps({"stages": dict(stages)}), encoding="utf-8")


def stage_of(folder: Path, adapter: str) -> str | None:
    """The stage of `adapter` that made the checkpoint; None where nothing says so."""
    try:
        noted = json.loads((folder / STAGE_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(noted, dict):
        return None
    stages = noted.get("stages")
    if isinstance(stages, dict):
        stage = stages.get(adapter)
    else:
        stage = noted.get("stage") if noted.get("adapter") == adapter else None
    return stage if isinstance(stage, str) else None


def lay_out_moments(optimizer: Any) -> None:
    """Lay out what an optimizer keeps for a parameter as the parameter lies in memory.

    Fused optimizers walk both side by side, and checkpoints of earlier versions hold weights that lay transposed.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            kept = optimizer.state.get(parameter, {})
            for name, value in kept.items():
                if (
                    isinstance(value, Tensor)
                    and value.shape == parameter.shape
                    and value.stride() != parameter.stride()
                ):
                    kept[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def fault(folder: Path) -> str:
    """What keeps a run from going on from a checkpoint, such as files that a killed run has cut; empty: nothing."""
    try:
        json.loads((folder / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return f"it has no {TRAINER_STATE_NAME}, which is written last"
    except (OSError, ValueError) as error:
        return f"{TRAINER_STATE_NAME} cannot be read: {error}"
    try:
        return _cut_file(folder)
    except OSError as error:  # a link that leads nowhere, a folder in its place, a file of another user
        return f"{os.path.relpath(error.filename or folder, folder)} cannot be read: {error.strerror}"


def _cut_file(folder: Path) -> str:
    # Not by a pattern of that name, which passes over links that lead nowhere.
    for weights in sorted(file for file in folder.rglob("*") if file.name == SAFETENSORS_WEIGHTS_NAME):
        if (size := weights.stat().st_size) != (said := _size_by_header(weights)):
            return f"{weights.relative_to(folder)} has {size} bytes, {said or 'an unknown number'} by its header"
    # Each process writes some of these, and the first may have ended while another was killed.
    read = [file for file in folder.iterdir() if file.suffix in TORCH_FILES and file.name.startswith(READ)]
    for file in sorted(file for file in read if file.is_file()):
        if not zipfile.is_zipfile(file) and not _is_legacy(file):
            return f"{file.name} is cut"
    return ""


def _is_legacy(file: Path) -> bool:
    with file.open("rb") as opened:
        return opened.read(len(LEGACY)) == LEGACY


def adapters_in(folder: Path) -> list[str]:
    """The adapters whose weights a checkpoint holds, as PeftModel lays them out."""
    places = {"default": folder} | {path.name: path for path in sorted(folder.iterdir()) if path.is_dir()}
    files = (SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME)
    return [name for name, place in places.items() if any((place / file).is_file() for file in files)]


def begun_anew(folder: Path, trainer: Any) -> list[str]:
    """What begins anew in a run that goes on from a checkpoint of which files are missing, as Trainer does not say."""
    names, args = {path.name for path in folder.iterdir()}, trainer.args
    found = []
    optimizer = any(name.startswith("optimizer") for name in names)  # FSDP's is a folder
    if not getattr(trainer, "is_deepspeed_enabled", False) and not (optimizer and SCHEDULER_NAME in names):
        gone = SCHEDULER_NAME if optimizer else OPTIMIZER_NAME  # of the two Trainer reads both or none
        found.append(f"the optimizer's moments and the learning rate's schedule ({gone} is missing)")
    generators = f"rng_state_{args.process_index}.pth" if args.world_size > 1 else "rng_state.pth"
    if generators not in names:
        found.append(f"random numbers, of dropout and routers' noise ({generators} is missing)")
    scaler = getattr(trainer.accelerator, "scaler", None)
    if scaler is not None and scaler.is_enabled() and SCALER_NAME not in names:
        found.append(f"the scale of float16's loss ({SCALER_NAME} is missing)")
    return found


def _size_by_header(weights: Path) -> int | None:
    """Of a safetensors file, in bytes; None where the header is cut as well."""
    with weights.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > LONGEST_HEADER:
            return None
        try:
            entries = json.loads(file.read(length))
            ends = [entry["data_offsets"][1] for name, entry in entries.items() if name != "__metadata__"]
        except (ValueError, TypeError, KeyError, AttributeError, IndexError):
            return None
    return 8 + length + max(ends, default=0)
