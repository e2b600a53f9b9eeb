"""Rows come out the same from every source, and what is wrong with one is named by file, row and field."""

from __future__ import annotations

import dataclasses
import gzip
import json
from pathlib import Path
from typing import Any

import datasets
import pytest

from mixadapters.tasks import get_task
from mixadapters.tasks.sources import Example, NotThere, digest, lookup, read_task, read_texts


def test_splits_and_labels(data: Path) -> None:
    splits = read_task(get_task("imdb"), data)
    assert {s: len(rows) for s, rows in splits.items()} == {"train": 60, "dev": 12, "test": 16}
    assert all(e.target == (e.texts[0][0] in "bdf") for e in splits["train"])


def test_kilt_rows_drop_the_third_label_and_keep_all_answers(data: Path) -> None:
    claims = read_task(get_task("fever"), data)["train"]
    assert len(claims) == 40
    assert {e.target for e in claims} == {0, 1}
    fact = read_task(get_task("trex_slotfilling"), data)["train"][0]
    assert fact.target == tuple(fact.texts[0].split()[:2])


def test_gzip_line_breaks_and_several_files(tmp_path: Path, write) -> None:
    for split in ("train", "dev"):
        write(tmp_path, f"reviews/imdb/{split}", [{"text": "a", "label": "negative"}])
    for part in (1, 2):
        with gzip.open(tmp_path / f"reviews/imdb/test_{part}.jsonl.gz", "wt") as file:
            file.write(json.dumps({"text": f"part<br />{part}\n", "label": 1}))
    assert read_task(get_task("imdb"), tmp_path)["test"] == [Example(("part 1",), 1), Example(("part 2",), 1)]


@pytest.mark.parametrize(
    ("task", "row", "message"),
    [
        ("imdb", {"label": 1}, r"test\.jsonl, row 2: field 'text' must be text, got None"),
        (
            "imdb",
            {"text": "a", "label": "good"},
            r"'label' must be one of \['negative', 'positive'\], got 'good'",
        ),
        ("imdb", {"text": "a", "label": -1}, r"got -1; the labels of this set are hidden"),
        ("imdb", {"text": "a", "label": True}, "got True"),
        ("imdb", ["a"], "row 2: must be an object with named fields"),
        ("trex_slotfilling", {"input": "a", "output": [{"answer": " "}]}, r"field 'output\.\*\.answer' must have an"),
        ("commonsenseqa", {"question": "a", "choices": ["b"], "answer": 0}, "field 'choices' must be a list of two"),
        (
            "commonsenseqa",
            {"question": "a", "choices": ["b", "c"], "answer": 2},
            "number one of 2 choices, got 2",
        ),
        ("stsb", {"sentence1": "a", "sentence2": "b", "score": 5.1}, "must be a number from 0 to 5, got 5.1"),
    ],
)
def test_faulty_row_is_named(data: Path, task: str, row: Any, message: str) -> None:
    definition = get_task(task)
    path = data / f"{definition.local['test']}.jsonl"
    first = path.read_text().splitlines()[0]
    path.write_text(f"{first}\n{json.dumps(row)}\n")
    with pytest.raises(ValueError, match=message):
        read_task(definition, data)


@pytest.mark.parametrize("value", [None, float("nan"), 7, 0.5, True, ["a"], {"a": "b"}, "", "  "])
@pytest.mark.parametrize(("task", "field"), [("imdb", "text"), ("stsb", "sentence2"), ("commonsenseqa", "question")])
@pytest.mark.parametrize("split", ["train", "test"])
def test_what_is_no_text_is_named_by_split_file_row_and_field(data: Path, task: str, field: str, value, split) -> None:
    path = data / f"{get_task(task).local[split]}.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows[2][field] = value
    path.write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(
        ValueError, match=rf"^{split} set, {path}, row 3: field '{field}' must be text, got .*write text"
    ):
        read_task(get_task(task), data)


