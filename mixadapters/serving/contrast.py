"""Decoding by contrast: what the model says, less what a weaker form of it says."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from math import log
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LogitsProcessor

from mixadapters.core.cache import CACHE
from mixadapters.core.context import ROUTES, ForwardContext
from mixadapters.core.fields import finite
from mixadapters.core.hooks import root_of
from mixadapters.core.mixture import Mixture
from mixadapters.core.registry import nearest
from mixadapters.core.routing import Routing, RoutingKey, with_distribution
from mixadapters.core.streams import Stream
from mixadapters.serving.pooled_states import positions, with_adapter, without_adapters

WEAK = ("adapters_off", "adapter", "rank", "experts")


class SelfContrastLogitsProcessor(LogitsProcessor):
    """Logits of the model, moved away from those of a weaker form of itself, which has a cache of its own.

        z = (1 + beta) z_strong - beta z_weak   where z_strong >= max(z_strong) + log(alpha), -inf elsewhere

        contrast = SelfContrastLogitsProcessor(model, weak={"rank": 2})
        model.generate(**inputs, logits_processor=[contrast])

    Prompts may be padded on the left, and beams are followed. Scores of beams are no log-probabilities any more:
    `renormalize_logits=True` makes them that.

    Source: Shi et al. 2024 (SCMoE, arXiv 2405.14507).

    Args:
        model: the causal model that generates, with adapters or a mixture of experts of its own.
        weak: what the weaker form is, one of
            {"adapters_off": True}: the base model;
            {"adapter": "name"}: another adapter of the model;
            {"rank": k}: in every routed layer the one expert that the router ranks k-th, with weight 1;
            {"experts": [...]}: in every routed layer these experts, by name or number, with equal weights.
        alpha: how far below the largest probability a token may be and stay, above 0 to 1.
        beta: strength, 0 or more.

    Raises:
        ValueError: a value out of range, an encoder-decoder model, or a weak form that this model does not have.
    """

    def __init__(self, model: nn.Module, weak: Mapping[str, Any], *, alpha: float = 0.1, beta: float = 0.5) -> None:
        if not (finite(alpha) and 0 < alpha <= 1):
            raise ValueError(f"alpha={alpha!r} must be a number above 0 and at most 1")
        if not (finite(beta) and beta >= 0):
            raise ValueError(f"beta={beta!r} must be a number of 0 or more")
        self.model, self.root = model, root_of(model)
        if getattr(getattr(self.root, "config", None), "is_encoder_decoder", False):
            raise ValueError("self-contrast needs a causal model: the encoder would have to run again, weakened")
        self.alpha, self.beta = float(alpha), float(beta)
        self.context = ForwardContext.of(self.root)
        self._weakened = weakened(model, weak)
        self._seen: Tensor | None = None  # (R, T) the tokens so far, all of which the weak form has read
        self._mask: Any = None  # (R, T) of them
        self._cache: Any = None  # of the weak form

    @torch.no_grad()
    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """input_ids (R, T), scores (R, V) of the strong form -> (R, V).

        Raises:
            ValueError: `input_ids` do not go on from the step before, such as drafts of an assistant.
        """
        stream = self.context.stream()
        if not stream.cached and stream.length == input_ids.shape[1] and stream.batch == len(input_ids):
            self._begin(input_ids, stream)
        else:
            self._follow(input_ids)
        weak = self._weak_logits(input_ids).to(scores.device)
        strong = scores.float()
        # On one scale, over the tokens that may come: in beam search scores are log-probabilities, and processors
        # before this one have ruled tokens out.
        weak = weak.masked_fill(strong == -torch.inf, -torch.inf)
        weak = weak.log_softmax(-1) + strong.logsumexp(-1, keepdim=True)
        plausible = strong >= strong.amax(-1, keepdim=True) + log(self.alpha)
        contrast = (1 + self.beta) * strong - self.beta * weak
        return torch.where(plausible, contrast, -torch.inf).to(scores.dtype)

    def _begin(self, input_ids: Tensor, stream: Stream) -> None:
        """A prompt, or a whole sequence where the strong form keeps no cache."""
        media = torch.tensor(self.context.placeholders, device=input_ids.device)
        if bool(torch.isin(input_ids, media).any()):
            raise ValueError(
                "the prompt holds images or sounds, which the weak form would not see: self-contrast is for text alone"
            )
        self._seen, self._cache = None, None
        self._mask = torch.ones_like(input_ids) if stream.mask is None else stream.mask.to(input_ids)

    def _follow(self, input_ids: Tensor) -> None:
        """Bring the weak cache in the order of the rows, which beams change."""
        seen = self._seen
        if seen is None or input_ids.shape != (len(seen), seen.shape[1] + 1):
            raise ValueError(
                f"self-contrast reads one token after another, and got {tuple(input_ids.shape)} after "
                f"{None if seen is None else tuple(seen.shape)}: use no assistant, no prefill_chunk_size and no cache "
                "that is filled already"
            )
        self._mask = nn.functional.pad(self._mask, (0, 1), value=1)
        if bool((input_ids[:, :-1] == seen).all()):
            return
        copies = self.context.record.copies
        order = torch.arange(len(seen), device=seen.device)
        for row, tokens in enumerate(input_ids[:, :-1]):
            first = row - row % copies  # rows of one request stand together
            equal = (seen[first : first + copies] == tokens).all(1).nonzero()
            if not len(equal):
                raise ValueError(f"row {row} goes on from none of the rows of the step before")
            order[row] = first + equal[0, 0]
        self._cache.reorder_cache(order)

    def _weak_logits(self, input_ids: Tensor) -> Tensor:
        """(R, V) of the weak form after these tokens, in fp32."""
        known = 0 if self._seen is None else self._seen.shape[1]
        more = {CACHE: self._cache}
        if "position_ids" in self.context.argument_names:
            more["position_ids"] = positions(self._mask)[:, known:]
        with self._weakened(len(input_ids) // self.context.record.copies):
            output = self.root(
                input_ids=input_ids[:, known:], attention_mask=self._mask, use_cache=True, **more,
            )  # fmt: skip
        self._cache, self._seen = output[CACHE], input_ids
        return output.logits[:, -1].float()


Weakened = Callable[[int], Any]  # requests of a forward -> a block, inside which forwards are the weak form's
Choice = Callable[[Tensor], Tensor]  # (N, E) how much a router gives to each expert -> (N, k) the weak form's experts


def weakened(model: nn.Module, weak: Mapping[str, Any]) -> Weakened:
    """The blocks of a weak form; see `SelfContrastLogitsProcessor`.

    Raises:
        ValueError: none of the forms, or one that this model does not have.
    """
    if not isinstance(weak, Mapping) or len(weak) != 1 or next(iter(weak)) not in WEAK:
        raise ValueError(f"weak={weak!r} must have one entry, of {', '.join(WEAK)}")
    ((form, value),) = weak.items()
    if form in ("adapters_off", "adapter"):
        return _by_adapter(model, form, value)
    mixtures = _mixtures(model)
    if mixtures:
        choices = {
            key: _choice(form, value, list(mixture.expert_names), str(key)) for key, mixture in mixtures.items()
        }
        return _through_mixtures(model, mixtures, choices)
    routers = _base_routers(model)
    if not routers:
        raise ValueError(f"weak={weak!r}: no layer of this model chooses between experts")
    by_router = {
        router: _choice(form, value, [str(e) for e in range(experts)], path)
        for path, (router, experts) in routers.items()
    }
    return _through_routers(by_router)


def _by_adapter(model: nn.Module, form: str, value: Any) -> Weakened:
    known = getattr(model, "peft_config", {})
    if not known:
        raise ValueError(f"weak={{{form!r}: {value!r}}} needs a PEFT model, with its adapters: pass that")
    if form == "adapters_off":
        if value is not True:
            raise ValueError(f"adapters_off={value!r} must be True, or another form of weak")
        return lambda requests: without_adapters(model, requests)
    if value not in known:
        raise ValueError(f"adapter={value!r} is unknown; have {list(known)}.{nearest(str(value), known)}")
    return lambda requests: with_adapter(model, value, requests)


def _mixtures(model: nn.Module) -> dict[RoutingKey, Mixture]:
    tuner: Any = getattr(model, "base_model", None)
    return tuner.mixtures() if hasattr(tuner, "mixtures") else {}


def _choice(form: str, value: Any, experts: list[str], where: str) -> Choice:
    """The experts of one layer, from what its router gives to each.

    Raises:
        ValueError: there are not so many, or none of this name.
    """
    if form == "rank":
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= len(experts):
            raise ValueError(f"rank={value!r} must be a whole number of 1 to {len(experts)}, the experts of {where}")
        return lambda given: given.topk(value, dim=1).indices[:, -1:]
    numbers = []
    named = value if isinstance(value, (list, tuple)) and value else [value]
    for one in named:
        number = experts.index(one) if one in experts else one
        if not isinstance(number, int) or isinstance(number, bool) or not 0 <= number < len(experts):
            raise ValueError(f"experts={value!r}: {one!r} is no expert of {where}; have {experts}")
        numbers.append(number)
    return lambda given: torch.tensor(numbers, device=given.device).expand(len(given), -1)


def _through_mixtures(
    model: nn.Module, mixtures: Mapping[RoutingKey, Mixture], choices: Mapping[RoutingKey, Choice]
) -> Weakened:
    context = ForwardContext.of(model)

    def changed(mixture: Mixture, choose: Choice, routing: Routing) -> Routing:
        names = mixture.expert_names
        given = next(t for t in (routing.probs, routing.weights, routing.indices) if t is not None)
        whole = with_distribution(routing, names, names, len(given), given.device)
        assert whole.probs is not None
        indices = choose(whole.probs[:, : len(names)])
        weights = whole.probs.new_full(indices.shape, 1 / indices.shape[1])
        base_weight = None if routing.base_weight is None else torch.zeros_like(routing.base_weight)
        return routing._replace(indices=indices, weights=weights, base_weight=base_weight, run=1)

    changes = {key: partial(changed, mixture, choices[key]) for key, mixture in mixtures.items()}

    def block(requests: int) -> Any:
        return context.pin_in_thread(**{ROUTES: {**context.held.get(ROUTES, {}), **changes}})

    return block


def _base_routers(model: nn.Module) -> dict[str, tuple[nn.Module, int]]:
    """path -> (router, how many experts it has) of a base model's own mixtures."""
    found = {}
    for path, module in root_of(model).named_modules():
        if type(module).__name__.lower().endswith("router"):
            rows = next((p for p in module.parameters() if p.dim() == 2), None)
            if rows is not None:
                found[path] = (module, len(rows))
    return found


