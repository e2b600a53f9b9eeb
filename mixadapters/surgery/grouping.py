"""Which experts of a layer become one: those that are alike, or those that are named.

Source of spectral grouping: UNCURL (Sarkar et al. 2024, arXiv 2409.01483).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from mixadapters.core.registry import nearest
from mixadapters.surgery.averaging import aligned, flat, folded
from mixadapters.surgery.layers import ExpertLayer
from mixadapters.surgery.overspecification import same_cells
from mixadapters.surgery.usage import ExpertUsage


def likeness(layer: ExpertLayer, usage: ExpertUsage, similarity: str, read: Tensor, among: Sequence[int]) -> Tensor:
    """(E, n) float64, how similar the experts of a layer are to those `among` them: cosines."""
    if similarity == "router_logits":
        features = usage[layer.key].logits.double().T
        if not features.shape[1]:
            raise ValueError(
                f"the usage of {layer.key!r} has no logits to compare: record with samples above 0, or choose another "
                "similarity"
            )
    elif similarity == "router_weight":
        rows = layer.router_rows()
        if rows is None:
            raise ValueError(f"the router at {layer.key!r} has no row for each expert: choose another similarity")
        features = rows.double()
    elif similarity == "output":
        features = torch.stack([layer.run(e, read).double().flatten() for e in range(len(layer.names))])
    else:
        return _likeness_of_weights(layer, among)
    features = F.normalize(features, dim=-1)
    return (features @ features[list(among)].T).cpu()


def _likeness_of_weights(layer: ExpertLayer, among: Sequence[int]) -> Tensor:
    """[e, n]: of an expert that is aligned to the other."""
    every = [folded(layer.weights(e)) for e in range(len(layer.names))]

    def alike(e: int, other: int) -> float:
        if layer.activation == "identity":
            a, b = every[e].up @ every[e].down, every[other].up @ every[other].down
        else:
            refuse_ranks(layer, [e, other])
            a, b = flat(aligned(every[e], every[other])), flat(every[other])
        return float(F.cosine_similarity(a.flatten().double(), b.flatten().double(), dim=0))

    return torch.tensor([[alike(e, other) for other in among] for e in range(len(every))], dtype=torch.float64)


def grouped(alike: Tensor, stay: Sequence[int], grouping: str, used: Tensor) -> list[int]:
    """For each expert the one that stands for it, of as many as `stay`.

    Args:
        alike: of `likeness`, (E, n) among those that stay; for "spectral" (E, E).
        stay: experts around which the others gather; for "spectral", of them the number alone.
        used: (E,) how much each expert is used; in a spectral cluster the one that is used most stands for all.
    """
    if grouping == "dominant":
        best = alike.argmax(1).tolist()
        return [e if e in stay else stay[best[e]] for e in range(len(alike))]
    stands = list(range(len(alike)))
    for cluster in spectral_clusters(alike, len(stay)):
        first = max(cluster, key=lambda e: float(used[e]))
        for e in cluster:
            stands[e] = first
    return stands


def spectral_clusters(alike: Tensor, count: int) -> list[list[int]]:
    """So many clusters of the graph whose edges are (1 + cosine) / 2 of alike (E, E), which is symmetric.

    The rows of the largest eigenvectors of the normalised graph (Ng, Jordan and Weiss 2001), parted by complete
    linkage instead of by k-means, whose outcome depends on a draw.
    """
    edges = ((1 + alike) / 2).clamp_min(0).fill_diagonal_(0)
    root = edges.sum(1).clamp_min(1e-12).rsqrt()
    vectors = torch.linalg.eigh(root.unsqueeze(1) * edges * root).eigenvectors[:, -count:]
    vectors = F.normalize(vectors, dim=1)
    return same_cells(torch.cdist(vectors, vectors), math.inf, count)


def named_groups(
    layers: Sequence[ExpertLayer], groups: Mapping[str, Sequence[Sequence[str]]], used: Mapping[str, Tensor]
) -> dict[str, list[int]]:
    """For each expert of each layer the one of its group that is used most.

    Raises:
        ValueError: a layer or an expert that there is not, or one that is in two groups.
    """
    keys = [layer.key for layer in layers]
    if unknown := [key for key in groups if key not in keys]:
        raise ValueError(f"groups names the layer {unknown[0]!r}; have {keys[:4]}.{nearest(unknown[0], keys)}")
    found = {}
    for layer in layers:
        stands, seen = list(range(len(layer.names))), set[str]()
        for group in groups.get(layer.key, ()):
            if isinstance(group, str) or any(name not in layer.names or name in seen for name in group):
                raise ValueError(
                    f"groups[{layer.key!r}] has {group!r}: a group is a list of names of {layer.names}, each in one "
                    "group"
                )
            seen.update(group)
            members = [layer.names.index(name) for name in group]
            first = max(members, key=lambda e: float(used[layer.key][e]), default=0)
            stands = [first if e in members else other for e, other in enumerate(stands)]
        found[layer.key] = stands
    return found


def refuse_ranks(layer: ExpertLayer, members: Sequence[int]) -> None:
    ranks = {layer.names[e]: layer.weights(e).down.shape[0] for e in members}
    if len(set(ranks.values())) > 1:
        raise ValueError(f"experts at {layer.key!r} have different widths, {ranks}: neurons are merged one to one")
