"""What a text is about, as one vector: the mean of the base model's last states, with no adapter at work."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mixadapters.core.context import ForwardContext
from mixadapters.core.evaluation import in_evaluation
from mixadapters.core.fields import check_integer
from mixadapters.core.hooks import root_of
from mixadapters.core.rows import BASE, row_names
from mixadapters.training.objectives import pool


class PooledStates:
    """Texts -> (N, d), the mean over the real tokens of the last hidden states of the base model.

    Args:
        model: a transformers model, with adapters or without. Adapters of this library are left out in this thread
            alone, those of other types for all while it runs.
        batch_size: rows of a forward; texts are cut to the longest of each batch.

    Raises:
        ValueError: the model has no part without a head that gives `last_hidden_state`.
    """

    def __init__(self, model: nn.Module, batch_size: int = 32) -> None:
        check_integer("batch_size", batch_size, least=1)
        self.model, self.batch_size = model, batch_size
        self.root = root_of(model)
        self.backbone = _backbone(self.root)
        self._takes_positions = "position_ids" in inspect.signature(self.backbone.forward).parameters

    @torch.no_grad()
    def __call__(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """input_ids, attention_mask (N, T) -> (N, d) in fp32 on the CPU. The model's mode is put back afterwards."""
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        if mask.shape != input_ids.shape:
            raise ValueError(f"attention_mask {tuple(mask.shape)} must be {tuple(input_ids.shape)}, as input_ids")
        with in_evaluation(self.root):
            # Rows of like length go together, so that little padding is read.
            order = mask.sum(1).argsort(stable=True).split(self.batch_size)
            parts = [self._rows(input_ids[rows], mask[rows]) for rows in order]
        if not parts:
            raise ValueError("input_ids has no rows")
        return torch.cat(parts)[torch.cat(order).argsort()]

    def _rows(self, ids: Tensor, mask: Tensor) -> Tensor:
        read = mask.ne(0).any(0).nonzero()
        if read.numel():  # columns of padding alone, at either end
            ids, mask = (t[:, int(read[0]) : int(read[-1]) + 1] for t in (ids, mask))
        device = next(self.backbone.parameters()).device
        ids, mask = ids.to(device), mask.to(device)
        more = {}
        if self._takes_positions and not bool(mask[:, 0].all()):
            more["position_ids"] = positions(mask)
        with without_adapters(self.model, len(ids)):
            output = self.backbone(input_ids=ids, attention_mask=mask, **more)
        hidden = getattr(output, "last_hidden_state", None)
        if hidden is None:
            raise ValueError(
                f"{type(self.backbone).__name__} gives {type(output).__name__} without last_hidden_state; pass a "
                "model of transformers, or give features of your own"
            )
        return pool(hidden, mask, "mean").cpu()


def positions(mask: Tensor) -> Tensor:
    """mask (B, T) -> the position of each real token among those of its row, where padding may be on the left."""
    return (mask.long().cumsum(1) - 1).clamp_min(0)


def without_adapters(model: nn.Module, rows: int) -> AbstractContextManager[None]:
    """Forwards of `rows` rows inside the block see the base model alone."""
    return with_adapter(model, BASE, rows)


@contextmanager
def with_adapter(model: Any, name: str, rows: int) -> Iterator[None]:
    """Forwards of `rows` rows inside the block see this adapter alone; "__base__": none.

    Adapters of this library are chosen for this thread alone, those of other types for all while it runs.
    """
    root: Any = root_of(model)
    context = ForwardContext.find(root)
    if context is not None and context.hosted:
        with context.pin_in_thread(adapter_names=row_names([name] * rows, context, root)):
            yield
    elif not hasattr(model, "peft_config"):
        yield
    elif name == BASE:
        with what_trains_kept(model), model.disable_adapter():
            yield
    else:
        with what_trains_kept(model):
            active = model.active_adapters
            model.set_adapter(name)
            try:
                yield
            finally:
                model.set_adapter(active if len(active) > 1 else active[0])


@contextmanager
def what_trains_kept(model: nn.Module) -> Iterator[None]:
    """PEFT's verbs make adapters trainable that they switch to: after the block what trained before trains."""
    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    finally:
        for parameter, trained in before:
            parameter.requires_grad_(trained)


def _backbone(root: nn.Module) -> Any:
    """The part of a model that its heads stand on; of two stacks the encoder."""
    if getattr(getattr(root, "config", None), "is_encoder_decoder", False):
        return root.get_encoder()
    part = getattr(root, getattr(root, "base_model_prefix", None) or "", root)
    return part if isinstance(part, nn.Module) else root
