"""Which rows train, which select, which test. Every draw is a rule on the rows' content, so that it never changes.

A row's rank under a seed is the SHA-256 of seed and content. No random generator and no order of a source is involved:
the same rows give the same draw in every version of everything.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from mixadapters.tasks.registry import Task
from mixadapters.tasks.sources import Example, digest

SHOTS = Path(__file__).parent / "shots"
PUBLISHED = 64  # rows per class for train, and as many for dev, in the published files
SEEDS = range(5)  # those of the published files
HELD_OUT = 0.1  # of train becomes dev where a task has none


@dataclass(frozen=True)
class Rows:
    """The rows of one run, what was left out of train, and fingerprints of all."""

    train: list[Example]
    dev: list[Example]
    test: list[Example]
    known: list[Example]  # all of train
    shots_from: str  # "published" or "rule"; "" for full data
    leaked: int  # rows of train or dev that stand in test, left out

    @property
    def digests(self) -> dict[str, str]:
        return {split: digest(getattr(self, split)) for split in ("train", "dev", "test")}


def ranked(examples: Sequence[Example], seed: str, among: Collection[int] | None = None) -> list[int]:
    """Positions of rows in the order of their rank under a seed; equal rows keep their order."""
    positions = range(len(examples)) if among is None else among

    def rank(i: int) -> bytes:
        return hashlib.sha256(f"{seed}\x1f{examples[i].key}\x1f{examples[i].target}".encode()).digest()

    return sorted(positions, key=rank)


def select(
    task: Task,
    splits: dict[str, list[Example]],
    seed: int,
    shots: int | None,
    shots_from: str = "published",
    dev_rows: int = 1000,
    test_rows: int | None = None,
) -> Rows:
    """The rows of a run.

    Args:
        shots: K per class for train and K for dev, both out of train (true few-shot: Perez et al., 2021); None: all
            of train, and the task's dev set, or a tenth of train where it has none. A task without classes counts as
            one class.
        shots_from: "published", the package's index files, or "rule", which made them.
        dev_rows, test_rows: at most so many, the same for every seed; None: all.

    Raises:
        ValueError: a split is missing; no published file, or one of other rows, seeds or sizes.
    """
    for split in ("train", "test"):
        if split not in splits:
            raise ValueError(f"task {task.name!r} has no {split} set")
    train, test = splits["train"], splits["test"]
    tested = {e.key for e in test}
    clean = [i for i, e in enumerate(train) if e.key not in tested]
    dev = [e for e in splits.get("dev", []) if e.key not in tested]
    leaked = len(train) - len(clean) + len(splits.get("dev", [])) - len(dev)
    if shots is not None:
        if shots < 1:
            raise ValueError(f"shots={shots} must be 1 or more; leave it out for full data")
        groups = (
            published(task, train, seed, shots) if shots_from == "published" else draw(task, train, clean, seed, shots)
        )
        chosen = [train[i] for group in groups for i in group[0::2][:shots]]
        dev = [train[i] for group in groups for i in group[1::2][:shots]]
    else:
        order = ranked(train, "dev", clean)
        held = 0 if dev else round(HELD_OUT * len(order))
        dev = dev or [train[i] for i in order[:held]]
        chosen = [train[i] for i in sorted(order[held:])]
        dev = [dev[i] for i in ranked(dev, "dev")[:dev_rows]]
        shots_from = ""
    if not chosen or not dev:
        raise ValueError(f"task {task.name!r} leaves no rows for train or dev: {len(train)} rows in train")
    test = [test[i] for i in ranked(test, "test")[:test_rows]]
    return Rows(chosen, dev, test, train, shots_from, leaked)


def draw(task: Task, train: Sequence[Example], among: Collection[int], seed: int, shots: int) -> list[list[int]]:
    """For each class up to 2 * shots positions in train: rows for train and for dev in turn."""
    groups: dict[int, list[int]] = {c: [] for c in range(len(task.labels) or 1)}
    for i in ranked(train, str(seed), among):
        groups[train[i].target if task.labels else 0].append(i)
    return [group[: 2 * shots] for group in groups.values()]


def published(task: Task, train: Sequence[Example], seed: int, shots: int) -> list[list[int]]:
    """The same from the package's index file."""
    other = "pass --shots-from rule: the same rule on the rows at hand"
    file = SHOTS / f"{task.name}.json"
    if not file.is_file():
        raise ValueError(f"task {task.name!r} has no published few-shot file; {other}")
    content = json.loads(file.read_text(encoding="utf-8"))
    if content["digest"] != (found := digest(train)):
        raise ValueError(
            f"the few-shot file of task {task.name!r} is for {content['rows']} training rows with digest "
            f"{content['digest']}; these are {len(train)} with digest {found}; {other}"
        )
    if str(seed) not in content["seeds"] or shots > content["shots"]:
        raise ValueError(
            f"the few-shot file of task {task.name!r} has seeds {', '.join(content['seeds'])} and {content['shots']} "
            f"rows per class, not seed {seed} and {shots}; {other}"
        )
    return content["seeds"][str(seed)]


def publish(task: Task, splits: dict[str, list[Example]], folder: Path = SHOTS) -> Path:
    """Write the index file of a task's training rows."""
    train, tested = splits["train"], {e.key for e in splits["test"]}
    clean = [i for i, e in enumerate(train) if e.key not in tested]
    seeds = {str(seed): draw(task, train, clean, seed, PUBLISHED) for seed in SEEDS}
    content = {"task": task.name, "rows": len(train), "digest": digest(train), "shots": PUBLISHED, "seeds": seeds}
    file = folder / f"{task.name}.json"
    lines = json.dumps(content, separators=(",", ":")).replace(']],"', ']],\n"')  # a line for each seed
    file.write_text(f"{lines}\n", encoding="utf-8")
    return file
