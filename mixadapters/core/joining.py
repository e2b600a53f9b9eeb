"""How auxiliary losses reach the backward pass: on `outputs.loss`, and carried by the other outputs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss

from mixadapters.core.sites import has_two_stacks

if TYPE_CHECKING:
    from mixadapters.core.record import Record


def join_losses(record: Record, module: nn.Module, output: Any, scale: float) -> Any:
    """Add the losses of this forward to `output.loss`; without one, attach them to the outputs.

    Args:
        record: of the forward that ends.
        module: the root model.
        output: of the root model.
        scale: factor on auxiliary losses where the training loop makes a loss of its own of the outputs.

    Raises:
        ValueError: there is neither a loss nor an output with a gradient to join, or no main loss to weigh.
    """
    extra = sum(record.losses.values(), torch.zeros(())) if record.training and record.losses else None
    if extra is None and record.main_loss is None and record.main_scale == 1.0:
        return output
    loss = record.main_loss if record.main_loss is not None else getattr(output, "loss", None)
    weighed = record.main_loss is not None or record.main_scale != 1.0
    if loss is None and (extra is None or weighed):
        raise ValueError("the forward has no loss to weigh; pass labels, or an objective that makes a loss")
    share = 1.0 if loss is None else share_of_batch({**record.values, **record.inputs}, module)
    if extra is not None and torch.compiler.is_compiling():
        if loss is None:
            return attach(output, extra * scale, only_one=True)
        extra = extra * share
    elif extra is not None:
        # Some training loops make a loss of their own of the other outputs, and leave the model's aside.
        extra, carried = Once.apply(extra, share, scale, weighed)
        output = attach(output, carried, optional=loss is not None)
    if loss is not None:
        loss = loss * record.main_scale * (1.0 if record.main_loss is None else share)
        output["loss"] = loss if extra is None else loss + extra
    return output


class Once(torch.autograd.Function):
    """An auxiliary loss on two ways to the end: added to the model's loss, and carried by its other outputs.

    In backward it counts once: like the model's loss if that is used, else with weight `scale`.
    """

    @staticmethod
    def forward(ctx: Any, extra: Tensor, share: Any, scale: float, weighed: bool) -> tuple[Tensor, Tensor]:
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
        return None if carried is None else torch.full_like(carried, ctx.scale), None, None, None


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
    """`output` with its tensors that have a gradient, or the first of them, carrying `loss`."""
    if isinstance(output, Tensor):
        items: dict[Any, Any] = {None: output}
    else:
        items = dict(output) if isinstance(output, dict) else dict(enumerate(output))
    names = [n for n, v in items.items() if n != "loss" and isinstance(v, Tensor) and v.requires_grad]
    if not names and not optional:
        raise ValueError(
            "auxiliary losses found neither a loss nor an output with a gradient to join; call the model with labels, "
            "or set the coefficients of its auxiliary losses to 0"
        )
    names.sort(key=lambda name: name != "logits")
    for name in names[:1] if only_one else names:
        items[name] = Carrier.apply(items[name], loss)
    if isinstance(output, Tensor):
        return items[None]
    if isinstance(output, tuple):
        return tuple(items.values())
    for name in names:
        output[name] = items[name]
    return output


def share_of_batch(inputs: dict[str, Any], module: nn.Module) -> Any:
    """This micro-batch's part of the accumulated batch.

    Given `num_items_in_batch`, transformers divides the loss by the labels of all micro-batches together, and the
    Trainer does not divide again: losses added here must be scaled likewise, or each would count once per micro-batch.
    """
    items, labels = inputs.get("num_items_in_batch"), inputs.get("labels")
    if items is None or labels is None:
        return 1.0
    # The Trainer counts as the loss does: where that shifts the labels, the first of a row is no target.
    if shifts_labels(module):
        labels = inputs.get("shift_labels", labels[..., 1:])
    return (labels != -100).sum() / items


def shifts_labels(module: nn.Module) -> bool:
    """Whether the model's own loss compares the logits of a place with the label of the next."""
    loss = LOSS_MAPPING.get(getattr(module, "loss_type", None))
    return loss is ForCausalLMLoss and not has_two_stacks(module)
