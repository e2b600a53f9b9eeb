"""Experts on their way between processes: their weights, and what an optimizer keeps for them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mixadapters.core.processes import gathered
from mixadapters.sharding.bank import ShardedBank, empty
from mixadapters.sharding.placement import Placement

# (bank, expert, parameter) by number -> {what the optimizer keeps: shape and dtype of a tensor, or the value itself}
Kept = dict[tuple[int, str, int], dict[str, Any]]


def move(banks: list[ShardedBank], plans: list[Placement], optimizer: Any = None) -> None:
    """Bring each expert from the first process that holds it to those that `plans` name; the others give it up.

    All processes of the group call it, between a step of the optimizer and the next backward pass: gradients of what
    moves are dropped.
    """
    group, rank = banks[0].group, banks[0].rank
    kept = _agreed(_kept(banks, optimizer), group)
    for number, (bank, plan) in enumerate(zip(banks, plans, strict=True)):
        for name, before, after in zip(bank.experts, bank.placement.holders, plan.holders, strict=True):
            parameters = list(bank.experts[name].parameters())
            for target in (one for one in after if one not in before):
                if rank in (before[0], target):
                    for place, parameter in enumerate(parameters):
                        shape, what = bank.shapes[name][place], kept.get((number, name, place), {})
                        if rank == target:
                            _receive(parameter, shape, what, before[0], group, optimizer)
                        else:
                            _send(parameter, what, target, group, optimizer)
            if rank in before and rank not in after:
                forget(parameters, optimizer)
        bank.place(plan)


def forget(parameters: list[nn.Parameter], optimizer: Any) -> None:
    """Give up parameters, and what the optimizer keeps for them."""
    empty(parameters)
    if optimizer is not None:
        for parameter in parameters:
            optimizer.state.pop(parameter, None)


def _kept(banks: list[ShardedBank], optimizer: Any) -> Kept:
    """What the optimizer keeps for the experts that are here, in words."""
    if optimizer is None:
        return {}
    found: Kept = {}
    for number, name, place, parameter in _own(banks):
        state = optimizer.state.get(parameter, {})
        found[number, name, place] = {key: _in_words(value, parameter) for key, value in state.items()}
    return found


def _in_words(value: Any, parameter: nn.Parameter) -> Any:
    """Of a tensor with axes its shape, its dtype and whether it lies with the parameter; other values as they are."""
    if not isinstance(value, Tensor):
        return value
    if value.dim():
        return tuple(value.shape), value.dtype, value.device.type == parameter.device.type
    return value.cpu()


def _own(banks: list[ShardedBank]) -> Iterator[tuple[int, str, int, nn.Parameter]]:
    for number, bank in enumerate(banks):
        for name in bank.own:
            for place, parameter in enumerate(bank.experts[name].parameters()):
                yield number, name, place, parameter


def _agreed(kept: Kept, group: Any) -> Kept:
    """What all processes have said."""
    found: Kept = {}
    for one in gathered(kept, group):
        found |= one
    return found


def _send(parameter: nn.Parameter, kept: dict[str, Any], target: int, group: Any, optimizer: Any) -> None:
    tensors = [parameter.data, *(optimizer.state[parameter][key] for key, what in kept.items() if _described(what))]
    for tensor in tensors:
        dist.send(tensor.detach().to(parameter.device).contiguous(), group=group, group_dst=target)


def _receive(
    parameter: nn.Parameter, shape: torch.Size, kept: dict[str, Any], source: int, group: Any, optimizer: Any
) -> None:
    def arrived(shape: Any, dtype: torch.dtype) -> Tensor:
        tensor = torch.empty(shape, dtype=dtype, device=parameter.device)
        dist.recv(tensor, group=group, group_src=source)
        return tensor

    parameter.data, parameter.grad = arrived(shape, parameter.dtype), None
    state: dict[str, Any] = {}
    for key, what in kept.items():
        if _described(what):
            tensor = arrived(*what[:2])
            state[key] = tensor if what[2] else tensor.cpu()
        else:
            state[key] = what.clone() if isinstance(what, Tensor) else what
    if state:
        optimizer.state[parameter] = state


def _described(what: Any) -> bool:
    """Whether it stands for a tensor that is sent, and not for itself."""
    return isinstance(what, tuple) and len(what) == 3 and isinstance(what[1], torch.dtype)
