"""The demo's pictures and its page of coloured text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
from torch import Tensor

matplotlib.use("Agg")
from matplotlib import pyplot

from mixadapters.surgery.page import write_page
from mixadapters.surgery.tracing import LayerRoutes, RouteTable, heaviest, spelling

COLOURS = ("#4e79a7", "#f28e2b", "#59a14f", "#b07aa1", "#e15759", "#76b7b2", "#edc948", "#9c755f")


def plot_routing(weights: dict[str, dict[str, float]], path: Path) -> None:
    """Which arm the tokens of each kind of text are sent to: kind -> arm -> mean weight."""
    kinds, arms = list(weights), list(next(iter(weights.values())))
    figure, axes = pyplot.subplots(figsize=(1.5 + 0.9 * len(arms), 1.2 + 0.5 * len(kinds)), layout="constrained")
    axes.imshow([[weights[kind][arm] for arm in arms] for kind in kinds], vmin=0, vmax=1, cmap="Blues", aspect="auto")
    for y, kind in enumerate(kinds):
        for x, arm in enumerate(arms):
            value = weights[kind][arm]
            axes.text(x, y, f"{value:.2f}", ha="center", va="center", color="white" if value > 0.6 else "black")
    axes.set_xticks(range(len(arms)), arms)
    axes.set_yticks(range(len(kinds)), kinds)
    axes.set(xlabel="weight of", ylabel="text", title="Where the gate sends text")
    figure.savefig(path, dpi=140)
    pyplot.close(figure)


def plot_bars(values: dict[str, dict[str, float]], path: Path, title: str, label: str) -> None:
    """Bars of each system by kind of text: system -> kind -> value."""
    kinds = list(dict.fromkeys(kind for bars in values.values() for kind in bars))
    figure, axes = pyplot.subplots(figsize=(2 + 1.1 * len(kinds), 3.6), layout="constrained")
    width = 0.8 / len(values)
    for i, (system, bars) in enumerate(values.items()):
        places = [kinds.index(kind) + (i - (len(values) - 1) / 2) * width for kind in bars]
        axes.bar(places, list(bars.values()), width, label=system, color=COLOURS[i % len(COLOURS)])
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set_xticks(range(len(kinds)), kinds)
    axes.set(ylabel=label, title=title)
    figure.legend(loc="outside lower center", ncols=2, fontsize=8)
    figure.savefig(path, dpi=140)
    pyplot.close(figure)


def coloured_page(tokenizer: Any, arms: list[str], texts: dict[str, tuple[Tensor, Tensor]], path: Path) -> None:
    """The page of routes: every token in the colour of the arm with the largest weight.

    texts: kind -> token ids (n, T) and weights (n, T, A).
    """
    rows = [(kind, ids, weights) for kind, both in texts.items() for ids, weights in zip(*both, strict=True)]
    experts, weights = zip(*(heaviest(row) for _, _, row in rows), strict=True)
    gate = LayerRoutes("gate", tuple(arms), list(experts), list(weights))
    tokens = [spelling(tokenizer, ids.tolist()) for _, ids, _ in rows]
    write_page(RouteTable(tokens, [gate], [kind for kind, _, _ in rows]), path, title="Which domain the gate chose")
