"""The kernels in triton's interpreter, which computes on the CPU, in a process with TRITON_INTERPRET=1."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest

if os.environ.get("TRITON_INTERPRET") != "1":
    raise pytest.UsageError("tests/kernels/interpreted runs in a process of its own, with TRITON_INTERPRET=1")
if importlib.util.find_spec("triton") is None:
    pytest.exit("no triton: its kernels are not tested here", returncode=0)

# `interpreting` imports torch and triton: as in tests/conftest.py, by those who run tests alone.


@pytest.fixture(autouse=True, scope="session")
def _repaired() -> None:
    import interpreting  # noqa: F401


@pytest.fixture
def shuffled() -> Callable[[int], Any]:
    """Context: see `interpreting.shuffled`."""
    import interpreting

    return interpreting.shuffled


@pytest.fixture
def rowwise(monkeypatch: pytest.MonkeyPatch) -> None:
    """See `interpreting.rowwise`."""
    import interpreting

    interpreting.rowwise(monkeypatch)


@pytest.fixture
def guarded(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """See `interpreting.guarded`."""
    import interpreting

    yield from interpreting.guarded(monkeypatch)
