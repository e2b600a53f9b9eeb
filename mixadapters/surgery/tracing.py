"""Which experts took each token of some texts, layer by layer."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from mixadapters.core.evaluation import in_evaluation
from mixadapters.core.fields import check_integer
from mixadapters.core.routing import FROZEN
from mixadapters.core.showing import brief, span
from mixadapters.core.sites import has_two_stacks
from mixadapters.surgery.layers import expert_layers, require_layers
from mixadapters.surgery.view import ExpertLayer, Routed, context_of

TOP = 8  # experts of a token that are kept, the heaviest first


@dataclass(frozen=True)
class LayerRoutes:
    """What one layer's router chose for each token of each text."""

    key: str  # of the layer, as in reports: the path of its module, with an adapter's name after it
    names: tuple[str, ...]  # of the experts, in the order of their numbers
    experts: list[Tensor]  # by text: (T, k) int, the heaviest first, -1 for none
    weights: list[Tensor]  # by text: (T, k) float

    __repr__ = brief

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

    def __repr__(self) -> str:
        tokens, experts = sum(map(len, self.tokens)), span([len(layer.names) for layer in self.layers])
        labels = f"; labels {sorted(set(self.labels))}" if self.labels else ""
        return (
            f"<RouteTable: {len(self.tokens)} texts of {tokens:,} tokens in all, {len(self.layers)} layers, each of "
            f"{experts} experts{labels}>"
        )

    def __post_init__(self) -> None:
        check_labels(self.labels, len(self.tokens))
        lengths = [len(text) for text in self.tokens]
        for layer in self.layers:
            found = [len(experts) for experts in layer.experts]
            if found != lengths:
                raise ValueError(f"{layer.key} has routes for texts of {found} tokens, but the texts have {lengths}")


def check_labels(labels: Sequence[str] | None, count: int) -> None:
    """Raises ValueError where there is not one for each of so many texts."""
    listed = isinstance(labels, Collection) and not isinstance(labels, (str, Mapping))
    if labels is not None and not (listed and all(isinstance(label, str) for label in labels)):
        raise ValueError(f"labels={labels!r:.80} must be a list with one string for each text")
    if labels is not None and len(labels) != count:
        raise ValueError(f"labels: {len(labels)} for {count} texts; give one for each")


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


def spelling(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """The text of each token, which all together are that of `ids`; "" where a character goes on in the next one."""
    decode = partial(tokenizer.decode, clean_up_tokenization_spaces=False)
    pieces: list[str] = []
    start = 0  # of the tokens that have not been told yet: a character's bytes may lie in several
    for i in range(len(ids)):
        first = max(0, start - WINDOW)
        known = decode(ids[first:start])
        text = decode(ids[first : i + 1])
        if text.endswith("\N{REPLACEMENT CHARACTER}") and i + 1 < len(ids) and i - start < WINDOW:
            pieces.append("")
            continue
        pieces.append(text[len(known) :])
        start = i + 1
    return pieces


def routes(
    model: nn.Module,
    tokenizer: Any,
    texts: Sequence[str],
    labels: Sequence[str] | None = None,
    *,
    adapter: str | None = None,
    length: int | None = None,
    batch: int = 8,
    top: int = TOP,
    progress: bool = False,
) -> RouteTable:
    """Which experts take each token of some texts, in every layer of routed experts.

    The model runs in evaluation. Layers that go by one router have one entry, under the first of them, and a layer
    that runs several times in a forward one for each time. Where a router weighs the frozen layer's own output, that
    is one of the names, "frozen". An encoder-decoder reads a text on both sides.

    Args:
        tokenizer: of the model, from transformers.
        labels: of the texts, such as their domains.
        adapter: see `expert_layers`.
        length: tokens of each text that are read. None: all.
        batch: texts of a forward.
        top: experts of a token that are kept, the heaviest.
        progress: whether to draw a progress bar.

    Raises:
        ValueError: the model has no routed experts, there are no texts, or one that has no tokens or too many.
    """
    layers = _one_of_each_router(require_layers(expert_layers(model, adapter)))
    check_texts(texts)
    check_labels(labels, len(texts))
    for name, number in (("batch", batch), ("top", top)):
        check_integer(name, number, least=1)
    ids = read_tokens(model, tokenizer, texts, length)
    seen: dict[str, tuple[ExpertLayer, list[Tensor], list[Tensor]]] = {}
    with evaluating(model), context_of(model), ExitStack() as stack:
        calls: list[tuple[ExpertLayer, Tensor, Tensor]] = []
        for layer in layers:
            stack.enter_context(layer.watch(partial(_keep, calls, layer, top)))
        for start in tqdm(range(0, len(ids), batch), "routes", unit="batch", disable=not progress, leave=False):
            calls.clear()
            part = ids[start : start + batch]
            model(**padded(model, part))
            _add_calls(seen, calls, part)
    found = [LayerRoutes(key, names_of(layer), *both) for key, (layer, *both) in seen.items()]
    return RouteTable([spelling(tokenizer, row) for row in ids], found, None if labels is None else list(labels))


def most_choices(model: nn.Module, adapter: str | None = None) -> int:
    """How many choices `routes` keeps of a token, over all layers, where each of them runs once in a forward."""
    layers = _one_of_each_router(expert_layers(model, adapter))
    return sum(min(TOP, (layer.top_k or len(layer.names)) + (_frozen_arm(layer) is not None)) for layer in layers)


def _one_of_each_router(layers: Sequence[ExpertLayer]) -> list[ExpertLayer]:
    found: dict[str, ExpertLayer] = {}
    for layer in layers:
        found.setdefault(layer.router, layer)
    return list(found.values())


def check_texts(texts: Any) -> None:
    """Raises ValueError where an argument is no list of texts, or one of none."""
    several = isinstance(texts, Collection) and not isinstance(texts, (str, Mapping))
    if not several or not len(texts) or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"texts={texts!r:.80} must be a list of one text or more")


