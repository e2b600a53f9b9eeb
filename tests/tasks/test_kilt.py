"""KILT's measures on cases computed by hand."""

from __future__ import annotations

from pathlib import Path

import pytest

from mixadapters.tasks import kilt


def test_normalization() -> None:
    assert kilt.normalize("  The U.S.  Navy, a  force!") == "us navy force"


@pytest.mark.parametrize(
    ("measure", "said", "right", "expected"),
    [
        ("accuracy", "Paris ", "Paris", 1),
        ("accuracy", "paris", "Paris", 0),  # strict: case counts
        ("exact_match", "the paris.", "Paris", 1),
        ("exact_match", "Paris France", "Paris", 0),
        # Two of three words said, two of two right: 2 * 2 / (3 + 2).
        ("token_f1", "the old town hall", "town hall", 0.8),
        ("token_f1", "red red", "red", 2 / 3),  # a word counts as often as it stands
        ("token_f1", "red", "blue", 0),
        # "police the" is the longest common subsequence: 2 of 4 and 2 of 4 words.
        ("rouge_l", "police kill the gunman", "police the killed gunmen", 0.5),
        # "w1 w2" with the first sentence, "w1 w3 w5" with the second: 4 of 5; 8 different words are said.
        ("rouge_l", "w1 w2 w6 w7 w8.w1 w3 w8 w9 w5", "w1 w2 w3 w4 w5", 2 * 0.8 * 0.5 / 1.3),
        ("rouge_l", "", "a", 0),
    ],
)
def test_measures(measure: str, said: str, right: str, expected: float) -> None:
    assert getattr(kilt, measure)(said, right) == pytest.approx(expected)


def test_the_answer_that_fits_best_counts() -> None:
    assert kilt.best(kilt.token_f1, "town hall", ["house", "hall"]) == pytest.approx(2 / 3)


def test_r_precision_is_the_best_set_among_as_many_pages() -> None:
    sets = [{"1", "2"}, {"7"}]
    assert kilt.r_precision(["1", "1", "3", "2"], sets) == 0.5  # first two different pages: 1 and 3
    assert kilt.r_precision(["7"], sets) == 1
    assert kilt.r_precision([], sets) == 0
    assert kilt.r_precision(["1"], [set()]) == 0


GOLD = [
    {"id": 1, "output": [{"answer": "Paris", "provenance": [{"wikipedia_id": "10"}, {"wikipedia_id": "11"}]}]},
    {"id": 2, "output": [{"answer": "the Nile", "provenance": [{"wikipedia_id": 20}]}, {"answer": "Nile"}]},
]


def guess(*answers: tuple[str, list[str]]) -> list[dict]:
    return [
        {"id": i, "output": [{"answer": a, "provenance": [{"wikipedia_id": p} for p in pages]}]}
        for i, (a, pages) in enumerate(answers, start=1)
    ]


def test_kilt_scores_count_only_where_the_pages_are_right(tmp_path: Path, write) -> None:
    gold = write(tmp_path, "gold", GOLD)
    said = write(tmp_path, "guess", guess(("Paris", ["10", "5"]), ("nile", ["20", "1"])))
    found = kilt.score_file(gold, said)
    assert found["r_precision"] == pytest.approx((0.5 + 1) / 2)
    assert found["accuracy"] == 0.5
    assert found["exact_match"] == 1
    assert found["kilt_exact_match"] == 0.5  # the first row's pages are half right
    assert found["kilt_accuracy"] == 0


def test_without_pages_there_are_no_kilt_scores(tmp_path: Path, write) -> None:
    gold = write(tmp_path, "gold", [{"id": 1, "output": [{"answer": "a"}]}])
    found = kilt.score_file(gold, write(tmp_path, "guess", guess(("a", []))))
    assert set(found) == {"accuracy", "exact_match", "token_f1", "rouge_l"}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (guess(("a", [])), "id '2' is in one of them only"),
        ([*guess(("a", []), ("b", [])), {"id": 2}], r"guess\.jsonl, row 3: field 'id' must be there and differ"),
        ([*guess(("a", [])), {"id": 2, "output": []}], r"id '2': output must be one, with an 'answer', got \[\]"),
    ],
)
def test_faulty_predictions_are_named(tmp_path: Path, rows: list[dict], message: str, write) -> None:
    with pytest.raises(ValueError, match=message):
        kilt.score_file(write(tmp_path, "gold", GOLD), write(tmp_path, "guess", rows))


def test_only_the_files_that_are_named_are_read(tmp_path: Path, write) -> None:
    gold, said = write(tmp_path, "gold", GOLD), write(tmp_path, "guess", guess(("Paris", []), ("nile", [])))
    for neighbour in ("gold2", "guess_old"):
        write(tmp_path, neighbour, GOLD)
    assert kilt.score_file(gold, said)["accuracy"] == 0.5
    with pytest.raises(ValueError, match=r"none\.jsonl cannot be read"):
        kilt.score_file(gold, tmp_path / "none.jsonl")
