"""Smaller experts in a model: ternary (QMoE), or of low rank with a few rows beside (LoSparse)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mixadapters.core.bank import Weights
from mixadapters.core.evaluation import in_evaluation
from mixadapters.core.fields import check_integer, check_number, check_share, check_switches, one_of
from mixadapters.kernels import ACTIVATIONS
from mixadapters.surgery.choices import CODECS, COMPRESSIONS, ROUNDINGS, SCALES
from mixadapters.surgery.layers import ExpertLayer, Routed
from mixadapters.surgery.lowrank import LowRankSparse, content_digest, low_rank_sparse_expert
from mixadapters.surgery.pruning import layers_to_cut
from mixadapters.surgery.qmoe import MATRICES, encode_matrix, ternary_expert
from mixadapters.surgery.view import batches_of, expert_output, refuse_broken


class Shrunk(NamedTuple):
    """An expert in a smaller form."""

    weights: Weights  # as it is computed with from now on
    nbytes: int  # of its matrices in that form
    forms: Mapping[str, LowRankSparse] = {}  # of those by name that are products


Shrink = Callable[[Weights, "Tensor | None", str], Shrunk]  # weights, inputs (N, K) of the expert, activation


@dataclass(frozen=True)
class ExpertCompression:
    """What has become of one expert."""

    name: str
    weights: int  # entries of its matrices
    plain_bytes: int  # of its matrices, as they were
    nbytes: int  # in the smaller form
    rows: int  # that it was calibrated with
    error: float  # |output - old output|^2 / |old output|^2 on these rows; NaN without any


@dataclass(frozen=True)
class Compression:
    """What `compress_experts` has done, or would do."""

    method: str
    options: dict[str, Any]
    layers: dict[str, tuple[ExpertCompression, ...]]  # by `ExpertLayer.key`
    # The products that matrices have become, by `content_digest`: for `save_compressed`. None of a dry run.
    factors: dict[str, LowRankSparse] = field(default_factory=dict, repr=False, compare=False)

    def __str__(self) -> str:
        return (
            f"{self.method}: {len(self.experts)} experts of {len(self.layers)} layers in {self.nbytes:,} bytes for "
            f"{self.plain_bytes:,}, {self.bits_per_weight:.2f} bits per weight"
        )

    @property
    def experts(self) -> list[ExpertCompression]:
        return [expert for layer in self.layers.values() for expert in layer]

    @property
    def plain_bytes(self) -> int:
        return sum(expert.plain_bytes for expert in self.experts)

    @property
    def nbytes(self) -> int:
        return sum(expert.nbytes for expert in self.experts)

    @property
    def bits_per_weight(self) -> float:
        """With everything that is needed beside the codes."""
        return 8 * self.nbytes / max(sum(expert.weights for expert in self.experts), 1)

    @property
    def error(self) -> float:
        """The mean over experts that had rows."""
        errors = [expert.error for expert in self.experts if not math.isnan(expert.error)]
        return sum(errors) / len(errors) if errors else math.nan

    def as_dict(self) -> dict[str, Any]:
        """For JSON, which has no NaN: an error that is not known is None."""
        sums = {name: getattr(self, name) for name in ("plain_bytes", "nbytes", "bits_per_weight", "error")}
        layers = {key: [_known(asdict(expert)) for expert in layer] for key, layer in self.layers.items()}
        return {"method": self.method, "options": self.options, "layers": layers, **_known(sums)}


def _known(said: dict[str, Any]) -> dict[str, Any]:
    return {**said, "error": None if math.isnan(said["error"]) else said["error"]}


@torch.no_grad()
def compress_experts(
    model: nn.Module,
    calibration: Sequence[dict[str, Any]],
    *,
    method: str = "qmoe",
    adapter: str | None = None,
    samples: int = 8192,
    dry_run: bool = False,
    **options: Any,
) -> Compression:
    """Make the experts of a model smaller, in place, layer by layer: each for what the layers before have become.

    The model computes with the smaller experts as they are, in its own dtype; `save_compressed` writes ternary ones as
    codes, and products as their factors where it is given those that are returned here.

    Args:
        calibration: batches, as arguments of the model. They are run once for each layer.
        method: "qmoe": ternary weights. Options: `scale` "minmax" or "mean", `rounding` "gptq" or "nearest",
            `damping` of GPTQ, `codec` "qmoe" or "packed". "lowrank_sparse": a product of low rank and some rows.
            Options: `share` of the weights that the product may have, `keep`, the share of rows beside it.
        adapter: of this adapter, "" for the base. None: of the adapter that has experts (of several
            the active one), else of the base.
        samples: rows that each expert is calibrated with, at most: the first that come.
        dry_run: change nothing.

    Raises:
        ValueError: the model has no experts, those of several adapters, or some whose function is not known; a method
            or an option is unknown; `calibration` cannot be run again; or rows too narrow for QMoE's codec.
    """
    check_switches(dry_run=dry_run)
    shrink, options = _shrink(method, options)
    layers = layers_to_cut(model, adapter)
    if isinstance(calibration, Iterator):
        raise ValueError("calibration can be run only once, and each layer needs it: pass a list of batches")
    batches = list(batches_of("calibration", calibration))
    check_integer("samples", samples, least=1)
    for layer in layers:
        _refuse(layer, method, options)
    done: dict[str, tuple[ExpertCompression, ...]] = {}
    factors: dict[str, LowRankSparse] = {}
    for layer in layers:
        inputs = routed_inputs(model, layer, batches, samples)
        found = []
        for e in range(len(layer.names)):
            told, shrunk = _compress(layer, e, inputs[e], shrink, dry_run)
            found.append(told)
            if not dry_run:
                held = layer.weights(e)
                factors |= {content_digest(getattr(held, name)): form for name, form in shrunk.forms.items()}
        done[layer.key] = tuple(found)
    return Compression(method, options, done, factors)


def routed_inputs(
    model: nn.Module, layer: ExpertLayer, batches: Iterable[Mapping[str, Any]], samples: int
) -> list[Tensor]:
    """(n, K) for each expert of a layer, the first n <= samples rows that it gets. Padding is left out."""
    found: list[list[Tensor]] = [[] for _ in layer.names]
    missing = [samples] * len(found)

    def take(routed: Routed) -> None:
        real = routed.indices >= 0 if routed.mask is None else (routed.indices >= 0) & routed.mask.unsqueeze(1)
        for e in range(len(found)):
            if missing[e]:
                rows = routed.inputs[((routed.indices == e) & real).any(1)][: missing[e]]
                found[e].append(rows)
                missing[e] -= len(rows)

    with in_evaluation(model), layer.watch(take):
        for batch in batches:
            model(**batch)
    width = layer.width
    return [torch.cat(rows) if rows else torch.zeros(0, width) for rows in found]


def _compress(
    layer: ExpertLayer, e: int, inputs: Tensor, shrink: Shrink, dry_run: bool
) -> tuple[ExpertCompression, Shrunk]:
    old = layer.weights(e)
    shrunk = shrink(old, inputs, layer.activation)
    matrices = [matrix for name in MATRICES if (matrix := getattr(old, name)) is not None]
    error = math.nan
    if len(inputs):
        before, after = (expert_output(w, layer.activation, inputs).double() for w in (old, shrunk.weights))
        error = float((after - before).square().sum() / before.square().sum().clamp_min(1e-300))
    report = ExpertCompression(
        layer.names[e], sum(m.numel() for m in matrices), sum(m.nbytes for m in matrices), shrunk.nbytes, len(inputs),
        error,
    )  # fmt: skip
    if not dry_run:
        layer.set_weights(e, shrunk.weights)
    return report, shrunk


def _shrink(method: str, given: dict[str, Any]) -> tuple[Shrink, dict[str, Any]]:
    """What a method makes of an expert, and all of its options. Raises ValueError for those that it does not have."""
    one_of("method", method, COMPRESSIONS)
    defaults = COMPRESSIONS[method]
    for name in given:
        one_of(f"option of method={method!r}", name, defaults)
    options = defaults | given
    if method == "lowrank_sparse":
        for name, value in options.items():
            check_share(name, value)

        def low_rank(weights: Weights, inputs: Tensor | None, activation: str) -> Shrunk:
            smaller, forms = low_rank_sparse_expert(weights, inputs, activation, **options)
            return Shrunk(smaller, sum(form.nbytes for form in forms.values()), forms)

        return low_rank, options
    for name, choices in (("scale", SCALES), ("rounding", ROUNDINGS), ("codec", CODECS)):
        one_of(name, options[name], choices)
    check_number("damping", options["damping"], above=0)
    rounding = {name: options[name] for name in ("scale", "rounding", "damping")}

    def ternary(weights: Weights, inputs: Tensor | None, activation: str) -> Shrunk:
        smaller = ternary_expert(weights, inputs, activation, **rounding)
        return Shrunk(smaller, coded_bytes(smaller, options["codec"]))

    return ternary, options


def coded_bytes(weights: Weights, codec: str) -> int:
    """Of an expert's matrices as `save_compressed` writes them: in codes, where these are shorter."""
    total = 0
    for name in MATRICES:
        matrix = getattr(weights, name)
        if matrix is not None:
            form = encode_matrix(matrix, codec)
            total += matrix.nbytes if form is None else min(form.nbytes, matrix.nbytes)
    return total


