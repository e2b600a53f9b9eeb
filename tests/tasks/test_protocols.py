"""Draws depend on the rows alone, rows of test never train or select, and published files are what the rule gives."""

from __future__ import annotations

import json
import random
from collections import Counter
from dataclasses import replace

import pytest

from mixadapters.tasks import TASKS, get_task, protocols
from mixadapters.tasks.protocols import SHOTS, draw, publish, ranked, select
from mixadapters.tasks.sources import Example, read_task

IMDB = get_task("imdb")
RULE = [7, 0, 2, 4, 6, 8, 5, 3, 9, 1]  # of ten examples under seed 0


def examples(count: int, start: int = 0) -> list[Example]:
    return [Example((f"text {i}",), i % 2) for i in range(start, start + count)]


@pytest.fixture
def splits() -> dict[str, list[Example]]:
    return {"train": examples(80), "dev": examples(10, 100), "test": examples(20, 200)}


def test_shots_are_balanced_disjoint_and_from_train(splits) -> None:
    rows = select(IMDB, splits, seed=3, shots=5, shots_from="rule")
    assert Counter(e.target for e in rows.train) == Counter(e.target for e in rows.dev) == {0: 5, 1: 5}
    assert not {e.key for e in rows.train} & {e.key for e in rows.dev}
    assert {e.key for e in [*rows.train, *rows.dev]} <= {e.key for e in splits["train"]}


def test_draws_do_not_depend_on_the_order_of_the_source(splits) -> None:
    mixed = {s: random.Random(1).sample(rows, len(rows)) for s, rows in splits.items()}
    for shots in (None, 4):
        a, b = (select(IMDB, s, 0, shots, "rule", dev_rows=5, test_rows=7) for s in (splits, mixed))
        assert {e.key for e in a.train} == {e.key for e in b.train}
        assert (a.dev, a.test) == (b.dev, b.test) if shots is None else a.test == b.test


def test_seeds_draw_other_rows_and_more_shots_keep_fewer(splits) -> None:
    few, more, other = (select(IMDB, splits, s, k, "rule").train for s, k in ((0, 4), (0, 8), (1, 4)))
    assert {e.key for e in few} < {e.key for e in more}
    assert {e.key for e in few} != {e.key for e in other}


def test_test_rows_are_the_same_for_all_seeds(splits) -> None:
    assert select(IMDB, splits, 0, 4, "rule", test_rows=6).test == select(IMDB, splits, 1, None, test_rows=6).test


def test_rows_of_test_never_train_or_select(splits) -> None:
    splits["train"] += splits["test"][:3]
    splits["dev"] += splits["test"][3:5]
    tested = {e.key for e in splits["test"]}
    for shots in (None, 100):
        rows = select(IMDB, splits, 0, shots, "rule")
        assert rows.leaked == 5
        assert not tested & {e.key for e in [*rows.train, *rows.dev]}


def test_a_rare_class_is_shared_between_train_and_dev(splits) -> None:
    splits["train"] = [e for e in splits["train"] if e.target == 0] + [Example((f"rare {i}",), 1) for i in range(3)]
    rows = select(IMDB, splits, 0, 16, "rule")
    assert Counter(e.target for e in rows.train) == {0: 16, 1: 2}
    assert Counter(e.target for e in rows.dev) == {0: 16, 1: 1}


def test_dev_comes_out_of_train_where_a_task_has_none(splits) -> None:
    del splits["dev"]
    rows = select(IMDB, splits, 0, None)
    assert (len(rows.train), len(rows.dev)) == (72, 8)
    assert not {e.key for e in rows.train} & {e.key for e in rows.dev}
    assert select(IMDB, splits, 5, None).dev == rows.dev  # the same for every seed


def test_scores_are_no_classes() -> None:
    rows = {s: [Example((f"{s} {i}",), i / 10) for i in range(20)] for s in ("train", "test")}
    assert len(select(get_task("stsb"), rows, 0, 4, "rule").train) == 4


