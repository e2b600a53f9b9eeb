"""What a user prints says what it is, and not the entries of its tensors."""

from __future__ import annotations

import dataclasses
import importlib
from typing import Any

import pytest
import torch
from peft import get_peft_model

from mixadapters import MoAConfig
from mixadapters.core.routing import Routing
from mixadapters.core.showing import brief, span
from mixadapters.surgery import RouteTable, record_usage
from mixadapters.surgery.tracing import LayerRoutes


@pytest.fixture
def model(tiny: Any) -> Any:
    return get_peft_model(tiny("llama"), MoAConfig(num_experts=3, r=2, target_modules=["down_proj"], router="top_k"))


def test_a_routing_shows_its_parts_by_size() -> None:
    shown = repr(Routing(torch.zeros(7, 2, dtype=torch.long), torch.rand(7, 2), arms=("a", "b")))
    assert shown == "Routing(indices=int64 (7, 2), weights=float32 (7, 2), run=1, arms=['a', 'b'])"


def test_a_record_shows_how_much_it_has_seen(model: Any, tiny_inputs: Any) -> None:
    inputs = tiny_inputs("llama", batch=2, length=5)
    with model.base_model.record_usage() as usage:
        assert repr(usage) == "<UsageRecorder: no router has been seen>"
        model(**inputs)
    assert "4 routers, each of 3 arms and 10 rows" in repr(usage)
    one = next(iter(usage.seen.values()))
    assert repr(one) == "<Usage of the arms ['expert0', 'expert1', 'expert2'], 10 rows>"


def test_a_usage_of_experts_shows_layers_experts_rows_and_labels(model: Any, tiny_inputs: Any) -> None:
    with record_usage(model) as usage:
        usage.labels = ["law", "code"]
        model(**tiny_inputs("llama", batch=2, length=5))
    assert repr(usage) == "<ExpertUsage: 4 layers, each of 3 experts and 10 rows; labels ['law', 'code']>"
    key, layer = next(iter(usage.layers.items()))
    assert repr(layer) == f"<LayerUsage of {layer.path!r} of adapter 'default': 3 experts, 10 rows>"
    assert key.startswith(layer.path)


def test_a_table_of_routes_shows_texts_tokens_and_layers() -> None:
    routes = LayerRoutes("layer", ("a", "b"), [torch.tensor([[0], [1]])] * 6, [torch.ones(2, 1)] * 6)
    table = RouteTable([["x", "y"]] * 6, [routes])
    assert repr(table) == "<RouteTable: 6 texts of 12 tokens in all, 1 layers, each of 2 experts>"
    assert "experts=[int64 (2, 1), int64 (2, 1), int64 (2, 1), int64 (2, 1), ... 6 in all]" in repr(routes)


def test_what_is_long_is_cut_and_says_how_much_there_is() -> None:
    @dataclasses.dataclass
    class Held:
        numbers: dict[str, Any]
        text: str
        nothing: Any = None
        hidden: Any = dataclasses.field(default=7, repr=False)

        __repr__ = brief

    shown = repr(Held({str(n): torch.zeros(n) for n in range(9)}, "x" * 500))
    assert shown.startswith("Held(numbers={'0': float32 (0,), '1': float32 (1,), ")
    assert "... 9 in all}" in shown
    assert "hidden" not in shown
    assert "nothing" not in shown
    assert len(shown) < 300
    assert (span([3, 3]), span([4, 2, 3]), span([])) == ("3", "2 to 4", "0")


@pytest.mark.parametrize("package", ["surgery", "serving", "sharding"])
def test_no_public_class_that_holds_tensors_prints_them(package: str) -> None:
    """Neither dataclasses nor NamedTuples: those write what they hold in full, unless they say otherwise."""
    found = importlib.import_module(f"mixadapters.{package}")
    for name in found.__all__:
        made = getattr(found, name)
        holds = isinstance(made, type) and "Tensor" in str(getattr(made, "__annotations__", ""))
        if holds and (dataclasses.is_dataclass(made) or issubclass(made, tuple)):
            generated = hasattr(made.__repr__, "__wrapped__") or "mixadapters" not in str(made.__repr__.__module__)
            assert not generated, f"{name} prints its tensors: give it a __repr__, such as core.showing.brief"
