"""Which arm a text is of, by how well each arm has predicted it so far: Bayes' rule over whole models.

No layer can decide this: each arm (a domain alone, or the frozen model) must run through the whole model first. So the
rows of a batch run once for each arm, and the distribution of the next token is the mean of the arms' own, weighed by
the likelihood of the tokens so far under each. Nothing is trained; K arms and the frozen model cost K + 1 forwards.
Source: how DEMix mixes its experts at inference (Gururangan et al. 2022, arXiv 2108.05036).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import DynamicCache

from mixadapters.core.cache import CACHE, given_cache
from mixadapters.core.context import ROUTES, ForwardContext
from mixadapters.core.fields import check_integer
from mixadapters.core.media import refuse_uneven
from mixadapters.core.routing import FROZEN
from mixadapters.core.streams import Stream, read_stream, refuse_packed
from mixadapters.routers.pooling import holds_documents

NOT_PER_ROW = frozenset({"cache_position", "num_items_in_batch", "logits_to_keep"})
OF_ROWS = ("output_hidden_states", "output_attentions")  # would come back for each arm
NO_ARM = -1


class PosteriorRouter:
    """An objective of evaluation: runs each row once for each arm, and mixes what they predict.

    The tuner's `posterior` puts it to work for the forwards, losses and `generate` of a block.

    Args:
        field: the batch field that routes a row to an arm.
        experts: names of the arms with an expert, numbered in this order. The frozen model is one more.
        vocab_size: how many tokens the model's head tells apart.
        choose_after: from the token of this number on a text has one arm, the likeliest, and `generate` runs that
            alone. None: all arms to the end.

    Attributes:
        weights: (B, T, A) of the last forward that ran all arms: those for the token after each.

    Raises:
        ValueError: choose_after is no number of tokens.
    """

    takes: tuple[str, ...] = ()
    in_eval = True
    passing = True

    def __init__(self, field: str, experts: Sequence[str], vocab_size: int, choose_after: int | None = None) -> None:
        if choose_after is not None:
            check_integer("choose_after", choose_after, least=1)
        self.field, self.arms, self.vocab_size = field, [*experts, FROZEN], vocab_size
        self.numbers = [*range(len(experts)), -1]
        self.choose_after = choose_after
        self.weights: Tensor | None = None

    # --- before the model runs --------------------------------------------------------------------------------------

    def before(self, context: ForwardContext, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        """Repeat each row for each arm, next to each other; rows whose arm is chosen stay as they are."""
        record = context.record
        inputs = {**dict(zip(context.argument_names, args, strict=False)), **kwargs}
        self._refuse(record, inputs)
        stream = read_stream(inputs)
        if stream.packed:
            raise refuse_packed("the posterior")
        rows = stream.batch
        refuse_uneven(inputs, context.placeholders, rows, "the posterior", "give rows of as many")
        cache = self._cache(inputs)
        record.shared[self] = inputs, cache
        copies, record.copies = record.copies, 1
        arms = len(self.arms) if cache is None else cache.arms
        for name, value in record.values.items():
            if value is not None:
                record.values[name] = torch.as_tensor(value).repeat_interleave(copies * arms, dim=0)
        numbers = torch.tensor(self.numbers)
        chosen = None if cache is None or arms > 1 else cache.chosen
        record.values[self.field] = numbers.repeat(rows) if chosen is None else numbers[chosen.cpu()]
        kwargs = {name: self._repeated(name, value, rows, arms) for name, value in kwargs.items() if name != "labels"}
        if cache is not None:
            kwargs.pop("past_key_values", None)
            kwargs[CACHE] = cache
        if kwargs.get("logits_to_keep") is not None and arms > 1:
            kwargs["logits_to_keep"] = 0  # all: they weigh what comes
        names = context.argument_names
        args = tuple(None if name == "labels" else self._repeated(name, value, rows, arms)
                     for name, value in zip(names, args, strict=False))  # fmt: skip
        return args, kwargs

    def _refuse(self, record: Any, inputs: dict[str, Any]) -> None:
        """Raise ValueError for what cannot be had of a mean of models."""
        if record.training:
            raise ValueError("the posterior is for evaluation: call model.eval() first, or leave the block")
        if inputs.get("input_ids") is None:
            raise ValueError("the posterior weighs arms by the tokens of the text: pass input_ids, not inputs_embeds")
        for name in (self.field, "adapter_names", ROUTES):
            if record.values.get(name) is not None:
                raise ValueError(f"{name} says which arms rows have, and so does the posterior; use one of the two")
        for name in OF_ROWS:
            if inputs.get(name):
                raise ValueError(f"{name}=True: each arm has its own, and their mean means nothing; leave it out")
        if inputs.get("return_dict") is False:
            raise ValueError("return_dict=False: the posterior needs the names of the outputs; leave it out")

    def _cache(self, inputs: dict[str, Any]) -> ArmsCache | None:
        """The cache of this forward, of all arms. Raises ValueError where another one has been filled."""
        given = given_cache(inputs)
        if given is None or isinstance(given, ArmsCache):
            return given
        if inputs.get("cache_params") is not None:
            raise ValueError(
                "the cache of this model sums up what it has read, and cannot be repeated for each arm: generate with "
                "use_cache=False"
            )
        if type(given) is not DynamicCache:
            raise ValueError(
                f"a {type(given).__name__} holds each row once; the posterior needs a cache that grows: leave "
                "cache_implementation out of generate"
            )
        if given.get_seq_length():
            raise ValueError("the key-value cache was filled before, by one arm; begin with a new one")
        return ArmsCache(given, len(self.arms))

    def _repeated(self, name: str, value: Any, rows: int, arms: int) -> Any:
        if isinstance(value, dict):  # a mask for each kind of layer
            return {key: self._repeated(key, part, rows, arms) for key, part in value.items()}
        if not isinstance(value, Tensor) or name in NOT_PER_ROW or value.dim() == 0 or value.shape[0] != rows:
            return value
        return value.repeat_interleave(arms, dim=0)

    # --- after it ---------------------------------------------------------------------------------------------------

    def after(self, context: ForwardContext, module: nn.Module, output: Any) -> Any:
        """The output of the mean: logits are log-probabilities (B, T, V), the loss is that of them."""
        inputs, cache = context.record.shared.pop(self)
        logits = getattr(output, "logits", None)
        if logits is None or logits.dim() != 3 or logits.shape[-1] < self.vocab_size:
            raise ValueError(
                f"the posterior weighs predictions of the next token, and {type(output).__name__} of "
                f"{type(module).__name__} has none; use a causal language model"
            )
        if cache is None or cache.arms > 1:
            logs = logits.float().log_softmax(-1).unflatten(0, (-1, len(self.arms)))  # (B, A, T, V)
            weights = self._weigh(logs, context.stream(), cache)
            logits = (logs + weights.log().unsqueeze(-1)).logsumexp(1)
            self.weights = weights.transpose(1, 2)
        if cache is None and getattr(output, CACHE, None) is not None:
            output[CACHE] = None  # it holds no likelihoods, so nobody can go on with it
        labels = inputs.get("labels")
        if labels is not None:
            count = {n: inputs[n] for n in ("num_items_in_batch", "shift_labels") if inputs.get(n) is not None}
            output["loss"] = module.loss_function(logits=logits, labels=labels, vocab_size=logits.shape[-1], **count)
        output["logits"] = self._kept(logits, inputs.get("logits_to_keep"))
        return output

    def _kept(self, logits: Tensor, kept: Any) -> Tensor:
        """The places that the caller has asked for."""
        if isinstance(kept, Tensor):
            return logits[:, kept.to(logits.device)]
        return logits[:, -kept:] if kept else logits

    def _weigh(self, logs: Tensor, stream: Stream, cache: ArmsCache | None) -> Tensor:
        """logs (B, A, T, V) -> (B, A, T) weights of the arms for the token after each.

        Raises:
            ValueError: rows hold several documents.
        """
        if holds_documents(stream):
            raise ValueError(
                "position_ids restart inside a row: several documents are packed into it, and the likelihood of one "
                "would weigh arms for the next; do not pack"
            )
        arms = logs.shape[1]
        assert stream.input_ids is not None
        ids = stream.input_ids[::arms].to(logs.device)
        real = torch.ones_like(ids) if stream.mask is None else stream.mask[::arms].to(ids)
        before = logs.new_zeros(len(ids), arms, 1)
        if cache is not None and cache.last is not None:
            before = cache.last.unflatten(0, (-1, arms)).gather(-1, ids[:, None, :1].expand(-1, arms, -1))
        own = logs[:, :, :-1].gather(-1, ids[:, None, 1:, None].expand(-1, arms, -1, -1)).squeeze(-1)
        counted = real * F.pad(real[:, :-1], (1, 0), value=1)  # padding neither predicts nor is predicted
        sums = (torch.cat([before, own], -1) * counted.unsqueeze(1)).cumsum(-1)
        count = real.cumsum(-1)
        if cache is not None and cache.sums is not None:
            sums, count = sums + cache.sums.view(-1, arms, 1), count + cache.count[::arms, None]
        weights, chosen = self._chosen(sums, count, cache)
        if cache is not None:
            cache.keep(sums[..., -1].flatten(), logs[:, :, -1].flatten(0, 1), count[:, -1].repeat_interleave(arms))
            cache.choose(chosen)
        return weights

    def _chosen(self, sums: Tensor, count: Tensor, cache: ArmsCache | None) -> tuple[Tensor, Tensor]:
        """Weights (B, A, T) by the sums (B, A, T) of log-likelihoods; and the arm of each row (B,), or -1.

        count (B, T): tokens of the text so far.
        """
        weights, chosen = sums.softmax(1), torch.full((len(sums),), NO_ARM, device=sums.device)
        if cache is not None and cache.chosen is not None:
            chosen = cache.chosen
        if self.choose_after is None:
            return weights, chosen
        late = count >= self.choose_after
        first = late.int().argmax(-1)  # 0 where there is none
        likeliest = sums.gather(2, first.view(-1, 1, 1).expand(-1, sums.shape[1], 1))[..., 0].argmax(1)
        chosen = torch.where((chosen == NO_ARM) & late.any(-1), likeliest, chosen)
        alone = F.one_hot(chosen.clamp_min(0), sums.shape[1]).to(weights).unsqueeze(-1)
        return torch.where(late.unsqueeze(1), alone, weights), chosen


class ArmsCache(DynamicCache):
    """A key-value cache that holds each row once for each arm, and what the arms have made of the text so far.

    Row b of the batch has the rows b A to b A + A - 1. When all rows have chosen their arms, it keeps those alone.

    Args:
        empty: the cache in whose place it comes.
    """

    def __init__(self, empty: DynamicCache, arms: int) -> None:
        super().__init__()
        self.__dict__.update(vars(empty))
        self.arms = arms
        self.sums: Tensor | None = None  # (B A,) log-likelihood of the text
        self.last: Tensor | None = None  # (B A, V) log-probabilities of the next token
        self.count = torch.zeros(0, dtype=torch.long)  # (B A,) tokens of the text
        self.chosen: Tensor | None = None  # (B,) the arm of each row, -1 where it has none yet

    def keep(self, sums: Tensor, last: Tensor, count: Tensor) -> None:
        self.sums, self.last, self.count = sums, last, count

    def choose(self, chosen: Tensor) -> None:
        """Note the arms (B,); once every row has one, drop the others."""
        self.chosen = chosen
        if bool((chosen >= 0).all()):
            rows = torch.arange(len(chosen), device=chosen.device) * self.arms + chosen
            super().batch_select_indices(rows)
            self.arms, self.sums, self.last = 1, None, None

    def _rows(self, rows: Tensor) -> Tensor:
        """Where rows of the batch lie, for all arms."""
        arms = torch.arange(self.arms, device=rows.device)
        return (rows.unsqueeze(1) * self.arms + arms).flatten()

    def _take(self, rows: Tensor) -> Tensor:
        """Let what goes with the keys follow; returns where the rows lie."""
        every = self._rows(rows)
        if self.sums is not None and self.last is not None:
            at = every.to(self.sums.device)
            self.keep(self.sums[at], self.last[at], self.count[at])
        if self.chosen is not None:
            self.chosen = self.chosen[rows.to(self.chosen.device)]
        return every

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(self._take(beam_idx))

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(self._take(indices))

    def batch_repeat_interleave(self, repeats: int) -> None:
        rows = self.get_batch_size() // self.arms
        self.batch_select_indices(torch.arange(rows).repeat_interleave(repeats))

    def get_batch_size(self) -> int:
        return next(layer.keys.shape[0] for layer in self.layers if getattr(layer, "keys", None) is not None)

    def crop(self, *_: Any) -> None:
        raise ValueError("the posterior cannot take tokens back, as assisted decoding does; use plain generate")

    def reset(self) -> None:
        raise ValueError("the posterior's cache cannot be used again; begin with a new one")
