"""The study of adversarial training, whole, on a tiny encoder and a tiny folder of data."""

from __future__ import annotations

import importlib
import json
import random
from pathlib import Path
from typing import Any

import pytest
from encoders import saved_encoder

ROOT = Path(__file__).resolve().parents[2]
OPINIONS = ("bad poor dull broken", "good fine great lovely")


@pytest.fixture
def study(monkeypatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "examples" / "studies"))
    return importlib.import_module("adversarial")


def test_every_arm_is_run_told_and_kept(study, tmp_path, capsys) -> None:
    encoder = saved_encoder(tmp_path / "encoder", " ".join(OPINIONS).split())
    draw = random.Random(0)
    for split in ("train", "dev"):
        rows = [{"sentence": " ".join(draw.choices(OPINIONS[i % 2].split(), k=5)), "label": i % 2} for i in range(40)]
        file = tmp_path / "data" / "glue" / "sst2" / f"{split}.jsonl"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("\n".join(map(json.dumps, rows)))
    given = ["--data_dir", str(tmp_path / "data"), "--model", str(encoder), "--out", str(tmp_path / "out"), "--seeds"]
    sizes = ["--rows=16", "--eval_rows=16", "--epochs=1", "--max_length=8", "--batch_size=8", "--test_steps=1"]
    study.main([*given, "0", "1", *sizes])
    for seed in (0, 1):
        arms = json.loads((tmp_path / "out" / f"seed{seed}.json").read_text())["arms"]
        assert list(arms) == ["plain", "together", "alternating"]
        for found in arms.values():
            assert 0 <= found["robust_accuracy"] <= found["accuracy"] <= 1
            assert 0 <= found["flip_rate"] <= 1
    table = (tmp_path / "out" / "table.md").read_text()
    assert table.count("\n| ") == len(arms)
    assert table.strip() in capsys.readouterr().out
    with pytest.raises(ValueError, match="choose another out"):
        study.main([*given, "0", *sizes, "--eps=0.2"])
