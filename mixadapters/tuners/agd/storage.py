"""The files of a record: an index, and shards, each written whole or not at all."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from mixadapters.core.folders import written_aside

FORMAT_VERSION = 1
INDEX = "index.json"
LONGEST_INDEX = 2**24  # bytes; those that are written have some thousand
PARTS = ("sample", "target", "timestep", "guidance_scale")
# What tells models apart, and what indices of version 1 lacked at first.
IDENTITY = ("model_digest", "model_says")
LATER = frozenset({*IDENTITY, "trajectories", "model_class", "model_dtypes", "unconditional_varies"})


class CutIndex(ValueError):
    """An index that is no JSON."""


def write_whole(file: Path, write: Callable[[Path], Any]) -> None:
    """`write(aside)`, then `file` at once: who is killed leaves no half of a file, and two writers do not mix."""
    try:
        with written_aside(file) as aside:
            write(aside)
    except FileNotFoundError:  # another process has written the same, and swept
        if not file.exists():
            raise
    for left in file.parent.glob(f".{file.name}.*.part"):  # of processes that were killed
        left.unlink(missing_ok=True)


def digest_of(facts: dict[str, Any]) -> str:
    """What every shard of a record says of the record it belongs to."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def shard_file(folder: Path, number: int) -> Path:
    return folder / f"{number:05d}.safetensors"


def write_shard(file: Path, shard: dict[str, Tensor], facts: dict[str, Any]) -> None:
    # `save_file` writes beside `aside` first, under a name that nobody would sweep.
    content = save(shard, metadata={"record": digest_of(facts)})
    write_whole(file, lambda aside: aside.write_bytes(content))


def shard_stands(file: Path, facts: dict[str, Any]) -> bool:
    """Whether a shard is there and whole; one that is cut or empty is to be recorded again.

    Raises:
        ValueError: it belongs to another record.
    """
    if not file.exists():
        return False
    try:
        with safe_open(file, "pt") as opened:
            record = (opened.metadata() or {}).get("record")
    except (SafetensorError, OSError) as error:
        warnings.warn(f"{file} is not whole ({error}); it is recorded again", stacklevel=3)
        return False
    if record not in (None, digest_of(facts)):  # None: of an earlier version
        raise ValueError(f"{file} belongs to another record than its index; give another folder")
    return True


