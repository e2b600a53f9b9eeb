"""Which tokens decide together: one small class per granularity, from hidden states to the logits of each token.

A router with memory (`causal_prefix`, `request`) keeps what it needs of earlier tokens with the key-value cache.
"""

from __future__ import annotations

from collections.abc import Callable
from uuid import uuid4

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mixadapters.core.adapter import Site
from mixadapters.core.cache import router_state
from mixadapters.core.context import ForwardContext
from mixadapters.core.numbers import refuse_other_masks
from mixadapters.core.streams import Stream
from mixadapters.routers.score import exact

POOLS = ("masked_mean", "first", "last_valid", "last")
Score = Callable[[Tensor], Tensor]  # (..., d) -> (..., A)


class Pooling:
    """From tokens (B, T, d) or (B * T, d) to logits (B * T, A).

    Args:
        pool: one of POOLS, for "sequence". "last" reads the last position, padding or not.
        total: add the logits of the tokens up, as evidence that grows with them, where else their mean is taken.
    """

    granularity = ""
    field = "granularity"  # what the config calls it, for messages
    by_row = False  # whether all tokens of a row share one decision
    by_request = False  # whether it goes on, by request, where a server packs several into a row

    def __init__(self, pool: str = "masked_mean", *, total: bool = False) -> None:
        self.pool, self.total = pool, total
        self.path = self.stack = ""  # where the router sits

    def bind(self, site: Site) -> None:
        """Called once the router has its place."""
        self.path, self.stack = site.path, site.stack

    def refuse_documents(self, stream: Stream) -> None:
        """Raise ValueError where the rows of a forward hold several documents, one after the other."""
        refuse_documents(stream, f"a router per {self.granularity}", f"use {self.field}='token' or 'causal_prefix'")

    @property
    def said(self) -> str:
        """How a config says it."""
        return f"{self.field}={self.granularity!r}"

    def __call__(self, score: Score, tokens: Tensor, context: ForwardContext) -> Tensor:
        sequences = context.as_sequences(tokens, self.stack)
        stream = context.stream(self.stack)
        logits = self.pooled(score, sequences, mask_of(sequences, stream), stream, context)
        return logits.expand(-1, sequences.shape[1], -1).flatten(0, 1)

    def pooled(
        self, score: Score, sequences: Tensor, mask: Tensor | None, stream: Stream, context: ForwardContext
    ) -> Tensor:
        """sequences (B, T, d) and their mask (B, T) -> logits (B, T, A), or (B, 1, A) where a row has one decision."""
        raise NotImplementedError


class TokenPooling(Pooling):
    """Each token by itself."""

    granularity = "token"

    def __call__(self, score: Score, tokens: Tensor, context: ForwardContext) -> Tensor:
        return score(tokens.reshape(-1, tokens.shape[-1]))


class SequencePooling(Pooling):
    """All tokens of a row, pooled before they are scored. Sees the future, so it is for encoders."""

    granularity = "sequence"
    by_row = True

    def bind(self, site: Site) -> None:
        """Raises ValueError at causal sites."""
        if site.causal:
            raise ValueError(
                f"{self.said} at {site.path!r}: the router of a causal decoder would see the future; "
                "use 'token', 'causal_prefix' or 'request'"
            )
        super().bind(site)

    def pooled(
        self, score: Score, sequences: Tensor, mask: Tensor | None, stream: Stream, context: ForwardContext
    ) -> Tensor:
        self.refuse_documents(stream)
        if self.pool == "last":
            return score(sequences[:, -1]).unsqueeze(1)
        mask = known_mask(sequences, mask, stream, self.said)
        if self.total:
            return (score(sequences) * mask.unsqueeze(-1)).sum(1, keepdim=True)
        if self.pool == "masked_mean":
            read = exact(sequences, normalize=False)  # sums overflow in half precision
            weight = mask.to(read.dtype).unsqueeze(-1)
            return score((read * weight).sum(1) / weight.sum(1).clamp_min(1)).unsqueeze(1)
        position = torch.arange(mask.shape[1], device=mask.device)
        if self.pool == "first":
            index = torch.where(mask, position, mask.shape[1]).amin(1).clamp_max(mask.shape[1] - 1)
        else:
            index = torch.where(mask, position, 0).amax(1)
        chosen = sequences.gather(1, index.view(-1, 1, 1).expand(-1, 1, sequences.shape[-1])).squeeze(1)
        return score(chosen).unsqueeze(1)


