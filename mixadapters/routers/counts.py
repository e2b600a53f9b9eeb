"""A router that needs no gradient: which domain the tokens read so far are of, by how often each domain uses them.

Naive Bayes over token ids. Weights are a softmax of log p(tokens so far | domain) / temperature, over the domains and
general text, whose share is left to the frozen layer. One decision serves all layers of a model. Source: the idea of
routing by the statistics of a text is that of c-BTM (Gururangan et al. 2023, arXiv 2303.14177), by TF-IDF there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any
from uuid import uuid4

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mixadapters.core.adapter import Site
from mixadapters.core.context import ForwardContext
from mixadapters.core.names import check_free, check_known
from mixadapters.core.routing import FROZEN, Routing
from mixadapters.core.streams import Stream
from mixadapters.routers.base import LOSS_OPTIONS, ROUTERS, PooledRouter, Router
from mixadapters.routers.options import check_options
from mixadapters.routers.pooling import POOLINGS, Pooling
from mixadapters.routers.tokens import check_vocabulary

MOST = torch.iinfo(torch.int32).max


class TokenCounts(nn.Module):
    """How often each arm's text has each token. Arms: the domains in order, null arms, general text.

    Counts are whole numbers, so that a model cast to half precision keeps them. Those of a text are weighed as if it
    had `size` tokens: else a token that no text has would speak for the shortest one.

    Args:
        domains: names, in order.
        vocab_size: ids are below it.
        null_arms: arms that removed domains have left.
    """

    counts: Tensor  # (V, A) int32
    totals: Tensor  # (A,) int64: tokens counted; 0 where an arm has not been counted
    size: Tensor  # () int64: of the smallest text when all were counted

    def __init__(self, domains: Sequence[str], vocab_size: int, null_arms: int = 0) -> None:
        super().__init__()
        self.domains, self.null_arms = list(domains), null_arms
        arms = len(self.arms)
        self.register_buffer("counts", torch.zeros(vocab_size, arms, dtype=torch.int32))
        self.register_buffer("totals", torch.zeros(arms, dtype=torch.int64))
        self.register_buffer("size", torch.zeros((), dtype=torch.int64))
        self.complete = False  # whether all arms are known to have been counted, so that no forward need ask again

    @property
    def arms(self) -> list[str]:
        return [*self.domains, *(f"null{i}" for i in range(self.null_arms)), FROZEN]

    @property
    def vocab_size(self) -> int:
        return self.counts.shape[0]

    def missing(self) -> list[str]:
        """The arms that have not been counted."""
        if self.complete:
            return []
        found = [arm for arm, total in zip(self.arms, self.totals.tolist(), strict=True) if not total]
        self.complete = not found
        return found

    @torch.no_grad()
    def fit(self, counts: Mapping[str, Tensor]) -> None:
        """Take the counts (V,) of arms by name, in place of those that they had. Others keep theirs.

        A domain that comes back with the text that it had takes the place of the null arm that it left.

        Raises:
            ValueError: no such arm, counts of another vocabulary, or none; arms that would be left without counts.
        """
        for arm, given in counts.items():
            check_known("arm", arm, self.arms)
            if given.shape != (self.vocab_size,):
                raise ValueError(f"counts of {arm!r} are {tuple(given.shape)}; they must be ({self.vocab_size},)")
            if int(given.min()) < 0 or not bool(given.any()) or int(given.max()) > MOST:
                raise ValueError(f"counts of {arm!r} must be 0 to {MOST}, and not all 0")
        if lacking := [arm for arm in self.missing() if arm not in counts]:
            general = ", and general text as `general`" if FROZEN in lacking else ""
            raise ValueError(f"nothing has been counted of {lacking}; give their text too{general}")
        for arm, given in counts.items():
            first = len(self.domains)
            for null in reversed(range(first, first + self.null_arms)):
                if torch.equal(self.counts[:, null], given.to(self.counts)):
                    self._keep([i for i in range(len(self.arms)) if i != null])
                    self.null_arms -= 1
            place = self.arms.index(arm)
            self.counts[:, place] = given.to(self.counts)
            self.totals[place] = int(given.sum())
        if not self.size or all(arm in counts for arm in (*self.domains, FROZEN)):
            self.size.fill_(int(self.totals.min()))

    def add(self, name: str) -> None:
        """A domain more, not counted yet, after the others. Their counts stay."""
        place = len(self.domains)
        self._keep([*range(place), place, *range(place, len(self.arms))])
        self.counts[:, place], self.totals[place] = 0, 0
        self.domains.append(name)
        self.complete = False

    def remove(self, name: str, renormalize: bool) -> None:
        """A domain less. Its counts become those of a null arm, so that its text is left to the frozen layer."""
        place = self.domains.index(name)
        order = [i for i in range(len(self.arms)) if i != place]
        if not renormalize and int(self.totals[place]):
            order.insert(len(self.domains) - 1 + self.null_arms, place)
            self.null_arms += 1
        self._keep(order)
        self.domains.remove(name)

    def _keep(self, order: list[int]) -> None:
        self.counts, self.totals = self.counts[:, order].contiguous(), self.totals[order]

    def evidence(self, ids: Tensor, smoothing: float) -> Tensor:
        """ids (B, T) -> (B, T, A) log p(token | arm) - log p(token | general text), in float32.

        p(token | arm) is (c + smoothing) / (size + smoothing * V), c the count in a text of `size` tokens.
        """
        seen = F.embedding(ids.to(self.counts.device), self.counts).float()
        scale = self.size.float() / self.totals.float()
        logs = (seen * scale + smoothing).log()  # the denominator is the same for all arms
        return logs - logs[..., -1:]


@ROUTERS.register("counts")
class CountsRouter(PooledRouter):
    """Weights by the tokens read so far, from counts of each domain's own text (`tuner.fit_gate`).

    The router of the first layer holds the counts, those of the others follow it: each forward decides once. It reads
    `input_ids`, nothing of the model's own states, so it needs no training and has no gradient.

    Args:
        temperature: divides the log-likelihood of the text, whose tokens are not independent. 3: as measured.
        granularity: one of GRANULARITIES, over which the evidence adds up. None: "causal_prefix" where a position must
            not see later ones, else "sequence".
        smoothing: added to each count.
        convex: return what is left to the frozen layer as `base_weight`.
        null_arms: arms that removed domains have left.
        vocab_size: hold counts of so many token ids, of text of all `experts`. None: `lead` or `follow` comes.
        first: the router of the model that holds the counts, if there is one.

    Raises:
        ValueError: a value out of range, or an unknown granularity.
    """

    scopes = frozenset({"model"})
    scheduled = ("temperature",)
    without = LOSS_OPTIONS
    shares = anywhere = by_text = True
    made_by = "it counts tokens of each domain's text by fit_gate(texts, general, tokenizer=...)"

    def __init__(
        self,
        in_features: int,
        experts: list[str],
        *,
        temperature: float = 3.0,
        granularity: str | None = None,
        smoothing: float = 0.3,
        convex: bool = False,
        null_arms: int = 0,
        vocab_size: int | None = None,
        first: CountsRouter | None = None,
    ) -> None:
        super().__init__(in_features, experts)
        check_options(temperature=temperature, smoothing=smoothing, convex=convex, null_arms=null_arms)
        given = {"granularity": granularity, "vocab_size": vocab_size}
        check_options(**{name: value for name, value in given.items() if value is not None})
        if first is not None and first.table is not None and set(experts) - set(first.table.domains):
            raise ValueError(f"experts={experts} are not all among {first.table.domains}, of which the counts are")
        self.temperature, self.smoothing, self.convex = temperature, smoothing, convex
        self.chosen_granularity, self._null_arms = granularity, null_arms
        self.pooling = self._pooling(causal=True)
        self.table: TokenCounts | None = None
        self.mark = uuid4().hex  # of what it decides, in the record
        self.follow(first or self)
        if first is None and vocab_size is not None:
            self.lead(self.experts, vocab_size)

    def _pooling(self, causal: bool) -> Pooling:
        return POOLINGS[self.chosen_granularity or ("causal_prefix" if causal else "sequence")](total=True)

    def bind(self, site: Site) -> None:
        super().bind(site)
        field = self.pooling.field
        self.pooling = self._pooling(site.causal)
        self.pooling.field = field
        self.pooling.bind(site)

    # --- one table for all layers -----------------------------------------------------------------------------

    @property
    def first(self) -> CountsRouter:
        """The router whose counts this one uses; itself where it holds them."""
        return self.__dict__["_first"]

    def follow(self, first: CountsRouter) -> None:
        """Use the counts of the router `first`."""
        self.__dict__["_first"] = first  # no child: a state dict has the counts once

    def lead(self, domains: Sequence[str], vocab_size: int) -> None:
        """Hold the counts, of text of all these domains."""
        self.table = TokenCounts(domains, vocab_size, self._null_arms)

    def take_table(self, other: CountsRouter) -> None:
        """Hold the counts in place of `other`."""
        self.table, other.table = other.table, None

    @property
    def counted(self) -> TokenCounts:
        """The counts. Raises ValueError where the router has none yet."""
        table = self.first.table
        lacking: list[str] = []
        if table is not None and not torch.compiler.is_compiling():  # a graph cannot ask for values
            lacking = table.missing()
        if table is None or lacking:
            raise ValueError(
                f"router 'counts' at {self.path!r} has not counted any text of {lacking or self.experts}: call "
                "tuner.fit_gate({domain: texts}, general=texts)"
            )
        return table

    @property
    def null_arms(self) -> int:
        """Those of the model, at the layer that holds the counts."""
        return 0 if self.table is None else self.table.null_arms

    @property
    def arms(self) -> list[str]:
        return [*self.experts, FROZEN] if self.first.table is None else self.first.table.arms

    # --- domains that come and go -----------------------------------------------------------------------------

    def add_expert(self, name: str, share: float) -> None:
        """A new arm; it has to be counted before the next forward (`share` is for learned routers).

        Raises:
            ValueError: the name is taken.
        """
        check_free("expert", name, self.experts)
        self.experts.append(name)
        table = self.first.table
        if table is not None and name not in table.domains:  # the first layer that gets it does so for all
            table.add(name)

    def start_at(self, share: float) -> None:
        """Nothing to start at: weights come from counts."""

    def remove_expert(self, name: str, renormalize: bool) -> None:
        """Drop an arm: text of its kind is left to the frozen layer, or to the others where `renormalize`."""
        self.experts.remove(name)
        table = self.first.table
        if table is not None and name in table.domains:
            table.remove(name, renormalize)

    def reorder(self, names: list[str]) -> None:
        """Put the experts into the order of `names`. Raises ValueError for other names than theirs."""
        if sorted(names) != sorted(self.experts):
            raise ValueError(f"names={list(names)} must be the experts {self.experts}, in any order")
        self.experts = list(names)

    # --- routing ----------------------------------------------------------------------------------------------

    def forward(self, tokens: Tensor, context: ForwardContext) -> Routing:
        table, rows = self.counted, tokens.numel() // tokens.shape[-1]
        logits = self._logits(table, context)
        if logits.shape[0] != rows:
            raise ValueError(
                f"router 'counts' at {self.path!r} reads {rows} rows of hidden states for {logits.shape[0]} tokens of "
                "input_ids, and cannot tell which is which: leave it out (exclude_modules)"
            )
        logits = logits.to(tokens.device)
        probs = (logits / self.temperature).softmax(-1)
        weights = torch.cat([probs[:, i : i + 1] for i in map(table.domains.index, self.experts)], 1)
        base_weight = 1 - weights.sum(1) if self.convex else None
        return Routing(weights=weights, base_weight=base_weight, probs=probs, logits=logits)

    def _logits(self, table: TokenCounts, context: ForwardContext) -> Tensor:
        """(N, A) evidence of each token's text, computed by the first layer of the stack that runs."""
        decided, key = context.record.decided, f"{self.first.mark}/{self.stack}"
        if key not in decided:
            stream = context.stream(self.stack)
            ids = self._ids(stream, table.vocab_size)
            decided[key] = self.pooling(_as_they_are, table.evidence(ids, self.smoothing), context)
        return decided[key]

    def _ids(self, stream: Stream, vocab_size: int) -> Tensor:
        ids = stream.input_ids
        if ids is None:
            raise ValueError(
                f"router 'counts' at {self.path!r} reads the token ids of the text, and this forward has none of them "
                "(inputs_embeds only): pass input_ids, or use a router that reads hidden states"
            )
        check_vocabulary(ids, vocab_size, "the counts are", "was the vocabulary changed after fit_gate?")
        return ids


