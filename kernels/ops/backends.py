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
from typing import Any

import torch

from mixadapters.kernels import costs, products
from mixadapters.kernels.problem import Problem

logger = logging.getLogger(__name__)

BACKENDS = ("triton", "grouped", "segments", "gathered", "dense", "reference")
# Those that compute a row in the same way whatever other rows there are.
BATCH_INVARIANT = ("triton", "gathered")

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
    return len(_blocks) > 0  # the compiler of torch 2.11 knows no bool of a list


def settings() -> tuple[str, bool]:
    """The forced backend, "" if none, and whether rows must not depend on each other.

    Raises:
        ValueError: what is left of blocks that overlapped contradicts itself.
    """
    if not _blocks:
        return "", False
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
        name = _usual(p, rows, training, layout_fixed)
    if name not in _announced:
        _announce(name, p)
    return module(name)


def _usual(p: Problem, rows: int, training: bool, layout_fixed: bool) -> str:
    """What the rule takes of those that can run the problem. Blocks that hold now have no say: in a backward they may
    be others than when the forward ran."""
    if p.batch_invariant:
        reason = module("gathered").refuses(p)
        if reason is not None:
            raise ValueError(
                f"batch_invariant=True: no backend can promise it here; 'gathered' cannot run this: {reason}"
            )
        return "gathered"
    width = (p.x.shape[1] + p.up.shape[0]) // 2
    shape = _shape(p.slots, len(p.ranks), p.down.shape[0], p.x.dtype, p.run, width, training)
    refused: tuple[str, ...] = ()
    while True:  # there are some that refuse nothing
        name = _by_costs(shape, rows, layout_fixed, refused)
        if module(name).refuses(p) is None:
            return name
        refused = (*refused, name)


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
    refused: tuple[str, ...] = (),
) -> str:
    """The backend for `rows` rows that each use `slots` of `num_experts` experts, on a CPU or without triton.

    The one of which `costs.cheapest` expects the least time; one product of all experts, "dense", where each row uses
    them all, which wastes nothing, and where it is small, in training as without gradient.

    Args:
        run: rows that stand together and use the same experts.
        width: of the rows, input and output on average.
        training: whether a backward follows.
        layout_fixed: what is kept for it must not depend on the number of rows. All but dense keep the same.
        refused: those of `costs.BACKENDS` that cannot run it, as "grouped" widths that are no multiples of 16 bytes.

    Raises:
        ValueError: `refused` names another, or "dense", which refuses nothing.
    """
    if unknown := set(refused) - set(costs.BACKENDS) | set(refused) & {"dense"}:
        able = [name for name in costs.BACKENDS if name != "dense"]
        raise ValueError(f"refused={list(refused)}: {sorted(unknown)} is none of those that may refuse, {able}")
    forced, _ = settings()
    if forced:
        return forced
    if batch_invariant:
        return "gathered"
    shape = _shape(slots, num_experts, total_rank, dtype, run, width, training)
    return _by_costs(shape, rows, layout_fixed, refused)


def _shape(
    slots: int, experts: int, total_rank: int, dtype: torch.dtype, run: int, width: int, training: bool
) -> costs.Shape:
    half = dtype in costs.HALF
    onednn = products.pays() and not half
    return costs.Shape(int(slots), experts, int(total_rank), int(width), int(run), half, training, onednn)


def _by_costs(shape: costs.Shape, rows: int, layout_fixed: bool, refused: tuple[str, ...] = ()) -> str:
    small = not layout_fixed and rows * shape.total_rank * shape.width < costs.SMALL
    if small or shape.slots >= shape.experts:
        return "dense"
    among = tuple(name for name in costs.BACKENDS if name not in refused)
    if layout_fixed:
        # Who refuses depends on who is asked, and that on the rows: dense or not is decided among all.
        if costs.cheapest(shape, costs.USUAL_ROWS, costs.BACKENDS) == "dense":
            return "dense"
        among = tuple(name for name in among if name != "dense")
    return costs.cheapest(shape, rows, among)
