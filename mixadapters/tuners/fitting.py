"""Routers that are fitted without gradients: by counted tokens, or by regression on what each router reads."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mixadapters.core.context import ForwardContext
from mixadapters.core.evaluation import in_evaluation
from mixadapters.core.fields import check_integer, one_of
from mixadapters.core.inspection import RoutingVerbs
from mixadapters.core.names import UNNAMED, of_active
from mixadapters.core.registry import nearest
from mixadapters.core.routing import FROZEN
from mixadapters.core.sites import has_two_stacks
from mixadapters.routers.counts import CountsRouter, count_tokens
from mixadapters.routers.learned import LearnedRouter
from mixadapters.routers.score import exact
from mixadapters.surgery.tracing import padded

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PLACES = 16  # tokens of a text whose features a learned router is fitted on
PENALTY = 1e-4  # on the squared weights of the regression
TOKENIZED_AT_ONCE = 1000  # texts


class FittingVerbs(RoutingVerbs):
    """Part of a tuner whose adapters have routers."""

    model: nn.Module
    peft_config: dict[str, Any]

    @of_active
    def fit_gate(
        self,
        texts: Mapping[str, Any],
        general: Any = None,
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        method: str | None = None,
        max_length: int = 256,
        batch_size: int = 16,
        adapter_name: str = UNNAMED,
    ) -> dict[str, int]:
        """Fit the routers of an adapter by example text, without training.

        "counts" fits the router of that name: how often each domain's text has each token. Its text is best that of
        the domain's own training. Domains that are not named keep their counts, so one that was added needs its own
        text only. "features" fits learned routers that are linear, each by a logistic regression of the domain on what
        it reads, in one forward pass; all domains are fitted together.

        Args:
            texts: domain -> its text: strings, lists of token ids, or a dataset with a column "input_ids" or "text".
            general: text of no domain, which is to be left to the frozen model. "counts" needs it the first time.
            tokenizer: for strings. Special tokens are not counted.
            method: "counts" or "features". None: what fits the router.
            max_length: tokens of a text that "features" reads.
            batch_size: texts in a batch of "features".

        Returns:
            domain ("frozen" for general text) -> how many tokens were read.

        Raises:
            ValueError: an unknown domain or method, text that holds no tokens of the model, or no router to fit.
        """
        self.config_of(adapter_name)  # refuses unknown names
        check_integer("max_length", max_length, least=1)
        check_integer("batch_size", batch_size, least=1)
        if tokenizer is not None and not callable(tokenizer):
            raise ValueError(f"tokenizer={tokenizer!r:.80} must be a tokenizer of transformers")
        mixtures = list(self.mixtures(adapter_name).values())
        names = list(dict.fromkeys(name for mixture in mixtures for name in mixture.expert_names))
        _refuse_domains(texts, general, names)
        counting = [m.router for m in mixtures if isinstance(m.router, CountsRouter)]
        learned = [m.router for m in mixtures if isinstance(m.router, LearnedRouter) and not m.router.needs_fit]
        method = method or ("counts" if counting else "features")
        fitted: dict[str, Sequence[Any]] = {"counts": counting, "features": learned}
        one_of("method", method, fitted)
        if not fitted[method]:
            have = sorted({type(mixture.router).__name__ for mixture in mixtures})
            raise ValueError(
                f"method={method!r}: adapter {adapter_name!r} has no router that it fits, but {have}; make it with "
                "router='counts' and router_scope='model', which counts tokens, or with a router that learns"
            )
        reads = getattr(self.model, "main_input_name", "input_ids")
        if reads != "input_ids" and self._known_tokens() is None:
            raise ValueError(
                f"texts: {type(self.model).__name__} reads {reads!r} and no text: train its router (stage 'router')"
            )
        given = {**texts, **({} if general is None else {FROZEN: general})}
        rows = {arm: token_rows(text, tokenizer, _where(arm)) for arm, text in given.items()}
        if method == "counts":
            self._fit_counts(counting[0].first, rows)
            self.arms_changed(adapter_name)
        else:
            _refuse_arms(learned, names, rows)
            self._fit_features(learned, rows, max_length, batch_size)
        return {arm: sum(map(len, found)) for arm, found in rows.items()}

    def arms_changed(self, adapter_name: str) -> None:
        """For a tuner to note in its config what arms there are now."""

    # --- counted tokens ---------------------------------------------------------------------------------------

    def _fit_counts(self, router: CountsRouter, rows: Mapping[str, list[Any]]) -> None:
        table = router.table
        assert table is not None
        joined = {arm: torch.tensor(list(chain.from_iterable(found))) for arm, found in rows.items()}
        table.fit({arm: count_tokens(ids, table.vocab_size, _where(arm)) for arm, ids in joined.items()})

    def vocab_size(self) -> int:
        """How many token ids the model knows. Raises ValueError where it reads none."""
        size = self._known_tokens()
        if size is None:
            raise ValueError(f"router 'counts' counts tokens, but the config of {type(self.model).__name__} tells no "
                             "vocab_size; use another router")  # fmt: skip
        return size

    def _known_tokens(self) -> int | None:
        config: Any = getattr(self.model, "config", None)
        text = config.get_text_config() if hasattr(config, "get_text_config") else config
        size = getattr(text, "vocab_size", None)
        return size if isinstance(size, int) else None

    def settle_counts(self, adapter_name: str, domains: Iterable[str]) -> dict[str, int] | None:
        """Have the first counting router hold the counts of all `domains`, and the others follow it.

        Returns:
            {path of the first: its null arms}; None where no router counts.
        """
        found = [mixture.router for mixture in self.mixtures(adapter_name).values()]
        routers = [router for router in found if isinstance(router, CountsRouter)]
        if not routers:
            return None
        first = routers[0]
        holders = list(dict.fromkeys(router.first for router in routers if router.first.table is not None))
        if not holders:
            first.lead(list(domains), self.vocab_size())
        else:
            held = max(holders, key=_counted) if len(holders) > 1 else holders[0]
            if held is not first:
                first.take_table(held)
        table = first.table
        assert table is not None
        for router in routers:
            router.follow(first)
            if router is not first:
                router.table = None
        for name in domains:
            if name not in table.domains:
                table.add(name)
        return {first.path: table.null_arms} if table.null_arms else {}

    # --- regression -------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _fit_features(
        self, routers: Sequence[LearnedRouter], rows: Mapping[str, list[Any]], max_length: int, batch_size: int
    ) -> None:
        if has_two_stacks(self.model):
            raise ValueError("method='features' reads text through one stack, and this model has an encoder and a "
                             "decoder; use router='counts', or train the router")  # fmt: skip
        for router in routers:
            if len(router.hidden) > 1 or router.activation is not None:
                raise ValueError(
                    f"method='features' fits linear routers; that at {router.path!r} has hidden layers or an "
                    "activation"
                )
        reader = _Reader(self.context)
        hooks = [router.register_forward_pre_hook(reader) for router in routers]
        try:
            with in_evaluation(self.model):
                for arm, found in rows.items():
                    reader.arm = arm
                    for start in range(0, len(found), batch_size):
                        batch = [row[:max_length] for row in found[start : start + batch_size]]
                        self.model(**padded(self.model, batch))
        finally:
            for hook in hooks:
                hook.remove()
        if silent := [router.path for router in routers if router not in reader.seen]:
            raise ValueError(f"method='features': the routers at {silent} did not run; set_adapter to theirs first")
        for router in routers:
            weight, bias = _regression(router, reader.seen[router])
            router.output.weight.copy_(weight * router.temperature)
            router.output.bias.copy_(bias * router.temperature)


def _refuse_domains(texts: Any, general: Any, names: Sequence[str]) -> None:
    """Raise ValueError where `texts` is no text of the domains `names`, or nothing is given."""
    if not isinstance(texts, Mapping) or not (texts or general is not None):
        raise ValueError(f"texts={texts!r:.80} must map domains to their text")
    for name in texts:
        if name not in names:
            raise ValueError(f"texts: unknown domain {name!r}; have {names}.{nearest(name, names)}")


def _refuse_arms(routers: Sequence[LearnedRouter], names: Sequence[str], rows: Mapping[str, Any]) -> None:
    """Raise ValueError where `rows` lack a kind of text that routers of the domains `names` tell apart."""
    leaves = any(FROZEN in router.arms or not router.competes for router in routers)
    if FROZEN in rows and not leaves:
        raise ValueError("general: these routers have no arm that leaves text to the frozen model; give none")
    if lacking := [name for name in ([*names, FROZEN] if leaves else names) if name not in rows]:
        raise ValueError(f"method='features' fits all arms together; give the text of {lacking} too")


class _Reader:
    """Keeps what each router makes its logits of, at some tokens of each text."""

    def __init__(self, context: ForwardContext) -> None:
        self.context, self.arm = context, ""
        self.seen: dict[nn.Module, list[tuple[str, Tensor]]] = {}

    def __call__(self, router: Any, args: tuple) -> None:
        read = router.pooling(lambda read: exact(read, router.normalize), args[0], self.context)  # (N, d)
        mask = self.context.stream(router.stack).mask
        assert mask is not None
        for row, real in zip(read.unflatten(0, mask.shape), mask, strict=True):
            places = real.nonzero()[:, 0]
            one = router.granularity in ("sequence", "request")  # all tokens of the text decide alike
            steps = torch.linspace(0, len(places) - 1, 1 if one else min(PLACES, len(places))).round().long()
            self.seen.setdefault(router, []).append((self.arm, row[places[steps.to(places.device)]].cpu()))


def _regression(router: LearnedRouter, seen: list[tuple[str, Tensor]]) -> tuple[Tensor, Tensor]:
    """Weight (A, d) and bias (A,) of the logistic regression of the arm on features; every kind of text counts alike.

    Text of a domain that has no expert here is left to the frozen layer, as general text is.
    """
    arms = router.arms
    kinds = list(dict.fromkeys(arm for arm, _ in seen))
    target = torch.zeros(len(kinds), len(arms), dtype=torch.float64)
    for row, arm in zip(target, kinds, strict=True):
        if (own := arm if arm in router.experts else FROZEN) in arms:
            row[arms.index(own)] = 1
    kind = torch.cat([torch.full((len(features),), kinds.index(arm)) for arm, features in seen])
    x, y = torch.cat([features for _, features in seen]).double(), target[kind]
    share = 1 / (torch.bincount(kind) * len(kinds)).double()[kind]
    weight = torch.zeros(len(arms), x.shape[1], dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(len(arms), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=200, line_search_fn="strong_wolfe")

    @torch.enable_grad()
    def loss() -> Tensor:
        optimizer.zero_grad()
        logits = x @ weight.T + bias
        if not router.competes:
            losses = F.binary_cross_entropy_with_logits(logits, y, reduction="none").sum(-1)
        else:
            losses = -(y * logits.log_softmax(-1)).sum(-1)
        total = (share * losses).sum() + PENALTY * weight.square().sum()
        total.backward()
        return total

    optimizer.step(loss)
    return weight.detach(), bias.detach()


def token_rows(texts: Any, tokenizer: PreTrainedTokenizerBase | None, where: str) -> list[list[int]]:
    """Token ids of each text, whatever form it is given in; texts without tokens are left out.

    Raises:
        ValueError: one string, no text, rows of several or of other forms, or strings without a tokenizer.
    """
    if isinstance(texts, (str, bytes, Mapping)) or not isinstance(texts, Iterable):
        raise ValueError(f"{where} is {texts!r:.60}, a {type(texts).__name__}; give a list of texts or a dataset")
    rows = [_content(row, where) for row in texts]
    strings = [isinstance(row, str) for row in rows]
    if any(strings):
        if not all(strings):
            raise ValueError(f"{where} holds strings and token ids; give one kind")
        if tokenizer is None:
            raise ValueError(f"{where} holds strings: pass tokenizer, or lists of token ids")
        starts = range(0, len(rows), TOKENIZED_AT_ONCE)
        pieces = [rows[start : start + TOKENIZED_AT_ONCE] for start in starts]
        encoded = (tokenizer(piece, add_special_tokens=False, verbose=False)["input_ids"] for piece in pieces)
        rows = [row for piece in encoded for row in piece]
    found = [row for row in rows if len(row)]
    if not found:
        raise ValueError(f"{where} has no tokens")
    return found


def _content(row: Any, where: str) -> Any:
    """The text of a row as a string, or as a list of token ids without padding."""
    mask = None
    if isinstance(row, Mapping):
        column = next((name for name in ("input_ids", "text") if name in row), None)
        if column is None:
            raise ValueError(f"{where} has rows with the columns {sorted(map(str, row))}: 'input_ids' or 'text' is "
                             "needed")  # fmt: skip
        row, mask = row[column], row.get("attention_mask") if column == "input_ids" else None
    if isinstance(row, str):
        return row
    ids = row
    if hasattr(row, "tolist"):
        ids = row.tolist()
    elif isinstance(row, Sequence):
        ids = list(row)
    if not isinstance(ids, list) or not all(type(i) is int for i in ids):
        raise ValueError(f"{where} holds {row!r:.60}; a text is a string or a list of token ids")
    return ids if mask is None else [i for i, real in zip(ids, mask, strict=True) if real]


def _counted(router: CountsRouter) -> int:
    return 0 if router.table is None else int(router.table.totals.sum())


def _where(arm: str) -> str:
    return "general" if arm == FROZEN else f"texts[{arm!r}]"
