"""Tables from result files: intervals over seeds, paired comparisons, and what happened to the old domain."""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from mixadapters.tasks.metrics import row_scores, score
from mixadapters.tasks.protocols import VERSION
from mixadapters.tasks.registry import Task, get_task
from mixadapters.tasks.results import read_result

RESAMPLES = 500
COLUMNS = ("method", "seeds", "score", "95 % interval", "difference", "95 % interval", "p", "trainable", "old domain")


@dataclass(frozen=True)
class Line:
    """A method over its seeds, compared with the reference on the same seeds and rows."""

    method: str
    seeds: list[int]
    scores: list[float]  # by seed
    interval: tuple[float, float] | None  # of the mean, over seeds
    difference: float | None
    difference_interval: tuple[float, float] | None  # over seeds and test rows
    p: float | None  # paired over seeds, Holm's correction over the lines of the table
    trainable: int
    head: int
    retention: dict[str, float]


@dataclass(frozen=True)
class Table:
    """The methods of one task under one protocol and one setup."""

    task: str
    metric: str
    rows: dict[str, int]
    protocol: dict[str, Any]
    setup: dict[str, Any]
    reference: str
    lines: list[Line]

    @property
    def title(self) -> str:
        shots = self.protocol["shots"]
        data = f"{shots} per class" if shots else "some of train" if self.protocol.get("train_rows") else "full data"
        if (drawn := self.protocol.get("draw", 1)) != VERSION:
            data += f" (drawn by version {drawn})"
        model = "/".join(Path(self.setup["model"]).parts[-2:]) if self.setup else "no model"
        sizes = f"{self.rows['train']} train and {self.rows['test']} test rows"
        return f"{self.task}: {self.metric}, {data}, {sizes}, {model}"


def read_results(folder: Path) -> list[dict[str, Any]]:
    """All results under a folder. Raises ValueError: there are none, or one of another format or cut short."""
    files = sorted(folder.glob("*/*-s*-*.json"))
    found = [read_result(file) for file in files]
    if not found:
        raise ValueError(f"{folder} holds no results; make some with `run --out {folder}`")
    for file, result in zip(files, found, strict=True):
        _check_result(file, result)
    return found


def _check_result(file: Path, result: dict[str, Any]) -> None:
    """Raises ValueError: a result is of no task, without its metric, or has rows that are none of the task."""
    try:
        task = get_task(result["task"])
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None
    if task.metrics[0] not in result["metrics"]:
        raise ValueError(f"{file}: metrics={result['metrics']} lack {task.metrics[0]!r}, which its table is of")
    writes = task.kind == "generation"
    for name, kinds in (
        ("predictions", (str,) if writes else (int, float)),
        ("gold", (list,) if writes else (int, float)),
    ):
        odd = [value for value in result[name] if type(value) not in kinds]
        if odd:
            raise ValueError(f"{file}: {name} have {odd[0]!r:.80}, which is no answer to task {task.name!r}")


def tables(results: Sequence[dict[str, Any]], reference: str = "bottleneck") -> list[Table]:
    """One table for each task, protocol and setup; methods that train nothing stand in all of their protocol."""
    by_protocol: dict[str, list[dict[str, Any]]] = {}
    for result in results:
        by_protocol.setdefault(json.dumps(result["protocol"], sort_keys=True), []).append(result)
    found = []
    for group in by_protocol.values():
        setups = {json.dumps(r["setup"], sort_keys=True) for r in group if r["setup"]} or {"{}"}
        for setup in sorted(setups):
            chosen = [r for r in group if not r["setup"] or json.dumps(r["setup"], sort_keys=True) == setup]
            found.append(_table(chosen, json.loads(setup), reference))
    return sorted(found, key=lambda t: t.title)


def _table(results: list[dict[str, Any]], setup: dict[str, Any], reference: str) -> Table:
    task = get_task(results[0]["task"])
    methods: dict[str, dict[int, dict[str, Any]]] = {}
    for result in results:
        runs = methods.setdefault(result["method"], {})
        if result["seed"] in runs:
            raise ValueError(
                f"two results of task {task.name!r}, method {result['method']!r}, seed {result['seed']} under one "
                "protocol and setup: other training rows, or another config file of that name; keep one"
            )
        runs[result["seed"]] = result
    against = methods.get(reference, {})
    lines = [_line(name, runs, against if name != reference else {}) for name, runs in methods.items()]
    return Table(
        task.name, task.metrics[0], results[0]["rows"], results[0]["protocol"], setup, reference if against else "",
        holm(sorted(lines, key=lambda line: (line.trainable + line.head, line.method))),
    )  # fmt: skip


def _line(name: str, runs: dict[int, dict[str, Any]], against: dict[int, dict[str, Any]]) -> Line:
    task = get_task(next(iter(runs.values()))["task"])
    metric = task.metrics[0]
    scores = [runs[seed]["metrics"][metric] for seed in sorted(runs)]
    common = sorted(runs.keys() & against.keys())
    gaps = [runs[s]["metrics"][metric] - against[s]["metrics"][metric] for s in common]
    kept = [r["retention"] for r in runs.values() if r.get("retention")]
    kinds = dict.fromkeys(kind for r in kept for kind in r)
    return Line(
        method=name,
        seeds=sorted(runs),
        scores=scores,
        interval=t_interval(scores),
        difference=statistics.mean(gaps) if gaps else None,
        difference_interval=bootstrap(task, [(runs[s], against[s]) for s in common]) if gaps else None,
        p=paired_p(gaps),
        trainable=next(iter(runs.values()))["trainable_parameters"],
        head=next(iter(runs.values()))["head_parameters"],
        retention={kind: statistics.mean(r[kind] for r in kept if kind in r) for kind in kinds},
    )


