"""A router that reads tokens alone, taught by those of a mixture: what they will choose is known before they run."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mixadapters.core.evaluation import in_evaluation
from mixadapters.core.fields import check_kind, finite
from mixadapters.core.model import MixtureModel
from mixadapters.core.names import UNNAMED
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
    adapter: str = UNNAMED,
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
        adapter: the mixture's; not given: the active one.
        lr: of Adam.

    Returns:
        The router, in evaluation. `plan` gives its routes.

    Raises:
        ValueError: no mixture of that name, whose routers all number the same experts; a router of other experts, or
            with null arms; batches without input_ids, or none; lr that is not above 0.
    """
    tuner, names = _common_experts(model, adapter)
    if not isinstance(router, PregateRouter):
        router = _new(model, names, router or {})
    _check_arms(router, names)
    _teach(model, tuner, adapter, batches, [(router, tuple(tuner.mixtures(adapter)))], lr)
    return router


def distill_layer_pregates(
    model: nn.Module,
    batches: Iterable[Batch],
    options: Mapping[str, Any] | None = None,
    *,
    adapter: str = UNNAMED,
    lr: float = 1e-2,
) -> dict[RoutingKey, PregateRouter]:
    """Train a pre-gate for each router of a mixture: heads of their own on one embedding and one MLP.

    Each learns from its own router alone, by the loss of `distill_pregate`, whose arguments and errors these are; the
    experts of layers may differ here.

    Returns:
        The routers by the keys of those that they have learned from. `pin_routes` takes their plans.
    """
    tuner, mixtures = _mixtures(model, adapter)
    trunk: PregateRouter | None = None
    routers: dict[RoutingKey, PregateRouter] = {}
    for key, mixture in mixtures.items():
        routers[key] = _new(model, list(mixture.expert_names), options or {})
        _check_arms(routers[key], mixture.expert_names)
        trunk = trunk or routers[key]
        routers[key].embedding, routers[key].hidden = trunk.embedding, trunk.hidden
    _teach(model, tuner, adapter, batches, [(router, (key,)) for key, router in routers.items()], lr)
    return routers


Lesson = tuple[PregateRouter, tuple[RoutingKey, ...]]  # a pre-gate, and the routers whose mean it learns


def _teach(
    model: nn.Module, tuner: MixtureModel, adapter: str, batches: Iterable[Batch], lessons: list[Lesson], lr: float
) -> None:
    check_kind("batches", batches, Iterable, "a list, or another iterable, of batches")
    if not finite(lr) or lr <= 0:
        raise ValueError(f"lr={lr!r} must be a number above 0")
    parameters = dict.fromkeys(parameter for router, _ in lessons for parameter in router.parameters())
    optimizer, steps = torch.optim.Adam(parameters, lr), 0
    for router, _ in lessons:
        router.eval()  # its granularity, temperature ... as in use, without noise
    for batch in batches:
        seen = _watched(model, tuner, adapter, batch)
        with torch.enable_grad():
            losses = [
                _loss(router, batch, torch.stack([seen[key].shares for key in keys]).mean(0))
                for router, keys in lessons
            ]
            optimizer.zero_grad()
            torch.stack(losses).mean().backward()
        optimizer.step()
        steps += 1
    if not steps:
        raise ValueError("batches is empty: there is nothing to learn from")


def _loss(router: PregateRouter, batch: Batch, target: Tensor) -> Tensor:
    """target (R, E): the distribution over experts that it should have, of real tokens."""
    logits = router.read(*_read(batch)).logits
    assert logits is not None
    logits, target = logits[_real(batch)], target.to(logits.device)
    hard = F.cross_entropy(logits, target.argmax(1), label_smoothing=SMOOTHING)
    return HARD * hard + (1 - HARD) * F.cross_entropy(logits, target)


