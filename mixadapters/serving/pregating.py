"""A router that reads tokens alone, taught by those of a mixture: what they will choose is known before they run."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mixadapters.core.evaluation import in_evaluation
from mixadapters.core.fields import finite
from mixadapters.core.model import MixtureModel
from mixadapters.core.routing import Routing, RoutingKey, chosen_experts
from mixadapters.routers import PregateRouter, build_router
from mixadapters.surgery.overspecification import mutual_information

Batch = Mapping[str, Any]  # input_ids (B, T), and attention_mask (B, T) where some tokens are padding
HARD, SMOOTHING = 0.75, 0.5  # of the loss: the share of the first choices, and their label smoothing


class PregateAgreement(NamedTuple):
    """How far a pre-gate says what the routers of a mixture choose, on tokens that are no padding. By router:"""

    first: dict[RoutingKey, float]  # share of tokens whose first choice is the same
    covered: dict[RoutingKey, float]  # share of the chosen experts that the plan has: what a prefetch by it would hit
    between: dict[RoutingKey, float]  # nats that the first choice of the router before it tells of its own

    @property
    def mean_first(self) -> float:
        return sum(self.first.values()) / len(self.first)

    @property
    def mean_covered(self) -> float:
        return sum(self.covered.values()) / len(self.covered)


def distill_pregate(
    model: nn.Module,
    batches: Iterable[Batch],
    router: PregateRouter | Mapping[str, Any] | None = None,
    *,
    adapter: str = "default",
    lr: float = 1e-2,
) -> PregateRouter:
    """Train one pre-gate for all layers to choose as the routers of a mixture, which read hidden states, do.

    Its target is the mean of their distributions over experts: 3/4 cross-entropy with the likeliest expert, smoothed
    by a half, and 1/4 with the distribution (Cai et al. 2024, Read-ME, arXiv 2410.19123, where the target is the
    overlap of active channels). One step of Adam for each batch. The model stays as it is.

    Args:
        model: a PeftModel with a mixture (MoA, MixDA).
        batches: input_ids (B, T), and attention_mask (B, T) where some tokens are padding.
        router: the one that learns; or options of a new one, which has the model's vocabulary, reads each token by
            itself and chooses 2 experts unless they say otherwise.
        adapter: the mixture's.
        lr: of Adam.

    Returns:
        The router, in evaluation. `plan` gives its routes.

    Raises:
        ValueError: no mixture of that name, whose routers all number the same experts; a router of other experts, or
            with null arms; batches without input_ids, or none; lr that is not above 0.
    """
    if not finite(lr) or lr <= 0:
        raise ValueError(f"lr={lr!r} must be a number above 0")
    tuner, names = _mixture(model, adapter)
    if not isinstance(router, PregateRouter):
        router = _new(model, names, dict(router or {}))
    if list(router.arms) != names:
        raise ValueError(f"router: its arms {list(router.arms)} must be the mixture's experts, {names}, in this order")
    optimizer, steps = torch.optim.Adam(router.parameters(), lr), 0
    router.eval()  # its granularity, temperature ... as in use, without noise
    for batch in batches:
        target = torch.stack([seen.shares for seen in _watched(model, tuner, adapter, batch).values()]).mean(0)
        with torch.enable_grad():
            logits = router.read(*_read(batch)).logits
            assert logits is not None
            logits, target = logits[_real(batch)], target.to(logits.device)
            hard = F.cross_entropy(logits, target.argmax(1), label_smoothing=SMOOTHING)
            loss = HARD * hard + (1 - HARD) * F.cross_entropy(logits, target)
            optimizer.zero_grad()
            loss.backward()
        optimizer.step()
        steps += 1
    if not steps:
        raise ValueError("batches is empty: there is nothing to learn from")
    return router


@torch.no_grad()
def pregate_agreement(
    router: PregateRouter, model: nn.Module, batches: Iterable[Batch], *, adapter: str = "default"
) -> PregateAgreement:
    """How far a pre-gate says what the routers of a mixture choose on these batches. Errors of `distill_pregate`."""
    tuner, names = _mixture(model, adapter)
    if list(router.arms) != names:
        raise ValueError(f"router: its arms {list(router.arms)} must be the mixture's experts, {names}, in this order")
    same: dict[RoutingKey, list[Tensor]] = {}
    hits: dict[RoutingKey, list[Tensor]] = {}
    firsts: dict[RoutingKey, list[Tensor]] = {}
    for batch in batches:
        plan, real = router.plan(*_read(batch)), _real(batch)
        assert plan.probs is not None
        assert plan.indices is not None
        first, planned = plan.probs[real].argmax(1).cpu(), chosen_experts(plan.indices, len(names))[real].cpu()
        for key, seen in _watched(model, tuner, adapter, batch).items():
            firsts.setdefault(key, []).append(seen.shares.argmax(1))
            same.setdefault(key, []).append(firsts[key][-1] == first)
            hits.setdefault(key, []).append(planned[seen.chosen])
    if not firsts:
        raise ValueError("batches is empty: there is nothing to compare")
    choices = {key: torch.cat(parts) for key, parts in firsts.items()}
    return PregateAgreement(
        {key: float(torch.cat(parts).float().mean()) for key, parts in same.items()},
        {key: float(torch.cat(parts).float().mean()) for key, parts in hits.items()},
        {key: mutual_information(choices[before], choices[key]) for before, key in pairwise(choices)},
    )


class _Seen(NamedTuple):
    """What a router has decided on the R real tokens of a batch."""

    shares: Tensor  # (R, E) of each expert, 1 together
    chosen: Tensor  # (R, E) bool


def _watched(model: nn.Module, tuner: MixtureModel, adapter: str, batch: Batch) -> dict[RoutingKey, _Seen]:
    """What each router of the adapter makes of a batch, in the order of the layers."""
    found: dict[RoutingKey, _Seen] = {}
    experts = {key: mixture.expert_names for key, mixture in tuner.mixtures(adapter).items()}
    real = _real(batch).cpu()

    def observe(key: RoutingKey, routing: Routing, mask: Tensor | None) -> None:
        if key in experts:
            assert routing.probs is not None
            columns = [routing.arms.index(name) for name in experts[key]]  # others leave a row to the frozen layer
            probs = routing.probs[:, columns].float().cpu()[real]
            chosen = probs > 0 if routing.selected is None else routing.selected[:, columns].cpu()[real]
            found[key] = _Seen(probs / probs.sum(1, keepdim=True).clamp_min(1e-9), chosen)

    with torch.no_grad(), in_evaluation(model), _observed(tuner, observe):
        model(**{name: value for name, value in batch.items() if name in ("input_ids", "attention_mask")})
    if not found:
        raise ValueError(f"adapter={adapter!r} does not act: make it active (set_adapter)")
    return found


@contextmanager
def _observed(tuner: MixtureModel, observe: Any) -> Iterator[None]:
    tuner.context.observers.append(observe)
    try:
        yield
    finally:
        tuner.context.observers.remove(observe)


def _mixture(model: nn.Module, adapter: str) -> tuple[MixtureModel, list[str]]:
    """The tuner of an adapter, and the names of the experts that all its routers number."""
    tuner = next((module for module in model.modules() if isinstance(module, MixtureModel)), None)
    mixtures = {} if tuner is None else tuner.mixtures(adapter)
    if tuner is None or not mixtures:
        raise ValueError(
            f"adapter={adapter!r} is no mixture of {type(model).__name__}: pass a PeftModel with MoA or MixDA"
        )
    names = [list(mixture.expert_names) for mixture in mixtures.values()]
    for key, own in zip(mixtures, names, strict=True):
        if own != names[0]:
            raise ValueError(
                f"adapter={adapter!r}: one pre-gate is for all layers, and {key} has the experts {own}, others "
                f"{names[0]}"
            )
    return tuner, names[0]


def _new(model: Any, names: list[str], options: dict[str, Any]) -> PregateRouter:
    usual = {"vocab_size": model.config.get_text_config().vocab_size, "granularity": "token", "k": min(2, len(names))}
    router = build_router({**usual, **options, "kind": "pregate"}, 1, names)
    assert isinstance(router, PregateRouter)
    return router.to(next(model.parameters()).device)


def _read(batch: Batch) -> tuple[Tensor, Tensor | None]:
    if "input_ids" not in batch:
        raise ValueError(f"a batch has {sorted(batch)}, and no input_ids, which a pre-gate reads")
    return batch["input_ids"], batch.get("attention_mask")


def _real(batch: Batch) -> Tensor:
    """(B * T,) bool, the tokens that are no padding."""
    ids, mask = _read(batch)
    return torch.ones_like(ids, dtype=torch.bool).flatten() if mask is None else mask.flatten() != 0
