from __future__ import annotations

import copy

import pytest
import torch
from banks import WIDTH, bank_of, routed, single
from torch import Tensor, nn
from torch.nn import functional as F

from mixadapters.core.context import ForwardContext
from mixadapters.core.mixture import Mixture
from mixadapters.core.record import Record
from mixadapters.core.routing import Routing
from mixadapters.core.streams import Stream
from mixadapters.routers import ConstantRouter, SingleRouter

BATCH, LENGTH = 3, 4


def expert(mixture: Mixture, name: str, x: Tensor) -> Tensor:
    one = mixture.bank.experts[name]
    return one.up(F.gelu(one.down(x)))


@pytest.fixture
def context() -> ForwardContext:
    context = ForwardContext()
    context.enter(Record(streams={"": Stream(batch=BATCH, length=LENGTH)}))
    return context


@pytest.fixture
def x() -> Tensor:
    return torch.randn(BATCH, LENGTH, WIDTH)


@pytest.fixture
def y() -> Tensor:
    return torch.randn(BATCH, LENGTH, WIDTH)


# --- one mixture -------------------------------------------------------------------------------------------------


def test_parallel_reads_the_input_sequential_the_output_and_a_tap_what_it_is_told(context, x, y) -> None:
    other = torch.randn(BATCH, LENGTH, WIDTH)
    context.record.taps["elsewhere"] = other
    for insertion, tap, source in (("parallel", None, x), ("sequential", None, y), ("parallel", "elsewhere", other)):
        mixture = Mixture(SingleRouter(WIDTH, ["expert0"]), bank_of(3), insertion, tap=tap)
        torch.testing.assert_close(mixture(x, y, context), y + expert(mixture, "expert0", source))


def test_keep_weighs_the_frozen_output(context, x, y) -> None:
    weights, base_weight = torch.rand(BATCH * LENGTH, 2), torch.rand(BATCH * LENGTH)
    mixture = routed(Routing(weights=weights, base_weight=base_weight), 3, 2)
    w = weights.view(BATCH, LENGTH, 2, 1)
    expected = base_weight.view(BATCH, LENGTH, 1) * y
    expected = expected + w[:, :, 0] * expert(mixture, "expert0", x) + w[:, :, 1] * expert(mixture, "expert1", x)
    torch.testing.assert_close(mixture(x, y, context), expected)
    flat = mixture(x.flatten(0, 1), y.flatten(0, 1), context)
    torch.testing.assert_close(flat.view_as(y), expected)


def test_rows_of_many_axes_and_other_dtypes_pass(context) -> None:
    mixture = single(3)
    x, y = torch.randn(2, 3, 3, WIDTH), torch.randn(2, 3, 3, WIDTH)  # (B, height, width, d)
    torch.testing.assert_close(mixture(x, y, context), y + expert(mixture, "expert0", x))
    out = mixture(x.bfloat16(), y, context)  # a norm in full precision after a layer in half
    assert out.dtype == y.dtype
    half = mixture.to(torch.bfloat16)(x, y.bfloat16(), context)
    assert half.dtype == torch.bfloat16


def test_dropout_is_on_what_the_experts_read_in_training_alone(context, x, y) -> None:
    mixture = Mixture(SingleRouter(WIDTH, ["expert0"]), bank_of(3), dropout=0.5)
    assert not torch.equal(mixture(x, y, context), mixture(x, y, context))
    mixture.eval()
    torch.testing.assert_close(mixture(x, y, context), y + expert(mixture, "expert0", x))


def test_observed_deltas_are_those_of_single_trainable_experts(context, x, y) -> None:
    mixture = routed(Routing(weights=torch.zeros(BATCH * LENGTH, 3)), 3, 2, 4)
    mixture.bank.experts["expert1"].requires_grad_(False)
    deltas = mixture.observe(x, y, context)
    assert len(deltas) == 2  # whatever the gate says
    torch.testing.assert_close(deltas[1], expert(mixture, "expert2", x))
    beside = Mixture(mixture.router, mixture.bank, replaces=True)
    torch.testing.assert_close(beside.observe(x, y, context)[1], expert(mixture, "expert2", x) - y)


# --- merging -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("insertion", ["parallel", "sequential"])
@pytest.mark.parametrize("scale", [0.5, None])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("layer_bias", [False, True])
def test_folded_layer_equals_layer_and_adapter(context, insertion, scale, bias, layer_bias) -> None:
    bank = bank_of(3, 2, activation="identity", bias=bias, scale=scale).double()
    mixture = Mixture(ConstantRouter(WIDTH, bank.names, [0.25, -2.0]), bank, insertion).double()
    linear, x = nn.Linear(WIDTH, WIDTH, bias=layer_bias).double(), torch.randn(5, WIDTH, dtype=torch.double)
    weight, shift = mixture.fold(linear.weight, linear.bias)
    assert (shift is None) == (not bias and not layer_bias)
    torch.testing.assert_close(F.linear(x, weight, shift), mixture(x, linear(x), context), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(
    ("mixture", "message"),
    [
        (lambda: single(3), "its own activation is not linear"),
        (lambda: single(3, activation="identity", layer_norm=True), "its own LayerNorm is not linear"),
        (lambda: single(3, activation="identity", glu=True), "its own activation is not linear"),
        (lambda: routed(Routing(), 3), "its router depends on the input"),
        (lambda: Mixture(SingleRouter(9, ["expert0"]), bank_of(3, width_in=9, activation="identity")), "its input is"),
        (
            lambda: Mixture(SingleRouter(6, ["expert0"]), bank_of(3, activation="identity"), tap="elsewhere"),
            "its input is not the input of the layer",
        ),
    ],
)
def test_what_no_single_weight_equals_is_refused(mixture, message) -> None:
    with pytest.raises(ValueError, match=message):
        mixture().fold(torch.eye(WIDTH), None)


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (None, "returned NoneType; return a Routing"),
        ((torch.zeros(4, 1, dtype=torch.long), None), "returned tuple; return a Routing"),
        (Routing(torch.zeros(1, 1, dtype=torch.long)), r"returned indices \(1, 1\) for \d+ rows; return \(N, k\)"),
        (Routing(weights=torch.ones(2, 2, 1)), r"returned weights \(2, 2, 1\) for \d+ rows"),
    ],
)
def test_what_a_router_returns_is_checked(context, x, y, returned, message) -> None:
    with pytest.raises(ValueError, match=f"router Given at '.*' {message}"):
        routed(returned, 3)(x, y, context)


def test_who_watches_a_single_expert_is_told(context, x, y) -> None:
    mixture = single(3)
    seen: list[tuple[Tensor, Routing, Tensor | None]] = []
    mixture.watchers.append(lambda *told: seen.append(told))
    mixture(x, y, context)
    ((read, routing, _),) = seen
    assert torch.equal(read, x.flatten(0, 1))
    assert routing.arms == ("expert0",)


def test_copies_of_a_mixture_are_not_watched() -> None:
    mixture = single(3)
    mixture.watchers.append(lambda *_: None)
    assert not copy.deepcopy(mixture).watchers
    assert mixture.watchers
