"""KILT's measures of retrieved pages: R-precision and recall@k over sets of evidence."""

import datasets
import evaluate

from mixadapters.tasks import kilt


class Pages(evaluate.Metric):
    """`compute(..., k=5)`: how many places of a ranking recall looks at."""

    def _info(self) -> evaluate.MetricInfo:
        pages = datasets.Sequence(datasets.Value("string"))
        return evaluate.MetricInfo(
            description=__doc__,
            citation="Petroni et al., 2021, arXiv 2009.02252, section 4",
            inputs_description=(
                "predictions: ids of pages as they are ranked, a list per row. references: the sets of pages that "
                "each suffice, a list of lists per row."
            ),
            features=datasets.Features({"predictions": pages, "references": datasets.Sequence(pages)}),
        )

    def _compute(
        self, predictions: list[list[str]], references: list[list[list[str]]], k: int = 5
    ) -> dict[str, float]:
        if k < 1:
            raise ValueError(f"k={k} must be 1 or more")
        pairs = list(zip(predictions, references, strict=True))
        return {
            "r_precision": sum(kilt.r_precision(*pair) for pair in pairs) / len(pairs),
            f"recall@{k}": sum(kilt.recall_at(k, *pair) for pair in pairs) / len(pairs),
        }
