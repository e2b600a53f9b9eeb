"""Definitions are data: complete, checked when read, and one name each."""

from __future__ import annotations

from pathlib import Path
from string import Formatter

import pytest

from mixadapters.tasks import TASKS, get_task
from mixadapters.tasks.domains import UNLABELLED
from mixadapters.tasks.metrics import ANSWERS, METRICS
from mixadapters.tasks.registry import read_definitions

GLUE = {"cola", "sst2", "mrpc", "stsb", "mnli", "qnli", "rte", "wnli", "qqp", "ax"}
OTHERS = {
    "chemprot", "rct", "imdb", "amazon_helpfulness", "csabstruct", "citation_intent", "sentiment", "fever",
    "trex_slotfilling", "zero_shot_re", "nq_open", "wow", "eli5", "commonsenseqa", "scienceqa",
}  # fmt: skip


def test_every_named_family_is_there() -> None:
    assert set(TASKS) >= GLUE | OTHERS


@pytest.mark.parametrize("task", TASKS.values(), ids=str)
def test_definition_is_complete(task) -> None:
    assert set(task.metrics) <= set(ANSWERS if task.kind == "generation" else METRICS)
    assert {"train", "test"} <= set(task.local) or {"train", "test"} <= set(task.hub)
    assert {name for _, name, _, _ in Formatter().parse(task.template) if name} <= set(task.columns)
    assert task.domain in ("", *UNLABELLED)
    assert task.prompt(tuple(f"text of {c}" for c in task.columns))
    assert len(set(task.said)) == len(task.labels)


def test_unknown_task_names_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"task 'chemprott' is unknown; .* Did you mean 'chemprot'\?"):
        get_task("chemprott")


@pytest.mark.parametrize(
    ("definition", "message"),
    [
        ("tasks: {a: {kind: choice, columns: [q], target: t, metrics: [accuracy], colour: red}}", "no field 'colour'"),
        ("tasks: {a: {kind: rank, columns: [q], target: t, metrics: [accuracy]}}", "kind='rank' must be one of"),
        ("tasks: {a: {kind: classification, columns: [q], target: t, metrics: []}}", r"labels=\(\) must have two"),
        ("tasks: {a: {kind: choice, columns: [q], target: t, metrics: []}}", "choices='' does not fit kind='choice'"),
    ],
)
def test_faulty_definition_is_refused(tmp_path: Path, definition: str, message: str) -> None:
    (tmp_path / "mine.yaml").write_text(definition)
    with pytest.raises(ValueError, match=message):
        read_definitions(tmp_path)


def test_a_name_in_two_families_is_refused(tmp_path: Path) -> None:
    for family in ("one", "two"):
        (tmp_path / f"{family}.yaml").write_text(
            "tasks: {a: {kind: generation, columns: [q], target: t, metrics: []}}"
        )
    with pytest.raises(ValueError, match="task 'a' is also in family 'one'"):
        read_definitions(tmp_path)
