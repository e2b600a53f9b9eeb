"""Metrics are modules of `evaluate`, loaded from their folders without network, and only numbers are scored."""

from __future__ import annotations

import socket
import sys
from typing import Any

import evaluate
import pytest

from mixadapters.tasks import get_task
from mixadapters.tasks.metrics import CLASSES, FOLDER, SCORES, chosen, score


def measure() -> dict[str, Any]:
    """What another program gets of the modules."""
    classification = evaluate.load(f"{FOLDER}/classification")
    found = {
        "classes": classification.compute(predictions=[0, 1, 2, 2], references=[0, 1, 1, 2]),
        "two classes": classification.compute(predictions=[0, 1, 1, 1], references=[0, 1, 0, 1]),
        "scores": evaluate.load(f"{FOLDER}/correlation").compute(predictions=[1.0, 2, 4], references=[1.0, 2, 3]),
    }
    one = evaluate.load(f"{FOLDER}/classification", "macro_f1")
    found["one measure"] = one.compute(predictions=[0], references=[0])
    texts = {"predictions": ["the old town hall", "red"], "references": [["town hall"], ["blue", "Red"]]}
    found["answers"] = evaluate.load(f"{FOLDER}/answers").compute(**texts)
    found["rouge"] = evaluate.load(f"{FOLDER}/rouge").compute(**texts)
    pages = {"predictions": [["7", "1"], ["3"]], "references": [[["1"], ["8"]], [["3"]]]}
    found["pages"] = evaluate.load(f"{FOLDER}/pages").compute(**pages, k=1)
    named = [evaluate.load(f"{FOLDER}/classification", name) for name in ("accuracy", "matthews")]
    found["combined"] = evaluate.combine(named).compute(predictions=[0, 1, 1, 1], references=[0, 1, 0, 1])
    found["texts combined"] = evaluate.combine([f"{FOLDER}/answers", f"{FOLDER}/rouge"]).compute(**texts)
    return found


@pytest.fixture(scope="module")
def used(tmp_path_factory) -> dict[str, Any]:
    """The same with empty caches and no network."""

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("the network was asked")

    cache = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate.config, "HF_MODULES_CACHE", cache / "modules")
        patch.setattr(evaluate.config, "HF_METRICS_CACHE", cache / "metrics")
        patch.setattr(sys, "path", [*sys.path])
        patch.setattr(socket.socket, "connect", refuse)
        patch.setattr(socket, "getaddrinfo", refuse)
        return measure()


def test_modules_of_evaluate_measure_as_runs_do(used) -> None:
    expected = score(get_task("chemprot"), [0, 1, 2, 2], [0, 1, 1, 2])
    assert {n: used["classes"][n] for n in expected} == pytest.approx(expected)
    assert "f1" not in used["classes"]  # it is that of class 1 against class 0
    assert used["two classes"]["f1"] == pytest.approx(0.8)
    assert used["one measure"] == {"macro_f1": 1}
    assert used["scores"] == pytest.approx(score(get_task("stsb"), [1.0, 2, 4], [1.0, 2, 3]))
    task = get_task("trex_slotfilling")
    expected = score(task, ["the old town hall", "red"], [["town hall"], ["blue", "Red"]])
    assert {n: used["answers"][n] for n in expected} == pytest.approx(expected)
    assert used["pages"] == {"r_precision": 0.5, "recall@1": 0.5}


def test_rouge_is_that_of_rouge_score(used) -> None:
    # ROUGE-1: 2 of 4 words said, 2 of 2 right, and 1; the best answer counts, and letter case does not.
    assert used["rouge"] == pytest.approx(
        {"rouge1": (2 / 3 + 1) / 2, "rouge2": (0.5 + 0) / 2, "rougeL": (2 / 3 + 1) / 2}
    )


def test_modules_can_be_combined_and_name_their_measures(used) -> None:
    assert used["combined"] == pytest.approx({"accuracy": 0.75, "matthews": 1 / 3**0.5})
    assert used["texts combined"] == pytest.approx({**used["answers"], **used["rouge"]})


def test_a_configuration_that_is_no_measure_is_refused() -> None:
    with pytest.raises(ValueError, match=r"config_name='macro_f2' must be one of accuracy, micro_f1.*Did you mean"):
        chosen("macro_f2", CLASSES)


def test_every_folder_is_a_module_with_a_test() -> None:
    assert {f.name for f in FOLDER.iterdir() if (f / f"{f.name}.py").is_file()} == {
        "answers", "classification", "correlation", "pages", "rouge"
    }  # fmt: skip


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), None])
@pytest.mark.parametrize("task", ["stsb", "imdb"])
def test_what_is_no_number_is_not_scored(task: str, bad) -> None:
    with pytest.raises(ValueError, match=f"1 of 3 predictions of task '{task}' are NaN or infinite: not scored"):
        score(get_task(task), [0, bad, 1], [0, 1, 1])


@pytest.mark.parametrize("name", SCORES)
@pytest.mark.parametrize(("predicted", "gold"), [([0.1, 0.2], [1.0, 1.0]), ([0.1, 0.1], [1.0, 2.0])])
def test_what_is_constant_correlates_with_nothing(name: str, predicted: list[float], gold: list[float]) -> None:
    assert SCORES[name](predicted, gold) == 0


def test_nothing_is_not_scored() -> None:
    with pytest.raises(ValueError, match="0 predictions for 0 rows of task 'imdb'"):
        score(get_task("imdb"), [], [])
