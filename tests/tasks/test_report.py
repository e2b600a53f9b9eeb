"""Tables: pairs are pairs, intervals and p are those of the textbook, and unlike runs never share a line."""

from __future__ import annotations

import json
import re
import statistics
from typing import Any

import pytest
from scipy import stats

from mixadapters.tasks import __main__ as cli
from mixadapters.tasks import get_task, report

GOLD = [0, 1] * 20


def result(method: str, seed: int, right: int, task: str = "imdb", **more: Any) -> dict[str, Any]:
    predictions = [g if i < right else 1 - g for i, g in enumerate(GOLD)]
    baseline = method in ("majority", "tfidf")
    return {
        "format": 1, "task": task, "method": method, "seed": seed, "gold": GOLD, "predictions": predictions,
        "metrics": {get_task(task).metrics[0]: right / 40}, "rows": {"train": 8, "dev": 8, "test": 40},
        "protocol": {"task": task, "shots": 4, "draw": 2}, "setup": {} if baseline else {"model": "some/model"},
        "trainable_parameters": 0 if baseline else 1000, "head_parameters": 0 if baseline else 34,
        "retention": None if baseline else {"drift": right / 100}, **more,
    }  # fmt: skip


RUNS = [
    *(result("majority", s, 20) for s in range(3)),
    *(result("bottleneck", s, r) for s, r in enumerate((24, 28, 26))),
    *(result("lora", s, r) for s, r in enumerate((28, 33, 29))),
]


def lines(runs: list[dict[str, Any]]) -> dict[str, report.Line]:
    (table,) = report.tables(runs)
    return {line.method: line for line in table.lines}


def test_intervals_and_differences_are_those_of_the_textbook() -> None:
    found = lines(RUNS)["lora"]
    scores, gaps = [0.7, 0.825, 0.725], [0.1, 0.125, 0.075]
    assert found.scores == pytest.approx(scores)
    expected = stats.t.interval(0.95, 2, statistics.mean(scores), stats.sem(scores))
    assert found.interval == pytest.approx(expected)
    low, high = found.difference_interval
    assert low < 0.1 < high
    # Two lines are compared with bottleneck, so the smaller p counts twice.
    p = stats.ttest_rel([28, 33, 29], [24, 28, 26]).pvalue
    other = stats.ttest_rel([20, 20, 20], [24, 28, 26]).pvalue
    expected = {"lora": p, "majority": other}
    smaller = min(expected, key=expected.__getitem__)
    assert lines(RUNS)[smaller].p == pytest.approx(2 * expected[smaller])
    assert found.difference == pytest.approx(statistics.mean(gaps))


def test_only_common_seeds_are_compared() -> None:
    found = lines([*RUNS, result("lora", 9, 40)])["lora"]
    assert found.seeds == [0, 1, 2, 9]
    assert found.difference == pytest.approx(0.1)


def test_equal_predictions_differ_by_nothing() -> None:
    reference = [run for run in RUNS if run["method"] == "bottleneck"]
    found = lines([*reference, *({**run, "method": "lora"} for run in reference)])["lora"]
    assert (found.difference, found.difference_interval, found.p) == (0, (0, 0), None)


def test_metrics_that_are_no_mean_are_resampled_too(monkeypatch) -> None:
    monkeypatch.setattr(report, "RESAMPLES", 40)
    runs = [result(m, s, r, "amazon_helpfulness") for m, r in (("bottleneck", 24), ("lora", 36)) for s in (0, 1)]
    low, high = lines(runs)["lora"].difference_interval
    assert 0 < low < 0.3 < high


def test_interval_of_a_difference_draws_rows_and_leaves_out_a_twentieth() -> None:
    """Of half the rows one is right and the other is wrong, which makes it a binomial distribution."""
    runs = [result("bottleneck", 0, 0), result("lora", 0, 20)]
    low, high = lines(runs)["lora"].difference_interval
    wide, right, narrow = (stats.binom(40, 0.5).interval(share)[0] / 40 for share in (0.99, 0.95, 0.9))
    assert wide < low < (right + narrow) / 2
    assert wide < 1 - high < (right + narrow) / 2


def test_interval_of_a_difference_draws_seeds() -> None:
    """Of two seeds, of which one gains on every row and the other on none, both may be the same."""
    runs = [result("lora", seed, 40) for seed in (0, 1)]
    runs += [result("bottleneck", seed, right) for seed, right in ((0, 0), (1, 40))]
    assert lines(runs)["lora"].difference_interval == (0, 1)


