"""How objects that hold tensors show themselves: by names and sizes, not by entries."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from torch import Tensor

MOST = 4  # entries of a list that are shown


def brief(self: Any) -> str:
    """The `__repr__` of a dataclass or NamedTuple that holds tensors: its fields that are not None."""
    if isinstance(self, tuple):
        held: dict[str, Any] = self._asdict()  # type: ignore[attr-defined]
    else:
        held = {field.name: getattr(self, field.name) for field in fields(self) if field.repr}
    parts = (f"{name}={_shown(value)}" for name, value in held.items() if value is not None)
    return f"{type(self).__name__}({', '.join(parts)})"


def _shown(value: Any) -> str:
    """Tensors as `float32 (7, 2)`; of what is long the beginning, and how much there is."""
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"
    if type(value) in (list, tuple):
        shown = [_shown(one) for one in value[:MOST]]
        more = [f"... {len(value)} in all"] if len(value) > MOST else []
        return f"[{', '.join(shown + more)}]"
    if isinstance(value, Mapping):
        shown = [f"{key!r}: {_shown(one)}" for key, one in list(value.items())[:MOST]]
        more = [f"... {len(value)} in all"] if len(value) > MOST else []
        return f"{{{', '.join(shown + more)}}}"
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:100]}..."


def span(counts: Any) -> str:
    """Numbers that may be all the same: "3", or "2 to 4"."""
    least, most = min(counts, default=0), max(counts, default=0)
    return f"{least:,}" if least == most else f"{least:,} to {most:,}"