def claim(folder: Path, facts: dict[str, Any], shards: int) -> dict[str, Any]:
    """Make `folder` the record of these facts, or go on with one that has begun; its facts, as they are stored.

    Raises:
        ValueError: it holds other files, a record that was made otherwise, or an unfinished one that does not say by
            which model.
    """
    index = folder / INDEX
    folder.mkdir(parents=True, exist_ok=True)
    others = [p for p in folder.iterdir() if p != index and not p.name.endswith(".part")]
    before = _begun(index) if index.exists() else None
    if before is None:
        ours = {shard_file(folder, n) for n in range(shards)}
        if not all(p in ours and _says(p) == digest_of(facts) for p in others):
            raise ValueError(
                f"folder={str(folder)!r} holds other files{' and a cut index' if index.exists() else ''}; give an "
                "empty one for the record"
            )
        if index.exists():
            warnings.warn(f"{index} was cut; it is written again, and the record goes on", stacklevel=3)
        write_whole(index, lambda aside: aside.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8"))
        return facts
    names = {**before, **facts}
    differs = [n for n in names if not (n in LATER and n not in before) and not _same(n, before.get(n), facts.get(n))]
    if differs:
        raise ValueError(
            f"folder={str(folder)!r} holds a record with other {differs}: {[before.get(k) for k in differs]}, now "
            f"{[facts.get(k) for k in differs]}; give another folder"
        )
    if not any(n in before for n in IDENTITY) and not all(shard_file(folder, n).exists() for n in range(shards)):
        raise ValueError(
            f"folder={str(folder)!r} holds an unfinished record of an earlier version, which does not say by which "
            "model; read what is there by Trajectories.open, or give another folder"
        )
    return before


def _begun(index: Path) -> dict[str, Any] | None:
    """The facts of an index; None where it was cut."""
    try:
        return read_index(index)
    except CutIndex:
        return None


def _says(file: Path) -> str | None:
    """To which record a file says that it belongs; a cut one of ours says nothing, and is no other file."""
    try:
        with safe_open(file, "pt") as opened:
            return (opened.metadata() or {}).get("record")
    except (SafetensorError, OSError):
        return None


def _same(name: str, before: Any, now: Any) -> bool:
    if name == "model_says" and before is not None and now is not None:
        return len(before) == len(now) and all(
            abs(a - b) <= 1e-3 * (1 + abs(a)) for a, b in zip(before, now, strict=True)
        )
    return bool(before == now)


def read_index(index: Path) -> dict[str, Any]:
    """The facts of a record.

    Raises:
        ValueError: no facts, or of a newer version (CutIndex: no JSON).
    """
    if index.stat().st_size > LONGEST_INDEX:
        raise ValueError(f"{index} has {index.stat().st_size} bytes; an index has at most {LONGEST_INDEX}")
    try:
        facts = json.loads(index.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # JSON and Unicode errors
        raise CutIndex(f"{index} is no JSON ({error}); record() with the same arguments writes it again") from error
    version = facts.get("format_version") if isinstance(facts, dict) else None
    if type(version) is not int or not isinstance(facts.get("plan"), dict):
        raise ValueError(f"{index} is no index of a record: it lacks format_version or plan")
    if version > FORMAT_VERSION:
        raise ValueError(f"{index}: format_version={version} is newer than this mixadapters reads ({FORMAT_VERSION})")
    return facts


def _fits(name: str, value: Tensor, rows: int) -> bool:
    """Whether a tensor of a shard is a part of so many trajectories (rows, steps, ...), or a condition (rows, ...)."""
    if name not in PARTS:
        return name.startswith(("condition.", "unconditional.")) and value.dim() > 0 and len(value) == rows
    real = not value.is_complex() and value.dtype != torch.bool
    return real and (value.dim() > 2) == (name in ("sample", "target"))


def read_shards(folder: Path, facts: dict[str, Any]) -> list[dict[str, Tensor]]:
    """The whole shards of a record, mapped into memory; says which are not there.

    Raises:
        ValueError: a shard that belongs to another record, or is none.
    """
    first: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    found, left_out = [], []
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(file, "pt") as opened:
                record = (opened.metadata() or {}).get("record")
            shard = load_file(file)
        except (SafetensorError, OSError) as error:
            left_out.append(f"{file.name} ({error})")
            continue
        if record not in (None, digest_of(facts)):
            raise ValueError(f"{file} belongs to another record than {INDEX}")
        shapes = {name: tuple(shard[name].shape[:2]) if name in shard else None for name in PARTS}
        if None in shapes.values() or len(set(shapes.values())) != 1 or shard["timestep"].dim() != 2:
            raise ValueError(f"{file} is no shard of a record: its parts are {shapes}")
        if odd := [name for name, value in shard.items() if not _fits(name, value, len(shard["timestep"]))]:
            raise ValueError(f"{file} is no shard of a record: {odd[0]!r} is {tuple(shard[odd[0]].shape)}")
        forms = {name: (value.dtype, tuple(value.shape[1:])) for name, value in shard.items()}
        first = first or forms
        if differ := sorted(name for name, _ in forms.items() ^ first.items()):
            raise ValueError(f"{file} is of another record than the other shards: {differ[0]!r} is otherwise there")
        found.append(shard)
    rows = sum(len(shard["timestep"]) for shard in found)
    expected = facts.get("trajectories", rows)
    if left_out or rows != expected:
        warnings.warn(
            f"the record in {folder} is not whole: {rows} of {expected if not left_out else 'its'} trajectories can "
            f"be read{f', and these files cannot: {left_out}' if left_out else ''}; record() with the same arguments "
            "goes on with it",
            stacklevel=4,
        )
    return found
