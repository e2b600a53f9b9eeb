"""ROUGE-1, ROUGE-2 and ROUGE-L by rouge_score, which other papers report; KILT's ROUGE-L is in `answers`."""

import datasets
import evaluate
from rouge_score.rouge_scorer import RougeScorer

MEASURES = ("rouge1", "rouge2", "rougeL")


class Rouge(evaluate.Metric):
    """F-measures, the mean over rows; of several accepted answers the best counts for each."""

    def _info(self) -> evaluate.MetricInfo:
        text = datasets.Value("string")
        return evaluate.MetricInfo(
            description=__doc__,
            citation="Lin, 2004, ROUGE: A Package for Automatic Evaluation of Summaries",
            inputs_description="predictions: texts, one per row. references: a list of accepted answers per row.",
            features=datasets.Features({"predictions": text, "references": datasets.Sequence(text)}),
        )

    def _compute(
        self, predictions: list[str], references: list[list[str]], use_stemmer: bool = False
    ) -> dict[str, float]:
        scorer = RougeScorer(MEASURES, use_stemmer=use_stemmer)
        rows = [scorer.score_multi(answers, said) for said, answers in zip(predictions, references, strict=True)]
        return {name: sum(row[name].fmeasure for row in rows) / len(rows) for name in MEASURES}
