"""Pictures of how routers are used."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

TALLEST = 60  # inches


def draw_usage(summaries: Mapping[str, Mapping[str, float]], path: str | Path) -> None:
    """Write a heat map of layers by arms, and below it bars of their means over layers.

    Shares of the choices where all routers choose, of the weight otherwise. The file's format is that of its name.

    summaries: by module, as `UsageRecorder.by_place` gives them.

    Raises:
        ValueError: there are none.
        ImportError: matplotlib is missing.
    """
    if not summaries:
        raise ValueError("plot: no router has been used since the recording began, so there is nothing to draw")
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError("usage.plot needs matplotlib: pip install matplotlib") from None
    kind = "load" if all("active" in summary for summary in summaries.values()) else "weight"
    shares = [
        {name.removeprefix(f"{kind}/"): value for name, value in summary.items() if name.startswith(f"{kind}/")}
        for summary in summaries.values()
    ]
    arms = list(dict.fromkeys(arm for layer in shares for arm in layer))
    missing = float("nan")  # an arm that a layer has not: left blank
    rows = [[layer.get(arm, missing) for arm in arms] for layer in shares]
    means = [sum(of_arm) / len(of_arm) for arm in arms if (of_arm := [layer[arm] for layer in shares if arm in layer])]
    height = min(2.5 + 0.25 * len(rows), TALLEST)
    # A figure of its own, in Agg: no window, and nothing of the user's pyplot is touched.
    figure = Figure(figsize=(max(5.0, 2.5 + 0.4 * len(arms)), height + 2), layout="constrained")
    FigureCanvasAgg(figure)
    map_, bars = figure.subplots(2, 1, height_ratios=[height - 1, 2])
    image = map_.imshow(rows, aspect="auto", vmin=0, cmap="viridis", interpolation="nearest")
    map_.set_yticks(range(len(rows)), list(summaries), fontsize=7)
    map_.set_xticks([])
    map_.set_title(f"{kind} of the arms by layer")
    figure.colorbar(image, ax=map_)
    bars.bar(range(len(arms)), means)
    bars.axhline(1 / len(arms), linestyle=":", color="black", linewidth=1)
    bars.set_xticks(range(len(arms)), arms, rotation=90, fontsize=7)
    bars.set_xlim(-0.5, len(arms) - 0.5)
    bars.set_title("mean over layers; dotted: equal shares")
    figure.savefig(path)
