"""docs/surgery.md: its table of base models is that of the code."""

from __future__ import annotations

from pathlib import Path

from mixadapters.surgery.bases import BASES, ROWS

PAGE = Path(__file__).resolve().parents[2] / "docs" / "surgery.md"
BEGIN, END = "<!-- bases: begin -->\n", "<!-- bases: end -->"


def table() -> str:
    lines = ["| types | router | weights compete | groups |", "|---|---|---|---|"]
    for base, names in ROWS:
        competes = {True: "yes", False: "no"}.get(base.competes, f"unless `{base.competes}`")  # type: ignore[arg-type]
        types = ", ".join(f"`{name}`" for name in names.split())
        tensors = ", ".join(f"`{name}`" for name in base.rows)
        lines.append(f"| {types} | {tensors} | {competes} | {'yes' if base.groups else 'no'} |")
    return "\n".join([*lines, ""])


def test_the_table_of_base_models_is_that_of_the_code() -> None:
    """To write it anew: python tests/surgery/test_surgery_page.py"""
    rest = PAGE.read_text(encoding="utf-8").split(BEGIN)[1]
    assert rest.split(END)[0] == table()
    assert len(BASES) >= 24


if __name__ == "__main__":
    before, rest = PAGE.read_text(encoding="utf-8").split(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}{table()}{END}{rest.split(END)[1]}", encoding="utf-8")
