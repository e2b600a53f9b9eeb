"""Several experts become one, and the router stays as it is.

Source: Li et al. 2024 (MC-SMoE, arXiv 2310.01334): align neurons, group by the router's logits around the experts that
are used most, average by usage.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mixadapters.core.bank import Weights
from mixadapters.core.fields import check_integer, check_switches, one_of
from mixadapters.routers.permutation import assignment
from mixadapters.surgery.averaging import merge_lora, merge_neurons
from mixadapters.surgery.choices import (
    AVERAGINGS,
    GROUPINGS,
    SCOPES,
    SIMILARITIES,
    Averaging,
    Grouping,
    Scope,
    Similarity,
)
from mixadapters.surgery.grouping import grouped, likeness, named_groups, refuse_ranks
from mixadapters.surgery.layers import ExpertLayer
from mixadapters.surgery.layouts import settle_config
from mixadapters.surgery.pruning import check_usage, choose_kept, layers_to_cut, scores_of
from mixadapters.surgery.usage import ExpertUsage
from mixadapters.surgery.view import expert_output, refuse_broken

ROWS = 256  # random inputs on which experts are compared where none are given


@dataclass(frozen=True)
class LayerMerging:
    """What merging does to one layer.

    Attributes:
        key: of the `ExpertLayer`. names: of its experts before.
        expert_map: for each expert the number of the one that stands for it.
        error: mean over the experts, by usage, of ||merged(x) - E_e(x)||^2 / ||E_e(x)||^2.
        dominant_error: the same where the dominant expert of each group stands for the others as it is. Where this is
            the smaller one, merging has done harm.
    """

    key: str
    names: tuple[str, ...]
    expert_map: tuple[int, ...]
    error: float
    dominant_error: float

    @property
    def groups(self) -> dict[str, list[str]]:
        """The expert that stays -> all that it stands for."""
        found: dict[str, list[str]] = {}
        for e, other in enumerate(self.expert_map):
            found.setdefault(self.names[other], []).append(self.names[e])
        return found


@dataclass(frozen=True)
class MergeResult:
    """What merging does to a model, or would do. applied: False for a dry run."""

    similarity: str
    weight: str
    align: bool
    layers: tuple[LayerMerging, ...]
    applied: bool

    @property
    def counts(self) -> tuple[int, int]:
        """Experts before and after."""
        return sum(len(layer.names) for layer in self.layers), sum(len(layer.groups) for layer in self.layers)

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "counts": list(self.counts)}

    def __str__(self) -> str:
        before, after = self.counts
        lines = [f"{'merged' if self.applied else 'would merge'} {before} experts to {after}"]
        for layer in self.layers:
            joined = {name: members for name, members in layer.groups.items() if len(members) > 1}
            if not joined:
                lines.append(f"  {layer.key}: every expert stays by itself")
                continue
            groups = "; ".join(f"{name} for {', '.join(members)}" for name, members in joined.items())
            better = " (so keep those!)" if layer.dominant_error < layer.error else ""
            lines.append(f"  {layer.key}: {groups}; error {layer.error:.3g}, of the dominant experts alone "
                         f"{layer.dominant_error:.3g}{better}")  # fmt: skip
        return "\n".join(lines)


def merge_experts(
    model: nn.Module,
    usage: ExpertUsage,
    groups: int | Mapping[str, Sequence[Sequence[str]]],
    *,
    similarity: Similarity = "router_logits",
    grouping: Grouping = "dominant",
    align: bool = True,
    weight: Averaging = "usage",
    scope: Scope = "layer",
    inputs: Mapping[str, Tensor] | None = None,
    dry_run: bool = False,
    adapter: str | None = None,
    seed: int = 0,
) -> MergeResult:
    """Merge the experts of each layer into so many. Make optimizers anew afterwards.

    The router keeps its columns: what it gives to the members of a group goes to the one that stands for them, the one
    that is used most.

    Args:
        usage: of `record_usage`, on data that says what the model is for.
        groups: experts that stay in each layer, or on average where the scope is "global". Or `ExpertLayer.key` ->
            names of experts that become one, such as `Overspecification.groups`; layers and experts that it does not
            name stay as they are, and similarity, grouping and scope have nothing to say.
        similarity: of two experts: the cosine of their columns of "router_logits" in the usage, of their rows of
            "router_weight", of their weights once aligned ("weight"), or of their "output".
        grouping: "dominant": the experts that are used most stay, each joined by those most similar to it; "spectral":
            the clusters of the graph of similarities.
        align: permute an expert's neurons to those of the expert it joins (Hungarian algorithm). Of LoRA experts,
            which are merged as products, there is nothing to align.
        weight: of the members in the mean: by "usage", "uniform", or "dominant": the expert that stays, as it is.
        scope: see `prune_experts`; by usage.
        inputs: `ExpertLayer.key` -> (n, K) rows that its experts read, on which they are compared. None: random ones.
        dry_run: say what would happen, and change nothing.
        adapter, seed: as in `prune_experts`; the seed is of the random inputs.

    Raises:
        ValueError: an argument out of range, a usage of other experts, or experts that cannot be merged. Nothing has
            been changed then.
        ImportError: SciPy, which aligns, is missing.
    """
    check_switches(align=align, dry_run=dry_run)
    check_integer("seed", seed)
    layers = layers_to_cut(model, adapter)
    check_usage(layers, usage)
    _check_choice(groups, similarity, grouping, weight, scope)
    if align:
        assignment()  # now, and not when half of the layers are done
    for layer in layers:
        refuse_broken(layer)
    used = {layer.key: scores_of(layer, usage, "usage") for layer in layers}
    if isinstance(groups, Mapping):
        stands = named_groups(layers, groups, used)
    else:
        stay = choose_kept(layers, used, groups, None, scope, "groups")
        stands = {}
        for layer in layers:
            among = stay[layer.key] if grouping == "dominant" else range(len(layer.names))
            alike = likeness(layer, usage, similarity, _inputs(layer, inputs, seed), among)
            stands[layer.key] = grouped(alike, stay[layer.key], grouping, used[layer.key])
    for layer in layers:
        _refuse_unlike(layer, stands[layer.key], weight)
        _inputs(layer, inputs, seed)
    parts = [_merge_layer(layer, stands[layer.key], used[layer.key], inputs, seed, align, weight, dry_run)
             for layer in layers]  # one after the other: no more than one layer is held twice  # fmt: skip
    bases: list[Any] = [layer for layer in layers if layer.kind == "base"]
    if bases and not dry_run:
        settle_config(bases[0].root)
    return MergeResult(similarity, weight, align, tuple(parts), not dry_run)


def _merge_layer(
    layer: ExpertLayer, stands: Sequence[int], used: Tensor, inputs: Mapping[str, Tensor] | None, seed: int,
    align: bool, weight: str, dry_run: bool,
) -> LayerMerging:  # fmt: skip
    read, names = _inputs(layer, inputs, seed), layer.names
    merged = dict(_merged(layer, stands, used if weight == "usage" else torch.ones_like(used), align, weight))
    errors = _errors(layer, stands, merged, used, read)
    if not dry_run:
        layer.assign(stands)
        stayed = [names[e] for e in sorted(set(stands))]
        for e, weights in merged.items():
            layer.set_weights(stayed.index(names[e]), weights)
    return LayerMerging(layer.key, names, tuple(stands), *errors)


def _check_choice(groups: Any, similarity: str, grouping: str, weight: str, scope: str) -> None:
    if isinstance(groups, Mapping):
        if (similarity, grouping, scope) != ("router_logits", "dominant", "layer"):
            raise ValueError(
                f"similarity={similarity!r}, grouping={grouping!r}, scope={scope!r}: groups names the experts that "
                "become one, so these have nothing to decide; leave them out, or give a number of groups"
            )
    elif type(groups) is not int or groups < 1:
        raise ValueError(f"groups={groups!r} must be a number of experts, 1 or more, or names by layer")
    one_of("similarity", similarity, SIMILARITIES)
    one_of("grouping", grouping, GROUPINGS)
    one_of("weight", weight, AVERAGINGS)
    one_of("scope", scope, SCOPES)


def _inputs(layer: ExpertLayer, inputs: Mapping[str, Tensor] | None, seed: int) -> Tensor:
    """(n, K) rows on which the experts of a layer are compared."""
    like = layer.weights(0).down
    if inputs is None:
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(ROWS, layer.width, generator=generator).to(like.device, like.dtype)
    given = inputs.get(layer.key)
    if given is None or given.dim() != 2 or given.shape[1] != layer.width or not len(given):
        what = None if given is None else tuple(given.shape)
        raise ValueError(f"inputs[{layer.key!r}] is {what}: give rows (n, {layer.width}) that its experts read")
    return given.to(like.device, like.dtype)


def _merged(
    layer: ExpertLayer, stands: Sequence[int], shares: Tensor, align: bool, weight: str
) -> Iterator[tuple[int, Weights]]:
    """The weights of the experts that stand for others."""
    for e in sorted(set(stands)):
        members = [other for other, mine in enumerate(stands) if mine == e]
        if len(members) == 1 or weight == "dominant":
            continue
        parts = shares[members]
        parts = parts / parts.sum() if float(parts.sum()) > 0 else torch.full_like(parts, 1 / len(members))
        every = [layer.weights(member) for member in members]
        like = layer.weights(e)
        if layer.activation == "identity":
            yield e, merge_lora(every, parts.tolist(), like)
        else:
            yield e, merge_neurons(every, parts.tolist(), like, align)


def _refuse_unlike(layer: ExpertLayer, stands: Sequence[int], weight: str) -> None:
    """Raise ValueError where experts that are to become one have neurons that cannot be merged one to one, or where
    the one that stands for the others has no place for what they add."""
    if weight == "dominant":  # which merges nothing
        return
    for e in set(stands):
        members = [other for other, mine in enumerate(stands) if mine == e]
        if layer.activation != "identity":
            refuse_ranks(layer, members)
        elif len(members) > 1:
            _refuse_without_place(layer, e, members)


def _refuse_without_place(layer: ExpertLayer, e: int, members: Sequence[int]) -> None:
    """Of linear experts: the one that stands, `e`, must have a bias where others have, and a scale."""
    like, biased = layer.weights(e), [layer.names[m] for m in members if layer.weights(m).b_up is not None]
    if float(like.scale) == 0:
        lacks = "a scale of 0"
    elif biased and like.b_up is None:
        lacks = f"no bias, and {biased} have one"
    else:
        return
    raise ValueError(
        f"expert {layer.names[e]!r} at {layer.key!r} would stand for a group and has {lacks}, so the mean cannot be "
        "written there: keep it as it is (weight='dominant'), or group it otherwise"
    )


@torch.no_grad()
def _errors(
    layer: ExpertLayer, stands: Sequence[int], merged: Mapping[int, Weights], used: Tensor, read: Tensor
) -> tuple[float, float]:
    """Errors of the merged experts, and of the dominant ones alone; by usage, relative, on the rows `read`."""
    ours = theirs = total = 0.0
    kept: dict[int, tuple[Tensor, Tensor]] = {}
    for e in sorted(set(stands)):
        dominant = layer.run(e, read)
        kept[e] = (_tried(layer, e, merged[e], read) if e in merged else dominant, dominant)
    for e, other in enumerate(stands):
        target = layer.run(e, read)
        norm = float(target.float().square().sum())
        part = float(used[e]) if float(used.sum()) else 1.0
        if norm and math.isfinite(norm):
            new, dominant = kept[other]
            ours += part * float((new - target).float().square().sum()) / norm
            theirs += part * float((dominant - target).float().square().sum()) / norm
            total += part
    return (ours / total, theirs / total) if total else (0.0, 0.0)


def _tried(layer: ExpertLayer, e: int, weights: Weights, read: Tensor) -> Tensor:
    """What an expert would make of rows with other weights of its rank."""
    if layer.kind == "bank":
        return expert_output(weights, layer.activation, read)
    before = layer.weights(e)
    held = {name: value.clone() for name, value in before._asdict().items() if isinstance(value, Tensor)}
    norm = None if before.norm is None else (before.norm[0].clone(), before.norm[1].clone())
    old = before._replace(**held, norm=norm)
    try:
        layer.set_weights(e, weights)
        return layer.run(e, read)
    finally:
        layer.set_weights(e, old)
