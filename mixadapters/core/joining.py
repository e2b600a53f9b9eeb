"""How auxiliary losses reach the backward pass: on `outputs.loss`, and carried by the other outputs."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import re
from typing import TYPE_CHECKING, Any

import torch
from accelerate.state import GradientState
from torch import Tensor, nn
from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss

from mixadapters.core.sites import has_two_stacks

if TYPE_CHECKING:
    from mixadapters.core.record import Record


ITEMS = "num_items_in_batch"  # the Trainer's count of the labels of all accumulated micro-batches


def countable(inputs: dict[str, Any], module: nn.Module) -> dict[str, Any]:
    """`inputs` whose count of items is a leaf of the graph: the loss can be asked whether it was divided by it.

    Not so of a module in which nothing trains: its loss would have a gradient by that leaf alone.
    """
    items = inputs.get(ITEMS)
    if items is None or torch.compiler.is_compiling() or not any(p.requires_grad for p in module.parameters()):
        return inputs
    leaf = torch.as_tensor(items).detach()
    leaf = leaf.clone() if leaf.is_floating_point() else leaf.float()
    return {**inputs, ITEMS: leaf.requires_grad_()}


def refuse_idle(record: Record, output: Any) -> None:
    """Refuse a step of Trainer in which nothing trains. Backward would fail, and not say why."""
    if torch.compiler.is_compiling():
        return
    loss = getattr(output, "loss", None)
    stepping = record.training and record.grad and record.inputs.get(ITEMS) is not None
    if stepping and isinstance(loss, Tensor) and not loss.requires_grad:
        raise ValueError(
            "nothing in this model trains: its loss depends on no parameter that requires a gradient. Gathered "
            "experts are frozen, and a router of counted tokens has fit_gate in place of training; choose what trains "
            "by model.base_model.set_stage(...), or load an adapter with is_trainable=True"
        )


def join_losses(record: Record, module: nn.Module, output: Any, scale: Tensor | float | None) -> Any:
    """Add the losses of this forward to `output.loss`; without one, attach them to the outputs.

    Args:
        record: of the forward that ends.
        module: the root model.
        output: of the root model.
        scale: factor on auxiliary losses where the training loop makes a loss of its own of the outputs; None: it
            takes one batch per step.

    Raises:
        ValueError: there is neither a loss nor an output with a gradient to join, or no main loss to weigh.
    """
    parts = list(record.losses.values()) if record.training else []
    if not parts and record.main_loss is None and record.main_scale == 1.0:
        return output
    loss = record.main_loss if record.main_loss is not None else getattr(output, "loss", None)
    # The layers of one model may lie on several devices, and its loss on another.
    device = getattr(parts[0] if loss is None and parts else loss, "device", None)
    extra = sum((part.to(device) for part in parts), torch.zeros(())) if parts else None
    weighed = record.main_loss is not None or record.main_scale != 1.0
    if loss is None and (extra is None or weighed):
        raise ValueError("the forward has no loss to weigh; pass labels, or an objective that makes a loss")
    share: Tensor | float = 1.0
    if record.main_loss is not None or (loss is not None and counts_items(loss, record, module, output)):
        share = share_of_batch({**record.values, **record.inputs}, module)
        share = share.to(device) if isinstance(share, Tensor) else share
    # The compiler cannot follow `Once`, which finds out in backward which way was used: one way is taken here.
    if extra is not None and torch.compiler.is_compiling():
        if loss is None:
            return attach(output, extra if scale is None else extra * scale, only_one=True)
        extra = extra * share
    elif extra is not None:
        # Some training loops make a loss of their own of the other outputs, and leave the model's aside.
        extra, carried = Once.apply(extra, share, scale, weighed)
        output = attach(output, carried, optional=loss is not None)
    if loss is not None:
        loss = loss * record.main_scale * (1.0 if record.main_loss is None else share)
        output = with_loss(output, loss if extra is None else loss + extra)
    return output


def with_loss(output: Any, loss: Tensor) -> Any:
    """`output` with this loss, also where its class has no place for one: data parallelism makes it anew from its
    fields."""
    fields = getattr(output, "__dataclass_fields__", None)
    if fields is None or "loss" in fields or torch.compiler.is_compiling():
        output["loss"] = loss
        return output
    kind: Any = type(output)
    return having_loss(kind)(**output, loss=loss)


@functools.cache
def having_loss(kind: type) -> type:
    """A kind of outputs with one field more."""
    return dataclasses.make_dataclass(kind.__name__, [("loss", Any, None)], bases=(kind,))


def counts_items(loss: Tensor, record: Record, module: nn.Module, output: Any) -> bool:
    """Whether the model has divided `loss` by the items of the accumulated batch, as it was asked to.

    Causal language models do. The losses of BERT's and T5's heads, of regressions and others are means of their own
    micro-batch all the same, and count as often as there are micro-batches and processes.
    """
    items = record.inputs.get(ITEMS)
    if items is None:
        return False
    if torch.compiler.is_compiling():
        return hands_on_items(type(module))
    # A walk of the graph down to the other outputs: what the loss alone is computed from.
    seen = {value.grad_fn for value in dict(output).values() if isinstance(value, Tensor) and value is not loss}
    waiting = [loss.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        if getattr(node, "variable", None) is items:
            return True
        seen.add(node)
        waiting.extend(following for following, _ in node.next_functions)
    return False


@torch.compiler.assume_constant_result
def hands_on_items(kind: type[nn.Module]) -> bool:
    """Whether the forward of `kind` passes the count of items to its loss, by its source: for the compiler, whose
    graph cannot be asked."""
    source = inspect.getsource(kind.forward)
    return ITEMS in source or re.search(r"loss_function\([^()]*(\([^()]*\)[^()]*)*\*\*", source) is not None


class Once(torch.autograd.Function):
    """An auxiliary loss on two ways to the end: added to the model's loss, and carried by its other outputs.

    In backward it counts once: like the model's loss if that is used, else with weight `scale`.
    """

    @staticmethod
    def forward(
        ctx: Any, extra: Tensor, share: Tensor | float, scale: Tensor | float | None, weighed: bool
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.share, ctx.scale, ctx.weighed = share, scale, weighed
        return extra * share, torch.zeros_like(extra)

    @staticmethod
    def backward(ctx: Any, added: Tensor | None, carried: Tensor | None) -> tuple[Tensor | None, None, None, None]:
        if added is not None:
            return added * ctx.share, None, None, None
        if ctx.weighed:
            raise ValueError(
                "an objective makes or weighs the model's loss, but the training loop makes its own of other outputs; "
                "use a loop that trains on outputs.loss"
            )
        if carried is None:
            return None, None, None, None
        if ctx.scale is None and not GradientState().sync_gradients:
            raise ValueError(
                "the training loop makes its own loss of the outputs and accumulates gradients, so the weight of an "
                "auxiliary loss is not known here; give the Trainer a StageCallback, or set "
                "ForwardContext.of(model).loss_scale = 1 / number of micro-batches"
            )
        return torch.ones_like(carried) * (1.0 if ctx.scale is None else ctx.scale), None, None, None


class Carrier(torch.autograd.Function):
    """Returns `value`; in backward also sends a gradient of 1 into `loss`."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, loss: Tensor) -> Tensor:
        ctx.like = (loss.shape, loss.dtype, loss.device)
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        shape, dtype, device = ctx.like
        return grad, torch.ones(shape, dtype=dtype, device=device)


