"""State of a router that must live and move with a key-value cache: reordered by beams, cropped, repeated, reset."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from transformers import cache_utils
from transformers.utils import ModelOutput

# What arguments and outputs of forwards call the key-value cache: transformers has changed it in version 5.24, where
# outputs have the name of before as a property.
CACHE = "cache" if hasattr(ModelOutput, "past_key_values") else "past_key_values"
NAMES = tuple(dict.fromkeys((CACHE, "past_key_values", "cache_params")))  # the last where layers sum tokens up (Mamba)

# In outputs that know the new name the old ones are properties, which say in the log that they are old.
IN_OUTPUTS = NAMES[:1] if CACHE == "cache" else NAMES

# A layer that holds no keys: what counts, offloads or masks the layers of a cache passes over those. transformers has
# it from version 5.23 on.
_Layer: Any = getattr(cache_utils, "DummyLayer", cache_utils.CacheLayerMixin)
# Of what a model keeps of earlier tokens in a form of its own, to which a router can add nothing.
FOREIGN = ("past_key_values", "cache_params", "state", "mems", "past_buckets_states")


class RouterStateLayer(_Layer):
    """The last layer of a cache: tensors of routers by name, with the batch in axis 0.

    Tensors of three axes hold the history of the sequence in axis 1, so that they can be cropped with it.

    Args:
        first: the first layer of the cache that counts tokens; None where all layers sum them up (Mamba).
    """

    is_compileable = True
    is_croppable = True
    supports_early_init = False
    _layer_type = None

    def __init__(self, first: Any) -> None:
        super().__init__()
        self.first = first
        self.is_sliding = getattr(first, "is_sliding", False)  # a mask is made for the first layer of each kind
        self.state: dict[str, Tensor] = {}

    def _each(self, change: Any) -> None:
        for name, tensor in self.state.items():
            self.state[name] = change(tensor)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._each(lambda t: t.index_select(0, beam_idx.to(t.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._each(lambda t: t.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._each(lambda t: t[indices.to(t.device)])

    def crop(self, *_: Any) -> None:
        # How to say by how much has changed between versions of transformers: read it off a layer cropped before.
        if self.first is None:
            raise RuntimeError("a cache whose layers sum up what they have read cannot be cropped")
        length = int(self.first.get_seq_length())
        if length == 0:
            self.state.clear()
        self._each(lambda t: t[:, :length] if t.dim() == 3 else t)

    def reset(self) -> None:
        self.state.clear()

    def get_seq_length(self) -> int:
        return self.first.get_seq_length()

    def get_max_length(self) -> int:
        return -1

    def update(self, *_: Any) -> Any:
        raise NotImplementedError("the layer of a cache in which routers keep their state holds no keys and values")

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.first.get_mask_sizes(query_length)

    def lazy_initialization(self, *_: Any) -> None: ...

    def offload(self) -> None: ...

    def prefetch(self) -> None: ...


def given_cache(inputs: Mapping[str, Any]) -> Any:
    """The cache among the arguments of a forward, whose callers may use any of its names; None without one.

    The cache of continuous batching is none: it holds pages, and does not know the length of a sequence.
    """
    found = next((inputs[name] for name in NAMES if inputs.get(name) is not None), None)
    return found if hasattr(found, "get_seq_length") else None


def router_state(cache: Any) -> dict[str, Tensor] | None:
    """The tensors that routers keep with `cache`; None while it still makes its layers, in its first forward."""
    cache = getattr(cache, "self_attention_cache", cache)
    layers = cache.layers
    if layers and isinstance(layers[-1], RouterStateLayer):
        return layers[-1].state
    if not layers or cache.layer_class_to_replicate is not None:
        return None
    return _append(cache).state


def settle(cache: Any, state: dict[str, Tensor]) -> None:
    """Leave with `cache`, now that a forward has filled it, what routers have kept in this forward."""
    if state:
        known = router_state(cache)
        if known is None:
            known = _append(getattr(cache, "self_attention_cache", cache)).state
        known.update(state)


def _append(cache: Any) -> RouterStateLayer:
    cache.layers.append(RouterStateLayer(next(filter(_counts, cache.layers), None)))
    return cache.layers[-1]


def _counts(layer: Any) -> bool:
    """Whether a layer of a cache knows how many tokens it holds: those that sum them up do not."""
    return layer.first is not None if isinstance(layer, RouterStateLayer) else hasattr(layer, "get_seq_length")


def _sums_up(cache: Any) -> bool:
    """Whether no layer of a cache knows how many tokens it holds."""
    layers = getattr(cache, "layers", [])
    return len(layers) > 0 and not any(map(_counts, layers))


def made_cache(output: Any) -> Any:
    """The cache that the output of a forward holds; None without one."""
    caches = (getattr(output, name, None) for name in IN_OUTPUTS)
    found = next((cache for cache in caches if cache is not None), None)
    return found if hasattr(found, "get_seq_length") else None


def foreign_in(inputs: dict[str, Any]) -> str | None:
    """The argument that brings earlier tokens in a form to which routers can add nothing; None: there is none."""
    given = ((name, inputs.get(name)) for name in FOREIGN)
    return next((name for name, value in given if value is not None and not hasattr(value, "get_seq_length")), None)


def tokens_in(cache: Any) -> Any:
    """How many tokens a cache holds; a tensor for static ones.

    Raises:
        ValueError: all its layers sum tokens up, and a forward has filled it that did not count them.
    """
    if not _sums_up(cache):
        return cache.get_seq_length()
    if not cache.has_previous_state():
        return 0
    if not hasattr(cache, "tokens_read"):
        raise ValueError("the cache was filled before the model had adapters; begin with a new one")
    return cache.tokens_read


def room_in(cache: Any) -> int | None:
    """The tokens that a static cache has room for; None for those that grow."""
    layers = getattr(getattr(cache, "self_attention_cache", cache), "layers", [])
    rooms = [layer.max_cache_len for layer in layers if hasattr(layer, "max_cache_len")]
    return max(rooms) if rooms else None


def count_read(cache: Any, tokens: Any) -> None:
    """Note that `cache` holds so many tokens, where no layer of it counts them."""
    if _sums_up(cache):
        cache.tokens_read = tokens


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
