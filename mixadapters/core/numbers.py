"""What callers give as numbers for the rows of a batch: tensors, arrays, lists, or one number."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def whole_numbers(name: str, values: Any) -> Tensor:
    """`values` as a tensor. Raises ValueError where they are no whole numbers."""
    numbers = _read(name, values, "whole numbers")
    if numbers.is_floating_point() or numbers.is_complex() or numbers.dtype == torch.bool:
        raise ValueError(f"{name} must be whole numbers, not {numbers.dtype}")
    return numbers


def real_numbers(name: str, values: Any, device: torch.device | str | None = None) -> Tensor:
    """`values` as a tensor of fp32, on `device` where one is given. Raises ValueError where they are no numbers."""
    numbers = _read(name, values, "a number, or one for each row of the batch")
    if numbers.is_complex() or numbers.dtype == torch.bool:
        raise ValueError(
            f"{name}={values!r} must be a number, or one for each row of the batch, and is of {numbers.dtype}"
        )
    return numbers.to(device, torch.float32)


def refuse_other_masks(name: str, mask: Tensor) -> None:
    """Raises ValueError where a mask holds anything but True and False, or 1 and 0. Not under the compiler."""
    if not torch.compiler.is_compiling() and bool(((mask != 0) & (mask != 1)).any()):
        raise ValueError(f"{name} must hold True and False, or 1 and 0")


def _read(name: str, values: Any, wanted: str) -> Tensor:
    try:
        numbers = torch.as_tensor(values)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{name}={values!r} must be {wanted}: {error}") from None
    if isinstance(values, (list, tuple)) and any(isinstance(value, bool) for value in values):  # read as 0 and 1
        raise ValueError(f"{name}={values!r} must be {wanted}; True and False are none")
    if numbers.is_meta:
        raise ValueError(f"{name} is on the meta device and holds no values; make it on the device of the model")
    return numbers
