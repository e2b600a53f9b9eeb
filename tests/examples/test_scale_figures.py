"""The figures on paper in docs/scale.md are those that the script prints."""

from __future__ import annotations

import runpy
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_the_page_has_the_tables_of_the_script(capsys) -> None:
    runpy.run_path(str(ROOT / "examples" / "studies" / "scale_figures.py"), run_name="__main__")
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    page = (ROOT / "docs" / "scale.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) > 8
    assert set(lines) <= set(page)
