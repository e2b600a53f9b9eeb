"""How pipelines of diffusers (0.42) call their models: a row for each class of model.

What `encode_prompt` of a pipeline returns is said by name and in its order, and goes to the model's arguments of those
names; the rest of a call follows from the model's config and the size of what it is given.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from mixadapters.core.hooks import root_of

TEXT, MASK, POOLED = "encoder_hidden_states", "encoder_attention_mask", "pooled_projections"
POOLED_XL, SIZES_XL = "added_cond_kwargs.text_embeds", "added_cond_kwargs.time_ids"
HUNYUAN_SIZE = (1024, 1024)  # `original_size` of its pipeline


@dataclass(frozen=True)
class Encoding:
    """One call of a pipeline's `encode_prompt`.

    Attributes:
        returns: the model's argument for each tensor that it returns; "-" before those of the unconditional pass.
            "" is left out: the pipeline does not pass it on.
        options: arguments of this call besides the pipeline's usual ones.
    """

    returns: tuple[str, ...]
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Call:
    """How a class of model is called, and where its adapters sit: on self-attention in class-conditional models, on
    cross-attention in those that read a prompt by it, on joint attention where image and text are one sequence.

    Attributes:
        site: regular expression of the attention blocks.
        encodings: of the model's config; none for models without prompts.
        timestep_factor: the model's timestep, the scheduler's being 1; of the model's config.
        timestep_as_input: whether timesteps have the dtype of the noisy input, in which the model embeds them.
        sizes: of the model and the picture's (height, width) in pixels: arguments of one row.
        shared: of the model and its noisy input: arguments that all rows have in common.
    """

    site: str
    encodings: Callable[[Any], tuple[Encoding, ...]] = lambda config: ()
    timestep_factor: Callable[[Any], float] = lambda config: 1.0
    timestep_as_input: bool = False
    sizes: Callable[[Any, int, int], dict[str, Tensor]] = lambda model, height, width: {}
    shared: Callable[[Any, Tensor], dict[str, Any]] = lambda model, x: {}


def encoding(*returns: str, **options: Any) -> Callable[[Any], tuple[Encoding, ...]]:
    return lambda config: (Encoding(returns, options),)


# --- what is particular to a class ---------------------------------------------------------------------------------


def _is_xl(config: Any) -> bool:
    return config.get("addition_embed_type") == "text_time"


def _encodings_of_unet(config: Any) -> tuple[Encoding, ...]:
    text = (TEXT, f"-{TEXT}")
    return (Encoding((*text, POOLED_XL, f"-{POOLED_XL}") if _is_xl(config) else text),)


def _sizes_of_unet(model: Any, height: int, width: int) -> dict[str, Tensor]:
    """Original size, crop and target size."""
    return {SIZES_XL: torch.tensor([[height, width, 0, 0, height, width]])} if _is_xl(model.config) else {}


def _sizes_of_pixart(model: Any, height: int, width: int) -> dict[str, Tensor]:
    if not model.use_additional_conditions:  # those of 1024 pixels read them
        return {}
    return {
        "added_cond_kwargs.resolution": torch.tensor([[height, width]]),
        "added_cond_kwargs.aspect_ratio": torch.tensor([[height / width]]),
    }


def _encodings_of_hunyuan(config: Any) -> tuple[Encoding, ...]:
    """By its two text encoders, each with a length of its own."""
    found = []
    for index, (name, length) in enumerate((("", config.get("text_len")), ("_t5", config.get("text_len_t5")))):
        text, mask = f"{TEXT}{name}", f"text_embedding_mask{name}"
        options = {"text_encoder_index": index, "max_sequence_length": length}
        found.append(Encoding((text, f"-{text}", mask, f"-{mask}"), options))
    return tuple(found)


def _sizes_of_hunyuan(model: Any, height: int, width: int) -> dict[str, Tensor]:
    sizes = torch.tensor([[*HUNYUAN_SIZE, height, width, 0, 0]])
    return {"image_meta_size": sizes, "style": torch.zeros(1, dtype=torch.long)}


def _shared_of_hunyuan(model: Any, x: Tensor) -> dict[str, Any]:
    patch, width = model.config.patch_size, model.inner_dim // model.num_heads
    grid = tuple(side // patch for side in x.shape[-2:])
    return {"image_rotary_emb": tuple(part.to(x.device) for part in _hunyuan_positions(width, patch, *grid))}


@lru_cache(maxsize=8)
def _hunyuan_positions(width: int, patch: int, height: int, across: int) -> tuple[Tensor, Tensor]:
    from diffusers.models.embeddings import get_2d_rotary_pos_embed
    from diffusers.pipelines.hunyuandit.pipeline_hunyuandit import get_resize_crop_region_for_grid

    crops = get_resize_crop_region_for_grid((height, across), 512 // 8 // patch)
    return get_2d_rotary_pos_embed(width, crops, (height, across), device="cpu", output_type="pt")


CALLS = {
    "AuraFlowTransformer2DModel": Call(
        r"(joint|single)_transformer_blocks\.\d+\.attn",
        encoding(TEXT, "", f"-{TEXT}", ""),  # it zeroes the padding, and passes no mask
        timestep_factor=lambda config: 1e-3,
    ),
    "DiTTransformer2DModel": Call(r"transformer_blocks\.\d+\.attn1"),
    "HunyuanDiT2DModel": Call(
        r"blocks\.\d+\.attn2",
        _encodings_of_hunyuan,
        timestep_as_input=True,
        sizes=_sizes_of_hunyuan,
        shared=_shared_of_hunyuan,
    ),
    "PixArtTransformer2DModel": Call(
        r"transformer_blocks\.\d+\.attn2", encoding(TEXT, MASK, f"-{TEXT}", f"-{MASK}"), sizes=_sizes_of_pixart
    ),
    "SD3Transformer2DModel": Call(
        r"transformer_blocks\.\d+\.attn", encoding(TEXT, f"-{TEXT}", POOLED, f"-{POOLED}")
    ),
    "SanaTransformer2DModel": Call(
        r"transformer_blocks\.\d+\.attn2",
        encoding(TEXT, MASK, f"-{TEXT}", f"-{MASK}"),
        timestep_factor=lambda config: config.get("timestep_scale", 1.0),
    ),
    "UNet2DConditionModel": Call(r"(.*\.)?transformer_blocks\.\d+\.attn2", _encodings_of_unet, sizes=_sizes_of_unet),
    "WanTransformer3DModel": Call(r"blocks\.\d+\.attn2", encoding(TEXT, f"-{TEXT}")),
}  # fmt: skip


# --- asked of any pipeline or model --------------------------------------------------------------------------------


def denoiser_of(pipe: Any) -> nn.Module:
    """The model of a pipeline that predicts noise or velocity, without what wraps it."""
    found = [getattr(pipe, name, None) for name in ("unet", "transformer")]
    model = next((model for model in found if model is not None), None)  # compiled ones have no truth value
    if model is None:
        raise ValueError(f"{type(pipe).__name__} has neither unet nor transformer")
    return root_of(model)


def timestep_factor(model: Any) -> float:
    """What brings a scheduler's timesteps to those that the model takes."""
    model = root_of(model)
    call = CALLS.get(type(model).__name__)
    return 1.0 if call is None else float(call.timestep_factor(model.config))


