"""What trains: a linear probe, everything, or an adapter whose width is chosen so that trainable sizes are equal."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftConfig, get_peft_config, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from torch import nn
from transformers import TrainerCallback

from mixadapters.core.config import MixtureConfig
from mixadapters.core.registry import nearest
from mixadapters.core.routing import FROZEN
from mixadapters.tasks.models import Base, LikelihoodRanker
from mixadapters.training.callbacks import StageCallback
from mixadapters.tuners.bottleneck.config import BottleneckConfig
from mixadapters.tuners.mixda.config import MixDAConfig
from mixadapters.tuners.moa.config import MoAConfig

UNTRAINED = ("majority", "tfidf")  # no model at all; see baselines
MIXTURES = {"mixda": "mixda_untuned", "moa": "lora"}  # methods of domain adapters -> the same without any
METHODS = (*UNTRAINED, "frozen", "probe", "full", "lora", "bottleneck", "mixda_untuned", *MIXTURES)
HEAD = "classifier"


@dataclass(frozen=True)
class Method:
    """A row of a comparison.

    Args:
        name: one of METHODS, or the path of a JSON file with the config of any PEFT type.
        parameters: trainable parameters besides the head, for adapters that this module sizes.
        layers: adapters sit in so many of the upper layers; None: in all.
        domains: name -> folder of a trained domain adapter, for MixDA (bottlenecks) and MoA (LoRA).
        texts: domain, and "frozen" for general text -> token ids of its text, that MoA's gate counts.
    """

    name: str
    parameters: int
    layers: int | None
    domains: Mapping[str, str]
    texts: Mapping[str, Sequence[Sequence[int]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.name not in METHODS and not self.name.endswith(".json"):
            raise ValueError(
                f"method {self.name!r} is unknown; choose from {', '.join(METHODS)}, or give a config's .json file."
                f"{nearest(self.name, METHODS)}"
            )
        if self.name.endswith(".json"):
            read_config(self.name)

    def check(self, base: Base) -> None:
        """Raises ValueError: the method says nothing about such a model."""
        if base.form != "head" and self.name == "probe":
            raise ValueError("method 'probe' trains a head, and a decoder has none; take 'frozen' (zero-shot)")
        if base.form == "head" and self.name == "frozen":
            raise ValueError("method 'frozen' with an encoder is a random head; take 'probe'")
        depth = base.config.get_text_config().num_hidden_layers
        if self.layers is not None and self.layers > depth:
            raise ValueError(f"layers={self.layers} must be at most the {depth} layers of model {base.path!r}")

    def build(self, base: Base) -> tuple[nn.Module, list[TrainerCallback], dict[str, Any]]:
        """The model to train, its callbacks, and the adapter's settings (with the rank found, where one was)."""
        self.check(base)
        model = base.load()
        callbacks: list[TrainerCallback] = []
        settings: dict[str, Any] = {}
        if self.name in ("frozen", "probe"):
            model.requires_grad_(False)
            if self.name == "probe":
                model.get_submodule(HEAD).requires_grad_(True)
        elif self.name != "full":
            config, settings = self.config(base)
            model = get_peft_model(model, config)
            if self.name == "moa":
                domains = {name: text for name, text in self.texts.items() if name != FROZEN}
                model.base_model.fit_gate(domains, self.texts[FROZEN])
            if isinstance(config, MixtureConfig) and "task" in type(config).stages:
                callbacks.append(StageCallback("task"))
        return (LikelihoodRanker(model) if base.form == "likelihood" else model), callbacks, settings

    def config(self, base: Base) -> tuple[PeftConfig, dict[str, Any]]:
        """The adapter's config at the size asked for."""
        saved = {"modules_to_save": [HEAD]} if base.form == "head" else {"task_type": "CAUSAL_LM"}
        if base.config.is_encoder_decoder:
            saved = {"task_type": "SEQ_2_SEQ_LM"}
        if self.name.endswith(".json"):
            given = read_config(self.name)
            return get_peft_config({**saved, **given}), given
        make = self._maker(base, saved)
        # Experts with weights cannot be gathered on the meta device.
        rank = rank_for(self.parameters, lambda r: make(r, True), base, empty=self.name != "moa")
        return make(rank, False), {"rank": rank}

    def _maker(self, base: Base, saved: dict[str, Any]) -> Callable[[int, bool], PeftConfig]:
        """(rank, only to count) -> config."""
        depth = base.config.get_text_config().num_hidden_layers
        upper = upper_layers(depth, self.layers) if self.layers else None
        shared: dict[str, Any] = {**saved, "layers_to_transform": upper}
        if self.name == "lora":
            return lambda r, _: LoraConfig(r=r, lora_alpha=2 * r, **shared)
        if self.name == "bottleneck":
            return lambda r, _: BottleneckConfig(r=r, activation="relu", **shared)
        if self.name == "moa":  # the domains' LoRA are frozen; one more, where they are, is always on and trains
            return lambda r, _: MoAConfig(
                experts=dict(self.domains), router="counts", router_scope="model", n_shared_experts=1, r=r,
                lora_alpha=2 * r, **saved,
            )  # fmt: skip
        shared["domain_layers"] = domain_layers(depth, self.layers)
        # Domain adapters are frozen, so that their width does not count: new ones stand for the trained.
        new = list(self.domains) or ["domain"]
        untuned = self.name == "mixda_untuned"
        return lambda r, counted: MixDAConfig(
            domains=new if counted or untuned else dict(self.domains), task_r=r, **shared
        )


