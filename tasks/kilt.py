"""KILT's own measures (Petroni et al., 2021, arXiv 2009.02252, section 4), and the score of a file of predictions."""

from __future__ import annotations

import re
import string
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

from mixadapters.core.fields import check_integer, finite
from mixadapters.tasks.sources import rows_of

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
    collected; recall and precision are their number over the distinct words of answer and prediction. Blanks between
    full stops are a sentence of one empty word there, which counts.
    """
    said, right = _sentences(prediction), _sentences(answer)
    if not said or not right:
        return 0.0
    common = {word for one, other in product(right, said) for word in common_subsequence(one, other)}
    if not common:
        return 0.0
    recall = len(common) / len({w for s in right for w in s})
    precision = len(common) / len({w for s in said for w in s})
    return 2 * precision * recall / (precision + recall)


def _sentences(text: str) -> list[list[str]]:
    """The words of each sentence of a text."""
    return [sentence.split() or [""] for sentence in text.strip().split(".") if sentence]


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
    """The measure against the accepted answer that fits best; 0 for a blank prediction, whatever the answers."""
    return max(measure(prediction, answer) for answer in answers) if prediction.strip() else 0.0


MEASURES: dict[str, Callable[[str, str], float]] = {
    "accuracy": accuracy,
    "exact_match": exact_match,
    "token_f1": token_f1,
    "rouge_l": rouge_l,
}


def r_precision(pages: Sequence[str], evidence: Sequence[Collection[str]]) -> float:
    """Share of the pages of an evidence set among as many distinct pages ranked first; the best over the sets."""
    ranked = list(dict.fromkeys(pages))
    return max((len(set(s).intersection(ranked[: len(s)])) / len(s) for s in evidence if s), default=0.0)


def recall_at(k: int, pages: Sequence[str], evidence: Sequence[Collection[str]]) -> float:
    """Share of the distinct evidence sets that are whole among the first k of a ranking.

    A set counts as one place of the ranking, that of its last page, and a page of no set as one.
    """
    left = [set(s) for s in dict.fromkeys(map(frozenset, evidence))]
    ranking: list[int | None] = []  # numbers of sets; None: a page of no set
    for page in dict.fromkeys(pages):
        found = [i for i, pages_left in enumerate(left) if page in pages_left]
        for i in found:
            left[i].remove(page)
            ranking = [place for place in ranking if place != i]
        ranking += found or [None]
    return sum(i is not None and not left[i] for i in ranking[:k]) / len(left) if left else 0.0


def score_file(gold: str | Path, guess: str | Path, ks: Sequence[int] = (5,)) -> dict[str, float]:
    """KILT's measures of a file of predictions: downstream, R-precision and recall@k, and KILT scores.

    A KILT score counts a row's downstream score only where its R-precision is 1. Where gold names no page at all,
    those of pages are left out.

    Args:
        gold, guess: JSON lines in KILT's format; a row of `guess` has one output.
        ks: places of the ranking that recall looks at.

    Raises:
        ValueError: ids that differ or repeat, rows without answer, a guess with another number of outputs than one.
    """
    for k in ks:
        check_integer("recall at k", k, least=1)
    right, said = (_by_id(Path(file)) for file in (gold, guess))
    if right.keys() != said.keys():
        odd = sorted(right.keys() ^ said.keys())[0]
        raise ValueError(f"{guess} must have the ids of {gold}; id {odd!r} is in one of them only")
    sums: defaultdict[str, float] = defaultdict(float)
    for name, row in right.items():
        for measure, value in _score_row(row, said[name], f"{gold}, id {name!r}", f"{guess}, id {name!r}", ks).items():
            sums[measure] += value
    known = sums.pop("pages") > 0
    return {n: s / len(right) for n, s in sums.items() if known or not n.startswith(("kilt_", "r_", "recall@"))}


def _score_row(
    gold: Mapping[str, Any], guess: Mapping[str, Any], in_gold: str, in_guess: str, ks: Sequence[int]
) -> dict[str, float]:
    """The measures of a row, and `pages`: whether gold names any."""
    outputs, guesses = _outputs(gold, in_gold), _outputs(guess, in_guess)
    answers = _answers(outputs, in_gold)
    if len(guesses) != 1 or "answer" not in guesses[0]:
        raise ValueError(f"{in_guess}: output must be one, with an 'answer', got {guesses!r}")
    given = guesses[0]["answer"]
    if given is not None and not isinstance(given, str) and not finite(given):  # KILT's scorer reads numbers as text
        raise ValueError(f"{in_guess}: 'answer' must be text or a number, got {given!r:.80}")
    answer = str(given).strip()
    pages = _pages(guesses[0], in_guess)
    evidence = [_pages(o, in_gold) for o in outputs]
    # A set of pages without a number is one too, as it is in KILT's scorer.
    sets = [_pages(o, in_gold, missing="") for o in outputs if "provenance" in o]
    precision = r_precision(pages, evidence)
    found = {"pages": float(any(evidence)), "r_precision": precision}
    found.update({f"recall@{k}": recall_at(k, pages, sets) if pages else 0.0 for k in ks})
    for name, measure in MEASURES.items():
        found[name] = best(measure, answer, answers)
        found[f"kilt_{name}"] = found[name] * (precision == 1)
    return found


def _outputs(row: Mapping[str, Any], where: str) -> list[dict[str, Any]]:
    outputs = row.get("output")
    if not isinstance(outputs, list) or not all(isinstance(o, dict) for o in outputs):
        raise ValueError(f"{where}: field 'output' must be a list of objects, got {outputs!r}")
    return outputs


def _answers(outputs: Sequence[Mapping[str, Any]], where: str) -> list[str]:
    """The answers that gold accepts; an output may have pages alone."""
    given = [a for o in outputs if (a := o.get("answer")) is not None]
    for answer in given:
        if not isinstance(answer, str):
            raise ValueError(f"{where}: field 'output.*.answer' must be text, got {answer!r}; write it in quotes")
    answers = [a.strip() for a in given if a.strip()]
    if not answers:
        raise ValueError(f"{where}: no 'answer' in output")
    return answers


def _pages(output: Mapping[str, Any], where: str, missing: str | None = None) -> list[str]:
    """The distinct pages of an output, in order; those without a number are `missing`, or left out."""
    provenance = output.get("provenance", [])
    if not isinstance(provenance, list) or not all(isinstance(p, dict) for p in provenance):
        raise ValueError(f"{where}: field 'provenance' must be a list of objects, got {provenance!r}")
    numbers = [str(p["wikipedia_id"]).strip() if "wikipedia_id" in p else missing for p in provenance]
    return list(dict.fromkeys(n for n in numbers if n is not None))


def _by_id(file: Path) -> dict[str, dict[str, Any]]:
    rows: dict[str, dict[str, Any]] = {}
    for where, row in rows_of(file):
        given = row.get("id")
        name = "" if given is None else str(given).strip()
        if not name or name in rows:
            raise ValueError(f"{where}: field 'id' must be there and differ between rows, got {given!r}")
        rows[name] = row
    return rows
