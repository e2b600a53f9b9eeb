"""One check of a config's values, from its fields' annotations and metadata; and of numbers that callers give.

Metadata beside `help`: `least`, `above`, `most`, `below` (a number's range), `choices` (of a string), `pattern` (a
string, a list's strings or a dict's keys are regular expressions), `patterns` (a dict's values are). `free` fields may
differ between a file and the adapter that it is loaded into (`MixtureConfig.refuse_other`), `told` ones where one of
both does not say them. An `order` gives numbers or weights their meaning: a saved config holds a digest of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import MISSING, Field, fields
from functools import lru_cache
from math import isfinite
from numbers import Integral
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from mixadapters.core.patterns import check_pattern
from mixadapters.core.registry import nearest

LARGEST = 10**12  # of integers: nothing in a model is as wide or as many; torch takes none beyond 64 bits
# Of numbers other than 0, in size: in the 32 bits of tensors what is beyond is 0 or infinite, or what it divides is.
LEAST_SIZE, MOST_SIZE = 1e-30, 1e30


def check_fields(config: Any) -> None:
    """Refuse values of a dataclass that its annotations and metadata do not allow.

    A bool is a bool, and no number; an integer is an integer of up to 10**12; a float is finite, and 0 or 1e-30 to
    1e30 in size. Tuples pass for lists. Patterns and names of modules are not empty.

    Raises:
        ValueError: which field, its value, and what it takes.
    """
    kind: Any = type(config)
    hints = _hints(kind)
    for field in fields(config):
        value = getattr(config, field.name)
        if field.name not in hints:
            continue
        if not fits(value, hints[field.name]):
            raise ValueError(_message(field, value, hints[field.name]))
        _check_metadata(field, value, hints[field.name])


@lru_cache(maxsize=64)
def _hints(cls: Any) -> dict[str, Any]:
    """Annotations of the fields of `cls`; those of enums (PEFT's own) are left out."""
    hints = get_type_hints(cls)
    return {f.name: hints[f.name] for f in fields(cls) if f.name not in ("peft_type", "task_type", "auto_mapping")}


def fits(value: Any, hint: Any) -> bool:
    """Whether `value` is of the annotated type, elements included."""
    origin, inside = get_origin(hint), get_args(hint)
    if hint is Any:
        return True
    if origin in (Union, UnionType):
        return any(fits(value, one) for one in inside)
    if origin is Literal:
        return any(type(value) is type(choice) and value == choice for choice in inside)
    if origin is list:
        return isinstance(value, (list, tuple)) and all(fits(item, inside[0]) for item in value)
    if origin is set:
        return isinstance(value, set) and all(fits(item, inside[0]) for item in value)
    if origin is dict:
        return isinstance(value, dict) and all(fits(k, inside[0]) and fits(v, inside[1]) for k, v in value.items())
    if hint is float:
        return finite(value)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool) and abs(value) <= LARGEST
    return isinstance(value, origin or (NoneType if hint is None else hint))


def finite(value: Any) -> bool:
    """Whether `value` is a number, no bool, and finite in tensors of 32 bits: 0, or 1e-30 to 1e30 in size."""
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return False
    return value == 0 or LEAST_SIZE <= abs(value) <= MOST_SIZE


def check_integer(name: str, value: Any, *, least: int | None = None, most: int | None = None) -> None:
    """Raises ValueError where an argument is no integer of this range. True and False are none."""
    said = _given(least=least, most=most)
    if not isinstance(value, Integral) or isinstance(value, bool) or not _in_range(value, said):
        raise ValueError(_must_be(f"{name}={_shown(value)}", "an integer", said))


def check_number(
    name: str, value: Any, *, least: float | None = None, above: float | None = None, most: float | None = None,
    below: float | None = None,
) -> None:  # fmt: skip
    """Raises ValueError where an argument is no finite number (`finite`) of this range. True and False are none."""
    said = _given(least=least, above=above, most=most, below=below)
    if not finite(value) or not _in_range(value, said):
        raise ValueError(_must_be(f"{name}={_shown(value)}", "a finite number", said) + _size_of(value))


def check_kind(name: str, value: Any, kind: type | tuple[type, ...], what: str) -> None:
    """Raises ValueError where an argument is of another kind. what: that it must be, in words."""
    if not isinstance(value, kind):
        raise ValueError(f"{name}={_shown(value)} must be {what}")


def check_fits(name: str, value: Any, hint: Any) -> None:
    """Raises ValueError where a value is not of an annotated type, elements included: see `fits`."""
    if not fits(value, hint):
        raise ValueError(f"{name}={_shown(value)} must be {_words(hint)}{_size_of(value)}")


def one_of(name: str, value: object, choices: Any) -> None:
    """Raises ValueError where the value of an argument is not among `choices`."""
    if value not in list(choices):  # a dict would hash the value
        raise ValueError(f"{name}={value!r} is unknown; choose one of {list(choices)}.{nearest(str(value), choices)}")


def check_switches(**switches: Any) -> None:
    """Raises ValueError where an argument is neither True nor False: any other value would count as one of them."""
    for name, value in switches.items():
        if not isinstance(value, bool):
            raise ValueError(f"{name}={_shown(value)} must be True or False")


