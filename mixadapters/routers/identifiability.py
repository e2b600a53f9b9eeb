"""Whether data can tell the parameters of a router apart."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mixadapters.routers.learned import LearnedRouter
from mixadapters.routers.score import exact, features


class Identifiability(NamedTuple):
    """How many directions of an output layer's parameters and the temperature change the router's distribution."""

    parameters: int
    rank: int

    @property
    def null_directions(self) -> int:
        """Directions in which parameters may go without changing any probability. A softmax always has one."""
        return self.parameters - self.rank


@torch.no_grad()
def gate_identifiability(router: LearnedRouter, x: Tensor) -> Identifiability:
    """The rank of the Jacobian of the router's distribution at x (N, d) by output weights, biases and temperature.

    A linear router has d + 2 null directions (any vector added to all rows of the weights, any number to the biases,
    and the temperature, which is one more scale of the weights); a homogeneous activation has two, since the
    temperature remains one; any other has one. Source: Nguyen et al. 2024 (arXiv 2401.13875).

    Raises:
        ValueError: fewer than as many points as parameters.
    """
    weight, bias = router.output.weight.double(), router.output.bias.double()
    read = features(exact(x.reshape(-1, x.shape[-1]).double(), router.normalize), router.hidden.eval())
    start = torch.full((1,), router.temperature, dtype=torch.float64, device=x.device).log()

    def distribution(weight: Tensor, bias: Tensor, log_temperature: Tensor) -> Tensor:
        logits = router.logits(read, weight, bias, log_temperature)
        return router.weigh(logits if router.activation else logits / log_temperature.exp())

    parts = torch.func.jacrev(distribution, argnums=(0, 1, 2))(weight, bias, start)
    jacobian = torch.cat([part.flatten(2) if part.dim() > 2 else part for part in parts], -1).flatten(0, 1)
    return Identifiability(jacobian.shape[1], int(torch.linalg.matrix_rank(jacobian, rtol=1e-9)))