def refuse_null_arms(cls: type[Router], options: Mapping[str, Any]) -> None:
    """Refuse null arms in a config: a counting router has those alone that removed domains left, with their counts.

    Raises:
        ValueError: the router counts, and `options` give it null arms.
    """
    if issubclass(cls, CountsRouter) and options.get("null_arms"):
        raise ValueError(
            f"num_null_experts (null_arms) is {options['null_arms']}: router 'counts' weighs each arm by its text, "
            "and a null arm has none; leave it 0 and give fit_gate `general`, text that is left to the frozen model"
        )


def _as_they_are(evidence: Tensor) -> Tensor:
    """What a pooling scores tokens with: evidence is given as logits."""
    return evidence


def count_tokens(ids: Tensor, vocab_size: int, where: str) -> Tensor:
    """ids (n,) -> (V,) how often each occurs. `where` names the text in messages.

    Raises:
        ValueError: an id that the vocabulary does not have, or none at all.
    """
    if not ids.numel():
        raise ValueError(f"{where} has no tokens")
    least, most = int(ids.min()), int(ids.max())
    if least < 0 or most >= vocab_size:
        raise ValueError(
            f"{where} holds the token id {least if least < 0 else most}; the model's are 0 to {vocab_size - 1}"
        )
    return torch.bincount(ids.long(), minlength=vocab_size)
