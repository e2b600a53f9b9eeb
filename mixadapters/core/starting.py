"""What a command of this package does when it is interrupted before it has begun: while its imports run."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def ended_quietly() -> Iterator[None]:
    """Around imports: Ctrl-C while `python -m mixadapters...` looks for its module ends it without a traceback."""
    try:
        yield
    except KeyboardInterrupt:
        if sys.argv[:1] != ["-m"]:  # so Python calls a module that it has not found yet; others see the interruption
            raise
        print("interrupted", file=sys.stderr)
        sys.exit(130)
