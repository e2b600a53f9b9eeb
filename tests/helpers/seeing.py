"""Tiny models that see: their inputs have any number of images in each row."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import transformers
from originals import Original
from torch import Tensor, nn

IMAGE, IMAGES_TAKE = 90, 4  # the token that stands for a part of an image, and how many do for one
TEXT = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}  # fmt: skip
VISION = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
          "image_size": 16, "patch_size": 8}  # fmt: skip


def _llava() -> nn.Module:
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**VISION), text_config=transformers.LlamaConfig(**TEXT),
        image_token_id=IMAGE, vision_feature_layer=-1,
    )  # fmt: skip
    return transformers.LlavaForConditionalGeneration(config)


def _paligemma() -> nn.Module:
    config = transformers.PaliGemmaConfig(
        vision_config={**VISION, "model_type": "siglip_vision_model", "vision_use_head": False, "projection_dim": 32},
        text_config={**TEXT, "head_dim": 8, "model_type": "gemma"}, image_token_id=IMAGE, projection_dim=32,
        hidden_size=32,
    )  # fmt: skip
    return transformers.PaliGemmaForConditionalGeneration(config)


def _qwen2_vl() -> nn.Module:
    """Its tower reads the patches of all images as one sequence (N, d)."""
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}
    config = transformers.Qwen2VLConfig(
        text_config={**TEXT, "rope_parameters": rope}, image_token_id=IMAGE, video_token_id=91,
        vision_start_token_id=92, vision_end_token_id=93, vision_config={
            "depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 4, "patch_size": 4, "mlp_ratio": 2,
        },
    )  # fmt: skip
    return transformers.Qwen2VLForConditionalGeneration(config)


def _smolvlm() -> nn.Module:
    """Each row has places for as many images, and a mask that says which of them it has."""
    config = transformers.SmolVLMConfig(
        vision_config={**VISION, "model_type": "smolvlm_vision"}, text_config={**TEXT, "model_type": "llama"},
        image_token_id=IMAGE, scale_factor=1, pad_token_id=0,
    )  # fmt: skip
    return transformers.SmolVLMForConditionalGeneration(config)


def _idefics3() -> nn.Module:
    config = transformers.Idefics3Config(
        vision_config={**VISION, "model_type": "idefics3_vision"}, text_config={**TEXT, "model_type": "llama"},
        image_token_id=IMAGE, scale_factor=1, pad_token_id=0,
    )  # fmt: skip
    return transformers.Idefics3ForConditionalGeneration(config)


def _internvl() -> nn.Module:
    vision = {**VISION, "image_size": [16, 16], "patch_size": [4, 4], "model_type": "internvl_vision"}
    config = transformers.InternVLConfig(
        vision_config=vision, text_config={**TEXT, "model_type": "qwen2"}, image_token_id=IMAGE
    )
    return transformers.InternVLForConditionalGeneration(config)


def _mllama() -> nn.Module:
    """Its text reads images by cross-attention, and each row has places for as many images and tiles."""
    vision = {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_global_layers": 1,
        "attention_heads": 4, "image_size": 16, "patch_size": 8, "max_num_tiles": 2, "vision_output_dim": 64,
        "intermediate_layers_indices": [0], "supported_aspect_ratios": [[1, 1], [1, 2]],
    }  # fmt: skip
    rope = {"rope_type": "default", "rope_theta": 1e4}
    text = {**TEXT, "num_hidden_layers": 3, "cross_attention_layers": [1], "rope_parameters": rope}
    config = transformers.MllamaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE)
    model = transformers.MllamaForConditionalGeneration(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("gate"):  # 0 at the start, where the text sees no image
                parameter.fill_(1.0)
    return model


def _florence2() -> nn.Module:
    """Its text is an encoder and a decoder, and its tower reads windows of the images as rows."""
    text = {
        "model_type": "bart", "vocab_size": 96, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1,
        "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48,
        "max_position_embeddings": 64, "decoder_start_token_id": 2,
        "forced_eos_token_id": None,
    }  # fmt: skip
    vision = {
        "depths": (1, 1), "embed_dim": (8, 16), "num_heads": (2, 2), "num_groups": (2, 2), "window_size": 2,
        "patch_size": (7, 3), "patch_stride": (4, 2), "patch_padding": (3, 1), "patch_prenorm": (False, True),
        "projection_dim": 32, "max_temporal_embeddings": 4, "max_position_embeddings": 8,
    }  # fmt: skip
    config = transformers.Florence2Config(
        text_config=text, vision_config=vision, image_token_id=IMAGE, is_encoder_decoder=True
    )
    return transformers.Florence2ForConditionalGeneration(config)


MAKERS: dict[str, Callable[[], nn.Module]] = {
    "llava": _llava, "paligemma": _paligemma, "qwen2_vl": _qwen2_vl, "smolvlm": _smolvlm, "idefics3": _idefics3,
    "internvl": _internvl, "mllama": _mllama, "florence2": _florence2,
}  # fmt: skip


@functools.cache
def _made(kind: str) -> Original:
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        model = MAKERS[kind]()
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=parameter.shape[-1] ** -0.5)
    return Original(model.eval())


def seeing(kind: str) -> nn.Module:
    """A copy of a tiny model of a type."""
    return _made(kind).copy()


def seen(kind: str, per_row: Sequence[int]) -> dict[str, Any]:
    """Rows of text with so many images each, padded on the left."""
    generator = torch.Generator().manual_seed(1)

    def words(count: int) -> list[int]:
        return torch.randint(5, 80, (count,), generator=generator).tolist()

    rows, count = [], sum(per_row)
    for images in per_row:
        row = [1, *words(3)]
        for _ in range(images):
            row += [92, *[IMAGE] * {"mllama": 1, "florence2": 5}.get(kind, IMAGES_TAKE), 93, *words(2)]
        rows.append(row)
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    inputs: dict[str, Tensor] = {"input_ids": ids, "attention_mask": (ids != 0).long()}
    if kind == "florence2":
        inputs["decoder_input_ids"] = torch.tensor([[2, *words(3)] for _ in per_row])
    if kind == "qwen2_vl":
        inputs["mm_token_type_ids"] = (ids == IMAGE).long()
        inputs["pixel_values"] = torch.randn(16 * count, 3 * 2 * 16, generator=generator)
        inputs["image_grid_thw"] = torch.tensor([[1, 4, 4]] * count)
    elif kind == "mllama":  # images of one tile and of two
        has = torch.arange(max(per_row)) < torch.tensor(per_row).unsqueeze(1)
        tiles = torch.stack([torch.ones_like(has), has & (torch.arange(max(per_row)) % 2 == 0)], -1)  # (B, n, tiles)
        inputs["pixel_values"] = torch.randn(*tiles.shape, 3, 16, 16, generator=generator)
        inputs["aspect_ratio_mask"], inputs["aspect_ratio_ids"] = tiles.long(), has.long() * tiles.sum(-1)
        seen_by = (has.unsqueeze(-1) & tiles).unsqueeze(1) & (ids != 0)[:, :, None, None]
        inputs["cross_attention_mask"] = seen_by.long()
    elif kind in ("smolvlm", "idefics3"):
        has = torch.arange(max(per_row)) < torch.tensor(per_row).unsqueeze(1)
        mask = has[:, :, None, None].expand(-1, -1, 16, 16)
        inputs["pixel_values"] = torch.randn(*has.shape, 3, 16, 16, generator=generator) * mask.unsqueeze(2)
        inputs["pixel_attention_mask"] = mask
    else:
        inputs["pixel_values"] = torch.randn(count, 3, 16, 16, generator=generator)
    return inputs
