"""Trained adapters as experts of a mixture: what each adds at which modules of this model, or why it cannot."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor

from mixadapters.core.files import PREFIX
from mixadapters.tuners.bottleneck.model import EXPERT
from mixadapters.tuners.gathering import (
    BaseModules,
    Gathered,
    experts_in,
    gathered,
    lora_experts,
    own_weights,
    refuse_other_fields,
)
from mixadapters.tuners.moa.config import MoAConfig
from mixadapters.tuners.sources import check_base_model, read_folder

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


class ExpertSites(BaseModules, Protocol):
    """What a tuner knows of the places that can hold experts."""

    def expert_widths(self, config: MoAConfig, path: str) -> tuple[int, int]: ...


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
        scales, found = lora_experts(tuner, saved, weights, spec, where)
    elif kind == "BOTTLENECK" and config.expert_type != "lora":
        scales, found = _bottleneck(tuner, config, saved, weights, spec, where)
    else:
        takes = "LORA" if config.expert_type == "lora" else "BOTTLENECK"
        remedy = {
            "XLORA": "; gather the LoRA folders that it routes among",
            "LORA": "; for LoRA folders leave expert_type at 'lora'",
            "BOTTLENECK": "; say expert_type='bottleneck', or 'glu' for gated ones",
            "MOA": "; write its experts as folders first (export_expert)",
            "MIXDA": "; write its domains as folders first (export_domain)",
        }.get(kind, "")
        raise ValueError(
            f"{where} is a {kind} adapter; expert_type={config.expert_type!r} gathers {takes} adapters{remedy}"
        )
    return gathered(
        tuner, saved, scales, found, spec, where, widths=lambda path: tuner.expert_widths(config, path),
        options=config.bank_options(), why=LOST_BY_XLORA if of_xlora else "",
    )  # fmt: skip


def _bottleneck(
    tuner: ExpertSites, config: MoAConfig, saved: Any, weights: dict[str, Tensor], spec: dict[str, Any], where: str
) -> tuple[dict[str, float], dict[str, dict[str, Tensor]]]:
    theirs = {**saved.bank_options(), "placement": saved.placement, "adapter_input": saved.adapter_input}
    ours = {**config.bank_options(), "layer_norm": False, "placement": config.placement,
            "adapter_input": config.adapter_input}  # fmt: skip
    kind = "glu" if theirs["glu"] else "bottleneck"
    refuse_other_fields(theirs, ours, where, config, {"glu": f"expert_type={kind!r}"})
    if theirs["scale"] is None:
        raise ValueError(f"{where} was trained with scale='learnable', which experts of this mixture do not have")
    within = f"bottleneck_adapters.bank.experts.{EXPERT}"
    found = experts_in(own_weights(tuner, saved, weights, spec, where, f".{within}."), within)
    return dict.fromkeys(found, float(theirs["scale"])), found


def _of_lora(key: str) -> str:
    """The key that a weight of an expert of PEFT's X-LoRA has in a folder of that LoRA alone."""
    return PREFIX + key.removeprefix(XLORA) if key.startswith(XLORA) else key
