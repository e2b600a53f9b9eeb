"""A named table of classes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from difflib import get_close_matches
from typing import Generic, TypeVar

T = TypeVar("T")


def nearest(name: str, names: object) -> str:
    """ " Did you mean 'x'?" for the end of an error message, or nothing."""
    close = get_close_matches(str(name), [str(n) for n in names], n=1)  # type: ignore[attr-defined]
    return f" Did you mean {close[0]!r}?" if close else ""


class Registry(Generic[T]):
    """Maps short names to classes, and says what the choices are when a name is wrong."""

    def __init__(self, noun: str) -> None:
        self.noun = noun
        self._entries: dict[str, type[T]] = {}

    def register(self, name: str) -> Callable[[type[T]], type[T]]:
        """Class decorator. Raises ValueError if another class has the name."""

        def add(cls: type[T]) -> type[T]:
            if self._entries.setdefault(name, cls) is not cls:
                raise ValueError(f"{self.noun} {name!r} is already {self._entries[name].__qualname__}")
            return cls

        return add

    def __getitem__(self, name: str) -> type[T]:
        if name not in self._entries:
            raise ValueError(
                f"unknown {self.noun} {name!r}; have {sorted(self._entries)}.{nearest(name, self._entries)}"
            )
        return self._entries[name]

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)
