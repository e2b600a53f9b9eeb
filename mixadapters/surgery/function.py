"""What an expert computes on the way to its output, of its `Weights` alone."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from mixadapters.core.bank import Weights
from mixadapters.core.registry import nearest
from mixadapters.kernels import ACTIVATIONS


def read_by(weights: Weights, inputs: Tensor) -> Tensor:
    """inputs (N, K) as down and gate read them: behind the expert's LayerNorm, if it has one."""
    if weights.norm is None:
        return inputs
    return F.layer_norm(inputs, inputs.shape[-1:], *weights.norm)


def hidden_of(weights: Weights, inputs: Tensor, activation: str) -> Tensor:
    """inputs (N, K) -> (N, r), what `up` reads: act(down x), or act(gate x) * down x of a gated expert.

    Raises:
        ValueError: an activation that is none of the kernels', such as that of gpt_oss.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(
            f"activation={activation!r} belongs to the base model, and what its experts compute is not known here; "
            f"known are {sorted(ACTIVATIONS)}.{nearest(activation, ACTIVATIONS)}"
        )
    act, read = ACTIVATIONS[activation], read_by(weights, inputs)
    down = F.linear(read, weights.down, weights.b_down)
    return act(down) if weights.gate is None else act(F.linear(read, weights.gate, weights.b_gate)) * down
