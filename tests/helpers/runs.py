"""Small runs of transformers' Trainer: rows to train on, and arguments."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import TrainingArguments


def rows(count: int = 24) -> list[dict[str, Tensor]]:
    """Texts in which a token tells the next one."""
    made = []
    for i in range(count):
        ids = 5 + (7 * i + torch.arange(6)) % 80
        made.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()})
    return made


def arguments(folder: Path, **options: Any) -> TrainingArguments:
    """Of six steps with four rows each, on the CPU; nothing is saved or reported."""
    options = {
        "max_steps": 6, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "lr_scheduler_type": "constant",
        "weight_decay": 0.1, "report_to": [], "use_cpu": True, "save_strategy": "no", "disable_tqdm": True, **options,
    }  # fmt: skip
    return TrainingArguments(output_dir=str(folder), **options)
