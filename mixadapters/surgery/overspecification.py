"""Whether a mixture has experts that compute the same, and whether its top-k has room for them.

Source: Nguyen et al. 2024 (arXiv 2309.13850). Fitted with more experts than there are, several share the place of one;
the density is found only if a row chooses as many experts as the K largest of these places hold together.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from mixadapters.core.evaluation import in_evaluation
from mixadapters.core.fields import check_integer
from mixadapters.core.showing import brief
from mixadapters.surgery.choices import check_tolerance
from mixadapters.surgery.layers import ExpertLayer, Routed, expert_layers, require_layers
from mixadapters.surgery.view import batches_of


@dataclass(frozen=True)
class LayerCells:
    """The experts of one layer by what they compute."""

    path: str
    cells: tuple[tuple[str, ...], ...]  # names of experts that compute the same, the largest cells first
    distances: Tensor  # (E, E), see `function_distances`
    top_k: int | None  # experts that a row uses
    needed_k: int | None  # so many would have room for every duplicate; None where `top_k` is

    __repr__ = brief

    @property
    def duplicates(self) -> tuple[tuple[str, ...], ...]:
        return tuple(cell for cell in self.cells if len(cell) > 1)

    @property
    def advice(self) -> str | None:
        """What to do where duplicates compete for the places of a row; None where they do not."""
        if self.top_k is None or self.needed_k is None or self.top_k >= self.needed_k:
            return None
        return (
            f"{self.path}: {sum(map(len, self.duplicates))} experts in {len(self.duplicates)} groups compute the same "
            f"and compete for {self.top_k} places: choose top_k={self.needed_k} or more, merge them, or prune"
        )


def function_distances(outputs: Tensor) -> Tensor:
    """outputs (E, N, M) of E experts on the same rows -> (E, E), mean |E_i - E_j|^2 over the mean of |E_i|^2, |E_j|^2.

    0: they compute the same; 2: they have nothing in common. Two experts that add nothing compute the same.
    """
    flat = outputs.flatten(1).to(torch.promote_types(outputs.dtype, torch.float32))
    sizes = flat.square().sum(1)
    between = torch.stack([(flat - one).square().sum(1) for one in flat])  # no x^2 + y^2 - 2xy: it cancels
    mean = (sizes + sizes.unsqueeze(1)) / 2
    return torch.where(mean > 0, between / mean.clamp_min(torch.finfo(mean.dtype).tiny), 0.0)


def same_cells(distances: Tensor, tolerance: float, least: int = 1) -> list[list[int]]:
    """Clusters of complete linkage: within one, no two are farther apart than `tolerance`. The largest first.

    distances: (E, E), symmetric. least: clusters that there are in the end.
    """
    cells = [[e] for e in range(len(distances))]
    far = distances.to(torch.float64).clone()  # of two cells, their farthest members
    far.fill_diagonal_(torch.inf)
    while len(cells) > least and float(far.min()) <= tolerance:
        first, second = sorted(divmod(int(far.argmin()), len(cells)))
        cells[first] += cells.pop(second)
        row = torch.maximum(far[first], far[second])
        far[first], far[:, first], far[first, first] = row, row, torch.inf
        left = [i for i in range(len(far)) if i != second]
        far = far[left][:, left]
    return sorted((sorted(cell) for cell in cells), key=lambda cell: (-len(cell), cell))


def needed_places(sizes: Sequence[int], top_k: int) -> int:
    """How many experts a row must choose, so that any `top_k` of the cells of these sizes fit whole."""
    return sum(sorted(sizes, reverse=True)[:top_k])


def layer_cells(
    outputs: Tensor, names: Sequence[str], *, top_k: int | None, tolerance: float = 0.01, path: str = ""
) -> LayerCells:
    """The experts of a layer by what they compute.

    Args:
        outputs: (E, N, M) on the same rows.
        top_k: distinct experts that a row uses.
        tolerance: distance below which two compute the same, see `function_distances`.

    Raises:
        ValueError: a tolerance that is not from 0 to 2, or outputs that are not finite.
    """
    check_tolerance("tolerance", tolerance)
    if broken := [name for name, output in zip(names, outputs, strict=True) if not bool(output.isfinite().all())]:
        raise ValueError(
            f"experts {broken} at {path!r} give NaN or infinite outputs, of which none can be said to be the same: "
            "their weights are broken, or what they read, or they overflow their dtype"
        )
    distances = function_distances(outputs)
    cells = same_cells(distances, tolerance)
    needed = None if top_k is None else needed_places([len(cell) for cell in cells], top_k)
    named = tuple(tuple(names[e] for e in cell) for cell in cells)
    return LayerCells(path, named, distances, top_k, needed)


@dataclass(frozen=True)
class Overspecification:
    """What `overspecification_report` has found. Layers go by `ExpertLayer.key`, experts by name."""

    layers: dict[str, LayerCells]
    dead: dict[str, tuple[str, ...]]  # experts that no row used
    dependence: dict[str, float]  # nats that the first choice of the layer before tells of this layer's

    @property
    def advice(self) -> list[str]:
        return [layer.advice for layer in self.layers.values() if layer.advice is not None]

    @property
    def groups(self) -> dict[str, tuple[tuple[str, ...], ...]]:
        """The experts that compute the same, by layer: what `merge_experts` takes as its groups."""
        return {key: layer.duplicates for key, layer in self.layers.items() if layer.duplicates}

    def as_dict(self) -> dict[str, Any]:
        cells = {
            key: {"cells": layer.cells, "top_k": layer.top_k, "needed_k": layer.needed_k}
            for key, layer in self.layers.items()
        }
        return {"layers": cells, "dead": self.dead, "dependence": self.dependence, "advice": self.advice}


@dataclass
class _Sample:
    """What one layer read and chose, of the rows that count."""

    rows: list[Tensor] = field(default_factory=list)  # (n, K), the first that came
    first: list[Tensor] = field(default_factory=list)  # (n,) the expert of the largest weight of every row; -1: none
    used: set[int] = field(default_factory=set)

    def add(self, routed: Routed, samples: int) -> None:
        mask = slice(None) if routed.mask is None else routed.mask
        indices, weights = routed.indices[mask], routed.weights[mask].masked_fill(routed.indices[mask] < 0, -torch.inf)
        self.first.append(indices.gather(1, weights.argmax(1, keepdim=True)).squeeze(1))
        self.used.update(indices.unique().tolist())
        missing = samples - sum(map(len, self.rows))
        if missing > 0:
            self.rows.append(routed.inputs[mask][:missing])


@torch.no_grad()
def overspecification_report(
    model: nn.Module,
    data: Iterable[dict[str, Any]],
    *,
    tolerance: float = 0.01,
    samples: int = 1024,
    adapter: str | None = None,
) -> Overspecification:
    """Which experts of each layer compute the same on `data`, and whether rows have room for all of them.

    Args:
        data: batches, as arguments of the model.
        tolerance: as in `layer_cells`.
        samples: rows on which the experts of a layer are compared, at most: the first that come.
        adapter: as in `expert_layers`.

    Raises:
        ValueError: the model has no experts, `data` reach none of them, or a number is out of range.
    """
    check_tolerance("tolerance", tolerance)
    check_integer("samples", samples, least=1)
    layers = require_layers(expert_layers(model, adapter))
    seen: dict[str, _Sample] = {layer.key: _Sample() for layer in layers}
    with in_evaluation(model), ExitStack() as stack:
        for layer in layers:
            stack.enter_context(layer.watch(partial(seen[layer.key].add, samples=samples)))
        for batch in batches_of("data", data):
            model(**batch)
    if idle := [key for key, sample in seen.items() if not sum(map(len, sample.rows))]:
        raise ValueError(f"no row of data reaches the experts at {idle[0]!r}: give batches that do")
    cells = {layer.key: _cells(layer, torch.cat(seen[layer.key].rows), tolerance) for layer in layers}
    dead = {
        layer.key: tuple(n for e, n in enumerate(layer.names) if e not in seen[layer.key].used) for layer in layers
    }
    firsts = {key: torch.cat(sample.first) for key, sample in seen.items()}
    dependence = {
        key: mutual_information(firsts[before], firsts[key])
        for before, key in pairwise(firsts)
        if len(firsts[before]) == len(firsts[key])  # layers of a head read other rows
    }
    return Overspecification(cells, dead, dependence)


def _cells(layer: ExpertLayer, rows: Tensor, tolerance: float) -> LayerCells:
    outputs = torch.stack([layer.run(e, rows) for e in range(len(layer.names))])
    return layer_cells(outputs, layer.names, top_k=layer.top_k, tolerance=tolerance, path=layer.key)


def mutual_information(one: Tensor, other: Tensor) -> float:
    """Nats that one of two choices (N,) tells of the other."""
    (_, first), (_, second) = one.unique(return_inverse=True), other.unique(return_inverse=True)
    counts = torch.zeros(int(first.max()) + 1, int(second.max()) + 1, dtype=torch.float64)
    counts.index_put_((first.cpu(), second.cpu()), torch.ones(len(one), dtype=torch.float64), accumulate=True)
    joint = counts / counts.sum()
    apart = joint.sum(1, keepdim=True) * joint.sum(0)
    return float((joint * (joint / apart).log().nan_to_num(neginf=0.0)).sum())
