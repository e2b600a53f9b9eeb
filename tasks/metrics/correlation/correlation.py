"""Pearson's and Spearman's correlation of predicted scores, by SciPy; 0 where one side is constant."""

import datasets
import evaluate

from mixadapters.tasks.metrics import SCORES, chosen


class Correlation(evaluate.Metric):
    """A configuration names one measure; without one, both."""

    def _info(self) -> evaluate.MetricInfo:
        chosen(self.config_name, SCORES)
        scores = datasets.Value("float64")
        return evaluate.MetricInfo(
            description=__doc__,
            citation="",
            inputs_description="predictions, references: scores, one per row.",
            features=datasets.Features({"predictions": scores, "references": scores}),
        )

    def _compute(self, predictions: list[float], references: list[float]) -> dict[str, float]:
        return {name: SCORES[name](predictions, references) for name in chosen(self.config_name, SCORES)}
