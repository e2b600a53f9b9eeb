"""A command of this package reads its arguments before the package imports torch and the rest, which takes seconds.

`whole` and `number` are types for its `add_argument`.
"""

from __future__ import annotations

import argparse
import importlib
import math
import signal
import sys
from collections.abc import Callable
from types import FrameType

_waiting: list[str] = []


def waits(package: str) -> bool:
    """Whether a package is to leave out its imports: while `python -m mixadapters...` looks for its module.

    `import_what_waits` makes up for it. Whoever runs a module of their own by `-m` gets the package whole.
    """
    if sys.argv[:1] != ["-m"]:  # so Python calls a module that it has not found yet
        return False
    line = sys.orig_argv
    if "-m" not in line or not "".join(line[line.index("-m") + 1 :][:1]).startswith("mixadapters."):
        return False
    _waiting.append(package)
    return True


def import_what_waits() -> None:
    """For a command that has read its arguments: the packages whose imports were left out, anew."""
    while _waiting:
        importlib.reload(sys.modules[_waiting.pop(0)])


def end_by_signal() -> None:
    """SIGTERM ends this process as an exception does, so that what is half-written is taken away."""

    def end(number: int, frame: FrameType | None) -> None:
        sys.exit(128 + number)

    signal.signal(signal.SIGTERM, end)


def whole(least: int, most: int | None = None) -> Callable[[str], int]:
    """A type of arguments: whole numbers from `least` on, to `most` where it is given."""

    def read(given: str) -> int:
        if not given.isdecimal() or int(given) < least or (most is not None and int(given) > most):
            raise argparse.ArgumentTypeError(
                f"{given!r} must be a whole number from {least}{'' if most is None else f' to {most}'}"
            )
        return int(given)

    return read


def number(least: float | None = None, above: float | None = None) -> Callable[[str], float]:
    """A type of arguments: finite numbers from `least` on, or above `above`."""
    limits = "" if least is None else f" from {least:g} on"
    limits += "" if above is None else f" above {above:g}"

    def read(given: str) -> float:
        try:
            found = float(given)
        except ValueError:
            found = math.nan
        too_low = (least is not None and found < least) or (above is not None and found <= above)
        if not math.isfinite(found) or too_low:
            raise argparse.ArgumentTypeError(f"{given!r} must be a finite number{limits}")
        return found

    return read
