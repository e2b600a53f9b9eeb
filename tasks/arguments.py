"""What a run is told: arguments of its own, and transformers' TrainingArguments."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from transformers import Seq2SeqTrainingArguments

from mixadapters.tasks.methods import UNTRAINED, Method
from mixadapters.tasks.registry import TASKS, get_task

# TrainingArguments that change no result, by their beginnings; of the rest, what is set decides a run's hash.
HARMLESS = (
    "accelerator_config", "data_seed", "dataloader", "ddp_", "disable_tqdm", "do_", "eval", "hub",
    "learning_rate", "local_rank", "log", "output_dir", "per_device_eval", "predict_with_generate", "project",
    "push_to_hub", "remove_unused", "report_to", "restore", "run_name", "save", "seed", "skip_memory", "trackio",
    "use_cpu",
)  # fmt: skip
# Numbers of a run that are None or at least 1.
COUNTS = (
    "shots", "train_rows", "dev_rows", "test_rows", "max_length", "parameters", "layers", "stage1_steps",
    "stage1_batch", "max_new_tokens",
)  # fmt: skip
# Numbers of TrainingArguments that are at least 1, and those that are at least 0.
SIZES = ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps")
NOT_NEGATIVE = ("weight_decay", "warmup_steps", "warmup_ratio", "max_grad_norm", "adam_epsilon", "logging_steps",
                "save_steps", "dataloader_num_workers")  # fmt: skip
# Those that a run sets itself, and what to pass in their place.
INSTEAD = {
    "learning_rate": "--rates, --full_rates or --head_rate",
    "seed": "--seeds",
    "data_seed": "--seeds",
    "output_dir": "--out",
    "predict_with_generate": "nothing: the task decides",
    "generation_max_length": "--max_new_tokens",
}


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


def check_numbers(arguments: Seq2SeqTrainingArguments) -> None:
    """Raises ValueError: one of transformers' numbers cannot be meant, and it would say so late or not at all."""
    for item in fields(arguments):
        value = getattr(arguments, item.name, None)
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{item.name}={value} must be finite")
        if isinstance(value, int | float) and item.name in SIZES and value < 1:
            raise ValueError(f"{item.name}={value} must be 1 or more")
        if isinstance(value, int | float) and item.name in NOT_NEGATIVE and value < 0:
            raise ValueError(f"{item.name}={value} must be 0 or more")
    for name in ("adam_beta1", "adam_beta2", "label_smoothing_factor"):
        if not 0 <= (value := getattr(arguments, name)) < 1:
            raise ValueError(f"{name}={value} must be 0 or more and less than 1")
    if arguments.max_steps < 1 and arguments.max_steps != -1:
        raise ValueError(f"max_steps={arguments.max_steps} must be 1 or more, or -1 for --num_train_epochs")
    if not positive(arguments.num_train_epochs):
        raise ValueError(f"num_train_epochs={arguments.num_train_epochs} must be above 0")
    if arguments.save_only_model:
        raise ValueError(
            "save_only_model=True leaves nothing to go on from; pass --keep_adapters to have the adapters"
        )


@dataclass
class TrainArguments(Seq2SeqTrainingArguments):
    """TrainingArguments with defaults for few-shot runs. For full data: --max_steps -1 --num_train_epochs 3.

    Raises ValueError for those that each run sets itself.
    """

    max_steps: int = 100
    per_device_train_batch_size: int = 16
    per_device_eval_batch_size: int = 64
    warmup_steps: float = 0.06
    weight_decay: float = 0.01
    save_strategy: str = "no"
    report_to: str = "none"
    remove_unused_columns: bool = False
    logging_steps: float = 20
    dataloader_pin_memory: bool = False

    def __post_init__(self) -> None:
        for name, instead in INSTEAD.items():
            default = next(f.default for f in fields(Seq2SeqTrainingArguments) if f.name == name)
            if (value := getattr(self, name)) != default:
                raise ValueError(f"{name}={value!r} is set by each run; pass {instead}")
        check_numbers(self)
        super().__post_init__()

    def changes(self) -> dict[str, Any]:
        """The arguments that may change a result and are not transformers' defaults."""
        usual = Seq2SeqTrainingArguments("unused")
        names = [f.name for f in fields(Seq2SeqTrainingArguments) if not f.name.startswith(HARMLESS)]
        return {n: str(v) for n in names if (v := getattr(self, n)) != getattr(usual, n)}
