"""The tables of a run on a GPU, in Markdown, from what gpu.py has written.

python kernels/bench/tables.py runs/bench/gpu.json
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any


def tables(content: dict[str, Any]) -> str:
    """One table for each part of the run that has an entry, below a line that says where it was made."""
    about = ", ".join(f"{name} {value}" for name, value in content["about"].items())
    parts = [about, *filter(None, (numerics(content), times(content), questions(content)))]
    if content["left_out"]:
        parts.append(f"Left out, for want of time: {'; '.join(content['left_out'])}.")
    return "\n\n".join(parts) + "\n"


def numerics(content: dict[str, Any]) -> str:
    rows = [
        (entry["label"], entry["error"], "", "") if "error" in entry else
        (entry["label"], "passed" if entry["passed"] else "**failed**", largest(entry), entry.get("bit_identical", ""))
        for entry in content["numerics"]
    ]  # fmt: skip
    return table(("numerics", "", "largest error, relative to fp64", "repeats with the same bits"), rows)


def largest(entry: dict[str, Any]) -> str:
    return f"{entry['errors'][entry['worst']]:.1e} ({entry['worst']})" if "errors" in entry else ""


def times(content: dict[str, Any]) -> str:
    """Milliseconds of every contender; how far ours is from the roof."""
    entries = content["results"]
    names = list(dict.fromkeys(name for entry in entries for name in entry.get("ms", {})))
    rows = []
    for entry in entries:
        if "error" in entry:
            rows.append((entry["label"], *[""] * len(names), entry["error"]))
            continue
        ms, failed = entry["ms"], entry["failed"]
        best = min(ms.values(), default=None)
        cells = [shown(ms.get(name), best) or ("failed" if name in failed else "") for name in names]
        roof = f"{entry['share_of_roof']:.0%} of {entry['roof_ms']:.3g}" if "share_of_roof" in entry else ""
        rows.append((entry["label"], *cells, roof))
    return table(("ms", *names, "of the roof"), rows)


def shown(value: float | None, best: float | None) -> str:
    if value is None:
        return ""
    return f"**{value:.3g}**" if value == best else f"{value:.3g}"


def questions(content: dict[str, Any]) -> str:
    rows = [
        (entry["label"], "; ".join(f"{n} {v:.4g}" if isinstance(v, float) else f"{n} {v}" for n, v in entry.items()
                                   if n != "label"))
        for entry in content["questions"]
    ]  # fmt: skip
    return table(("question", "answer"), rows)


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """ "" where there are no rows."""
    lines = ["| " + " | ".join(cell.replace("|", "/").replace("\n", " ") for cell in row) + " |" for row in rows]
    return "\n".join(["| " + " | ".join(head) + " |", "|---" * len(head) + "|", *lines]) if lines else ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", type=Path, help="gpu.json")
    print(tables(json.loads(parser.parse_args().path.read_text())), end="")


if __name__ == "__main__":
    main()
