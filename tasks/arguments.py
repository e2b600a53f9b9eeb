"""What a run is told beside its own arguments: transformers' TrainingArguments."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any

from transformers import Seq2SeqTrainingArguments

from mixadapters.tasks.run_arguments import positive

# TrainingArguments that change no result, by their beginnings; of the rest, what is set decides a run's hash.
HARMLESS = (
    "accelerator_config", "data_seed", "dataloader", "ddp_", "disable_tqdm", "do_", "eval", "hub",
    "learning_rate", "local_rank", "log", "output_dir", "per_device_eval", "predict_with_generate", "project",
    "push_to_hub", "remove_unused", "report_to", "restore", "run_name", "save", "seed", "skip_memory", "trackio",
    "use_cpu",
)  # fmt: skip
# Numbers of TrainingArguments that are at least 1, and those that are at least 0.
SIZES = ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps",
         "eval_accumulation_steps", "generation_num_beams")  # fmt: skip
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
    "dataloader_drop_last": "nothing: all rows are read",
    "prediction_loss_only": "nothing: predictions are scored",
    "label_names": "nothing: the task decides",
}


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
        # These set up accelerate's state anew, for all: without `use_cpu` each of several processes would be alone.
        usual = Seq2SeqTrainingArguments("unused", use_cpu=self.use_cpu)
        names = [f.name for f in fields(Seq2SeqTrainingArguments) if not f.name.startswith(HARMLESS)]
        return {n: str(v) for n in names if (v := getattr(self, n)) != getattr(usual, n)}
