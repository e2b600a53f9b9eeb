"""What the studies are told: a dataclass each, read from the command line, whose numbers are looked at first."""

from __future__ import annotations

from dataclasses import fields
from typing import Any, TypeVar

from transformers import HfArgumentParser

from mixadapters.core.fields import check_fields, check_integer, check_number

Told = TypeVar("Told")


def read_arguments(kind: type[Told], argv: list[str] | None = None) -> Told:
    """The arguments of a command line as an instance of the dataclass `kind`. What it refuses ends the command."""
    try:
        (args,) = HfArgumentParser(kind).parse_args_into_dataclasses(argv)  # type: ignore[arg-type]
    except ValueError as error:
        raise SystemExit(f"error: {error}") from error
    return args


def check_numbers(args: Any, zero: tuple[str, ...] = ()) -> None:
    """Raises ValueError: a number of a study's dataclass cannot be meant.

    Whole numbers are 1 or more, others finite and above 0; seeds may be 0, and are different. zero: fields that may
    be 0, too.
    """
    check_fields(args)
    for field in fields(args):
        value, is_seed = getattr(args, field.name), field.name.endswith(("seed", "seeds"))
        values = value if isinstance(value, list) else [value]
        for number in values:
            if isinstance(number, bool) or not isinstance(number, int | float):
                continue
            if is_seed:
                check_integer(field.name, number, least=0, most=2**32 - 1)  # numpy takes no larger ones
            elif field.name in zero:
                check_number(field.name, number, least=0)
            elif isinstance(number, int):
                check_integer(field.name, number, least=1)
            else:
                check_number(field.name, number, above=0)
        if is_seed and len(set(values)) < len(values):
            raise ValueError(f"{field.name}={value} names a seed twice: give each once")
