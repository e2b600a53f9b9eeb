"""The sequences that a forward reads: sizes, padding masks and cache, from whatever transformers passes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mixadapters.core.cache import foreign_in, given_cache, room_in, tokens_in
from mixadapters.core.media import is_even, media_by_row


@dataclass(eq=False)
class RequestMemory:
    """What routers keep of the tokens of one request, from step to step: a server holds it beside the request.

    Attributes:
        length: tokens that have been read.
        state: tensors of routers by name.
    """

    length: int = 0
    state: dict[str, Tensor] = field(default_factory=dict)

    def read(self, past: int, length: int) -> bool:
        """A step reads `length` tokens after `past`: from the first again where a request was put back.

        Returns:
            Whether the tokens before are those that it knows.
        """
        if past == 0:
            self.state = {}
        known, self.length = past in (0, self.length), past + length
        return known


@dataclass(frozen=True, eq=False)
class PackedRequests:
    """Whose tokens lie in the packed row of one step of continuous batching, as a server says it.

    A row of the caller's batch is a request here. What names adapters names each of them once, and goes from step to
    step with what layers have made of it.

    Args:
        lengths: tokens of each request in the row, in their order.
        adapters: the adapters that requests may name (`RowNames`).
        named: of each request its number in `adapters`.
        memories: of each request what routers keep of it; None for one whose adapter keeps nothing.
    """

    lengths: tuple[int, ...]
    adapters: Any
    named: tuple[int, ...]
    memories: Sequence[RequestMemory | None] = ()

    def spread(self, values: Tensor, count: int, name: str) -> Tensor:
        """values (R, ...), one for each request -> (count, ...), one for each token of the row.

        Raises:
            ValueError: another number of values, or the layer reads other rows than the tokens.
        """
        if values.shape[:1] != (len(self.lengths),) or count != sum(self.lengths):
            raise ValueError(
                f"{name}: {values.shape[0] if values.dim() else 'a single value'} given and {count} rows read, but "
                f"{len(self.lengths)} requests of {sum(self.lengths)} tokens are packed into this row"
            )
        return values.repeat_interleave(torch.tensor(self.lengths, device=values.device), dim=0)

    def running_sums(self, values: Tensor, key: str) -> Tensor:
        """values (T, ...) of the tokens of the row -> (T, ...) the sum up to each in its own request.

        Requests go on from what they keep under `key`. Each is summed by itself, so that its neighbours change no bit.
        """
        sums = values
        if max(self.lengths) > 1:
            sums = torch.cat([part.cumsum(0) for part in values.split(list(self.lengths))])
        zero = torch.zeros_like(values[0])
        past = [zero if memory is None else memory.state.get(key, zero) for memory in self._memories]
        sums = sums + self.spread(torch.stack(past), len(values), key)
        ends = torch.tensor(self.lengths, device=values.device).cumsum(0) - 1
        for memory, last in zip(self._memories, sums[ends].unbind(), strict=True):
            if memory is not None:
                memory.state[key] = last
        return sums

    @property
    def _memories(self) -> Sequence[RequestMemory | None]:
        return self.memories or [None] * len(self.lengths)


@dataclass(eq=False)
class Stream:
    """The sequence that one stack of layers reads in this forward."""

    batch: int = 0
    length: int | None = None  # tokens in this forward, without those in the cache; None where there are none
    given_mask: Any = None  # `mask`, or a function that reads it: in decoding hardly anybody asks
    position_ids: Tensor | None = None  # (B or 1, length) in the text, only where the caller gave them
    cache: Any = None
    past: Any = 0  # tokens in the cache when the forward began; a tensor for static caches
    copies: int = 1  # rows of this forward for each row of the caller's batch, next to each other
    packed: bool = False  # the rows of several requests lie in one, one after the other (continuous batching)
    requests: PackedRequests | None = None  # whose tokens these are, where a server has said it
    mask_name: str = "attention_mask"  # the argument of the root's forward that says where this stream has padding
    input_ids: Tensor | None = None  # (B, length) the tokens of this forward; None: the caller gave embeddings
    foreign: str | None = None  # the argument that brings earlier tokens where routers can leave nothing (`state` ...)

    @property
    def mask(self) -> Tensor | None:
        """(B, length) bool, False at padding; None: not given."""
        if callable(self.given_mask):
            self.given_mask = self.given_mask()
        return self.given_mask

    @property
    def cached(self) -> bool:
        """Whether earlier tokens of the sequence are in the cache."""
        return bool(self.past > 0)

    def spread(self, values: Any, count: int, name: str) -> Tensor:
        """Repeat values that belong to rows of the caller's batch for the rows of this forward.

        This is the one place where a row of the caller's batch becomes several: those that `generate` makes of it
        (beams, sequences to return), the tokens of a sequence where a layer reads them as rows, and the tokens of a
        request that is packed into one row with others.

        Args:
            values: (R, ...), one for each row of the caller's batch, or for each packed request.
            count: rows to be had: those of this forward, or a multiple of them.
            name: of the field, for messages.

        Returns:
            (count, ...)

        Raises:
            ValueError: as many values as rows are needed, or `count` is no multiple of the rows of this forward.
        """
        if self.packed and self.requests is None:
            raise refuse_packed(name)
        values = _as_numbers(values, name)
        if self.requests is not None:
            return self.requests.spread(values, count, name)
        batch = self.batch or count  # 0: nothing is known of the forward, so one value for each row is asked for
        given = values.shape[0] if values.dim() else 0
        if given * self.copies != batch or count % batch:
            raise ValueError(
                f"Length of `{name}` should be the same as the number of inputs, but got "
                f"{given if values.dim() else 'a single value'} and {batch // self.copies} respectively."
            )
        return repeat_rows(values, count, name)


@dataclass(eq=False)
class MediaStream(Stream):
    """What a part of the model reads that takes in images or sounds: any number of rows for each of the batch."""

    part: str = ""  # its path
    by_row: Callable[[], list[Any] | None] = lambda: None  # what rows hold of images and sounds, as `media_by_row`

    def spread(self, values: Any, count: int, name: str) -> Tensor:
        """As of any stream, where the rows of the batch have the same value, or hold as much of images and sounds.

        Raises:
            ValueError: neither is so, or nothing says what the rows hold.
        """
        values = super().spread(values, self.batch, name) if self.batch else _as_numbers(values, name)
        if bool((values == values[:1]).all()):
            return values[:1].expand(count, *values.shape[1:])
        by_row = self.by_row()  # it waits for the device
        if not is_even(by_row) or count % len(values):
            held = "nothing says how many" if by_row is None else f"of placeholders for them {by_row}"
            raise ValueError(
                f"{name} differs from row to row, and {self.part!r} reads images or sounds, of which rows hold "
                f"different numbers ({held}): give rows that hold the same number, or rows of one value, in a batch "
                "of their own, or leave that part of the model out (exclude_modules)"
            )
        return repeat_rows(values, count, name)


def _as_numbers(values: Any, name: str) -> Tensor:
    try:
        return torch.as_tensor(values)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{name}={values!r} must be numbers, one for each row of the batch: {error}") from None


def media_stream(text: Stream, part: str, inputs: dict[str, Any], placeholders: tuple[int, ...]) -> MediaStream:
    """What `part` of the model reads in a forward of these `inputs`, beside the text."""
    by_row = partial(media_by_row, inputs, placeholders, text.batch)
    return MediaStream(text.batch, copies=text.copies, packed=text.packed, part=part, by_row=by_row)


def read_stream(
    inputs: dict[str, Any],
    copies: int = 1,
    mask_name: str = "attention_mask",
    requests: PackedRequests | None = None,
) -> Stream:
    """Batch size, length, padding mask and cache from the arguments of a forward.

    Args:
        copies: rows of `inputs` for each row of the caller's batch.
        mask_name: what the root's forward calls the mask of this stream, which is `attention_mask` in `inputs`.
        requests: whose tokens lie in a packed row.

    Raises:
        ValueError: a packed row of other tokens than those of `requests`, or a mask that does not fit.
    """
    tokens = inputs.get("input_ids")
    if tokens is None:
        tokens = inputs.get("inputs_embeds")
    cache, foreign = given_cache(inputs), foreign_in(inputs)
    past = 0 if cache is None else tokens_in(cache)
    past = past.clone() if isinstance(past, Tensor) else past  # static caches count in place
    if tokens is None:
        first = next((v for v in inputs.values() if isinstance(v, Tensor) and v.dim() > 0), None)
        batch = 0 if first is None else first.shape[0]
        return Stream(batch, cache=cache, past=past, copies=copies, mask_name=mask_name)
    tokens, mask, position_ids, choices = _rows_of_choices(tokens, inputs)
    batch, length = tokens.shape[:2]
    position_ids = _in_text(position_ids)
    input_ids = tokens if inputs.get("input_ids") is not None else None
    if inputs.get("cache") is not None and inputs.get("cu_seq_lens_q") is not None:
        if requests is not None and sum(requests.lengths) != length:
            raise ValueError(f"the packed row has {length} tokens, its requests {sum(requests.lengths)}")
        return Stream(batch, length, None, position_ids, packed=True, requests=requests, input_ids=input_ids)
    if isinstance(mask, dict):  # one 4D mask per kind of layer
        mask = next((m for m in mask.values() if m is not None), None)
    if foreign is not None and isinstance(mask, Tensor) and mask.dim() == 2:  # nothing else says how many came before
        past = max(0, mask.shape[1] - length)
    if mask is not None:
        if mask.dim() <= 2:
            _refuse_misfit(mask, batch, length, past, cache)
        mask = partial(_current_mask, mask, batch, length, past)
        mask = mask() if torch.compiler.is_compiling() else mask  # what nobody reads is no part of a graph anyway
    return Stream(
        batch, length, mask, position_ids, cache, past, copies * choices, mask_name=mask_name, input_ids=input_ids,
        foreign=foreign,
    )  # fmt: skip


def _in_text(position_ids: Any) -> Any:
    """The positions of tokens in the text (B, length), where a model also takes them in time, height and width: all
    four, (4, B, length), the text's first. The last three alone do not say where documents begin."""
    if not isinstance(position_ids, Tensor) or position_ids.dim() != 3:
        return position_ids
    return position_ids[0] if position_ids.shape[0] == 4 else None


