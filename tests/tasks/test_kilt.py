"""KILT's measures on cases computed by hand."""

from __future__ import annotations

from pathlib import Path

import pytest

from mixadapters.tasks import __main__ as cli
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
        # Blanks between full stops are a sentence of one empty word: 6 words said, 7 with it, of which 6 are right.
        ("rouge_l", "Well . . . I think it is a dog.", "I think it is a dog.", 2 * 6 / (8 + 6)),
        ("rouge_l", "Well . . . a dog.", "So . . . a dog.", 2 * 3 / (4 + 4)),  # the empty word is common
        ("rouge_l", "a dog...", "a dog", 1),  # full stops without blanks are none
        ("rouge_l", "...", "...", 0),
    ],
)
def test_measures(measure: str, said: str, right: str, expected: float) -> None:
    assert getattr(kilt, measure)(said, right) == pytest.approx(expected)


def test_the_answer_that_fits_best_counts() -> None:
    assert kilt.best(kilt.token_f1, "town hall", ["house", "hall"]) == pytest.approx(2 / 3)


@pytest.mark.parametrize("measure", kilt.MEASURES)
def test_a_blank_prediction_is_worth_nothing(measure: str) -> None:
    # Without articles "The" is as blank as the prediction is.
    assert kilt.best(kilt.MEASURES[measure], " ", ["The", "."]) == 0


def test_r_precision_is_the_best_set_among_as_many_pages() -> None:
    sets = [{"1", "2"}, {"7"}]
    assert kilt.r_precision(["1", "1", "3", "2"], sets) == 0.5  # first two different pages: 1 and 3
    assert kilt.r_precision(["7"], sets) == 1
    assert kilt.r_precision([], sets) == 0
    assert kilt.r_precision(["1"], [set()]) == 0


def test_recall_counts_sets_that_are_whole() -> None:
    sets = [{"1", "2"}, {"7"}, {"1", "2"}]
    assert kilt.recall_at(2, ["7", "1", "2"], sets) == 1  # two different sets: 7 is first, 1 and 2 are one place
    assert kilt.recall_at(1, ["7", "1", "2"], sets) == 0.5
    assert kilt.recall_at(1, ["1", "7", "2"], sets) == 0.5  # the place of a set is that of its last page
    assert kilt.recall_at(2, ["1", "3", "2", "7"], sets) == 0.5  # 3, then 1 with 2, then 7
    assert kilt.recall_at(3, ["1", "3", "2", "7"], sets) == 1
    assert kilt.recall_at(5, ["1", "1", "3"], sets) == kilt.recall_at(5, [], sets) == 0
    assert kilt.recall_at(5, ["7", "7", "7", "7", "7", "1", "2"], sets) == 1  # a page counts once
    assert kilt.recall_at(5, ["1"], []) == 0


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


def test_recall_looks_at_five_places_unless_told(tmp_path: Path, write) -> None:
    gold = write(tmp_path, "gold", GOLD)
    said = write(
        tmp_path, "guess", guess(("Paris", ["5", "10", "6", "11"]), ("nile", ["1", "2", "3", "4", "5", "20"]))
    )
    assert kilt.score_file(gold, said)["recall@5"] == 0.5
    found = kilt.score_file(gold, said, (2, 6))
    assert (found["recall@2"], found["recall@6"]) == (0, 1)
    with pytest.raises(ValueError, match="recall at k=0 must be an integer, at least 1"):
        kilt.score_file(gold, said, (0,))


@pytest.mark.parametrize("answer", [True, float("nan"), ["Paris"]])
def test_what_is_neither_text_nor_number_is_no_answer(tmp_path: Path, answer, write) -> None:
    gold, said = ([{"id": "1", "output": [{"answer": one}]}] for one in ("nan", answer))
    with pytest.raises(ValueError, match=r"id '1': 'answer' must be text or a number, got"):
        kilt.score_file(write(tmp_path, "gold", gold), write(tmp_path, "guess", said))


