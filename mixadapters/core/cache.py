"""State of a gate that must live and move with a key-value cache: reordered by beams, cropped, repeated, reset."""

from __future__ import annotations

from functools import cache
from typing import Any

from torch import Tensor


class _FollowsCache:
    """Mixed into the class of one cache object. `gate_state` maps names to tensors with the batch in axis 0.

    Tensors of three axes hold the history of the sequence in axis 1, so that they can be cropped with it.
    """

    gate_state: dict[str, Tensor]

    def _each(self, change: Any) -> None:
        for name, tensor in self.gate_state.items():
            self.gate_state[name] = change(tensor)

    def reorder_cache(self, beam_idx: Tensor) -> Any:
        self._each(lambda t: t.index_select(0, beam_idx.to(t.device)))
        return super().reorder_cache(beam_idx)  # type: ignore[misc]

    def batch_repeat_interleave(self, repeats: int) -> Any:
        self._each(lambda t: t.repeat_interleave(repeats, dim=0))
        return super().batch_repeat_interleave(repeats)  # type: ignore[misc]

    def batch_select_indices(self, indices: Tensor) -> Any:
        self._each(lambda t: t[indices.to(t.device)])
        return super().batch_select_indices(indices)  # type: ignore[misc]

    def crop(self, *args: Any, **kwargs: Any) -> Any:
        # How to say by how much has changed between versions of transformers: read it off the result.
        result = super().crop(*args, **kwargs)  # type: ignore[misc]
        length = int(self.get_seq_length())  # type: ignore[attr-defined]
        if length == 0:
            self.gate_state.clear()
        self._each(lambda t: t[:, :length] if t.dim() == 3 else t)
        return result

    def reset(self) -> Any:
        self.gate_state.clear()
        return super().reset()  # type: ignore[misc]


@cache
def _following(cls: Any) -> type:
    return type(cls.__name__, (_FollowsCache, cls), {"__module__": cls.__module__})


def gate_state(cache: Any) -> dict[str, Tensor]:
    """The tensors that gates keep with `cache`. Its class is swapped for one that carries them along, once."""
    if not isinstance(cache, _FollowsCache):
        cache.__class__ = _following(type(cache))  # type: ignore[arg-type]
        cache.gate_state = {}
    return cache.gate_state


def claim(cache: Any, who: str, filled: bool) -> None:
    """Note that a forward of the adapters `who` writes into `cache`.

    Raises:
        ValueError: it is filled already, by other adapters: its keys and values are not theirs.
    """
    before = getattr(cache, "filled_by", who)
    if filled and before != who:
        raise ValueError(
            f"the key-value cache was filled by {before}, and now {who} would go on with it; begin with a new cache "
            "after adapters or stages have been switched"
        )
    cache.filled_by = who