def t_interval(values: Sequence[float]) -> tuple[float, float] | None:
    """95 % interval of the mean by Student's t; None for a single value."""
    if len(values) < 2:
        return None
    half = float(stats.t.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / len(values) ** 0.5
    return statistics.mean(values) - half, statistics.mean(values) + half


def paired_p(gaps: Sequence[float]) -> float | None:
    """Two-sided p of the paired t-test; None where it has nothing to go by."""
    if len(gaps) < 2 or len(set(gaps)) == 1:
        return None
    return float(stats.ttest_1samp(gaps, 0.0).pvalue)


def bootstrap(task: Task, pairs: Sequence[tuple[dict[str, Any], dict[str, Any]]]) -> tuple[float, float]:
    """95 % interval of the mean difference, seeds and test rows both drawn again; a draw of rows serves both methods.

    Args:
        pairs: results of method and reference, one pair for each seed.
    """
    rng, metric, rows = np.random.default_rng(0), task.metrics[0], len(pairs[0][0]["gold"])
    gold = np.empty(rows, dtype=object)  # lists of answers stay entries
    gold[:] = pairs[0][0]["gold"]

    def scorer(result: dict[str, Any]) -> Callable[[np.ndarray], float]:
        predictions = np.asarray(result["predictions"])
        scores = row_scores(task, metric, predictions, gold)
        if scores is not None:
            return lambda drawn: float(scores[drawn].mean())
        return lambda drawn: score(task, predictions[drawn], gold[drawn].tolist(), [metric])[metric]

    scorers = [(scorer(method), scorer(reference)) for method, reference in pairs]
    differences = []
    for _ in range(RESAMPLES):
        index = rng.integers(rows, size=rows)
        chosen = [scorers[i] for i in rng.integers(len(scorers), size=len(scorers))]
        differences.append(np.mean([method(index) - reference(index) for method, reference in chosen]))
    low, high = np.percentile(differences, [2.5, 97.5])
    return float(low), float(high)


def holm(lines: list[Line]) -> list[Line]:
    """The lines with p corrected for their number (Holm, 1979)."""
    order = sorted((line for line in lines if line.p is not None), key=lambda line: line.p or 0.0)
    corrected: dict[str, float] = {}
    worst = 0.0
    for i, line in enumerate(order):
        worst = max(worst, min(1.0, (line.p or 0.0) * (len(order) - i)))
        corrected[line.method] = worst
    return [Line(**{**line.__dict__, "p": corrected.get(line.method)}) for line in lines]


def cells(line: Line) -> list[str]:
    """A line as text, in the order of COLUMNS."""

    def span(interval: tuple[float, float] | None, sign: str = "") -> str:
        return "-" if interval is None else f"{interval[0]:{sign}.3f} to {interval[1]:{sign}.3f}"

    head = f" + {line.head:,}" if line.head else ""
    return [
        line.method,
        str(len(line.seeds)),
        f"{statistics.mean(line.scores):.3f}",
        span(line.interval),
        "-" if line.difference is None else f"{line.difference:+.3f}",
        span(line.difference_interval, "+"),
        "-" if line.p is None else f"{line.p:.3f}",
        f"{line.trainable:,}{head}" if line.trainable + line.head else "-",
        ", ".join(f"{name} {value:.3f}" for name, value in line.retention.items()) or "-",
    ]


def markdown(table: Table) -> str:
    rows = [list(COLUMNS), ["---"] * len(COLUMNS), *map(cells, table.lines)]
    lines = ("| " + " | ".join(cell.replace("|", r"\|") for cell in row) + " |" for row in rows)
    return "\n".join([f"**{table.title}**", "", *lines])


def latex(table: Table) -> str:
    def escape(text: str) -> str:
        text = re.sub(r"[\\~^]|[_%&#${}]", r"\\\g<0>", text)
        return re.sub(
            r"\\([\\~^])", r"\\char`\\\1{}", text
        )  # those after a backslash alone would be accents and breaks

    rows = [list(COLUMNS), *map(cells, table.lines)]
    body = [" & ".join(map(escape, row)) + r" \\" for row in rows]
    body.insert(1, r"\midrule")
    return "\n".join(
        [r"\begin{table}", rf"\caption{{{escape(table.title)}}}", rf"\begin{{tabular}}{{l{'r' * (len(COLUMNS) - 1)}}}",
         r"\toprule", *body, r"\bottomrule", r"\end{tabular}", r"\end{table}"]
    )  # fmt: skip


def plot(found: Sequence[Table], file: Path) -> None:
    """Scores with their intervals, one panel for each table."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        len(found), figsize=(7, 1 + sum(len(t.lines) for t in found) * 0.35), squeeze=False, layout="constrained"
    )
    for axis, table in zip(axes[:, 0], found, strict=True):
        for place, line in enumerate(reversed(table.lines)):
            mean = statistics.mean(line.scores)
            low, high = line.interval or (mean, mean)
            axis.errorbar(mean, place, xerr=[[mean - low], [high - mean]], fmt="o", color="tab:blue", capsize=3)
            axis.plot(line.scores, [place] * len(line.scores), "|", color="gray")
        axis.set_yticks(range(len(table.lines)), [line.method for line in reversed(table.lines)])
        axis.set_title(table.title, fontsize=8, loc="left")
    figure.savefig(file, dpi=150)
    pyplot.close(figure)
