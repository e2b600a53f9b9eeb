"""A named table of classes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from typing import Generic, TypeVar

T = TypeVar("T")
LIBRARY = __name__.partition(".")[0]


def nearest(name: str, names: object) -> str:
    """ " Did you mean 'x'?" for the end of an error message, or nothing."""
    close = get_close_matches(str(name), [str(n) for n in names], n=1)  # type: ignore[attr-defined]
    return f" Did you mean {close[0]!r}?" if close else ""


class Registry(Generic[T]):
    """Maps short names to classes, and says what the choices are when a name is wrong.

    Args:
        noun: what the classes are, for messages.
        hint: a sentence to end the message about an unknown name.
        base: what every class derives from. None: nothing in particular.
    """

    def __init__(self, noun: str, hint: str = "", base: type | None = None) -> None:
        self.noun, self.hint, self.base = noun, hint, base
        self._entries: dict[str, type[T]] = {}

    def register(self, name: str) -> Callable[[type[T]], type[T]]:
        """Class decorator. A class that is defined again, as in a notebook, takes the place of the one before.

        Raises:
            ValueError: no name, or another class has it; what is registered is no class, or not derived from `base`.
        """
        if not isinstance(name, str) or not name:
            raise ValueError(f"{name!r} is no name for a {self.noun}")

        def add(cls: type[T]) -> type[T]:
            if not isinstance(cls, type) or (self.base is not None and not issubclass(cls, self.base)):
                wanted = "a class" if self.base is None else f"a class derived from {self.base.__name__}"
                raise ValueError(f"{self.noun} {name!r}: {cls!r} is no {self.noun}; register {wanted}")
            old = self._entries.get(name, cls)
            if (old.__module__, old.__qualname__) != (cls.__module__, cls.__qualname__):
                whose = "the library's own" if old.__module__.startswith(f"{LIBRARY}.") else f"{old.__module__}'s"
                raise ValueError(
                    f"{self.noun} {name!r} is already {old.__qualname__}, {whose}; choose another name for "
                    f"{cls.__qualname__}"
                )
            self._entries[name] = cls
            return cls

        return add

    @contextmanager
    def temporarily(self) -> Iterator[None]:
        """What is registered inside the block is forgotten after it."""
        before = dict(self._entries)
        try:
            yield
        finally:
            self._entries = before

    def __getitem__(self, name: str) -> type[T]:
        if name not in self._entries:
            raise ValueError(
                f"unknown {self.noun} {name!r}; have {sorted(self._entries)}.{nearest(name, self._entries)}"
                f"{f' {self.hint}' if self.hint else ''}"
            )
        return self._entries[name]

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)
