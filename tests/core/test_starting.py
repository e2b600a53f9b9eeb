"""Types of the arguments of commands."""

from __future__ import annotations

import argparse

import pytest

from mixadapters.core.starting import number, whole


def test_whole_numbers_keep_to_their_limits() -> None:
    assert [whole(0, 3)(given) for given in ("0", "3")] == [0, 3]
    for kind, given, said in (
        (whole(0, 0), "1", "a whole number from 0 to 0"), (whole(1), "0", "a whole number from 1$"),
        (whole(1, 3), "4", "from 1 to 3"), (whole(0), "-1", "from 0"), (whole(0), "nan", "from 0"),
        (whole(0), "1.0", "from 0"),
    ):  # fmt: skip
        with pytest.raises(argparse.ArgumentTypeError, match=f"'{given}' must be .*{said}"):
            kind(given)


def test_other_numbers_are_finite_and_keep_to_their_limits() -> None:
    assert (number(least=0.0)("0"), number(above=0.0)("1e-9"), number()("-2.5")) == (0.0, 1e-9, -2.5)
    for kind, given, said in (
        (number(least=0.0), "-1e-9", "finite number from 0 on"), (number(above=0.0), "0", "finite number above 0"),
        (number(), "nan", "finite number$"), (number(above=0.0), "inf", "finite number above 0"),
        (number(), "-inf", "finite number"), (number(), "fast", "finite number"),
    ):  # fmt: skip
        with pytest.raises(argparse.ArgumentTypeError, match=f"'{given}' must be a {said}"):
            kind(given)
