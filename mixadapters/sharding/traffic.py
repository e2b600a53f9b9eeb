"""Bytes that a training step sends, by formulas that a test holds against counted ones."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from torch import Tensor


class Traffic(NamedTuple):
    """What one process hands to collectives in one step: bytes of whole tensors, each counted once."""

    all_reduce: int = 0
    all_gather: int = 0  # of what comes out
    reduce_scatter: int = 0  # of what goes in
    broadcast: int = 0

    def __add__(self, other: Traffic) -> Traffic:  # type: ignore[override]
        return Traffic(*(one + more for one, more in zip(self, other, strict=True)))

    def sent(self, processes: int) -> float:
        """Bytes that a process sends where collectives go round a ring: an all-reduce twice, the others once."""
        share = (processes - 1) / processes
        return share * (2 * self.all_reduce + self.all_gather + self.reduce_scatter + self.broadcast)


def padded_bytes(tensors: Iterable[Tensor], processes: int) -> int:
    """Bytes of tensors whose first dimension is filled up to a multiple of the processes, as FSDP2 splits them."""
    return sum(-(-t.shape[0] // processes) * processes * t[0].numel() * t.element_size() for t in tensors)


def ddp_bytes_per_step(trainable: int, buffers: int = 0) -> Traffic:
    """Plain data parallelism sums the gradients, and sends the buffers of the first process.

    trainable, buffers: bytes of the parameters that train, and of the model's buffers.
    """
    return Traffic(all_reduce=trainable, broadcast=buffers)


def fsdp2_bytes_per_step(blocks: Sequence[int], trainable: int, rest: int = 0, micro_batches: int = 1) -> Traffic:
    """FSDP2 gathers the weights of a block before its forward and again before its backward, and scatters gradients.

    Args:
        blocks: bytes of the parameters of each block that is sharded by itself, frozen ones included; all by
            `padded_bytes`.
        trainable: of the parameters that train.
        rest: of the parameters outside of the blocks, which stay gathered for the backward pass.
        micro_batches: of a step, each with its own gradients.
    """
    return Traffic(
        all_gather=micro_batches * (2 * sum(blocks) + rest),
        reduce_scatter=micro_batches * trainable,
    )


def experts_bytes_per_step(
    rows: int, width_in: int, width_out: int, slots: int, element: int = 2, copied: int = 0, micro_batches: int = 1
) -> Traffic:
    """One layer whose experts are spread over processes: outputs are summed, and back gradients of tokens and weights.

    Args:
        rows: tokens of a micro-batch of the group, all of which each process runs.
        width_in, width_out: of the experts. slots: experts of a row.
        element: bytes of a number.
        copied: bytes of the experts that lie in several processes, whose gradients are summed too.
        micro_batches: of a step.
    """
    return Traffic(all_reduce=micro_batches * (rows * element * (width_out + width_in + slots) + copied))
