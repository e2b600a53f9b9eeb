"""Numbers of the studies and the other examples are looked at before anything is read or trained."""

from __future__ import annotations

import dataclasses
import importlib
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
STUDIES = {"mosa_width": "Grid", "pill_text": "TextArguments"} | dict.fromkeys(
    ("adversarial", "agd_digits", "agd_language", "agd_sd", "choosing", "compression", "domains", "mosa_vision",
     "overspecified", "pill_vqa", "routers", "sentences", "surgery"), "Arguments"
)  # fmt: skip


@pytest.fixture(params=sorted(STUDIES))
def kind(request, monkeypatch) -> Any:
    """The dataclass of a study."""
    known = set(sys.modules)
    monkeypatch.syspath_prepend(str(EXAMPLES / "studies"))
    yield getattr(importlib.import_module(request.param), STUDIES[request.param])
    for name in set(sys.modules) - known:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(EXAMPLES)):
            del sys.modules[name]


def numeric(kind: Any) -> list[dataclasses.Field]:
    return [f for f in dataclasses.fields(kind) if "int" in str(f.type) or "float" in str(f.type)]


def help_of(kind: Any, name: str) -> str:
    return kind.__dataclass_fields__[name].metadata.get("help", "")


def refuses(kind: Any, name: str, value: Any) -> bool:
    required = {f.name: "x" for f in dataclasses.fields(kind) if f.default is f.default_factory}  # neither is there
    several = "list" in str(kind.__dataclass_fields__[name].type)
    try:
        kind(**required, **{name: [value] if several else value})
    except ValueError as error:
        return str(error).startswith(f"{name}=")
    return False


def test_no_study_takes_a_number_that_cannot_be_meant(kind) -> None:
    names = {f.name: str(f.type) for f in numeric(kind)}
    assert names
    for name, hint in names.items():
        assert refuses(kind, name, -1), name
        assert refuses(kind, name, float("nan")), name
        assert refuses(kind, name, float("inf")), name
        assert refuses(kind, name, 1.5) == ("int" in hint), name
    takes_zero = {name for name in names if not refuses(kind, name, 0)}
    assert takes_zero <= {
        "seed",
        "seeds",
        "search_seed",
        "tuning_seeds",
        "cpu_minutes",
        "beta",
        "shots",
        "layers",
        "weight_decay",
    }
    assert {name for name in names if "seed" in name or "0: all" in help_of(kind, name)} <= takes_zero


def test_a_study_takes_each_seed_once_and_as_large_as_numpy_does(kind) -> None:
    (name,) = {"seeds", "seed"} & {f.name for f in numeric(kind)}
    assert refuses(kind, name, 2**32)
    if name == "seeds":
        required = {f.name: "x" for f in dataclasses.fields(kind) if f.default is f.default_factory}
        with pytest.raises(ValueError, match="names a seed twice"):
            kind(**required, seeds=[3, 4, 3])


def test_a_command_ends_by_a_message(monkeypatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES / "studies"))
    compression = importlib.import_module("compression")
    with pytest.raises(SystemExit, match="error: steps=0 must be an integer, at least 1"):
        importlib.import_module("study_arguments").read_arguments(compression.Arguments, ["--steps", "0"])
    del sys.modules["compression"], sys.modules["study_arguments"]


@pytest.mark.parametrize("given", ["0", "-1", "nan", "inf", "1.5"])
@pytest.mark.parametrize(
    ("path", "arguments"),
    [
        ("moa_gather.py", ["base", "text.txt", "--expert", "a=b", "--steps"]),
        ("moa_new_experts.py", ["base", "text.txt", "--steps"]),
        ("studies/serving.py", ["--part", "soak", "--requests"]),
        ("studies/serving.py", ["--part", "many", "--rounds"]),
    ],
)
def test_numbers_of_the_other_examples_are_whole_and_one_or_more(path, arguments, given, monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", [path, *arguments, given])
    with pytest.raises(SystemExit):
        runpy.run_path(str(EXAMPLES / path), run_name="__main__")
    assert f"{given!r} must be a whole number from 1" in capsys.readouterr().err
