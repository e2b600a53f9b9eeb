"""Where MoSA's claim should hold most: an adapter that is too wide for its few rows.

    python examples/studies/mosa_width.py --data_dir data/vision  # cifar; without --data_dir scikit-learn's digits

Three widths by three numbers of rows per class, five seeds each, the plain adapter and MoSA on the same rows, the same
number of steps and one rate for all. The base is the small ViT of mosa_vision.py. Written down before the first run:

    MoSA minus the plain adapter, paired by seed, is largest at the greatest width with the fewest rows, where it is
    above 0; it falls with more rows and with less width, and at the smallest width it is not above what seeds make.

Writes table.md and report.json, after every run.
"""

from __future__ import annotations

import json
import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from mosa_vision import Arguments, Experiment, interval
from study_arguments import check_numbers, read_arguments
from transformers import logging as transformers_logging

METHODS = ("adapter", "mosa")


@dataclass
class Grid:
    """What to run."""

    data_dir: str | None = field(default=None, metadata={"help": "Folder of the local image sets. None: digits."})
    cache: str = field(default="runs/mosa_vision/base", metadata={"help": "Where small ViTs are kept."})
    out: str = field(default="runs/mosa_width", metadata={"help": "Folder of the results."})
    widths: list[int] = field(default_factory=lambda: [4, 32, 256])
    sizes: list[int] = field(default_factory=lambda: [2, 4, 8], metadata={"help": "Training rows per class."})
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2, 3, 4])
    steps: int = 60
    rate: float = field(default=3e-3, metadata={"help": "Of all runs: nothing is tuned."})
    test_rows: int = 500
    pretrain_epochs: int = 12

    def __post_init__(self) -> None:
        check_numbers(self)


def cell(grid: Grid, width: int, size: int) -> Experiment:
    """The experiment of one width and one number of rows per class."""
    args = Arguments(
        dataset="digits" if grid.data_dir is None else "cifar", data_dir=grid.data_dir, cache=grid.cache, out=grid.out,
        shots=size, r=width, test_rows=grid.test_rows, pretrain_epochs=grid.pretrain_epochs, layers=[3, 4, 5],
    )  # fmt: skip
    experiment = Experiment(args)
    batches = -(-len(experiment.split(0)[0]) // args.batch_size)
    args.epochs = -(-grid.steps // batches)
    return experiment


def table(grid: Grid, runs: list[dict[str, Any]]) -> str:
    """Of each cell both means, and the difference by seed with a 95 % interval of its mean."""
    lines = ["| width | rows per class | plain adapter | MoSA | difference, paired |", "|---|---|---|---|---|"]
    for width in grid.widths:
        for size in grid.sizes:
            mine = [run for run in runs if (run["width"], run["size"]) == (width, size)]
            by = {method: {r["seed"]: r["accuracy"] for r in mine if r["method"] == method} for method in METHODS}
            seeds = [seed for seed in grid.seeds if all(seed in by[method] for method in METHODS)]
            if seeds:
                means = [statistics.mean(by[method][seed] for seed in seeds) for method in METHODS]
                gaps = [by["mosa"][seed] - by["adapter"][seed] for seed in seeds]
                lines.append(f"| {width} | {size} | {means[0]:.3f} | {means[1]:.3f} | {interval(gaps)} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    grid = read_arguments(Grid, argv)
    transformers_logging.set_verbosity_error()
    torch.set_num_threads(1)
    out, runs = Path(grid.out), []
    out.mkdir(parents=True, exist_ok=True)
    experiments = {(width, size): cell(grid, width, size) for width in grid.widths for size in grid.sizes}
    for seed in grid.seeds:
        for (width, size), experiment in experiments.items():
            for method in METHODS:
                run = experiment.run(method, seed, grid.rate, test=True)
                runs.append({**run, "width": width, "size": size})
                print(f"width {width}, {size} rows, {method}, seed {seed}: {run['accuracy']:.3f}", flush=True)
        (out / "report.json").write_text(json.dumps(runs, indent=2))
        (out / "table.md").write_text(table(grid, runs) + "\n")
    print(f"\n{table(grid, runs)}")


if __name__ == "__main__":
    main()
