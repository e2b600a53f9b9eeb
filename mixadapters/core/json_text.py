"""JSON that somebody else has written."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any


def parse_json(text: str) -> Any:
    """The value of a JSON text.

    Raises:
        ValueError: it is none, names a field twice, or is nested too deeply.
    """
    try:
        return json.loads(text, object_pairs_hook=_distinct_fields)
    except RecursionError as error:
        raise ValueError(str(error)) from None


def _distinct_fields(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        twice = [name for name, times in Counter(name for name, _ in pairs).items() if times > 1]
        raise ValueError(f"a field is named twice: {twice[:3]!s:.200}")
    return fields
