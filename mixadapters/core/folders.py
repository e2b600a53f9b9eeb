"""Folders: whether one that a user names is there, and how one is written whole. Imports nothing that takes time."""

from __future__ import annotations

import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mixadapters.core.registry import nearest

try:
    import fcntl
except ImportError:  # Windows: what a killed process leaves stays
    fcntl = None  # type: ignore[assignment]

ADAPTER_FILE = "adapter_config.json"
MODEL_FILE = "config.json"
LOCK = "in_use"  # in a `ScratchFolder`
PATIENCE = 10.0  # seconds for the hub's answer whether it has a repository


def check_saved(what: str, name: str, file: str) -> None:
    """Find out whether a folder, or a repository of the hub, is there, without the hub's retries.

    Args:
        what: of the message, such as "MODEL".
        file: that it holds, `MODEL_FILE` or `ADAPTER_FILE`; what lies in the hub's cache needs no network.

    Raises:
        ValueError: there is none, or the hub cannot say so.
    """
    path = Path(name)
    if path.is_dir():
        if file == MODEL_FILE and (path / ADAPTER_FILE).is_file():
            raise ValueError(f"{what} {name!r} is an adapter: name its base model")
        if file == ADAPTER_FILE and not (path / file).is_file():
            raise ValueError(f"{what} {name!r} has no {file}: it is no saved adapter")
        return
    if path.exists():
        raise ValueError(f"{what} {name!r} is a file: name the folder that holds the model")
    missing = f"{what} {name!r}: there is no such folder"
    if _looks_like_a_path(name):
        raise ValueError(f"{missing}.{nearest_folder(name)}")
    from huggingface_hub import HfApi, try_to_load_from_cache

    try:
        if isinstance(try_to_load_from_cache(name, file), str):
            return
        HfApi().repo_info(name, timeout=PATIENCE)
    except Exception as error:  # not there, not open, no network, no name of a repository
        said = str(error).strip().partition("\n")[0]
        raise ValueError(f"{missing} here, and the hub gives none of this name: {said}") from None


def check_saved_pair(model: str, adapter: str | None = None) -> None:
    """As `check_saved`, of both. Raises ValueError also where one is in the place of the other."""
    if Path(model, ADAPTER_FILE).is_file():
        raise ValueError(f"MODEL {model!r} is an adapter: name its base model first, and the folder by --adapter")
    check_saved("MODEL", model, MODEL_FILE)
    if adapter is not None:
        check_saved("--adapter", adapter, ADAPTER_FILE)


def nearest_folder(name: str) -> str:
    """As `nearest`, of the folders beside one that is not there."""
    parent = Path(name).parent
    return nearest(Path(name).name, sorted(p.name for p in parent.iterdir() if p.is_dir()) if parent.is_dir() else [])


def check_misspelt(name: str) -> None:
    """Raises ValueError: no such folder is here, and it can be none of the hub, or one has nearly this name."""
    if not Path(name).exists() and (_looks_like_a_path(name) or ("/" not in name and nearest_folder(name))):
        raise ValueError(f"there is no such folder.{nearest_folder(name)}")


def _looks_like_a_path(name: str) -> bool:
    """Whether a name can be no repository of the hub, or lies in a folder that is here."""
    if name.startswith((".", "/", "~")) or "\\" in name or name.endswith("/") or name.count("/") > 1:
        return True
    return "/" in name and Path(name).parent.is_dir()


@contextmanager
def written_aside(path: str | Path) -> Iterator[Path]:
    """A name of its own beside `path`, for the next content: it takes its place in one step, when all is written.

    A process that is killed leaves `.{name}.*.part`. Raises ValueError: `path` names no file; FileNotFoundError: nor
    is its folder there.
    """
    if not isinstance(path, (str, os.PathLike)) or not Path(path).name:
        raise ValueError(f"{path!r:.80} names no file to write")
    path = Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"there is no folder {str(path.parent)!r} for {path.name!r}; make it first")
    aside = path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")
    try:
        yield aside
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def check_folder(folder: object) -> None:
    """Raises ValueError where an argument is no path."""
    if not isinstance(folder, (str, os.PathLike)):
        raise ValueError(f"folder={folder!r:.80} must be the path of a folder")


def new_folder(folder: str | Path) -> Path:
    """The path of a folder that is to be written, with a place to stand. Raises ValueError: it holds something."""
    check_folder(folder)
    path = Path(folder)
    if path.is_file() or (path.is_dir() and any(path.iterdir())):
        raise ValueError(f"folder={str(folder)!r} holds something already; name a new or an empty one")
    path = path.resolve() if path.is_symlink() else path  # what a link leads to is written, and the link stays
    if path.is_dir() and (path.samefile(".") or path.is_mount()):
        raise ValueError(f"folder={str(folder)!r} is where this process works, or a mount: name a folder inside it")
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


@contextmanager
def folder_aside(folder: str | Path) -> Iterator[Path]:
    """A folder beside `folder`, which takes its place when all is written. Raises ValueError: see `new_folder`."""
    target = new_folder(folder)
    aside = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}."))
    try:
        yield aside
        if target.is_dir():
            target.rmdir()
        umask = os.umask(0)
        os.umask(umask)
        aside.chmod(0o777 & ~umask)  # a temporary folder is for its owner alone
        os.replace(aside, target)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


class ScratchFolder:
    """A folder inside `parent`, which goes with this object; those of processes that were killed go now.

    Each holds a lock for as long as its process lives, which the system gives back whatever ends that.

    Attributes:
        name: its path.
    """

    def __init__(self, parent: str | Path, prefix: str) -> None:
        for left in Path(parent).glob(f"{prefix}*"):
            if _is_left(left):
                shutil.rmtree(left, ignore_errors=True)
        self._made = tempfile.TemporaryDirectory(prefix=prefix, dir=parent)
        self.name = self._made.name
        if fcntl is not None:
            lock = Path(self.name) / LOCK
            with written_aside(lock) as aside:  # whoever finds it finds it locked
                self._lock = open(aside, "w")  # noqa: SIM115 - it is held
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _is_left(folder: Path) -> bool:
    """Whether a folder is one whose process has ended without taking it along."""
    if fcntl is None or not os.path.isfile(folder / LOCK):  # to open a pipe is to wait; false also in others' folders
        return False
    try:
        with open(folder / LOCK) as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # held, none of these folders, or not ours to look at
        return False
    return True
