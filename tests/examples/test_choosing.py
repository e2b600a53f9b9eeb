"""The study of choosing, whole, on a tiny encoder and a tiny folder of data."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

import pytest
from encoders import saved_encoder

ROOT = Path(__file__).resolve().parents[2]
TOPICS = {"books": "page", "dvd": "film", "electronics": "plug", "kitchen": "pan", "sst2": "scene"}
OPINIONS = ("bad poor dull broken", "good fine great lovely")


@pytest.fixture
def encoder(tmp_path):
    return saved_encoder(tmp_path / "encoder", [*TOPICS.values(), *" ".join(OPINIONS).split()])


@pytest.fixture
def data(tmp_path):
    draw = random.Random(0)

    def write(name: str, topic: str, field: str, count: int) -> None:
        rows = []
        for i in range(count):
            words = [topic] * 3 + draw.choices(OPINIONS[i % 2].split(), k=3)
            rows.append({field: f"{' '.join(draw.sample(words, k=6))} {i}", "label": i % 2})
        path = tmp_path / "data" / f"{name}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(json.dumps(row) for row in rows))

    for domain in ("books", "dvd", "electronics", "kitchen"):
        for split, count in (("train", 16), ("dev", 4), ("test", 8)):
            write(f"reviews/blitzer/{domain}/{split}", TOPICS[domain], "text", count)
    write("glue/sst2/train", TOPICS["sst2"], "sentence", 80)
    write("glue/sst2/dev", TOPICS["sst2"], "sentence", 32)
    return tmp_path / "data"


def test_the_study_runs_and_says_what_it_found(tmp_path, encoder, data, monkeypatch, capsys) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "examples" / "studies"))
    sys.modules.pop("choosing", None)
    import choosing

    out = tmp_path / "out"
    given = ["--data_dir", str(data), "--model", str(encoder), "--out", str(out), "--seeds", "0", "1"]
    sizes = ["--rows=16", "--eval_rows=8", "--router_rows=12", "--epochs=1", "--max_length=12", "--rank=4"]
    choosing.main([*given, *sizes])
    results = [json.loads((out / f"seed{seed}.json").read_text()) for seed in (0, 1)]
    for result in results:
        accuracies = result["composition"]["accuracy"]
        assert result["composition"]["router"] == 1.0  # each domain has a word of its own
        assert accuracies["routed to the domain's own"] == accuracies["true domain's own"]
        for name, cascade in result["cascades"].items():
            assert cascade["weak"] >= 0.75, name
            shares = [cascade["points"][share]["strong_share"] for share in ("10%", "25%", "50%", "75%")]
            assert shares == sorted(shares)
    table = (out / "table.md").read_text()
    assert table.count("\n| SST-2 |") == table.count("\n| four domains |") - 1 == 7
    assert table.strip() in capsys.readouterr().out

    seen = (out / "seed0.json").stat().st_mtime_ns
    choosing.main([*given, *sizes])  # goes on from what is there
    assert (out / "seed0.json").stat().st_mtime_ns == seen
    with pytest.raises(SystemExit, match="choose another --out"):
        choosing.main([*given, *sizes, "--epochs", "2"])
