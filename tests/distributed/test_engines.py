"""Each method under each engine: two processes come to what one comes to with the same rows."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import random
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from cells import CELLS, LOOPS, STEPS, llama
from conftest import launch
from peft import PeftModel, get_peft_model_state_dict
from processes import start_together
from safetensors.torch import load_file
from torch import Tensor

from mixadapters.training.checkpoints import fault

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
        said = launch(engine, "worker.py", engine, str(folder))
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


@pytest.mark.parametrize("name", ["MixDA, stage domain", "MixDA, stage task", "MoA, a router for each block"])
def test_files_hold_every_weight_whatever_a_stage_has_frozen(name: str, together: tuple[str, Path, str]) -> None:
    _, folder, said = together
    model = CELLS[name].model()
    began = digests(get_peft_model_state_dict(model))
    model.base_model.set_stage(CELLS[name].stage)
    trains = {key.replace(".default.", ".") for key, p in model.named_parameters() if p.requires_grad}
    assert 0 < len(trains) < len(began)
    for loop in LOOPS:
        read(folder / f"{name}, {loop}" / "0.json", said)
        files = sorted((folder / f"{name}, {loop}").rglob("adapter_model.safetensors"))
        assert len(files) == (STEPS + 1 if loop == "Trainer" else 1)
        for file in files:
            ended = digests(load_file(file))
            assert {key for key in began if ended[key] == began[key]} == began.keys() - trains
            PeftModel.from_pretrained(llama(), file.parent)  # strict, and checks the digest of the whole


def digests(weights: dict[str, Tensor]) -> dict[str, str]:
    return {key: hashlib.sha256(value.numpy().tobytes()).hexdigest() for key, value in weights.items()}


# --- killed runs --------------------------------------------------------------------------------------------------

RESUMED = ("MixDA, stage task", "MoSA", "MoA, balanced by bias")
WORKER = (Path(__file__).parent / "resume_worker.py").read_text(encoding="utf-8")


def ends_are_equal(one: Path, other: Path, names: Sequence[str], exactly: bool = False) -> None:
    """The adapters at the end of runs of Trainer; `exactly`: bit for bit, else but for rounding."""
    for name in names:
        file = f"{name}, Trainer/end/adapter_model.safetensors"
        expected, found = load_file(one / file), load_file(other / file)
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            if exactly:
                assert torch.equal(found[key], value), f"{name}: {key}"
            else:
                torch.testing.assert_close(found[key], value, atol=1e-5, rtol=1e-3, msg=f"{name}: {key}")


def test_a_killed_run_goes_on(together: tuple[str, Path, str], tmp_path: Path) -> None:
    """kill -9 of one of two processes anywhere in a step, then on with two, and with one."""
    engine, folder, _ = together
    if engine == "zero2":
        pytest.skip("as zero3")
    event = random.choice(["on_step_begin", "on_substep_end", "on_pre_optimizer_step", "on_optimizer_step"])
    step = random.randint(1, STEPS - 1)
    print(f"killed at {event} after step {step}")
    killed = tmp_path / "killed"
    for process in start_together(WORKER, [engine, str(killed), event, str(step), RESUMED[0]]):
        with pytest.raises(RuntimeError):  # the other waits in vain
            process.finish(120)
    left = {path.name: fault(path) for path in sorted((killed / f"{RESUMED[0]}, Trainer").glob("checkpoint-*"))}
    assert [name for name, reason in left.items() if not reason][-1:] == [f"checkpoint-{step}"]
    for processes in (2, 1):
        place = tmp_path / str(processes)
        for name in RESUMED[1:]:
            source = f"{name}, Trainer/checkpoint-{step}"
            shutil.copytree(folder / source, place / source)
        shutil.copytree(killed / f"{RESUMED[0]}, Trainer", place / f"{RESUMED[0]}, Trainer")
        running = start_together(WORKER, [engine, str(place), "", str(step), *RESUMED], processes)
        if engine == "zero3" and processes == 1:
            with pytest.raises(RuntimeError, match="world size"):
                running[0].finish(120)
            continue
        for process in running:
            process.finish(120)
        ends_are_equal(folder, place, RESUMED, exactly=processes == 2)


def test_a_run_of_one_process_goes_on_in_two(alone: Path, tmp_path: Path) -> None:
    step = random.randint(1, STEPS - 1)
    for name in RESUMED:
        shutil.copytree(alone / f"{name}, Trainer/checkpoint-{step}", tmp_path / f"{name}, Trainer/checkpoint-{step}")
    for process in start_together(WORKER, ["ddp", str(tmp_path), "", str(step), *RESUMED]):
        process.finish(120)
    ends_are_equal(alone, tmp_path, RESUMED)


def test_bases_that_zero_3_shares_out_while_they_load_take_adapters(alone: Path, tmp_path: Path) -> None:
    pytest.importorskip("deepspeed")
    names = ["MixDA, stage task", "MoSA", "PILL"]
    worker = (Path(__file__).parent / "loaded_worker.py").read_text(encoding="utf-8")
    for process in start_together(worker, [str(tmp_path), *names]):
        process.finish(120)
    ends_are_equal(alone, tmp_path, names)
