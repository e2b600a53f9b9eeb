"""The page: text coloured by the expert that took each token, in one HTML file that needs no network.

`page.html`, `page.css` and `page.js` are its parts. Texts, names and labels are strangers': they are data in it, which
the script shows as text; the page's policy lets no other script and no other style run.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
from importlib.resources import files
from pathlib import Path
from typing import Any

from torch import Tensor

from mixadapters.core.fields import check_kind
from mixadapters.core.folders import written_aside
from mixadapters.core.usage import WITHOUT_EXPERT
from mixadapters.surgery.tracing import LayerRoutes, RouteTable
from mixadapters.surgery.usage import ExpertUsage, check_is_usage

MOST_CHOICES = 2_000_000  # of all tokens in all layers: some 20 MB
MOST_TOKENS = 100_000  # more of them are slow to draw
MARK = re.compile(r"\{\{(\w+)\}\}")


def write_page(
    table: RouteTable,
    path: str | Path,
    usage: ExpertUsage | None = None,
    title: str = "Which expert took each token",
) -> None:
    """Write the page of some routes.

    Args:
        usage: of more text than the page shows; its bars and heat maps are of that. None: of the texts shown.

    Raises:
        ValueError: there is nothing to show, or more than a browser draws with ease.
    """
    text = page(table, usage, title)
    with written_aside(path) as aside:
        aside.write_text(text, encoding="utf-8")


def page(table: RouteTable, usage: ExpertUsage | None = None, title: str = "Which expert took each token") -> str:
    """The page as text. See `write_page`."""
    check_size(table)
    check_kind("title", title, str, "a string")
    if usage is not None:
        check_is_usage("usage", usage)
    parts = {name: files("mixadapters.surgery").joinpath(f"page.{name}").read_text("utf-8") for name in ("css", "js")}
    values = {
        "title": html.escape(title),
        "summary": html.escape(summary(table)),
        "policy": html.escape(_policy(parts["css"], parts["js"])),
        "style": parts["css"],
        "script": parts["js"],
        "data": _inert(json.dumps(_payload(table, usage), ensure_ascii=False, separators=(",", ":"))),
    }
    whole = files("mixadapters.surgery").joinpath("page.html").read_text("utf-8")
    return MARK.sub(lambda mark: values[mark[1]], whole)  # once: what is filled in is not looked at again


def check_size(table: RouteTable) -> None:
    """Raises ValueError where there is nothing to show, or more than a browser draws with ease."""
    check_kind("table", table, RouteTable, "a RouteTable, as routes gives it")
    if not table.layers or not any(table.tokens):
        raise ValueError(f"a page of {len(table.tokens)} texts and {len(table.layers)} layers has nothing to show")
    choices = sum(experts.numel() for layer in table.layers for experts in layer.experts)
    check_counts(sum(map(len, table.tokens)), choices)


def check_counts(tokens: int, choices: int) -> None:
    """Raises ValueError where that is more than a browser draws with ease."""
    if tokens > MOST_TOKENS or choices > MOST_CHOICES:
        raise ValueError(
            f"{tokens:,} tokens with {choices:,} choices of experts in all layers are too much for a page, which "
            f"takes {MOST_TOKENS:,} and {MOST_CHOICES:,}: give fewer or shorter texts"
        )


def summary(table: RouteTable) -> str:
    """One line on what is shown."""
    experts = {len(layer.names) for layer in table.layers}
    kinds = f" with {_count(len(set(table.labels)), 'label')}" if table.labels else ""
    fewest, most = min(experts), max(experts)
    return (
        f"{_count(len(table.tokens), 'text')}{kinds}, {_count(sum(map(len, table.tokens)), 'token')}, "
        f"{_count(len(table.layers), 'layer')} of {fewest if fewest == most else f'{fewest} to {most}'} experts"
    )


def short_keys(layers: list[LayerRoutes]) -> list[str]:
    """What tells the layers' keys apart: without the parts that all have in common at their beginning and end."""
    parts = [re.split(r"[./]", layer.key) for layer in layers]
    shortest = min(map(len, parts))
    head = next((i for i in range(shortest - 1) if len({p[i] for p in parts}) > 1), shortest - 1)
    tail = next((i for i in range(shortest - head - 1) if len({p[-1 - i] for p in parts}) > 1), shortest - head - 1)
    return [".".join(p[head : len(p) - tail]) for p in parts]


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def _policy(style: str, script: str) -> str:
    """A content security policy under which nothing but the page's own style and script does anything."""

    def digest(text: str) -> str:
        return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()

    return (
        f"default-src 'none'; style-src 'sha256-{digest(style)}'; script-src 'sha256-{digest(script)}'; "
        "base-uri 'none'; form-action 'none'"
    )


def _inert(text: str) -> str:
    """JSON in which no HTML can begin or end."""
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def _payload(table: RouteTable, usage: ExpertUsage | None) -> dict[str, Any]:
    """What the script reads. Experts are numbered through over all layers, by name."""
    numbers: dict[str, int] = {}
    for layer in table.layers:
        for name in layer.names:
            numbers.setdefault(name, len(numbers))
    labels = list(dict.fromkeys(table.labels or ()))
    return {
        "experts": [
            {
                "name": name,
                "mark": name if name.isdecimal() else str(i),  # what stands beside its tokens
                "frozen": bool(WITHOUT_EXPERT.fullmatch(name)),
            }
            for name, i in numbers.items()
        ],
        "labels": labels,
        "texts": [
            {"tokens": tokens, "label": None if table.labels is None else labels.index(table.labels[i])}
            for i, tokens in enumerate(table.tokens)
        ],
        "layers": [
            {
                "key": layer.key,
                "short": short,
                "has": [numbers[name] for name in layer.names],
                "texts": [
                    _choices(experts, weights, [numbers[name] for name in layer.names])
                    for experts, weights in zip(layer.experts, layer.weights, strict=True)
                ],
            }
            for layer, short in zip(table.layers, short_keys(table.layers), strict=True)
        ],
        "usage": None if usage is None else [_recorded(layer, usage, labels, numbers) for layer in table.layers],
    }


def _choices(experts: Tensor, weights: Tensor, numbers: list[int]) -> dict[str, Any]:
    """The choices of one text: (T, k) one after the other, weights in thousandths."""
    of = [*numbers, -1]
    return {
        "k": experts.shape[1],
        "experts": [of[i] for i in experts.flatten().tolist()],
        "weights": (weights.double() * 1000).round().long().flatten().tolist(),
    }


def _recorded(
    layer: LayerRoutes, usage: ExpertUsage, labels: list[str], numbers: dict[str, int]
) -> dict[str, Any] | None:
    """The mass of each expert in what was recorded at a layer, over all text and by label."""

    def mass(of: ExpertUsage | None) -> list[float] | None:
        found = None if of is None else of.layers.get(layer.key)
        if found is None:
            return None
        sums = [0.0] * len(numbers)
        for name, value in zip(found.names, found.mass.tolist(), strict=True):
            if name in numbers:
                sums[numbers[name]] = round(value, 4)
        return sums

    whole = mass(usage)
    return None if whole is None else {"all": whole, "labels": [mass(usage.by_label.get(label)) for label in labels]}
