"""Where a checkout that is not installed keeps its packages; imported before everything else, for what it does.

Installed, `mixadapters.kernels` and `mixadapters.tasks` lie in this package. In a checkout they are `kernels/ops` and
`tasks` beside it, which no entry of sys.path says, and an editable install of another checkout would answer with its
own: then one half would run with the other half of another version.
"""

from __future__ import annotations

import importlib.util
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1]
FOLDERS = {"mixadapters.kernels": PACKAGE.parent / "kernels" / "ops", "mixadapters.tasks": PACKAGE.parent / "tasks"}


class CheckoutFinder:
    """Finds the packages of `FOLDERS`, before any other finder is asked."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        folder = FOLDERS.get(name)
        if folder is None:
            return None
        return importlib.util.spec_from_file_location(
            name, folder / "__init__.py", submodule_search_locations=[str(folder)]
        )


if not (PACKAGE / "kernels").exists():
    if missing := [str(folder) for folder in FOLDERS.values() if not (folder / "__init__.py").is_file()]:
        raise ImportError(
            f"mixadapters is imported from {PACKAGE}, a part of a checkout: {' and '.join(missing)} is missing. Run "
            "`pip install -e .` in a whole checkout, and take this folder off sys.path (PYTHONPATH, or where you are)"
        )
    sys.meta_path.insert(0, CheckoutFinder())
