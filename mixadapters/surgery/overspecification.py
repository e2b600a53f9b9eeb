"""Whether a mixture has experts that compute the same, and whether its top-k has room for them.

Source: Nguyen et al. 2024 (arXiv 2309.13850). Fitted with more experts than there are, several share the place of one;
the density is found only if a row chooses as many experts as the K largest of these places hold together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mixadapters.core.bank import Weights
from mixadapters.core.fields import finite
from mixadapters.surgery.function import output_of


@dataclass(frozen=True)
class LayerCells:
    """The experts of one layer by what they compute."""

    path: str
    cells: tuple[tuple[str, ...], ...]  # names of experts that compute the same, the largest cells first
    distances: Tensor  # (E, E), see `function_distances`
    top_k: int | None  # experts that a row uses
    needed_k: int | None  # so many would have room for every duplicate; None where `top_k` is

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


def same_cells(distances: Tensor, tolerance: float) -> list[list[int]]:
    """Clusters of complete linkage: within one, no two are farther apart than `tolerance`. The largest first.

    distances: (E, E), symmetric.
    """
    cells = [[e] for e in range(len(distances))]
    far = distances.to(torch.float64).clone()  # of two cells, their farthest members
    far.fill_diagonal_(torch.inf)
    while len(cells) > 1 and float(far.min()) <= tolerance:
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


def check_tolerance(tolerance: float) -> None:
    if not finite(tolerance) or tolerance < 0:
        raise ValueError(f"tolerance={tolerance!r} must be a finite number, not below 0; 2 means nothing in common")


def layer_cells(
    outputs: Tensor, names: Sequence[str], *, top_k: int | None, tolerance: float = 0.01, path: str = ""
) -> LayerCells:
    """The experts of a layer by what they compute.

    Args:
        outputs: (E, N, M) on the same rows.
        top_k: distinct experts that a row uses.
        tolerance: distance below which two compute the same, see `function_distances`.

    Raises:
        ValueError: a tolerance below 0.
    """
    check_tolerance(tolerance)
    distances = function_distances(outputs)
    cells = same_cells(distances, tolerance)
    needed = None if top_k is None else needed_places([len(cell) for cell in cells], top_k)
    named = tuple(tuple(names[e] for e in cell) for cell in cells)
    return LayerCells(path, named, distances, top_k, needed)


def expert_cells(
    experts: Sequence[Weights], inputs: Tensor, activation: str, *, top_k: int | None = None, tolerance: float = 0.01
) -> LayerCells:
    """As `layer_cells`, of experts by their weights; named by number.

    inputs: (N, K) rows that they read.
    """
    outputs = torch.stack([output_of(weights, inputs, activation) for weights in experts])
    return layer_cells(outputs, [str(e) for e in range(len(experts))], top_k=top_k, tolerance=tolerance)
