"""KILT's measures of written answers, each against the accepted answer that fits best."""

import datasets
import evaluate

from mixadapters.tasks import kilt
from mixadapters.tasks.metrics import ANSWERS, chosen


class Answers(evaluate.Metric):
    """A configuration names one measure; without one, all."""

    def _info(self) -> evaluate.MetricInfo:
        chosen(self.config_name, ANSWERS)
        text = datasets.Value("string")
        return evaluate.MetricInfo(
            description=__doc__,
            citation="Petroni et al., 2021, arXiv 2009.02252, section 4",
            inputs_description="predictions: texts, one per row. references: a list of accepted answers per row.",
            features=datasets.Features({"predictions": text, "references": datasets.Sequence(text)}),
        )

    def _compute(self, predictions: list[str], references: list[list[str]]) -> dict[str, float]:
        pairs = list(zip(predictions, references, strict=True))
        return {
            name: sum(kilt.best(ANSWERS[name], *pair) for pair in pairs) / len(pairs)
            for name in chosen(self.config_name, ANSWERS)
        }
