"""Result files: written aside and renamed, read whole or refused by name."""

from __future__ import annotations

import json
import os
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mixadapters.core.folders import fcntl, written_aside
from mixadapters.core.processes import gathered
from mixadapters.tasks.provenance import FORMAT

FIELDS: dict[str, type] = {
    "task": str, "method": str, "seed": int, "protocol": dict, "setup": dict, "metrics": dict, "rows": dict,
    "predictions": list, "gold": list, "trainable_parameters": int, "head_parameters": int,
}  # fmt: skip


# What tables read of some of them: a field, its entry or None for all of them, and what that may be.
PARTS: tuple[tuple[str, str | None, tuple[type, ...]], ...] = (
    ("protocol", "shots", (int, type(None))), ("rows", "train", (int,)), ("rows", "test", (int,)),
    ("setup", "model", (str,)), ("metrics", None, (int, float)), ("retention", None, (int, float)),
)  # fmt: skip
MAY_LACK = ("setup", "retention")  # of methods that train nothing


def _refuse_constant(name: str) -> None:
    raise ValueError(f"it holds {name}")


def read_result(file: Path) -> dict[str, Any]:
    """A result. Raises ValueError: it is of another format, or no whole result, such as a file that was cut short."""
    again = "the command that made it makes it anew, as if it were not there"
    try:
        found = json.loads(file.read_text(encoding="utf-8"), parse_constant=_refuse_constant)
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{file} is no whole result ({error}); {again}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{file} is no result but a JSON {type(found).__name__}; {again}")
    if found.get("format") != FORMAT:
        raise ValueError(f"{file}: format={found.get('format')!r} is not read by this version")
    for name, kind in FIELDS.items():
        if type(found.get(name)) is not kind:
            raise ValueError(f"{file} is no whole result: {name}={found.get(name)!r}; {again}")
    for name, part, kinds in PARTS:
        value = found.get(name) or {}
        if not isinstance(value, dict):
            raise ValueError(f"{file} is no whole result: {name}={value!r:.200}; {again}")
        if not value and name in MAY_LACK:
            continue
        keys = value if part is None else [part]
        for key in keys:
            if key not in value or type(value[key]) not in kinds:
                raise ValueError(f"{file} is no whole result: {name}[{key!r}]={value.get(key)!r:.200}; {again}")
    said, rows = len(found["predictions"]), len(found["gold"])
    if said != rows or not rows:
        raise ValueError(f"{file} is no whole result: {said} predictions for {rows} rows; {again}")
    return found


def write_whole(file: Path, text: str) -> None:
    """Write a file whole or not at all, even where the machine stops: the text is on the disk before the name is."""
    with written_aside(file) as aside, aside.open("w", encoding="utf-8") as opened:
        opened.write(text)
        opened.flush()
        os.fsync(opened.fileno())


def save_result(file: Path, result: dict[str, Any]) -> None:
    """Write a result. Raises ValueError: that cannot be; the result is then in a temporary file, or printed."""
    text = json.dumps(result)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_whole(file, text)
    except OSError as error:
        kept = Path(tempfile.gettempdir()) / file.name
        try:
            write_whole(kept, text)
        except OSError:
            print(text, flush=True)
            kept = Path("the line that is printed above")
        raise ValueError(
            f"{file} cannot be written ({error}). Its scores are {result['metrics']}; all of it is in {kept}: make "
            f"room and put it where it belongs"
        ) from error


def check_writable(folder: Path) -> None:
    """Raises ValueError: results cannot go there. The folder is made."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        own = folder / f".{uuid.uuid4().hex}"  # no file of the user's
        write_whole(own, "")
        own.unlink()
    except OSError as error:
        raise ValueError(f"--out {folder} must be a folder that can be written to: {error}") from error


PATIENCE = 1.0  # seconds for another command that has only looked whether a result is there, or is just done


@contextmanager
def made_here(file: Path, first: bool) -> Iterator[None]:
    """A block in which no other command makes the same result: both would write the checkpoints of one training.

    first: whether this process, of several that run one command, is the one that writes. All of them come here.

    Raises ValueError, in all of them: another command is at it, or there is no place for the result.
    """
    lock, fault = None, ""
    if first and fcntl is not None:
        try:
            lock = _lock(file.with_suffix(".lock"))
        except OSError as error:
            fault = f"{file} cannot be made ({error}): name another --out, or make room for it there"
        else:
            if lock.closed:
                fault = (
                    f"another process is making {file}; wait for it, or divide --tasks, --methods or --seeds between "
                    "them"
                )
    try:
        if said := "".join(gathered(fault)):  # by the first, and the others know of it
            raise ValueError(said)
        yield
    finally:
        if lock is not None and not lock.closed:
            Path(lock.name).unlink(missing_ok=True)
            lock.close()


def _lock(path: Path) -> Any:
    """A file that the system keeps locked until this process closes it or ends; closed where another keeps it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + PATIENCE
    while True:
        lock = path.open("w")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            pass
        except OSError:  # a file system without locks
            return lock
        else:
            if _is_still_there(path, lock):
                return lock
        lock.close()
        if time.monotonic() > end:
            return lock
        time.sleep(PATIENCE / 50)


def _is_still_there(path: Path, opened: Any) -> bool:
    """Whether the open file is that of the path, and not one that whoever had it before has removed."""
    try:
        return os.path.samestat(path.stat(), os.fstat(opened.fileno()))
    except FileNotFoundError:
        return False