@pytest.mark.parametrize("task", ["imdb", "commonsenseqa", "trex_slotfilling"])
def test_half_a_surrogate_pair_is_named(data: Path, task: str) -> None:
    path = data / f"{get_task(task).local['train']}.jsonl"
    for field, value in {"imdb": [("text", "a\ud800")], "trex_slotfilling": [("output", [{"answer": "b\udfff"}])],
                         "commonsenseqa": [("question", "\ud8ff"), ("choices", ["a", "b\udc00"])]}[task]:  # fmt: skip
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        rows[1][field] = value
        path.with_name(f"{path.stem}.jsonl").write_text("\n".join(map(json.dumps, rows)))
        with pytest.raises(ValueError, match=rf"row 2: field '{field}.*' has half a surrogate pair at character"):
            read_task(get_task(task), data)
        rows[1][field] = "whole \U0001f600" if field in ("text", "question") else rows[2][field]
        path.write_text("\n".join(map(json.dumps, rows)))
        assert read_task(get_task(task), data)


@pytest.mark.parametrize("answer", [7, 0, True, float("nan"), ["a"], {}])
def test_an_answer_that_is_no_text_is_named(data: Path, answer) -> None:
    path = data / "kilt/trex_slotfilling/dev.jsonl"
    path.write_text(json.dumps({"input": "a", "output": [{"answer": "b"}, {"answer": answer}]}))
    with pytest.raises(ValueError, match=r"dev\.jsonl, row 1: field 'output\.\*\.answer' must be text, got "):
        read_task(get_task("trex_slotfilling"), data)
    # An output with pages alone, as KILT publishes them.
    path.write_text(json.dumps({"input": "a", "output": [{"answer": "b"}, {"answer": None}, {"answer": ""}, {}]}))
    assert read_task(get_task("trex_slotfilling"), data)["dev"] == [Example(("a",), ("b",))]


@pytest.mark.parametrize("empty", ["", "  ", None])
def test_published_questions_may_be_empty_but_not_both(tmp_path: Path, write, empty) -> None:
    rows = [{"question1": "a", "question2": empty, "label": 0}, {"question1": empty, "question2": "b", "label": 1}]
    for split in ("train", "dev"):
        write(tmp_path, f"glue/qqp/{split}", rows)
    assert read_task(get_task("qqp"), tmp_path)["train"] == [Example(("a", ""), 0), Example(("", "b"), 1)]
    write(tmp_path, "glue/qqp/train", [*rows, {"question1": empty, "question2": empty, "label": 0}])
    with pytest.raises(ValueError, match=r"row 3: fields \['question1', 'question2'\] are all without text"):
        read_task(get_task("qqp"), tmp_path)


def test_a_byte_order_mark_and_one_blank_last_line_are_passed_over(tmp_path: Path) -> None:
    line = json.dumps({"text": "a", "label": 1}).encode()
    for split in ("train", "dev", "test"):
        (tmp_path / "reviews/imdb").mkdir(parents=True, exist_ok=True)
        (tmp_path / f"reviews/imdb/{split}.jsonl").write_bytes(b"\xef\xbb\xbf" + line + b"\r\n" + line + b"\n \n")
    assert read_task(get_task("imdb"), tmp_path)["test"] == [Example(("a",), 1)] * 2


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"text": "a", "label": 1}\n\n\n', "row 2: the line is blank, which only the last may be"),
        (b"\n", "has no rows"),
        (b"", "has no rows"),
        (b'{"text": "a", "text": "b", "label": 1}', r"row 1: not JSON \(a field is named twice: "),
        (b'{"text": "a", "label": ' + b"1" * 5000 + b"}", r"row 1: not JSON \("),
        (b"[" * 100_000, r"row 1: not JSON \("),
        ("a".encode("utf-16"), "cannot be read as UTF-8 text"),
    ],
)
def test_a_faulty_file_is_named(data: Path, content: bytes, message: str) -> None:
    (data / "reviews/imdb/dev.jsonl").write_bytes(content)
    with pytest.raises(ValueError, match=rf"dev\.jsonl.*{message}"):
        read_task(get_task("imdb"), data)


def test_a_compressed_file_that_was_cut_or_changed_is_named(data: Path) -> None:
    plain = data / "reviews/imdb/dev.jsonl"
    packed = gzip.compress(plain.read_bytes())
    plain.unlink()
    for content in (packed[:-20], packed[:40] + b"\xff" * 30 + packed[70:], b"no gzip"):
        plain.with_name("dev.jsonl.gz").write_bytes(content)
        with pytest.raises(ValueError, match=r"dev\.jsonl\.gz cannot be read as UTF-8 text"):
            read_task(get_task("imdb"), data)


