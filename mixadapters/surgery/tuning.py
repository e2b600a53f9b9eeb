"""Switch experts off, force them on, or scale them; and find those that one kind of text uses and another does not.

Source: MoTE, "mixture of tunable experts" (Dahlke et al. 2025, arXiv 2502.11096), where a handful of experts of
DeepSeek-R1 carries its refusals. There the experts are ranked by sums over the tokens of a prompt, here by shares of
the choices, since prompts of different lengths would differ by that alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mixadapters.core.evaluation import in_evaluation
from mixadapters.core.fields import check_kind, finite, one_of
from mixadapters.core.mixture import Mixture
from mixadapters.core.registry import nearest
from mixadapters.core.routing import Routing, chosen_experts
from mixadapters.routers.learned import LearnedRouter
from mixadapters.routers.tree import TreeRouter
from mixadapters.surgery.blocks import BaseExperts
from mixadapters.surgery.layers import ExpertLayer, expert_layers, require_layers
from mixadapters.surgery.mixtures import MixtureExperts, deciding_router
from mixadapters.surgery.usage import ExpertUsage, check_is_usage, record_usage
from mixadapters.surgery.view import batches_of, check_model

MODES = ("zero", "mask")
SCORES = ("count", "weight")
_PLACE = ["model.layers.0.mlp.down_proj", "law"]
WRITTEN = {"off": [_PLACE], "on": [[*_PLACE, 0.5]], "scale": [[*_PLACE, 2.0]]}  # what a config may hold


class Ranked(NamedTuple):
    """An expert, and how much more one kind of text uses it than another."""

    layer: str  # `ExpertLayer.key`
    expert: str
    difference: float


# (layer, expert), or the beginning of a longer tuple, such as `Ranked`; or the name of an expert, in every layer.
Place = Sequence[Any]


@dataclass(frozen=True)
class LayerTuning:
    """What is done to the choices of one layer. Experts go by name, so that others may come and go."""

    off: tuple[str, ...] = ()  # they get nothing; the row's others get as much more
    on: Mapping[str, float] = field(default_factory=dict)  # they get this share of the weight of every row's experts
    scale: Mapping[str, float] = field(default_factory=dict)  # factors on their weights, in the end
    kept: bool = False  # whether a config holds it, and not a block

    def __call__(self, routing: Routing, names: list[str]) -> Routing:
        weights = _weights_of(routing, len(names))
        if routing.indices is None:
            every = torch.arange(len(names), device=weights.device).expand(len(weights), -1)
            return routing._replace(weights=self.choose(every, weights, names)[1])
        slots, weights = self.choose(routing.indices, weights, names)
        slots = slots.masked_fill(torch.isin(slots, self.numbers(self.off, names, slots)), -1)
        selected = routing.selected
        if selected is not None:
            selected = torch.cat([chosen_experts(slots, len(names)), selected[:, len(names) :]], 1)
        return routing._replace(indices=slots, weights=weights, selected=selected, run=1)

    def choose(self, indices: Tensor, weights: Tensor, names: Sequence[str]) -> tuple[Tensor, Tensor]:
        """indices, weights (N, k) -> the same, of other choices. Those that are off keep their slots, of weight 0."""
        whole = torch.where(indices >= 0, weights, 0).sum(1, keepdim=True)
        off = torch.isin(indices, self.numbers(self.off, names, indices))
        weights = _with_sum(torch.where(off | (indices < 0), 0, weights), whole)
        forced = torch.zeros_like(off)
        for name, share in self.on.items():
            if name not in names:
                continue
            number = list(names).index(name)
            # Its own slot, or that of the least weight: an empty one, or one that is off, first.
            order = weights.masked_fill(indices < 0, -1).masked_fill(forced, torch.inf)
            slot = torch.where(indices == number, -2, order).argmin(1, keepdim=True)
            indices = indices.scatter(1, slot, number)
            forced = forced.scatter(1, slot, True)
            weights = weights.scatter(1, slot, share * whole)
        if self.on:
            rest = _with_sum(torch.where(forced, 0, weights), (1 - sum(self.on.values())) * whole)
            weights = torch.where(forced, weights, rest)
        for name, factor in self.scale.items():
            number = list(names).index(name) if name in names else -1
            weights = torch.where((indices == number) & (indices >= 0), weights * factor, weights)
        return indices, weights

    def numbers(self, chosen: Iterable[str], names: Sequence[str], like: Tensor) -> Tensor:
        return torch.tensor(
            [i for i, name in enumerate(names) if name in chosen], device=like.device, dtype=like.dtype
        )


def _weights_of(routing: Routing, experts: int) -> Tensor:
    """The weights of a routing (N, k), or (N, E) where it has no indices; 1 where it says none, 0 in empty slots."""
    if routing.weights is not None:
        return routing.weights
    if routing.indices is not None:
        return (routing.indices >= 0).float()
    like = next(part for part in (routing.probs, routing.logits) if part is not None)
    return torch.ones(len(like), experts, device=like.device)


def _with_sum(weights: Tensor, whole: Tensor) -> Tensor:
    """weights (N, k) that sum to whole (N, 1); 0 where they are all 0."""
    now = weights.sum(1, keepdim=True)
    return torch.where(now != 0, weights * (whole / torch.where(now != 0, now, 1)), 0)


@contextmanager
def tune_experts(
    model: nn.Module,
    off: Iterable[Place] = (),
    on: Mapping[Any, float] | None = None,
    scale: Mapping[Any, float] | None = None,
    mode: str = "zero",
    adapter: str | None = None,
) -> Iterator[None]:
    """Change what routers choose inside the block, in any forward and in `generate`. Nothing is left of it after.

        with tune_experts(model, off=ftri(model, refused, answered)[:10]):
            model.generate(**inputs)

    Experts are named by (layer, expert): the key or the path of an `ExpertLayer`, and a name or a number in it; or by
    name alone, "law", which means the expert in every layer that has it. What a caller or the batch has decided
    (`pin_routes`, `expert_ids`) is not changed.

    Args:
        off: experts that get nothing.
        on: expert -> its share of the weight of every row's experts, whether it was among them or not. The others have
            the rest; where a row has no other, nobody does.
        scale: expert -> a factor on its weight; those of the others stay.
        mode: what takes the place of those that are off. "zero": the others that the row has chosen get as much more,
            as in the paper; a row that has chosen no other loses the weight. "mask": the next of the router.
        adapter: as in `expert_layers`.

    Raises:
        ValueError: no such layer or expert, a number out of range, more experts on than a row uses, all of a layer
            off, or a router that cannot mask.
    """
    layers = require_layers(expert_layers(model, adapter))
    one_of("mode", mode, MODES)
    tunings = read_places(layers, off, {} if on is None else on, {} if scale is None else scale)
    for layer, tuning in tunings.items():
        check_tuning(layer, tuning, mode)
    with ExitStack() as stack:
        for layer, tuning in tunings.items():
            stack.enter_context(_tuned(layer, tuning, mode))
        yield


def read_places(
    layers: Sequence[ExpertLayer], off: Iterable[Place], on: Mapping[Any, float], scale: Mapping[Any, float]
) -> dict[ExpertLayer, LayerTuning]:
    """What to do by layer. Raises ValueError for layers and experts that are not there, and numbers out of range."""
    if isinstance(off, str):
        raise ValueError(f"off={off!r} must be a list of names or of (layer, expert): write [{off!r}]")
    check_kind("off", off, Iterable, "a list of names or of (layer, expert)")
    for name, numbers, most, what in (("on", on, 1.0, "a share, from 0 to 1"), ("scale", scale, 1e30, "0 or more")):
        check_kind(name, numbers, Mapping, "a dict of names or of (layer, expert) to numbers")
        for place, number in numbers.items():
            if not finite(number) or not 0 <= number <= most:
                raise ValueError(f"{name}[{place!r}]={number!r} must be {what}")
    by_layer = (
        _by_layer("off", ((place, 0.0) for place in off), layers),
        _by_layer("on", on.items(), layers),
        _by_layer("scale", scale.items(), layers),
    )
    found = {}
    for layer in layers:
        offs, ons, scales = (given.get(layer, {}) for given in by_layer)
        if offs or ons or scales:
            found[layer] = LayerTuning(tuple(offs), ons, scales)
    return found


def _by_layer(
    argument: str, places: Iterable[tuple[Any, float]], layers: Sequence[ExpertLayer]
) -> dict[ExpertLayer, dict[str, float]]:
    found: dict[ExpertLayer, dict[str, float]] = {}
    for place, number in places:
        by_name = isinstance(place, str)
        meant = _everywhere(argument, place, layers) if by_name else [_expert_at(argument, place, layers)]
        for layer, name in meant:
            entry = found.setdefault(layer, {})
            if name in entry:
                raise ValueError(f"{argument} names expert {name!r} of {layer.key!r} twice")
            entry[name] = float(number)
    return found


def _everywhere(argument: str, name: str, layers: Sequence[ExpertLayer]) -> list[tuple[ExpertLayer, str]]:
    """An expert in every layer that has it and whose router decides: others go by one of these."""
    found = [(layer, name) for layer in layers if name in layer.names and not _follows(layer)]
    if not found:
        names = list(dict.fromkeys(name for layer in layers for name in layer.names))
        keys = [layer.key for layer in layers]
        remedy = f" {name!r} is a layer: write ({name!r}, expert)" if name in keys else nearest(name, names)
        raise ValueError(f"{argument}: no layer has an expert {name!r}; there are {names}.{remedy}")
    return found


def _follows(layer: ExpertLayer) -> bool:
    """Whether a layer goes by the router of another."""
    return isinstance(layer, MixtureExperts) and bool(getattr(layer.mixture.router, "follows", False))


def _expert_at(argument: str, place: Place, layers: Sequence[ExpertLayer]) -> tuple[ExpertLayer, str]:
    """The layer and the name of an expert."""
    if not isinstance(place, Sequence) or len(place) < 2:
        example = next(((layer.key, layer.names[0]) for layer in layers), "")
        raise ValueError(
            f"{argument}: {place!r} must be (layer, expert), such as {example}, or the name of an expert alone, which "
            "means it in every layer"
        )
    key, expert = place[0], place[1]
    named = [layer for layer in layers if layer.key == key] or [layer for layer in layers if layer.path == key]
    if len(named) != 1:
        keys = [layer.key for layer in layers]
        raise ValueError(f"{argument}: {len(named)} layers are {key!r}; there are {keys}.{nearest(str(key), keys)}")
    names = named[0].names
    if type(expert) is int and 0 <= expert < len(names):
        return named[0], names[expert]
    if expert not in names:
        raise ValueError(f"{argument}: {key!r} has no expert {expert!r}; it has {list(names)}")
    return named[0], expert


def written_places(tunings: Mapping[ExpertLayer, LayerTuning], mode: str) -> dict[str, Any]:
    """As a config keeps it; {} where nothing is tuned."""
    said: dict[str, Any] = {"off": [], "on": [], "scale": []}
    for layer, tuning in tunings.items():
        said["off"] += [[layer.path, name] for name in tuning.off]
        said["on"] += [[layer.path, name, share] for name, share in tuning.on.items()]
        said["scale"] += [[layer.path, name, factor] for name, factor in tuning.scale.items()]
    kept = {key: entries for key, entries in said.items() if entries}
    return {"mode": mode, **kept} if kept else {}


def places_of(said: Mapping[str, Any]) -> tuple[list[Place], dict[Any, float], dict[Any, float], str]:
    """off, on, scale and mode of what a config keeps."""
    on, scale = ({(path, name): x for path, name, x in said.get(part, ())} for part in ("on", "scale"))
    return [tuple(place) for place in said.get("off", ())], on, scale, said.get("mode", "zero")


def check_written(said: Any) -> None:
    """Raise ValueError for what `written_places` could not have written."""
    lengths = {"off": (str, str), "on": (str, str, float), "scale": (str, str, float)}
    if not isinstance(said, dict) or not said.keys() <= {"mode", *lengths}:
        raise ValueError(
            f"expert_overrides={said!r:.200} must have `off`, `on`, `scale` and `mode`, and nothing else, such as "
            f"{{'off': {WRITTEN['off']}}}; override_experts of the tuner writes it"
        )
    one_of("expert_overrides: mode", said.get("mode", "zero"), MODES)
    for part, kinds in lengths.items():
        entries = said.get(part, [])
        if not isinstance(entries, list) or not all(_is_entry(entry, kinds) for entry in entries):
            form = "[module, expert]" if part == "off" else "[module, expert, number]"
            raise ValueError(
                f"expert_overrides: {part}={entries!r:.200} must be a list of {form}, such as {WRITTEN[part]}"
            )


def _is_entry(entry: Any, kinds: Sequence[type]) -> bool:
    if not isinstance(entry, (list, tuple)) or len(entry) != len(kinds):
        return False
    return all(finite(x) if kind is float else type(x) is kind for x, kind in zip(entry, kinds, strict=True))


def check_tuning(layer: ExpertLayer, tuning: LayerTuning, mode: str) -> None:
    """Raise ValueError for what a layer cannot do."""
    off, on = set(tuning.off), set(tuning.on)
    if off & on:
        raise ValueError(f"experts {sorted(off & on)} of {layer.key!r} cannot be off and on")
    if off == set(layer.names):
        raise ValueError(f"all experts of {layer.key!r} would be off: disable the adapter, or leave one on")
    if len(on) > (layer.top_k or len(layer.names)):
        raise ValueError(f"{len(on)} experts of {layer.key!r} cannot be on: a row uses {layer.top_k}")
    if sum(tuning.on.values()) > 1 + 1e-6:
        raise ValueError(
            f"the shares of what is on at {layer.key!r} sum to {sum(tuning.on.values())}, which is over 1"
        )
    if _follows(layer):
        raise ValueError(f"{layer.key!r} goes by the router of {layer.router!r}: tune the experts there")
    if mode == "mask" and off and mask_of(layer) is None:
        raise ValueError(
            f"mode='mask': the router of {layer.key!r} has no logits of single experts that could be masked; use "
            "mode='zero'"
        )


def mask_of(layer: ExpertLayer) -> LearnedRouter | None:
    """The router of a layer, if it can mask arms."""
    router = deciding_router(layer.mixture.router) if isinstance(layer, MixtureExperts) else None
    return router if isinstance(router, LearnedRouter) and not isinstance(router, TreeRouter) else None


@contextmanager
def _tuned(layer: ExpertLayer, tuning: LayerTuning, mode: str) -> Iterator[None]:
    if isinstance(layer, BaseExperts):
        with layer.rechosen(lambda indices, weights: tuning.choose(indices, weights, layer.names)):
            yield
        return
    assert isinstance(layer, MixtureExperts)
    layer.refuse_merged()
    attach_tuning(layer.mixture, tuning, mode)
    try:
        yield
    finally:
        detach_tuning(layer.mixture, tuning, mode)


def attach_tuning(mixture: Mixture, tuning: LayerTuning, mode: str) -> None:
    """Have a mixture tuned until `detach_tuning` is called with the same."""
    router: Any = deciding_router(mixture.router)
    if mode == "mask" and tuning.off:
        router.masked = (*router.masked, *tuning.off)
        tuning = replace(tuning, off=())
    mixture.tunings.append(tuning)


def detach_tuning(mixture: Mixture, tuning: LayerTuning, mode: str) -> None:
    router: Any = deciding_router(mixture.router)
    if mode == "mask" and tuning.off:
        left = list(router.masked)
        for name in tuning.off:
            left.remove(name)
        router.masked = tuple(left)
        tuning = replace(tuning, off=())
    mixture.tunings.remove(tuning)


def rank_by_usage(one: ExpertUsage, other: ExpertUsage, score: str = "count") -> list[Ranked]:
    """All experts, those first that `one` uses most beyond `other`.

    score: "count": by their shares of the rows; "weight": by their mean weights.

    Raises:
        ValueError: an unknown score, or usages of different layers, or of no rows.
    """
    one_of("score", score, SCORES)
    for name, usage in (("one", one), ("other", other)):
        check_is_usage(name, usage)
    if one.layers.keys() != other.layers.keys():
        raise ValueError(f"the usages are of different layers: {sorted(one.layers.keys() ^ other.layers.keys())}")
    found = []
    for key, layer in one.layers.items():
        pair = (layer, other.layers[key])
        if layer.names != pair[1].names or not all(int(usage.rows) for usage in pair):
            raise ValueError(f"the usages of {key!r} are of different experts, or of no rows")
        rates = [(u.tokens if score == "count" else u.mass).double() / u.rows for u in pair]
        difference = (rates[0] - rates[1]).tolist()
        found += [Ranked(key, name, d) for name, d in zip(layer.names, difference, strict=True)]
    return sorted(found, key=lambda ranked: -ranked.difference)


@torch.no_grad()
def ftri(
    model: nn.Module,
    one: Iterable[dict[str, Any]],
    other: Iterable[dict[str, Any]],
    score: str = "count",
    adapter: str | None = None,
) -> list[Ranked]:
    """All experts, those first that batches `one` use most beyond `other`: functional token resonance imaging.

    Args:
        one, other: batches, as arguments of the model.
        score, adapter: as in `rank_by_usage` and `expert_layers`.

    Raises:
        ValueError: the model has no experts, an unknown score, or no rows.
    """
    one_of("score", score, SCORES)
    check_model(model)
    usages = []
    with in_evaluation(model):
        for name, batches in (("one", one), ("other", other)):
            with record_usage(model, samples=0, adapter=adapter) as usage:
                for batch in batches_of(name, batches):
                    model(**batch)
            usages.append(usage)
    return rank_by_usage(usages[0], usages[1], score)


def selectivity(target: tuple[float, float], rest: tuple[float, float]) -> float:
    """How much more the error of a target has changed than that of the rest, both as factors; 1: not selective.

    target, rest: errors before and after experts were switched.

    Raises:
        ValueError: an error that is not positive.
    """
    pairs = all(isinstance(pair, (tuple, list)) and len(pair) == 2 for pair in (target, rest))
    if not pairs or not all(finite(value) and value > 0 for value in (*target, *rest)):
        raise ValueError(f"target={target} and rest={rest} must be errors above 0, before and after")
    return (target[1] / target[0]) / (rest[1] / rest[0])
