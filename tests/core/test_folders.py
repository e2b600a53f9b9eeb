"""Folders are written whole, where their user says, or refused by name before anything is."""

from __future__ import annotations

import multiprocessing
import os
import threading
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest

from mixadapters.core.folders import LOCK, ScratchFolder, folder_aside, written_aside


def write(folder: str | Path) -> None:
    with folder_aside(folder) as aside:
        (aside / "file").write_text("whole")


@pytest.mark.parametrize("there", [True, False])
def test_what_a_link_leads_to_is_written_and_the_link_stays(there: bool, tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "real", target_is_directory=True)
    if there:
        (tmp_path / "real").mkdir()
    write(link)
    assert link.is_symlink()
    assert (tmp_path / "real" / "file").read_text() == "whole"
    assert sorted(os.listdir(tmp_path)) == ["link", "real"]


@pytest.mark.parametrize("name", [".", "", "../here"])
def test_the_folder_where_the_process_works_stays(name: str, tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(ValueError, match=r"folder=.* is where this process works, or a mount: name a folder inside"):
        write(name)
    assert os.listdir(tmp_path) == ["here"]
    assert os.listdir(tmp_path / "here") == []


def test_a_file_in_a_folder_that_is_not_there_is_refused_by_name(tmp_path: Path) -> None:
    with (
        pytest.raises(FileNotFoundError, match=r"no folder '.*none' for 'page.html'; make it first"),
        written_aside(tmp_path / "none" / "page.html") as aside,
    ):
        aside.touch()
    assert os.listdir(tmp_path) == []


def test_a_folder_that_holds_something_is_refused_and_nothing_is_left_beside_it(tmp_path: Path) -> None:
    write(tmp_path / "new" / "inside")
    with pytest.raises(ValueError, match="holds something already"):
        write(tmp_path / "new" / "inside")
    with pytest.raises(RuntimeError), folder_aside(tmp_path / "other"):
        raise RuntimeError
    assert os.listdir(tmp_path) == ["new"]


def hold(folder: Path, pipe: Connection) -> None:
    mine = ScratchFolder(folder, "adapters-")
    (Path(mine.name) / "weights").touch()
    pipe.send(mine.name)
    pipe.recv()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system has no fork")
def test_what_a_killed_process_has_left_goes_and_what_others_use_stays(tmp_path: Path) -> None:
    forks = multiprocessing.get_context("fork")  # a new interpreter would import torch and the rest
    (ours, theirs), (other_ours, other_theirs) = forks.Pipe(), forks.Pipe()
    running = [forks.Process(target=hold, args=(tmp_path, pipe)) for pipe in (theirs, other_theirs)]
    try:
        for process in running:
            process.start()
        killed, alive = (Path(pipe.recv()) for pipe in (ours, other_ours))
        running[0].kill()
        running[0].join()
        others = ("adapters-of-the-user", "of-another-kind")
        for name in others:
            (tmp_path / name).mkdir()
        (tmp_path / "of-another-kind" / LOCK).touch()
        assert (killed / "weights").is_file()
        mine = ScratchFolder(tmp_path, "adapters-")
        second = ScratchFolder(tmp_path, "adapters-")  # of the same process
        assert sorted(tmp_path.iterdir()) == sorted(
            [alive, Path(mine.name), Path(second.name), *(tmp_path / name for name in others)]
        )
        assert (alive / "weights").is_file()
        gone = mine.name
        del mine
        assert not Path(gone).exists()
    finally:
        for process in running:
            process.kill()
            process.join()


def test_scratch_folder_leaves_those_that_it_may_not_look_into(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of another user, beside whose server this one runs."""
    theirs = tmp_path / "adapters-theirs"
    theirs.mkdir()
    stat = os.stat

    def refused(path: Any, *args: Any, **kwargs: Any) -> os.stat_result:
        if Path(path).parent == theirs:
            raise PermissionError(13, "Permission denied", str(path))
        return stat(path, *args, **kwargs)

    monkeypatch.setattr(os, "stat", refused)
    mine = ScratchFolder(tmp_path, "adapters-")
    assert theirs.is_dir()
    assert Path(mine.name).is_dir()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="the system has no named pipes")
def test_scratch_folder_does_not_wait_for_a_pipe(tmp_path: Path) -> None:
    folder = tmp_path / "adapters-strange"
    folder.mkdir()
    os.mkfifo(folder / LOCK)
    made: list[ScratchFolder] = []
    thread = threading.Thread(target=lambda: made.append(ScratchFolder(tmp_path, "adapters-")), daemon=True)
    thread.start()
    thread.join(20)
    waited = thread.is_alive()
    if waited:
        os.open(folder / LOCK, os.O_WRONLY | os.O_NONBLOCK)
    assert not waited
    assert folder.is_dir()
