"""What routers do reaches the loggers that people use, through the Trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from transformers import Trainer, TrainingArguments

from mixadapters import GateUsageCallback, MoAConfig, StageCallback

WANTED = {
    "gate/mean/load/expert0", "gate/mean/load/null0", "gate/mean/max_over_mean", "gate/mean/entropy",
    "gate/mean/active", "gate/mean/dead", "gate/mean/null", "loss/balance",
    "gate/model.layers.1.self_attn.q_proj/load/expert3",
}  # fmt: skip


def train(tiny: Any, folder: Path, logger: str) -> list[dict[str, float]]:
    """The entries of a run of three steps."""
    config = MoAConfig(num_experts=4, r=2, target_modules=["q_proj"], router="null", num_null_experts=2)
    ids = [torch.randint(5, 80, (6,), generator=torch.Generator().manual_seed(i)) for i in range(12)]
    trainer = Trainer(
        model=get_peft_model(tiny("llama"), config),
        args=TrainingArguments(
            str(folder), max_steps=3, per_device_train_batch_size=4, logging_steps=1, report_to=[logger], use_cpu=True,
            save_strategy="no", disable_tqdm=True, run_name="run",
        ),
        train_dataset=[{"input_ids": i, "attention_mask": torch.ones_like(i), "labels": i} for i in ids],
        callbacks=[StageCallback("all")],
    )  # fmt: skip
    trainer.add_callback(GateUsageCallback(trainer, per_layer=True))
    trainer.train()
    entries = [entry for entry in trainer.state.log_history if "gate/mean/entropy" in entry]
    assert [entry["step"] for entry in entries] == [1, 2, 3]
    assert set(entries[0]) >= WANTED
    return entries


def test_tensorboard_has_it(tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorboard", reason="tensorboard is not installed: pip install tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))
    entries = train(tiny, tmp_path / "run", "tensorboard")
    events = EventAccumulator(str(tmp_path / "events"))
    events.Reload()
    for name in WANTED:
        found = [(event.step, event.value) for event in events.Scalars(f"train/{name}")]
        assert found == [(entry["step"], pytest.approx(entry[name], rel=1e-6)) for entry in entries], name


def test_weights_and_biases_has_it(tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb", reason="wandb is not installed: pip install wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_SILENT", "true")
    entries = train(tiny, tmp_path / "run", "wandb")
    try:
        summary = dict(wandb.run.summary)
    finally:
        wandb.finish()
    for name in WANTED:
        assert summary[f"train/{name}"] == pytest.approx(entries[-1][name]), name
