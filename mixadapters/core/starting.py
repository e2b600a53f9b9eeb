"""A command of this package reads its arguments before the package imports torch and the rest, which takes seconds."""

from __future__ import annotations

import importlib
import signal
import sys
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
