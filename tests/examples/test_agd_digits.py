"""The evaluation of guidance adapters on digits, on tiny sizes."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
pytest.importorskip("diffusers")
pytest.importorskip("sklearn")


@pytest.fixture(scope="module")
def example() -> Any:
    sys.path.insert(0, str(ROOT / "examples" / "studies"))
    try:
        import agd_digits

        yield agd_digits
    finally:
        sys.path.remove(str(ROOT / "examples" / "studies"))


@pytest.fixture(scope="module")
def report(example, tmp_path_factory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("digits")
    sizes = {"samples": 10, "base_steps": 250, "judge_epochs": 4, "steps": 100, "trajectories": 20, "timing_rounds": 1}
    made = example.main(example.Arguments(out=str(out), seeds=[0], arms=["film"], **sizes))
    return {**made, "out": out}


def test_adapters_learn_guidance_and_are_the_base_at_one(report, example) -> None:
    film = report["runs"][0]["arms"]["film"]
    assert film["base_at_one"]
    for w in example.SCALES:
        assert film[w]["R"] < 0.95
        assert film[w]["E"] < 1
        assert film[w]["passes"] == 25
        assert report["runs"][0]["arms"]["cfg"][w]["passes"] == 50
        assert report["runs"][0]["arms"]["base"][w]["passes"] == 25


def test_report_says_which_thresholds_are_met(report) -> None:
    saved = json.loads((report["out"] / "results.json").read_text())
    assert [row[0] for row in saved["thresholds"]] == [row[0] for row in report["thresholds"]]
    rows = {row[0].split(".")[0].strip(): row for row in report["thresholds"]}
    assert {"1", "2", "3", "4", "5a", "5b", "6a", "6b", "10"} <= set(rows)
    assert rows["1"][1]
    assert rows["6a"][1]
    assert not rows["2"][1]  # 100 steps are too few
    assert report["seconds_per_image"]["ratio_by_arithmetic"] == pytest.approx(1.848, abs=0.001)  # adapters of r=32
    table = (report["out"] / "table.md").read_text()
    assert "| film | " in table
    assert "| base |  | 6 | 1.000 | 1.000 |" in table
    assert (report["out"] / "samples.png").stat().st_size > 5000
    assert (report["out"] / "adapter" / "adapter_model.safetensors").is_file()
    assert report["judge_accuracy"] > 0.9


def test_frechet_distance_is_that_of_normal_distributions(example) -> None:
    g = torch.Generator().manual_seed(0)
    a = torch.randn(4000, 3, generator=g)
    assert abs(example.frechet(a, a)) < 1e-6
    assert example.frechet(a, a + 2) == pytest.approx(12, rel=1e-3)
    # diagonal covariances: sum of (sigma_a - sigma_b)^2
    scaled = a * torch.tensor([3.0, 1.0, 1.0])
    assert example.frechet(a - a.mean(0), scaled - scaled.mean(0)) == pytest.approx(4, rel=0.1)


def test_unknown_arms_are_refused(example) -> None:
    with pytest.raises(ValueError, match=r"arms=\['flim'\] are unknown"):
        example.main(example.Arguments(arms=["film", "flim"]))
    with pytest.raises(ValueError, match="must hold 'film'"):
        example.main(example.Arguments(arms=["offset"]))
