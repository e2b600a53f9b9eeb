"""A run that was killed goes on from its newest whole checkpoint, says so, and ends as if nothing had happened."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest

from mixadapters import BottleneckConfig
from mixadapters.tasks import __main__ as cli
from mixadapters.tasks import checkpoints, domains
from mixadapters.tasks import runner as runner_module

LINE = (
    "--tasks imdb --methods {} --seeds 0 --shots 4 --shots_from rule --test_rows 8 --max_steps 6 --max_length 24 "
    "--per_device_train_batch_size 4 --parameters 1200 --stage1_steps 1 --stage1_batch 4 --layers 2 "
    "--save_strategy steps --save_steps 2"
)
KILLS = int(os.environ.get("KILLS", "2"))  # of the slow test


def run(model: Path, data: Path, out: Path, method: str = "bottleneck") -> int:
    line = LINE.format(method).split()
    return cli.main(["run", "--model", str(model), "--data-dir", str(data), "--out", str(out), *line])


def result(out: Path) -> dict[str, Any]:
    """The only result, without the time it took."""
    (file,) = out.glob("imdb/*.json")
    return {k: v for k, v in json.loads(file.read_text()).items() if k != "seconds"}


@pytest.fixture
def stopped(encoder, data, tmp_path) -> tuple[Path, dict[str, Any]]:
    """The checkpoints of a run that ended before its result was written, and what that would have been."""
    out = tmp_path / "out"
    assert run(encoder, data, out) == 0
    found = result(out)
    shutil.rmtree(out / "imdb")
    (folder,) = (out / "trainer").iterdir()
    return folder, found


@pytest.fixture
def asked(monkeypatch) -> list[str | None]:
    """The checkpoints from which trainings go on."""
    train, found = runner_module.TaskTrainer.train, []

    def spy(self: Any, resume_from_checkpoint: str | None) -> Any:
        found.append(resume_from_checkpoint and Path(resume_from_checkpoint).name)
        return train(self, resume_from_checkpoint=resume_from_checkpoint)

    monkeypatch.setattr(runner_module.TaskTrainer, "train", spy)
    return found


def test_a_run_goes_on_from_its_newest_checkpoint(encoder, data, tmp_path, stopped, asked, capsys) -> None:
    assert {f.name for f in stopped[0].iterdir()} == {"checkpoint-2", "checkpoint-4", "checkpoint-6"}
    assert run(encoder, data, tmp_path / "out") == 0
    assert asked == ["checkpoint-6"]
    assert "goes on from checkpoint-6" in capsys.readouterr().out
    assert result(tmp_path / "out") == stopped[1]


def test_checkpoints_are_told_apart_by_number_not_by_spelling(stopped) -> None:
    for name in ("checkpoint-10", "checkpoint-x", "checkpoint-"):
        shutil.copytree(stopped[0] / "checkpoint-2", stopped[0] / name)
    newest, broken = checkpoints.newest_whole(stopped[0])
    assert (newest.name, broken) == ("checkpoint-10", {})


def cut(name: str) -> Callable[[Path], None]:
    """The file loses its second half."""
    return lambda folder: os.truncate(folder / name, (folder / name).stat().st_size // 2)


def remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def empty(folder: Path) -> None:
    for file in folder.iterdir():
        file.unlink()


FILES = (
    "adapter_model.safetensors",
    "optimizer.pt",
    "scheduler.pt",
    "rng_state.pth",
    "trainer_state.json",
    checkpoints.MARK,
)
DAMAGES = {f"{what.__name__} {name}": what(name) for what in (cut, remove) for name in FILES} | {"empty": empty}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_checkpoint_that_is_not_whole_is_passed_over(stopped, damage: str) -> None:
    DAMAGES[damage](stopped[0] / "checkpoint-6")
    newest, broken = checkpoints.newest_whole(stopped[0])
    assert newest.name == "checkpoint-4"
    ((folder, reason),) = broken.items()
    assert folder.name == "checkpoint-6"
    assert damage.split()[-1] in reason or checkpoints.MARK in reason


def test_a_run_falls_back_to_the_checkpoint_before_and_says_so(
    encoder, data, tmp_path, stopped, asked, capsys
) -> None:
    cut("optimizer.pt")(stopped[0] / "checkpoint-6")
    (stopped[0] / "checkpoint-8").mkdir()
    assert run(encoder, data, tmp_path / "out") == 0
    assert asked == ["checkpoint-4"]
    said = capsys.readouterr().out
    assert "checkpoint-6 is not whole, removed: optimizer.pt has " in said
    assert f"checkpoint-8 is not whole, removed: it has no {checkpoints.MARK}" in said
    assert "goes on from checkpoint-4" in said
    assert result(tmp_path / "out") == stopped[1]


def test_without_a_whole_checkpoint_a_run_begins_anew(encoder, data, tmp_path, stopped, asked, capsys) -> None:
    for folder in stopped[0].iterdir():
        empty(folder)
    assert run(encoder, data, tmp_path / "out") == 0
    assert asked == [None]
    assert "goes on from the beginning" in capsys.readouterr().out
    assert result(tmp_path / "out") == stopped[1]


def test_domain_adapters_are_there_whole_or_not_at_all(encoder, data, tmp_path, monkeypatch) -> None:
    from peft import PeftModel

    save = PeftModel.save_pretrained

    def stop_halfway(self: Any, folder: str) -> None:
        save(self, folder)
        (Path(folder) / "adapter_config.json").write_text("{")
        raise KeyboardInterrupt

    monkeypatch.setattr(PeftModel, "save_pretrained", stop_halfway)
    with pytest.raises(KeyboardInterrupt):
        run(encoder, data, tmp_path / "out", "mixda")
    assert not [f for f in (tmp_path / "out/domains").iterdir() if not f.name.startswith(".")]
    monkeypatch.setattr(PeftModel, "save_pretrained", save)
    assert run(encoder, data, tmp_path / "out", "mixda") == 0
    for folder in (tmp_path / "out/domains").iterdir():
        assert json.loads((folder / "adapter_config.json").read_text())["peft_type"] == "BOTTLENECK"


def test_what_a_killed_process_left_of_a_domain_adapter_goes(tmp_path) -> None:
    class Saved:
        peft_config: ClassVar = {"default": BottleneckConfig()}

        def save_pretrained(self, folder: str) -> None:
            Path(folder).mkdir()
            (Path(folder) / "adapter_config.json").write_text("{}")

    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "adapter_model.safetensors").write_text("half")
    for _ in range(2):  # the second finds it there, as if another process had been faster
        domains.save_whole(Saved(), tmp_path / "one")
        assert [f.name for f in tmp_path.rglob("*")] == ["one", "adapter_config.json"]


def forked(work: Callable[[], int], before: Callable[[], None]) -> int:
    """Start `work` in a process of its own; returns its id."""
    if child := os.fork():
        return child
    try:  # the child never comes back into pytest
        before()
        os._exit(work())
    except BaseException:
        traceback.print_exc()
    os._exit(99)


def die_when_writing(folder: Path, number: int) -> None:
    """Kill this process when it opens or renames a file in the folder for the n-th time."""
    count = 0

    def watch(event: str, details: tuple[Any, ...]) -> None:
        nonlocal count
        writes = event == "os.rename" or (event == "open" and isinstance(details[2], int) and details[2] & 3)
        if writes and str(details[0]).startswith(str(folder)):
            count += 1
            if count == number:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)


def test_a_run_that_dies_while_it_writes_goes_on(encoder, data, tmp_path) -> None:
    assert run(encoder, data, tmp_path / "undisturbed") == 0
    out, died = tmp_path / "out", 0
    for number in (3, 5, 6, 8, 4, 7):
        child = forked(lambda: run(encoder, data, out), lambda n=number: die_when_writing(out, n))
        _, status = os.waitpid(child, 0)
        died += os.WIFSIGNALED(status)
        assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    assert died >= 3
    assert run(encoder, data, out) == 0
    assert result(out) == result(tmp_path / "undisturbed")


@pytest.mark.slow
def test_a_run_that_is_killed_at_any_time_goes_on(encoder, data, tmp_path) -> None:
    started = time.perf_counter()
    assert run(encoder, data, tmp_path / "undisturbed", "mixda") == 0
    took, rng, killed = time.perf_counter() - started, random.Random(KILLS), 0
    for trial in range(100 * KILLS):
        out = tmp_path / f"out{trial}"
        for _ in range(2):
            child = forked(lambda out=out: run(encoder, data, out, "mixda"), lambda: None)
            time.sleep(rng.uniform(0.05, took))
            os.kill(child, signal.SIGKILL)
            killed += os.WIFSIGNALED(os.waitpid(child, 0)[1])
        assert run(encoder, data, out, "mixda") == 0
        assert result(out) == result(tmp_path / "undisturbed")
        if killed >= KILLS:
            return
    pytest.fail("the runs ended before they were killed")
