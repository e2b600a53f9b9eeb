"""Which experts took each token of some texts, layer by layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

TOP = 8  # experts of a token that are kept, the heaviest first


@dataclass(frozen=True)
class LayerRoutes:
    """What one layer's router chose for each token of each text."""

    key: str  # of the layer, as in reports: the path of its module, with an adapter's name after it
    names: tuple[str, ...]  # of the experts, in the order of their numbers
    experts: list[Tensor]  # by text: (T, k) int, the heaviest first, -1 for none
    weights: list[Tensor]  # by text: (T, k) float

    def __post_init__(self) -> None:
        for i, (experts, weights) in enumerate(zip(self.experts, self.weights, strict=True)):
            if experts.dim() != 2 or experts.shape != weights.shape:
                raise ValueError(
                    f"{self.key}, text {i}: experts {tuple(experts.shape)} and weights {tuple(weights.shape)} must "
                    "both be (T, k)"
                )
            if experts.numel() and not -1 <= int(experts.min()) <= int(experts.max()) < len(self.names):
                raise ValueError(
                    f"{self.key}, text {i}: experts between {int(experts.min())} and {int(experts.max())}; they are "
                    f"numbered from 0 to {len(self.names) - 1}, and -1 is none"
                )
            if not weights.isfinite().all():
                raise ValueError(f"{self.key}, text {i}: a weight is infinite or no number")


@dataclass(frozen=True)
class RouteTable:
    """Texts as their tokens, and what each layer's router chose for them.

    Raises:
        ValueError: a layer has another number of texts or of tokens.
    """

    tokens: list[list[str]]  # by text: as they stand in it, spaces included
    layers: list[LayerRoutes]
    labels: list[str] | None = field(default=None)  # by text, such as its domain

    def __post_init__(self) -> None:
        if self.labels is not None and len(self.labels) != len(self.tokens):
            raise ValueError(f"labels: {len(self.labels)} for {len(self.tokens)} texts; give one for each")
        lengths = [len(text) for text in self.tokens]
        for layer in self.layers:
            found = [len(experts) for experts in layer.experts]
            if found != lengths:
                raise ValueError(f"{layer.key} has routes for texts of {found} tokens, but the texts have {lengths}")


def heaviest(weights: Tensor, indices: Tensor | None = None, top: int = TOP) -> tuple[Tensor, Tensor]:
    """The experts of each row, the heaviest first, and their weights: (N, k), with k at most `top`.

    Args:
        weights: (N, k).
        indices: (N, k) int, -1 for none; None: every expert, in order.
    """
    weights = weights.detach().float().cpu()
    if indices is None:
        indices = torch.arange(weights.shape[1]).expand_as(weights)
    indices = indices.detach().cpu().long()
    none = indices < 0
    kept = weights.masked_fill(none, -torch.inf).topk(min(top, weights.shape[1]), dim=1).indices
    return indices.gather(1, kept), weights.masked_fill(none, 0.0).gather(1, kept)


WINDOW = 6  # tokens before one that say how it is spelt, spaces included


def spelling(tokenizer: object, ids: Sequence[int]) -> list[str]:
    """The text of each token, which all together are that of `ids`; "" where a character goes on in the next one."""
    decode = tokenizer.decode  # type: ignore[attr-defined]
    pieces: list[str] = []
    start = 0  # of the tokens that have not been told yet: a character's bytes may lie in several
    for i in range(len(ids)):
        first = max(0, start - WINDOW)
        known = decode(ids[first:start], clean_up_tokenization_spaces=False)
        text = decode(ids[first : i + 1], clean_up_tokenization_spaces=False)
        if text.endswith("\N{REPLACEMENT CHARACTER}") and i + 1 < len(ids) and i - start < WINDOW:
            pieces.append("")
            continue
        pieces.append(text[len(known) :])
        start = i + 1
    return pieces
