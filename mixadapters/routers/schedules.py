"""Options of a router that change along the training: piecewise linear over its progress."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from typing import Any

from mixadapters.core.fields import finite
from mixadapters.core.registry import nearest
from mixadapters.routers.options import WHOLE, check_options

Points = Sequence[Sequence[float]]  # [[progress, value], ...]


def check_schedules(schedules: Any, scheduled: Sequence[str] | None = None) -> None:
    """Refuse what is no schedule: {option: [[progress, value], ...]}, progress from 0 to 1 and never falling.

    Two points of one progress are a jump, at which the later one holds.

    scheduled: the options that may change in training; None: not known yet.

    Raises:
        ValueError: which option, what of it, and what it must be.
    """
    if not isinstance(schedules, Mapping):
        raise ValueError(f"schedules={schedules!r:.200} must be a dict: option -> [[progress, value], ...]")
    for name, points in schedules.items():
        if scheduled is not None and name not in scheduled:
            raise ValueError(
                f"schedules: the router has no option {name!r} that may change in training."
                f"{nearest(str(name), scheduled)} It has {sorted(scheduled)}"
            )
        if not isinstance(points, (list, tuple)) or not points or not all(map(_is_point, points)):
            raise ValueError(
                f"schedules[{name!r}]={points!r:.200} must be a list of [progress, value], both finite numbers, such "
                "as [[0, 2.0], [1, 0.5]]"
            )
        along = [progress for progress, _ in points]
        if sorted(along) != along or along[0] < 0 or along[-1] > 1:
            raise ValueError(
                f"schedules[{name!r}]: the progress of its points is {along}; it must rise, from 0 to 1 at most"
            )
        for _, value in points:
            check_options(**{name: value})


def _is_point(point: Any) -> bool:
    return isinstance(point, (list, tuple)) and len(point) == 2 and all(map(finite, point))


def value_at(name: str, points: Points, progress: float) -> float:
    """The value of an option at a share of the training: that of the first point before it, of the last one after it,
    and rounded between two points where the option is a whole number."""
    after = bisect_right([at for at, _ in points], progress)
    if after in (0, len(points)):
        return points[-1 if after else 0][1]
    (start, low), (end, high) = points[after - 1 : after + 1]
    value = low + (high - low) * (progress - start) / (end - start)
    return round(value) if name in WHOLE else value