@pytest.mark.parametrize(("answer", "expected"), [("", 0), (" \t", 0), (7, 0.5), ("7", 0.5), (7.0, 0), (None, 0)])
def test_answers_count_as_text(tmp_path: Path, answer, expected: float, write) -> None:
    rows = [
        {"id": i, "output": [{"answer": right, "provenance": [{"wikipedia_id": "1"}]}]}
        for i, right in ((1, "7"), (2, "a"))
    ]
    said = [
        {"id": i, "output": [{"answer": a, "provenance": [{"wikipedia_id": 1}]}]} for i, a in ((1, answer), (2, "b"))
    ]
    found = kilt.score_file(write(tmp_path, "gold", rows), write(tmp_path, "guess", said))
    assert found["accuracy"] == found["kilt_exact_match"] == expected
    assert found["r_precision"] == 1  # pages count also where the answer is blank


@pytest.mark.parametrize("page", ["7 ", " 7", 7, "7\n"])
def test_pages_are_compared_as_text_without_blanks(tmp_path: Path, page, write) -> None:
    def rows(number) -> list[dict]:
        return [{"id": "1", "output": [{"answer": "a", "provenance": [{"wikipedia_id": number}]}]}]

    for gold, said in ((page, "7"), ("7", page)):
        found = kilt.score_file(write(tmp_path, "gold", rows(gold)), write(tmp_path, "guess", rows(said)))
        assert found["r_precision"] == found["recall@5"] == found["kilt_accuracy"] == 1


def test_without_pages_there_are_no_kilt_scores(tmp_path: Path, write) -> None:
    gold = write(tmp_path, "gold", [{"id": 1, "output": [{"answer": "a"}]}])
    found = kilt.score_file(gold, write(tmp_path, "guess", guess(("a", []))))
    assert set(found) == {"accuracy", "exact_match", "token_f1", "rouge_l"}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (guess(("a", [])), "id '2' is in one of them only"),
        (
            [*guess(("a", [])), {"id": 2, "output": [{"provenance": []}]}],
            "id '2': output must be one, with an 'answer'",
        ),
        ([*guess(("a", [])), {"id": 2, "output": "b"}], "id '2': field 'output' must be a list of objects, got 'b'"),
        (
            [*guess(("a", [])), {"id": 2, "output": [{"answer": "b", "provenance": None}]}],
            "'provenance' must be a list",
        ),
        ([*guess(("a", [])), {"id": None, "output": []}], "field 'id' must be there .* got None"),
        ([*guess(("a", []), ("b", [])), {"id": 2}], r"guess\.jsonl, row 3: field 'id' must be there and differ"),
        ([*guess(("a", [])), {"id": 2, "output": []}], r"id '2': output must be one, with an 'answer', got \[\]"),
    ],
)
def test_faulty_predictions_are_named(tmp_path: Path, rows: list[dict], message: str, write) -> None:
    with pytest.raises(ValueError, match=message):
        kilt.score_file(write(tmp_path, "gold", GOLD), write(tmp_path, "guess", rows))


@pytest.mark.parametrize("answer", [7, 0, True, ["a"]])
def test_an_accepted_answer_that_is_no_text_is_named(tmp_path: Path, answer, write) -> None:
    gold = write(tmp_path, "gold", [{"id": "x", "output": [{"answer": answer}, {"answer": "a"}]}])
    said = write(tmp_path, "guess", [{"id": "x", "output": [{"answer": "a"}]}])
    with pytest.raises(
        ValueError, match=r"gold\.jsonl, id 'x': field 'output\.\*\.answer' must be text, got .* quotes"
    ):
        kilt.score_file(gold, said)


def test_the_command_prints_every_measure(tmp_path: Path, capsys, write) -> None:
    gold, said = write(tmp_path, "gold", GOLD), write(tmp_path, "guess", guess(("Paris", ["10"]), ("nile", ["20"])))
    assert cli.main(["kilt", str(gold), str(said), "--recall-at", "1", "5"]) == 0
    assert {line.split()[0] for line in capsys.readouterr().out.splitlines()} == {
        *kilt.MEASURES, *(f"kilt_{m}" for m in kilt.MEASURES), "r_precision", "recall@1", "recall@5"
    }  # fmt: skip


def test_only_the_files_that_are_named_are_read(tmp_path: Path, write) -> None:
    gold, said = write(tmp_path, "gold", GOLD), write(tmp_path, "guess", guess(("Paris", []), ("nile", [])))
    for neighbour in ("gold2", "guess_old"):
        write(tmp_path, neighbour, GOLD)
    assert kilt.score_file(gold, said)["accuracy"] == 0.5
    with pytest.raises(ValueError, match=r"none\.jsonl cannot be read"):
        kilt.score_file(gold, tmp_path / "none.jsonl")
