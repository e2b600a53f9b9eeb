"""The study of sentences, whole, on a tiny encoder and a tiny folder of data."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

import pytest
from encoders import saved_encoder

ROOT = Path(__file__).resolve().parents[2]
WORDS = [a + b for a in "bdfgkm" for b in ("ad", "el", "im", "on", "ur", "ak", "ep", "it", "og", "us")]


@pytest.fixture
def encoder(tmp_path):
    return saved_encoder(tmp_path / "encoder", WORDS)


@pytest.fixture
def data(tmp_path):
    def text(i, n=12):
        return " ".join(random.Random(i).choices(WORDS, k=n)) + "."

    def write(name, rows):
        path = tmp_path / "data" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(json.dumps(row) for row in rows))

    labels = ("yes", "no")
    for split, start, count in (("train", 0, 40), ("dev", 100, 10), ("test", 200, 12)):
        rows = [{"text": text(i), "label": labels[i % 2]} for i in range(start, start + count)]
        write(f"dapt/chemprot/{split}.jsonl", rows)
    write("unlabelled/biomed_sentences.jsonl", [{"text": text(i)} for i in range(300, 340)])
    write("unlabelled/imdb_unsup.jsonl", [{"text": text(i)} for i in range(400, 420)])
    write("unlabelled/amazon_reviews.jsonl", [{"text": text(i)} for i in range(420, 440)])
    write("glue/mnli/train.jsonl", [{"premise": text(i, 6)} for i in range(500, 800)])
    write("glue/qnli/train.jsonl", [{"sentence": text(i, 7)} for i in range(800, 1100)])
    pairs = [{"sentence1": text(i), "sentence2": text(i + 1), "score": i % 5} for i in range(20)]
    write("glue/stsb/dev.jsonl", pairs)
    return tmp_path / "data"


def test_demo_runs_both_stages_and_reloads_equal_predictions(tmp_path, encoder, data, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(ROOT / "examples" / "studies"))
    sys.modules.pop("sentences", None)
    import sentences

    out = tmp_path / "out"
    sizes = "--train_rows 16 --epochs 1 --batch_size 8 --stage1_steps 2 --stage1_batch 4 --layers 2 --parameters 900"
    sentences.main(
        ["--data_dir", str(data), "--task", "chemprot", "--model", str(encoder), "--out", str(out), "--seeds", "0",
         "--methods", "head", "lora", "bottleneck", "mixda_untuned", "mixda_one", "mixda", *sizes.split()]
    )  # fmt: skip
    report = json.loads((out / "report.json").read_text())
    assert report["reload_in_fresh_process_equal"] is True
    assert [run["method"] for run in report["runs"]] == list(sentences.METHODS)
    for run in report["runs"]:
        assert {"method", "seed", "accuracy", "macro_f1", "trainable_parameters", "seconds"} <= run.keys()
        assert 0 <= run["accuracy"] <= 1
    assert (out / "gates_mixda.png").stat().st_size > 1000
    assert {"biomed", "reviews"} == report["stage1"].keys()
    assert "| mixda |" in capsys.readouterr().out


def test_unknown_method_is_refused(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "examples" / "studies"))
    import sentences

    with pytest.raises(SystemExit, match="mixture"):
        sentences.main(["--methods", "mixture"])
