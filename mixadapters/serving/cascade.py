"""A weak expert answers, and a strong one only where the weak one is not sure."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import log
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from mixadapters.core.fields import check_kind, check_share, one_of
from mixadapters.core.media import placeholders_of, refuse_unpaired
from mixadapters.core.registry import nearest
from mixadapters.core.rows import BASE
from mixadapters.core.showing import brief

DISPERSIONS = ("variance", "entropy")


def confidence(logits: Tensor, dispersion: Literal["variance", "entropy"] = "variance") -> Tensor:
    """logits (..., C) -> (...) how far softmax(logits) is from uniform: 0 there, and 1 where all lies on one class.

    "variance": Var(p) / Var(one-hot); "entropy": 1 - H(p) / ln C. No gradient flows through it.

    Source: Zeng et al. 2024 (Mowst, arXiv 2311.05185), the dispersions that its confidence is made of.

    Raises:
        ValueError: fewer than two classes, or another dispersion.
    """
    check_kind("logits", logits, Tensor, "a tensor (..., C)")
    classes = logits.shape[-1]
    if classes < 2:
        raise ValueError(f"confidence needs two classes or more, and logits {tuple(logits.shape)} have {classes}")
    one_of("dispersion", dispersion, DISPERSIONS)
    probs = logits.detach().float().softmax(-1)
    if dispersion == "variance":
        spread = (probs.square().sum(-1) - 1 / classes) / (1 - 1 / classes)
    else:
        spread = 1 + torch.special.xlogy(probs, probs).sum(-1) / log(classes)
    return spread.clamp(0.0, 1.0)


class CascadeOutput(NamedTuple):
    """Answers of a cascade."""

    logits: Tensor | None  # (B, C) of a classification: of each row, of the expert that decided it
    sequences: Tensor | None  # (B, T) of a generation, padded on the right
    confidence: Tensor  # (B,) of the weak expert
    strong: Tensor  # (B,) bool: the rows that the strong one answered

    def __repr__(self) -> str:
        return brief(self)


@dataclass(frozen=True)
class Calibration:
    """What a threshold does on a validation set."""

    threshold: float
    strong_share: float  # of the rows, that the strong expert is called for
    quality: float  # the mean of what rows are worth, such as the accuracy
    weak_quality: float  # of the weak expert alone
    strong_quality: float


class ConfidenceCascade:
    """Asks a weak expert, and a strong one for those rows alone of which the weak one's confidence is too small.

    Classification goes by rows (`classify`), generation by requests (`generate`). The strong expert never sees the
    other rows.

        cascade = ConfidenceCascade.of_adapters(model, weak="__base__", strong="law")
        cascade.calibrate(confidence(weak_logits), weak_logits.argmax(1) == labels, strong_logits.argmax(1) == labels)
        logits = cascade.classify(batch).logits

    Source: Zeng et al. 2024 (Mowst, arXiv 2311.05185). Theirs learns a map from dispersion to confidence, and both
    experts with it, and mixes at random; here the experts are trained as they are, and a threshold is calibrated.

    Args:
        weak, strong: called as expert(**batch) -> logits (B, C), or an output that has them; for `generate`, with a
            method of that name as transformers' models have it.
        threshold: a row whose confidence is smaller goes to the strong expert. 0: none does, 1: all do.
        dispersion: how confidence is measured; see `confidence`.

    Attributes:
        rows, strong_rows: how many rows were asked of the cascade, and how many of them of the strong expert.

    Raises:
        ValueError: a value out of range.
    """

    def __init__(
        self,
        weak: Callable[..., Any],
        strong: Callable[..., Any],
        threshold: float = 0.5,
        *,
        dispersion: Literal["variance", "entropy"] = "variance",
    ) -> None:
        check_share("threshold", threshold)
        one_of("dispersion", dispersion, DISPERSIONS)
        for name, expert in (("weak", weak), ("strong", strong)):
            if isinstance(expert, str):  # what only generates cannot be called, and who only calibrates needs none
                raise ValueError(f"{name}={expert!r:.80} must be a model, or a function that makes logits")
        self.weak, self.strong = weak, strong
        self.threshold, self.dispersion = threshold, dispersion
        self.rows = self.strong_rows = 0

    @classmethod
    def of_adapters(
        cls, model: nn.Module, weak: str, strong: str, threshold: float = 0.5, **options: Any
    ) -> ConfidenceCascade:
        """Two adapters of one model by name, "__base__" for none."""
        return cls(OneAdapter(model, weak), OneAdapter(model, strong), threshold, **options)

    @property
    def strong_share(self) -> float:
        """The share of all rows so far that the strong expert was called for; 0 before the first."""
        return self.strong_rows / max(self.rows, 1)

    @torch.no_grad()
    def classify(self, batch: Mapping[str, Any]) -> CascadeOutput:
        """Each row of the batch by one of the experts.

        Args:
            batch: arguments of the experts, each a tensor or list with an entry for each row.

        Raises:
            ValueError: arguments of different numbers of rows, images that are not one for each row, or logits that
                are not (B, C).
        """
        rows = self._count_rows(batch)
        logits = _logits(self.weak(**batch), rows)
        sure = confidence(logits, self.dispersion)
        strong = self._unsure(sure)
        if bool(strong.any()):
            better = _logits(self.strong(**rows_of(batch, strong)), int(strong.sum()))
            logits = logits.index_copy(0, strong.nonzero()[:, 0], better.to(logits))
        self._count(strong)
        return CascadeOutput(logits, None, sure, strong)

    @torch.no_grad()
    def generate(self, batch: Mapping[str, Any], **options: Any) -> CascadeOutput:
        """Each request of the batch by one of the experts. The confidence of an answer is the mean over its tokens.

        Args:
            batch: input_ids and what else has an entry for each request.
            options: other arguments of transformers' `generate`.

        Raises:
            ValueError: arguments of different numbers of rows; images that are not one for each row; beams, or several
                answers for each request, whose distributions cannot be told apart; an expert that generates nothing.
        """
        rows = self._count_rows(batch)
        for name in ("num_beams", "num_return_sequences"):
            if _setting(name, self.weak, options) not in (None, 1):
                raise ValueError(f"{name} must be 1: a cascade goes by one answer for each request, without beams")
        found = _generate(self.weak)(**batch, **options, return_dict_in_generate=True, output_logits=True)
        steps = torch.stack(found.logits, 1)  # (B, S, V)
        if len(steps) != rows or len(found.sequences) != rows:
            raise ValueError(f"the weak expert gives {len(found.sequences)} answers to {rows} requests")
        answered = _until_end(found.sequences[:, -steps.shape[1] :], _setting("eos_token_id", self.weak, options))
        sure = confidence(steps, self.dispersion).masked_fill(~answered, 0.0).sum(1) / answered.sum(1)
        strong, sequences = self._unsure(sure), found.sequences
        if bool(strong.any()):
            better = _generate(self.strong)(**rows_of(batch, strong), **options, return_dict_in_generate=True)
            pad = _setting("pad_token_id", self.weak, options)
            sequences = _replaced(sequences, strong, better.sequences, pad)
        self._count(strong)
        return CascadeOutput(None, sequences, sure, strong)

    # --- the threshold ----------------------------------------------------------------------------------------------

    def calibrate(
        self,
        sure: Tensor,
        weak_right: Tensor,
        strong_right: Tensor,
        *,
        strong_share: float | None = None,
        loss: float = 0.0,
    ) -> Calibration:
        """Set the threshold by a validation set, and say what it does there.

        Args:
            sure: (N,) the weak expert's confidence in each row.
            weak_right, strong_right: (N,) whether the expert is right there, or what its answer is worth.
            strong_share: at most this share of the rows may go to the strong expert: what is best within it. None: as
                few rows as reach the strong expert's quality less `loss`.

        Raises:
            ValueError: shapes that do not fit, or a share or loss out of range.
        """
        check_share("loss", loss)
        if strong_share is not None:
            check_share("strong_share", strong_share)
        points = self.curve(sure, weak_right, strong_right)
        if strong_share is not None:
            fitting = [point for point in points if point.strong_share <= strong_share]
            best = max(fitting, key=lambda point: (point.quality, -point.strong_share))
        else:
            enough = points[-1].quality - loss
            best = next(point for point in points if point.quality >= enough)
        self.threshold = best.threshold
        return best

    @staticmethod
    def curve(sure: Tensor, weak_right: Tensor, strong_right: Tensor) -> list[Calibration]:
        """What every threshold does on a validation set, those first that call the strong expert least.

        Arguments and errors are those of `calibrate`.
        """
        shapes = [tuple(t.shape) for t in (sure, weak_right, strong_right)]
        if sure.dim() != 1 or not len(sure) or len(set(shapes)) > 1:
            raise ValueError(f"sure, weak_right and strong_right are {shapes}; give (N,) of each, N above 0")
        for name, value in (("sure", sure), ("weak_right", weak_right), ("strong_right", strong_right)):
            if not bool(value.isfinite().all()):
                raise ValueError(f"{name} holds what is no finite number: leave such rows out of the calibration")
        values, order = sure.float().sort(stable=True)
        weak, strong = (right.double()[order] for right in (weak_right, strong_right))
        # The worth of all rows where the first n, the least sure ones, go to the strong expert: n = 0 ... N.
        worth = weak.sum() + torch.cat([weak.new_zeros(1), (strong - weak).cumsum(0)])
        count = len(values)
        ends = weak.mean().item(), strong.mean().item()
        return [
            Calibration(threshold, called / count, worth[called].item() / count, *ends)
            for called in range(count + 1)
            if (threshold := _threshold(values, called)) is not None
        ]

    def _count_rows(self, batch: Mapping[str, Any]) -> int:
        """As `count_rows`. Raises ValueError too where images are not one for each row, as the models tell."""
        rows = count_rows(batch)
        for expert in (self.weak, self.strong):
            model = getattr(expert, "model", expert)
            if isinstance(model, nn.Module):
                refuse_unpaired(batch, placeholders_of(model), "a cascade")
        return rows

    def _unsure(self, sure: Tensor) -> Tensor:
        return ~(sure >= self.threshold) | (self.threshold >= 1)  # a confidence that is no number is none

    def _count(self, strong: Tensor) -> None:
        self.rows += len(strong)
        self.strong_rows += int(strong.sum())


class OneAdapter:
    """A model of which one adapter answers all rows, in whatever batch. name: of the adapter; "__base__": none."""

    def __init__(self, model: nn.Module, name: str) -> None:
        check_kind("model", model, nn.Module, "a model")
        check_kind("name", name, str, "the name of an adapter")
        known = getattr(model, "peft_config", None)
        if known is None and name != BASE:
            raise ValueError(f"{type(model).__name__} has no adapters, and so none of the name {name!r}")
        if known is not None and name not in known and name != BASE:
            raise ValueError(f"there is no adapter {name!r}; have {[*known, BASE]}.{nearest(name, known)}")
        self.model, self.name = model, name

    @property
    def generation_config(self) -> Any:
        return getattr(self.model, "generation_config", None)

    def __call__(self, **batch: Any) -> Any:
        return self.model(**batch, adapter_names=[self.name] * count_rows(batch))

    def generate(self, **arguments: Any) -> Any:
        rows = len(next(value for value in arguments.values() if isinstance(value, Tensor)))
        return self.model.generate(**arguments, adapter_names=[self.name] * rows)


def count_rows(batch: Mapping[str, Any]) -> int:
    """Rows of a batch, each of whose entries has one entry for each of them.

    Raises:
        ValueError: there are none, or an entry has another number.
    """
    counts = {name: len(value) if hasattr(value, "__len__") else None for name, value in batch.items()}
    if not counts or len(set(counts.values())) > 1 or None in counts.values():
        raise ValueError(
            f"a batch must have one entry for each row under every name, and has {counts}. Images, of which a row may "
            "have several, must be one for each row"
        )
    return next(iter(counts.values())) or 0


def rows_of(batch: Mapping[str, Any], chosen: Tensor) -> dict[str, Any]:
    """The rows of a batch where `chosen` (B,) is True."""
    numbers = chosen.nonzero()[:, 0]
    return {
        name: value[numbers.to(value.device)] if isinstance(value, Tensor) else [value[i] for i in numbers.tolist()]
        for name, value in batch.items()
    }


def _threshold(ordered: Tensor, called: int) -> float | None:
    """The threshold by which the first `called` of these confidences are too small; None where the next one ties."""
    if called == 0:
        return 0.0
    if called == len(ordered):
        return 1.0
    # 1 stands for all rows.
    most = torch.nextafter(torch.tensor(1.0), torch.tensor(0.0)).item()
    between = min(ordered[called].item(), most)
    return between if ordered[called - 1].item() < between else None


def _logits(output: Any, rows: int) -> Tensor:
    logits = getattr(output, "logits", output)
    if not isinstance(logits, Tensor) or logits.dim() != 2 or len(logits) != rows:
        raise ValueError(
            f"an expert must give logits ({rows}, C), and gives "
            f"{tuple(logits.shape) if isinstance(logits, Tensor) else type(output).__name__}"
        )
    return logits


def _generate(expert: Any) -> Callable[..., Any]:
    if not callable(getattr(expert, "generate", None)):
        raise ValueError(f"{type(expert).__name__} has no method `generate`")
    return expert.generate


def _setting(name: str, expert: Any, options: Mapping[str, Any]) -> Any:
    """A setting of a generation: of the call, of its config, or of the model's."""
    for source in (options.get("generation_config"), getattr(expert, "generation_config", None)):
        if options.get(name) is None and getattr(source, name, None) is not None:
            return getattr(source, name)
    return options.get(name)


def _until_end(tokens: Tensor, ends: Any) -> Tensor:
    """tokens (B, S) -> bool, True up to the first that ends its row, that included."""
    if ends is None:
        return torch.ones_like(tokens, dtype=torch.bool)
    ended = torch.isin(tokens, torch.as_tensor(ends, device=tokens.device)).long()
    return ended.cumsum(1) - ended == 0


def _replaced(sequences: Tensor, rows: Tensor, better: Tensor, pad: int | None) -> Tensor:
    """sequences (B, T) with others in the rows where `rows` is True, all padded on the right to one length."""
    length = max(sequences.shape[1], better.shape[1])
    if sequences.shape[1] != better.shape[1] and pad is None:
        raise ValueError("answers have different lengths, and pad_token_id=None: pass one")
    whole = nn.functional.pad(sequences, (0, length - sequences.shape[1]), value=pad or 0)
    others = nn.functional.pad(better, (0, length - better.shape[1]), value=pad or 0)
    return whole.index_copy(0, rows.nonzero()[:, 0], others.to(whole))
