"""The ids of the tokens of a forward, for routers that decide by them and not by hidden states."""

from __future__ import annotations

import torch
from torch import Tensor

from mixadapters.core.context import ForwardContext


def token_ids(context: ForwardContext, stack: str, rows: int, who: str) -> Tensor:
    """(B, T) ids of the tokens that a layer of `stack` reads as `rows` rows.

    Raises:
        ValueError: the forward has no ids, or others.
    """
    ids = context.stream(stack).input_ids
    if ids is None:
        raise ValueError(
            f"{who} routes by the ids of tokens, and this forward has none (inputs_embeds or labels alone do not say "
            "them): pass input_ids, or choose a router that reads hidden states"
        )
    if ids.numel() != rows:
        raise ValueError(
            f"{who} routes by the ids of tokens: this layer reads {rows} rows, but the forward has {ids.numel()} ids; "
            "use it at layers that read the tokens themselves"
        )
    return ids


def check_vocabulary(ids: Tensor, vocab_size: int, what: str, remedy: str) -> None:
    """Raises ValueError where a token id is none of a router's. what: of it is of these ids.

    An accelerator refuses them itself, and to look at them there would wait for it.
    """
    if torch.compiler.is_compiling() or ids.device.type != "cpu" or not ids.numel():
        return
    least, most = int(ids.min()), int(ids.max())
    if least < 0 or most >= vocab_size:
        wrong = least if least < 0 else most
        raise ValueError(f"input_ids holds {wrong}, but {what} of the ids 0 to {vocab_size - 1}: {remedy}")
