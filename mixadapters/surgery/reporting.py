"""What a model's experts are, cost and do: one table for all its layers, of adapters and of the base."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from mixadapters.core.hooks import root_of
from mixadapters.surgery.layers import expert_layers, require_layers
from mixadapters.surgery.usage import ExpertUsage, LayerUsage, check_is_usage
from mixadapters.surgery.view import ExpertLayer

if TYPE_CHECKING:
    from mixadapters.surgery.overspecification import Overspecification

DEAD_BELOW = 0.01  # of the mean load, as in `core.usage`


@dataclass(frozen=True)
class Use:
    """How the experts of a layer were used.

    Attributes:
        tokens: rows that were counted.
        load: by expert, its share of the choices.
        mass: by expert, its share of the weight.
        saliency: by expert, the mean of weight * norm of its output, over its own rows.
        max_over_mean: the largest load over the mean load; 1 is balance.
        worth: so many experts of equal load would have the entropy of these loads.
        entropy: of the router's distribution, the mean over rows, in nats; 0 where the router has none.
        dead: names of experts with less than a hundredth of the mean load.
    """

    tokens: int
    load: dict[str, float]
    mass: dict[str, float]
    saliency: dict[str, float]
    max_over_mean: float
    worth: float
    entropy: float
    dead: tuple[str, ...]


@dataclass(frozen=True)
class LayerReport:
    """One layer of experts.

    Attributes:
        active: experts that a row uses; where that varies, the mean of what was recorded, or all without a record.
        parameters: of all its experts; `active_parameters` of those that a row uses.
        flops: of a row: two for each entry of a matrix that it is multiplied by, of experts and router.
        nbytes: of all its experts, as they lie in memory.
        duplicates: names of experts that compute the same; None where nobody has looked.
        needed_k: so many active experts would have room for all duplicates; None as above.
    """

    key: str
    kind: str
    experts: tuple[str, ...]
    active: float
    width: int
    parameters: int
    active_parameters: float
    flops: float
    nbytes: int
    use: Use | None = None
    duplicates: tuple[tuple[str, ...], ...] | None = None
    needed_k: int | None = None


@dataclass(frozen=True)
class Report:
    """A model and its layers of experts.

    Attributes:
        parameters: of the whole model, adapters included; `active_parameters` of what a token passes through.
        flops: of a token, forward: two for each active parameter that is no look-up table; without what attention
            makes of pairs of tokens, which depends on the length.
        nbytes: of all parameters, as they lie in memory.
    """

    parameters: int
    active_parameters: float
    flops: float
    nbytes: int
    layers: tuple[LayerReport, ...]

    @property
    def advice(self) -> list[str]:
        """What to look at: experts that nothing goes to, that take too much, or that do the same."""
        found = []
        for layer in self.layers:
            use, double = layer.use, layer.duplicates
            if use is not None and use.dead:
                found.append(f"{layer.key}: {_names(use.dead)} get next to nothing: prune them, or balance the router")
            if use is not None and use.max_over_mean > 4:
                busiest = max(use.load, key=lambda name: use.load[name])
                found.append(f"{layer.key}: {busiest} takes {use.max_over_mean:.1f} times its fair share")
            if double:
                groups = "; ".join(" = ".join(cell) for cell in double)
                compete = layer.needed_k is not None and layer.active < layer.needed_k
                crowded = f", and {layer.needed_k} places would hold them all" if compete else ""
                found.append(f"{layer.key}: experts that compute the same ({groups}){crowded}: merge or prune them")
        return found

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "advice": self.advice}

    def __str__(self) -> str:
        return self.markdown()

    def markdown(self) -> str:
        """Tables: the model, its layers, and what to look at."""
        lines = [
            "| parameters | active | FLOPs per token | bytes |",
            "|---|---|---|---|",
            f"| {self.parameters:,} | {self.active_parameters:,.0f} | {self.flops:,.0f} | {self.nbytes:,} |",
            "",
            "| layer | experts | active | parameters | FLOPs | max/mean | worth | entropy | dead | same |",
            "|---|---|---|---|---|---|---|---|---|---|",
            *(f"| {' | '.join(_cells(layer))} |" for layer in self.layers),
        ]
        return "\n".join([*lines, "", *(f"- {text}" for text in self.advice)]).rstrip() + "\n"

    def plot(self, path: str | Path) -> None:
        """Write a picture: the load of each expert in each layer, and its mean over layers.

        Raises:
            ValueError: the report has no usage.
            ImportError: matplotlib is missing.
        """
        from mixadapters.core.charts import draw_usage  # only who draws needs matplotlib

        summaries = {
            layer.key: {"active": layer.active, **{f"load/{name}": share for name, share in layer.use.load.items()}}
            for layer in self.layers
            if layer.use is not None
        }
        draw_usage(summaries, path)


def report(
    model: nn.Module,
    usage: ExpertUsage | None = None,
    overspecification: Overspecification | None = None,
    adapter: str | None = None,
) -> Report:
    """What the experts of a model are and cost; with a record, what they do; with a search, which do the same.

    Args:
        usage: of `record_usage` with this model.
        overspecification: of `overspecification_report` with this model.
        adapter: see `expert_layers`.

    Raises:
        ValueError: the model has no routed experts, or the record is of other ones, or of a broken model.
    """
    layers = require_layers(expert_layers(model, adapter))
    if usage is not None:
        check_is_usage("usage", usage)
    found = tuple(_layer(layer, usage, overspecification) for layer in layers)
    held = list(model.parameters())
    total = sum(parameter.numel() for parameter in held)
    others = [
        _layer(layer, usage, None) for layer in _known_layers(model) if layer.key not in {of.key for of in found}
    ]
    active = total - sum(layer.parameters - layer.active_parameters for layer in (*found, *others))
    nbytes = sum(parameter.nbytes for parameter in held)
    return Report(total, active, 2 * (active - _looked_up(model)), nbytes, found)


def _known_layers(model: nn.Module) -> list[ExpertLayer]:
    """All layers of experts: a token passes by experts that the report is not of, too. [] where some are unknown."""
    try:
        return expert_layers(model)
    except ValueError:
        return []


def _looked_up(model: nn.Module) -> int:
    """Entries of the table of input embeddings, unless they are those of the output too."""
    root = root_of(model)
    tables = [getattr(root, f"get_{side}_embeddings", lambda: None)() for side in ("input", "output")]
    weights = [getattr(table, "weight", None) for table in tables]
    return 0 if weights[0] is None or weights[0] is weights[1] else weights[0].numel()


def _layer(layer: ExpertLayer, usage: ExpertUsage | None, found: Overspecification | None) -> LayerReport:
    experts = [layer.weights(e) for e in range(len(layer.names))]
    recorded = None if usage is None else usage.layers.get(layer.key)
    if recorded is not None:
        recorded.refuse_others(layer)
        recorded.refuse_broken(layer.key)
    # A router for several layers may choose experts that have nothing at this one.
    active = float(len(experts)) if layer.top_k is None else float(min(layer.top_k, len(experts)))
    if recorded is not None and recorded.rows:
        active = float(recorded.tokens.sum() / recorded.rows)
    share = active / len(experts)
    tensors = [tensor for weights in experts for tensor in weights.tensors()]
    matrices = sum(tensor.numel() for tensor in tensors if tensor.dim() == 2)
    parameters = sum(tensor.numel() for tensor in tensors)
    cells = None if found is None else found.layers.get(layer.key)
    return LayerReport(
        key=layer.key,
        kind=layer.kind,
        experts=layer.names,
        active=active,
        width=layer.width,
        parameters=parameters,
        active_parameters=parameters * share,
        flops=2 * (matrices * share + layer.router_entries),
        nbytes=sum(tensor.nbytes for tensor in tensors),
        use=None if recorded is None or not recorded.rows else _use(recorded),
        duplicates=None if cells is None else cells.duplicates,
        needed_k=None if cells is None else cells.needed_k,
    )


def _use(usage: LayerUsage) -> Use:
    count = len(usage.names)
    load = (usage.tokens.double() / usage.tokens.sum().clamp_min(1)).tolist()
    mass = (usage.mass / usage.mass.sum().clamp_min(1e-30)).tolist()
    entropy = -sum(share * math.log(share) for share in load if share)
    return Use(
        tokens=int(usage.rows),
        load=dict(zip(usage.names, load, strict=True)),
        mass=dict(zip(usage.names, mass, strict=True)),
        saliency=dict(zip(usage.names, usage.mean_saliency.tolist(), strict=True)),
        max_over_mean=max(load) * count,
        worth=math.exp(entropy),
        entropy=usage.mean_entropy,
        dead=tuple(name for name, share in zip(usage.names, load, strict=True) if share < DEAD_BELOW / count),
    )


def _names(names: Iterable[str]) -> str:
    return ", ".join(names)


def _cells(layer: LayerReport) -> list[str]:
    use, double = layer.use, layer.duplicates
    return [
        layer.key.replace("|", "\\|"), str(len(layer.experts)), f"{layer.active:.3g}", f"{layer.parameters:,}",
        f"{layer.flops:,.0f}", *(["-"] * 4 if use is None else [
            f"{use.max_over_mean:.2f}", f"{use.worth:.1f}", f"{use.entropy:.2f}", _names(use.dead) or "none",
        ]),
        "-" if double is None else "; ".join(" = ".join(cell) for cell in double) or "none",
    ]  # fmt: skip
