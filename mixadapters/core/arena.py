"""One block of memory per weight for experts that run together: their parameters are pieces of it.

A batch over many adapters then needs no concatenation. Each parameter keeps a storage of its own, of its own size and
at an address inside the block, so that saving, copying, casting, moving and sharding treat it as any other. All of
these may leave the block behind, so nothing is taken on trust: every use compares addresses. What has moved is copied
back in; where a parameter is not plain memory (sharded, quantized, fake ...), there is no block.
"""

from __future__ import annotations

import threading
import weakref
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from mixadapters.core.bank import Expert

PARTS = {  # argument of the op: where an expert holds its part
    "w_down": ("down", "weight"),
    "w_up": ("up", "weight"),
    "b_down": ("down", "bias"),
    "b_up": ("up", "bias"),
    "w_gate": ("gate", "weight"),
    "b_gate": ("gate", "bias"),
}
DEVICES = ("cpu", "cuda", "xpu")  # whose memory DLPack can import at an address
GROWTH = 1.25  # blocks that have to grow get so many times what they need

_moving = threading.RLock()  # servers run several requests at a time


class Slot:
    """The place of one expert in the blocks of an arena."""

    def __init__(self, number: int, start: int, rank: int) -> None:
        self.number, self.start, self.rank = number, start, rank
        self.expert: weakref.ref[Expert] | None = None
        self.held: dict[str, weakref.ref[Tensor]] = {}  # the parameters that were put here
        self.addresses: dict[str, int] = {}

    def piece(self, part: str) -> Any:
        """Index of this place in an argument of the op."""
        return _piece(part, self.number, slice(self.start, self.start + self.rank))

    @property
    def inside(self) -> list[tuple[str, Tensor]]:
        """The parameters whose memory this is, held by the expert or by anybody else."""
        expert = None if self.expert is None else self.expert()
        now = [] if expert is None else list(_parameters(expert).items())
        known = [(part, leaf) for part, held in self.held.items() if (leaf := held()) is not None]
        return [
            (part, leaf)
            for part, leaf in now + known
            if type(leaf) is nn.Parameter and leaf.data_ptr() == self.addresses.get(part)
        ]

    def take(self, leaves: list[tuple[str, Tensor]], blocks: dict[str, Tensor]) -> None:
        """Copy the values of `leaves` to this place and make them pieces of it."""
        for part, leaf in leaves:
            piece = blocks[part][self.piece(part)]
            piece.copy_(leaf.data)
            leaf.data = torch.from_dlpack(piece)  # a storage of its own, which keeps the block alive
            self.held[part], self.addresses[part] = weakref.ref(leaf), leaf.data_ptr()


class Arena:
    """The memory of experts of one kind: the op's arguments, with room for more experts."""

    def __init__(self) -> None:
        self.blocks: dict[str, Tensor] = {}
        self.slots: list[Slot] = []
        self.room = (0, 0)  # experts, and rows
        self.stack: Stack | None = None  # the last one asked for

    def knows(self, expert: Expert) -> bool:
        """Whether `expert` has a slot here, be its parameters in it or not."""
        slot = expert.slot if expert.arena is self else None
        return slot is not None and slot.number < len(self.slots) and self.slots[slot.number] is slot

    def holds(self, expert: Expert) -> bool:
        """Whether all parameters of `expert` are here."""
        addresses: Any = expert.slot.addresses if expert.slot is not None and self.knows(expert) else {}
        return all(leaf.data_ptr() == addresses.get(part) for part, leaf in _parameters(expert).items())

    def move_in(self, experts: list[Expert]) -> None:
        """Give each expert a free slot of its rank, or a new one at the end."""
        free: dict[int, list[Slot]] = {}
        for slot in reversed(self.slots):
            if not slot.inside:
                free.setdefault(slot.rank, []).append(slot)
        new = []
        for expert in experts:
            slots = free.get(_rank(expert))
            if slots:
                self._settle(expert, slots.pop())
            else:
                new.append(expert)
        self._make_room(new)
        for expert in new:
            self._settle(expert, self._append(_rank(expert)))

    def _settle(self, expert: Expert, slot: Slot) -> None:
        slot.take(list(_parameters(expert).items()), self.blocks)
        slot.expert = weakref.ref(expert)
        expert.arena, expert.slot = self, slot

    def _append(self, rank: int) -> Slot:
        self.slots.append(Slot(len(self.slots), self._used, rank))
        return self.slots[-1]

    @property
    def _used(self) -> int:
        return self.slots[-1].start + self.slots[-1].rank if self.slots else 0

    def _make_room(self, new: list[Expert]) -> None:
        """Room at the end for new experts. Blocks that have to grow are written anew, without free slots."""
        rows = sum(map(_rank, new))
        if len(self.slots) + len(new) <= self.room[0] and self._used + rows <= self.room[1]:
            return
        kept = [(slot, inside) for slot in self.slots if (inside := slot.inside)]
        growth = GROWTH if self.blocks else 1.0
        count, rows = len(kept) + len(new), rows + sum(slot.rank for slot, _ in kept)
        self.room = int(count * growth), int(rows * growth)
        self.blocks = {part: _block(part, leaf.data, *self.room) for part, leaf in _parameters(new[0]).items()}
        self.slots = []
        for slot, inside in kept:
            slot.number, slot.start = len(self.slots), self._used
            slot.take(inside, self.blocks)
            self.slots.append(slot)


