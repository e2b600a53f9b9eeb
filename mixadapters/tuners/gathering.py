"""A trained adapter as an expert of a mixture of this model: placed at its modules, whole and of their widths."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from typing import Any, NamedTuple, Protocol

import torch
from peft.tuners.tuners_utils import check_target_module_exists
from torch import Tensor, nn

from mixadapters.core.bank import AdapterBank
from mixadapters.core.files import PREFIX, has_others
from mixadapters.tuners.lora import REMEDIES, check_lora, read_factors, refuse_inexact, refuse_saved_modules
from mixadapters.tuners.sources import places_of


class BaseModules(Protocol):
    """What a tuner knows of the modules of its base model."""

    model: nn.Module

    def places(self) -> list[str]: ...

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


def gathered(
    tuner: BaseModules, saved: Any, scales: dict[str, float], found: dict[str, dict[str, Tensor]],
    spec: dict[str, Any], where: str, *, widths: Callable[[str], tuple[int, int]],
    options: Mapping[str, Any], why: str = "",
) -> Gathered:  # fmt: skip
    """An expert by the modules of this model.

    Args:
        scales, found: by the modules that the source names.
        widths: of the input and the output of an expert at a module.
        options: arguments of `AdapterBank` for the experts.
        why: how a source may have come to lack weights.

    Raises:
        ValueError: modules that are not there, parameters of other names or shapes, or that are missing.
    """
    placed = _placed(tuner, found, where)
    for path, tensors in placed.items():
        check_tensors(widths(path), options, path, tensors, where)
    _refuse_incomplete(tuner, saved, placed, where, why)
    return Gathered(_placed(tuner, {p: s * spec.get("scale", 1.0) for p, s in scales.items()}, where), placed)


def own_weights(
    tuner: BaseModules, saved: Any, weights: dict[str, Tensor], spec: dict[str, Any], where: str, mark: str
) -> dict[str, Tensor]:
    """The weights of an adapter of a type of ours that is to be an expert.

    mark: in the keys of all of them.

    Raises:
        ValueError: it has more than these: modules of its own, trained tokens, or keys that are none of its type.
    """
    refuse_saved_modules(saved, where, spec.get("ignore_modules_to_save", False))
    if saved.trainable_token_indices:
        remedy = REMEDIES["trainable_token_indices"]
        raise ValueError(f"{where} has trainable_token_indices={saved.trainable_token_indices!r:.80}: {remedy}")
    kept = _without_base(tuner, saved, weights, where, lambda key: mark in key)
    if stray := [key for key in kept if mark not in key]:
        raise ValueError(
            f"{where} holds {stray[0]!r:.200}, which is no weight of a {saved.peft_type.value} adapter, and no expert "
            "can have; save the adapter again"
        )
    return kept


def experts_in(weights: Mapping[str, Tensor], within: str) -> dict[str, dict[str, Tensor]]:
    """{module that a source names: {parameter of an `Expert`: tensor}} of the expert whose keys go on so."""
    found: dict[str, dict[str, Tensor]] = {}
    for key, tensor in weights.items():
        path, mark, rest = key.removeprefix(PREFIX).partition(f".{within}.")
        if mark:
            found.setdefault(path, {})[rest] = tensor
    return found


def refuse_other_fields(
    theirs: Mapping[str, Any], ours: Mapping[str, Any], where: str, config: Any, fields: Mapping[str, str]
) -> None:
    """Raise ValueError for a source that was trained with other values than `ours`.

    Args:
        config: of the mixture.
        fields: what is called otherwise there -> the field with its value that would fit the source.
    """
    for name, value in ours.items():
        if theirs[name] != value:
            fitting = fields.get(name, f"{name}={theirs[name]!r}" if hasattr(config, name) else None)
            remedy = "no field of this mixture changes that" if fitting is None else f"make the mixture with {fitting}"
            raise ValueError(
                f"{where} was trained with {name}={theirs[name]!r}, this mixture has {value!r}: {remedy}, or leave "
                f"this source out, or train it with {value!r}"
            )


def check_tensors(
    widths: tuple[int, int], options: Mapping[str, Any], path: str, tensors: dict[str, Tensor], where: str
) -> None:
    """Refuse what are not the parameters of an expert in a bank of these widths and options.

    Raises:
        ValueError: other names or shapes, or values that are not finite.
    """
    found = tensors["down.weight"].shape if "down.weight" in tensors else ()
    expected = _shapes(*widths, max([1, *found[:1]]), "up.bias" in tensors, **options)
    if tensors.keys() != expected.keys():
        raise ValueError(f"{where} has {sorted(tensors)} at {path!r}, expected {sorted(expected)}")
    for key, tensor in tensors.items():
        if tuple(tensor.shape) != expected[key]:
            raise ValueError(
                f"{where}: {key} at {path!r} is {tuple(tensor.shape)} in the source, expected {expected[key]}: was it "
                "trained on another base model?"
            )
        if not tensor.is_floating_point() or has_others(tensor):
            raise ValueError(f"{where}: {key} at {path!r} holds values that are not finite numbers")


@lru_cache(maxsize=256)
def _shapes(width_in: int, width_out: int, rank: int, up_bias: bool, **options: Any) -> dict[str, tuple[int, ...]]:
    """The parameters of an expert by name, of a bank without memory."""
    with torch.device("meta"):
        bank = AdapterBank(width_in, width_out, **options)
        bank.add("expert", rank, up_bias=up_bias)
    return {name: tuple(parameter.shape) for name, parameter in bank.experts["expert"].named_parameters()}


def lora_experts(
    tuner: BaseModules, saved: Any, weights: dict[str, Tensor], spec: dict[str, Any], where: str
) -> tuple[dict[str, float], dict[str, dict[str, Tensor]]]:
    """What a saved LoRA of PEFT is as an expert: {module: factor}, {module: {parameter of an `Expert`: tensor}}.

    Raises:
        ValueError: it is more, or other, than what its A and B add.
    """
    check_lora(saved, where)
    refuse_inexact(saved, where, spec.get("ignore_modules_to_save", False))

    def own(key: str) -> bool:
        part = "weight" if key.endswith(".weight") else "bias"
        return ".lora_" in key or (part == "bias" and (saved.bias != "none" or not key.endswith(".bias")))

    factors, biases = read_factors(saved, _without_base(tuner, saved, weights, where, own), where)
    _refuse_stray(saved, factors, where)
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


def _without_base(
    tuner: BaseModules, saved: Any, weights: dict[str, Tensor], where: str, is_own: Callable[[str], bool]
) -> dict[str, Tensor]:
    """Without embeddings and heads of the base model, which PEFT may save beside: waived ones, or those unchanged.

    is_own: whether a key is that of a weight of the adapter.
    """
    kept = {}
    waived = tuple(f".{module}." for module in saved.modules_to_save or ())
    for key, tensor in weights.items():
        if any(module in f".{key}" for module in waived):
            continue
        if is_own(key):
            kept[key] = tensor
            continue
        part = "weight" if key.endswith(".weight") else "bias"
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


def _refuse_stray(saved: Any, paths: Iterable[str], where: str) -> None:
    """PEFT makes no layers for such weights, so that there the adapter is another one."""
    if stray := [path for path in paths if saved.target_modules and not check_target_module_exists(saved, path)]:
        raise ValueError(f"{where} holds weights for {stray}, which its own config does not adapt")


def _placed(tuner: BaseModules, by_path: dict[str, Any], where: str) -> dict[str, Any]:
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


def _refuse_incomplete(tuner: BaseModules, saved: Any, placed: Iterable[str], where: str, why: str) -> None:
    have = set(placed)
    wanted = [p for p in tuner.places() if saved.target_modules and check_target_module_exists(saved, p)]
    if missing := [path for path in wanted if path not in have]:
        raise ValueError(f"{where} lacks the weights of {missing}, which its own config says that it adapts{why}")
