"""The study of routers, on tiny sizes."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from mixadapters import ROUTERS

ROOT = Path(__file__).resolve().parents[2]
ARMS = ["top_1", "null", "recurrent", "shuffled_search"]
SIZES: dict[str, Any] = {"seeds": [0, 1], "steps": 8, "rows": 64, "test_rows": 200}


@pytest.fixture(scope="module")
def study() -> Any:
    sys.path.insert(0, str(ROOT / "examples" / "studies"))
    try:
        import routers

        yield routers
    finally:
        sys.path.remove(str(ROOT / "examples" / "studies"))


@pytest.fixture(scope="module")
def made(study, tmp_path_factory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("routers")
    return {**study.main(study.Arguments(out=str(out), arms=ARMS, **SIZES)), "out": out}


def test_each_part_is_run_told_and_drawn(made) -> None:
    assert made["missing"] == 0
    assert {run["part"] for run in made["runs"]} == {"domains", "memory", "search"}
    for run in made["runs"]:
        assert run["nmse"] < 1
        assert run["active"] == 1 or run["arm"] != "top_1"
    text = (made["out"] / "table.md").read_text()
    for line in ("| top_1 | 2 | ", "| null | ", "| shuffled_search | "):
        assert line in text
    assert json.loads((made["out"] / "results.json").read_text())["runs"] == made["runs"]
    assert (made["out"] / "routers.png").stat().st_size > 5000


def test_what_is_there_is_not_run_again_and_other_settings_are_refused(made, study, monkeypatch) -> None:
    monkeypatch.setattr(study, "PARTS", {})
    given = {"out": str(made["out"]), "arms": ARMS, **SIZES}
    assert study.main(study.Arguments(**given))["runs"] == made["runs"]
    with pytest.raises(ValueError, match=r"'steps': 8.*choose another out"):
        study.main(study.Arguments(**{**given, "steps": 9}))


def test_no_run_begins_after_its_time(study, tmp_path) -> None:
    made = study.main(study.Arguments(out=str(tmp_path), arms=["top_1"], cpu_minutes=0.0, **SIZES))
    assert (made["runs"], made["missing"]) == ([], 2)


def test_world_adds_what_its_domains_need_and_hides_the_code_from_teachers(study) -> None:
    world = study.World(0, study.NEEDS)
    x, added, needs = world.rows(500, torch.Generator().manual_seed(0))
    assert x.shape == added.shape == (500, 1, study.WIDTH)
    assert torch.equal(added.abs().amax((1, 2)) > 0, needs > 0)
    ranks = [int(torch.linalg.matrix_rank(m, rtol=1e-4)) for m in world.maps]
    assert ranks == [0, 0, 2, 2, 2, 4, 4, 4]
    torch.testing.assert_close(world.maps @ world.code, torch.zeros(8, study.WIDTH, 8), atol=1e-5, rtol=0)
    blind = torch.eye(study.WIDTH) - world.code @ world.code.T
    torch.testing.assert_close(world.maps @ blind, world.maps)  # what is projected out is not needed for the content


def test_first_layer_of_memory_routes_and_its_experts_add_nothing(study, monkeypatch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(study, "train", lambda model, *_: seen.append(model))
    study.memory("recurrent", 0, study.Arguments(**SIZES))
    first = dict(seen[0].model.first.named_parameters())
    ups = [parameter for name, parameter in first.items() if ".up." in name]
    assert len(ups) == study.EXPERTS
    assert not any(parameter.any() for parameter in ups)
    trains = {name for name, parameter in first.items() if parameter.requires_grad}
    assert trains
    assert all(".router." in name for name in trains)


def test_arms_are_routers_and_wrong_ones_are_refused(study) -> None:
    for arms in study.ARMS.values():
        assert all(spec["kind"] in ROUTERS for spec in arms.values())
    with pytest.raises(ValueError, match=r"arms=\['top_9'\] are unknown"):
        study.Arguments(arms=["top_1", "top_9"])
    with pytest.raises(ValueError, match=r"parts=\['domain'\] are unknown"):
        study.Arguments(parts=["domain"])