class Stack:
    """Experts of one arena as the op takes them: its slots from the first to the last of them."""

    def __init__(self, arena: Arena, experts: list[Expert]) -> None:
        slots: list[Any] = [expert.slot for expert in experts]
        first, last = min(slot.number for slot in slots), max(slot.number for slot in slots)
        span = arena.slots[first : last + 1]
        start, end = span[0].start, span[-1].start + span[-1].rank
        self.ranks = tuple(slot.rank for slot in span)
        self.numbers = [slot.number - first for slot in slots]  # where each expert is among them
        self.in_order = self.numbers == list(range(len(span)))
        self._scales = [1.0] * len(slots)
        self._scale: Tensor | None = None
        self._experts = list(map(weakref.ref, experts))
        self._addresses = [slot.addresses[part] for part in arena.blocks for slot in slots]
        self._blocks = {
            part: block[_piece(part, slice(first, last + 1), slice(start, end))]
            for part, block in arena.blocks.items()
        }
        rows = [slice(slot.start - start, slot.start - start + slot.rank) for slot in slots]
        self._pieces = {part: list(map(_piece, [part] * len(slots), self.numbers, rows)) for part in arena.blocks}

    def is_of(self, experts: list[Expert]) -> bool:
        return [expert() for expert in self._experts] == experts

    def stands(self, leaves: list[Any]) -> bool:
        """Whether the experts' parameters, part by part, are where they were."""
        return set(map(type, leaves)) == {nn.Parameter} and list(map(Tensor.data_ptr, leaves)) == self._addresses

    def arguments(self, leaves: list[Any], scales: list[float]) -> dict[str, Any]:
        """Arguments of the op. Gradients reach `leaves`, if there are any; scales: one for each expert."""
        if scales != self._scales:
            scale = self._blocks["w_down"].new_ones(len(self.ranks))
            scale[self.numbers] = scale.new_tensor(scales)
            self._scales, self._scale = scales, scale
        blocks = self._blocks
        if leaves:
            rest = iter(leaves)
            blocks = {
                part: _Hung.apply(block, self._pieces[part], *islice(rest, len(scales)))
                for part, block in blocks.items()
            }
        return {"ranks": self.ranks, "scale": self._scale, **blocks}


class _Hung(torch.autograd.Function):
    """A block whose gradient goes to the parameters that are pieces of it, as views of one tensor."""

    @staticmethod
    def forward(ctx: Any, block: Tensor, pieces: list[Any], *leaves: Tensor) -> Tensor:
        ctx.pieces = pieces
        ctx.save_for_backward(*leaves)  # so that a change in place before backward is noticed
        return block.view_as(block)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        _ = ctx.saved_tensors  # raises where a parameter has changed in place
        needed = ctx.needs_input_grad[2:]
        return None, None, *(grad[piece] if needs else None for piece, needs in zip(ctx.pieces, needed, strict=True))


