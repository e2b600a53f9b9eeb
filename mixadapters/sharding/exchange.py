"""What the processes of an expert group send each other in a forward and its backward pass: one sum each way."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def enter(group: Any, tensors: Sequence[Tensor], shapes: Sequence[torch.Size]) -> list[Tensor]:
    """The tensors themselves; their gradients are the sums over the processes of `group`.

    shapes: of what they stand for: a process that does not hold a tensor has an empty one in its place, and takes part
        in the sum all the same. All processes agree on which of them require a gradient.
    """
    return list(_Enter.apply(group, tuple(shapes), *tensors))


def leave(group: Any, part: Tensor, beside: Sequence[Tensor]) -> Tensor:
    """The sum of `part` over the processes of `group`; its gradient is the same in all of them.

    beside: tensors that the result shall depend on in every process, so that its graph is the same in all.
    """
    return _Leave.apply(group, part, *beside)


class _Enter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, group: Any, shapes: tuple[torch.Size, ...], *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.group, ctx.shapes = group, shapes
        ctx.likes = [(tensor.dtype, tensor.device) for tensor in tensors]
        ctx.held = [tensor.shape == shape for tensor, shape in zip(tensors, shapes, strict=True)]
        ctx.set_materialize_grads(False)
        return tuple(tensor.view_as(tensor) for tensor in tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        needed = [place for place, needs in enumerate(ctx.needs_input_grad[2:]) if needs]
        parts: dict[int, Tensor] = {}
        for place in needed:
            grad, (dtype, device) = grads[place], ctx.likes[place]
            if grad is None or not ctx.held[place]:
                grad = torch.zeros(ctx.shapes[place], dtype=dtype, device=device)
            parts[place] = grad
        summed = _summed(parts, ctx.group)
        found = [summed.get(place) if held else None for place, held in enumerate(ctx.held)]
        return (None, None, *found)


class _Leave(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, group: Any, part: Tensor, *beside: Tensor) -> Tensor:
        summed = part.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(summed, group=group)
        # Activation checkpointing runs a layer again where something that it saved is first asked for, and as far as
        # the last of it. What the experts save differs from process to process; this is the same in all of them.
        ctx.save_for_backward(summed.new_empty(0))
        ctx.beside = len(beside)
        return summed

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        _ = ctx.saved_tensors
        return (None, grad, *[None] * ctx.beside)


def _summed(parts: dict[int, Tensor], group: Any) -> dict[int, Tensor]:
    """Each tensor summed over the processes: one collective for each dtype."""
    by_dtype: dict[torch.dtype, list[int]] = {}
    for place, part in parts.items():
        by_dtype.setdefault(part.dtype, []).append(place)
    found: dict[int, Tensor] = {}
    for places in by_dtype.values():
        flat = torch.cat([parts[place].reshape(-1) for place in places])
        dist.all_reduce(flat, group=group)
        pieces = flat.split([parts[place].numel() for place in places])
        found |= {place: piece.view(parts[place].shape) for place, piece in zip(places, pieces, strict=True)}
    return found
