"""Accuracy, micro-F1, macro-F1, F1 and Matthews correlation of predicted classes, by scikit-learn."""

import datasets
import evaluate

from mixadapters.tasks.metrics import CLASSES, chosen


class Classification(evaluate.Metric):
    """A configuration names one measure; without one, all, and F1 where the classes are 0 and 1."""

    def _info(self) -> evaluate.MetricInfo:
        chosen(self.config_name, CLASSES)
        classes = datasets.Value("int64")
        return evaluate.MetricInfo(
            description=__doc__,
            citation="",
            inputs_description="predictions, references: numbers of classes, one per row.",
            features=datasets.Features({"predictions": classes, "references": classes}),
        )

    def _compute(self, predictions: list[int], references: list[int]) -> dict[str, float]:
        names = chosen(self.config_name, CLASSES)
        if len(names) > 1 and not {*predictions, *references} <= {0, 1}:
            names = [name for name in names if name != "f1"]
        return {name: CLASSES[name](predictions, references) for name in names}
