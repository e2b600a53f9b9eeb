"""The study of surgery: whole on tiny models and text, and its arithmetic on results that are known."""

from __future__ import annotations

import importlib
import random
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
WORDS = {"general": "river stone wind", "code": "def x return", "law": "shall hereby grant"}
SIZES: dict[str, Any] = {
    "tokens": 600, "test_tokens": 60, "seen_tokens": 60, "base_tokens": 600, "moe_epochs": 1, "length": 20,
    "width": 32, "layers": 1, "vocabulary": 300, "rank": 4, "seeds": [0],
}  # fmt: skip


def documents(kind: str) -> list[str]:
    draw = random.Random(kind)
    return [" ".join(draw.choices(WORDS[kind].split(), k=30)) + f" {i}" for i in range(40)]


@pytest.fixture(scope="module")
def study() -> Any:
    sys.path.insert(0, str(ROOT / "examples" / "studies"))
    try:
        yield importlib.import_module("surgery")
    finally:
        sys.path.remove(str(ROOT / "examples" / "studies"))


@pytest.fixture(scope="module")
def finished(study, tmp_path_factory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(study, "read_domains", lambda folder: {kind: documents(kind) for kind in WORDS})
        patch.setattr(study, "KEPT", {"mixture": (4, 1), "moe": (4, 2)})
        args = study.Arguments(out=str(tmp_path_factory.mktemp("surgery")), **SIZES)
        return args, study.main(args)


def test_every_arm_of_every_part_has_a_result(study, finished) -> None:
    args, made = finished
    assert made["missing"] == 0
    assert {(run["part"], run["arm"]) for run in made["runs"]} == {
        (part, arm) for part in study.PARTS for arm in ("whole", *study.ARMS)
    }
    for run in made["runs"]:
        if run["arm"] in (*study.PRUNED, *study.MERGED):
            assert list(run["perplexity"]) == ["4", "1" if run["part"] == "mixture" else "2"]
            assert all(by_domain.keys() == {"code", "law"} for by_domain in run["perplexity"].values())
    out = Path(args.out)
    assert (out / "surgery.png").stat().st_size > 5000
    assert "| saliency, all, less saliency, task |" in (out / "table.md").read_text()
    assert (out / "mixture.html").exists()
    assert (out / "moe.html").exists()


def test_it_goes_on_where_it_was_ended(study, finished, monkeypatch) -> None:
    args, made = finished
    trial = study.Trial(args, {kind: documents(kind) for kind in WORDS})
    monkeypatch.setattr(study, "one", None)  # nothing is computed again
    monkeypatch.setattr(study.Trial, "model", None)
    assert list(study.runs(trial)) == made["runs"]
    (Path(args.out) / "runs" / "moe-random-0.json").rename(Path(args.out) / "gone.json")
    trial.args.cpu_minutes = 0
    assert len(list(study.runs(trial))) == len(made["runs"]) - 1
    (Path(args.out) / "gone.json").rename(Path(args.out) / "runs" / "moe-random-0.json")
    trial.args.test_tokens = 80
    with pytest.raises(ValueError, match="choose another out"):
        list(study.runs(trial))


def test_changes_are_those_of_the_geometric_mean(study) -> None:
    runs = [
        {"part": "moe", "arm": "whole", "seed": 3, "perplexity": {"a": 10.0, "b": 40.0}},
        {"part": "moe", "arm": "random", "seed": 3, "perplexity": {"6": {"a": 11, "b": 44}, "2": {"a": 20, "b": 80}}},
        {"part": "mixture", "arm": "random", "seed": 3, "perplexity": {"6": {"a": 1.0, "b": 1.0}}},
    ]  # fmt: skip
    assert study.changes(runs, "moe") == {"random": {6: {3: pytest.approx(10.0)}, 2: {3: pytest.approx(100.0)}}}


def test_selectivities_are_averaged_by_seed(study) -> None:
    def run(*values: float) -> dict[str, Any]:
        return {name: {str(i): {"selectivity": v, "target": v, "rest": 1.0} for i, v in enumerate(values)}
                for name in ("own", "random")}  # fmt: skip

    line = study.selectivities("moe", [run(2.0, 8.0), run(0.5, 8.0)]).splitlines()[2]
    assert line.startswith("| own | 2.83 (")  # of 4 and 2
    assert line.endswith("| 3 of 4 |")


def test_unknown_parts_are_refused(study) -> None:
    with pytest.raises(ValueError, match=r"parts=\['lora'\] are unknown"):
        study.Arguments(parts=["lora"])
