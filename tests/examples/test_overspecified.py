"""The study of doubles: whole on a tiny model and text, and its arithmetic on results that are known."""

from __future__ import annotations

import importlib
import random
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
WORDS = {"general": "river stone wind", "code": "def x return", "licences": "shall hereby grant"}
SIZES: dict[str, Any] = {
    "parts": ["doubled"], "tokens": 200, "test_tokens": 60, "seen_tokens": 60, "base_tokens": 200, "length": 20,
    "width": 32, "layers": 1, "vocabulary": 300, "rank": 4, "seeds": [0],
}  # fmt: skip


def documents(kind: str) -> list[str]:
    draw = random.Random(kind)
    return [" ".join(draw.choices(WORDS[kind].split(), k=30)) + f" {i}" for i in range(40)]


@pytest.fixture(scope="module")
def study() -> Any:
    sys.path.insert(0, str(ROOT / "examples" / "studies"))
    try:
        yield importlib.import_module("overspecified")
    finally:
        sys.path.remove(str(ROOT / "examples" / "studies"))


def test_doubles_are_found_and_merged(study, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(study, "read_kinds", lambda: {kind: documents(kind) for kind in WORDS})
    monkeypatch.setattr(study, "TOLERANCES", (1e-9, 0.1))
    made = study.main(study.Arguments(out=str(tmp_path), **SIZES))
    assert made["missing"] == 0
    (run,) = made["runs"]
    nothing, found = run["steps"].values()
    assert (nothing["sown"], nothing["left"], nothing["merged"]) == (0, 8, run["whole"])
    assert (found["sown"], found["other"], found["left"], found["needed"]) == (4, 0, 4, [4])
    assert found["merged"] == pytest.approx(run["whole"], rel=0.01)
    assert found["merged"] != found["random"]
    assert "4 of 4" in (tmp_path / "table.md").read_text()
    monkeypatch.setattr(study, "one", None)  # nothing is computed again
    assert study.main(study.Arguments(out=str(tmp_path), **SIZES))["runs"] == made["runs"]


def test_groups_at_random_have_the_sizes_of_those_found(study) -> None:
    cells = (("a", "a_double", "b"), ("c", "b_double"), ("d",))
    layer = SimpleNamespace(cells=cells, duplicates=cells[:2])
    found = SimpleNamespace(layers={"x": layer})
    assert study.pairs_of(found) == (1, 3)
    groups = study.random_groups(found, 3)["x"]
    assert [len(group) for group in groups] == [3, 2]
    assert len({name for group in groups for name in group}) == 5


def test_changes_are_those_of_the_geometric_mean(study) -> None:
    run = {"whole": {"a": 10.0, "b": 40.0}, "steps": {"0.1": {"merged": {"a": 11.0, "b": 44.0}}}}
    assert study.change(run, "0.1", "merged") == pytest.approx(10.0)


def test_unknown_parts_are_refused(study) -> None:
    with pytest.raises(ValueError, match=r"parts=\['moe'\] are unknown"):
        study.Arguments(parts=["moe"])
