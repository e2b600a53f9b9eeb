"""Which way to run the operation: measured rule, override, one line in the log."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import torch

logger = logging.getLogger(__name__)

BACKENDS = ("dense", "segments", "reference")

# Rows that are gathered and scattered cost as much as this many columns of the dense product (CPU, one thread).
GATHER_COST = {torch.float32: 30, torch.bfloat16: 65}

_forced: str | None = None
_announced: set[str] = set()


@contextmanager
def adapter_backend(name: str) -> Iterator[None]:
    """Run every adapter inside the block by one backend: "dense", "segments" or "reference".

    Raises:
        ValueError: the name is not a backend.
    """
    global _forced
    if name not in BACKENDS:
        raise ValueError(f"backend={name!r} is unknown; choose one of {list(BACKENDS)}")
    before, _forced = _forced, name
    try:
        yield
    finally:
        _forced = before


def choose_backend(rows: int, slots: int, num_experts: int, total_rank: int, dtype: torch.dtype) -> str:
    """The backend for `rows` rows that each use `slots` of `num_experts` experts.

    The dense product computes every expert for every row; segments gather each expert's rows first. Dense wins
    when `slots * (mean rank + c) >= total rank`, with c the measured cost of gathering. Under the compiler the
    answer is always "dense", whose shapes do not depend on the routing.
    """
    if _forced is not None:
        return _forced
    if torch.compiler.is_compiling():
        return "dense"
    mean_rank = total_rank / max(num_experts, 1)
    dense = slots >= num_experts or slots * (mean_rank + GATHER_COST.get(dtype, 30)) >= total_rank
    chosen = "dense" if dense else "segments"
    if chosen not in _announced:
        _announced.add(chosen)
        logger.info(
            "adapters run by the %s backend (rows=%d, experts per row=%d of %d, ranks sum to %d); "
            "override with mixadapters.kernels.adapter_backend",
            chosen, rows, slots, num_experts, total_rank,
        )  # fmt: skip
    return chosen
