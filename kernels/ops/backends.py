"""Which way to run the operation: measured rule, override, one line in the log.

A backend is a module with four functions:

    refuses(p) -> str | None                  why it cannot run this problem
    keeps(p) -> tuple[Tensor, ...]            empty tensors like those that forward keeps; knows no values, nor N
    forward(p, keep) -> (y, kept)             kept is () where nothing will be differentiated
    backward(p, kept, grad, needs) -> dict    gradients by field, of those in `needs`

`reference` is different: plain differentiable operations.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from typing import Any, TypeVar

import torch

from mixadapters.kernels import products
from mixadapters.kernels.problem import Problem

logger = logging.getLogger(__name__)
T = TypeVar("T")

BACKENDS = ("triton", "grouped", "segments", "gathered", "dense", "reference")
# Those that compute a row in the same way whatever other rows there are.
BATCH_INVARIANT = ("triton", "gathered")

# Rows that are gathered and scattered cost as much as this many columns of the dense product (CPU, one thread).
GATHER_COST = {torch.float32: 30, torch.bfloat16: 65}
# The same where columns are cheap, by oneDNN, and rows dear: what several experts give to one row is added up as well.
GATHER_COST_OF_SEVERAL = {torch.float32: 48, torch.bfloat16: 100}
# The same of few rows, without gradient and with: what the others cost once in each call, sorting above all, counts
# there as well, and so many slots of rows are few.
GATHER_COST_OF_FEW = {torch.float32: (96, 64), torch.bfloat16: (450, 350)}
FEW_PLACES = {torch.float32: 128, torch.bfloat16: 512}
# The same of runs whose weights can come to them instead.
GATHER_COST_OF_RUNS = {torch.float32: 16, torch.bfloat16: 100}

# Rows of one expert that stand together in such numbers are worth a product of their own,
TOGETHER = 32
# if it has as many multiplications as this: smaller ones cost less in one call for all, since a call of its own, and
# in training six, cost each run more than the copy of its weights.
LEAST_OF_A_RUN = 2e6
# Weights of a run, in multiples of its rows, up to which they are copied to it: without gradient, and with.
MOST_COPIED = (16, 4)
# A product by oneDNN costs about 60 us however small it is, one by BLAS about 10.
FEW_CALLS = (torch.bfloat16, torch.float16)
# Bytes of weights that are copied to rows: for each expert, as many as cost what a group of its own does, without
# gradient and with; and in all, as many as stay in the cache.
COPIED_BY_EXPERT, COPIED_IN_ALL = (2e5, 4e4), 8e6
# Slots of rows above which blocks pay, since copies of all of them leave the cache.
MOST_GROUPED = 4096

_announced: set[str] = set()


class _Block:
    """What one `adapter_backend` block asks for; no two are equal."""

    def __init__(self, name: str | None, batch_invariant: bool | None) -> None:
        self.name, self.batch_invariant = name, batch_invariant


_blocks: list[_Block] = []  # those that hold, in the order in which they began


@contextmanager
def adapter_backend(name: str | None = None, *, batch_invariant: bool | None = None) -> Iterator[None]:
    """Run every adapter inside the block by one backend, one of BACKENDS; None leaves the choice as it is.

    It holds for all threads. Where blocks overlap, the one that began last decides; each takes along what it brought,
    whichever ends first.

    Args:
        batch_invariant: a row's result does not depend, in any bit, on the other rows of the batch. Only the
            backends of BATCH_INVARIANT can promise that.

    Raises:
        ValueError: the name is not a backend, or the backend does not compute rows independently.
    """
    if name is not None and name not in BACKENDS:
        raise ValueError(f"backend={name!r} is unknown; choose one of {list(BACKENDS)}")
    block = _Block(name, batch_invariant)
    _check(*_settings([*_blocks, block]))
    _blocks.append(block)
    try:
        yield
    finally:
        _blocks.remove(block)


def overridden() -> bool:
    """Whether an `adapter_backend` block holds."""
    return bool(_blocks)


def settings() -> tuple[str, bool]:
    """The forced backend, "" if none, and whether rows must not depend on each other.

    Raises:
        ValueError: what is left of blocks that overlapped contradicts itself.
    """
    forced, invariant = _settings(_blocks)
    _check(forced, invariant)
    return forced, invariant


def _settings(blocks: list[_Block]) -> tuple[str, bool]:
    forced, invariant = "", False
    for block in blocks:
        forced = forced if block.name is None else block.name
        invariant = invariant if block.batch_invariant is None else block.batch_invariant
    return forced, invariant


def _check(forced: str, invariant: bool) -> None:
    if invariant and forced and forced not in BATCH_INVARIANT:
        raise ValueError(
            f"backend={forced!r} with batch_invariant=True: its products depend on how many rows there are; "
            f"choose one of {list(BATCH_INVARIANT)}, or none"
        )


@cache
def module(name: str) -> Any:
    """Raises ValueError for "triton" where triton is not installed."""
    if name == "triton" and not _has_triton():
        raise ValueError("backend='triton' needs the package triton; install it, or choose another backend")
    return import_module(f"mixadapters.kernels.{name}")


def name_of(chosen: Any) -> str:
    """The name of a module of `module`."""
    return chosen.__name__.rpartition(".")[2]


@cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def pick(p: Problem, forced: str, rows: int, training: bool, layout_fixed: bool) -> Any:
    """The module that runs the problem; depends on shapes, dtypes and device alone. See `choose_backend`.

    Raises:
        ValueError: the forced backend cannot run it; says why.
    """
    if forced:
        chosen = module(forced)
        reason = chosen.refuses(p)
        if reason is not None:
            raise ValueError(f"backend={forced!r} cannot run this: {reason}; choose another, or leave the choice open")
        return chosen
    name = "triton"
    if not (p.x.is_cuda and _has_triton()) or module(name).refuses(p) is not None:
        name = choose_backend(
            rows, p.slots, len(p.ranks), p.down.shape[0], p.x.dtype,
            run=p.run, width=p.x.shape[1], training=training, layout_fixed=layout_fixed,
            batch_invariant=p.batch_invariant,
        )  # fmt: skip
        reason = module(name).refuses(p)
        if reason is not None and p.batch_invariant:
            raise ValueError(
                f"batch_invariant=True: no backend can promise it here; {name!r} cannot run this: {reason}"
            )
        if reason is not None:
            name = "segments"
    if name not in _announced:
        _announce(name, p)
    return module(name)


def _announce(name: str, p: Problem) -> None:
    _announced.add(name)
    logger.info(
        "adapters run by the %s backend (experts per row=%d of %d, ranks sum to %d, %s on %s); "
        "override with mixadapters.kernels.adapter_backend",
        name, p.slots, len(p.ranks), p.down.shape[0], p.x.dtype, p.x.device,
    )  # fmt: skip


def choose_backend(
    rows: int,
    slots: int,
    num_experts: int,
    total_rank: int,
    dtype: torch.dtype,
    *,
    run: int = 1,
    width: int = 1024,
    training: bool = False,
    layout_fixed: bool = False,
    batch_invariant: bool = False,
) -> str:
    """The backend for `rows` rows that each use `slots` of `num_experts` experts, on a CPU or without triton.

    1. One product of all experts, "dense", wastes what a row did not choose; the others gather rows, or weights. Dense
       wins where `slots * (mean rank + c) >= total rank`, with c the measured cost of gathering a row; c = 0 where
       rows of one expert stand together, which are not gathered at all ("segments").
    2. Runs of rows of one expert: one call for all, "gathered", where the product of a run costs less than a call of
       its own, and copies of weights do not outweigh the rows. Otherwise one product for each, "segments".
    3. Few rows: their weights come to them, "gathered", where the copies cost less than groups.
    4. Few rows for each expert: "grouped", one call for all experts, where grouped_mm takes the shapes.
    5. Otherwise "segments", whose blocks stay in the cache.

    Args:
        width: of the rows.
        training: whether a backward follows.
        layout_fixed: what is kept for it must not depend on the number of rows. All but dense keep the same.
    """
    forced, _ = settings()
    if forced:
        return forced
    if batch_invariant:
        return "gathered"
    together, places, half = run >= TOGETHER, rows * slots, dtype in FEW_CALLS
    mean_rank = total_rank / max(num_experts, 1)
    one_call = half or run * mean_rank * width < LEAST_OF_A_RUN
    to_runs = run > 1 and one_call and slots * mean_rank <= MOST_COPIED[training] * run
    few = not layout_fixed and places <= _by_dtype(FEW_PLACES, dtype)
    if together:
        cost = 0
    elif to_runs:
        cost = _by_dtype(GATHER_COST_OF_RUNS, dtype)
    elif few:
        cost = _by_dtype(GATHER_COST_OF_FEW, dtype)[training]
    else:
        cost = _gather_cost(slots, dtype)
    if slots >= num_experts or slots * (mean_rank + cost) >= total_rank:
        return "dense"
    if to_runs:
        return "gathered"
    trains_runs = run > 1 and training
    if together or (trains_runs and not half):
        return "segments"
    copied = places * mean_rank * width * dtype.itemsize
    if not trains_runs and copied <= min(COPIED_IN_ALL, COPIED_BY_EXPERT[training] * num_experts):
        return "gathered"
    rows_each = 256 if half else 64
    return "grouped" if places <= min(MOST_GROUPED, rows_each * num_experts) else "segments"


def _by_dtype(of: dict[torch.dtype, T], dtype: torch.dtype) -> T:
    return of.get(dtype, of[torch.float32])


def _gather_cost(slots: int, dtype: torch.dtype) -> int:
    if slots > 1 and dtype in GATHER_COST_OF_SEVERAL and (dtype != torch.float32 or products.pays()):
        return GATHER_COST_OF_SEVERAL[dtype]
    return _by_dtype(GATHER_COST, dtype)
