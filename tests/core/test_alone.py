"""One expert that all rows use, in a forward that records nothing: plain products in place of a call of the op."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn
from torch.nn.utils import parametrize

from mixadapters import BottleneckConfig, MixDAConfig
from mixadapters.core.bank import AdapterBank
from mixadapters.core.context import ForwardContext
from mixadapters.core.mixture import FEW, SMALL, Mixture
from mixadapters.kernels import adapter_backend
from mixadapters.routers.fixed import SingleRouter

FORMS = {
    "low rank": {"activation": "identity", "use_bias": False, "scale": 1.5},
    "bottleneck": {"scale": 0.5},
    "gated": {"glu": True, "activation": "silu"},
    "learnable scale": {"scale": "learnable"},
    "on the output": {"placement": "pfeiffer"},
    "dropout": {"dropout": 0.5},
}


class OneLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


def adapted(**form: Any) -> Any:
    torch.manual_seed(0)
    form = {"placement": "parallel", **form}
    config = BottleneckConfig(r=3, target_modules=["linear"], init_weights=False, **form)
    model = get_peft_model(OneLayer(), config).eval()
    return model


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each call of `alone` gave something."""
    found: list[bool] = []
    plain = AdapterBank.alone

    def alone(self: AdapterBank, x: Tensor, y: Tensor) -> Tensor | None:
        new = plain(self, x, y)
        found.append(new is not None)
        return new

    monkeypatch.setattr(AdapterBank, "alone", alone)
    return found


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS.keys())
def test_plain_products_give_what_the_operation_gives(form: dict[str, Any], taken: list[bool]) -> None:
    model = adapted(**form)
    for x in (torch.randn(2, 1, 6), torch.randn(7, 6), torch.randn(3, 2 * FEW, 6)):
        taken.clear()
        with torch.no_grad():
            found = model(x)
            assert taken == [True]
            with adapter_backend("reference"):
                torch.testing.assert_close(found, model(x))
        assert not torch.equal(found, model.get_base_model().linear.base_layer(x))


