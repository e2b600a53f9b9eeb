"""Two devices where there is one: tensors of the CPU say where they lie, and do not meet those from elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_iter, tree_map

FIRST, SECOND = torch.device("cpu", 0), torch.device("cpu", 1)
DEVICE = Tensor.device.__get__  # type: ignore[attr-defined]
MOVES = {Tensor.to, Tensor.type_as}
# What takes values from elsewhere: of one number, indices on the CPU, what is written in place.
LENIENT = {Tensor.copy_, Tensor.__getitem__, Tensor.__setitem__, Tensor.__repr__, Tensor.type, Tensor.backward}


def place_of(tensor: Tensor) -> torch.device | None:
    """Where a tensor lies; None: nobody has said."""
    return getattr(tensor, "_place", None)


def put(value: Any, device: torch.device) -> Any:
    """`value` whose tensors lie on `device`; a module's parameters and buffers in place."""
    if isinstance(value, nn.Module):
        for tensor in (*value.parameters(), *value.buffers()):
            tensor._place = device  # type: ignore[attr-defined]
        return value
    return tree_map(lambda part: _tagged(part.detach() if part.is_leaf else part.view_as(part), device)
                    if isinstance(part, Tensor) else part, value)  # fmt: skip


def _tagged(tensor: Tensor, device: torch.device | None) -> Tensor:
    if device is not None:
        tensor._place = device  # type: ignore[attr-defined]
    return tensor


def _indexed(device: Any) -> torch.device | None:
    """A device; None for that of tensors of which nobody has said where they lie, which fit all."""
    found = torch.device(device)
    return None if found.index is None else found


class _Devices(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = dict(kwargs or {})
        if func == DEVICE:
            return place_of(args[0]) or func(*args)
        device = None
        if isinstance(kwargs.get("device"), (str, torch.device)):
            device, kwargs["device"] = _indexed(kwargs["device"]), "cpu"
        if func in MOVES:
            like = [a for a in args[1:] if isinstance(a, Tensor)]
            named = [_indexed(a) for a in args[1:] if isinstance(a, (str, torch.device))]
            device = device or next(iter(named), None) or next((place_of(a) for a in like), None)
            args = tuple(torch.device("cpu") if isinstance(a, (str, torch.device)) else a for a in args)
            found = func(*args, **kwargs)
            moved = device is not None and device != place_of(args[0])
            return _tagged(found.view_as(found) if moved else found, device or place_of(args[0]))
        if func is torch.autograd.grad:  # from one device to those of `inputs`
            of = args[1] if isinstance(args[1], (tuple, list)) else [args[1]]
            return tuple(_tagged(grad, place_of(a)) for grad, a in zip(func(*args, **kwargs), of, strict=True))
        tensors = [a for a in tree_iter((args, kwargs)) if isinstance(a, Tensor)]
        places = {place for a in tensors if (place := place_of(a)) is not None}
        if len(places) > 1 and func not in LENIENT:
            raise RuntimeError(f"{getattr(func, '__name__', func)}: tensors on {sorted(map(str, places))}")
        found = func(*args, **kwargs)
        where = device or (place_of(tensors[0]) if tensors else None) or next(iter(places), None)
        for part in tree_iter(found) if isinstance(found, (Tensor, tuple, list)) else ():
            if isinstance(part, Tensor) and place_of(part) is None:
                _tagged(part, where)
        return found


@contextmanager
def two_devices(first: nn.Module, *second: nn.Module) -> Iterator[None]:
    """Inside, `first` lies on one device but for its modules `second`, which take their inputs along to another."""
    put(first, FIRST)
    handles = []
    for module in second:
        put(module, SECOND)
        handles.append(module.register_forward_pre_hook(
            lambda _, args, kwargs: (_moved(args), _moved(kwargs)), with_kwargs=True, prepend=True
        ))  # fmt: skip
    try:
        with _Devices():
            yield
    finally:
        for handle in handles:
            handle.remove()


def _moved(value: Any) -> Any:
    return tree_map(lambda part: part.to(SECOND) if isinstance(part, Tensor) else part, value)
