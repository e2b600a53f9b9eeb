"""What a call of each backend is expected to take on a CPU: what it does, counted, times what that costs.

The costs were fitted by `kernels/bench/fit.py` to calls that were timed on one thread. A row of the table has one for
each count, in the order in which `counts` has them, in microseconds.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import NamedTuple

import torch

from mixadapters.kernels.products import LEAST, SIZES
from mixadapters.kernels.segments import BLOCK

BACKENDS = ("segments", "grouped", "gathered", "dense")
HALF = (torch.bfloat16, torch.float16)  # whose products cost other than those of float32
# Multiplications of a product of all experts below which it lost 0.9 % on average, 17 at most, in 48 timed cases.
SMALL = 1e6
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
    weights that it reads or sums gradients of in millions; then what each backend has besides.
    """
    slots, experts, total_rank, width, run, _, training, _ = shape
    rank, places, runs = total_rank / experts, rows * slots, rows / run
    met = experts * (1 - (1 - 1 / experts) ** (runs * slots))  # experts that rows by chance choose, on average
    hidden, weights = places * rank, (total_rank if training else met * rank) * width
    moved = places * width / 1e3
    own: tuple[float, ...]
    if name == "dense":
        hidden, weights, own = rows * total_rank, total_rank * width, (places / 1e3,)
    elif name == "grouped":
        own = (moved, float(experts))  # of which each is asked for its rows
    elif name == "gathered":
        own = (runs * slots * rank * width / 1e6, runs)  # copies of weights
    elif run > 1:
        own = (0.0, 0.0, runs * slots)  # in place, products of runs
    else:
        own = (1.0, moved, met + places / BLOCK)  # sorting, rows that are gathered, products of experts
    return (1.0, hidden * width / 1e6, rows * width / 1e3, hidden / 1e3, weights / 1e6, *own)


# (backend, half precision, training) -> costs, by `kernels/bench/fit.py`.
COSTS: dict[tuple[str, bool, bool], tuple[float, ...]] = {
    ("segments", False, False): (128, 22.5, 2.23, 8.08, 1730, 135, 0.863, 22.8),
    ("segments", False, True): (284, 123, 4.79, 0, 2930, 873, 4.54, 92.1),
    ("segments", True, False): (116, 7.39, 0.789, 0, 739, 139, 1.76, 121),
    ("segments", True, True): (423, 8.43, 2.66, 0, 4880, 834, 5.01, 263),
    ("grouped", False, False): (296, 33.4, 0.449, 1.79, 1010, 2.65, 3.13),
    ("grouped", False, True): (1100, 113, 0, 0, 2620, 10.5, 10.7),
    ("grouped", True, False): (549, 0, 0, 0, 2720, 2.9, 8.27),
    ("grouped", True, True): (1580, 0, 0, 0, 2160, 7.85, 116),
    ("gathered", False, False): (168, 56, 1.29, 0, 352, 1860, 0),
    ("gathered", False, True): (727, 142, 4.15, 0, 817, 6890, 0),
    ("gathered", True, False): (307, 0, 1.39, 0, 441, 1070, 0.14),
    ("gathered", True, True): (1020, 0, 2.77, 0, 239, 9290, 0),
    ("dense", False, False): (164, 27.2, 1.66, 3.8, 1200, 0),
    ("dense", False, True): (856, 96.8, 4.08, 9.07, 3940, 144),
    ("dense", True, False): (295, 4.94, 1.1, 2.6, 804, 0),
    ("dense", True, True): (1150, 22, 2.35, 5.75, 5000, 56.4),
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
