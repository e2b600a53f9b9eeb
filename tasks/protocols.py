"""Which rows train, which select, which test. Every draw is a rule on the rows' content, so that it never changes.

A row's rank under a seed is the SHA-256 of seed and content. No random generator and no order of a source is involved:
the same rows give the same draw in every version of everything. Published sets repeat texts: no text stands in two of
train, dev and test, and few-shot rows are distinct texts.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from mixadapters.tasks.registry import Task
from mixadapters.tasks.sources import Example, digest

VERSION = 2  # of the rule; version 1 drew equal texts more than once, some for train and for dev
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
    shared: int  # rows of train that stand in dev, left out (full data)

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
    train_rows: int | None = None,
) -> Rows:
    """The rows of a run.

    Args:
        shots: K per class for train and K for dev, both out of train (true few-shot: Perez et al., 2021); None: all
            of train, and the task's dev set, or a tenth of train where it has none. A task without classes counts as
            one class.
        shots_from: "published", the package's index files, or "rule", which made them.
        dev_rows, test_rows: at most so many, the same for every seed; None: all.
        train_rows: at most so many of full data, drawn by the seed; None: all.

    Raises:
        ValueError: a split is missing; no published file, or one of other rows, seeds or sizes.
    """
    check_splits(task, splits)
    if shots is not None and shots < 1:
        raise ValueError(f"shots={shots} must be 1 or more; leave it out for full data")
    train, test = splits["train"], splits["test"]
    tested = keys(test)
    clean = [i for i, e in enumerate(train) if e.key not in tested]
    dev = [e for e in splits.get("dev", []) if e.key not in tested]
    leaked = len(train) - len(clean) + len(splits.get("dev", [])) - len(dev)
    if shots is not None:
        if shots_from == "published":
            groups = published(task, train, tested, seed, shots)
        else:
            groups = draw(task, train, clean, seed, shots)
        chosen = [train[i] for group in groups for i in group[0::2][:shots]]
        dev = [train[i] for group in groups for i in group[1::2][:shots]]
        shared = 0
    else:
        chosen, dev, shared = whole(train, clean, dev)
        chosen = chosen if train_rows is None else [chosen[i] for i in ranked(chosen, str(seed))[:train_rows]]
        dev = [dev[i] for i in ranked(dev, "dev")[:dev_rows]]
        shots_from = ""
    if not chosen or not dev:
        raise ValueError(f"task {task.name!r} leaves no rows for train or dev: {len(train)} rows in train")
    test = [test[i] for i in ranked(test, "test")[:test_rows]]
    return Rows(chosen, dev, test, train, shots_from, leaked, shared)


def check_splits(task: Task, splits: dict[str, list[Example]]) -> None:
    """Raises ValueError: there is no train or no test set."""
    for split in ("train", "test"):
        if split not in splits:
            raise ValueError(f"task {task.name!r} has no {split} set")


def keys(examples: Sequence[Example]) -> set[str]:
    """The inputs that stand among rows."""
    return {e.key for e in examples}


def distinct(examples: Sequence[Example], positions: Sequence[int]) -> list[int]:
    """The first position of each input, in the order of `positions`."""
    first: dict[str, int] = {}
    for i in positions:
        first.setdefault(examples[i].key, i)
    return list(first.values())


def whole(
    train: Sequence[Example], clean: Sequence[int], dev: list[Example]
) -> tuple[list[Example], list[Example], int]:
    """Rows of full data: train without the inputs of dev, dev (distinct inputs out of train where there is none), and
    how many rows of train were left out for standing in dev.

    Args:
        clean: positions in train that do not stand in test.
    """
    taken = 0
    if not dev:
        order = ranked(train, "dev", clean)
        dev = [train[i] for i in distinct(train, order)[: round(HELD_OUT * len(order))]]
        taken = len(dev)
    held = keys(dev)
    chosen = [train[i] for i in clean if train[i].key not in held]
    return chosen, dev, len(clean) - len(chosen) - taken


def draw(task: Task, train: Sequence[Example], among: Collection[int], seed: int, shots: int) -> list[list[int]]:
    """For each class up to 2 * shots positions in train: rows for train and for dev in turn.

    An input is drawn once: of equal ones, which may have unlike labels, the first under the seed.
    """
    groups: dict[int, list[int]] = {c: [] for c in range(len(task.labels) or 1)}
    for i in distinct(train, ranked(train, str(seed), among)):
        groups[train[i].target if task.labels else 0].append(i)
    return [group[: 2 * shots] for group in groups.values()]


def published(task: Task, train: Sequence[Example], tested: Collection[str], seed: int, shots: int) -> list[list[int]]:
    """The same from the package's index file. Raises ValueError: it is of other rows, or draws some of `tested`."""
    other = "pass --shots-from rule: the same rule on the rows at hand"
    file = SHOTS / f"{task.name}.json"
    if not file.is_file():
        raise ValueError(f"task {task.name!r} has no published few-shot file; {other}")
    content = json.loads(file.read_text(encoding="utf-8"))
    if (version := content.get("version", 1)) != VERSION:
        raise ValueError(
            f"{file} is drawn by version {version} of the rule, and this is version {VERSION}: version 1 drew equal "
            f"texts for train and for dev; write it anew by `shots {task.name}`, or {other}"
        )
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
    groups: list[list[int]] = content["seeds"][str(seed)]
    if any(train[i].key in tested for group in groups for i in group):
        raise ValueError(
            f"the few-shot file of task {task.name!r} draws rows that stand in this test set, which is another than "
            f"that of the file; {other}"
        )
    return groups


def publish(task: Task, splits: dict[str, list[Example]], folder: Path = SHOTS) -> Path:
    """Write the index file of a task's training rows. Raises ValueError: the task has no train or no test set."""
    check_splits(task, splits)
    train, tested = splits["train"], keys(splits["test"])
    clean = [i for i, e in enumerate(train) if e.key not in tested]
    seeds = {str(seed): draw(task, train, clean, seed, PUBLISHED) for seed in SEEDS}
    content = {
        "task": task.name, "version": VERSION, "rows": len(train), "digest": digest(train), "shots": PUBLISHED,
        "seeds": seeds,
    }  # fmt: skip
    file = folder / f"{task.name}.json"
    lines = json.dumps(content, separators=(",", ":")).replace(']],"', ']],\n"')  # a line for each seed
    file.write_text(f"{lines}\n", encoding="utf-8")
    return file
