"""Small experts of all forms, for the tests of the tools."""

from __future__ import annotations

import torch

from mixadapters.core.bank import Weights

FORMS = ("lora", "bottleneck", "glu", "normed")  # linear; with biases; gated, with biases; with LayerNorm and scale


def make_expert(form: str = "lora", width: int = 12, rank: int = 8, out: int = 10, seed: int = 0) -> Weights:
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=draw) / shape[-1] ** 0.5

    weights = Weights(normal(rank, width), normal(out, rank))
    if form != "lora":
        weights = weights._replace(b_down=normal(rank), b_up=normal(out))
    if form == "glu":
        weights = weights._replace(gate=normal(rank, width), b_gate=normal(rank))
    if form == "normed":
        weights = weights._replace(norm=(1 + normal(width), normal(width)), scale=torch.tensor([1.7]))
    return weights


def make_inputs(rows: int = 40, width: int = 12, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(100 + seed))


def activation_of(form: str) -> str:
    return "identity" if form == "lora" else "gelu"
