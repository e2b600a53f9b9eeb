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
        own = (hidden / 1e3 if slots > 1 else 0.0,)  # each is weighted
    elif name == "grouped":
        mapped = moved if places * width * (2 if half else 4) > MAPPED else 0.0
        own = (moved, float(experts), met, mapped)  # each expert is asked for its rows; some have none
    elif name == "gathered":
        called = 0.0 if gathered.takes(run, int(slots * rank), half, training) else 1.0
        own = (runs * slots * rank * width / 1e6, runs, called)  # copies of weights
    elif run > 1:
        own = (0.0, 0.0, runs * slots)  # in place, products of runs
    else:
        own = (1.0, moved, met + places / BLOCK)  # sorting, rows that are gathered, products of experts
    return (1.0, hidden * width / 1e6, rows * width / 1e3, hidden / 1e3, weights / 1e6, summed, *own)


# (backend, half precision, training) -> costs, by `kernels/bench/fit.py`, from 564 cases that were timed;
# but the fourth row is of an earlier fit: these found that a call by itself costs nothing.
COSTS: dict[tuple[str, bool, bool], tuple[float, ...]] = {
    ("segments", False, False): (239, 26.4, 1.01, 1.58, 1090, 138, 48, 1.69, 14.8),
    ("segments", False, True): (611, 96.8, 3.13, 0, 2390, 142, 383, 5.19, 62.8),
    ("segments", True, False): (360, 0, 0.769, 1.58, 1770, 737, 12.4, 1.23, 73.6),
    ("segments", True, True): (402, 27, 2.13, 0, 4450, 2440, 1320, 3.23, 291),
    ("grouped", False, False): (289, 22.8, 0.777, 0.362, 618, 186, 1.38, 2.77, 3.97, 3.6),
    ("grouped", False, True): (912, 82.1, 0.975, 0, 2870, 0, 8.21, 7.96, 0, 7.05),
    ("grouped", True, False): (392, 0, 0, 5.02, 880, 319, 1.55, 3.55, 48, 0),
    ("grouped", True, True): (987, 19, 0, 1.86, 2510, 1040, 5.37, 0, 188, 8.47),
    ("gathered", False, False): (181, 17.3, 0.896, 4.96, 855, 275, 1110, 0.158, 0),
    ("gathered", False, True): (422, 77.2, 3.03, 0, 1200, 0, 5410, 0, 251),
    ("gathered", True, False): (345, 0, 0.651, 1.3, 647, 0, 715, 0.441, 0),
    ("gathered", True, True): (1300, 64.8, 1.48, 0, 998, 0, 5200, 0.0587, 0),
    ("dense", False, False): (199, 24.1, 1.13, 0.92, 778, 36.4, 1.19),
    ("dense", False, True): (648, 78.9, 2.97, 3.1, 2950, 111, 7.57),
    ("dense", True, False): (380, 2.48, 0.834, 1.62, 434, 0, 1.18),
    ("dense", True, True): (1120, 14, 2.19, 3.42, 2810, 35.5, 8.84),
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