def read_config(file: str) -> dict[str, Any]:
    """The config of an adapter from a JSON file. Raises ValueError: it is not there, or none."""
    if not Path(file).is_file():
        raise ValueError(f"method {file!r} is no file; a config's .json file must be there")
    try:
        found = json.loads(Path(file).read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"method {file!r} cannot be read as JSON: {error}") from None
    kind = found.get("peft_type") if isinstance(found, dict) else None
    known = sorted(str(one.value) for one in PEFT_TYPE_TO_CONFIG_MAPPING)
    if kind not in known:
        raise ValueError(f"method {file!r} must be an object with a peft_type, got {kind!r}; have {', '.join(known)}")
    return found


def upper_layers(depth: int, layers: int | None) -> list[int]:
    """The layers that have adapters: all, or so many of the upper ones."""
    return list(range(depth - (layers or depth), depth))


def domain_layers(depth: int, layers: int | None) -> list[int]:
    """Layers of domain adapters: a third and half of the depth up (the paper), or the lower two that have adapters."""
    return [depth // 3, depth // 2] if layers is None else upper_layers(depth, layers)[:2]


def trainable(model: nn.Module, head: bool = False) -> int:
    """Trainable parameters, those of the head or those beside it."""
    return sum(p.numel() for n, p in model.named_parameters() if p.requires_grad and (HEAD in n.split(".")) == head)


def rank_for(parameters: int, make: Callable[[int], PeftConfig], base: Base, empty: bool = True) -> int:
    """The rank at which an adapter's trainable size is nearest to `parameters`; a size is linear in the rank.

    empty: count on a model without weights.

    Raises ValueError: not even rank 1 is as small, or the model itself is smaller.
    """
    whole = sum(p.numel() for p in base.load(empty=True).parameters())
    if parameters > whole:
        raise ValueError(f"parameters={parameters} is more than the {whole} of model {base.path!r}; pass fewer")

    def size(rank: int) -> int:
        model = get_peft_model(base.load(empty), make(rank))
        if isinstance(config := model.peft_config["default"], MixtureConfig) and "task" in type(config).stages:
            model.base_model.set_stage("task")
        return trainable(model)

    one, two = size(1), size(2)
    rank = round((parameters - one) / (two - one)) + 1
    if rank < 1:
        raise ValueError(f"parameters={parameters} is too small: with rank 1 there are {one} trainable ones")
    return rank
