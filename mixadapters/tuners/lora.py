"""Trained LoRA adapters of PEFT as experts: read exactly, or refused with the field and the remedy.

What a stock LoRA adds to a linear layer is `scale * (B (A x) + b)`, with `scale` alpha / r, or alpha / sqrt(r) with
rsLoRA. That is an expert of the kind "lora": down = A, up = B, b_up = b, no activation. The scale stays a factor of
the expert, since folded into B it would round in half precision.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from peft import LoraConfig
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from peft.utils.other import get_pattern_key
from torch import Tensor, nn

from mixadapters.core.bank import Weights
from mixadapters.core.fields import check_fits
from mixadapters.core.files import PREFIX
from mixadapters.core.patterns import check_pattern
from mixadapters.core.sites import such_as, unwrapped
from mixadapters.tuners.sources import write_adapter

RUN_TOGETHER = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))  # by servers, as one layer
# Those that leave the base model's weights alone; PEFT takes None for False.
EXACT_INITS = (True, False, None, "gaussian", "orthogonal", "eva", "mica")
# Fields that say how the adapter was trained or where it lay, and nothing of what its weights compute.
SILENT = {
    "task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
    "r", "target_modules", "exclude_modules", "lora_alpha", "lora_dropout", "fan_in_fan_out", "use_rslora",
    "layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern", "loftq_config", "eva_config",
    "runtime_config", "lora_bias", "megatron_core", "qalora_group_size",
}  # fmt: skip
# What the other fields do that no expert can, and what helps.
REMEDIES = {
    "use_dora": "DoRA scales the frozen weight itself; merge it into a base of its own, or train plain LoRA",
    "layer_replication": "it changes the layers of the base model",
    "target_parameters": "it adapts parameters, not modules; train with target_modules",
    "trainable_token_indices": "it changes embeddings, which all experts share; train without it",
    "alora_invocation_tokens": "an aLoRA acts from its invocation tokens on only",
    "arrow_config": "it is a router over other adapters; gather those",
    "corda_config": "convert it with path_initial_model_for_weight_conversion when saving",
    "lora_ga_config": "convert it with path_initial_model_for_weight_conversion when saving",
}


def default_targets(model_type: str, model: nn.Module) -> list[str]:
    """Suffixes of the modules to which PEFT gives LoRA in models of a type. Raises ValueError where it has none.

    model: whose modules the remedy names.
    """
    if model_type not in TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING:
        raise ValueError(
            f"Please specify `target_modules`{such_as(model)}, or 'all-linear': PEFT has no default for "
            f"model_type={model_type!r}"
        )
    return TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING[model_type]


# Of the fields that say what its weights compute, and where.
KINDS: dict[str, Any] = {
    "r": int, "lora_alpha": float, "use_rslora": bool, "bias": Literal["none", "all", "lora_only"],
    "rank_pattern": dict[str, int], "alpha_pattern": dict[str, float],
    "target_modules": list[str] | set[str] | str | None,
    "exclude_modules": list[str] | set[str] | str | None, "modules_to_save": list[str] | None,
    "layers_to_transform": list[int] | int | None, "layers_pattern": list[str] | str | None,
}  # fmt: skip
PATTERNS = ("target_modules", "exclude_modules", "layers_pattern", "rank_pattern", "alpha_pattern")


class Factors(NamedTuple):
    """What one LoRA adds at one linear layer: scale * (up (down x) + b_up)."""

    down: Tensor  # (r, K)
    up: Tensor  # (M, r)
    scale: float
    b_up: Tensor | None = None  # (M,)


def factors_of(experts: Sequence[Weights]) -> Factors:
    """What linear experts of one scale add together: one LoRA, of their ranks side by side."""
    biases = [w.b_up.detach() for w in experts if w.b_up is not None]
    down, up = torch.cat([w.down for w in experts]), torch.cat([w.up for w in experts], 1)
    b_up = torch.stack(biases).sum(0) if biases else None
    return Factors(down.detach(), up.detach(), float(experts[0].scale), b_up)


def refuse_inexact(config: LoraConfig, where: str, ignore_modules_to_save: bool = False) -> None:
    """Raise ValueError where a saved LoRA is more, or other, than what its A and B add.

    where: names the field and the source at the beginning of the message.
    """
    default = LoraConfig()
    init = config.init_lora_weights
    if (init.lower() if isinstance(init, str) else init) not in EXACT_INITS:
        raise ValueError(
            f"{where} has init_lora_weights={init!r}, which changed the base model's weights; save it with "
            "path_initial_model_for_weight_conversion, which turns it into plain LoRA"
        )
    if config.bias == "all":
        raise ValueError(f"{where} has bias='all': biases outside of its targets changed too; train with bias='none'")
    refuse_saved_modules(config, where, ignore_modules_to_save)
    for name, value in config.to_dict().items():
        if name in SILENT | {"bias", "modules_to_save", "init_lora_weights"}:
            continue
        if value != getattr(default, name, None) and value not in (None, [], {}, False):
            remedy = REMEDIES.get(name, "train plain LoRA, or merge the adapter")
            raise ValueError(f"{where} has {name}={value!r}, which no expert of a mixture can do: {remedy}")


def refuse_saved_modules(config: Any, where: str, ignore: bool) -> None:
    """Raise ValueError where a saved adapter of any type has modules of its own, and the user has not waived them."""
    if config.modules_to_save and not ignore:
        raise ValueError(
            f"{where} has modules_to_save={config.modules_to_save}, of which a mixture can hold one version only; "
            "gather it without them by {'source': ..., 'ignore_modules_to_save': True}"
        )


def check_lora(config: LoraConfig, where: str) -> None:
    """Refuse values of a saved config by which nothing can be computed, or that would take for ever.

    PEFT looks at few of them when it reads a file, which may be a stranger's.

    Raises:
        ValueError: the field, its value and what it must be; or a pattern that can take very long to match.
    """
    try:
        for name, kind in KINDS.items():
            check_fits(name, getattr(config, name), kind)
        for name in PATTERNS:
            value: Any = getattr(config, name)
            if value is None or isinstance(value, set):  # a set holds ends of paths
                continue
            patterns = [value] if isinstance(value, str) else value
            for pattern in patterns:
                check_pattern(name, pattern)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def scale_at(config: LoraConfig, path: str, rank: int) -> float:
    """The factor of a LoRA at the module `path`."""
    alpha = config.alpha_pattern.get(get_pattern_key(config.alpha_pattern.keys(), path), config.lora_alpha)
    return alpha / (math.sqrt(rank) if config.use_rslora else rank)


def read_factors(
    config: LoraConfig, weights: dict[str, Tensor], where: str
) -> tuple[dict[str, Factors], dict[str, Tensor]]:
    """{module path: what the LoRA adds there}, and {module path: its absolute bias} with bias="lora_only".

    Raises:
        ValueError: keys that are no linear LoRA's, factors that do not fit each other, or a rank that the config does
            not give.
    """
    parts: dict[str, dict[str, Tensor]] = {}
    biases: dict[str, Tensor] = {}
    for key, tensor in weights.items():
        path, name = _parted(key)
        if tensor.dim() > 2 and tensor.shape[2:].numel() == 1:  # of a convolution of kernel 1
            tensor = tensor.flatten(1)
        if name is None and key.endswith(".bias") and config.bias == "lora_only":
            biases[path] = tensor
        elif name is None or tensor.dim() > 2:
            raise ValueError(
                f"{where}: {key!r} is no weight of a LoRA on a linear layer; gather LoRA of linear layers"
            )
        else:
            parts.setdefault(path, {})[name] = tensor
    found = {}
    for path, tensors in parts.items():
        if not {"lora_A.weight", "lora_B.weight"} <= tensors.keys():
            raise ValueError(
                f"{where} holds {sorted(tensors)} at {path!r}; a LoRA has lora_A.weight and lora_B.weight"
            )
        down, up, b_up = tensors["lora_A.weight"], tensors["lora_B.weight"], tensors.get("lora_B.bias")
        rank = config.rank_pattern.get(get_pattern_key(config.rank_pattern.keys(), path), config.r)
        if down.shape[0] != rank or up.shape[1] != rank:
            raise ValueError(
                f"{where}: at {path!r} the config gives rank {rank}, the file {down.shape[0]} and {up.shape[1]}"
            )
        found[path] = Factors(down, up, scale_at(config, path, rank), b_up)
    return found, biases


def _parted(key: str) -> tuple[str, Any]:
    """The module and the part of the LoRA that a key of a saved file names; (module, None) for others."""
    key = key.removeprefix(PREFIX)
    for part in ("lora_A.weight", "lora_B.weight", "lora_B.bias"):
        if key.endswith(f".{part}"):
            return key[: -len(part) - 1], part
    return key.removesuffix(".bias").removesuffix(".weight").removesuffix(".base_layer"), None


def save_lora(
    factors: Mapping[str, Factors], folder: str | Path, config: Any, pad_ranks: bool, model: nn.Module
) -> None:
    """Write {module: what is added there} as an adapter folder of PEFT's LoRA.

    config: of the mixture; its base model and task are the LoRA's too.
    pad_ranks: one rank at all modules, filled up with zeros, and the scale in B: for servers that read `r` and
        `lora_alpha` alone, and no patterns of them; and zeros at modules that they run together with adapted ones.
    model: that the factors are for.
    """
    if pad_ranks:
        factors = with_their_group(factors, model)
    ranks = {path: factor.down.shape[0] for path, factor in factors.items()}
    if pad_ranks:
        ranks = dict.fromkeys(ranks, max(ranks.values()))
        factors = {path: _unscaled(factor) for path, factor in factors.items()}
    alphas = {path: _alpha(factor.scale, ranks[path]) for path, factor in factors.items()}
    rank, alpha = Counter(ranks.values()).most_common(1)[0][0], Counter(alphas.values()).most_common(1)[0][0]
    with_bias = any(factor.b_up is not None for factor in factors.values())
    lora = LoraConfig(
        r=rank, lora_alpha=alpha, target_modules=sorted(factors), task_type=config.task_type, lora_bias=with_bias,
        rank_pattern={path: r for path, r in ranks.items() if r != rank},
        alpha_pattern={path: a for path, a in alphas.items() if a != alpha},
        base_model_name_or_path=config.base_model_name_or_path, revision=config.revision, inference_mode=True,
    )  # fmt: skip
    tensors = {}
    for path, (down, up, _, b_up) in factors.items():
        extra = ranks[path] - down.shape[0]
        key = f"{PREFIX}{path}"
        tensors[f"{key}.lora_A.weight"] = torch.nn.functional.pad(down, (0, 0, 0, extra))
        tensors[f"{key}.lora_B.weight"] = torch.nn.functional.pad(up, (0, extra))
        if with_bias:
            tensors[f"{key}.lora_B.bias"] = up.new_zeros(up.shape[0]) if b_up is None else b_up
    write_adapter(folder, lora, tensors)


def with_their_group(factors: Mapping[str, Factors], model: nn.Module) -> dict[str, Factors]:
    """The same, with zeros at the linear layers that servers run as one with adapted ones.

    SGLang (srt/lora/lora.py, `normalize_qkv_proj`, of 2026) stacks the factors of a group by the name of its first
    member: without all of them it fails, or leaves out what is there.
    """
    whole = dict(factors)
    for path, factor in factors.items():
        parent, _, name = path.rpartition(".")
        for place in (f"{parent}.{other}" for group in RUN_TOGETHER if name in group for other in group):
            linear = _linear_at(model, place)
            if place not in whole and linear is not None:
                width_in, width_out = linear
                whole[place] = Factors(factor.down.new_zeros(1, width_in), factor.up.new_zeros(width_out, 1), 1.0)
    return whole


def _linear_at(model: nn.Module, path: str) -> tuple[int, int] | None:
    """The widths of the linear layer at a path; None where there is none."""
    module: Any = model
    for part in path.split("."):
        module = unwrapped(getattr(module, part, None))
    return (module.in_features, module.out_features) if isinstance(module, nn.Linear) else None


def _unscaled(factor: Factors) -> Factors:
    """The same sum with a scale of 1."""
    down, up, scale, b_up = factor
    return Factors(down, up * scale, 1.0, None if b_up is None else b_up * scale)


def _alpha(scale: float, rank: int) -> float:
    """The alpha whose quotient by `rank` is `scale`, to the last bit where there is one."""
    alpha = scale * rank
    return int(alpha) if alpha == int(alpha) else alpha
