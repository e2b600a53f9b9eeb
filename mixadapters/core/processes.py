"""What the processes of one training do together. Each sees other rows, and all must meet in the same calls."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def world_size() -> int:
    """How many processes torch.distributed knows, this one among them; 1 where it has not been initialised."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def several() -> bool:
    """Whether this process is one of several."""
    return world_size() > 1


def rank() -> int:
    """The number of this process; 0 where it is alone."""
    return dist.get_rank() if several() else 0


def sum_in_place(counts: list[Tensor]) -> None:
    """Make each of the vectors its sum over all processes, which all call this."""
    if not counts or not several():
        return
    summed = torch.cat([count.to(counts[0].device) for count in counts])
    dist.all_reduce(summed)
    for count, total in zip(counts, summed.split([len(count) for count in counts]), strict=True):
        count.copy_(total)


def gathered(value: Any, group: Any = None) -> list[Any]:
    """What each process has given, in the order of ranks; all call this. Tensors in it are to be on the CPU.

    group: of torch.distributed, whose processes are meant. None: all of them.
    """
    if not several():
        return [value]
    found: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(found, value, group=group)
    return found
