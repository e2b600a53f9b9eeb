"""What needs no network: the most frequent answer, and words counted. Every table has both."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.neighbors import NearestNeighbors
from sklearn.pipeline import make_pipeline

from mixadapters.tasks.registry import Task
from mixadapters.tasks.sources import Example


def predict(method: str, task: Task, train: Sequence[Example], test: Sequence[Example]) -> list[Any]:
    """Predictions for `test` by "majority" or "tfidf"."""
    return majority(task, train, test) if method == "majority" else tfidf(task, train, test)


def majority(task: Task, train: Sequence[Example], test: Sequence[Example]) -> list[Any]:
    """The most frequent target of train, the first of equals; the mean of scores."""
    if task.kind == "regression":
        return [float(np.mean([e.target for e in train]))] * len(test)
    if task.kind == "generation":
        return [Counter(a for e in train for a in e.target).most_common(1)[0][0]] * len(test)
    (target, _), *_ = Counter(e.target for e in train).most_common(1)
    return [min(target, len(e.choices) - 1) if e.choices else target for e in test]


def tfidf(task: Task, train: Sequence[Example], test: Sequence[Example]) -> list[Any]:
    """TF-IDF of words and pairs of words, under logistic or ridge regression, or the nearest row's answer."""
    words = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True)
    texts, asked = ([" ".join(e.texts) for e in rows] for rows in (train, test))
    if not any(map(words.build_analyzer(), (" ".join([*e.texts, *e.choices]) for e in train))):
        return majority(task, train, test)  # it counts words of two characters or more, and there are none
    if task.kind == "classification":
        if len({e.target for e in train}) < 2:
            return majority(task, train, test)
        model = make_pipeline(words, LogisticRegression(C=10, max_iter=1000))
        return model.fit(texts, [e.target for e in train]).predict(asked).tolist()
    if task.kind == "regression":
        return make_pipeline(words, Ridge()).fit(texts, [e.target for e in train]).predict(asked).tolist()
    if task.kind == "choice":
        pairs = [f"{t} {c}" for t, e in zip(texts, train, strict=True) for c in e.choices]
        right = [i == e.target for e in train for i in range(len(e.choices))]
        model = make_pipeline(words, LogisticRegression(C=10, max_iter=1000)).fit(pairs, right)
        return [
            int(np.argmax(model.decision_function([f"{t} {c}" for c in e.choices])))
            for t, e in zip(asked, test, strict=True)
        ]
    nearest = NearestNeighbors(n_neighbors=1, metric="cosine").fit(words.fit_transform(texts))
    return [train[i].target[0] for i in nearest.kneighbors(words.transform(asked), return_distance=False)[:, 0]]