def read_tokens(model: nn.Module, tokenizer: Any, texts: Sequence[str], length: int | None = None) -> list[list[int]]:
    """The ids of each text, as many as `length`. Raises ValueError: see `routes`."""
    check_texts(texts)
    if length is not None:
        check_integer("length", length, least=1)
    if not callable(tokenizer):
        raise ValueError(f"tokenizer={tokenizer!r:.80} is no tokenizer; load one: AutoTokenizer.from_pretrained(...)")
    longest = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    found = []
    for i, text in enumerate(texts):
        row = list(tokenizer(text, verbose=False)["input_ids"])[:length]
        if not row:
            raise ValueError(f"text {i}, {text!r:.60}, has no tokens; leave it out")
        if isinstance(longest, int) and len(row) > longest:
            raise ValueError(f"text {i} has {len(row)} tokens, but the model reads {longest}: pass length={longest}")
        found.append(row)
    return found


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """In evaluation and without gradients; afterwards every module is as it was."""
    with in_evaluation(model), torch.no_grad():
        yield


def padded(model: nn.Module, rows: Sequence[Sequence[int]]) -> dict[str, Tensor]:
    """What a model reads of rows of ids: padded on the right, with a mask."""
    device = next(model.parameters()).device
    ids = nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True)
    lengths = torch.tensor([len(row) for row in rows]).unsqueeze(1)
    mask = (torch.arange(ids.shape[1]) < lengths).long()
    inputs = {"input_ids": ids.to(device), "attention_mask": mask.to(device)}
    if has_two_stacks(model):
        inputs |= {f"decoder_{name}": value for name, value in inputs.items()}
    return inputs


def names_of(layer: ExpertLayer) -> tuple[str, ...]:
    """What takes a token at a layer: its experts, and the frozen layer where its router weighs that too."""
    return (*layer.names, FROZEN) if _frozen_arm(layer) is not None else layer.names


def _frozen_arm(layer: ExpertLayer) -> int | None:
    """The place of the frozen layer's own output among what the router weighs; None where it has none."""
    arms = list(getattr(getattr(getattr(layer, "mixture", None), "router", None), "arms", ()))
    return arms.index(FROZEN) if FROZEN in arms else None


def _keep(calls: list[tuple[ExpertLayer, Tensor, Tensor]], layer: ExpertLayer, top: int, routed: Routed) -> None:
    indices, weights, frozen = routed.indices.long(), routed.weights.float(), _frozen_arm(layer)
    if frozen is not None and routed.probs is not None:
        indices = torch.cat([indices, torch.full_like(indices[:, :1], len(layer.names))], 1)
        weights = torch.cat([weights, routed.probs[:, frozen : frozen + 1].float()], 1)
    calls.append((layer, *heaviest(weights, indices, top)))


def _add_calls(
    seen: dict[str, tuple[ExpertLayer, list[Tensor], list[Tensor]]],
    calls: Sequence[tuple[ExpertLayer, Tensor, Tensor]],
    rows: Sequence[Sequence[int]],
) -> None:
    """Add to each layer what it chose for each of the texts of one forward.

    Raises:
        ValueError: a layer has routed other rows than the tokens.
    """
    counts: dict[str, int] = {}
    width = max(map(len, rows))
    for layer, experts, weights in calls:
        if len(experts) != len(rows) * width:
            raise ValueError(
                f"{layer.key} has routed {len(experts)} rows in a forward of {len(rows)} x {width} tokens, so they "
                "cannot be told by their tokens"
            )
        counts[layer.key] = times = counts.get(layer.key, 0) + 1
        key = layer.key if times == 1 else f"{layer.key} ({times})"
        _, all_experts, all_weights = seen.setdefault(key, (layer, [], []))
        for i, row in enumerate(rows):
            part = slice(i * width, i * width + len(row))
            all_experts.append(experts[part])
            all_weights.append(weights[part])