def model_arguments(model: Any, x: Tensor, timestep: Tensor) -> dict[str, Any]:
    """Arguments of the model's forward beside the noisy input x (B, C, ...), in the model's dtype, and the conditions;
    timestep: (B,)."""
    model = root_of(model)
    call = CALLS.get(type(model).__name__)
    if call is None:
        return {"timestep": timestep}
    return {"timestep": timestep.to(x.dtype) if call.timestep_as_input else timestep, **call.shared(model, x)}


def null_class(model: nn.Module) -> Tensor:
    """(1,) the class of a class-conditional model that stands for none.

    Raises:
        ValueError: a model whose config does not tell it.
    """
    null = model.config.get("num_embeds_ada_norm")
    if null is None:
        raise ValueError(f"the config of {type(model).__name__} does not tell its null class; use record()")
    return torch.tensor([null])


def refuse_distilled(model: nn.Module) -> None:
    """ValueError for models that were distilled to take the guidance scale as an input, as FLUX dev and LCM."""
    setting = getattr(getattr(model, "config", None), "get", lambda name: None)  # those of diffusers are dicts
    if setting("guidance_embeds") or setting("time_cond_proj_dim"):
        raise ValueError(
            f"{type(model).__name__} embeds the guidance scale itself, so there is no second pass to distil"
        )
