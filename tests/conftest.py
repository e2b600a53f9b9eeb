"""Settings and tiny models shared by all tests."""

from __future__ import annotations

import gc
import importlib.util
import os
import sys
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

# Before anything imports torch or transformers.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("MPLBACKEND", "Agg")

ROOT = Path(__file__).resolve().parents[1]
# `python -m pytest` puts the checkout on sys.path, where the installed package should be found instead.
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != ROOT]

import pytest

# Of the many objects that imports, models and traces make few are garbage, and they are looked at every few hundred.
gc.set_threshold(100_000, 20, 50)

# A virtual environment of another checkout would have the tests say nothing of this one.
_package = importlib.util.find_spec("mixadapters")
if _package is None or Path(_package.origin or "").resolve().parents[1] != ROOT:
    _found = "is not installed" if _package is None else f"is that of {_package.origin}"
    raise pytest.UsageError(f"mixadapters {_found}, but these tests are those of {ROOT}: pip install -e {ROOT}")

# torch and transformers are imported by the tests, not here: the process that hands tests to workers needs neither.


@pytest.fixture(scope="session")
def tiny() -> Callable[..., Any]:
    """Makes tiny random models: see `tiny_bases.tiny`."""
    import tiny_bases

    return tiny_bases.tiny


@pytest.fixture(scope="session")
def tiny_inputs() -> Callable[..., Any]:
    """Makes inputs for the models of `tiny`: see `tiny_bases.tiny_inputs`."""
    import tiny_bases

    return tiny_bases.tiny_inputs


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    """Graphs of other tests count as recompilations, after some of which torch compiles no more."""
    import torch

    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="module")
def _imports_are_no_garbage() -> None:
    """Each `Trainer.train` collects, which takes a second where it looks at every module of transformers."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True, scope="session")
def _one_template() -> Iterator[None]:
    """Each save of an adapter compiles the template of its card anew, which takes longer than to write the rest."""
    import jinja2

    plain = jinja2.Environment.compile
    compiled = lru_cache(maxsize=32)(plain)

    def compile(self: Any, source: Any, *args: Any, **options: Any) -> Any:
        known = isinstance(source, str) and not args and not options
        return compiled(self, source) if known else plain(self, source, *args, **options)

    jinja2.Environment.compile = compile
    yield
    jinja2.Environment.compile = plain


@pytest.fixture(autouse=True)
def _seed() -> None:
    import torch

    torch.manual_seed(0)