def holders(experts: list[Expert]) -> list[tuple[dict[str, Any], str]]:
    """Where the parameters of experts of one kind are held, part by part: (dict, key) pairs for `read`.

    Past `nn.Module.__getattr__`: with many adapters this would be a good part of a decoding step.
    """
    places = []
    for module, name in PARTS.values():
        first = experts[0]._modules.get(module)
        if first is not None and first._parameters.get(name) is not None:
            modules: list[Any] = [expert._modules.get(module) for expert in experts]
            places += [(module._parameters, name) for module in modules if module is not None]
    return places


def read(places: list[tuple[dict[str, Any], str]]) -> list[Any]:
    return [held.get(name) for held, name in places]


def stacked(experts: list[Expert], places: list[tuple[dict[str, Any], str]]) -> Stack | None:
    """The weights of experts of one kind, of one bank or several, in common blocks; None where they cannot be.

    Parameters that are not in one arena yet are moved there: they stay the objects that they are, with their values.

    Args:
        places: their `holders`.
    """
    stack = _standing(experts, places)
    if stack is None:
        with _moving, torch.inference_mode(False), torch.no_grad():
            stack = _standing(experts, places) or _together(experts, places) or _put_together(experts)
    return stack


def _standing(experts: list[Expert], places: list[tuple[dict[str, Any], str]]) -> Stack | None:
    stack = None if experts[0].arena is None else experts[0].arena.stack
    return stack if stack is not None and stack.is_of(experts) and stack.stands(read(places)) else None


def _together(experts: list[Expert], places: list[tuple[dict[str, Any], str]]) -> Stack | None:
    """As other experts of the arena ran last: batches name different adapters, and these need not move."""
    arena = experts[0].arena
    if arena is None or not all(map(arena.knows, experts)) or len(set(map(id, experts))) < len(experts):
        return None
    stack = Stack(arena, experts)
    if not stack.stands(read(places)):
        return None
    arena.stack = stack
    return stack


def _put_together(experts: list[Expert]) -> Stack | None:
    parameters = list(map(_parameters, experts))
    leaves = [leaf for own in parameters for leaf in own.values()]
    plain = all(_is_plain(part, leaf) for own in parameters for part, leaf in own.items())
    types = {(part, leaf.dtype, leaf.device) for own in parameters for part, leaf in own.items()}
    if not plain or len(set(map(id, leaves))) < len(leaves) or len(types) > len(parameters[0]):
        return None
    homes = [e.arena for e in experts if e.arena is not None and e.arena.holds(e)]
    arena = max(homes, key=lambda home: len(home.slots), default=None) or Arena()
    if strangers := [expert for expert in experts if not arena.holds(expert)]:
        arena.move_in(strangers)
    arena.stack = Stack(arena, experts)
    return arena.stack


def _parameters(expert: Expert) -> dict[str, Any]:
    found = {part: getattr(getattr(expert, module), name, None) for part, (module, name) in PARTS.items()}
    return {part: leaf for part, leaf in found.items() if leaf is not None}


def _is_plain(part: str, leaf: Any) -> bool:
    """Whether `leaf` is the only owner of ordinary memory that can be exchanged for a piece of a block.

    Strides must stay what they are: fused optimizers walk parameters and moments by memory, and compiled graphs test
    them.
    """
    return (
        type(leaf) is nn.Parameter
        and leaf.device.type in DEVICES
        and leaf.layout == torch.strided
        and not leaf.is_inference()
        and not (leaf.device.type == "cpu" and leaf.is_shared())
        and leaf.untyped_storage().nbytes() == leaf.numel() * leaf.element_size()
        and (leaf.T if part == "w_up" else leaf).is_contiguous()
        # DDP lays out its buckets by the strides of parameters, and a move changes those of `up`.
        and not (leaf.requires_grad and torch.distributed.is_available() and torch.distributed.is_initialized())
    )


def _rank(expert: Expert) -> int:
    return expert.down.weight.shape[0]


def _piece(part: str, experts: int | slice, rows: slice) -> Any:
    """Index, in an argument of the op, of experts with these numbers and rows."""
    return experts if part == "b_up" else (slice(None), rows) if part == "w_up" else rows


def _block(part: str, like: Tensor, experts: int, rows: int) -> Tensor:
    if part == "w_up":  # (M, R), stored so that each expert's part is in one piece
        return like.new_zeros(rows, like.shape[0]).T
    return like.new_zeros(experts, *like.shape) if part == "b_up" else like.new_zeros(rows, *like.shape[1:])
