from __future__ import annotations

import pytest

from mixadapters import ROUTERS, Router
from mixadapters.core.registry import Registry, nearest


def test_names_map_to_classes() -> None:
    registry: Registry[object] = Registry("shape")

    @registry.register("circle")
    class Circle: ...

    assert registry["circle"] is Circle
    assert "circle" in registry
    assert "square" not in registry
    assert list(registry) == ["circle"]


def test_wrong_name_is_told_the_choices_and_the_nearest() -> None:
    registry: Registry[object] = Registry("shape")
    registry.register("circle")(int)
    registry.register("square")(float)
    with pytest.raises(
        ValueError, match=r"unknown shape 'sqare'; have \['circle', 'square'\]\. Did you mean 'square'\?"
    ):
        registry["sqare"]
    with pytest.raises(ValueError, match=r"unknown shape 'zzz'; have \['circle', 'square'\]\.$"):
        registry["zzz"]


def test_name_belongs_to_one_class() -> None:
    registry: Registry[object] = Registry("shape")
    registry.register("circle")(int)
    registry.register("circle")(int)
    with pytest.raises(ValueError, match="shape 'circle' is already int"):
        registry.register("circle")(float)
    assert registry["circle"] is int


def test_nearest_name_or_nothing() -> None:
    assert nearest("softmx", ["softmax", "sigmoid"]) == " Did you mean 'softmax'?"
    assert nearest("xyz", ["softmax", "sigmoid"]) == ""
    assert nearest("3", [3, 4]) == " Did you mean '3'?"


def test_what_is_registered_in_a_block_is_forgotten_after_it() -> None:
    registry: Registry[object] = Registry("shape")
    registry.register("circle")(int)
    with registry.temporarily():
        registry.register("square")(float)
        assert "square" in registry
    assert list(registry) == ["circle"]


def test_a_class_that_is_defined_again_takes_the_place_of_the_one_before() -> None:
    registry: Registry[object] = Registry("shape")

    def cell() -> type:
        @registry.register("mine")
        class Mine: ...

        return Mine

    first, second = cell(), cell()
    assert first is not second
    assert registry["mine"] is second


def test_names_of_the_library_are_reserved() -> None:
    class Mine(Router): ...

    with pytest.raises(ValueError, match=r"router 'softmax' is already SoftmaxGate, the library's own; choose"):
        ROUTERS.register("softmax")(Mine)
    for name in ("", 3):
        with pytest.raises(ValueError, match="is no name for a router"):
            ROUTERS.register(name)  # type: ignore[arg-type]


@pytest.mark.parametrize("wrong", [int, lambda in_features, experts: None, "softmax", None])
def test_what_is_no_router_is_refused_when_it_is_registered(wrong) -> None:
    with pytest.raises(ValueError, match=r"router 'mine': .* is no router; register a class derived from Router"):
        ROUTERS.register("mine")(wrong)
    assert "mine" not in ROUTERS
    with pytest.raises(ValueError, match=r"shape 'mine': .* register a class$"):
        Registry("shape").register("mine")("circle")
