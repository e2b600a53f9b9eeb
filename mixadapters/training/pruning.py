"""A Trainer callback that lets experts go which the router has given up, in the middle of a run."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments

from mixadapters.core.fields import check_integer, check_number
from mixadapters.core.trainers import trainer_above
from mixadapters.surgery.layers import ExpertLayer
from mixadapters.surgery.pruning import cut, layers_to_cut
from mixadapters.surgery.view import Routed
from mixadapters.training.events import RunCallback, plain_optimizer
from mixadapters.training.spawning import take_up


@dataclass(frozen=True)
class Pruned:
    """Experts that a layer has lost after a step, and the share of the weight that each had."""

    step: int
    key: str
    shares: dict[str, float]


class ExpertPruneCallback(RunCallback):
    """Every so many steps drops the experts whose share of their layer's weight has fallen below beta / alive.

    The share is that of the weights in training, real tokens only, as an exponential average over windows of `every`
    steps. The optimizer goes on: parameters that have changed their shape begin without moments. To resume, make the
    model from the checkpoint, PeftModel.from_pretrained(base, checkpoint, is_trainable=True); averages begin anew.
    Source: the task-specific pruning of Chen et al. 2022 (arXiv 2206.00277), as in MC-SMoE's code; dropped experts
    leave the router there by a mask, here with their columns.

    Args:
        beta: an expert must have this part of an equal share.
        min_experts: a layer keeps so many, and no fewer than its tokens use.
        every: steps between looks.
        ema: how much of the average stays at each look.
        adapter: as in `prune_experts`.

    Attributes:
        pruned: what has gone, in order.

    Raises:
        ValueError: a number out of range, no experts, or several processes (what gathers gradients knows the
            parameters of the start).
    """

    def __init__(
        self, beta: float = 0.1, min_experts: int = 1, every: int = 100, ema: float = 0.9, adapter: str | None = None
    ) -> None:
        check_number("beta", beta, above=0, below=1)
        check_number("ema", ema, least=0, below=1)
        check_integer("min_experts", min_experts, least=1)
        check_integer("every", every, least=1)
        self.beta, self.min_experts, self.every, self.ema, self.adapter = beta, min_experts, every, ema, adapter
        self.pruned: list[Pruned] = []
        self.averages: dict[str, tuple[Tensor, float]] = {}  # key -> shares and their weight in the average
        self._sums: dict[str, Tensor] = {}
        self._watching = ExitStack()
        self.trainer: Trainer | None = None

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **_: Any
    ) -> None:
        for layer in layers_to_cut(model, self.adapter):
            layer.check_keep(range(self._least(layer)))  # now, and not when it has to be done
        if args.world_size > 1 or getattr(args, "deepspeed", None):
            raise ValueError(
                "ExpertPruneCallback takes parameters away in the middle of a run, which what runs in several "
                "processes does not see; train first, then call prune_experts, then train again"
            )

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **_: Any
    ) -> None:
        self.trainer = trainer_above()
        self.averages.clear()
        self._watch(model)

    def run_ended(self, model: nn.Module) -> None:
        self._watching.close()

    def _watch(self, model: nn.Module) -> None:
        self._watching.close()
        self._sums.clear()
        for layer in layers_to_cut(model, self.adapter):
            self._watching.enter_context(layer.watch(self._adder(model, layer.key, len(layer.names))))

    def _adder(self, model: nn.Module, key: str, count: int) -> Any:
        def add(routed: Routed) -> None:
            if not model.training:
                return
            used = routed.indices >= 0
            used = used if routed.mask is None else used & routed.mask.unsqueeze(1)
            weights = torch.where(used, routed.weights.detach().double().abs(), 0.0)
            places = torch.where(used, routed.indices, 0)
            sums = weights.new_zeros(count).scatter_add_(0, places.reshape(-1), weights.reshape(-1))
            self._sums[key] = self._sums[key] + sums if key in self._sums else sums

        return add

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None,
        optimizer: Any = None, **_: Any,
    ) -> None:  # fmt: skip
        if state.global_step % self.every:
            return
        layers = layers_to_cut(model, self.adapter)
        kept = {layer.key: self._kept(layer, state.global_step) for layer in layers}
        self._sums.clear()
        if all(len(kept[layer.key]) == len(layer.names) for layer in layers):
            return
        before = dict(model.named_parameters())
        for layer in layers:
            shares, weight = self.averages.get(layer.key, (torch.ones(len(layer.names)), 0.0))
            self.averages[layer.key] = (shares[kept[layer.key]], weight)
        cut(layers, kept, preserve_mass=False)
        assert self.trainer is not None
        take_up(plain_optimizer(optimizer), model, before, set(), self.trainer)
        self._watch(model)

    def _kept(self, layer: ExpertLayer, step: int) -> list[int]:
        """The experts that stay in a layer, by its average with what the last steps were."""
        everyone = list(range(len(layer.names)))
        sums = self._sums.get(layer.key)
        if sums is None or not float(sums.sum()):  # no real token has come by
            return everyone
        old, weight = self.averages.get(layer.key, (torch.zeros(len(everyone), dtype=torch.float64), 0.0))
        shares = self.ema * old + (1 - self.ema) * (sums / sums.sum()).cpu()
        weight = self.ema * weight + 1 - self.ema
        self.averages[layer.key] = (shares, weight)
        mean = (shares / weight).tolist()
        least = self._least(layer)
        order = sorted(everyone, key=lambda e: -mean[e])
        kept = sorted(e for place, e in enumerate(order) if place < least or mean[e] >= self.beta / len(everyone))
        if gone := {layer.names[e]: mean[e] for e in everyone if e not in kept}:
            self.pruned.append(Pruned(step, layer.key, gone))
        return kept

    def _least(self, layer: ExpertLayer) -> int:
        """How many experts a layer keeps whatever happens."""
        return min(max(self.min_experts, layer.top_k or 1), len(layer.names))
