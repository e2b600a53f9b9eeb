"""Checkpoints of runs that may be killed at any time: a whole one is marked, and no other is read."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from accelerate import PartialState
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from mixadapters.tasks.results import write_whole
from mixadapters.training.checkpoints import checkpoint_folder

MARK = "complete.json"  # file -> bytes, written when all files of a checkpoint are


class MarkCheckpoints(TrainerCallback):
    """Marks each checkpoint once all processes have written their part of it."""

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **options: Any) -> None:
        PartialState().wait_for_everyone()
        folder = checkpoint_folder(args, state)
        if state.is_world_process_zero and folder.is_dir():
            files = sorted(f for f in folder.rglob("*") if f.is_file())
            sizes = {f.relative_to(folder).as_posix(): f.stat().st_size for f in files}
            write_whole(folder / MARK, json.dumps(sizes))


def newest_whole(folder: Path) -> tuple[Path | None, dict[Path, str]]:
    """The newest checkpoint of a training that is whole, and the others that are not, each with the reason."""
    found = [f for f in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*") if f.name.rpartition("-")[2].isdigit()]
    broken = {f: reason for f in found if (reason := not_whole(f))}
    whole = [f for f in found if f not in broken]
    return max(whole, key=lambda f: int(f.name.rpartition("-")[2]), default=None), broken


def not_whole(checkpoint: Path) -> str:
    """Why a checkpoint is not whole; empty where it is."""
    try:
        sizes = json.loads((checkpoint / MARK).read_text(encoding="utf-8"))
        for name, size in sizes.items():
            if (there := (checkpoint / name).stat().st_size) != size:
                return f"{name} has {there} of {size} bytes"
    except FileNotFoundError as error:
        return f"it has no {Path(str(error.filename)).name}"
    except (OSError, ValueError, AttributeError) as error:
        return f"{MARK} cannot be read: {error}"
    return ""


def drop(checkpoints: dict[Path, str]) -> None:
    """Remove checkpoints that nothing can go on from; a training would write into them."""
    PartialState().wait_for_everyone()  # all have looked
    if PartialState().is_main_process:
        for checkpoint in checkpoints:
            shutil.rmtree(checkpoint)
    PartialState().wait_for_everyone()