def test_unlike_protocols_and_setups_have_tables_of_their_own() -> None:
    other = [result("lora", 0, 30, protocol={"task": "imdb", "shots": None, "draw": 2}),
             result("lora", 0, 31, setup={"model": "another/model"})]  # fmt: skip
    found = report.tables([*RUNS, *other])
    assert [len(t.lines) for t in found] == [2, 3, 1]
    assert [t.title.rsplit(", ", 1)[1] for t in found] == ["another/model", "some/model", "some/model"]
    assert "majority" in {line.method for line in found[0].lines}  # it trains nothing: it stands in both


def test_rows_of_another_draw_have_a_table_that_says_so() -> None:
    old = [result("lora", s, 30, protocol={"task": "imdb", "shots": 4}) for s in range(3)]
    found = report.tables([*RUNS, *old])
    assert [len(t.lines) for t in found] == [1, 3]
    assert "4 per class (drawn by version 1), " in found[0].title
    assert "drawn" not in found[1].title


def test_two_results_for_one_place_are_refused() -> None:
    with pytest.raises(ValueError, match="two results of task 'imdb', method 'lora', seed 0 under one protocol"):
        report.tables([*RUNS, result("lora", 0, 30)])


def test_holm_corrects_step_by_step() -> None:
    made = [report.Line(str(p), [], [], None, None, None, p, 0, 0, {}) for p in (0.04, 0.01, 0.03, None)]
    assert [line.p for line in report.holm(made)] == pytest.approx([0.06, 0.03, 0.06, None])


def test_markdown_latex_and_plot(tmp_path, capsys) -> None:
    for run in RUNS:
        file = tmp_path / "imdb" / f"{run['method']}-s{run['seed']}-x.json"
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps(run))
    assert cli.main(["table", str(tmp_path), "--plot", str(tmp_path / "p.png")]) == 0
    out = capsys.readouterr().out
    assert "**imdb: accuracy, 4 per class, 8 train and 40 test rows, some/model**" in out
    assert "| lora | 3 | 0.750 | 0.586 to 0.914 | +0.100 |" in out
    assert "| bottleneck | 3 | 0.650 | 0.526 to 0.774 | - | - | - | 1,000 + 34 | drift 0.260 |" in out
    assert (tmp_path / "p.png").stat().st_size > 1000
    assert cli.main(["table", str(tmp_path), "--latex", "--reference", "lora"]) == 0
    assert r"majority & 3 & 0.500 & 0.500 to 0.500 & -0.250" in capsys.readouterr().out
    assert cli.main(["table", str(tmp_path), "--reference", "lorra"]) == 1
    assert "--reference lorra has no results in" in capsys.readouterr().err


def test_names_do_not_break_the_form_of_a_table() -> None:
    (table,) = report.tables([result("a|b&c#d~e\\f", 0, 20, setup={"model": "x"})])
    (row,) = report.markdown(table).splitlines()[-1:]
    assert len(re.findall(r"(?<!\\)\|", row)) == len(report.COLUMNS) + 1
    assert r"a|b\&c\#d\char`\~{}e\char`\\{}f & 1 & 0.500" in report.latex(table)


def test_a_measure_of_old_text_that_some_seeds_have_is_their_mean() -> None:
    runs = [result("lora", s, 20, retention=r) for s, r in enumerate(({"a": 1.0, "b": 2.0}, {"a": 3.0}, None))]
    assert lines(runs)["lora"].retention == {"a": 2.0, "b": 2.0}
    assert lines(runs[::-1])["lora"].retention == {"a": 2.0, "b": 2.0}


def test_an_empty_folder_and_a_newer_format_are_refused(tmp_path, capsys) -> None:
    assert cli.main(["table", str(tmp_path)]) == 1
    assert "holds no results" in capsys.readouterr().err
    (tmp_path / "imdb").mkdir()
    (tmp_path / "imdb" / "lora-s0-x.json").write_text(json.dumps({"format": 2}))
    assert cli.main(["table", str(tmp_path)]) == 1
    assert "format=2 is not read by this version" in capsys.readouterr().err


def test_list_shots_and_usage(data, tmp_path, capsys, monkeypatch) -> None:
    assert cli.main(["list"]) == 0
    assert "chemprot  domains  classification 13 labels  micro_f1     hub, local" in capsys.readouterr().out
    monkeypatch.chdir(tmp_path)
    assert cli.main(["shots", "--data-dir", str(data), "imdb"]) == 0
    assert json.loads((tmp_path / "imdb.json").read_text())["rows"] == 60
    assert cli.main(["kilt", "one"]) == 1
    assert cli.main(["tabel"]) == 2
    assert "usage: python -m mixadapters.tasks COMMAND" in capsys.readouterr().err
