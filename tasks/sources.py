"""Rows of a task in one form, from the hub or from JSON lines in a folder; errors name file, row and field."""

from __future__ import annotations

import gzip
import hashlib
import math
import re
import zlib
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mixadapters.core.json_text import parse_json
from mixadapters.tasks.registry import SPLITS, Task


class NotThere(ValueError):
    """The source of a task has no such file, or none of its rows: it may be of other tasks alone."""


@dataclass(frozen=True)
class Example:
    """A row: its texts, what is right, and the answers to choose from where it has any.

    `target` is the number of a label or of a choice, a score, or the accepted answers.
    """

    texts: tuple[str, ...]
    target: Any
    choices: tuple[str, ...] = ()

    @property
    def key(self) -> str:
        """The row's input as one string: equal keys are equal inputs."""
        return "\x1f".join([*self.texts, *self.choices])


def digest(examples: Sequence[Example]) -> str:
    """Fingerprint of rows with their targets, in order."""
    state = hashlib.sha256()
    for example in examples:
        state.update(f"{example.key}\x1e{example.target}\x1d".encode())
    return state.hexdigest()[:16]


def plain(value: object) -> str:
    """Text without line breaks, HTML's among them."""
    return " ".join(re.sub(r"<br ?/?>", " ", str(value)).split())


def files(folder: Path, names: str) -> list[Path]:
    """The files `folder/<name>*.jsonl` and `.jsonl.gz` for each of the names, split by spaces.

    Raises ValueError: a name has no file (`NotThere`, which says all that are missing), or a file is there both plain
        and compressed.
    """
    found: list[Path] = []
    missing: list[str] = []
    for name in names.split():
        of_name = sorted([*folder.glob(f"{name}*.jsonl"), *folder.glob(f"{name}*.jsonl.gz")])
        if not of_name:
            missing.append(f"no file {name}*.jsonl or {name}*.jsonl.gz")
        for file in of_name:
            if file.with_name(f"{file.name}.gz") in of_name:
                raise ValueError(f"{file} is there twice, compressed too, and its rows would count twice; remove one")
        found += of_name
    if missing:
        raise NotThere(f"--data-dir {folder} has {', '.join(missing)}")
    return found


