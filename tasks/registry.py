"""What a task is. The tasks themselves are data: `definitions/*.yaml`, one file per family."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from mixadapters.core.registry import nearest

KINDS = ("classification", "regression", "choice", "generation")
SPLITS = ("train", "dev", "test")


@dataclass(frozen=True)
class Task:
    """One task. `columns`, `target` and `choices` name fields of a row; a dot goes into one, `*` into all of a list.

    A task without a dev set gets one out of train. What is selected is never selected on test.
    """

    name: str
    family: str
    kind: str  # one of KINDS
    columns: tuple[str, ...]  # the texts of a row
    target: str  # label, score, number of the right choice, or accepted answers
    metrics: tuple[str, ...]  # names in metrics.METRICS, the main one first; more is better
    labels: tuple[str, ...] = ()  # in the order of a source that numbers them
    words: tuple[str, ...] = ()  # what a decoder says for each label; default: the label
    choices: str = ""  # field with the answers to choose from
    bounds: tuple[float, float] = (0.0, 1.0)  # of a score
    optional: tuple[str, ...] = ()  # columns that may be empty
    template: str = ""  # a decoder's prompt, `{column}` for each column; default: the columns, one per line
    drop: Mapping[str, str] = field(default_factory=dict)  # field -> value of rows to leave out
    local: Mapping[str, str] = field(default_factory=dict)  # split -> beginnings of file names under --data-dir
    local_where: Mapping[str, Mapping[str, str]] = field(default_factory=dict)  # split -> field -> value to keep
    hub: Mapping[str, Any] = field(default_factory=dict)  # path, name, split -> split there, rename: ours -> theirs
    domain: str = ""  # of its text: which unlabelled set stage 1 reads

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"task {self.name!r}: kind={self.kind!r} must be one of {KINDS}")
        if self.kind == "classification" and len(self.labels) < 2:
            raise ValueError(f"task {self.name!r}: labels={self.labels} must have two or more")
        if self.words and len(self.words) != len(self.labels):
            raise ValueError(f"task {self.name!r}: words={self.words} must have one for each of labels={self.labels}")
        if (self.kind == "choice") != bool(self.choices):
            raise ValueError(f"task {self.name!r}: choices={self.choices!r} does not fit kind={self.kind!r}")

    @property
    def said(self) -> tuple[str, ...]:
        """What a decoder says for each label."""
        return self.words or tuple(label.lower() for label in self.labels)

    def prompt(self, texts: tuple[str, ...]) -> str:
        """The prompt for a decoder from the texts of a row."""
        template = self.template or "\n".join(f"{{{c}}}" for c in self.columns)
        return template.format(**dict(zip(self.columns, texts, strict=True))).strip()


def read_definitions(folder: Path) -> dict[str, Task]:
    """The tasks of every YAML file in a folder. Raises ValueError: unknown field, or a name given twice."""
    tasks: dict[str, Task] = {}
    known = {f.name for f in fields(Task)}
    for file in sorted(folder.glob("*.yaml")):
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
        defaults = content.get("defaults", {})
        for name, own in content["tasks"].items():
            # An empty hub says that there is none; otherwise a task completes its family's.
            hub = {**defaults.get("hub", {}), **own.get("hub", {})} if own.get("hub", True) else {}
            given = {**defaults, **own, "hub": hub}
            for key in given:
                if key not in known:
                    raise ValueError(f"{file}, task {name!r}: no field {key!r}.{nearest(key, known)}")
            if name in tasks:
                raise ValueError(f"{file}: task {name!r} is also in family {tasks[name].family!r}")
            lists: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in given.items()}
            tasks[name] = Task(name=name, family=file.stem, **lists)
    return tasks


TASKS = read_definitions(Path(__file__).parent / "definitions")


def get_task(name: str) -> Task:
    """Raises ValueError: no task has the name."""
    if name not in TASKS:
        raise ValueError(f"task {name!r} is unknown; have {', '.join(TASKS)}.{nearest(name, TASKS)}")
    return TASKS[name]
