"""A process group that counts the bytes that go through it."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch.distributed as dist
from torch import Tensor


def size(tensors: Any) -> int:
    """Bytes of a tensor, or of tensors in lists."""
    if isinstance(tensors, Tensor):
        return tensors.numel() * tensors.element_size()
    return sum(size(inside) for inside in tensors)


class CountingGroup(dist.ProcessGroup):
    """Gloo, and by the name of each collective the bytes of its whole tensors. Attribute: counted."""

    def __init__(self, inner: dist.ProcessGroup) -> None:
        super().__init__(inner.rank(), inner.size())
        self.inner = inner
        self.counted: Counter[str] = Counter()

    def getBackendName(self) -> str:
        return "counting"

    def setGroupName(self, name: str) -> None:
        self.name = name

    def getGroupName(self) -> str:
        return self.name

    def allreduce(self, tensors: Any, *options: Any) -> Any:
        self.counted["all_reduce"] += size(tensors)
        return self.inner.allreduce(tensors, *options)

    def allgather(self, outputs: Any, inputs: Any, *options: Any) -> Any:
        self.counted["all_gather"] += size(outputs)
        return self.inner.allgather(outputs, inputs, *options)

    def _allgather_base(self, output: Tensor, given: Tensor, *options: Any) -> Any:
        self.counted["all_gather"] += size(output)
        return self.inner._allgather_base(output, given, *options)

    def _reduce_scatter_base(self, output: Tensor, given: Tensor, *options: Any) -> Any:
        self.counted["reduce_scatter"] += size(given)
        return self.inner._reduce_scatter_base(output, given, *options)

    def all_gather_single(self, output: Tensor, given: Tensor, *options: Any) -> Any:
        self.counted["all_gather"] += size(output)
        return self.inner._allgather_base(output, given, *options)

    def reduce_scatter_single(self, output: Tensor, given: Tensor, *options: Any) -> Any:
        self.counted["reduce_scatter"] += size(given)
        return self.inner._reduce_scatter_base(output, given, *options)

    def broadcast(self, tensors: Any, *options: Any) -> Any:
        self.counted["broadcast"] += size(tensors)
        return self.inner.broadcast(tensors, *options)

    def send(self, tensors: Any, *options: Any) -> Any:
        self.counted["send"] += size(tensors)
        return self.inner.send(tensors, *options)

    def recv(self, tensors: Any, *options: Any) -> Any:
        return self.inner.recv(tensors, *options)

    def barrier(self, *options: Any) -> Any:
        return self.inner.barrier(*options)


MADE: list[CountingGroup] = []


def make(store: Any, rank: int, world: int, timeout: Any) -> CountingGroup:
    MADE.append(CountingGroup(dist.ProcessGroupGloo(store, rank, world, timeout)))
    return MADE[-1]


def register() -> None:
    """Let `init_process_group("counting")` make such groups; `MADE` holds them."""
    dist.Backend.register_backend("counting", make, devices=["cpu"])


def counted() -> dict[str, int]:
    """The bytes of the first group since the last call."""
    found = dict(MADE[0].counted)
    MADE[0].counted.clear()
    return found
