"""How the experts of a model are used: sums over real tokens, in any forward, by layer and by label."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from mixadapters.core.fields import check_integer, check_kind
from mixadapters.core.folders import written_aside
from mixadapters.core.losses import entropy, real_only
from mixadapters.core.showing import span
from mixadapters.surgery.layers import expert_layers, require_layers
from mixadapters.surgery.view import ExpertLayer, Routed, context_of

SAMPLES = 4096  # logits that are kept of each layer
FORMAT = 2
OLD = 1  # format of files that do not say of which model they are
MOST = 2**16  # layers and labels that a file may have
SUMS = ("tokens", "mass", "saliency", "entropy", "rows", "pairs")
PARTS = (*SUMS, "logits", "draws")


@dataclass
class LayerUsage:
    """What the experts of one layer have done for the rows that count. Padding is left out.

    Attributes:
        path, adapter, names: of the `ExpertLayer`.
        form, units: of the `ExpertLayer`, what tells it from those of another model; "" and () in files of before.
        tokens: (E,) int64, rows that used each expert.
        mass: (E,) float64, the sum of the weights that it had.
        saliency: (E,) float64, the sum of weight * ||E_e(x)||, which is what it has added to the layer's output.
        entropy: () float64, the sum over rows of the entropy of the router's distribution, in nats.
        rows: () int64, all rows.
        pairs: (E, E) int64, rows that used both experts; the diagonal is `tokens`.
        logits: (n, E) float32, the router's logits for n rows: a sample without bias. (0, E) where it has none.
        draws: (n,) float64, the numbers by which these rows were drawn: the largest of all rows.
        samples: the largest n.
    """

    path: str
    adapter: str
    names: tuple[str, ...]
    tokens: Tensor
    mass: Tensor
    saliency: Tensor
    entropy: Tensor
    rows: Tensor
    pairs: Tensor
    logits: Tensor
    draws: Tensor
    samples: int = SAMPLES
    form: str = ""
    units: tuple[int, ...] = ()

    @classmethod
    def empty(
        cls, path: str, adapter: str, names: Sequence[str], samples: int = SAMPLES, device: Any = "cpu",
        form: str = "", units: Sequence[int] = (),
    ) -> LayerUsage:  # fmt: skip
        count = len(names)

        def zeros(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        return cls(
            path, adapter, tuple(names), zeros(count, dtype=torch.long), zeros(count), zeros(count), zeros(),
            zeros(dtype=torch.long), zeros(count, count, dtype=torch.long), zeros(0, count, dtype=torch.float32),
            zeros(0), samples, form, tuple(units),
        )  # fmt: skip

    def __repr__(self) -> str:
        of = f" of adapter {self.adapter!r}" if self.adapter else ""
        return f"<LayerUsage of {self.path!r}{of}: {len(self.names)} experts, {int(self.rows):,} rows>"

    @property
    def mean_saliency(self) -> Tensor:
        """(E,) REAP's saliency: the mean of weight * ||E_e(x)|| over the expert's own tokens; 0 for one without."""
        return self.saliency / self.tokens.clamp_min(1)

    @property
    def mean_entropy(self) -> float:
        return float(self.entropy / self.rows.clamp_min(1))

    def add(self, seen: _Seen, mask: Tensor | None, draws: Tensor) -> None:
        """Count the rows of one forward where `mask` (N,) is True; draws (N,) are random numbers from 0 to 1."""
        routed, count = seen.routed, len(self.names)
        used = seen.used if mask is None else seen.used & mask.unsqueeze(1)
        places = torch.where(used, routed.indices, count)  # the last place is for nothing

        def summed(values: Tensor) -> Tensor:
            zeros = values.new_zeros(count + 1)
            return zeros.scatter_add_(0, places.reshape(-1), torch.where(used, values, 0.0).reshape(-1))[:-1]

        chosen = torch.zeros(len(places), count + 1, device=places.device).scatter_(1, places, 1.0)[:, :-1]
        self.pairs += (chosen.T @ chosen).long()
        self.tokens += chosen.sum(0).long()
        self.mass += summed(seen.weights)
        if seen.norms is not None:
            self.saliency += summed(seen.weights.abs() * seen.norms)
        total = draws.new_tensor(float(len(draws))) if mask is None else mask.sum()
        self.rows += total.long()
        if routed.probs is not None:
            self.entropy += entropy(routed.probs.float(), mask) * total
        if routed.logits is not None and self.samples:
            logits = routed.logits.float() if mask is None else real_only(routed.logits.float(), mask)
            self._sample(logits, draws if mask is None else torch.where(mask, draws, -1.0))

    def _sample(self, logits: Tensor, draws: Tensor) -> None:
        """Keep the rows of the largest draws: each row has the same chance, however many come. -1 is no row.

        Others are dropped once there are twice as many as wanted, and at the end.
        """
        self.draws, self.logits = torch.cat([self.draws, draws]), torch.cat([self.logits, logits])
        if len(self.draws) > 2 * self.samples:
            self._trim()

    def _trim(self) -> None:
        best = self.draws.topk(min(self.samples, len(self.draws)))
        self.draws, self.logits = best.values, self.logits[best.indices]

    def __add__(self, other: LayerUsage) -> LayerUsage:
        if (self.path, self.adapter, self.names) != (other.path, other.adapter, other.names):
            raise ValueError(
                f"usage of {self.path!r} with the experts {self.names} cannot be added to that of {other.path!r} with "
                f"{other.names}: they are not of the same layer, or experts have left it since"
            )
        if self.form and other.form and (self.form, self.units) != (other.form, other.units):
            raise ValueError(
                f"usage of {self.path!r} in {_told(self)} cannot be added to that of {_told(other)}: they are of "
                "different models"
            )
        known = self if self.form else other
        made = LayerUsage.empty(
            self.path, self.adapter, self.names, max(self.samples, other.samples), form=known.form, units=known.units
        )
        for usage in (self.cpu(), other.cpu()):
            for name in SUMS:
                setattr(made, name, getattr(made, name) + getattr(usage, name))
            made._sample(usage.logits, usage.draws)
        return made.cpu()

    def cpu(self) -> LayerUsage:
        """In host memory, with no more rows of logits than wanted, and none for rows that were none."""
        self._trim()
        parts = {name: getattr(self, name).cpu() for name in PARTS}
        real = parts["draws"] >= 0
        parts |= {"logits": parts["logits"][real], "draws": parts["draws"][real]}
        return replace(self, **parts)

    def refuse_others(self, layer: ExpertLayer) -> None:
        """Raise ValueError where it is not of these experts."""
        if self.names != layer.names:
            raise ValueError(
                f"the usage of {layer.key!r} is of the experts {self.names}, and it has {layer.names} now: record anew"
            )
        if self.form and (self.form, self.units) != (layer.form, layer.units):
            raise ValueError(
                f"the usage of {layer.key!r} is of {_told(self)}, and here it is {_told(layer)}: it was recorded in "
                "another model; record anew"
            )

    def refuse_broken(self, key: str) -> None:
        """Raise ValueError where what was recorded is no finite number. key: of the layer, for the message."""
        sums = all(bool(t.isfinite().all()) for t in (self.mass, self.saliency, self.entropy))
        if not sums or bool(self.logits.isnan().any()):
            raise ValueError(
                f"the usage of {key!r} holds NaN or infinite values, which the model has computed: an expert, "
                "its router or a layer before has broken weights, or overflows its dtype; mend that and record anew"
            )


@dataclass
class ExpertUsage:
    """How the experts of a model are used. `record_usage` makes it; two of one model can be added.

    Attributes:
        layers: `ExpertLayer.key` -> its usage.
        by_label: label -> the usage of the rows of that label alone.
        labels: what the rows of the next forwards are: one label for each row of the caller's batch, or None.
    """

    layers: dict[str, LayerUsage] = field(default_factory=dict)
    by_label: dict[str, ExpertUsage] = field(default_factory=dict)
    labels: Sequence[str] | None = field(default=None, compare=False)

    def __repr__(self) -> str:
        layers = self.layers.values()
        experts, rows = span([len(layer.names) for layer in layers]), span([int(layer.rows) for layer in layers])
        labels = f"; labels {list(self.by_label)}" if self.by_label else ""
        return f"<ExpertUsage: {len(layers)} layers, each of {experts} experts and {rows} rows{labels}>"

    def __getitem__(self, key: str) -> LayerUsage:
        return self.layers[key]

    def __add__(self, other: ExpertUsage) -> ExpertUsage:
        """Of both runs or processes. Raises ValueError where a layer has other experts in the other."""
        if not isinstance(other, ExpertUsage):
            return NotImplemented
        layers = dict(self.layers)
        for key, usage in other.layers.items():
            layers[key] = layers[key] + usage if key in layers else usage
        by_label = dict(self.by_label)
        for label, labelled in other.by_label.items():
            by_label[label] = by_label[label] + labelled if label in by_label else labelled
        return ExpertUsage(layers, by_label)

    def save(self, file: str | Path) -> None:
        """Write it as one safetensors file."""
        tensors: dict[str, Tensor] = {}
        said: list[dict[str, Any]] = []
        every: list[tuple[str | None, ExpertUsage]] = [(None, self), *self.by_label.items()]
        for label, usage in every:
            for layer in usage.layers.values():
                said.append({"label": label, "path": layer.path, "adapter": layer.adapter, "names": layer.names,
                             "samples": layer.samples, "key": _key_of(usage, layer), "form": layer.form,
                             "units": layer.units})  # fmt: skip
                plain = layer.cpu()
                tensors |= {f"{len(said) - 1}.{name}": getattr(plain, name).contiguous() for name in PARTS}
        with written_aside(file) as aside:
            save_file(tensors, aside, metadata={"mixadapters_usage": str(FORMAT), "layers": json.dumps(said)})

    @classmethod
    def load(cls, file: str | Path) -> ExpertUsage:
        """Read what `save` has written.

        Raises:
            ValueError: the file is no usage, or not whole.
        """
        usage = cls()
        try:
            with safe_open(str(file), "pt") as opened:
                told = opened.metadata() or {}
                if told.get("mixadapters_usage") not in (str(OLD), str(FORMAT)):
                    raise ValueError("it has no usage of this format")
                old, read = told["mixadapters_usage"] == str(OLD), set()
                for number, said in enumerate(_entries(told.get("layers"), old)):
                    tensors = {name: opened.get_tensor(f"{number}.{name}") for name in PARTS}
                    read |= {f"{number}.{name}" for name in PARTS}
                    owner = usage if said["label"] is None else usage.by_label.setdefault(said["label"], cls())
                    owner.layers[said["key"]] = _read_layer(said, tensors)
                if stray := set(opened.keys()) - read:
                    raise ValueError(f"{min(stray)!r} is of no layer that it names")
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{str(file)!r} is no file that ExpertUsage.save has written: {error}") from None
        return usage


def check_is_usage(name: str, value: Any) -> None:
    """Raises ValueError where an argument is no usage."""
    check_kind(name, value, ExpertUsage, "an ExpertUsage, as record_usage gives it")


def _key_of(usage: ExpertUsage, layer: LayerUsage) -> str:
    return next(key for key, other in usage.layers.items() if other is layer)


def _told(layer: LayerUsage | ExpertLayer) -> str:
    """The model's type and the sizes of a layer's experts."""
    units = sorted(set(layer.units))
    return f"{layer.form} by {'/'.join(map(str, units))}" if units else layer.form


def _entries(text: Any, old: bool) -> list[dict[str, Any]]:
    entries = json.loads(text)
    kinds = {"path": str, "adapter": str, "names": list, "samples": int, "key": str}
    kinds |= {} if old else {"form": str, "units": list}
    if not isinstance(entries, list) or len(entries) > MOST:
        raise ValueError("its layers are no list")
    for entry in entries:
        named = isinstance(entry, dict) and entry.keys() == {"label", *kinds} and all(
            type(entry[name]) is kind for name, kind in kinds.items())  # fmt: skip
        if not named or not isinstance(entry["label"], (str, type(None))) or not 0 <= entry["samples"] <= 2**31:
            raise ValueError(f"{entry!r:.100} is no layer")
        if not all(isinstance(name, str) for name in entry["names"]):
            raise ValueError("names of experts must be strings")
        if not all(type(unit) is int for unit in entry.setdefault("units", [])):
            raise ValueError("units of experts must be whole numbers")
    return entries


def _read_layer(said: Mapping[str, Any], tensors: dict[str, Tensor]) -> LayerUsage:
    empty = LayerUsage.empty(
        said["path"], said["adapter"], said["names"], said["samples"], form=said.get("form", ""), units=said["units"]
    )
    for name in PARTS:
        old, new = getattr(empty, name), tensors[name]
        shape = (len(tensors["draws"]), *old.shape[1:]) if name in ("logits", "draws") else tuple(old.shape)
        if tuple(new.shape) != shape or new.dtype != old.dtype:
            raise ValueError(f"{name} of {said['path']!r} is {tuple(new.shape)} of {new.dtype}")
        if not new.is_floating_point() and bool((new < 0).any()):
            raise ValueError(f"{name} of {said['path']!r} counts fewer than none")
        setattr(empty, name, new)
    return empty


class _Seen:
    """What the usages of a layer share of one forward: of all rows, and of those of each label."""

    def __init__(self, routed: Routed) -> None:
        self.routed = routed
        self.used = routed.indices >= 0
        self.weights = routed.weights.double()
        self.norms = None if routed.norms is None else routed.norms().double()


class _Recorder:
    """Adds what one layer does to the usage of a model."""

    def __init__(self, layer: ExpertLayer, usage: ExpertUsage, context: Any, samples: int, seed: int) -> None:
        self.layer, self.usage, self.context, self.samples = layer, usage, context, samples
        self.key, self.names, self.form, self.units = layer.key, layer.names, layer.form, layer.units
        self.drawn = torch.Generator().manual_seed(seed)  # all layers draw the same rows

    @torch.no_grad()
    def __call__(self, routed: Routed) -> None:
        count, device = len(routed.indices), routed.indices.device
        draws = torch.rand(count, generator=self.drawn, dtype=torch.float64).to(device)
        seen = _Seen(routed)
        self._of(self.usage, device).add(seen, routed.mask, draws)
        labels = _checked_labels(self.usage.labels)
        if labels is None:
            return
        known = list(dict.fromkeys(labels))
        numbers = torch.tensor([known.index(label) for label in labels])
        rows = self.context.stream(self.layer.stack).spread(numbers, count, "labels").to(device)
        for number, label in enumerate(known):
            mine = rows == number
            labelled = self.usage.by_label.setdefault(label, ExpertUsage())
            self._of(labelled, device).add(seen, mine if routed.mask is None else mine & routed.mask, draws)

    def _of(self, usage: ExpertUsage, device: torch.device) -> LayerUsage:
        if self.key not in usage.layers:
            made = LayerUsage.empty(
                self.layer.path, self.layer.adapter, self.names, self.samples, device, self.form, self.units
            )
            usage.layers[self.key] = made
        return usage.layers[self.key]


@contextmanager
def record_usage(
    model: nn.Module,
    labels: Sequence[str] | None = None,
    samples: int = SAMPLES,
    seed: int = 0,
    adapter: str | None = None,
) -> Iterator[ExpertUsage]:
    """Record how experts are used by the forwards inside the block: training, evaluation or `generate`.

        with record_usage(model) as usage:
            for batch in loader:
                usage.labels = batch.pop("domain")  # where there are any
                model(**batch)

    Experts of a base model run one by one inside the block, each row of each expert by itself, and are put together
    afterwards: the sums are those that the model makes, up to the order in which it adds.

    Args:
        labels: what the rows of the batch are, one for each; changed by `usage.labels` from batch to batch.
        samples: rows of each layer whose logits are kept.
        seed: of their choice.
        adapter: as in `expert_layers`.

    Raises:
        ValueError: the model has no experts; or in a forward, as many labels as rows are needed.
    """
    check_integer("samples", samples, least=0)
    check_integer("seed", seed)
    layers = require_layers(expert_layers(model, adapter))
    usage = ExpertUsage(labels=_checked_labels(labels))
    with ExitStack() as stack:
        context = stack.enter_context(context_of(model))
        for layer in layers:
            recorder = _Recorder(layer, usage, context, samples, seed)
            stack.enter_context(layer.watch(recorder, outputs=True))
        yield usage
    for one in (usage, *usage.by_label.values()):
        one.layers = {layer.key: one.layers[layer.key].cpu() for layer in layers if layer.key in one.layers}


def _checked_labels(labels: Any) -> Sequence[str] | None:
    given = () if labels is None else labels
    if isinstance(given, str) or not isinstance(given, Iterable) or not all(isinstance(one, str) for one in given):
        raise ValueError(f"labels={labels!r} must be a list of strings, one for each row of the batch")
    return labels
