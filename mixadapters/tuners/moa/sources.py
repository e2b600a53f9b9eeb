"""Trained adapters as experts of a mixture: what each adds at which modules of this model, or why it cannot."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple, Protocol

import torch
from peft.tuners.tuners_utils import check_target_module_exists
from torch import Tensor, nn

from mixadapters.core.files import PREFIX
from mixadapters.tuners.bottleneck.model import EXPERT
from mixadapters.tuners.moa.config import MoAConfig
from mixadapters.tuners.moa.lora import read_factors, refuse_inexact
from mixadapters.tuners.sources import check_base_model, places_of, read_folder

XLORA, XLORA_CLASSIFIER = "base_model.lora_model.model.", "base_model.internal_xlora_classifier."  # of its keys
LOST_BY_XLORA = (
    ": PEFT's X-LoRA saves an expert without the layers whose number is the name of another; gather the LoRA folder "
    "that it was made from"
)
MOE_PEFT = {  # types of MoE-PEFT -> what helps
    "MOLA": "write each of its experts as a LoRA folder; docs/moa.md has the lines",
    "LORAMOE": "write each of its experts as a LoRA folder; docs/moa.md has the lines",
    "MIXLORA": "its experts are whole FFNs, which no sum of adapters equals",
}


class ExpertSites(Protocol):
    """What a tuner knows of the places that can hold experts."""

    model: nn.Module

    def places(self) -> list[str]: ...

    def expert_widths(self, config: MoAConfig, path: str) -> tuple[int, int]: ...

    def _unwrapped(self, path: str) -> nn.Module: ...


class Gathered(NamedTuple):
    """A trained expert, by module of this model."""

    scales: dict[str, float]
    weights: dict[str, dict[str, Tensor]]  # parameters of an `Expert` by name

    @property
    def ranks(self) -> dict[str, int]:
        return {path: tensors["down.weight"].shape[0] for path, tensors in self.weights.items()}

    @property
    def biases(self) -> list[str]:
        """Modules at which it has a bias on its output."""
        return [path for path, tensors in self.weights.items() if "up.bias" in tensors]


def gather(tuner: ExpertSites, config: MoAConfig, name: str, spec: dict[str, Any]) -> Gathered:
    """The trained adapter that spec["source"] names, as an expert of this model.

    Raises:
        ValueError: the field, the source and the reason, where it cannot be one exactly.
    """
    where = f"experts[{name!r}]: {spec['source']!r}"
    saved, weights = read_folder(where, spec, MOE_PEFT)
    of_xlora = any(key.startswith(XLORA) for key in weights)
    if of_xlora:
        weights = {_of_lora(key): tensor for key, tensor in weights.items() if not key.startswith(XLORA_CLASSIFIER)}
    kind = getattr(saved.peft_type, "value", saved.peft_type)
    check_base_model(tuner.model, saved, spec, where)
    if kind == "LORA" and config.expert_type == "lora":
        scales, found = _lora(tuner, saved, weights, spec, where)
    elif kind == "BOTTLENECK" and config.expert_type != "lora":
        scales, found = _bottleneck(config, saved, weights, where)
    else:
        takes = "LORA" if config.expert_type == "lora" else "BOTTLENECK"
        remedy = "; gather the LoRA folders that it routes among" if kind == "XLORA" else ""
        raise ValueError(
            f"{where} is a {kind} adapter; expert_type={config.expert_type!r} gathers {takes} adapters{remedy}"
        )
    placed = _placed(tuner, found, where)
    for path, tensors in placed.items():
        _check_shapes(tuner, config, path, tensors, where)
    _refuse_incomplete(tuner, saved, placed, where, LOST_BY_XLORA if of_xlora else "")
    if kind == "LORA":
        _refuse_stray(saved, found, where)
    return Gathered(_placed(tuner, {p: s * spec.get("scale", 1.0) for p, s in scales.items()}, where), placed)


def _lora(
    tuner: ExpertSites, saved: Any, weights: dict[str, Tensor], spec: dict[str, Any], where: str
) -> tuple[dict[str, float], dict[str, dict[str, Tensor]]]:
    refuse_inexact(saved, where, spec.get("ignore_modules_to_save", False))
    factors, biases = read_factors(saved, _without_base(tuner, saved, weights, where), where)
    found = {}
    for path, (down, up, scale, b_up) in factors.items():
        found[path] = {"down.weight": down, "up.weight": up} | ({} if b_up is None else {"up.bias": b_up})
        if path in biases:  # absolute ones, which are not scaled
            (place,) = places_of([path], tuner.places())[path] or [""]
            bias = getattr(tuner._unwrapped(place), "bias", None) if place else None
            if bias is None or not scale:
                raise ValueError(
                    f"{where} has bias='lora_only', but at {path!r} the base model has no bias to compare"
                )
            difference = (biases[path].float() - bias.detach().float().cpu()) / scale
            found[path]["up.bias"] = difference + (0 if b_up is None else b_up.float())
    return {path: factor.scale for path, factor in factors.items()}, found


def _without_base(tuner: ExpertSites, saved: Any, weights: dict[str, Tensor], where: str) -> dict[str, Tensor]:
    """Without embeddings and heads of the base model, which PEFT may save beside: waived ones, or those unchanged."""
    kept = {}
    waived = tuple(f".{module}." for module in saved.modules_to_save or ())
    for key, tensor in weights.items():
        if any(module in f".{key}" for module in waived):
            continue
        part = "weight" if key.endswith(".weight") else "bias"
        if ".lora_" in key or (part == "bias" and (saved.bias != "none" or not key.endswith(".bias"))):
            kept[key] = tensor
            continue
        path = key.removeprefix(PREFIX).removesuffix(f".{part}").removesuffix(".base_layer")
        places = places_of([path], tuner.places())[path]
        own = getattr(tuner._unwrapped(places[0]), part, None) if len(places) == 1 else None
        if own is None:
            kept[key] = tensor
        elif own.shape != tensor.shape or not torch.equal(own.detach().cpu().to(tensor.dtype), tensor):
            raise ValueError(
                f"{where} holds a changed {path!r} of the base model, of which a mixture can hold one version only; "
                "train without it, or load that base model"
            )
    return kept


def _bottleneck(
    config: MoAConfig, saved: Any, weights: dict[str, Tensor], where: str
) -> tuple[dict[str, float], dict[str, dict[str, Tensor]]]:
    theirs = {**saved.bank_options(), "placement": saved.placement, "adapter_input": saved.adapter_input}
    ours = {**config.bank_options(), "layer_norm": False, "placement": config.placement,
            "adapter_input": config.adapter_input}  # fmt: skip
    for name, value in ours.items():
        if theirs[name] != value:
            raise ValueError(f"{where} was trained with {name}={theirs[name]!r}, this mixture has {value!r}")
    if theirs["scale"] is None:
        raise ValueError(f"{where} was trained with scale='learnable', which experts of this mixture do not have")
    found: dict[str, dict[str, Tensor]] = {}
    for key, tensor in weights.items():
        path, mark, rest = key.removeprefix("base_model.model.").partition(
            f".bottleneck_adapters.bank.experts.{EXPERT}."
        )
        if mark:
            found.setdefault(path, {})[rest] = tensor
    return dict.fromkeys(found, float(theirs["scale"])), found


def _placed(tuner: ExpertSites, by_path: dict[str, Any], where: str) -> dict[str, Any]:
    """By modules of this model."""
    if not by_path:
        raise ValueError(f"{where} holds no weights of an expert")
    placed = {}
    for path, places in places_of(by_path, tuner.places()).items():
        if len(places) != 1:
            raise ValueError(f"{where} adapts {path!r}, which {'names several modules' if places else 'is no module'} "
                             "of this model; gather adapters of this architecture")  # fmt: skip
        placed[places[0]] = by_path[path]
    return placed


def _check_shapes(tuner: ExpertSites, config: MoAConfig, path: str, tensors: dict[str, Tensor], where: str) -> None:
    width_in, width_out = tuner.expert_widths(config, path)
    expected = {"down.weight", "up.weight"}
    if config.expert_type != "lora":
        expected |= {"down.bias", "up.bias"} | ({"gate.weight", "gate.bias"} if config.expert_type == "glu" else set())
    if tensors.keys() - {"up.bias"} != expected - {"up.bias"}:
        raise ValueError(f"{where} has {sorted(tensors)} at {path!r}, expected {sorted(expected)}")
    rank = tensors["down.weight"].shape[0]
    inner, outer = {"weight": (rank, width_in), "bias": (rank,)}, {"weight": (width_out, rank), "bias": (width_out,)}
    for key, tensor in tensors.items():
        part, _, what = key.partition(".")
        shape = (outer if part == "up" else inner)[what]
        if tuple(tensor.shape) != shape:
            raise ValueError(
                f"{where}: {key} at {path!r} is {tuple(tensor.shape)} in the source, expected {shape}: trained on "
                "another base model?"
            )
        if not tensor.is_floating_point() or not bool(tensor.isfinite().all()):
            raise ValueError(f"{where}: {key} at {path!r} holds values that are not finite numbers")


def _of_lora(key: str) -> str:
    """The key that a weight of an expert of PEFT's X-LoRA has in a folder of that LoRA alone."""
    return PREFIX + key.removeprefix(XLORA) if key.startswith(XLORA) else key


def _refuse_incomplete(tuner: ExpertSites, saved: Any, placed: Iterable[str], where: str, why: str) -> None:
    have = set(placed)
    wanted = [p for p in tuner.places() if saved.target_modules and check_target_module_exists(saved, p)]
    if missing := [path for path in wanted if path not in have]:
        raise ValueError(f"{where} lacks the weights of {missing}, which its own config says that it adapts{why}")


def _refuse_stray(saved: Any, paths: Iterable[str], where: str) -> None:
    """PEFT makes no layers for such weights, so that with it the adapter is another one."""
    if stray := [path for path in paths if saved.target_modules and not check_target_module_exists(saved, path)]:
        raise ValueError(f"{where} holds weights for {stray}, which its own config does not adapt")
