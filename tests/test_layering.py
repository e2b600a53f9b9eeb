"""An import points down, never up: this reads every import of the package and fails otherwise."""

from __future__ import annotations

import ast
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# import name -> folder, longest name first
FOLDERS = {"mixadapters.kernels": "kernels/ops", "mixadapters.tasks": "tasks", "mixadapters": "mixadapters"}
# low to high; `kernels` is mixadapters.kernels, and so on
FLOORS = ("kernels", "core", "routers", "surgery", "tuners", "training", "sharding", "serving", "tasks", "examples")
# The one method that others may build on.
SHARED_METHODS = frozenset({"bottleneck"})
# The files of core that meet PEFT: what is said, and the parts of the tuner. The rest knows torch only.
CORE_FILES_WITH_PEFT = frozenset(
    {"config", "finding", "files", "injection", "layer", "merging", "model", "rows", "saving", "walking"}
)
HUGGING_FACE = frozenset({"peft", "transformers", "accelerate", "datasets", "evaluate", "diffusers", "trl"})
# Reading a table is nobody's business but the reader's; this is what changes one.
CHANGES_OF_PEFT = re.compile(r"register_peft_method|PeftType\._|PEFT_TYPE_TO_\w+(\[[^]]*\] = |\.(update|pop)\()")


def sources() -> dict[str, Path]:
    """Module name -> file, of the package and of the examples."""
    found = {}
    for package, folder in FOLDERS.items():
        for path in (ROOT / folder).rglob("*.py"):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            name = ".".join((package, *(part for part in parts if part != "__init__")))
            found.setdefault(name, path)
    for path in (ROOT / "examples").rglob("*.py"):
        found[".".join(("examples", *path.relative_to(ROOT / "examples").with_suffix("").parts))] = path
    return found


SOURCES = sources()


def imports(source: str, module: str, modules: frozenset[str] = frozenset(SOURCES)) -> Iterator[tuple[int, str]]:
    """(line, imported module), also inside functions and behind TYPE_CHECKING.

    `from package import name` counts as the module `package.name` where there is one, and as `package.name` too where
    `package` is the root, whose names come from all floors.
    """
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}:{node.lineno}: relative import; write the absolute name"
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                yield node.lineno, name if name in modules or node.module == "mixadapters" else str(node.module)


def floor(module: str) -> str | None:
    """The floor a module stands on; None for the root package and for what is not ours."""
    parts = module.split(".")
    if parts[0] == "examples":
        return "examples"
    return parts[1] if parts[0] == "mixadapters" and len(parts) > 1 else None


# Modules of tuners/ that belong to no method.
GROUND = (
    [],
    *([name] for name in ("registration", "sources", "fitting", "posterior", "surgery", "lora", "gathering")),
)


def method(module: str) -> str | None:
    """The method (tuner) that a module belongs to; None for tuners/__init__.py and what all tuners stand on."""
    parts = module.split(".")
    return parts[2] if parts[:2] == ["mixadapters", "tuners"] and parts[2:] not in GROUND else None


def complaint(module: str, imported: str) -> str | None:
    """Why `module` may not import `imported`, or None."""
    here, there = floor(module), floor(imported)
    top = imported.split(".")[0]
    if here is None:  # the root package gathers the public names
        return None
    if here not in FLOORS:
        return f"{module} stands on no floor: name {here!r} in FLOORS"
    if here == "kernels" and top in HUGGING_FACE:
        return "kernels know tensors only"
    if here == "core" and top == "peft" and module.split(".")[2] not in CORE_FILES_WITH_PEFT:
        return f"in core only {sorted(CORE_FILES_WITH_PEFT)} know PEFT"
    if top != "mixadapters" or imported == "mixadapters.__version__":
        return None
    if here == "examples":
        return None
    if there not in FLOORS:
        return "import from the module that defines the name; the root package gathers all floors"
    if FLOORS.index(there) > FLOORS.index(here):
        return f"{here} is below {there}"
    if here == there == "tuners" and module != "mixadapters.tuners":
        mine, other = method(module), method(imported)
        # The ground floor of the tuners knows no method.
        if other not in (None, mine) and (mine in SHARED_METHODS or other not in SHARED_METHODS or mine is None):
            return f"{mine or module} may not import its sibling {other}"
    return None


def test_every_floor_has_its_folder() -> None:
    present = {floor(module) for module in SOURCES} - {None}
    assert present <= set(FLOORS)
    assert {"kernels", "core", "routers", "tuners", "training", "tasks"} <= present