def _rows_of_choices(tokens: Tensor, inputs: dict[str, Any]) -> tuple[Tensor, Any, Any, int]:
    """Tokens, mask and positions as rows, and rows for each of the batch: models of multiple choice read (B, C, T)
    as B * C rows, the choices of one row next to each other."""
    mask, position_ids = inputs.get("attention_mask"), inputs.get("position_ids")
    per_choice = tokens.dim() == (3 if inputs.get("input_ids") is not None else 4)
    if not per_choice or not isinstance(mask, Tensor) or mask.shape != tokens.shape[:3]:
        return tokens, mask, position_ids, 1
    if isinstance(position_ids, Tensor) and position_ids.dim() == 3:
        position_ids = position_ids.flatten(0, 1)
    return tokens.flatten(0, 1), mask.flatten(0, 1), position_ids, tokens.shape[1]


def refuse_packed(what: str) -> ValueError:
    """The error where `what` would have to be told apart by request, and requests are packed."""
    return ValueError(
        f"{what}: continuous batching packs the tokens of all requests into one row, where rows of the caller's batch "
        "cannot be told apart; use generate"
    )


def _refuse_misfit(mask: Tensor, batch: int, length: int, past: Any, cache: Any) -> None:
    """Raises ValueError for a mask by token that has not one value for each token of each row: of the whole sequence
    so far, and where there is no cache, of these tokens; or for each that a static cache has room for."""
    known = not isinstance(past, Tensor)  # by static caches it is only on the device, once they are filled
    fits = mask.dim() == 2 and mask.shape[0] in (1, batch)
    if fits and known:
        fits = mask.shape[1] in (length, length + past) or mask.shape[1] == room_in(cache)
    if not fits:
        raise ValueError(
            f"attention_mask of shape {tuple(mask.shape)} does not fit {batch} rows of {length} tokens"
            f"{f' after {past} in the cache' if known and past else ''}; give one value for each token"
        )


