"""KILT's own measures (Petroni et al., 2021, arXiv 2009.02252, section 4), and the score of a file of predictions."""

from __future__ import annotations

import re
import string
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mixadapters.tasks.sources import lookup, rows_of

PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalize(answer: str) -> str:
    """Lower case, without punctuation, articles and surplus blanks."""
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", answer.lower().translate(PUNCTUATION)).split())


def accuracy(prediction: str, answer: str) -> float:
    return float(prediction.strip() == answer.strip())


def exact_match(prediction: str, answer: str) -> float:
    return float(normalize(prediction) == normalize(answer))


def token_f1(prediction: str, answer: str) -> float:
    said, right = normalize(prediction).split(), normalize(answer).split()
    common = sum((Counter(said) & Counter(right)).values())
    return 2 * common / (len(said) + len(right)) if common else 0.0


def rouge_l(prediction: str, answer: str) -> float:
    """ROUGE-L as KILT's scorer has it: no normalisation; texts are cut into sentences at full stops.

    Of every sentence of the answer and every one of the prediction the words of a longest common subsequence are
    collected; recall and precision are their number over the distinct words of answer and prediction.
    """
    said, right = ([s.split() for s in text.split(".") if s.strip()] for text in (prediction, answer))
    if not said or not right:
        return 0.0
    common = {word for r in right for s in said for word in common_subsequence(r, s)}
    if not common:
        return 0.0
    recall = len(common) / len({w for s in right for w in s})
    precision = len(common) / len({w for s in said for w in s})
    return 2 * precision * recall / (precision + recall)


def common_subsequence(a: Sequence[str], b: Sequence[str]) -> list[str]:
    """A longest common subsequence of two lists of words."""
    size = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            size[i + 1][j + 1] = size[i][j] + 1 if x == y else max(size[i][j + 1], size[i + 1][j])
    found, i, j = [], len(a), len(b)
    while i and j:
        if a[i - 1] == b[j - 1]:
            found.append(a[i - 1])
            i, j = i - 1, j - 1
        elif size[i - 1][j] > size[i][j - 1]:
            i -= 1
        else:
            j -= 1
    return found[::-1]


def best(measure: Callable[[str, str], float], prediction: str, answers: Iterable[str]) -> float:
    """The measure against the accepted answer that fits best."""
    return max(measure(prediction, answer) for answer in answers)


def r_precision(pages: Sequence[str], provenance: Sequence[set[str]]) -> float:
    """Share of the pages of a provenance set among as many distinct pages ranked first; the best over the sets."""
    ranked = list(dict.fromkeys(pages))
    return max((len(s.intersection(ranked[: len(s)])) / len(s) for s in provenance if s), default=0.0)


def score_file(gold: str | Path, guess: str | Path) -> dict[str, float]:
    """KILT's measures of a file of predictions: downstream, R-precision, and KILT scores.

    A KILT score counts a row's downstream score only where its R-precision is 1. Where gold names no page at all,
    R-precision and KILT scores are left out.

    Args:
        gold, guess: JSON lines in KILT's format; a row of `guess` has one output.

    Raises:
        ValueError: ids that differ or repeat, rows without answer, a guess with another number of outputs than one.
    """
    right, said = (_by_id(Path(file)) for file in (gold, guess))
    if right.keys() != said.keys():
        odd = sorted(right.keys() ^ said.keys())[0]
        raise ValueError(f"{guess} must have the ids of {gold}; id {odd!r} is in one of them only")
    measures = {"accuracy": accuracy, "exact_match": exact_match, "token_f1": token_f1, "rouge_l": rouge_l}
    sums: defaultdict[str, float] = defaultdict(float)
    for name, row in right.items():
        answers = [a for a in lookup(row, "output.*.answer") or [] if a.strip()]
        answer, outputs = lookup(said[name], "output.0.answer"), said[name].get("output") or []
        if not answers:
            raise ValueError(f"{gold}, id {name!r}: no 'answer' in output")
        if len(outputs) != 1 or not isinstance(answer, str) or not answer.strip():
            raise ValueError(f"{guess}, id {name!r}: output must be one, with an 'answer', got {outputs!r}")
        sets = [{str(p) for p in _pages(o)} for o in row["output"]]
        sums["pages"] += any(sets)
        precision = r_precision([str(p) for p in _pages(outputs[0])], sets)
        sums["r_precision"] += precision
        for measure, function in measures.items():
            score = best(function, answer, answers)
            sums[measure] += score
            sums[f"kilt_{measure}"] += score * (precision == 1)
    known = sums.pop("pages") > 0
    return {n: s / len(right) for n, s in sums.items() if known or not n.startswith(("kilt_", "r_"))}


def _pages(output: Mapping[str, Any]) -> list[Any]:
    return lookup(output, "provenance.*.wikipedia_id") or []


def _by_id(file: Path) -> dict[str, dict[str, Any]]:
    rows: dict[str, dict[str, Any]] = {}
    for where, row in rows_of(file):
        name = str(row.get("id", "")).strip()
        if not name or name in rows:
            raise ValueError(f"{where}: field 'id' must be there and differ between rows, got {row.get('id')!r}")
        rows[name] = row
    return rows
