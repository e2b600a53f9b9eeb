"""Each method under each engine: two processes come to what one comes to with the same rows."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from cells import CELLS, LOOPS, STEPS
from conftest import launch
from safetensors.torch import load_file
from torch import Tensor

ENGINES = ("ddp", "fsdp2", "zero2", "zero3")


@pytest.fixture(scope="session")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every cell in this process."""
    folder = tmp_path_factory.mktemp("alone")
    for name, cell in CELLS.items():
        for loop, run in LOOPS.items():
            place = folder / f"{name}, {loop}"
            place.mkdir()
            (place / "0.json").write_text(json.dumps(run(cell, place, 1)), encoding="utf-8")
    return folder


@pytest.fixture(scope="session", params=ENGINES)
def together(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, str]:
    """Every cell under an engine, in two processes: its name, what they have written, and what they have said."""
    engine = request.param
    if engine.startswith("zero") and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("deepspeed is not installed: pip install mixadapters[distributed]")
    folder = tmp_path_factory.mktemp(engine)
    try:
        said = launch(engine, "worker.py", str(folder))
    except AssertionError as error:  # some cells may have ended before
        said = str(error)
    return engine, folder, said


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("name", CELLS)
def test_two_processes_train_as_one(
    name: str, loop: str, alone: Path, together: tuple[str, Path, str], table: dict[tuple[str, str], dict[str, str]]
) -> None:
    engine, folder, said = together
    place = f"{name}, {loop}"
    entry = table.setdefault((name, engine), {})
    entry[loop] = "fails"
    want, got = (read(whose / place / "0.json", said) for whose in (alone, folder))
    other = read(folder / place / "1.json", said)
    assert other == got
    for key in ("losses", "usage"):
        torch.testing.assert_close(got[key], want[key], atol=1e-5, rtol=1e-4)
    files = sorted((alone / place).rglob("adapter_model.safetensors"))
    assert len(files) >= (STEPS + 1 if loop == "Trainer" else 1)
    largest = 0.0
    for file in files:
        mine, its = load_file(file), load_file(folder / place / file.relative_to(alone / place))
        assert mine.keys() == its.keys()
        for key, value in mine.items():
            torch.testing.assert_close(its[key], value, atol=1e-5, rtol=1e-3, msg=lambda m, k=key: f"{k}: {m}")
            largest = max(largest, float((its[key].float() - value.float()).abs().max()))
    entry[loop] = f"{largest:.0e}"


def read(file: Path, said: str) -> dict[str, Any]:
    assert file.exists(), f"the run has not come as far as {file.parent.name}:\n{said}"
    found = json.loads(file.read_text(encoding="utf-8"))
    assert "error" not in found, found["error"]
    return found


def frozen(file: Path, patterns: tuple[str, ...]) -> dict[str, Tensor]:
    return {key: value for key, value in load_file(file).items() if any(part in key for part in patterns)}
