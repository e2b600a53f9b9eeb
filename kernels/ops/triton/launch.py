"""The one place where kernels are started, so that launches can be recorded instead."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch

from mixadapters.kernels.triton import configs


class Launch(NamedTuple):
    """A kernel, its grid, and by name its arguments and the constants of the compilation."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    constants: dict[str, Any]


class Recording(NamedTuple):
    """The architecture that is pretended, and the launches made under it."""

    arch: str
    launches: list[Launch]


_recording: ContextVar[Recording | None] = ContextVar("recording", default=None)


@contextmanager
def record(arch: str) -> Iterator[list[Launch]]:
    """Collect launches as they would be made on `arch`, and make none: outputs stay unwritten.

    Tensors may be anywhere, on "meta" for instance: the shapes of all outputs come without a device.
    """
    made: list[Launch] = []
    token = _recording.set(Recording(arch, made))
    try:
        yield made
    finally:
        _recording.reset(token)


def recording() -> bool:
    """Whether launches are recorded."""
    return _recording.get() is not None


def architecture(device: torch.device) -> str:
    """The architecture that kernels for tensors on `device` are meant for."""
    pretended = _recording.get()
    return configs.architecture(device) if pretended is None else pretended.arch


def launch(kernel: Any, grid: tuple[int, ...], arguments: dict[str, Any], **constants: Any) -> None:
    """Start `kernel` on `grid`, or record that it would have been. Grids without programs are left out."""
    if 0 in grid:
        return
    pretended = _recording.get()
    if pretended is not None:
        pretended.launches.append(Launch(kernel, grid, arguments, constants))
    else:
        tensor = next(value for value in arguments.values() if isinstance(value, torch.Tensor))
        with torch.cuda.device_of(tensor):  # a model may be spread over several
            kernel[grid](**arguments, **constants)
