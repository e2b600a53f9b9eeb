"""A router that reads tokens, and no hidden state: it can decide before the base model runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mixadapters.core.context import ForwardContext
from mixadapters.core.record import Record
from mixadapters.core.routing import Routing
from mixadapters.core.streams import read_stream
from mixadapters.routers.base import ROUTERS
from mixadapters.routers.options import check_options
from mixadapters.routers.tokens import check_vocabulary, token_ids
from mixadapters.routers.top_k import TopKRouter


@ROUTERS.register("pregate")
class PregateRouter(TopKRouter):
    """Top-k of an MLP on an embedding of its own, pooled over the tokens so far.

    Source: Cai et al. 2024 (Read-ME, arXiv 2410.19123), one router for all layers (scope "model"); theirs is a small
    transformer.

    Args:
        vocab_size: rows of the embedding.
        width: of the embedding.
    """

    by_text = True

    def __init__(
        self,
        in_features: int,
        experts: list[str],
        *,
        vocab_size: int | None = None,
        width: int = 64,
        hidden: Sequence[int] = (64,),
        granularity: str = "causal_prefix",
        **options: Any,
    ) -> None:
        check_options(vocab_size=vocab_size, width=width)
        assert vocab_size is not None
        super().__init__(width, experts, hidden=hidden, granularity=granularity, **options)
        self.in_features = in_features
        self.embedding = nn.Embedding(vocab_size, width)

    def forward(self, tokens: Tensor, context: ForwardContext) -> Routing:
        ids = token_ids(context, self.stack, tokens.numel() // tokens.shape[-1], "router 'pregate'")
        weight = self.embedding.weight
        check_vocabulary(ids, len(weight), "router 'pregate' is", "give it the model's vocab_size")
        return super().forward(F.embedding(ids.to(weight.device), weight), context)

    @torch.no_grad()
    def plan(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Routing:
        """The routing of the tokens (B, T), as in a forward of the model in evaluation."""
        mode = self.training
        try:
            return self.eval().read(input_ids, attention_mask)
        finally:
            self.train(mode)

    def read(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Routing:
        """As `plan`, in the mode that the router is in, and with gradients: for those who train it by itself."""
        context, inputs = ForwardContext(), {"input_ids": input_ids, "attention_mask": attention_mask}
        record = Record(open=True, inputs=inputs)
        record.streams[""] = read_stream(inputs)
        context.enter(record)
        return self(input_ids.unsqueeze(-1), context)