def attach(output: Any, loss: Tensor, *, only_one: bool = False, optional: bool = False) -> Any:
    """`output` with its tensors that have a gradient, or the first of them, carrying `loss`.

    Tensors in tuples, such as hidden states, are among them.
    """
    if isinstance(output, Tensor):
        items: dict[Any, Any] = {None: output}
    else:
        items = dict(output) if isinstance(output, dict) else dict(enumerate(output))
    names = [name for name, value in items.items() if name != "loss" and _has_gradient(value)]
    if not names and not optional:
        raise ValueError(
            "auxiliary losses found neither a loss nor an output with a gradient to join; call the model with labels, "
            "or set the coefficients of its auxiliary losses to 0"
        )
    names.sort(key=lambda name: name != "logits")  # the one that a loop most likely trains on
    carriers = names[:1] if only_one else names
    for name in carriers:
        items[name] = _carrying(items[name], loss)
    if isinstance(output, Tensor):
        return items[None]
    if isinstance(output, tuple):
        return tuple(items.values())
    for name in carriers:
        output[name] = items[name]
    return output


def _has_gradient(value: Any) -> bool:
    if type(value) in (tuple, list):
        return any(isinstance(v, Tensor) and v.requires_grad for v in value)
    return isinstance(value, Tensor) and value.requires_grad


def _carrying(value: Any, loss: Tensor) -> Any:
    if not _has_gradient(value):
        return value
    if isinstance(value, Tensor):
        return Carrier.apply(value, loss)
    return type(value)(_carrying(v, loss) if isinstance(v, Tensor) else v for v in value)


def share_of_batch(inputs: dict[str, Any], module: nn.Module) -> Tensor | float:
    """This micro-batch's part of the labels of the accumulated batch; 1 where nobody has counted them.

    A loss that is divided by the labels of all micro-batches together is not divided again by the Trainer: losses
    beside it must be scaled likewise, or each would count once per micro-batch.
    """
    items, labels = inputs.get(ITEMS), inputs.get("labels")
    if items is None or labels is None:
        return 1.0
    # The Trainer counts as the loss does: where that shifts the labels, the first of a row is no target.
    if inputs.get("shift_labels") is not None:
        labels = inputs["shift_labels"]
    elif shifts_labels(module):
        labels = labels[..., 1:]
    return (labels != -100).sum() / torch.as_tensor(items, device=labels.device).detach()


def shifts_labels(module: nn.Module) -> bool:
    """Whether the model's own loss compares the logits of a place with the label of the next."""
    loss = LOSS_MAPPING.get(getattr(module, "loss_type", None))
    return loss is ForCausalLMLoss and not has_two_stacks(module)


def predicts_next(module: nn.Module) -> bool:
    """Whether the logits of a place are for the label of the next: as `shifts_labels`, which goes by the loss that a
    class names, as the Trainer counts; of those that name none (GPT-2, BERT as a decoder) transformers takes the same.
    """
    unnamed = getattr(module, "loss_type", None) not in LOSS_MAPPING
    generates = hasattr(module, "prepare_inputs_for_generation") and not has_two_stacks(module)
    return shifts_labels(module) or (unnamed and generates)
