"""For the pages of the API: fields of configs, which say in their metadata what they are for."""

from __future__ import annotations

import ast
from typing import Any

import griffe


class Fields(griffe.Extension):
    """`name: T = field(default=d, metadata={"help": h})` is shown as `name: T = d`, with h as its docstring."""

    def on_attribute_instance(self, *, attr: griffe.Attribute, **_: Any) -> None:
        if attr.value is None or not str(attr.value).startswith("field("):
            return
        call = ast.parse(str(attr.value), mode="eval").body
        given = {keyword.arg: keyword.value for keyword in call.keywords}
        if attr.docstring is None and isinstance(given.get("metadata"), ast.Dict):
            entries = zip(given["metadata"].keys, given["metadata"].values, strict=True)
            helps = [value for key, value in entries if isinstance(key, ast.Constant) and key.value == "help"]
            if helps:
                attr.docstring = griffe.Docstring(text_of(helps[0]), parent=attr)
        if "default" in given:
            attr.value = ast.unparse(given["default"])
        elif "default_factory" in given:
            attr.value = f"{ast.unparse(given['default_factory'])}()"


def text_of(value: ast.expr) -> str:
    """A string, or an f-string with its expressions as code."""
    if isinstance(value, ast.JoinedStr):
        return "".join(text_of(part) for part in value.values)
    if isinstance(value, ast.FormattedValue):
        return f"`{ast.unparse(value.value)}`"
    return str(ast.literal_eval(value))
