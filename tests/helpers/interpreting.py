"""Triton's interpreter, repaired, and what looks for faults that it hides.

The interpreter keeps bfloat16 as raw 16-bit words and computes on the words. The repairs below make it round as a GPU
does. It runs programs in order and writes wherever it is told to; `shuffled` and `guarded` look for what that hides.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpretedFunction, InterpreterBuilder, TensorHandle


def _widen(words: np.ndarray) -> np.ndarray:
    return (words.astype(np.uint32) << 16).view(np.float32)


def _round(values: np.ndarray) -> np.ndarray:
    """To the nearest bfloat16, ties to even, as words."""
    values = np.ascontiguousarray(values, np.float32)
    bits = values.view(np.uint32)
    words = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), words)


def _is_bfloat16(dtype) -> bool:
    return dtype.scalar == tl.bfloat16


def _float32(handle: TensorHandle) -> TensorHandle:
    return TensorHandle(_widen(handle.data), tl.float32) if _is_bfloat16(handle.dtype) else handle


def _repair() -> None:
    dot, cast, binary = InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl, InterpreterBuilder.binary_op

    def create_dot(self, a, b, *rest):
        return dot(self, _float32(a), _float32(b), *rest)

    def cast_impl(self, src, dst_type):
        if _is_bfloat16(src.dtype) == _is_bfloat16(dst_type):
            return cast(self, src, dst_type)
        if _is_bfloat16(src.dtype):
            return cast(self, _float32(src), dst_type)
        return TensorHandle(_round(src.data), tl.bfloat16)

    def binary_op(self, lhs, rhs, op):
        if not _is_bfloat16(lhs.dtype):
            return binary(self, lhs, rhs, op)
        result = op(_widen(lhs.data), _widen(rhs.data))
        return TensorHandle(result if result.dtype == bool else _round(result), lhs.dtype)

    InterpreterBuilder.create_dot = create_dot
    InterpreterBuilder.cast_impl = cast_impl
    InterpreterBuilder.binary_op = binary_op


def _hasten() -> None:
    """Each call of a function in a kernel patches triton.language anew, which takes most of the time: once will do."""
    patched: set[str] = set()
    call = InterpretedFunction.__call__

    def __call__(self, *args, **kwargs):
        home = self.fn.__module__
        if home in patched:
            return self.rewrite()(*args, **kwargs)
        patched.add(home)
        return call(self, *args, **kwargs)

    InterpretedFunction.__call__ = __call__


_repair()
_hasten()


@contextmanager
def shuffled(seed: int) -> Iterator[None]:
    """The programs of every launch run in another order. Nothing may change, unless programs race."""
    builder = interpreter.interpreter_builder
    set_dim, set_index = builder.set_grid_dim, builder.set_grid_idx
    order: list[tuple[int, ...]] = []
    size: tuple[int, ...] = ()

    def set_grid_dim(*dims: int) -> None:
        nonlocal order, size
        set_dim(*dims)
        size, order = dims, list(np.ndindex(*dims))
        random.Random(seed).shuffle(order)

    def set_grid_idx(*index: int) -> None:
        set_index(*order[np.ravel_multi_index(index, size)])

    builder.set_grid_dim, builder.set_grid_idx = set_grid_dim, set_grid_idx
    try:
        yield
    finally:
        del builder.set_grid_dim, builder.set_grid_idx


def rowwise(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products add up each row in the same order wherever it stands, as matrix instructions do and BLAS does not."""

    def create_dot(self, a, b, d, *rest):
        a, b = _float32(a), _float32(b)
        return TensorHandle(np.einsum("mk,kn->mn", a.data, b.data, dtype=np.float32) + d.data, d.dtype)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", create_dot)


def guarded(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[torch.Tensor]]:
    """Every new tensor is NaN where nobody writes it, and lies between two guards that nobody may write."""
    guard, mark, original = 64, 12345.0, torch.Tensor.new_empty
    made: list[torch.Tensor] = []

    def new_empty(like, *size, dtype=None, device=None):
        dtype = dtype or like.dtype
        if device is not None or not dtype.is_floating_point:  # the interpreter's own
            return original(like, *size, dtype=dtype, device=device)
        size = size[0] if len(size) == 1 and not isinstance(size[0], int) else size
        count = int(np.prod(size))
        block = torch.full((count + 2 * guard,), mark, dtype=dtype)
        block[guard : guard + count] = float("nan")
        made.append(block)
        return block[guard : guard + count].view(size)

    monkeypatch.setattr(torch.Tensor, "new_empty", new_empty)
    monkeypatch.setattr(torch, "empty_like", lambda t: new_empty(t, *t.shape))
    yield made
    monkeypatch.undo()
    assert made
    for block in made:
        word = torch.full((guard,), mark, dtype=block.dtype)
        assert torch.equal(block[:guard], word), "a store in front of a tensor"
        assert torch.equal(block[-guard:], word), "a store behind a tensor"