@torch.no_grad()
def pregate_agreement(
    router: PregateRouter | Mapping[RoutingKey, PregateRouter],
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    adapter: str = UNNAMED,
) -> PregateAgreement:
    """How far a pre-gate, or one for each router, says what the routers of a mixture choose on these batches.

    Errors of `distill_pregate`; and pre-gates of other routers than the mixture has.
    """
    tuner, mixtures = _mixtures(model, adapter)
    routers = dict.fromkeys(mixtures, router) if isinstance(router, PregateRouter) else router
    check_kind("router", routers, Mapping, "a PregateRouter, or a dict of them by the keys of routers")
    check_kind("batches", batches, Iterable, "a list, or another iterable, of batches")
    if routers.keys() != mixtures.keys():
        raise ValueError(f"router: {sorted(map(str, routers))} are not the mixture's, {sorted(map(str, mixtures))}")
    for key, mixture in mixtures.items():
        _check_arms(routers[key], mixture.expert_names)
    same: dict[RoutingKey, list[Tensor]] = {}
    hits: dict[RoutingKey, list[Tensor]] = {}
    firsts: dict[RoutingKey, list[Tensor]] = {}
    for batch in batches:
        plans = {one: one.plan(*_read(batch)) for one in routers.values()}
        real = _real(batch)
        for key, seen in _watched(model, tuner, adapter, batch).items():
            plan = plans[routers[key]]
            assert plan.probs is not None
            assert plan.indices is not None
            first = plan.probs[real].argmax(1).cpu()
            planned = chosen_experts(plan.indices, seen.shares.shape[1])[real].cpu()
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


def _mixtures(model: nn.Module, adapter: str) -> tuple[MixtureModel, dict[RoutingKey, Any]]:
    """The tuner of an adapter, and its mixtures by the keys of their routers."""
    check_kind("model", model, nn.Module, "a PeftModel with MoA or MixDA")
    check_kind("adapter", adapter, str, "the name of an adapter")
    tuner = next((module for module in model.modules() if isinstance(module, MixtureModel)), None)
    mixtures = {} if tuner is None else tuner.mixtures(adapter)
    if tuner is None or not mixtures:
        raise ValueError(
            f"adapter={adapter!r} is no mixture of {type(model).__name__}: pass a PeftModel with MoA or MixDA"
        )
    return tuner, mixtures


def _common_experts(model: nn.Module, adapter: str) -> tuple[MixtureModel, list[str]]:
    """The tuner of an adapter, and the names of the experts that all its routers number."""
    tuner, mixtures = _mixtures(model, adapter)
    names = [list(mixture.expert_names) for mixture in mixtures.values()]
    for key, own in zip(mixtures, names, strict=True):
        if own != names[0]:
            raise ValueError(
                f"adapter={adapter!r}: one pre-gate is for all layers, and {key} has the experts {own}, others "
                f"{names[0]}; distill_layer_pregates makes one for each"
            )
    return tuner, names[0]


def _check_arms(router: PregateRouter, names: Sequence[str]) -> None:
    if list(router.arms) != list(names):
        raise ValueError(
            f"router: its arms {list(router.arms)} must be the mixture's experts, {list(names)}, in this order"
        )


def _new(model: Any, names: list[str], options: Any) -> PregateRouter:
    check_kind("options", options, Mapping, "a dict of options of PregateRouter")
    usual = {"vocab_size": model.config.get_text_config().vocab_size, "granularity": "token", "k": min(2, len(names))}
    router = build_router({**usual, **options, "kind": "pregate"}, 1, names)
    assert isinstance(router, PregateRouter)
    return router.to(next(model.parameters()).device)


def _read(batch: Batch) -> tuple[Tensor, Tensor | None]:
    check_kind("batch", batch, Mapping, "a batch by name: a list of batches is given, and each is a dict")
    if "input_ids" not in batch:
        raise ValueError(f"a batch has {sorted(batch)}, and no input_ids, which a pre-gate reads")
    return batch["input_ids"], batch.get("attention_mask")


def _real(batch: Batch) -> Tensor:
    """(B * T,) bool, the tokens that are no padding."""
    ids, mask = _read(batch)
    return torch.ones_like(ids, dtype=torch.bool).flatten() if mask is None else mask.flatten() != 0
