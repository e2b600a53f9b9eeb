"""Metrics by name: scikit-learn, SciPy, and KILT's own measures, which need neither network nor a cache folder.

For other programs they are modules of `evaluate`, one in each folder here:
`evaluate.load(f"{mixadapters.tasks.metrics.FOLDER}/classification")`, and `answers`, `correlation`, `pages`, `rouge`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

from mixadapters.core.registry import nearest
from mixadapters.tasks import kilt
from mixadapters.tasks.registry import Task


def _correlation(function: Callable[..., Any]) -> Callable[[Any, Any], float]:
    def score(predicted: Any, gold: Any) -> float:
        constant = len(gold) < 2 or np.ptp(predicted) == 0 or np.ptp(gold) == 0
        return 0.0 if constant else float(function(predicted, gold).statistic)

    return score


FOLDER = Path(__file__).parent
# name -> (predictions, gold) -> score. Micro-F1 over all classes of a single-label task is accuracy.
CLASSES: dict[str, Callable[[Any, Any], float]] = {
    "accuracy": lambda p, g: float(accuracy_score(g, p)),
    "micro_f1": lambda p, g: float(f1_score(g, p, average="micro")),
    "macro_f1": lambda p, g: float(f1_score(g, p, average="macro", zero_division=0)),  # of the classes that occur
    "f1": lambda p, g: float(f1_score(g, p, zero_division=0)),  # of class 1
    "matthews": lambda p, g: float(matthews_corrcoef(g, p)),
}
SCORES: dict[str, Callable[[Any, Any], float]] = {
    "pearson": _correlation(pearsonr),
    "spearman": _correlation(spearmanr),
}
METRICS = {**CLASSES, **SCORES}
# name -> measure of one prediction against one answer; a task's score is the mean of the best per row.
ANSWERS = kilt.MEASURES
PER_ROW = {"accuracy", "micro_f1"}  # means over rows, so that resampling needs no new call


def chosen(configuration: str, measures: Mapping[str, Any]) -> list[str]:
    """The measures that a configuration of an `evaluate` module names. Raises ValueError: it is none of them."""
    if configuration == "default":
        return list(measures)
    if configuration not in measures:
        raise ValueError(
            f"config_name={configuration!r} must be one of {', '.join(measures)}, or left out for all of them."
            f"{nearest(configuration, measures)}"
        )
    return [configuration]


def score(
    task: Task, predictions: Sequence[Any], gold: Sequence[Any], metrics: Sequence[str] | None = None
) -> dict[str, float]:
    """Some metrics of the task; by default all, the main one first.

    Raises ValueError: no rows, another number of predictions, or predictions that are NaN or infinite.
    """
    if len(predictions) != len(gold) or not len(gold):
        raise ValueError(f"{len(predictions)} predictions for {len(gold)} rows of task {task.name!r}")
    if task.kind != "generation" and (odd := int((~np.isfinite(np.asarray(predictions, dtype=float))).sum())):
        raise ValueError(f"{odd} of {len(gold)} predictions of task {task.name!r} are NaN or infinite: not scored")
    if task.kind == "generation":
        return {m: float(_answered(m, predictions, gold).mean()) for m in metrics or task.metrics}
    return {m: METRICS[m](predictions, gold) for m in metrics or task.metrics}


def row_scores(task: Task, metric: str, predictions: Any, gold: Any) -> NDArray[np.float64] | None:
    """The score of each row, or None where the metric is no mean over rows."""
    if task.kind == "generation":
        return _answered(metric, predictions, gold)
    if metric in PER_ROW:
        return (np.asarray(predictions) == np.asarray(gold)).astype(float)
    return None


def _answered(metric: str, predictions: Any, gold: Any) -> NDArray[np.float64]:
    return np.array([kilt.best(ANSWERS[metric], p, g) for p, g in zip(predictions, gold, strict=True)])
