"""What a call of each backend is expected to take on a CPU: what it does, counted, times what that costs.

The costs were fitted by `kernels/bench/fit.py` to calls that were timed on one thread. A row of the table has one for
each count, in the order in which `counts` has them, in microseconds.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import NamedTuple

import torch

from mixadapters.kernels import gathered
from mixadapters.kernels.products import LEAST, SIZES
from mixadapters.kernels.segments import BLOCK

BACKENDS = ("segments", "grouped", "gathered", "dense")
HALF = (torch.bfloat16, torch.float16)  # whose products cost other than those of float32
# Multiplications of a product of all experts below which it lost 0.9 % on average, 17 at most, in 48 timed cases.
SMALL = 1e6
MAPPED = 2**25  # bytes above which memory comes from the system anew each time, page by page (glibc)
USUAL_ROWS = 2048  # where a choice must not depend on their number


class Shape(NamedTuple):
    """What a problem is but for the number of its rows. Fields as of `choose_backend`."""

    slots: int
    experts: int
    total_rank: int
    width: int
    run: int
    half: bool
    training: bool
    onednn: bool  # whether large products of float32 go there


def counts(name: str, shape: Shape, rows: int) -> tuple[float, ...]:
    """What a call does of what costs time.

    The call itself; multiplications in millions; numbers of rows that it passes over, and hidden values, in thousands;
    weights that it reads or sums gradients of in millions; slots that are summed for a row, in thousands; then what
    each backend has besides.
    """
    slots, experts, total_rank, width, run, half, training, _ = shape
    rank, places, runs = total_rank / experts, rows * slots, rows / run
    met = experts * (1 - (1 - 1 / experts) ** (runs * slots))  # experts that rows by chance choose, on average
    hidden, weights = places * rank, (total_rank if training else met * rank) * width
    moved, summed = places * width / 1e3, places / 1e3 if slots > 1 else 0.0
    own: tuple[float, ...] = ()
    if name == "dense":
        hidden, weights = rows * total_rank, total_rank * width
    elif name == "grouped":
        mapped = moved if places * width * (2 if half else 4) > MAPPED else 0.0
        own = (moved, float(experts), mapped)  # each expert is asked for its rows
    elif name == "gathered":
        called = 0.0 if gathered.takes(run, int(slots * rank), half, training) else 1.0
        own = (runs * slots * rank * width / 1e6, runs, called)  # copies of weights
    elif run > 1:
        own = (0.0, 0.0, runs * slots)  # in place, products of runs
    else:
        own = (1.0, moved, met + places / BLOCK)  # sorting, rows that are gathered, products of experts
    return (1.0, hidden * width / 1e6, rows * width / 1e3, hidden / 1e3, weights / 1e6, summed, *own)


# (backend, half precision, training) -> costs, by `kernels/bench/fit.py`; but what a call of `gathered` takes above
# `gathered.differentiable`, 30 and 700 for float32, was measured side by side after the fit, and so was by how much
# training with `dense` takes less since it clears nothing, 280 and 8.
COSTS: dict[tuple[str, bool, bool], tuple[float, ...]] = {
    ("segments", False, False): (235, 24.8, 1.25, 4.13, 1280, 329, 75.6, 1.6, 16.3),
    ("segments", False, True): (433, 122, 2.8, 0, 2890, 333, 743, 5.84, 86.9),
    ("segments", True, False): (204, 2.79, 0.904, 0, 1140, 552, 177, 1.36, 96.2),
    ("segments", True, True): (402, 27, 2.13, 0, 4450, 2440, 1320, 3.23, 291),
    ("grouped", False, False): (325, 23.7, 0.578, 4.19, 761, 164, 1.65, 2.8, 3.89),
    ("grouped", False, True): (1070, 101, 0, 0, 2530, 600, 8.62, 9.96, 0),
    ("grouped", True, False): (603, 0, 0, 0.317, 2730, 480, 1.83, 3.33, 0),
    ("grouped", True, True): (1720, 0, 0, 1.39, 3240, 2280, 5.44, 104, 5.38),
    ("gathered", False, False): (153, 15.1, 1.12, 9.71, 600, 1120, 1400, 0, 30),
    ("gathered", False, True): (206, 85.9, 3.32, 0, 1630, 208, 5630, 0, 700),
    ("gathered", True, False): (345, 0, 0.972, 0, 368, 37.9, 919, 0.142, 0),
    ("gathered", True, True): (1310, 0, 2.02, 0, 951, 0, 7430, 0, 0),
    ("dense", False, False): (207, 25.1, 1.22, 3.07, 823, 76.5),
    ("dense", False, True): (615, 82.4, 3.34, 2.8, 3700, 584),
    ("dense", True, False): (403, 4.44, 0.992, 1.52, 539, 112),
    ("dense", True, True): (1500, 14.5, 1.66, 10.4, 3450, 382),
}
# The table is of a processor whose float32 products by torch are as fast as those by oneDNN. Where these go to oneDNN
# because torch's take twice as long, the ones that are too small for it, or go past `products`, do so.
SLOWER = 2.0


def expected(
    name: str, shape: Shape, rows: int, table: Mapping[tuple[str, bool, bool], tuple[float, ...]] = COSTS
) -> float:
    """Microseconds of a call, with the backward that follows in training."""
    each, found = table[name, shape.half, shape.training], counts(name, shape, rows)
    total = sum(cost * count for cost, count in zip(each, found, strict=True))
    if shape.onednn and not _by_onednn(name, shape, rows):
        total += (SLOWER - 1) * each[1] * found[1]
    return total


def _by_onednn(name: str, shape: Shape, rows: int) -> bool:
    """Whether products are large enough for oneDNN."""
    if name == "dense":
        return rows >= SIZES[-1] and rows * shape.total_rank * shape.width >= LEAST
    together = max(shape.run, rows * shape.slots / shape.experts)  # rows of one product
    rank = shape.total_rank / shape.experts
    return name == "segments" and together >= SIZES[-1] and together * rank * shape.width >= LEAST


@lru_cache(4096)  # rows differ from call to call
def cheapest(shape: Shape, rows: int, among: tuple[str, ...]) -> str:
    """The backend of which the least time is expected."""
    return min(among, key=lambda name: expected(name, shape, rows))
