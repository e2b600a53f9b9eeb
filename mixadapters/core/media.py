"""Models that read images or sounds beside text: which modules read those, and whether rows share them evenly.

Such modules have other rows than the text: any number for each row of the batch, one after the other.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mixadapters.core.sites import STACKS, has_two_stacks, unwrapped

MEDIA = re.compile("vision|image|video|audio")
CROSS = re.compile(r"(?:.*\.)?cross_attn\.[kv]_proj")  # of Mllama, which reads images there, beside its text
PLACES = ("pixel_attention_mask", "aspect_ratio_mask")  # which of its places for images each row has used
# What configs call the token that stands for a part of an image or a sound.
PLACEHOLDERS = tuple(f"{kind}_token_{end}" for kind in ("image", "video", "audio") for end in ("id", "index"))


def reads_media(stack: str) -> bool:
    """Whether a stack is no text, but a part of the model that reads images or sounds (`media_part`)."""
    return stack not in STACKS


def media_part(path: str, model: nn.Module) -> str:
    """The part of a model of text and more that holds the module at `path` and reads images or sounds: a tower, what
    stands between it and the text, or keys and values of cross-attention. "" in the text, and in models of one kind or
    of an encoder that reads one kind."""
    towers, text = _kinds_of_parts(model)
    if not towers:
        return ""
    if CROSS.fullmatch(path):
        return path
    above, names = model, path.split(".")
    for end, name in enumerate(names, 1):
        below = unwrapped(getattr(above, name))
        if _config_type(below) in towers:
            return ".".join(names[:end])
        beside = {_config_type(unwrapped(child)) for child in above.children()}
        if towers & beside and text & beside and not _is_text(name, below, text):
            return ".".join(names[:end])
        above = below
    return ""


def _kinds_of_parts(model: nn.Module) -> tuple[set[type], set[type]]:
    """The types of the configs of the parts that read images or sounds, and of the part that reads text."""
    config: Any = getattr(model, "config", None)
    text = getattr(config, "text_config", None)
    if has_two_stacks(model) and not getattr(text, "is_encoder_decoder", False):  # its encoder reads them (Pix2Struct)
        return set(), set()
    if text is None and not hasattr(config, "vocab_size"):
        return set(), set()
    names = getattr(type(config), "sub_configs", {})
    parts = [getattr(config, name, None) for name in names if name != "text_config" and (text or MEDIA.search(name))]
    own = {type(config), type(text), type(None)}
    return {type(part) for part in parts} - own, {type(text)} - {type(None)}


def _config_type(module: nn.Module) -> type:
    return type(getattr(module, "config", None))


def _is_text(name: str, module: nn.Module, text: set[type]) -> bool:
    """Whether a child beside a tower reads text: the language model, or what belongs to it."""
    return _config_type(module) in text or name.startswith(("text", "lm_")) or isinstance(module, nn.Embedding)


def generates_beside_media(model: nn.Module) -> bool:
    """Whether a model of text and more writes text, whatever its attention sees of the prompt (PaliGemma: all)."""
    return bool(_kinds_of_parts(model)[0]) and getattr(model, "can_generate", lambda: False)()


def placeholders_of(model: nn.Module) -> tuple[int, ...]:
    """The tokens that stand for parts of images and sounds, as the model's config says."""
    config = getattr(model, "config", None)
    found = (getattr(config, name, None) for name in PLACEHOLDERS)
    return tuple(dict.fromkeys(token for token in found if isinstance(token, int)))


def media_by_row(inputs: Mapping[str, Any], placeholders: tuple[int, ...], batch: int) -> list[Any] | None:
    """What each of the `batch` rows of a forward holds of images and sounds, to be compared; None: nothing says it.

    With placeholders, how many of each kind; in models without (CLIP), row i has image i. Mllama reads all places for
    images and tiles, of which each row has as many, used or not.
    """
    if inputs.get("aspect_ratio_mask") is not None:
        return [1] * batch
    ids, images = inputs.get("input_ids"), inputs.get("pixel_values")
    if not placeholders:
        own = isinstance(images, Tensor) and images.shape[0] == batch
        return [1] * batch if own else None
    if not isinstance(ids, Tensor) or ids.shape[0] != batch:
        return None
    counts = (ids.flatten(1).unsqueeze(-1) == torch.tensor(placeholders, device=ids.device)).sum(1)
    sizes = inputs.get("image_sizes")  # images that are cut into tiles have as many as their sizes ask for
    if isinstance(sizes, Tensor) and bool((sizes != sizes[:1]).any()):
        return None
    return counts.tolist()


def is_even(by_row: list[Any] | None) -> bool:
    """Whether all rows hold as much of images and sounds; False where nothing says it."""
    return by_row is not None and all(row == by_row[0] for row in by_row)


def has_places(inputs: Mapping[str, Any]) -> bool:
    """Whether each row has places for images of its own, and a mask says which of them it has used (Idefics, SmolVLM,
    Mllama)."""
    return any(inputs.get(name) is not None for name in PLACES)


def refuse_unpaired(inputs: Mapping[str, Any], placeholders: tuple[int, ...], who: str) -> None:
    """Raise ValueError where `who` takes image or sound i for that of row i, and a row holds none: another has two."""
    ids = inputs.get("input_ids")
    if not placeholders or not isinstance(ids, Tensor) or has_places(inputs):
        return
    holds = (ids.flatten(1).unsqueeze(-1) == torch.tensor(placeholders, device=ids.device)).any(1)  # (B, kinds)
    if bool((holds.any(0) & ~holds.all(0)).any()):
        rows = (~holds[:, holds.any(0)]).any(1).nonzero()[:, 0].tolist()
        raise ValueError(
            f"{who} takes the rows of a batch apart, and images or sounds do not say whose they are where rows hold "
            f"none or several (here rows {rows} hold none): give each row one, or part those with and without"
        )


def refuse_uneven(inputs: Mapping[str, Any], placeholders: tuple[int, ...], batch: int, who: str, remedy: str) -> None:
    """Raise ValueError where `who` repeats rows of a batch that hold different numbers of images or sounds, one after
    the other. Where rows have places of their own (`has_places`), these repeat with them.
    """
    one_by_one = placeholders and not has_places(inputs)
    by_row = media_by_row(inputs, placeholders, batch) if one_by_one else None
    if by_row is not None and not is_even(by_row):
        raise ValueError(
            f"{who} repeats the rows of a batch, and theirs hold different numbers of images or sounds (of "
            f"placeholders {by_row}), which cannot be repeated along: {remedy}"
        )
