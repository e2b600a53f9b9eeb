"""The arguments of a run that are its own. Nothing here imports torch or transformers before they are checked."""

from __future__ import annotations

import argparse
import math
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path

from mixadapters.tasks.registry import TASKS, get_task

# Numbers of a run that are None or at least 1.
COUNTS = (
    "shots", "train_rows", "dev_rows", "test_rows", "max_length", "parameters", "layers", "stage1_steps",
    "stage1_batch", "max_new_tokens",
)  # fmt: skip


@dataclass
class RunArguments:
    """What to run. TrainingArguments of transformers follow on the same command line."""

    tasks: list[str] = field(metadata={"help": "Names from `list`, or `all`."})
    model: str | None = field(default=None, metadata={"help": "Pretrained model: folder or hub id."})
    data_dir: str | None = field(default=None, metadata={"help": "Folder of JSON lines; without it, the hub."})
    out: str = field(default="runs/tasks", metadata={"help": "Where results go."})
    methods: list[str] = field(
        default_factory=lambda: ["majority", "tfidf", "probe", "lora", "bottleneck", "mixda"],
        metadata={"help": "Rows of the table; a path ending in .json is the config of any PEFT type."},
    )
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2, 3, 4])
    shots: int | None = field(default=None, metadata={"help": "Rows per class for train and for dev. Default: all."})
    shots_from: str = field(default="published", metadata={"help": "Few-shot index files, 'published', or 'rule'."})
    train_rows: int | None = field(default=None, metadata={"help": "At most so many train rows, drawn by the seed."})
    dev_rows: int = field(default=1000, metadata={"help": "At most so many dev rows (full data)."})
    test_rows: int | None = field(default=None, metadata={"help": "At most so many test rows, the same in all runs."})
    max_length: int = 128
    pooling: str = field(default="mean", metadata={"help": "Of an encoder's states for the head: mean or first."})
    parameters: int = field(default=40_000, metadata={"help": "Trainable parameters of an adapter, head aside."})
    layers: int | None = field(default=None, metadata={"help": "Adapters in so many upper layers. Default: all."})
    rates: list[float] = field(
        default_factory=lambda: [1e-3], metadata={"help": "Adapter rates; of several, the best on dev."}
    )
    full_rates: list[float] = field(default_factory=lambda: [5e-5], metadata={"help": "The same for full tuning."})
    head_rate: float = field(default=1e-2, metadata={"help": "Learning rate of a new head."})
    domains: list[str] = field(
        default_factory=list, metadata={"help": "name=folder of trained domain adapters. Default: train them."}
    )
    stage1_steps: int = field(default=60, metadata={"help": "Steps per domain on unlabelled text."})
    stage1_batch: int = 32
    stage1_rate: float = 5e-4
    max_new_tokens: int = field(default=16, metadata={"help": "Of generated answers."})
    retention: bool = field(default=True, metadata={"help": "Measure what happened to general text."})
    keep_adapters: bool = field(default=False, metadata={"help": "Save each run's adapter beside its result."})
    keep_going: bool = field(default=False, metadata={"help": "Report a run that fails and go on."})
    dry_run: bool = field(default=False, metadata={"help": "Only say what would run, how large it is and how long."})

    def __post_init__(self) -> None:
        if self.tasks == ["all"]:
            self.tasks = list(TASKS)
        for name in self.tasks:
            get_task(name)
        from mixadapters.tasks.methods import UNTRAINED, Method  # and with them torch: `--help` does without

        for name in self.methods:
            Method(name, self.parameters, self.layers, {})
        stems = [Path(name).stem for name in dict.fromkeys(self.methods)]
        if len(set(stems)) < len(stems):
            raise ValueError(
                f"methods={self.methods} have a name twice, and a table could not tell them apart; rename"
            )
        for name in COUNTS:
            if (value := getattr(self, name)) is not None and (type(value) is not int or value < 1):
                raise ValueError(f"{name}={value!r} must be 1 or more")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds) or not all(0 <= s < 2**32 for s in self.seeds):
            raise ValueError(f"seeds={self.seeds} must be one or more different numbers from 0 to {2**32 - 1}")
        if self.shots is not None and self.train_rows is not None:
            raise ValueError(f"shots={self.shots} and train_rows={self.train_rows}: give one of the two")
        if self.pooling not in ("mean", "first"):
            raise ValueError(f"pooling={self.pooling!r} must be 'mean' or 'first'")
        if self.model is None and set(self.methods) - set(UNTRAINED):
            raise ValueError("model=None: pass --model, a folder or a hub id")
        if self.shots_from not in ("published", "rule"):
            raise ValueError(f"shots_from={self.shots_from!r} must be 'published' or 'rule'")
        for given in self.domains:
            if not all(given.partition("=")):
                raise ValueError(f"domains={given!r} must be name=folder")
        if len({given.partition("=")[0] for given in self.domains}) < len(self.domains):
            raise ValueError(f"domains={self.domains} have a name twice; give each its own")
        for name in ("rates", "full_rates"):
            values = getattr(self, name)
            # A rate names the folder of its training, with six digits.
            if not values or not all(map(positive, values)) or len({f"{v:g}" for v in values}) < len(values):
                raise ValueError(f"{name}={values} must be one or more positive learning rates, finite and different")
        for name in ("head_rate", "stage1_rate"):
            if not positive(value := getattr(self, name)):
                raise ValueError(f"{name}={value} must be a positive learning rate, and finite")


def positive(value: float) -> bool:
    """Whether a number is finite and above 0."""
    return math.isfinite(value) and value > 0


def show_help() -> None:
    """Print what `run` takes of its own; transformers' arguments, which take seconds to import, are named."""
    parser = argparse.ArgumentParser(
        "python -m mixadapters.tasks run",
        description="Train and evaluate methods on tasks.",
        epilog="The arguments of transformers' Seq2SeqTrainingArguments follow on the same line, such as --max_steps, "
        "--per_device_train_batch_size or --use_cpu: `run --help_training` lists them.",
    )
    for f in fields(RunArguments):
        default = f.default_factory() if f.default_factory is not MISSING else f.default
        usual = "" if default in (MISSING, None) or default == [] else f" Default: {default}."
        several = "+" if str(f.type).startswith("list") else None
        parser.add_argument(
            f"--{f.name}", required=default is MISSING, nargs=several, metavar=f.name.upper(),
            help=(f.metadata.get("help", "") + usual).replace("%", "%%").strip(),
        )  # fmt: skip
    parser.print_help()