def test_few_rows_of_a_wide_layer_are_few(taken: list[bool]) -> None:
    base = OneLayer()
    base.linear = nn.Linear(6, SMALL // FEW + 8)
    config = BottleneckConfig(r=3, target_modules=["linear"], init_weights=False, placement="parallel")
    model = get_peft_model(base, config).eval()
    with torch.no_grad():
        model(torch.randn(FEW, 6))
        assert taken == [True]
        model(torch.randn(FEW + 1, 6))
    assert taken == [True]


def test_weights_are_read_anew_in_each_forward(taken: list[bool]) -> None:
    model, x = adapted(), torch.randn(2, 1, 6)
    expert = model.linear.adapters["default"].bank.experts["adapter"]
    with torch.no_grad():
        before = model(x)
        expert.down.weight = nn.Parameter(expert.down.weight * 2)
        expert.up = nn.Linear(3, 5)
        after = model(x)
        assert taken == [True, True]
        with adapter_backend("reference"):
            torch.testing.assert_close(after, model(x))
    assert not torch.equal(before, after)


def grad(model: Any, x: Tensor) -> Tensor:
    return model(x)


def observed(model: Any, x: Tensor) -> Tensor:
    context = ForwardContext.of(model)
    context.observers.append(lambda *_: None)
    with torch.no_grad():
        return model(x)


def forced(model: Any, x: Tensor) -> Tensor:
    with torch.no_grad(), adapter_backend(batch_invariant=True):
        return model(x)


def cast(model: Any, x: Tensor) -> Tensor:
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        return model(x)


def with_dropout(model: Any, x: Tensor) -> Tensor:
    model.linear.adapters["default"].dropout.p = 0.5
    model.linear.adapters["default"].dropout.train()
    with torch.no_grad():
        return model(x)


def by_row(model: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        return model(x, adapter_names=["default", "__base__"])


def many_rows(model: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        return model(x.expand(2, SMALL // 5, 6))


def half(model: Any, x: Tensor) -> Tensor:
    """Weights of the adapter stay in float32, as PEFT leaves them."""
    model.linear.base_layer.bfloat16()
    with torch.no_grad():
        return model(x.bfloat16())


def parametrized(model: Any, x: Tensor) -> Tensor:
    up = model.linear.adapters["default"].bank.experts["adapter"].up
    parametrize.register_parametrization(up, "weight", nn.Identity())
    with torch.no_grad():
        return model(x)


def hooked(model: Any, x: Tensor) -> Tensor:
    seen: list[Any] = []
    model.linear.adapters["default"].register_forward_hook(lambda *given: seen.append(given))
    with torch.no_grad():
        y = model(x)
    assert seen
    return y


@pytest.mark.parametrize(
    "run", [grad, observed, forced, cast, with_dropout, by_row, many_rows, half, parametrized, hooked]
)
def test_where_anybody_has_a_say_the_operation_runs(run: Any, taken: list[bool]) -> None:
    model = adapted()
    y = run(model, torch.randn(2, 1, 6))
    assert not any(taken)
    assert y.isfinite().all()


@torch.no_grad()
def test_a_layer_that_runs_outside_a_forward_takes_the_operation(taken: list[bool]) -> None:
    """Its last forward does not know what has been chosen since."""
    model, x = adapted(), torch.randn(2, 1, 6)
    expected = model(x)
    with adapter_backend("reference"):
        torch.testing.assert_close(model.linear(x), expected)
    torch.testing.assert_close(model.linear(x), expected)
    assert taken == [True]


@torch.no_grad()
@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_a_stack_that_runs_without_its_root_goes_the_shortest_way_too(tiny: Any, kind: str, taken: list[bool]) -> None:
    model = get_peft_model(tiny(kind), BottleneckConfig(r=3, init_weights=False)).eval()
    stack = model.get_base_model().get_encoder() if kind == "t5" else model.get_base_model().model
    ids, context = torch.tensor([[5, 6, 7]]), ForwardContext.of(model)
    found = stack(input_ids=ids)[0]
    assert taken
    assert all(taken)
    taken.clear()
    with adapter_backend("reference"):
        torch.testing.assert_close(stack(input_ids=ids)[0], found)
    assert not taken
    assert not context.record.plain
    with pytest.raises(IndexError):
        stack(input_ids=ids + 10**6)
    assert not context.record.plain


LOW_RANK = {"activation": "identity", "use_bias": False}


@torch.no_grad()
@pytest.mark.parametrize(("active", "merged"), [("default", False), (["second", "default"], False), ("second", True)])
def test_the_shortest_way_takes_what_acts_in_its_order(active: Any, merged: bool, taken: list[bool]) -> None:
    model, x = adapted(placement="pfeiffer"), torch.randn(2, 1, 6)
    config = BottleneckConfig(r=2, target_modules=["linear"], init_weights=False, placement="parallel", **LOW_RANK)
    model.add_adapter("second", config)
    model.base_model.set_adapter(active)
    if merged:
        model.merge_adapter()
    found = model(x)
    assert taken == [True] * (0 if merged else len(active) if isinstance(active, list) else 1)
    with adapter_backend("reference"):
        torch.testing.assert_close(found, model(x))
    with model.disable_adapter():
        taken.clear()
        assert torch.equal(model(x), model.linear.base_layer(x))
        assert not taken


@torch.no_grad()
def test_the_shortest_way_leaves_what_follows_the_first_of_a_tuple(taken: list[bool]) -> None:
    model, x = adapted(), torch.randn(2, 1, 6)
    expected = model(x)
    model.linear.base_layer.register_forward_hook(lambda module, args, output: (output, "beside"))
    found, beside = model(x)
    assert torch.equal(found, expected)
    assert beside == "beside"
    assert taken == [True, True]


def compiled(model: Any, graphs: list[str], dynamic: bool = False) -> Any:
    """The model under the compiler, which notes what it sees."""

    def note(graph: Any, _: Any) -> Any:
        graphs.append(graph.code)
        return graph.forward

    torch._dynamo.reset()
    return torch.compile(model, fullgraph=True, dynamic=dynamic, backend=note)


def has_operator(graphs: list[str]) -> bool:
    return any(name in code for code in graphs for name in ("mixadapters", "autograd_function_apply"))


@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS.keys())
def test_a_graph_sees_plain_products_however_many_the_rows(form: dict[str, Any], training: bool) -> None:
    """An operator that it cannot see into keeps it from adding them up in loops that it has anyway."""
    model, graphs = adapted(**form), []
    expert = model.linear.adapters["default"].bank.experts["adapter"]
    run = compiled(model, graphs, dynamic=True)
    with torch.set_grad_enabled(training):
        for rows in (3, 2 * FEW):
            x = torch.randn(2, rows, 6, requires_grad=training)
            found = run(x)
            with adapter_backend("reference"):
                expected = model(x)
            torch.testing.assert_close(found, expected)
            if training:
                leaves, weight = [x, *expert.parameters()], torch.randn_like(found)
                torch.testing.assert_close(
                    torch.autograd.grad(found, leaves, weight), torch.autograd.grad(expected, leaves, weight)
                )
    assert len(graphs) == 1
    assert not has_operator(graphs)


def trained_dropout(model: Any) -> Any:
    model.linear.adapters["default"].dropout.p = 0.5
    return model.train()


def watched(model: Any) -> Any:
    model.linear.adapters["default"].watchers.append(lambda *_: None)
    return model


def watched_from_outside(model: Any) -> Any:
    ForwardContext.of(model).observers.append(lambda *_: None)
    return model


@pytest.mark.parametrize("change", [trained_dropout, watched, watched_from_outside])
def test_a_graph_has_the_operator_where_anybody_has_a_say(change: Any) -> None:
    graphs: list[str] = []
    with torch.no_grad():
        compiled(change(adapted()), graphs)(torch.randn(2, FEW, 6))
    assert has_operator(graphs)


def test_a_graph_has_the_operator_where_the_caller_chose_how_it_runs() -> None:
    graphs: list[str] = []
    with torch.no_grad(), adapter_backend("segments"):
        compiled(adapted(), graphs)(torch.randn(2, FEW, 6))
    assert has_operator(graphs)


def test_merged_disabled_and_several_adapters_are_what_they_were(taken: list[bool]) -> None:
    model, x = adapted(activation="identity", use_bias=False), torch.randn(2, 1, 6)
    base = model.get_base_model().linear.base_layer
    frozen = base(x).detach()
    with torch.no_grad():
        alone = model(x)
        with model.disable_adapter():
            assert torch.equal(model(x), frozen)
        model.merge_adapter()
        torch.testing.assert_close(model(x), alone)
        model.unmerge_adapter()
        taken.clear()
        model.add_adapter("other", model.peft_config["default"])
        model.base_model.set_adapter(["default", "other"])
        both = model(x)
        assert taken == [True, True]  # one after the other
        model.set_adapter("other")
        other = model(x)
        assert taken == [True, True, True]
    torch.testing.assert_close(both - frozen, (alone - frozen) + (other - frozen))


@pytest.mark.parametrize("part", ["mixture", "bank"])
def test_what_a_subclass_makes_of_a_forward_is_not_passed_over(part) -> None:
    class Doubled(Mixture):
        def forward(self, x: Tensor, y: Any, context: Any) -> Tensor:
            return 2 * super().forward(x, y, context)

    class DoubledBank(AdapterBank):
        def forward(self, *args: Any, **kwargs: Any) -> Tensor:
            return 2 * super().forward(*args, **kwargs)

    def lone(mixture: type[Mixture], kind: type[AdapterBank]) -> bool:
        bank = kind(6, 5, activation="identity", bias=False)
        bank.add("only", 3)
        return mixture(SingleRouter(6, ["only"]), bank).lone

    assert lone(Mixture, AdapterBank)
    assert not lone(*((Doubled, AdapterBank) if part == "mixture" else (Mixture, DoubledBank)))


@torch.no_grad()
def test_channels_of_a_convolution_are_not_taken_for_rows(taken: list[bool]) -> None:
    """As many channels as places: nothing else would notice."""
    base = nn.Sequential(nn.Conv1d(6, 6, 1))
    config = BottleneckConfig(r=3, target_modules=["0"], init_weights=False, placement="parallel")
    model, x = get_peft_model(base, config).eval(), torch.randn(2, 6, 6)
    found = model(x)
    assert not taken
    with adapter_backend("reference"):
        torch.testing.assert_close(found, model(x))
    for i in range(6):  # places are independent
        torch.testing.assert_close(model(x[..., i : i + 1]), found[..., i : i + 1])


@torch.no_grad()
def test_sequences_of_a_module_that_reads_tokens_first_are_told_apart() -> None:
    """As many tokens as sequences: nothing else would notice."""
    config = MixDAConfig(domains=["a", "b"], r=3, target_modules=["linear"], gate_granularity="sequence")
    model, x = get_peft_model(OneLayer(), config).eval(), torch.randn(3, 3, 6)
    for parameter in model.parameters():
        parameter.normal_()
    by_sequence = model(x)
    model.linear.lies("", tokens_first=True)
    torch.testing.assert_close(model(x.transpose(0, 1)), by_sequence.transpose(0, 1))
    assert not torch.allclose(model(x), by_sequence, atol=1e-2)