@pytest.mark.parametrize("module", sorted(SOURCES))
def test_imports_point_down(module: str) -> None:
    text = SOURCES[module].read_text(encoding="utf-8")
    complaints = [
        f"{SOURCES[module].relative_to(ROOT)}:{line}: imports {imported}: {why}"
        for line, imported in imports(text, module)
        if (why := complaint(module, imported))
    ]
    assert not complaints, "\n".join(complaints)


def circles(imported_by: dict[str, set[str]]) -> set[frozenset[str]]:
    """The largest sets of modules that all import each other, directly or through others of the set."""

    def beyond(module: str) -> set[str]:
        seen: set[str] = set()
        waiting = [*imported_by[module]]
        while waiting:
            found = waiting.pop()
            if found not in seen:
                seen.add(found)
                waiting += imported_by[found]
        return seen

    reached = {module: beyond(module) for module in imported_by}
    return {
        frozenset(other for other in reached[module] if module in reached[other])
        for module in reached
        if module in reached[module]
    }


def test_no_modules_import_each_other_in_a_circle() -> None:
    """Counting imports inside functions and for annotations too; that a package's `__init__` runs first is not one."""
    graph: dict[str, set[str]] = {}
    for module, path in SOURCES.items():
        graph[module] = set()
        for _, name in imports(path.read_text(encoding="utf-8"), module):
            while name and name not in SOURCES:
                name = name.rpartition(".")[0]
            if name and name not in (module, "mixadapters"):
                graph[module].add(name)
    assert not circles(graph)


def test_the_finder_of_circles_sees_all_that_belong_to_one() -> None:
    graph = {"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a", "e"}, "e": set(), "f": {"g"}, "g": {"f"}}
    assert circles(graph) == {frozenset("abc"), frozenset("fg")}


def test_one_file_changes_the_type_tables_of_peft() -> None:
    changing = {module for module, path in SOURCES.items() if CHANGES_OF_PEFT.search(path.read_text(encoding="utf-8"))}
    assert changing == {"mixadapters.tuners.registration"}


@pytest.mark.parametrize(
    ("module", "source", "allowed"),
    [
        ("mixadapters.core.bank", "import mixadapters.kernels", True),
        ("mixadapters.core.bank", "from mixadapters import kernels", True),
        ("mixadapters.core.bank", "from mixadapters.routers import base", False),
        ("mixadapters.core.bank", "from mixadapters import MixDAConfig", False),
        ("mixadapters.core.bank", "from mixadapters import __version__", True),
        ("mixadapters.core.bank", "from peft import PeftConfig", False),
        ("mixadapters.core.config", "from peft import PeftConfig", True),
        ("mixadapters.kernels", "from mixadapters.core.routing import Routing", False),
        ("mixadapters.kernels", "import transformers", False),
        ("mixadapters.routers.base", "from mixadapters.core.routing import Routing", True),
        ("mixadapters.tuners.mixda.model", "from mixadapters.tuners.bottleneck.config import BottleneckConfig", True),
        ("mixadapters.tuners.mixda.model", "from mixadapters.tuners.registration import register", True),
        ("mixadapters.tuners.mixda.model", "def f():\n    from mixadapters.training import callbacks", False),
        ("mixadapters.tuners.bottleneck.model", "from mixadapters.tuners.mixda import MixDAConfig", False),
        ("mixadapters.tuners.registration", "from mixadapters.tuners.mixda import MixDAConfig", False),
        ("mixadapters.training.callbacks", "from mixadapters.tuners.mixda import MixDAConfig", True),
        ("mixadapters.tasks", "from mixadapters.training import callbacks", True),
        ("mixadapters.training.callbacks", "from mixadapters import tasks", False),
        ("mixadapters.attic.old", "import torch", False),
        ("examples.demo", "from mixadapters import MixDAConfig", True),
        ("mixadapters", "from mixadapters.tuners.mixda import MixDAConfig", True),
    ],
)
def test_the_reader_of_imports_sees(module: str, source: str, allowed: bool) -> None:
    found = [complaint(module, imported) for _, imported in imports(textwrap.dedent(source), module)]
    assert found
    assert (not any(found)) is allowed, found


def test_relative_imports_are_refused() -> None:
    with pytest.raises(AssertionError, match="relative import"):
        list(imports("from . import bank", "mixadapters.core.layer"))
