"""Problems of the operation whose rows choose experts of one rank, drawn at random."""

from __future__ import annotations

import random

import torch
from torch import Tensor

WIDE = (6, 5)  # columns in and out


def drawn(
    chance: random.Random, generator: torch.Generator, numbers: Tensor, run: int, experts: int, rank: int,
    dtype: torch.dtype,
) -> dict:  # fmt: skip
    """Arguments of `lowrank`, of which the optional ones are there or not.

    numbers: (B, k) experts of each sequence of `run` rows.
    """
    rows, total, slots = run * len(numbers), experts * rank, numbers.shape[1]

    def make(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    given = {
        "x": make(rows, WIDE[0]), "w_down": make(total, WIDE[0]), "w_up": make(WIDE[1], total), "run": run,
        "ranks": (rank,) * experts, "indices": numbers.repeat_interleave(run, 0),
        "act": chance.choice(["gelu", "silu", "identity"]),
    }  # fmt: skip
    shapes = {
        "b_down": (total,), "b_up": (experts, WIDE[1]), "w_gate": (total, WIDE[0]), "scale": (experts,),
        "weights": (rows, slots), "base": (rows, WIDE[1]),
    }  # fmt: skip
    given |= {name: make(*shape) for name, shape in shapes.items() if chance.random() < 0.6}
    if "w_gate" in given and "b_down" in given:
        given["b_gate"] = make(total)
    if "base" in given and chance.random() < 0.3:
        given["base"] = given["base"].t().contiguous().t()
    if "base" in given and chance.random() < 0.3:
        given["base_weight"] = make(rows)
    return given
