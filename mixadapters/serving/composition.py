"""Which adapter a request gets: a classifier of what it is about, and a mapping from that to adapters."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from math import log
from os import PathLike
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor

from mixadapters.core.fields import check_integer, check_kind, check_share, one_of
from mixadapters.core.files import read_config, weights_of
from mixadapters.core.folders import written_aside
from mixadapters.core.rows import BASE

CONFIG, TEXTS = "composition.json", "composition.safetensors"
FORMAT = 1
OPTIONS = ("classifier", "neighbours", "max_entropy", "fallback", "mapping")  # in the file


class CompositionRouter:
    """Sends each sample to an adapter: embed, classify by category, look up the category's adapter.

    Where the classifier does not know, a sample goes to the fallback. For requests of one batch:

        router = CompositionRouter(PooledStates(model)).fit(input_ids, attention_mask, categories)
        model.generate(**inputs, adapter_names=router(**inputs))

    Source: Jain et al. 2024 (Composition of Experts, arXiv 2412.01868), two steps: category, then expert; the fallback
    by uncertainty is that of Samba-CoE.

    Args:
        embed: input_ids, attention_mask (N, T) -> features (N, d), such as `PooledStates`.
        mapping: category -> name of an adapter, such as `fit_mapping` gives it. None: categories are adapters' names.
        classifier: "logistic", a regression on standardised features, or "knn", the share of each category among the
            `neighbours` of the largest cosine.
        neighbours: of "knn".
        max_entropy: a sample whose distribution over the categories has more, as a share of the largest there is
            (0 to 1), goes to `fallback`. 1: none does. `calibrate` chooses it.
        fallback: name of an adapter; "__base__": none.

    Raises:
        ValueError: a value out of range.
    """

    def __init__(
        self,
        embed: Callable[..., Tensor],
        mapping: Mapping[str, str] | None = None,
        *,
        classifier: Literal["logistic", "knn"] = "logistic",
        neighbours: int = 5,
        max_entropy: float = 1.0,
        fallback: str = BASE,
    ) -> None:
        one_of("classifier", classifier, ("logistic", "knn"))
        check_integer("neighbours", neighbours, least=1)
        check_share("max_entropy", max_entropy)
        if not isinstance(fallback, str) or not fallback:
            raise ValueError(f"fallback={fallback!r} must be the name of an adapter, or {BASE!r}")
        if not callable(embed):
            raise ValueError(f"embed={embed!r:.80} must make features of tokens, such as PooledStates(model)")
        self.embed, self.mapping = embed, None if mapping is None else _checked_mapping(mapping)
        self.classifier, self.neighbours = classifier, neighbours
        self.max_entropy, self.fallback = max_entropy, fallback
        self.categories: tuple[str, ...] = ()
        self._features, self._labels = torch.zeros(0, 0), torch.zeros(0, dtype=torch.long)
        self._fitted: Any = None

    # --- learning -------------------------------------------------------------------------------------------------

    def fit(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, categories: Sequence[str] = ()
    ) -> CompositionRouter:
        """Learn categories from samples, input_ids and attention_mask (N, T). Errors are those of `fit_features`."""
        return self.fit_features(self.embed(input_ids=input_ids, attention_mask=attention_mask), categories)

    def fit_features(self, features: Tensor, categories: Sequence[str]) -> CompositionRouter:
        """Learn categories from features (N, d), each sample's by name.

        Raises:
            ValueError: not one category for each sample, a single one, or one that the mapping does not have; features
                that are not finite; fewer samples than neighbours.
            ImportError: scikit-learn is missing.
        """
        if isinstance(categories, str) or len(categories) != len(features):
            raise ValueError(f"categories must be {len(features)} names, one for each sample, and not {categories!r}")
        names = tuple(sorted(set(categories)))
        if len(names) < 2:
            raise ValueError(f"categories={list(names)}: there is nothing to tell apart; give two or more")
        if self.mapping is not None and (unknown := sorted(set(names) - self.mapping.keys())):
            raise ValueError(f"the mapping has no adapter for {unknown}; it has {sorted(self.mapping)}")
        if self.classifier == "knn" and len(features) < self.neighbours:
            raise ValueError(f"neighbours={self.neighbours} are more than the {len(features)} samples")
        _check_features(features, None)
        number = {name: i for i, name in enumerate(names)}
        labels = torch.tensor([number[name] for name in categories])
        self._fitted = self._learn(features.float(), labels)
        self.categories, self._features, self._labels = names, features.float(), labels
        return self

    def _learn(self, features: Tensor, labels: Tensor) -> Any:
        try:
            from sklearn.linear_model import LogisticRegression  # only who classifies needs scikit-learn
            from sklearn.neighbors import KNeighborsClassifier
            from sklearn.pipeline import make_pipeline
            from sklearn.preprocessing import StandardScaler
        except ImportError as error:
            raise ImportError("classifying requests needs scikit-learn: pip install 'mixadapters[choose]'") from error
        if self.classifier == "knn":
            model: Any = KNeighborsClassifier(self.neighbours, metric="cosine")
        else:
            model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
        return model.fit(features.numpy(), labels.numpy())

    def map_to(self, mapping: Mapping[str, str]) -> None:
        """Send categories to other adapters. Raises ValueError where a category has none."""
        mapping = _checked_mapping(mapping)
        if missing := sorted(set(self.categories) - mapping.keys()):
            raise ValueError(f"mapping={mapping} has no adapter for {missing}")
        self.mapping = mapping

    def calibrate(self, features: Tensor, keep: float = 0.95) -> float:
        """Choose `max_entropy` such that at least this share of samples (N, d) of known categories keeps its category.

        Returns:
            It.
        """
        check_share("keep", keep)
        found = self.entropy(features).sort().values
        self.max_entropy = 0.0 if keep == 0 else float(found[max(-int(-keep * len(found) // 1), 1) - 1])
        return self.max_entropy

    # --- choosing -------------------------------------------------------------------------------------------------

    def probabilities(self, features: Tensor) -> Tensor:
        """features (N, d) -> (N, C) in the order of `categories`.

        Raises:
            ValueError: before `fit`, or features of another width, or that are not finite.
        """
        if self._fitted is None:
            raise ValueError("this router knows no categories yet: call fit first")
        _check_features(features, self._features.shape[1])
        return torch.from_numpy(self._fitted.predict_proba(features.float().numpy())).float()

    def entropy(self, features: Tensor) -> Tensor:
        """features (N, d) -> (N,) the entropy of the distribution over categories, 0 (sure) to 1 (no idea)."""
        probs = self.probabilities(features)
        return (-(probs * probs.clamp_min(1e-12).log()).sum(1) / log(len(self.categories))).clamp(0.0, 1.0)

    def choose(self, features: Tensor) -> list[str]:
        """features (N, d) -> the name of each sample's adapter."""
        best = self.probabilities(features).argmax(1).tolist()
        sure = (self.entropy(features) <= self.max_entropy).tolist()
        names = [self.categories[i] for i in best]
        mapping = self.mapping or dict(zip(self.categories, self.categories, strict=True))
        return [mapping[name] if known else self.fallback for name, known in zip(names, sure, strict=True)]

    def __call__(self, input_ids: Tensor, attention_mask: Tensor | None = None, **_: Any) -> list[str]:
        """input_ids, attention_mask (N, T) -> the name of each row's adapter, for `adapter_names`."""
        return self.choose(self.embed(input_ids=input_ids, attention_mask=attention_mask))

    # --- files ----------------------------------------------------------------------------------------------------

    def save(self, folder: str | Path) -> None:
        """Write settings and samples' features, from which `load` learns again; no code is in the files.

        Raises:
            ValueError: before `fit`.
        """
        if self._fitted is None:
            raise ValueError("this router knows no categories yet: call fit first")
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        with written_aside(folder / TEXTS) as aside:
            save_file({"features": self._features.contiguous(), "labels": self._labels}, aside)
        content = {"format": FORMAT, "categories": self.categories, **{name: getattr(self, name) for name in OPTIONS}}
        with written_aside(folder / CONFIG) as aside:
            aside.write_text(json.dumps(content, indent=2), encoding="utf-8")

    @classmethod
    def load(cls, folder: str | Path, embed: Callable[..., Tensor]) -> CompositionRouter:
        """The router that `save` wrote, with features by `embed`.

        Raises:
            ValueError: a file is missing or cut, or says something that no router is saved with; the message names it.
        """
        check_kind("folder", folder, (str, PathLike), "the path of a folder")
        path = Path(folder) / CONFIG
        if not path.is_file():
            raise ValueError(f"{path} is missing: name a folder that CompositionRouter.save wrote")
        content = read_config(path)
        try:
            categories = _read_settings(content)
            if not (Path(folder) / TEXTS).is_file():
                raise ValueError(f"{TEXTS} is missing")
            router = cls(embed, **content)
            features, labels = _read_samples(Path(folder) / TEXTS, len(categories))
            return router.fit_features(features, [categories[i] for i in labels])
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path} cannot be loaded: {error}") from error