class Remembering(Pooling):
    """A pooling with a memory of earlier tokens."""

    def __init__(self, pool: str = "masked_mean", *, total: bool = False) -> None:
        super().__init__(pool, total=total)
        self.mark = uuid4().hex  # tells the routers of several adapters at one site apart

    def key(self, context: ForwardContext) -> str:
        """Of what it keeps. Layers that share weights share their router, which runs several times in a forward."""
        runs = context.record.runs
        runs[self.mark] = runs.get(self.mark, 0) + 1
        return f"{self.path}/{self.mark}/{runs[self.mark]}"

    def memory(self, stream: Stream, context: ForwardContext) -> tuple[dict[str, Tensor] | None, str]:
        """Where to keep what later tokens need, None where nothing comes after; and the key of it there."""
        key = self.key(context)
        if context.record.training:
            if stream.cached:
                raise ValueError(
                    f"{self.said} cannot train on a sequence that a cache begins; to generate, call model.eval()"
                )
            return None, key
        if stream.foreign is not None:
            raise ValueError(
                f"{self.said} at {self.path!r} reads the tokens so far, and this model keeps them in "
                f"{stream.foreign!r}, where a router can leave nothing: generate with use_cache=False, or take "
                f"{self.field}='token'"
            )
        if stream.cache is None:
            return context.record.router_state, key
        state = router_state(stream.cache)
        state = context.record.router_state if state is None else state
        if key not in state and stream.cached:  # in this order: to look into a static cache breaks a compiled graph
            raise ValueError(
                f"the key-value cache holds tokens that the router at {self.path!r} has not seen ({self.said}): "
                "fill the cache by a forward of this model with these adapters active"
            )
        return state, key

    def refuse_reread(self, sequences: Tensor, stream: Stream) -> None:
        """Raise ValueError at a layer that reads, in a step, the tokens before it again: it would count them twice."""
        if sequences.shape[1] != stream.length and stream.cached:
            raise ValueError(
                f"{self.said} at {self.path!r}: in a step of {stream.length} tokens this layer reads "
                f"{sequences.shape[1]}, those of the cache again; leave it out (exclude_modules), or take "
                f"{self.field}='token'"
            )


class PrefixPooling(Remembering):
    """The mean (or the total) of the logits of the real tokens up to each one. Packed sequences start anew."""

    granularity = "causal_prefix"
    by_request = True

    def pooled(
        self, score: Score, sequences: Tensor, mask: Tensor | None, stream: Stream, context: ForwardContext
    ) -> Tensor:
        self.refuse_reread(sequences, stream)
        logits = score(sequences)
        weight = torch.ones_like(logits[..., :1]) if mask is None else mask.to(logits.dtype).unsqueeze(-1)
        weighed = torch.cat([logits * weight, weight], dim=-1)  # (B, T, A + 1)
        if stream.requests is not None:
            sums = stream.requests.running_sums(weighed[0], self.key(context)).unsqueeze(0)
        else:
            sums = self._sums(weighed, mask, stream, context)
        return sums[..., :-1] if self.total else sums[..., :-1] / sums[..., -1:].clamp_min(1)

    def _sums(self, weighed: Tensor, mask: Tensor | None, stream: Stream, context: ForwardContext) -> Tensor:
        """weighed (B, T, A + 1) -> its running sums, in each row and after what the cache holds of it."""
        sums = weighed.cumsum(1)
        state, key = self.memory(stream, context)
        unread = isinstance(stream.past, int) and stream.past == 0  # by a model that takes a cache and fills none
        past = None if state is None or unread else state.get(key)
        if past is not None:
            sums = sums + past[:, -1:]
        elif stream.position_ids is not None and not stream.cached:
            sums = sums - _before_document(sums, stream.position_ids, mask)
        if state is not None:
            state[key] = sums if past is None else torch.cat([past, sums], dim=1)
        return sums


class RequestPooling(Remembering):
    """The mean (or the total) of the logits of the prompt's tokens, taken once and then kept."""

    granularity = "request"
    by_row = True

    def pooled(
        self, score: Score, sequences: Tensor, mask: Tensor | None, stream: Stream, context: ForwardContext
    ) -> Tensor:
        self.refuse_reread(sequences, stream)
        logits = score(sequences)
        state, key = self.memory(stream, context)
        frozen = None if state is None else state.get(key)
        if frozen is not None:
            return frozen.unsqueeze(1)
        self.refuse_documents(stream)
        weight = self.prompt(logits, mask, context).to(logits.dtype).unsqueeze(-1)
        pooled = (logits * weight).sum(1)
        if not self.total:
            pooled = pooled / weight.sum(1).clamp_min(1)
        if state is not None:
            state[key] = pooled
        return pooled.unsqueeze(1)

    def prompt(self, logits: Tensor, mask: Tensor | None, context: ForwardContext) -> Tensor:
        """(B, T) bool: the tokens of the request. All that an encoder of two stacks reads; else those of
        `prompt_mask`, which `generate` knows, else those before the first label, else all."""
        record, encoder = context.record, self.stack == "encoder"
        prompt = None if encoder else context.token_field("prompt_mask", self.stack)
        labels = None if encoder else record.inputs.get("labels")
        real = torch.ones(logits.shape[:2], dtype=torch.bool, device=logits.device) if mask is None else mask
        if prompt is not None:
            self._refuse_part(context)
            refuse_other_masks("prompt_mask", prompt)
            return prompt.to(real.device).bool() & real
        if labels is not None and labels.shape[:2] == real.shape:
            return _before_labels(labels, real, self.said)
        if record.training and not encoder:
            raise ValueError(
                f"{self.said} must know the prompt in training, or it would see the answer: pass "
                "prompt_mask (B, T), or labels with -100 on the prompt"
            )
        # Generation drops a mask that has no padding, but always brings a cache.
        stream = context.stream(self.stack)
        if mask is None and logits.shape[0] > 1 and stream.cache is None:
            raise _missing_mask(self.said, stream)
        return real

    def _refuse_part(self, context: ForwardContext) -> None:
        """Raise ValueError where the prompt that is pinned goes on after the tokens of this forward."""
        record, stream = context.record, context.stream(self.stack)
        if "prompt_mask" not in record.pinned:
            return
        tokens, end = torch.as_tensor(record.values["prompt_mask"]).shape[1], int(stream.past) + (stream.length or 0)
        if tokens > end:
            raise ValueError(
                f"{self.said} reads the whole prompt, of which this forward ends at {end} of {tokens}; "
                "leave prefill_chunk_size out of generate, or fill the cache by one forward"
            )


