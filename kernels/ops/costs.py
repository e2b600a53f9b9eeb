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
    ("segments", False, False): (218, 14.5, 1.35, 11.8, 1430, 86.9, 1.06, 16.3),
    ("segments", False, True): (325, 115, 2.99, 0, 2930, 739, 5.12, 96.7),
    ("segments", True, False): (171, 4.73, 0.836, 0, 1000, 103, 1.49, 105),
    ("segments", True, True): (533, 19.1, 1.89, 0, 4480, 1020, 4.01, 292),
    ("grouped", False, False): (327, 24.9, 0.124, 4.38, 753, 2.06, 2.86),
    ("grouped", False, True): (1080, 107, 0, 0, 2470, 8.81, 10.6),
    ("grouped", True, False): (568, 0, 0, 0, 2720, 2.3, 3.4),
    ("grouped", True, True): (1680, 0, 0, 0, 3440, 6.51, 105),
    ("gathered", False, False): (183, 14.1, 1.11, 10.2, 579, 1430, 0),
    ("gathered", False, True): (915, 86.4, 3.22, 0, 1690, 5500, 0),
    ("gathered", True, False): (340, 0, 0.988, 0, 415, 900, 0.19),
    ("gathered", True, True): (1300, 0, 2.03, 0, 912, 7550, 0),
    ("dense", False, False): (197, 25.2, 1.1, 3.42, 847, 0),
    ("dense", False, True): (864, 82.1, 2.88, 12.8, 3700, 129),
    ("dense", True, False): (332, 5.09, 0.846, 1.69, 604, 0),
    ("dense", True, True): (1460, 18, 1.48, 8.96, 3470, 80.4),
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