def check_share(name: str, value: Any) -> None:
    """Raises ValueError where `value` is no number from 0 to 1."""
    if not (finite(value) and 0 <= value <= 1):
        raise ValueError(f"{name}={value!r} must be a number from 0 to 1")


def _check_metadata(field: Field[Any], value: Any, hint: Any) -> None:
    said = field.metadata
    if not all(_in_range(number, said) for number in _numbers(value)):
        raise ValueError(_message(field, value, hint))
    if isinstance(value, str) and value not in said.get("choices", (value,)):
        raise ValueError(_message(field, value, hint))
    patterns = list(_strings(value)) if said.get("pattern") else []
    patterns += (value or {}).values() if said.get("patterns") else []
    for pattern in patterns:
        if not pattern:
            raise ValueError(f"{field.name}={value!r} holds an empty string, which names nothing; leave it out")
        check_pattern(field.name, pattern)


def _given(**limits: float | None) -> dict[str, float]:
    return {name: limit for name, limit in limits.items() if limit is not None}


def _in_range(number: Any, said: Mapping[str, Any]) -> bool:
    """Whether a number keeps to the limits of RANGE that are said."""
    low = number < said.get("least", number) or ("above" in said and number <= said["above"])
    high = number > said.get("most", number) or ("below" in said and number >= said["below"])
    return not (low or high)


def _must_be(given: str, what: str, said: Mapping[str, Any]) -> str:
    limits = [f"{word} {said[key]}" for key, word in RANGE.items() if key in said]
    return ", ".join([f"{given} must be {what}", *limits])


def _size_of(value: Any) -> str:
    """What the end of a message says of numbers too small or too large; "" where there are none."""
    if not any((isinstance(number, int) or isfinite(number)) and not finite(number) for number in _numbers(value)):
        return ""
    return f"; a number is 0, or {LEAST_SIZE} to {MOST_SIZE} in size"


def _numbers(value: Any) -> Iterator[int | float]:
    """The numbers in a value, however deep."""
    if isinstance(value, dict):
        value = tuple(value.values())
    if isinstance(value, (list, tuple)):
        for item in value:
            yield from _numbers(item)
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        yield value


def _strings(value: Any) -> Iterator[str]:
    """A string, or those in a list, a set or the keys of a dict."""
    inside = (value,) if isinstance(value, str) else value or ()
    return (one for one in inside if isinstance(one, str))


def _message(field: Field[Any], value: Any, hint: Any) -> str:
    said, shown = field.metadata, _shown(value)
    if _holds_larger(value):
        return f"{field.name}={shown} must be {_words(hint)}; an integer is {LARGEST} at most"
    if size := _size_of(value):
        return f"{field.name}={shown} must be {_words(hint)}{size}"
    if said.get("least") == 1 and "most" not in said and hint in (int, int | None):  # as PEFT's own types say it
        return f"`{field.name}` should be a positive integer value but the value passed is {shown}"
    choices = list(said.get("choices") or _literals(hint))
    if choices and isinstance(value, str):
        return f"{field.name}={shown} is unknown; choose one of {choices}.{nearest(value, choices)}"
    return _must_be(f"{field.name}={shown}", _words(hint), said)


def _shown(value: Any) -> str:
    try:
        shown = repr(value)
    except ValueError:  # Python writes no integers of over 4300 digits
        shown = f"<{type(value).__name__} with an integer of over 4300 digits>"
    return shown if len(shown) <= 200 else f"{shown[:200]}..."


def _holds_larger(value: Any) -> bool:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (list, tuple, set)):
        return any(_holds_larger(item) for item in value)
    return isinstance(value, int) and abs(value) > LARGEST


RANGE = {"least": "at least", "above": "above", "most": "at most", "below": "less than"}
WORDS = {int: "an integer", float: "a finite number", str: "a string", bool: "True or False", NoneType: "None"}
ELEMENTS = {int: "integers", float: "finite numbers", str: "strings", bool: "booleans"}


def _words(hint: Any) -> str:
    origin, inside = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return " or ".join(_words(one) for one in inside if get_origin(one) is not set)  # made of the list
    if origin is Literal:
        return " or ".join(repr(choice) for choice in inside)
    if origin in (list, set):
        return f"a {origin.__name__} of {_elements(inside[0])}"
    if origin is dict:
        return f"a dict of {_elements(inside[0])} to {_elements(inside[1])}"
    return WORDS.get(hint, getattr(hint, "__name__", str(hint)))


def _elements(hint: Any) -> str:
    if get_origin(hint) in (Union, UnionType):
        return " or ".join(_elements(one) for one in get_args(hint))
    return ELEMENTS.get(hint) or _words(hint)


def _literals(hint: Any) -> tuple[Any, ...]:
    """The choices, where there is nothing else but None."""
    if get_origin(hint) is Literal:
        return get_args(hint)
    others = [one for one in get_args(hint) if one is not NoneType]
    return _literals(others[0]) if get_origin(hint) in (Union, UnionType) and len(others) == 1 else ()


def default_of(config: Any, name: str) -> Any:
    """What a field of a config is where nobody has set it."""
    own = config.__dataclass_fields__[name]
    return own.default if own.default_factory is MISSING else own.default_factory()