def _read_settings(content: dict[str, Any]) -> list[str]:
    """Take the categories out of what a file says of a router, and leave its options. Raises ValueError for others."""
    if content.pop("format", None) != FORMAT:
        raise ValueError(f"format must be {FORMAT}")
    categories = content.pop("categories", None)
    if not isinstance(categories, list) or not all(isinstance(name, str) for name in categories):
        raise ValueError(f"categories={categories!r} must be a list of names")
    if unknown := set(content) - set(OPTIONS):
        raise ValueError(f"unknown fields {sorted(unknown)}")
    if missing := [name for name in OPTIONS if name not in content]:  # by another value it would choose others
        raise ValueError(f"{missing[0]} is missing")
    return categories


def _read_samples(path: Path, categories: int) -> tuple[Tensor, list[int]]:
    """Features (N, d) of the samples in a file, and the number of each one's category. Raises ValueError for others.

    categories: how many there are.
    """
    with weights_of(path) as weights:
        if set(weights) != {"features", "labels"}:
            raise ValueError(f"{TEXTS} must hold features and labels, and holds {sorted(weights)}")
        features, labels = weights["features"], weights["labels"]
    whole = features.is_floating_point() and labels.dtype == torch.long
    if features.dim() != 2 or labels.shape != features.shape[:1] or not whole:
        raise ValueError(f"{TEXTS}: features must be (N, d), real numbers, and labels (N,), whole ones")
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < categories:
        raise ValueError(f"{TEXTS}: labels must be numbers of the {categories} categories")
    return features, labels.tolist()


def _checked_mapping(mapping: Mapping[str, str]) -> dict[str, str]:
    pairs = dict(mapping) if isinstance(mapping, Mapping) else None
    if not pairs or not all(isinstance(word, str) and word for pair in pairs.items() for word in pair):
        raise ValueError(f"mapping={mapping!r} must be category -> name of an adapter")
    return pairs


def _check_features(features: Tensor, width: int | None) -> None:
    if features.dim() != 2 or (width is not None and features.shape[1] != width):
        raise ValueError(f"features {tuple(features.shape)} must be (N, {'d' if width is None else width})")
    if not bool(features.isfinite().all()):
        raise ValueError("features are not all finite")
