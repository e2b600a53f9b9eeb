"""What one MoE block of a base model does in a forward, for those who watch it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mixadapters.core.routing import chosen_experts
from mixadapters.surgery.expert_map import arguments
from mixadapters.surgery.view import Routed, Watcher


class WatchedBlock:
    """Gathers what one block does in a forward: its logits, its choice, and where asked what each expert gives.

    layer: the `BaseExperts` of the block.
    """

    def __init__(self, layer: Any, callback: Watcher, context: Any, outputs: bool) -> None:
        self.layer, self.callback, self.context, self.outputs = layer, callback, context, outputs
        self.logits: Tensor | None = None
        self.choice: tuple[Tensor, Tensor, Tensor] | None = None

    def see_logits(self, module: nn.Module, args: tuple, output: Any) -> None:
        self.logits = output[0].detach().reshape(-1, output[0].shape[-1])

    def see_choice(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        self.choice = arguments(args, kwargs)
        if not self.outputs:
            self.tell(None)

    def forward(self, plain: Callable[..., Tensor], x: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
        """What the experts' module gives, put together from what each expert gives."""
        each = each_expert(plain, self.layer.experts, x, indices)  # (N, k, M)
        self.tell(each.detach())
        return (each * weights.unsqueeze(-1)).sum(1).to(x.dtype)

    def tell(self, each: Tensor | None) -> None:
        assert self.choice is not None
        record = self.context.record
        if record.closed or self.context.records.again:  # checkpointing runs the block again
            return
        x, indices, weights = (t.detach() for t in self.choice)
        stream, count = self.context.stream(), len(x)
        mask = None if stream.mask is None or stream.mask.numel() != count else stream.mask.reshape(-1)
        logits, probs, numbers = self.logits, None, self.layer.map
        if logits is not None:
            probs = logits.float().softmax(-1) if self.layer.base.scores == "softmax" else logits.float().sigmoid()
            probs = probs / probs.sum(-1, keepdim=True)
        if numbers is not None:
            indices = numbers.numbers[indices]
            logits = None if logits is None else joined_logits(logits, numbers.numbers, len(self.layer.names))
        used = indices >= 0
        self.callback(Routed(
            x, indices, weights, logits, probs, mask,
            None if each is None else lambda: each.float().norm(dim=-1) * used,
            None if each is None else lambda: each * used.unsqueeze(-1),
        ))  # fmt: skip


def joined_logits(logits: Tensor, numbers: Tensor, experts: int) -> Tensor:
    """logits (N, A) of columns -> (N, E) of the experts that take their rows: of several the log of their sum."""
    spread = chosen_experts(numbers.view(-1, 1), experts).t()  # (E, A)
    return torch.where(spread, logits.unsqueeze(1), -torch.inf).logsumexp(-1)


@contextmanager
def standing_in(experts: nn.Module, forward: Callable[..., Tensor]) -> Iterator[None]:
    """`forward(plain, x, indices, weights)` in place of the module's own, which it is given."""
    before = experts.__dict__.get("forward")
    plain = type(experts).forward if before is None else (lambda module, *args: before(*args))
    experts.__dict__["forward"] = lambda *args, **kwargs: forward(plain, *arguments(args, kwargs))
    try:
        yield
    finally:
        del experts.__dict__["forward"]
        if before is not None:
            experts.__dict__["forward"] = before


def each_expert(plain: Callable[..., Tensor], experts: nn.Module, x: Tensor, indices: Tensor) -> Tensor:
    """x (N, K), indices (N, k) -> (N, k, M) of each expert: each choice as a row of its own, of weight 1."""
    count, k = indices.shape
    rows = x.repeat_interleave(k, 0)
    return plain(experts, rows, indices.reshape(-1, 1), x.new_ones(count * k, 1)).view(count, k, -1)
