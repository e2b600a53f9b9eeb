"""Results are whole files or none: one that cannot be written is not lost, one that was cut short is made again."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest

from mixadapters.tasks import __main__ as cli
from mixadapters.tasks import results as results_module
from mixadapters.tasks.report import read_results
from mixadapters.tasks.results import check_writable, made_here, read_result, save_result, write_whole

RESULT = {
    "format": 1, "task": "imdb", "method": "lora", "seed": 0, "protocol": {"task": "imdb", "shots": 4, "draw": 2},
    "setup": {"model": "m"}, "metrics": {"accuracy": 0.5}, "rows": {"train": 8, "dev": 8, "test": 2},
    "predictions": [0, 1], "gold": [0, 0], "trainable_parameters": 3, "head_parameters": 0,
}  # fmt: skip


def full(*_: Any, **__: Any) -> None:
    raise OSError(28, "No space left on device")


def test_a_result_comes_back(tmp_path) -> None:
    save_result(tmp_path / "imdb" / "lora-s0-x.json", RESULT)
    assert read_result(tmp_path / "imdb" / "lora-s0-x.json") == RESULT
    assert [f.name for f in (tmp_path / "imdb").iterdir()] == ["lora-s0-x.json"]


@pytest.mark.parametrize("share", [0, 0.01, 0.3, 0.6, 0.99])
def test_every_cut_is_noticed(tmp_path, share: float) -> None:
    text = json.dumps(RESULT)
    file = tmp_path / "x.json"
    file.write_text(text[: int(share * len(text))])
    with pytest.raises(ValueError, match=r"x\.json is no whole result \(.*the command that made it makes it anew"):
        read_result(file)


@pytest.mark.parametrize("field", [*results_module.FIELDS, "gold"])
def test_a_result_without_a_field_is_no_result(tmp_path, field: str) -> None:
    (tmp_path / "x.json").write_text(json.dumps({k: v for k, v in RESULT.items() if k != field}))
    with pytest.raises(ValueError, match=f"no whole result: {field}=None"):
        read_result(tmp_path / "x.json")


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("protocol", {}, r"protocol\['shots'\]=None"), ("rows", {"train": 8}, r"rows\['test'\]=None"),
        ("rows", {"train": 8, "test": 2.0}, r"rows\['test'\]=2.0"), ("setup", {"x": 1}, r"setup\['model'\]=None"),
        ("metrics", {"accuracy": None}, r"metrics\['accuracy'\]=None"), ("retention", "x", "retention='x'"),
        ("metrics", {"accuracy": float("nan")}, "it holds NaN"), ("retention", {"drift": None}, r"\['drift'\]=None"),
        ("retention", {"drift": float("inf")}, "it holds Infinity"),
    ],
)  # fmt: skip
def test_what_a_table_cannot_be_made_of_is_no_result(tmp_path, field: str, value: Any, message: str) -> None:
    (tmp_path / "x.json").write_text(json.dumps({**RESULT, field: value}))
    with pytest.raises(ValueError, match=f"no whole result.*{message}"):
        read_result(tmp_path / "x.json")


def test_a_result_of_other_metrics_than_its_task_is_named(tmp_path) -> None:
    (tmp_path / "imdb").mkdir()
    (tmp_path / "imdb" / "lora-s0-x.json").write_text(json.dumps({**RESULT, "metrics": {"f1": 0.5}}))
    with pytest.raises(ValueError, match=r"lora-s0-x.json: metrics=.* lack 'accuracy'"):
        read_results(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"task": "imbd"}, "task 'imbd' is unknown"), ({"predictions": [0, "1"]}, "predictions have '1'"),
     ({"gold": [0, [1]]}, r"gold have \[1\], which is no answer to task 'imdb'")],
)  # fmt: skip
def test_a_result_that_is_none_of_its_task_is_named(tmp_path, changes: dict[str, Any], message: str) -> None:
    (tmp_path / "imdb").mkdir()
    (tmp_path / "imdb" / "lora-s0-x.json").write_text(json.dumps({**RESULT, **changes}))
    with pytest.raises(ValueError, match=rf"lora-s0-x\.json: {message}"):
        read_results(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"[1]", "is no result but a JSON list"), (b"\xff", "no whole result"), (b"[" * 99999, "no whole result"),
     (json.dumps({**RESULT, "gold": [1]}).encode(), "2 predictions for 1 rows"),
     (json.dumps({**RESULT, "gold": [], "predictions": []}).encode(), "0 predictions for 0 rows"),
     (json.dumps({**RESULT, "seed": True}).encode(), "no whole result: seed=True")],
)  # fmt: skip
def test_what_is_no_result_is_named(tmp_path, content: bytes, message: str) -> None:
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_result(tmp_path / "x.json")


def test_tables_name_a_file_that_was_cut_short(tmp_path, capsys) -> None:
    save_result(tmp_path / "imdb" / "lora-s0-x.json", RESULT)
    (tmp_path / "imdb" / "lora-s1-x.json").write_text(json.dumps(RESULT)[:99])
    assert cli.main(["table", str(tmp_path)]) == 1
    assert "lora-s1-x.json is no whole result" in capsys.readouterr().err


def test_a_run_whose_result_was_cut_short_runs_again(data, tmp_path, capsys) -> None:
    line = f"run --data-dir {data} --out {tmp_path}/out --tasks imdb --methods majority --seeds 0"
    line = [*line.split(), "--shots", "4", "--shots_from", "rule"]
    assert cli.main(line) == 0
    (file,) = (tmp_path / "out").glob("imdb/*.json")
    whole = json.loads(file.read_text())
    file.write_text(file.read_text()[:200])
    assert cli.main(line) == 0
    assert "majority seed 0: runs again: " in capsys.readouterr().out
    assert read_result(file)["predictions"] == whole["predictions"]


def test_two_commands_never_make_one_result_at_a_time(data, tmp_path, capsys, monkeypatch) -> None:
    """The second would take away the checkpoint that the first is writing, as one that a killed run has left."""
    monkeypatch.setattr(results_module, "PATIENCE", 0)
    line = f"run --data-dir {data} --out {tmp_path} --tasks imdb --methods majority --seeds 0".split()
    file = tmp_path / "imdb" / "x.json"
    with made_here(file, True):
        with (
            pytest.raises(ValueError, match=r"another process is making .*x\.json; wait for it"),
            made_here(file, True),
        ):
            pass
        with made_here(file, False):  # not the process that writes
            pass
        with made_here(tmp_path / "imdb" / "y.json", True):
            pass
    with made_here(file, True):
        pass
    assert cli.main(line) == 0
    (result,) = (tmp_path / "imdb").iterdir()  # and nothing beside it
    with made_here(result, True):
        assert cli.main(line) == 1
    assert f"another process is making {result}" in capsys.readouterr().err


@pytest.mark.skipif(results_module.fcntl is None, reason="the system has no locks of files")
@pytest.mark.parametrize("place", ["a folder is there", "its folder is a file", "the disk is full", "it is read-only"])
def test_every_process_ends_where_the_first_has_no_place_for_the_result(tmp_path, monkeypatch, place: str) -> None:
    """The others would wait for the first, which has ended."""
    file = tmp_path / "imdb" / "x.json"
    if place == "a folder is there":
        file.with_suffix(".lock").mkdir(parents=True)
    elif place == "its folder is a file":
        file.parent.write_text("mine")
    else:
        error = OSError(errno.ENOSPC, place) if place == "the disk is full" else PermissionError(errno.EACCES, place)
        monkeypatch.setattr(Path, "open", lambda *_: (_ for _ in ()).throw(error))
    told: list[str] = []
    monkeypatch.setattr(results_module, "gathered", lambda said: [told.append(said) or said, ""])
    refused = pytest.raises(ValueError, match=r"x\.json cannot be made \(.*\): name another --out, or make room")
    with refused, made_here(file, True):
        pass
    monkeypatch.setattr(results_module, "gathered", lambda said: [*told, said])
    with pytest.raises(ValueError, match=r"x\.json cannot be made"), made_here(file, False):
        pass


@pytest.mark.skipif(results_module.fcntl is None, reason="the system has no locks of files")
@pytest.mark.parametrize("meeting", ["it looks", "it is done"])
def test_a_command_that_only_looks_at_a_result_does_not_stop_another(tmp_path, monkeypatch, meeting: str) -> None:
    flock, path = results_module.fcntl.flock, tmp_path / "x.lock"

    def meets_another(lock: Any, how: int) -> None:
        if meeting == "it looks":
            raise BlockingIOError
        path.unlink()  # between our opening of the file and our lock on it
        flock(lock, how)

    ways = iter([meets_another])
    monkeypatch.setattr(results_module.fcntl, "flock", lambda lock, how: next(ways, flock)(lock, how))
    with made_here(tmp_path / "x.json", True):
        assert next(ways, None) is None
        assert path.exists()


def test_writers_at_the_same_time_never_mix(tmp_path, monkeypatch) -> None:
    sync, inner = os.fsync, iter(["inner"])

    def another_writes_meanwhile(file: int) -> None:
        for text in inner:
            write_whole(tmp_path / "x", text)
            assert (tmp_path / "x").read_text() == "inner"
        sync(file)

    monkeypatch.setattr(os, "fsync", another_writes_meanwhile)
    write_whole(tmp_path / "x", "outer")
    assert (tmp_path / "x").read_text() == "outer"
    assert [f.name for f in tmp_path.iterdir()] == ["x"]


def test_what_cannot_be_written_leaves_the_old_file(tmp_path, monkeypatch) -> None:
    (tmp_path / "x").write_text("old")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_whole(tmp_path / "x", "new")
    assert (tmp_path / "x").read_text() == "old"
    assert [f.name for f in tmp_path.iterdir()] == ["x"]


def test_a_result_that_finds_no_room_is_kept_elsewhere(tmp_path, monkeypatch) -> None:
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(results_module.tempfile, "gettempdir", lambda: str(tmp_path / "temporary"))
    write = write_whole

    def no_room(file: Path, text: str) -> None:
        full() if file.parent.name == "imdb" else write(file, text)

    monkeypatch.setattr(results_module, "write_whole", no_room)
    with pytest.raises(ValueError, match=r"No space left.*scores are {'accuracy': 0\.5}.*temporary/lora-s0-x\.json"):
        save_result(tmp_path / "imdb" / "lora-s0-x.json", RESULT)
    assert read_result(tmp_path / "temporary" / "lora-s0-x.json") == RESULT


def test_a_result_that_finds_no_room_anywhere_is_printed(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ValueError, match="all of it is in the line that is printed above"):
        save_result(tmp_path / "imdb" / "lora-s0-x.json", RESULT)
    assert json.loads(capsys.readouterr().out) == RESULT


def test_a_folder_that_takes_no_files_is_refused(tmp_path, monkeypatch) -> None:
    check_writable(tmp_path / "a" / "b")
    assert not list((tmp_path / "a" / "b").iterdir())
    (tmp_path / "a" / "writable").write_text("mine")
    check_writable(tmp_path / "a")
    assert (tmp_path / "a" / "writable").read_text() == "mine"
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ValueError, match=r"--out .*c must be a folder that can be written to: .*No space left"):
        check_writable(tmp_path / "c")
