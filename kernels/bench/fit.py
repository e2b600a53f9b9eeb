"""Fit the costs by which the rule chooses a backend on a CPU, `kernels/ops/costs.py`, to calls that have been timed.

    python kernels/bench/cpu.py --rule --drawn 160 --seed 7 --out runs/drawn7
    python kernels/bench/fit.py runs/drawn7/rule.json --test runs/drawn1/rule.json

By backend, precision and mode: the non-negative costs that come nearest to the times, by their ratio; calls that no
costs explain weigh less (least absolute deviations, by reweighting). Mixtures of all experts, which the rule does not
look up, are left out. Times should be those of a machine at rest. Prints the table, and what the rule with this table
and with that of `costs.py` loses on each file against the fastest backend: `--test` files are not fitted.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import numpy as np
from cpu import Case
from scipy.optimize import nnls

from mixadapters.kernels import costs

ROUNDS, LEAST = 8, 0.05  # of reweighting; deviations below are as good as none


def timed(path: Path) -> list[tuple[Case, dict[str, float]]]:
    """The cases of a file of `cpu.py --rule`, each with the microseconds of the backends."""
    results = json.loads(path.read_text())["results"]
    found = [(Case(**result["case"]), result["ms"]) for result in results]
    return [(case, {name: 1e3 * ms[name] for name in costs.BACKENDS if name in ms}) for case, ms in found]


def shape_of(case: Case) -> costs.Shape:
    run = case.T // (case.sequences or case.T)
    return costs.Shape(case.k, case.E, case.E * case.r, case.d, run, case.dtype != "fp32", case.training, onednn=False)


def fit(counts: np.ndarray, times: np.ndarray) -> np.ndarray:
    """counts (n, c), times (n,) -> costs (c,)."""
    weights = 1 / times
    found, _ = nnls(counts * weights[:, None], np.ones(len(times)))
    for _ in range(ROUNDS):
        deviation = np.abs(counts @ found / times - 1)
        weights = 1 / times / np.sqrt(np.maximum(deviation, LEAST))
        found, _ = nnls(counts * weights[:, None], times * weights)
    return found


def table_of(cases: list[tuple[Case, dict[str, float]]]) -> dict[Any, tuple[float, ...]]:
    table = {}
    for name in costs.BACKENDS:
        for half in (False, True):
            for training in (False, True):
                some = [
                    (costs.counts(name, shape_of(case), case.T), times[name])
                    for case, times in cases
                    if name in times and (case.dtype != "fp32", case.training) == (half, training) and case.k < case.E
                ]
                counts, times = map(np.array, zip(*some, strict=True))
                table[name, half, training] = tuple(float(f"{cost:.3g}") for cost in fit(counts, times))
    return table


def losses(cases: list[tuple[Case, dict[str, float]]], table: dict[Any, tuple[float, ...]]) -> list[float]:
    """What the rule loses in each case, as a fraction of the fastest backend's time."""
    found = []
    for case, times in cases:
        shape = shape_of(case)
        chosen = "dense"
        if case.k < case.E and case.T * shape.total_rank * case.d >= costs.SMALL:
            chosen = min(times, key=lambda name: costs.expected(name, shape, case.T, table))
        found.append(times[chosen] / min(times.values()) - 1)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="+", help="rule.json, to fit")
    parser.add_argument("--test", type=Path, nargs="*", default=[], help="rule.json, to look at alone")
    args = parser.parse_args()
    table = table_of([case for path in args.files for case in timed(path)])
    print("COSTS = {")
    for key, found in table.items():
        print(f"    {key}: ({', '.join(f'{cost:g}' for cost in found)}),".replace("'", '"'))
    print("}")
    for path in [*args.files, *args.test]:
        for what, costs_of in (("fitted", table), ("as it is", costs.COSTS)):
            lost = losses(timed(path), costs_of)
            within = [sum(loss <= most for loss in lost) for most in (0.05, 0.15)]
            print(
                f"{path}, {what}: of {len(lost)} {within[0]} within 5 %, {within[1]} within 15 %, "
                f"mean {statistics.mean(lost):.1%}, worst {max(lost):.0%}"
            )


if __name__ == "__main__":
    main()
