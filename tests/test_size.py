"""What is too large to read at once, and files that import each other in a circle.

Lines are counted from the first decorator to the last line, without the docstring. A class includes its methods.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("mixadapters", "kernels", "tasks", "examples")
CLASS, FUNCTION = 250, 60
# What is larger today. A name that is small again has to go from here.
LARGER = frozenset(
    {
        "kernels/ops/triton/kernels.py:expand",
        "kernels/ops/triton/kernels.py:expand_back",
        "kernels/ops/triton/kernels.py:wgrad",
    }
)


def definitions(path: Path) -> Iterator[tuple[str, ast.AST, int]]:
    """(qualified name, node, its lines) of the classes and functions of a file."""
    waiting: list[tuple[str, ast.AST]] = [("", ast.parse(path.read_text(encoding="utf-8")))]
    while waiting:
        prefix, node = waiting.pop()
        for child in ast.iter_child_nodes(node):
            if isinstance(child, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                name = f"{prefix}{child.name}"
                yield name, child, length(child)
                waiting.append((f"{name}.", child))
            else:
                waiting.append((prefix, child))


def length(node: ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
    lines = node.end_lineno - first + 1
    opening = node.body[0]
    if (
        isinstance(opening, ast.Expr)
        and isinstance(opening.value, ast.Constant)
        and isinstance(opening.value.value, str)
    ):
        lines -= opening.end_lineno - opening.lineno + 1
    return lines


def too_large() -> dict[str, int]:
    found = {}
    for folder in FOLDERS:
        for path in sorted((ROOT / folder).rglob("*.py")):
            for name, node, lines in definitions(path):
                if lines > (CLASS if isinstance(node, ast.ClassDef) else FUNCTION):
                    found[f"{path.relative_to(ROOT).as_posix()}:{name}"] = lines
    return found


def test_no_class_and_no_function_is_too_large_to_read() -> None:
    found = too_large()
    larger = {name: lines for name, lines in found.items() if name not in LARGER}
    assert not larger, f"more than {CLASS} lines of a class or {FUNCTION} of a function: {larger}"
    assert found.keys() >= LARGER, f"small again, so not to be listed: {sorted(LARGER - found.keys())}"


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("def f():\n    a = 1\n    return a", {"f": 3}),
        ('def f():\n    """One.\n\n    Two."""\n    return 1', {"f": 2}),
        (
            "@d\n@e\nclass C:\n    x = 1\n\n    def f(self):\n        def g():\n            pass",
            {"C": 8, "C.f": 3, "C.f.g": 2},
        ),
        ("if True:\n    async def f():\n        pass", {"f": 2}),
    ],
)
def test_the_counter_of_lines_sees(source, expected, tmp_path) -> None:
    file = tmp_path / "source.py"
    file.write_text(source)
    assert {name: lines for name, _, lines in definitions(file)} == expected
