"""Experts that a model can do without: chosen by how they are used, and cut out.

Sources: the criterion "saliency" is that of REAP (Lasby et al. 2025, arXiv 2510.13999), pruning for a task by its own
statistics that of UNCURL (Sarkar et al. 2024, arXiv 2409.01483).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from mixadapters.core.fields import check_integer, check_kind, check_switches, one_of
from mixadapters.surgery.choices import CRITERIA, SCOPES, Criterion, Scope
from mixadapters.surgery.layers import ExpertLayer, expert_layers, require_layers
from mixadapters.surgery.layouts import settle_config
from mixadapters.surgery.mixtures import MixtureExperts, mixture_layers
from mixadapters.surgery.usage import ExpertUsage, LayerUsage, check_is_usage


@dataclass(frozen=True)
class LayerPruning:
    """What pruning does to one layer.

    Attributes:
        key: of the `ExpertLayer`. names: of its experts before.
        kept: the numbers of those that stay, in order.
        scores: of all, by the criterion; larger ones stay.
        retained: the share of the scores' sum that stays.
        growth: where what the others lose goes to those that stay: the mean and the largest factor by which the
            weights of a row grow whose experts all stay, of a sample of rows. None where they do not.
    """

    key: str
    names: tuple[str, ...]
    kept: tuple[int, ...]
    scores: tuple[float, ...]
    retained: float
    growth: tuple[float, float] | None = None

    @property
    def dropped(self) -> tuple[str, ...]:
        return tuple(name for e, name in enumerate(self.names) if e not in self.kept)


@dataclass(frozen=True)
class PruneResult:
    """What pruning does to a model, or would do.

    Attributes:
        parameters: of all experts, before and after.
        applied: False for a dry run.
    """

    criterion: str
    scope: str
    preserve_mass: bool
    layers: tuple[LayerPruning, ...]
    parameters: tuple[int, int]
    applied: bool

    @property
    def counts(self) -> tuple[int, int]:
        """Experts before and after."""
        return sum(len(layer.names) for layer in self.layers), sum(len(layer.kept) for layer in self.layers)

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "counts": list(self.counts)}

    def __str__(self) -> str:
        before, after = self.counts
        verb = "pruned" if self.applied else "would prune"
        lines = [f"{verb} {before} experts to {after} by {self.criterion} ({self.parameters[0]:,} parameters to "
                 f"{self.parameters[1]:,})"]  # fmt: skip
        for layer in self.layers:
            grown = "" if layer.growth is None else f"; weights of rows untouched grow by x{layer.growth[0]:.3f}"
            kept = ", ".join(layer.names[e] for e in layer.kept)
            lines.append(f"  {layer.key}: keeps {kept} ({layer.retained:.1%} of the {self.criterion}){grown}")
        return "\n".join(lines)


def prune_experts(
    model: nn.Module,
    usage: ExpertUsage | None,
    keep: int | None = None,
    *,
    factor: float | None = None,
    criterion: Criterion = "saliency",
    scope: Scope = "layer",
    preserve_mass: bool = False,
    dry_run: bool = False,
    adapter: str | None = None,
    seed: int = 0,
) -> PruneResult:
    """Cut out the experts that matter least. Make optimizers anew afterwards.

    Args:
        model: with a mixture among its adapters, or an MoE base.
        usage: of `record_usage` on data that says what the model is for; None for "random".
        keep: experts that stay in each layer, or on average where the scope is "global".
        factor: instead of `keep`: a layer of E experts keeps E / factor, rounded up.
        criterion: "saliency", the mean of weight * ||E_e(x)|| over the tokens of an expert; "router_weighted_norm",
            the sum of that over all tokens; "usage", its number of tokens; "random".
        scope: whether each layer keeps as many, or the model as a whole, by the share that an expert has in the sum of
            its layer.
        preserve_mass: see `ExpertLayer.keep`.
        dry_run: say what would happen, and change nothing.
        adapter: of this adapter, "" for the base. None: of the adapter that has experts (of several
            the active one), else of the base.
        seed: of "random".

    Raises:
        ValueError: an argument out of range; a usage of other experts; or experts that cannot go. Nothing has been
            changed then.
    """
    check_switches(preserve_mass=preserve_mass, dry_run=dry_run)
    check_integer("seed", seed)
    layers = layers_to_cut(model, adapter)
    check_usage(layers, usage, "random" if criterion == "random" else "")
    _check_choice(keep, factor, criterion, scope)
    scores = {layer.key: scores_of(layer, usage, criterion, seed) for layer in layers}
    kept = choose_kept(layers, scores, keep, factor, scope)
    for layer in layers:
        layer.check_keep(kept[layer.key], preserve_mass)
    parts = tuple(_layer_result(layer, kept[layer.key], scores[layer.key], usage, preserve_mass) for layer in layers)
    sizes = sizes_of(layers, kept)
    if not dry_run:
        cut(layers, kept, preserve_mass)
    return PruneResult(criterion, scope, preserve_mass, parts, sizes, not dry_run)


def layers_to_cut(model: nn.Module, adapter: str | None) -> list[ExpertLayer]:
    """The layers that a verb means: of the adapter that has experts, of several the active one; else of the base.

    Raises:
        ValueError: there are none, or those of several adapters, all or none of them active.
    """
    layers = mixture_layers(model) if adapter is None else expert_layers(model, adapter)
    owners = list(dict.fromkeys(layer.adapter for layer in layers))
    active: list[str] = next(
        (layer.tuner.active_adapters for layer in layers if isinstance(layer, MixtureExperts)), []
    )
    acting = [owner for owner in owners if owner in active]
    if len(owners) > 1 and len(acting) == 1:
        return [layer for layer in layers if layer.adapter == acting[0]]
    if len(owners) > 1:
        raise ValueError(f"the model has experts of the adapters {owners}: say which by adapter=...")
    return require_layers(layers or (expert_layers(model, "") if adapter is None else []))


def check_usage(layers: Sequence[ExpertLayer], usage: ExpertUsage | None, without: str = "") -> None:
    """Raise ValueError for a usage that is not of these layers. `without`: what needs none."""
    if usage is None:
        if without:
            return
        raise ValueError("usage=None: say how the experts are used, by record_usage on data of the task")
    check_is_usage("usage", usage)
    for layer in layers:
        found = usage.layers.get(layer.key)
        if found is None:
            raise ValueError(f"the usage has nothing of {layer.key!r}; it has {list(usage.layers)[:4]}")
        found.refuse_others(layer)
        if not int(found.rows):
            raise ValueError(f"the usage of {layer.key!r} has seen no rows: run the model inside record_usage")
        found.refuse_broken(layer.key)


def _check_choice(keep: Any, factor: Any, criterion: str, scope: str) -> None:
    if (keep is None) == (factor is None):
        raise ValueError(f"keep={keep!r} and factor={factor!r}: give one of the two")
    if keep is not None:
        check_integer("keep", keep, least=1)
    if factor is not None and (type(factor) not in (int, float) or not 1 <= factor < math.inf):
        raise ValueError(f"factor={factor!r} must be a number, 1 or more: a layer of E experts keeps E / factor")
    one_of("criterion", criterion, CRITERIA)
    one_of("scope", scope, SCOPES)


def scores_of(layer: ExpertLayer, usage: ExpertUsage | None, criterion: str, seed: int = 0) -> Tensor:
    """(E,) float64, how much a criterion speaks for each expert.

    Raises:
        ValueError: it speaks for none of them, so that their order alone would decide.
    """
    if criterion == "random":
        generator = torch.Generator().manual_seed(seed + sum(map(ord, layer.router)))
        return torch.rand(len(layer.names), generator=generator, dtype=torch.float64)
    assert usage is not None
    found = usage[layer.key].cpu()
    values = {"saliency": found.mean_saliency, "router_weighted_norm": found.saliency, "usage": found.tokens.double()}
    if not bool(values[criterion].any()):
        raise ValueError(
            f"criterion={criterion!r}: every expert of {layer.key!r} scores 0 in this usage, so there is nothing to "
            "choose by (experts before training give 0); record after training, or use 'usage' or 'random'"
        )
    return values[criterion]


def choose_kept(
    layers: Sequence[ExpertLayer],
    scores: Mapping[str, Tensor],
    keep: int | None,
    factor: float | None,
    scope: str,
    called: str = "keep",
) -> dict[str, list[int]]:
    """The numbers of the experts that stay, by layer. Layers of one router lose the same, by the sum of their shares.

    Args:
        called: what the caller calls `keep`, in messages.

    Raises:
        ValueError: more experts than there are would stay; or a global scope, and a router that chooses among groups.
    """
    units: dict[str, dict[str, float]] = {}  # router -> expert -> score
    for layer in layers:
        shares = scores[layer.key] / scores[layer.key].sum().clamp_min(1e-300)
        unit = units.setdefault(layer.router, dict.fromkeys(layer.names, 0.0))
        for name, share in zip(layer.names, shares.tolist(), strict=True):
            unit[name] = unit.get(name, 0.0) + share
    most = max(map(len, units.values()))
    if keep is not None and keep > most:
        raise ValueError(f"{called}={keep}: no layer has more than {most} experts")
    wanted = {r: min(len(u), math.ceil(len(u) / factor) if factor else keep or 1) for r, u in units.items()}
    groups = {layer.router: layer.groups for layer in layers}
    if scope == "global":
        if max(groups.values()) > 1:
            raise ValueError("scope='global': a router of this model chooses among groups of experts; use 'layer'")
        least = {layer.router: min(layer.top_k or 1, len(layer.names)) for layer in layers}
        stay = _best_of_all(units, least, sum(wanted.values()))
    else:
        stay = {router: _best(unit, wanted[router], groups[router]) for router, unit in units.items()}
    kept = {}
    for layer in layers:
        mine = [e for e, name in enumerate(layer.names) if name in stay[layer.router]]
        kept[layer.key] = mine or [int(scores[layer.key].argmax())]
    return kept


def _best(unit: Mapping[str, float], count: int, groups: int) -> set[str]:
    """The names of the largest scores; as many of each of `groups` equal blocks, which rounds up."""
    names, size = list(unit), len(unit) // groups
    blocks = [names[i * size : (i + 1) * size] for i in range(groups)]
    each = math.ceil(count / groups)
    return {name for block in blocks for name in sorted(block, key=lambda n: -unit[n])[:each]}


def _best_of_all(
    units: Mapping[str, Mapping[str, float]], least: Mapping[str, int], budget: int
) -> dict[str, set[str]]:
    """The names of the largest scores of all units together, and of each no fewer than its least."""
    stay = {r: set(sorted(unit, key=lambda n: -unit[n])[: least[r]]) for r, unit in units.items()}
    others = [(share, r, name) for r, unit in units.items() for name, share in unit.items() if name not in stay[r]]
    for _, router, name in sorted(others, reverse=True)[: max(budget - sum(map(len, stay.values())), 0)]:
        stay[router].add(name)
    return stay


def _layer_result(
    layer: ExpertLayer, kept: Sequence[int], scores: Tensor, usage: ExpertUsage | None, preserve_mass: bool
) -> LayerPruning:
    retained = float(scores[list(kept)].sum() / scores.sum().clamp_min(1e-300))
    grows = layer.competes and not preserve_mass and len(kept) < len(layer.names)
    found = None if usage is None else usage.layers.get(layer.key)
    growth = None if found is None or not grows else growth_of(found, kept, layer.top_k)
    return LayerPruning(layer.key, layer.names, tuple(kept), tuple(scores.tolist()), retained, growth)


def growth_of(usage: LayerUsage, kept: Sequence[int], top_k: int | None) -> tuple[float, float] | None:
    """Mean and largest factor by which a softmax over the kept experts alone is larger, for rows that use only these.

    None where the sample has no such row.
    """
    probs = usage.logits.double().softmax(-1)
    if not len(probs):
        return None
    chosen = probs.topk(top_k or 1).indices
    untouched = torch.isin(chosen, torch.tensor(list(kept))).all(1)
    factors = 1 / probs[untouched][:, list(kept)].sum(1)
    return (float(factors.mean()), float(factors.max())) if len(factors) else None


def sizes_of(layers: Sequence[ExpertLayer], kept: Mapping[str, Sequence[int]]) -> tuple[int, int]:
    """Parameters of all experts, and of those that stay."""
    before = after = 0
    for layer in layers:
        for e in range(len(layer.names)):
            count = sum(tensor.numel() for tensor in layer.weights(e).tensors())
            before += count
            after += count if e in kept[layer.key] else 0
    return before, after


def cut(layers: Sequence[ExpertLayer], kept: Mapping[str, Sequence[int]], preserve_mass: bool) -> None:
    """Keep these experts, layer by layer; those of an adapter by one call of its tuner."""
    ours = [layer for layer in layers if isinstance(layer, MixtureExperts)]
    if ours:
        keep = {layer.path: [layer.names[e] for e in kept[layer.key]] for layer in ours}
        ours[0].tuner.keep_experts(keep, renormalize=not preserve_mass, adapter_name=ours[0].adapter)
    bases: list[Any] = [layer for layer in layers if layer.kind == "base"]
    for layer in bases:
        layer.keep(kept[layer.key], preserve_mass)
    if bases:
        settle_config(bases[0].root)


# --- the curve ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CurvePoint:
    """What a model is worth with so many experts in each layer."""

    keep: int
    experts: int  # in all layers
    parameters: int  # of the experts
    value: float


@dataclass(frozen=True)
class PruneCurve:
    """What a model is worth with fewer and fewer experts.

    Attributes:
        points: from all experts to the fewest.
        higher_is_better: whether `value` is such a number.
    """

    criterion: str
    points: tuple[CurvePoint, ...]
    higher_is_better: bool

    def threshold(self, tolerance: float) -> CurvePoint:
        """The point of fewest experts up to which no value is worse than the first by more than `tolerance`."""
        sign = 1 if self.higher_is_better else -1
        best = self.points[0]
        for point in self.points:
            if sign * (self.points[0].value - point.value) > tolerance:
                break
            best = point
        return best

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def prune_curve(
    model: nn.Module,
    usage: ExpertUsage | None,
    evaluate: Callable[[nn.Module], float],
    keeps: Sequence[int] | None = None,
    *,
    higher_is_better: bool = False,
    criterion: Criterion = "saliency",
    **options: Any,
) -> PruneCurve:
    """What a model is worth against the experts that it keeps. The model stays as it is: a copy is cut, step by step.

    Args:
        evaluate: model -> a loss, or where `higher_is_better` an accuracy.
        keeps: experts of a layer. None: all, and each half of that down to what a token uses.
        options: of `prune_experts`.

    Raises:
        ValueError: as `prune_experts`.
    """
    check_switches(higher_is_better=higher_is_better)
    if not callable(evaluate):
        raise ValueError(f"evaluate={evaluate!r:.80} must be a function of a model, which gives a loss or an accuracy")
    if keeps is not None:
        check_kind("keeps", keeps, Iterable, "a list of numbers of experts")
        for keep in keeps:
            check_integer("keeps", keep, least=1)
    layers = layers_to_cut(model, options.get("adapter"))
    most, least = max(len(layer.names) for layer in layers), max(layer.top_k or 1 for layer in layers)
    steps = sorted({most, *(keeps if keeps is not None else _halves(most, least))}, reverse=True)
    work, points = copy.deepcopy(model), []
    for keep in steps:
        result = prune_experts(work, usage, keep, criterion=criterion, **options)
        usage = None if usage is None else after_pruning(usage, result)
        points.append(CurvePoint(keep, result.counts[1], result.parameters[1], float(evaluate(work))))
    return PruneCurve(criterion, tuple(points), higher_is_better)


def _halves(most: int, least: int) -> Iterator[int]:
    while most > least:
        most = max(most // 2, least)
        yield most


def after_pruning(usage: ExpertUsage, result: PruneResult) -> ExpertUsage:
    """The usage of the experts that have stayed: what was recorded of them before."""
    layers = dict(usage.layers)
    for part in result.layers:
        if (found := layers.get(part.key)) is not None:
            kept = list(part.kept)
            names = [part.names[e] for e in kept] if found.adapter else [str(e) for e in range(len(kept))]
            layers[part.key] = replace(
                found, names=tuple(names), tokens=found.tokens[kept], mass=found.mass[kept],
                saliency=found.saliency[kept], pairs=found.pairs[kept][:, kept], logits=found.logits[:, kept],
                units=tuple(found.units[e] for e in kept if found.units),
            )  # fmt: skip
    by_label = {label: after_pruning(labelled, result) for label, labelled in usage.by_label.items()}
    return ExpertUsage(layers, by_label)