def _through_routers(choices: Mapping[nn.Module, Choice]) -> Weakened:
    """For the routers of transformers, which give (logits (N, E), weights (N, k), indices (N, k))."""

    @contextmanager
    def block(requests: int) -> Iterator[None]:
        thread = threading.get_ident()

        def change(module: nn.Module, args: tuple, output: Any) -> Any:
            if threading.get_ident() != thread:
                return None
            logits, weights, indices = _read(module, output)
            chosen = choices[module](logits)
            return logits, weights.new_full(chosen.shape, 1 / chosen.shape[1]), chosen.to(indices.dtype)

        with ExitStack() as stack:
            for router in choices:
                stack.callback(router.register_forward_hook(change).remove)
            yield

    return block


def _read(module: nn.Module, output: Any) -> tuple[Tensor, Tensor, Tensor]:
    """What a router of transformers gives. Raises ValueError where it chooses by something else than its logits."""
    parts: Any = output if isinstance(output, tuple) and len(output) == 3 else (None,) * 3
    logits, weights, indices = parts
    if not all(isinstance(part, Tensor) and part.dim() == 2 for part in parts) or indices.is_floating_point():
        raise ValueError(
            f"{type(module).__name__} gives no logits, weights and indices, so its choice cannot be changed"
        )
    chosen = logits.float().gather(1, indices.long()).sort(1, descending=True).values
    if not torch.allclose(chosen, logits.float().topk(indices.shape[1], dim=1).values, atol=1e-3):
        raise ValueError(
            f"{type(module).__name__} does not choose by its logits alone: its experts have no rank there"
        )
    return logits, weights, indices
