"""Regular expressions that come with a config, which may be a stranger's: they compile, and cannot hang."""

from __future__ import annotations

import re
import sys
from functools import lru_cache
from importlib import import_module
from typing import Any, NamedTuple

# Python's own parser of expressions; before 3.11 it was a module beside `re`.
parser: Any = import_module("re._parser" if sys.version_info >= (3, 11) else "sre_parse")
constants: Any = import_module("re._constants" if sys.version_info >= (3, 11) else "sre_constants")

LENGTH = 200  # of a module's path, at most
WAYS = 10**7  # to match a part of such a path: what a search may have to try
LONGEST = 20_000  # characters of a pattern; the sites of a method are joined to one of some hundreds
ALPHABET = frozenset(chr(i) for i in range(128))  # paths of modules are ASCII; others are taken for "anything"


class Ways(NamedTuple):
    """How a part of a pattern matches."""

    number: float  # in how many ways, at most
    first: frozenset[str]  # characters that it can begin with
    empty: bool  # whether it can match nothing


def check_pattern(name: str, pattern: str) -> None:
    """Refuse a pattern of the field `name` that is no regular expression, or that can take very long.

    A repetition is counted once for each length that it can have, unless the character behind it tells where it ends.

    Raises:
        ValueError: which field, and why.
    """
    if len(pattern) > LONGEST:
        raise ValueError(f"{name}={_short(pattern)} has {len(pattern)} characters, over {LONGEST}: list the modules")
    try:
        re.compile(pattern)
        ways = _ways(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"{name}={_short(pattern)} is no regular expression: {error}") from None
    if ways > WAYS:
        raise ValueError(
            f"{name}={_short(pattern)} can take very long to match: it repeats what is itself repeated or has several "
            "forms, or has too many open repetitions; write it with [^.]* for a part of a path, and without "
            "repetitions inside repetitions, or list the modules"
        )


def _short(pattern: str) -> str:
    return repr(pattern if len(pattern) <= 200 else f"{pattern[:200]}...")


@lru_cache(maxsize=1024)
def _ways(pattern: str) -> float:
    return _sequence(list(parser.parse(pattern)), frozenset()).number


def _sequence(nodes: list[Any], follow: frozenset[str]) -> Ways:
    """Of nodes in a row, from the last to the first. follow: what may come behind them."""
    found = Ways(1.0, frozenset(), True)
    for node in reversed(nodes):
        behind = found.first | follow if found.empty else found.first
        here = _node(node, behind)
        first = here.first | found.first if here.empty else here.first
        found = Ways(min(here.number * found.number, float(WAYS) ** 2), first, here.empty and found.empty)
    return found


def _node(node: Any, follow: frozenset[str]) -> Ways:
    kind, value = node
    if kind is constants.SUBPATTERN:
        return _sequence(list(value[-1]), follow)
    if kind is constants.BRANCH:
        parts = [_sequence(list(part), follow) for part in value[1]]
        first = frozenset().union(*(part.first for part in parts))
        apart = sum(len(part.first) for part in parts) == len(first) and not any(part.empty for part in parts)
        counts = [part.number for part in parts]
        return Ways(max(counts) if apart else sum(counts), first, any(part.empty for part in parts))
    if kind is constants.GROUPREF_EXISTS:  # the group has matched in some of the ways only
        parts = [_sequence(list(part or ()), follow) for part in value[1:]]
        first = parts[0].first | parts[1].first
        return Ways(sum(part.number for part in parts), first, any(part.empty for part in parts))
    if kind.name == "ATOMIC_GROUP":  # tries no more than a plain group, and as much before its first match
        return _sequence(list(value), follow)
    if kind in (constants.MAX_REPEAT, constants.MIN_REPEAT) or kind.name == "POSSESSIVE_REPEAT":
        least, most, body = value
        return _repeat(least, most, body, follow)
    if kind is constants.AT:
        return Ways(1.0, frozenset(), True)
    if kind in (constants.LITERAL, constants.NOT_LITERAL, constants.ANY, constants.IN):
        return Ways(1.0, _characters(node), False)
    if kind in (constants.ASSERT, constants.ASSERT_NOT):
        return Ways(_sequence(list(value[1]), ALPHABET).number, frozenset(), True)
    if kind is constants.FAILURE:
        return Ways(1.0, frozenset(), False)
    if kind is constants.GROUPREF:
        return Ways(float(LENGTH), ALPHABET, True)
    return Ways(float(WAYS) ** 2, ALPHABET, True)  # what this module does not know


def _repeat(least: int, most: Any, body: Any, follow: frozenset[str]) -> Ways:
    probe = _sequence(list(body), ALPHABET)
    inside = _sequence(list(body), follow | probe.first)
    lengths = min(int(most), LENGTH) - min(int(least), LENGTH) + 1
    if not inside.first & follow and not inside.empty:
        lengths = 1  # what follows tells where it ends
    passes = min(int(most), LENGTH)
    several = passes > 1 and (inside.number > 1 or inside.empty)
    count = float(WAYS) ** 2 if several else lengths * inside.number
    return Ways(count, inside.first, least == 0 or inside.empty)


def _characters(node: Any) -> frozenset[str]:
    """The characters of ASCII that one node matches, and their other case: a flag may say that it counts for none."""
    chosen = _members(node)
    return chosen | {c.swapcase() for c in chosen}


def _members(node: Any) -> frozenset[str]:
    kind, value = node
    if kind is constants.LITERAL:
        return frozenset(chr(value)) & ALPHABET
    if kind is constants.NOT_LITERAL:
        return ALPHABET - {chr(value)}
    if kind is constants.ANY:
        return ALPHABET
    if kind is constants.RANGE:
        return frozenset(c for c in ALPHABET if value[0] <= ord(c) <= value[1])
    if kind is constants.CATEGORY:
        name = str(value).removeprefix("CATEGORY_")
        letter = {"DIGIT": r"\d", "SPACE": r"\s", "WORD": r"\w"}.get(name.removeprefix("NOT_"))
        if letter is None:
            return ALPHABET
        chosen = frozenset(c for c in ALPHABET if re.match(letter, c))
        return ALPHABET - chosen if name.startswith("NOT_") else chosen
    negated = value[0][0] is constants.NEGATE
    chosen = frozenset().union(*(_members(item) for item in (value[1:] if negated else value)))
    return ALPHABET - chosen if negated else chosen
