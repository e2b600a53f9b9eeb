"""Adversarial training of mixtures: experts and routers in turn, on embeddings that are perturbed against them.

Source: Zhang et al. 2023, AdvMoE (ICCV, arXiv 2308.10110); its losses are those of TRADES (Zhang et al. 2019).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mixadapters.core.evaluation import in_evaluation
from mixadapters.core.fields import check_integer, check_number, check_switches
from mixadapters.core.hooks import root_of
from mixadapters.core.losses import masked_mean
from mixadapters.core.routing import Routing, RoutingKey
from mixadapters.core.showing import brief
from mixadapters.training.events import find_tuner
from mixadapters.training.staged_distillation import distillation_loss

NOISE = 1e-3  # where a search begins, in units of the embeddings' spread, as in AdvMoE's code


class Seen(NamedTuple):
    """What a forward has made."""

    logits: Tensor  # (B, C) or (B, T, C)
    routings: dict[RoutingKey, Routing]  # of the routers that have decided it; their probs lie where logits do
    mask: Tensor | None  # (B, T) bool: real tokens; where logits lie

    def __repr__(self) -> str:
        return brief(self)


class EmbeddingAttack:
    """Looks for a small change of a model's input embeddings that changes what it says, and where it routes.

    By signed gradient steps from a little noise, every entry of the change bounded, padding left out; the model in
    evaluation meanwhile.

    Args:
        eps: bound of an entry, in units of the standard deviation of the entries of the embedding table.
        steps: of the search.
        step_size: of one step, in the unit of `eps`; None: 5/8 of eps, as in AdvMoE's code.
    """

    def __init__(self, eps: float = 0.5, steps: int = 2, step_size: float | None = None) -> None:
        check_number("eps", eps, least=0)
        check_integer("steps", steps, least=1)
        step_size = eps * 5 / 8 if step_size is None else step_size
        check_number("step_size", step_size, least=0)
        self.eps, self.steps, self.step_size = eps, steps, float(step_size)

    def find(self, model: nn.Module, inputs: Mapping[str, Any], labels: Tensor | None = None) -> Tensor:
        """The change (B, T, d).

        labels: (B,) make the model miss these. None: move it, and its routers, away from what they say unperturbed.
        """
        table = embeddings_of(model).weight
        unit = float(table.detach().float().std())
        shape = (*inputs["input_ids"].shape, table.shape[1])
        with in_evaluation(model):
            with torch.no_grad():
                clean = None if labels is not None else see(model, inputs)
            delta = NOISE * unit * torch.randn(shape, device=table.device, dtype=table.dtype)
            for _ in range(self.steps):
                delta = self._bounded(delta, unit, inputs).requires_grad_()
                with torch.enable_grad(), perturbed(model, delta):
                    moved = see(model, inputs)
                    if labels is None:
                        assert clean is not None
                        gain = distance(moved, clean) + router_distance(moved, clean)
                    else:
                        gain = F.cross_entropy(moved.logits.float(), labels.to(moved.logits.device))
                (grad,) = torch.autograd.grad(gain, delta)
                delta = delta.detach() + self.step_size * unit * grad.sign()
        return self._bounded(delta, unit, inputs)

    def _bounded(self, delta: Tensor, unit: float, inputs: Mapping[str, Any]) -> Tensor:
        delta = delta.detach().clamp(-self.eps * unit, self.eps * unit)
        mask = inputs.get("attention_mask")
        return delta if mask is None else delta * mask.unsqueeze(-1).to(delta)


def embeddings_of(model: nn.Module) -> nn.Module:
    """The table of input embeddings: of the model, or of the first part of it that has one.

    Raises:
        ValueError: nothing in it has one.
    """
    for module in model.modules():
        try:
            found = getattr(module, "get_input_embeddings", lambda: None)()
        except (AttributeError, NotImplementedError):
            continue
        if isinstance(found, nn.Module):
            return found
    raise ValueError(f"{type(model).__name__} has no input embeddings to perturb: no part of it gives any")


@contextmanager
def perturbed(model: nn.Module, delta: Tensor) -> Iterator[None]:
    """Inside the block the model's input embeddings are what they are plus `delta` (B, T, d)."""

    def moved(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        return output + delta

    handle = embeddings_of(model).register_forward_hook(moved)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _unrecorded(model: nn.Module) -> Iterator[None]:
    """Inside the block forwards have no auxiliary losses and count in no usage, and layers run as they did."""
    root = root_of(model)
    training, root.training = root.training, False
    try:
        yield
    finally:
        root.training = training


def see(model: nn.Module, inputs: Mapping[str, Any]) -> Seen:
    """A forward without labels."""
    logits = model(**{name: value for name, value in inputs.items() if name != "labels"}).logits
    return seen(model, logits)


def seen(model: nn.Module, logits: Tensor) -> Seen:
    """What the last forward of the model has made, besides these logits."""
    record = find_tuner(model).context.record
    routings = {key: routing for key, routing in record.routings.items() if routing.probs is not None}
    mine = {id(routing.probs): key for key, routing in reversed(routings.items())}  # others follow these
    device, mask = logits.device, record.attention_mask  # layers may lie on several devices
    found = {key: routings[key]._replace(probs=_probs(routings[key]).to(device)) for key in mine.values()}
    return Seen(logits, found, None if mask is None else mask.to(device))


def distance(moved: Seen, clean: Seen) -> Tensor:
    """KL(clean || moved) of the logits, the mean over rows or real tokens."""
    counts = clean.mask if clean.logits.dim() == 3 else None
    return distillation_loss(moved.logits, clean.logits, counts)


def router_distance(moved: Seen, clean: Seen) -> Tensor:
    """KL(clean || moved) of the routers' distributions, the mean over real tokens and routers."""
    found = []
    for key, routing in clean.routings.items():
        theirs, ours = (_probs(one).clamp_min(1e-12).log() for one in (routing, moved.routings[key]))
        found.append(_mean((theirs.exp() * (theirs - ours)).sum(-1), clean.mask))
    return torch.stack(found).mean() if found else clean.logits.new_zeros(())


def flips(moved: Seen, clean: Seen) -> Tensor:
    """The share of decisions, of real tokens and routers, whose first choice is another one when moved."""
    found = [
        _mean((_probs(routing).argmax(-1) != _probs(moved.routings[key]).argmax(-1)).float(), clean.mask)
        for key, routing in clean.routings.items()
    ]
    return torch.stack(found).mean() if found else torch.zeros(())


def _probs(routing: Routing) -> Tensor:
    assert routing.probs is not None
    return routing.probs.float()


def _mean(values: Tensor, mask: Tensor | None) -> Tensor:
    """Of values (N,), over the rows that are real tokens."""
    return masked_mean(values, None if mask is None or mask.numel() != len(values) else mask.reshape(-1))


class Robustness(NamedTuple):
    """What a classifier keeps under attack.

    Attributes:
        accuracy: without; robust_accuracy: with.
        flip_rate: share of the routers' decisions for real tokens whose first choice the attack changes.
    """

    accuracy: float
    robust_accuracy: float
    flip_rate: float


def robustness(model: nn.Module, batches: Iterable[Mapping[str, Any]], attack: EmbeddingAttack) -> Robustness:
    """Attack a classifier of rows. batches: with `labels` (B,), on the model's device."""
    right = stood = rows = 0
    flipped = 0.0
    with in_evaluation(model):
        for batch in batches:
            labels = batch["labels"]
            delta = attack.find(model, batch, labels)
            with torch.no_grad():
                clean = see(model, batch)
                with perturbed(model, delta):
                    moved = see(model, batch)
            labels = labels.to(clean.logits.device)
            right += int((clean.logits.argmax(-1) == labels).sum())
            stood += int((moved.logits.argmax(-1) == labels).sum())
            flipped += float(flips(moved, clean)) * len(labels)
            rows += len(labels)
    if not rows:
        raise ValueError("batches are empty: give rows with labels")
    return Robustness(right / rows, stood / rows, flipped / rows)


class AdversarialTrainerMixin:
    """Trains a mixture so that it, and its routers, stand changes of the input embeddings.

        class AdversarialTrainer(AdversarialTrainerMixin, Trainer): ...

        trainer = AdversarialTrainer(model=model, args=args, train_dataset=data, eps=0.5)

    Steps of the optimizer alternate: one trains all but the routers on loss(x) + beta KL(f(x) || f(x')), the next,
    with new x', the routers alone on loss(x) + beta KL(r(x) || r(x')); what does not train stays bit for bit. Here
    loss is the model's own, auxiliary losses included. AdvMoE trains its routers, which decide once for an image, on
    the label modulo the number of experts instead: `router_alpha` adds that; for tokens it says little.

    Args:
        eps, steps, step_size: as in `EmbeddingAttack`; eps=0 is plain training.
        beta: weight of the distances.
        router_alpha: weight of the cross-entropy of the routers' distributions on the label modulo experts.
        alternate: False trains everything on the first loss: plain adversarial training.

    Raises:
        ValueError: a number out of range; a model without routers that learn; several processes, or DeepSpeed.
    """

    def __init__(
        self, *args: Any, eps: float = 0.5, steps: int = 2, step_size: float | None = None, beta: float = 6.0,
        router_alpha: float = 0.0, alternate: bool = True, **kwargs: Any,
    ) -> None:  # fmt: skip
        for name, value in (("beta", beta), ("router_alpha", router_alpha)):
            check_number(name, value, least=0)
        self.attack = EmbeddingAttack(eps, steps, step_size)
        check_switches(alternate=alternate)
        self.beta, self.router_alpha, self.alternate = beta, router_alpha, alternate
        super().__init__(*args, **kwargs)
        trainer: Any = self
        if trainer.args.world_size > 1 or trainer.is_deepspeed_enabled:
            raise ValueError(
                "AdversarialTrainerMixin takes gradients of half of the parameters away after each backward, which "
                "engines of several processes do not see: train in one process"
            )
        if not self._routers():
            raise ValueError("the model has no router that learns; AdversarialTrainerMixin trains experts and routers")

    def _routers(self) -> set[nn.Parameter]:
        tuner = find_tuner(self.model)  # type: ignore[attr-defined]
        routers = (router for name in tuner.peft_config for router in tuner.routers_of(name))
        return {parameter for router in routers for parameter in router.parameters()}

    @property
    def trains_routers(self) -> bool:
        """Whether this step of the optimizer is the routers'."""
        trainer: Any = self
        return self.alternate and trainer.state.global_step % 2 == 1

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        plain: Any = super().compute_loss  # type: ignore[misc]
        if not model.training or not torch.is_grad_enabled() or not self.attack.eps:
            return plain(model, inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch)
        bare = self.accelerator.unwrap_model(model)  # type: ignore[attr-defined]
        delta = self.attack.find(bare, inputs)
        loss, outputs = plain(model, dict(inputs), return_outputs=True, num_items_in_batch=num_items_in_batch)
        clean = seen(bare, outputs["logits"])
        with perturbed(bare, delta), _unrecorded(bare):
            moved = see(model, inputs)
        if self.trains_routers:
            more = self.beta * router_distance(moved, clean)
            if self.router_alpha:
                more = more + self.router_alpha * _label_loss(clean, inputs["labels"])
        else:
            more = self.beta * distance(moved, clean)
        loss = loss + more.to(loss.device) * self._share(num_items_in_batch)
        return (loss, outputs) if return_outputs else loss

    def _share(self, num_items_in_batch: Any) -> float:
        """A micro-batch's share of a step, where Trainer does not divide its loss by their number."""
        trainer: Any = self
        divided = num_items_in_batch is None or not trainer.model_accepts_loss_kwargs
        return 1.0 if divided else 1 / trainer.current_gradient_accumulation_steps

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        loss: Tensor = super().training_step(model, inputs, *args, **kwargs)  # type: ignore[misc]
        if self.alternate and self.attack.eps:
            routers = self._routers()
            for parameter in model.parameters():
                if (parameter in routers) != self.trains_routers:
                    parameter.grad = None  # which optimizers pass over
        return loss


def _label_loss(clean: Seen, labels: Tensor) -> Tensor:
    """Cross-entropy of the routers' distributions on the label of each row, modulo the number of arms."""
    found = []
    for routing in clean.routings.values():
        probs = _probs(routing)
        wanted = (labels.to(probs.device) % probs.shape[-1]).repeat_interleave(len(probs) // len(labels))
        chosen = probs.gather(1, wanted.unsqueeze(1)).squeeze(1).clamp_min(1e-12)
        found.append(_mean(-chosen.log(), clean.mask))
    return torch.stack(found).mean()