def _current_mask(mask: Tensor, batch: int, length: int, past: Any) -> Tensor | None:
    """(B, length) bool mask of the tokens of this forward, from any mask that transformers passes."""
    if mask.dim() == 2:
        mask = mask.expand(batch, -1)
    if mask.shape[0] != batch:
        return None
    if mask.dim() == 2 and mask.shape[1] == length:
        return mask != 0
    columns = torch.arange(length, device=mask.device) + past
    if mask.dim() == 2:
        return mask.index_select(1, columns) != 0
    if mask.dim() == 3:  # (B, T, S) of zeros and ones
        mask = (mask != 0).unsqueeze(1)
    # (B, 1, T, S): a token is real where it may look at itself.
    if mask.shape[-1] < length:
        return None
    own = mask[:, 0].gather(2, columns.clamp_max(mask.shape[-1] - 1).view(1, -1, 1).expand(batch, -1, 1)).squeeze(2)
    return own if own.dtype == torch.bool else own == 0


def repeat_rows(values: Tensor, count: int, name: str) -> Tensor:
    """values (B, ...) -> (count, ...), each row repeated in place: tokens of a flattened batch, beams of a search."""
    if count % values.shape[0]:
        raise ValueError(
            f"Length of `{name}` should be the same as the number of inputs, but got {values.shape[0]} and {count} "
            "respectively."
        )
    return values.repeat_interleave(count // values.shape[0], dim=0)
