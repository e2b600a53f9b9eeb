"""What an expert computes on the way to its output, of its `Weights` alone."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from mixadapters.core.bank import Weights
from mixadapters.core.registry import nearest
from mixadapters.kernels import ACTIVATIONS


def read_by(weights: Weights, inputs: Tensor) -> Tensor:
    """inputs (N, K) as down and gate read them: in the expert's dtype, behind its LayerNorm if it has one."""
    inputs = inputs.to(weights.down.dtype)  # what a forward under autocast has shown is of a smaller one
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


def expert_norms(every: Sequence[Weights], activation: str, x: Tensor) -> Tensor:
    """x (N, K) -> (N, E) norms of the outputs of each of E experts of one rank, in float32.

    ||U h + b||^2 is h' (U'U) h + 2 (U'b)' h + b'b, so that no output is made.
    """

    def hidden(name: str) -> Tensor:
        """(N, E, r) of all experts by one product, or by E where each normalises the rows for itself."""
        matrices, biases = [getattr(w, name) for w in every], [getattr(w, f"b_{name}") for w in every]
        if every[0].norm is None:
            bias = None if biases[0] is None else torch.cat(biases)
            return F.linear(read_by(every[0], x), torch.cat(matrices), bias).unflatten(1, (len(every), -1))
        read = [read_by(weights, x) for weights in every]
        return torch.stack([F.linear(*part) for part in zip(read, matrices, biases, strict=True)], 1)

    act, inner = ACTIVATIONS[activation], hidden("down")
    inner = (act(inner) if every[0].gate is None else act(hidden("gate")) * inner).float().transpose(0, 1)
    ups = torch.stack([w.up for w in every]).float()  # (E, M, r)
    squared = (inner @ (ups.mT @ ups) * inner).sum(-1)  # (E, N)
    if any(w.b_up is not None for w in every):
        bias = torch.stack([torch.zeros_like(w.up[:, 0]) if w.b_up is None else w.b_up for w in every]).float()
        crossed = (inner @ (ups.mT @ bias.unsqueeze(-1))).squeeze(-1)
        squared = squared + 2 * crossed + bias.square().sum(-1, keepdim=True)
    scales = torch.stack([torch.as_tensor(w.scale, device=x.device).float().reshape(()).abs() for w in every])
    return squared.clamp_min(0).sqrt().T * scales
