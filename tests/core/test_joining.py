"""How losses beside the model's own are weighed, and how they ride on outputs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from accelerate.state import GradientState
from torch import Tensor, nn
from transformers import (
    BertForMaskedLM,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    T5ForConditionalGeneration,
    ViTForImageClassification,
)
from transformers.modeling_outputs import CausalLMOutput

from mixadapters import ForwardContext
from mixadapters.core.joining import Once, attach, countable, hands_on_items, share_of_batch

LABELS = torch.tensor([[4, -100, 5, 6], [7, 8, -100, -100]])


class Head(nn.Module):
    """A causal language model as far as its loss goes: divided by the items, or a mean of the micro-batch."""

    loss_type = "ForCausalLM"

    def __init__(self, divides: bool) -> None:
        super().__init__()
        self.weight, self.divides = nn.Parameter(torch.ones(())), divides

    def forward(self, labels: Tensor, num_items_in_batch: Any = None) -> CausalLMOutput:
        logits = self.weight * torch.ones(*labels.shape, 9)
        loss = logits.sum() / num_items_in_batch if self.divides else logits.mean()
        return CausalLMOutput(loss=loss, logits=logits)


class Makes:
    """Makes the main loss, or adds to it: in both cases the weight itself."""

    takes = ()

    def __init__(self, main: bool) -> None:
        self.main = main

    def before(self, context: ForwardContext, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        return args, kwargs

    def after(self, context: ForwardContext, module: nn.Module, output: Any) -> Any:
        if self.main:
            context.set_loss(module.weight * 1.0)
        else:
            context.add_loss("own", module.weight * 1.0)
            context.scale_loss(0.0)
        return output


@pytest.mark.parametrize(("divides", "main", "weight"), [(True, False, 0.3), (False, False, 1.0), (False, True, 0.3)])
@pytest.mark.parametrize("items", [torch.tensor(10), torch.tensor(10.0), 10])
def test_a_loss_weighs_as_what_it_joins(divides: bool, main: bool, weight: float, items: Any) -> None:
    """Three of ten labels are in this micro-batch. What an objective makes the main loss, Trainer does not divide."""
    model = Head(divides).train()
    ForwardContext.of(model).objectives.append(Makes(main))
    model(LABELS, num_items_in_batch=items).loss.backward()
    assert model.weight.grad.item() == pytest.approx(weight)


def test_the_count_is_asked_in_training_only() -> None:
    seen: list[Any] = []

    class Watch(Head):
        def forward(self, labels: Tensor, num_items_in_batch: Any = None) -> CausalLMOutput:
            seen.append(num_items_in_batch)
            return super().forward(labels, num_items_in_batch)

    model = Watch(True)
    ForwardContext.of(model)
    items = torch.tensor(10.0)
    with torch.no_grad():
        model(LABELS, num_items_in_batch=items)
    model.train()(LABELS, num_items_in_batch=items)
    assert seen[0] is items
    assert seen[1].requires_grad
    assert not items.requires_grad


def test_the_share_counts_labels_as_the_trainer_does() -> None:
    shifting, plain = Head(True), nn.Identity()
    given = {"num_items_in_batch": 10, "labels": LABELS}
    assert share_of_batch(given, plain) == pytest.approx(0.5)
    assert share_of_batch(given, shifting) == pytest.approx(0.3)
    moved = torch.full_like(LABELS, 1)
    for module in (shifting, plain):
        assert share_of_batch({**given, "shift_labels": moved}, module) == pytest.approx(0.8)
        assert share_of_batch({**given, "shift_labels": None}, module) == share_of_batch(given, module)
    assert share_of_batch({"labels": LABELS}, plain) == 1.0
    assert share_of_batch({"num_items_in_batch": 10}, plain) == 1.0


def test_inputs_without_a_count_stay_as_they_are() -> None:
    inputs = {"labels": LABELS}
    assert countable(inputs, nn.Linear(2, 2)) is inputs


def test_a_count_gives_a_gradient_only_where_something_trains() -> None:
    module, inputs = nn.Linear(2, 2), {"labels": LABELS, "num_items_in_batch": 3}
    assert countable(inputs, module)["num_items_in_batch"].requires_grad
    assert countable(inputs, module.requires_grad_(False)) is inputs


@pytest.mark.parametrize(
    ("kind", "reads"),
    [
        (LlamaForCausalLM, True),
        (ViTForImageClassification, True),
        (Head, True),
        (BertForMaskedLM, False),
        (T5ForConditionalGeneration, False),
        (LlamaForSequenceClassification, False),
    ],
)
def test_the_source_of_a_forward_says_whether_its_loss_is_given_the_count(kind: type, reads: bool) -> None:
    assert hands_on_items(kind) == reads


def once(scale: Any, weighed: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """The leaf, the loss that is added, and an output that two functions carry it on."""
    leaf = torch.ones((), requires_grad=True)
    added, carried = Once.apply(leaf * 3, 0.5, scale, weighed)
    outputs = attach((torch.ones(2, requires_grad=True) * 1, torch.ones(2, requires_grad=True) * 1), carried)
    return leaf, added, outputs[0].sum() + outputs[1].sum()


@pytest.mark.parametrize(
    ("scale", "used", "grad"),
    [
        (0.25, "added", 1.5),
        (0.25, "carried", 0.75),
        (torch.tensor(0.25), "carried", 0.75),
        (None, "carried", 3.0),
        (0.25, "both", 1.5),
    ],
)
def test_a_loss_on_two_ways_counts_once(scale: Any, used: str, grad: float) -> None:
    leaf, added, carried = once(scale)
    {"added": added, "carried": carried, "both": added + carried}[used].backward()
    assert leaf.grad.item() == grad


def test_a_weighed_loss_is_not_left_aside() -> None:
    _, added, carried = once(0.25, weighed=True)
    added.backward(retain_graph=True)
    with pytest.raises(ValueError, match="the training loop makes its own of other outputs"):
        carried.backward()


@pytest.mark.parametrize("kind", [tuple, list])
def test_losses_ride_on_every_tensor_with_a_gradient(kind: type) -> None:
    loss = torch.ones((), requires_grad=True)
    hidden = kind([torch.ones(2), torch.ones(2, requires_grad=True) * 1])
    output = attach(CausalLMOutput(logits=torch.ones(2), hidden_states=hidden), loss)
    assert type(output.hidden_states) is kind
    assert output.hidden_states[0] is hidden[0]
    output.hidden_states[1].sum().backward()
    assert loss.grad == 1
    with pytest.raises(ValueError, match="neither a loss nor an output with a gradient"):
        attach(CausalLMOutput(logits=torch.ones(2)), loss)


def test_where_one_output_carries_a_loss_it_is_the_logits() -> None:
    """A graph is compiled so, and loops train on these."""
    loss = torch.ones((), requires_grad=True)
    states, logits = (torch.ones(2, requires_grad=True) * 1 for _ in range(2))
    output = attach({"encoder_last_hidden_state": states, "logits": logits}, loss, only_one=True)
    assert output["encoder_last_hidden_state"] is states
    output["logits"].sum().backward()
    assert loss.grad == 1


def test_a_loop_that_accumulates_must_say_how_much_a_part_weighs() -> None:
    state = GradientState()
    before = state.sync_gradients
    try:
        state._set_sync_gradients(False)
        _, added, carried = once(None)
        with pytest.raises(ValueError, match="accumulates gradients, so the weight of an auxiliary loss is not known"):
            carried.backward()
        added.backward()
    finally:
        state._set_sync_gradients(before)


def test_a_loss_that_an_objective_scales_is_not_left_aside() -> None:
    """A loop that makes its own loss of the logits would train without the scale."""
    model = Head(divides=False).train()
    ForwardContext.of(model).objectives.append(Makes(main=False))
    output = model(LABELS)
    with pytest.raises(ValueError, match="an objective makes or weighs the model's loss"):
        output.logits.sum().backward()
