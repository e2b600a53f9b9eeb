"""The demo's pictures and its page of coloured text."""

from __future__ import annotations

import html
from itertools import groupby
from pathlib import Path
from typing import Any

import matplotlib
from torch import Tensor

matplotlib.use("Agg")
from matplotlib import pyplot

COLOURS = ("#4e79a7", "#f28e2b", "#59a14f", "#b07aa1", "#e15759", "#76b7b2", "#edc948", "#9c755f")
BASE_COLOUR = "#bab0ac"


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
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=140)
    pyplot.close(figure)


def coloured_page(tokenizer: Any, arms: list[str], texts: dict[str, tuple[Tensor, Tensor]], path: Path) -> None:
    """One HTML file without scripts: every token in the colour of the arm with the largest weight.

    texts: kind -> token ids (n, T) and weights (n, T, A).
    """
    colour = {arm: COLOURS[i % len(COLOURS)] for i, arm in enumerate(arms)} | {"frozen": BASE_COLOUR}
    legend = " ".join(f'<b style="background:{colour[arm]}">{html.escape(_named(arm))}</b>' for arm in arms)
    parts = [
        "<!doctype html><html lang=en><meta charset=utf-8><title>Which domain the gate chose</title>",
        "<style>body{font:15px/1.5 sans-serif;max-width:60em;margin:2em auto;padding:0 1em}"
        "b,span{padding:1px 2px;color:#fff;border-radius:2px}p{white-space:pre-wrap;font-family:monospace}</style>",
        f"<h1>Which domain the gate chose</h1><p>{legend}</p>",
    ]
    for kind, (ids, weights) in texts.items():
        parts.append(f"<h2>{html.escape(kind)}</h2>")
        parts += [f"<p>{_spans(tokenizer, arms, colour, *row)}</p>" for row in zip(ids, weights, strict=True)]
    path.write_text("\n".join(parts) + "</html>\n", encoding="utf-8")


def _named(arm: str) -> str:
    return "frozen model" if arm == "frozen" else arm


def _spans(tokenizer: Any, arms: list[str], colour: dict[str, str], ids: Tensor, weights: Tensor) -> str:
    chosen = weights.argmax(-1).tolist()
    spans = []
    for arm, group in groupby(range(len(ids)), key=chosen.__getitem__):
        places = list(group)
        text = html.escape(tokenizer.decode(ids[places[0] : places[-1] + 1]))
        share = float(weights[places, arm].mean())
        spans.append(
            f'<span style="background:{colour[arms[arm]]}" title="{_named(arms[arm])} {share:.2f}">{text}</span>'
        )
    return "".join(spans)
