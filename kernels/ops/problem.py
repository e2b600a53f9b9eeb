"""What one call of the operation is given: tensors only, checked before any backend sees them."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from contextlib import AbstractContextManager, nullcontext
from itertools import accumulate
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from mixadapters.kernels import hashing

PARAMETERS = ("down", "up", "b_down", "b_up", "gate", "b_gate", "weights", "scale")
# The fields whose gradients a backend computes, in the order of the operators; those of `base` and its weight are
# the same for all.
DIFFERENTIABLE = ("x", *PARAMETERS)

_SHAPES = {
    "weights": "one for each row and slot",
    "scale": "one for each expert",
    "base": "(N, M)",
    "base_weight": "one for each row",
    "b_down": "(R,)",
    "b_up": "(E, M)",
    "w_gate": "(R, K)",
    "b_gate": "(R,)",
}

T = TypeVar("T")
_DERIVED = "_mixadapters_derived"


def constant(indices: Tensor, bounds: tuple[int, int] | None = None) -> Tensor:
    """Promise that the values of `indices` never change again: what one call derives from them serves the next.

    For indices that many calls share, as those of a mixed batch in the layers of a model. Returns the tensor itself,
    with whom all that was derived is forgotten. On a GPU nothing is kept: what is derived while a CUDA graph is
    captured has no values before the graph runs.

    bounds: the least and the greatest that an index can be, where whoever made them knows; it is not checked.
    """
    if indices.is_cpu and not torch.compiler.is_compiling() and not hasattr(indices, _DERIVED):
        setattr(indices, _DERIVED, {} if bounds is None else {"bounds": bounds})
    return indices


def bounds_of(indices: Tensor) -> tuple[int, int]:
    """Bounds of the indices, the least and the greatest unless they were promised; for indices on a CPU."""
    return _derived(indices, "bounds", lambda: _bounds(indices))


def _bounds(indices: Tensor) -> tuple[int, int]:
    least, most = indices.aminmax()
    return int(least), int(most)


def _derived(indices: Tensor | None, key: Hashable, make: Callable[[], T]) -> T:
    known: dict[Hashable, Any] | None = getattr(indices, _DERIVED, None)
    if known is None:
        return make()
    if key not in known:
        known[key] = make()
    return known[key]


def without_autocast(x: Tensor) -> AbstractContextManager:
    """For what is in the dtype of x already; autocast would take float32 sums to half precision as well."""
    return torch.autocast(x.device.type, enabled=False) if autocasts(x) else nullcontext()


def autocasts(x: Tensor) -> bool:
    """Whether autocast is on where x is."""
    return torch.is_autocast_enabled("cpu" if x.is_cpu else x.device.type)  # to ask for a device takes a while


class Problem(NamedTuple):
    """y = base_weight * base + sum_s weights_s * scale_e * (up_e h_e(x') + b_up_e), with e = indices_s.

    h_e(x') = act(down_e x' + b_down_e), or act(gate_e x' + b_gate_e) * (down_e x' + b_down_e) with `gate`; x' is x
    after dropout. Computed in the dtype of x, whatever the dtypes of the weights; y has the dtype of `base` (of x
    without one). Axes: N rows, k slots, E experts, R = sum of ranks, K width in, M width out.
    """

    x: Tensor  # (N, K), stride(1) == 1
    down: Tensor  # (R, K)
    up: Tensor  # (M, R), any strides
    ranks: tuple[int, ...]  # E ranks, sum R
    b_down: Tensor | None = None  # (R,)
    b_up: Tensor | None = None  # (E, M)
    gate: Tensor | None = None  # (R, K)
    b_gate: Tensor | None = None  # (R,)
    indices: Tensor | None = None  # (N, k) int, -1 none; None: every expert for every row
    weights: Tensor | None = None  # (N, k), or (N, E) where indices is None
    scale: Tensor | None = None  # (E,)
    base: Tensor | None = None  # (N, M)
    base_weight: Tensor | None = None  # (N,)
    act: str = "identity"
    dropout: float = 0.0  # probability that an element of x is read as 0; the others grow by 1 / (1 - dropout)
    seed: Tensor | None = None  # int64 scalar; the mask is `hashing.kept(seed, rows, K, dropout)`
    run: int = 1  # indices are constant over every `run` consecutive rows, and N is a multiple of it
    batch_invariant: bool = False  # no bit of a row's result may depend on the other rows

    @property
    def slots(self) -> int:
        return len(self.ranks) if self.indices is None else self.indices.shape[1]

    @property
    def starts(self) -> list[int]:
        """First row of each expert in `down`."""
        return [0, *accumulate(self.ranks)][:-1]

    @property
    def equal_rank(self) -> int | None:
        """The rank that all experts share, if they do."""
        return self.ranks[0] if self.ranks.count(self.ranks[0]) == len(self.ranks) else None

    def check(self) -> None:
        """Raises ValueError, in the words of `lowrank`, where the arguments do not fit together."""
        x, down, up, total = self.x, self.down, self.up, sum(self.ranks)
        if down.shape != (total, x.shape[-1]) or up.dim() != 2 or up.shape[1] != total:
            raise ValueError(
                f"x {tuple(x.shape)}, w_down {tuple(down.shape)}, w_up {tuple(up.shape)} and ranks={list(self.ranks)} "
                "do not fit: expected x (N, K), w_down (R, K), w_up (M, R) with R = sum(ranks)"
            )
        indices = self.indices
        if x.dim() != 2 or (indices is not None and (indices.dim() != 2 or indices.shape[0] != x.shape[0])):
            given = None if indices is None else tuple(indices.shape)
            raise ValueError(f"x must be (N, K) and indices (N, k), got {tuple(x.shape)} and {given}")
        rows, width, experts = x.shape[0], up.shape[0], len(self.ranks)
        for name, tensor, shape in (
            ("weights", self.weights, (rows, self.slots)),
            ("scale", self.scale, (experts,)),
            ("base", self.base, (rows, width)),
            ("base_weight", self.base_weight, (rows,)),
            ("b_down", self.b_down, (total,)),
            ("b_up", self.b_up, (experts, width)),
            ("w_gate", self.gate, (total, x.shape[1])),
            ("b_gate", self.b_gate, (total,)),
        ):
            if tensor is not None and tensor.shape != shape:
                raise ValueError(f"{name} must be {tuple(shape)}, {_SHAPES[name]}, got {tuple(tensor.shape)}")
        if self.b_gate is not None and self.gate is None:
            raise ValueError("b_gate is given without w_gate; give both, or neither")
        if self.base_weight is not None and self.base is None:
            raise ValueError("base_weight is given without base; give both, or base alone, or neither")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout={self.dropout} must be at least 0 and less than 1")
        if self.dropout and self.seed is None:
            raise ValueError(
                f"dropout={self.dropout} needs a seed: an int64 scalar tensor, a new one for each forward"
            )
        if self.run < 1 or rows % self.run:
            raise ValueError(f"run={self.run} must be a positive divisor of the number of rows, {rows}")

    def check_indices(self) -> None:
        """Raises ValueError where an index names no expert; on a GPU, which it would wait for, nothing is read."""
        if self.indices is None or not self.indices.is_cpu or not self.indices.numel():
            return
        least, most = self.bounds()
        if least < -1 or most >= len(self.ranks):
            raise ValueError(
                f"indices run from {least} to {most}; expected -1 (no expert) to {len(self.ranks) - 1}, "
                f"one less than the {len(self.ranks)} experts"
            )

    def bounds(self) -> tuple[int, int]:
        """Least and greatest index; for indices on a CPU."""
        indices = self.indices
        assert indices is not None
        return bounds_of(indices)

    def every_slot_chosen(self) -> bool:
        """Whether no slot is known to be without expert. On a GPU, which it would wait for, that is not known."""
        return self.indices is None or (self.indices.is_cpu and self.indices.numel() > 0 and self.bounds()[0] >= 0)

    def derived(self, key: Hashable, make: Callable[[], T]) -> T:
        """What `make` derives from the indices (and from what is in `key`), once where they are `constant`."""
        return _derived(self.indices, key, make)

    def cast(self) -> Problem:
        """All weights in the dtype of x."""
        dtype, wrong = self.x.dtype, {}
        given: tuple[Any, ...] = self
        for i in _PLACES:
            tensor = given[i]
            if tensor is not None and tensor.dtype != dtype:
                wrong[self._fields[i]] = tensor.to(dtype)
        return self._replace(**wrong) if wrong else self

    def dropped(self, t: Tensor, rows: Tensor | slice | None = None) -> Tensor:
        """Dropout on t (n, K), which stands for these rows of x: x itself or its gradient."""
        if not self.dropout:
            return t
        assert self.seed is not None
        if rows is None:
            rows = slice(0, t.shape[0])
        if isinstance(rows, slice):
            rows = torch.arange(rows.start, rows.stop, device=t.device)
        mask = hashing.kept(self.seed, rows, t.shape[1], self.dropout)
        return (t * (1 / (1 - self.dropout))).masked_fill_(~mask, 0)

    def start(self) -> Tensor:
        """The output before any expert has added to it, a new tensor (N, M)."""
        if self.base is None:
            return self.x.new_zeros(self.x.shape[0], self.up.shape[0])
        if self.base_weight is None:
            return self.base.clone(memory_format=torch.contiguous_format)
        return self.base * self.base_weight.to(self.base.dtype).unsqueeze(1)


_PLACES = tuple(Problem._fields.index(name) for name in PARAMETERS)