def test_published_file_gives_what_the_rule_gives(splits, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(protocols, "SHOTS", tmp_path)
    publish(IMDB, splits, tmp_path)
    for seed in (0, 4):
        by_rule = select(IMDB, splits, seed, 7, "rule")
        assert select(IMDB, splits, seed, 7) == replace(by_rule, shots_from="published")
    with pytest.raises(ValueError, match="not seed 9 and 7; pass --shots-from rule"):
        select(IMDB, splits, 9, 7)
    with pytest.raises(ValueError, match="has seeds 0, 1, 2, 3, 4 and 64 rows per class, not seed 0 and 65"):
        select(IMDB, splits, 0, 65)
    splits["train"][0] = Example(("other",), 0)
    with pytest.raises(ValueError, match=r"is for 80 training rows with digest .*; these are 80 with digest"):
        select(IMDB, splits, 0, 7)


def test_without_a_published_file_the_rule_is_named(splits, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(protocols, "SHOTS", tmp_path)
    with pytest.raises(ValueError, match="task 'imdb' has no published few-shot file; pass --shots-from rule"):
        select(IMDB, splits, 0, 7)


@pytest.mark.parametrize("shots", [1, 3, 16])
def test_no_text_is_drawn_twice(splits, shots) -> None:
    twins = [Example((f"twin {i % 7}",), label) for i in range(40) for label in (0, 1)]  # with unlike labels
    splits["train"] = [*twins, *examples(30), *examples(6, 200)]  # the last six stand in test
    for seed in range(20):
        rows = select(IMDB, splits, seed, shots, "rule")
        drawn = [e.key for e in [*rows.train, *rows.dev]]
        assert len(set(drawn)) == len(drawn)
        assert not set(drawn) & {e.key for e in rows.test}
        if shots < 8:  # a class has 15 texts of its own
            assert Counter(e.target for e in rows.train) == Counter(e.target for e in rows.dev) == {0: shots, 1: shots}


def test_texts_that_differ_by_blanks_are_one(tmp_path, write) -> None:
    for split, texts in (("train", ["a  b", "a b ", "c", "d<br />e", "d e"]), ("test", ["f", "c\t"])):
        write(tmp_path, f"reviews/imdb/{split}", [{"text": t, "label": i % 2} for i, t in enumerate(texts)])
    write(tmp_path, "reviews/imdb/dev", [{"text": "d e", "label": 0}])
    rows = select(IMDB, read_task(IMDB, tmp_path), 0, None)
    assert [e.key for e in rows.train] == ["a b", "a b"]  # what a published set repeats in train stays
    assert (rows.leaked, rows.shared) == (1, 2)


def test_some_rows_of_train_are_drawn_by_the_seed(splits) -> None:
    all_rows, some, others = (
        select(IMDB, splits, seed, None, train_rows=n) for seed, n in ((0, None), (0, 9), (1, 9))
    )
    assert len(some.train) == len(others.train) == 9
    assert some.train != others.train
    assert {e.key for e in some.train} < {e.key for e in all_rows.train}
    assert (some.dev, some.test) == (others.dev, others.test) == (all_rows.dev, all_rows.test)
    assert select(IMDB, splits, 0, None, train_rows=9).train == some.train


def test_rows_of_dev_never_train(splits) -> None:
    splits["train"] += [splits["dev"][0], Example(splits["dev"][1].texts, 1 - splits["dev"][1].target)]
    rows = select(IMDB, splits, 0, None, dev_rows=3)
    assert not {e.key for e in splits["dev"]} & {e.key for e in rows.train}  # also those beyond dev_rows
    assert (rows.shared, rows.leaked, len(rows.train)) == (2, 0, 80)


def test_dev_out_of_train_takes_every_copy_of_a_text(splits) -> None:
    del splits["dev"]
    splits["train"] = [Example((f"text {i % 15}",), i % 2) for i in range(80)]
    rows = select(IMDB, splits, 0, None)
    held = [e.key for e in rows.dev]
    assert len(set(held)) == len(held) == 8
    assert not set(held) & {e.key for e in rows.train}
    assert len(rows.train) + len(rows.dev) + rows.shared == 80


def test_a_published_file_of_the_old_rule_is_refused(splits, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(protocols, "SHOTS", tmp_path)
    file = publish(IMDB, splits, tmp_path)
    content = json.loads(file.read_text())
    del content["version"]
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"version 1 of the rule.*drew equal texts.*`shots imdb`.*--shots-from rule"):
        select(IMDB, splits, 0, 7)


def test_a_published_file_never_draws_from_another_test_set(splits, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(protocols, "SHOTS", tmp_path)
    publish(IMDB, splits, tmp_path)
    splits["test"] = [*splits["test"], *select(IMDB, splits, 0, 7).dev[:1]]
    with pytest.raises(ValueError, match="draws rows that stand in this test set"):
        select(IMDB, splits, 0, 7)


@pytest.mark.parametrize("file", sorted(SHOTS.glob("*.json")), ids=lambda f: f.stem)
def test_published_files_are_whole(file) -> None:
    content = json.loads(file.read_text())
    task = TASKS[content["task"]]
    assert file.stem == task.name
    assert content["version"] == protocols.VERSION
    assert list(content["seeds"]) == ["0", "1", "2", "3", "4"]
    for groups in content["seeds"].values():
        drawn = [i for group in groups for i in group]
        assert len(groups) == (len(task.labels) or 1)
        assert all(len(group) <= 2 * content["shots"] for group in groups)
        assert len(set(drawn)) == len(drawn)
        assert set(drawn) <= set(range(content["rows"]))
    assert len({json.dumps(groups) for groups in content["seeds"].values()}) == 5


def test_the_rule_itself_never_changes() -> None:
    # Positions once drawn: whoever has run on them must get them again.
    assert ranked(examples(10), "0") == RULE
    assert draw(IMDB, examples(10), range(10), 0, 2) == [
        [i for i in RULE if i % 2 == 0][:4],
        [i for i in RULE if i % 2 == 1][:4],
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [({"shots": 0}, "shots=0 must be 1 or more"), ({"drop": "test"}, "task 'imdb' has no test set")],
)
def test_what_cannot_be_drawn_is_refused(splits, change, message) -> None:
    splits.pop(change.get("drop", ""), None)
    with pytest.raises(ValueError, match=message):
        select(IMDB, splits, 0, change.get("shots", 4), "rule")