def json_lines(folder: Path, names: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield ("file, row n", row) of the `files` of the names. Raises ValueError as `files` and `rows_of` do."""
    for file in files(folder, names):
        yield from rows_of(file)


def rows_of(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield ("file, row n", row) of a file of JSON lines, gzipped if its name ends in .gz.

    A byte order mark and one blank last line are passed over.

    Raises:
        ValueError: the file is empty or cannot be read, or has a row that is no JSON object or names a field twice.
    """
    try:
        with (gzip.open if file.suffix == ".gz" else open)(file, "rt", encoding="utf-8-sig") as opened:
            lines = list(opened)
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise ValueError(f"{file} cannot be read as UTF-8 text: {error}") from error
    if lines and not lines[-1].strip():
        lines.pop()
    if not lines:
        raise ValueError(f"{file} has no rows")
    for number, line in enumerate(lines, start=1):
        where = f"{file}, row {number}"
        if not line.strip():
            raise ValueError(f"{where}: the line is blank, which only the last may be; remove it")
        try:
            row = parse_json(line)
        except ValueError as error:
            raise ValueError(f"{where}: not JSON ({error})") from None
        if not isinstance(row, dict):
            raise ValueError(f"{where}: must be an object with named fields, got {line.strip()[:40]}")
        yield where, row


def read_texts(folder: Path, names: str, *fields: str, value: str = "") -> list[tuple[str, ...]]:
    """The `fields` of each row as plain text, and last the field `value`, a word or a number, as it is written.

    Raises ValueError as `json_lines` does, and for a field without text.
    """
    found = []
    for where, row in json_lines(folder, names):
        texts = tuple(_text(row, f, where) for f in fields)
        found.append((*texts, _word(row, value, where)) if value else texts)
    return found


def _word(row: dict[str, Any], field: str, where: str) -> str:
    """A label or score: a finite number, or text."""
    value = lookup(row, field)
    if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        return str(value)
    return _text(row, field, where)


def check_source(task: Task, data_dir: str | Path | None) -> None:
    """Raises ValueError: the task has no such source, or a file of it is not there. Nothing is read."""
    if data_dir:
        for names in task.local.values():
            files(Path(data_dir), names)
    elif "path" not in task.hub:
        raise ValueError(f"task {task.name!r} has no source on the hub; pass --data-dir with {dict(task.local)}")


def read_task(task: Task, data_dir: str | Path | None, splits: Collection[str] = SPLITS) -> dict[str, list[Example]]:
    """The task's rows by split, from `data_dir` or, without one, from the hub.

    Raises:
        ValueError: the task has no such source; a missing file or split (`NotThere`); a row with a missing or faulty
            field.
    """
    if not data_dir:
        check_source(task, None)
    found: dict[str, list[Example]] = {}
    for split in splits:
        if split not in (task.local if data_dir else task.hub):
            continue
        keep = task.local_where.get(split, {}) if data_dir else {}
        rows = json_lines(Path(data_dir), task.local[split]) if data_dir else _hub(task, split)
        found[split] = []
        for where, row in rows:
            kept = all(lookup(row, field) == value for field, value in keep.items())
            if kept and not any(lookup(row, field) == value for field, value in task.drop.items()):
                found[split].append(_example(task, row, f"{split} set, {where}"))
        if not found[split]:
            raise NotThere(f"task {task.name!r} has no rows in its {split} set")
    return found


def _hub(task: Task, split: str) -> Iterator[tuple[str, dict[str, Any]]]:
    from datasets import load_dataset

    name, there, rename = task.hub["path"], task.hub[split], task.hub.get("rename", {})
    try:
        rows = load_dataset(name, task.hub.get("name"), split=there)
    except (OSError, RuntimeError) as error:
        raise ValueError(
            f"task {task.name!r}: {name} cannot be loaded from the hub ({error}); pass --data-dir with "
            f"{dict(task.local)}"
        ) from error
    read = {field.split(".")[0] for field in (*task.columns, task.target, task.choices, *task.drop, *rename.values())}
    rows = rows.select_columns([c for c in rows.column_names if c in read])  # images would be decoded
    for number, row in enumerate(rows):
        yield f"{name}, {there} row {number}", {**row, **{ours: lookup(row, o) for ours, o in rename.items()}}


def lookup(row: Any, path: str) -> Any:
    """The value at a dotted path, None where there is none; `*` gives the list of what lies in each entry."""
    for i, part in enumerate(parts := path.split(".")):
        if part == "*" and isinstance(row, list):
            rest = ".".join(parts[i + 1 :])
            return [v for entry in row if (v := lookup(entry, rest)) is not None]
        if isinstance(row, list) and part.isdigit():
            row = row[int(part)] if int(part) < len(row) else None
        else:
            row = row.get(part) if isinstance(row, dict) else None
    return row


def _text(row: dict[str, Any], field: str, where: str, optional: bool = False) -> str:
    value = lookup(row, field)
    if optional and (value is None or (isinstance(value, str) and not value.strip())):
        return ""
    return plain(_checked(value, field, where))


def _checked(value: Any, field: str, where: str) -> str:
    """Text with something in it. Raises ValueError: anything else, such as a number, or half a surrogate pair."""
    if not isinstance(value, str) or not value.strip():
        raise ValueError(
            f"{where}: field {field!r} must be text, got {value!r}; write text in quotes, or leave the row out"
        )
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{where}: field {field!r} has half a surrogate pair at character {error.start}, which is no text; "
            "replace it, or leave the row out"
        ) from None
    return value


def _example(task: Task, row: dict[str, Any], where: str) -> Example:
    texts = tuple(_text(row, c, where, c in task.optional) for c in task.columns)
    if not any(texts):
        raise ValueError(f"{where}: fields {list(task.columns)} are all without text; leave the row out")
    value = lookup(row, task.target)
    if task.kind == "classification":
        return Example(texts, _label(task, value, where))
    if task.kind == "regression":
        low, high = task.bounds
        if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
            raise ValueError(f"{where}: field {task.target!r} must be a number from {low} to {high}, got {value!r}")
        return Example(texts, float(value))
    if task.kind == "generation":
        # An output may have pages alone, or a blank in place of an answer.
        given = [a for a in value or () if a is not None and not (isinstance(a, str) and not a.strip())]
        if not given:
            raise ValueError(f"{where}: field {task.target!r} must have an answer, got {value!r}; leave the row out")
        return Example(texts, tuple(dict.fromkeys(_checked(a, task.target, where).strip() for a in given)))
    given = lookup(row, task.choices)
    if not isinstance(given, list) or len(given) < 2 or not all(isinstance(c, str) and c.strip() for c in given):
        raise ValueError(f"{where}: field {task.choices!r} must be a list of two or more texts, got {given!r}")
    choices = tuple(plain(_checked(c, task.choices, where)) for c in given)
    if isinstance(value, str) and len(value) == 1:
        value = ord(value.upper()) - ord("A")
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < len(choices):
        raise ValueError(f"{where}: field {task.target!r} must number one of {len(choices)} choices, got {value!r}")
    return Example(texts, value, choices)


def _label(task: Task, value: Any, where: str) -> int:
    if isinstance(value, str) and value in task.labels:
        return task.labels.index(value)
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < len(task.labels):
        return value
    hidden = "; the labels of this set are hidden" if value == -1 else ""
    raise ValueError(f"{where}: field {task.target!r} must be one of {list(task.labels)}, got {value!r}{hidden}")