def _refuse(layer: ExpertLayer, method: str, options: dict[str, Any]) -> None:
    """Raise ValueError for a layer whose experts cannot be made smaller like this, before any is changed."""
    if layer.activation not in ACTIVATIONS:
        raise ValueError(
            f"the experts at {layer.key!r} have an activation of their own, {layer.activation!r}, so what they "
            f"compute is not known here; known are {sorted(ACTIVATIONS)}"
        )
    if layer.adapted:
        raise ValueError(
            f"adapters sit on the experts at {layer.key!r}, and were trained for these as they are: compress the base "
            "model first, then add adapters, or merge them into it before (merge_and_unload)"
        )
    refuse_broken(layer)
    seen = set()
    for e, name in enumerate(layer.names):
        weights = layer.weights(e)
        if method != "qmoe" or options["codec"] != "qmoe" or weights.down.shape in seen:
            continue
        seen.add(weights.down.shape)
        tried = ternary_expert(weights, None, layer.activation, scale=options["scale"], rounding="nearest")
        count = sum(matrix.numel() for part in MATRICES if (matrix := getattr(tried, part)) is not None)
        words, packed = (8 * coded_bytes(tried, codec) / count for codec in CODECS)
        if words > packed:
            raise ValueError(
                f"expert {name!r} at {layer.key!r} would take {words:.2f} bits per weight in QMoE's codec, and "
                f"{packed:.2f} with five weights to a byte: its rows of {weights.down.shape[1]} and "
                f"{weights.up.shape[0]} are too narrow, or have too few zeros (scale={options['scale']!r}); pass "
                "codec='packed' (on the command line --codec packed)"
            )
