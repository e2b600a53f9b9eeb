"""Which pages the site has beside those of docs/: files of the checkout, and the API by its public names.

Everything is read from the sources; nothing is imported, and MkDocs is not needed.
"""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# File of the checkout -> page of the site; those of docs/ keep their names.
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changes.md",
    "kernels/README.md": "kernels.md",
}
# Page of the API -> its title, and the modules whose public names it shows, or "module:name" for single ones.
API = {
    "tuners": (
        "Configs and models",
        [f"mixadapters.tuners{name}" for name in ("", ".registration", ".agd", ".pill")],
    ),
    "routers": ("Routers", ["mixadapters.routers", "mixadapters.routers.posterior:PosteriorRouter"]),
    "training": (
        "Training",
        [
            f"mixadapters.training.{name}"
            for name in (
                "callbacks",
                "adversarial",
                "routing",
                "spawning",
                "pruning",
                "objectives",
                "collators",
                "mixture_distillation",
                "staged_distillation",
            )
        ],
    ),
    "sharding": ("Sharding", ["mixadapters.sharding"]),
    "surgery": ("Surgery", ["mixadapters.surgery"]),
    "serving": ("Serving", ["mixadapters.serving"]),
    "core": (
        "Core",
        [
            f"mixadapters.core.{name}"
            for name in ("adapter", "bank", "routing", "context", "model", "mixture", "usage")
        ],
    ),
    "kernels": ("Kernels", ["mixadapters.kernels"]),
    "tasks": ("Tasks", ["mixadapters.tasks"]),
}
FOLDERS = {"mixadapters.kernels": "kernels/ops", "mixadapters.tasks": "tasks", "mixadapters": "mixadapters"}


def exports() -> str:
    """The page of what `import mixadapters` gives."""
    homes = {name: origin("mixadapters", name) for name in public_names("mixadapters")}
    rows = [f"| [`{name}`][{home}.{name}] | `{home}` |" for name, home in homes.items()]
    head = "What `from mixadapters import ...` gives, and where it is defined."
    return "\n".join(["# The package", "", head, "", "| name | module |", "|---|---|", *rows, ""])


def reference(title: str, modules: list[str]) -> str:
    """A page of the API: one entry for each public name, once."""
    return "\n\n".join([f"# {title}", *map(entry, names_of(modules)), ""])


def names_of(modules: list[str]) -> list[str]:
    """The full names that the entries of an API page show, each once."""
    names = []
    for module, _, single in (entry.partition(":") for entry in modules):
        names += [f"{origin(module, name)}.{name}" for name in ([single] if single else public_names(module))]
    return list(dict.fromkeys(names))


def entry(name: str) -> str:
    # The verbs of a tuner are its bases' too; the fields of configs that all share are shown once.
    return f"::: {name}" + ("\n    options: {inherited_members: true}" if name.endswith("Model") else "")


def file_of(module: str) -> Path:
    package = next(name for name in FOLDERS if module == name or module.startswith(f"{name}."))
    path = ROOT / FOLDERS[package] / module[len(package) + 1 :].replace(".", "/")
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


@cache
def tree_of(module: str) -> ast.Module:
    return ast.parse(file_of(module).read_text(encoding="utf-8"))


def public_names(module: str) -> list[str]:
    """Those of `__all__`, or the classes and functions that the module defines."""
    tree = tree_of(module)
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return list(ast.literal_eval(node.value))
    defined = [n.name for n in tree.body if isinstance(n, (ast.ClassDef, ast.FunctionDef))]
    return [name for name in defined if not name.startswith("_")]


def origin(module: str, name: str) -> str:
    """The module that defines a name, where packages pass it on."""
    if file_of(module).name != "__init__.py":
        return module
    for node in ast.walk(tree_of(module)):  # imports may stand under `if`
        if isinstance(node, ast.ImportFrom) and node.module and any(alias.name == name for alias in node.names):
            return origin(node.module, name)
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "_LAZY":
            lazy = ast.literal_eval(node.value)
            if name in lazy:
                return lazy[name]
    return module
