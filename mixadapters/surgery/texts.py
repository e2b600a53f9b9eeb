"""Files of texts, with labels or without: what the command line of surgery reads."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from mixadapters.core.columns import check_characters
from mixadapters.core.json_text import parse_json

LONGEST = 1 << 20  # bytes of a line
MOST_LABELS = 256
KINDS = (".txt", ".jsonl", ".txt.gz", ".jsonl.gz")


@dataclass(frozen=True)
class Texts:
    """What was read of a file."""

    texts: list[str]
    labels: list[str] | None  # one for each text
    left_out: int  # texts beyond the limit


def read_texts(path: str | Path, limit: int, text_field: str = "text", label_field: str = "label") -> Texts:
    """The first texts of each label: one to a line of a .txt, or in the field of a line's object of a .jsonl.

    Both may be gzipped. Empty lines and empty texts are passed over.

    Args:
        limit: texts of each label, or of all where there are none.
        label_field: of a .jsonl; all lines have it, or none.

    Raises:
        ValueError: no such file, another kind of file, or a line that is not as it should be: it is named.
    """
    path = Path(path)
    if not path.name.endswith(KINDS):
        raise ValueError(f"{str(path)!r} is no file of texts: its name must end in {', '.join(KINDS)}")
    if limit < 1:
        raise ValueError(f"limit={limit} must be 1 or more")
    rows = _rows(path) if ".jsonl" not in path.name else _objects(path, text_field, label_field)
    kept: list[tuple[str, str | None]] = []
    counts: dict[str | None, int] = {}
    total = 0
    for where, text, label in rows:
        if not text.strip():
            continue
        if kept and (label is None) is not (kept[0][1] is None):
            raise ValueError(f"{where}: some lines have a field {label_field!r}, and some have none")
        total += 1
        counts[label] = counts.get(label, 0) + 1
        if len(counts) > MOST_LABELS:
            raise ValueError(f"{where}: more than {MOST_LABELS} different labels in the field {label_field!r}")
        if counts[label] <= limit:
            kept.append((text, label))
    if not kept:
        raise ValueError(f"{str(path)!r} holds no text")
    texts, labels = zip(*kept, strict=True)
    return Texts(list(texts), None if labels[0] is None else [str(label) for label in labels], total - len(kept))


def _lines(path: Path) -> Iterator[tuple[str, str]]:
    """(where, line) of each line, none of which is longer than `LONGEST`."""
    number = 0
    try:
        with _open(path) as file:
            while line := file.readline(LONGEST + 1):
                number += 1
                where = f"{path}, line {number}"
                if len(line) > LONGEST:
                    raise ValueError(f"{where} is longer than {LONGEST:,} bytes")
                yield where, line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}, line {number}, is no UTF-8: {error.reason}") from None
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{str(path)!r} cannot be read: {error}") from None


def _open(path: Path) -> IO[bytes]:
    return gzip.open(path, "rb") if path.name.endswith(".gz") else path.open("rb")  # type: ignore[return-value]


def _rows(path: Path) -> Iterator[tuple[str, str, None]]:
    for where, line in _lines(path):
        yield where, line, None


def _objects(path: Path, text_field: str, label_field: str) -> Iterator[tuple[str, str, str | None]]:
    for where, line in _lines(path):
        if not line.strip():
            continue
        try:
            row: Any = parse_json(line)
        except ValueError as error:
            raise ValueError(f"{where} is no JSON: {error}") from None
        if not isinstance(row, dict) or not isinstance(row.get(text_field), str):
            have = f"; it has {sorted(row)[:10]}" if isinstance(row, dict) else ""
            raise ValueError(f"{where} has no text in a field {text_field!r}{have}: name the field by --text-field")
        label = row.get(label_field)
        check_characters(where, text_field, row[text_field])
        if label is not None and (not isinstance(label, (str, int)) or isinstance(label, bool)):
            raise ValueError(f"{where}: the field {label_field!r} is {label!r:.60}, no word and no number")
        yield where, row[text_field], None if label is None else str(label)