def test_a_file_that_is_there_twice_is_refused(data: Path) -> None:
    (data / "reviews/imdb/dev.jsonl.gz").write_bytes(gzip.compress((data / "reviews/imdb/dev.jsonl").read_bytes()))
    with pytest.raises(ValueError, match=r"dev\.jsonl is there twice, compressed too"):
        read_task(get_task("imdb"), data)


def test_values_beside_texts_are_words_or_numbers(tmp_path: Path, write) -> None:
    write(tmp_path, "x", [{"text": "a", "label": 3}, {"text": "b", "label": "c"}, {"text": "d", "label": 0.5}])
    assert read_texts(tmp_path, "x", "text", value="label") == [("a", "3"), ("b", "c"), ("d", "0.5")]
    for bad in (True, None, float("nan"), [1]):
        write(tmp_path, "x", [{"text": "a", "label": bad}])
        with pytest.raises(ValueError, match=r"x\.jsonl, row 1: field 'label' must be text, got "):
            read_texts(tmp_path, "x", "text", value="label")


def test_missing_file_and_missing_source_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has no file reviews/imdb/train\*\.jsonl"):
        read_task(get_task("imdb"), tmp_path)
    (tmp_path / "two_a.jsonl").write_text('{"text": "a"}')
    with pytest.raises(NotThere, match=r"has no file two_b\*\.jsonl or .*, no file two_c\*\.jsonl or "):
        read_texts(tmp_path, "two_a two_b two_c", "text")
    with pytest.raises(ValueError, match="task 'rct_like' has no source on the hub; pass --data-dir"):
        read_task(get_task("rct_like"), None)


def test_hub_rows_are_renamed_and_lettered(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load(path: str, name: str | None, split: str) -> datasets.Dataset:
        asked.append((path, name, split))
        choices = {"label": ["A", "B"], "text": ["one", "two"]}
        return datasets.Dataset.from_list([{"question": "why", "choices": choices, "answerKey": "B"}])

    monkeypatch.setattr(datasets, "load_dataset", load)
    splits = read_task(get_task("commonsenseqa"), None)
    assert splits == {s: [Example(("why",), 1, ("one", "two"))] for s in ("train", "test")}
    assert asked == [("tau/commonsense_qa", None, "train"), ("tau/commonsense_qa", None, "validation")]


def test_hub_columns_that_a_task_has_no_use_for_are_not_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    columns = {"question": ["why"], "hint": [""], "choices": [["one", "two"]], "answer": [1],
               "image": [{"bytes": b"none", "path": None}]}  # fmt: skip
    rows = datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image())
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, split: rows)
    assert read_task(get_task("scienceqa"), None)["test"] == [Example(("why", ""), 1, ("one", "two"))]


@pytest.mark.parametrize("name", ["chemprot", "citation_intent"])
def test_hub_sets_that_are_json_lines_have_the_splits_of_the_definition(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write, name: str
) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    task = get_task(name)
    for split in ("train", "dev", "test"):  # files as they are named there
        write(tmp_path / "set", f"{name}_{split}", [{"text": split, "label": task.labels[1], "metadata": {}}])
    there = dataclasses.replace(task, hub={**task.hub, "path": str(tmp_path / "set")})
    assert read_task(there, None) == {s: [Example((s,), 1)] for s in ("train", "dev", "test")}


def test_a_hub_out_of_reach_is_named_with_the_way_around(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_: Any, **__: Any) -> None:
        raise ConnectionError("Couldn't reach it")

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(ValueError, match=r"imdb cannot be loaded from the hub \(Couldn't .*pass --data-dir"):
        read_task(get_task("imdb"), None)


def test_lookup_goes_into_objects_and_lists() -> None:
    row = {"output": [{"answer": "a"}, {"meta": 1}, {"answer": "b"}], "meta": {"x": {"y": 2}}}
    assert lookup(row, "output.*.answer") == ["a", "b"]
    assert lookup(row, "output.2.answer") == "b"
    assert lookup(row, "meta.x.y") == 2
    assert lookup(row, "output.7.answer") is None
    assert lookup(row, "meta.none.y") is None


def test_digest_sees_text_target_and_order() -> None:
    a, b = Example(("a",), 0), Example(("b",), 0)
    assert len({digest(rows) for rows in ([a, b], [b, a], [a], [a, Example(("b",), 1)])}) == 4