def name_field(router: nn.Module, field: str) -> None:
    """Have the messages of a router say `field` where its config calls the granularity so."""
    for part in router.modules():
        if isinstance(pooling := getattr(part, "pooling", None), Pooling):
            pooling.field = field


POOLINGS = {cls.granularity: cls for cls in (TokenPooling, SequencePooling, PrefixPooling, RequestPooling)}
GRANULARITIES = tuple(POOLINGS)


def _before_labels(labels: Tensor, real: Tensor, said: str) -> Tensor:
    """(B, T) bool: the real tokens before the first label of each row."""
    labelled = (labels != -100).to(real.device)
    prompt = (labelled.cumsum(1) == 0) & real
    if not torch.compiler.is_compiling() and bool((labelled.any(1) & ~prompt.any(1)).any()):
        raise ValueError(
            f"{said} needs a prompt in each row, but labels cover a row from its first token: mask "
            "the prompt's labels with -100, or pass prompt_mask (B, T)"
        )
    return prompt


def known_mask(sequences: Tensor, mask: Tensor | None, stream: Stream, said: str) -> Tensor:
    """(B, T) bool mask of sequences (B, T, ...). Raises ValueError where several rows have none."""
    if mask is not None:
        return mask
    if stream.length is not None and sequences.shape[0] > 1:
        raise _missing_mask(said, stream)
    return torch.ones(sequences.shape[:2], dtype=torch.bool, device=sequences.device)


def mask_of(sequences: Tensor, stream: Stream) -> Tensor | None:
    """(B, T) bool, the mask of the stream where it is that of these sequences (B, T, ...)."""
    mask = stream.mask
    return mask.to(sequences.device) if mask is not None and mask.shape[1] == sequences.shape[1] else None


def _missing_mask(said: str, stream: Stream) -> ValueError:
    ids = stream.mask_name.replace("attention_mask", "input_ids")
    return ValueError(
        f"{said} needs to know the padding of a batch: pass {stream.mask_name} (B, T); "
        f"torch.ones_like({ids}) where there is none"
    )


def holds_documents(stream: Stream) -> bool:
    """Whether a row of a forward holds several documents, one after the other."""
    positions = stream.position_ids
    if positions is None or torch.compiler.is_compiling() or positions.dim() != 2 or positions.shape[1] < 2:
        return False
    drops = positions[:, 1:] < positions[:, :-1]
    if stream.mask is not None and stream.mask.shape == positions.shape:
        drops = drops & stream.mask[:, 1:] & stream.mask[:, :-1]
    return bool(drops.any())


def refuse_documents(stream: Stream, router: str, remedy: str) -> None:
    """Raise ValueError where the rows of a forward hold several documents, one after the other."""
    if holds_documents(stream):
        raise ValueError(
            f"position_ids restart inside a row: several documents are packed into it, and {router} would mix them; "
            f"{remedy}, or do not pack"
        )


def _before_document(sums: Tensor, position_ids: Tensor, mask: Tensor | None) -> Tensor:
    """The running sum at the end of the document before each token's own, 0 in the first: same shape as sums."""
    starts = (position_ids == 0).to(sums.device).expand(sums.shape[0], -1)
    if mask is not None:
        starts = starts & mask
    position = torch.arange(sums.shape[1], device=sums.device)
    start = torch.where(starts, position, 0).cummax(1).values  # index of the document's first token
    padded = F.pad(sums, (0, 0, 1, 0))  # padded[:, t] is the sum before token t
    return padded.gather(1, start.unsqueeze(-1).expand(-1, -1, sums.shape[-1]))
