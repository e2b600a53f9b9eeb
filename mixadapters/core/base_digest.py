"""Whether a base model is the one that an adapter was trained on, by a few entries of its weights.

Names cannot tell: a base into which something was merged has the name of the plain one.
"""

from __future__ import annotations

import hashlib
import logging
import re

import torch
from torch import Tensor, nn

from mixadapters.core.engines import is_sharded
from mixadapters.core.sites import layer_index
from mixadapters.core.walking import WRAPPERS, outside_adapters, plain_path

logger = logging.getLogger(__name__)

SAMPLED = 8  # entries of a weight
BEFORE_LAYERS = re.compile(r"^.*?(?=\b\w+\.\d+\b)")
ALIKE = (torch.float64, torch.float32, torch.bfloat16)  # rounded to bfloat16 they say the same


@torch.no_grad()
def base_digest(model: nn.Module, whole: bool = False) -> str | None:
    """Of some entries of each weight in the layers of a base model, rounded to bfloat16.

    So it is the same in float32 and bfloat16. Embeddings and heads, which a user may make anew, are no part of it, nor
    is the place of the layers in a model with a head, or in a module of the user's own around it.

    Args:
        whole: with that place, as it was made before.

    Returns:
        None where that says nothing: weights of other types (float16, quantized), shared out over processes, on the
        meta device or with adapters merged into them; no numbered layers.
    """
    total, seen = hashlib.sha256(), 0
    if getattr(model, "is_quantized", False) or getattr(model, "hf_quantizer", None) is not None:
        return None
    for path, module in outside_adapters(model):
        if getattr(module, "merged_adapters", None) or "_fsdp_wrapped_module" in path:
            return None
        if layer_index(path) is None or ".modules_to_save" in path:
            continue
        where = plain_path(WRAPPERS.sub("", path)).replace(".original_module", "")
        if not whole:
            where = BEFORE_LAYERS.sub("", where)
        for name, weight in module._parameters.items():
            if weight is None or weight.dim() < 2:
                continue
            if type(weight) is not nn.Parameter or weight.dtype not in ALIKE or weight.is_meta or is_sharded(weight):
                return None
            total.update(f"{where}.{name} {tuple(weight.shape)}".encode())
            total.update(_entries(weight).view(torch.uint8).cpu().numpy().data)
            seen += 1
    return total.hexdigest()[:32] if seen else None


def _entries(weight: Tensor) -> Tensor:
    """Entries from all over a weight, in bfloat16."""
    places = torch.linspace(0, weight.numel() - 1, SAMPLED, device=weight.device, dtype=torch.float64).long()
    # Numbers along each axis take several times as long to find, and are for weights alone that lie apart.
    found = weight.view(-1)[places] if weight.is_contiguous() else weight[torch.unravel_index(places, weight.shape)]
    return found.to(torch.bfloat16)


def warn_of_other_base(model: nn.Module, saved: str | None, who: str) -> None:
    """Log a warning where the weights of the base model are not those that an adapter was saved with."""
    here = None if saved is None else base_digest(model)
    if here is not None and saved not in (here, base_digest(model, whole=True)):
        logger.warning(
            "%s was trained on a base model of other weights than this one: on another checkpoint, or on one into "
            "which something had been merged. Load that, or take `base_digest` out of adapter_config.json if this is "
            "meant",
            who,
        )
