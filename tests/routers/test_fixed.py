"""Weights that do not look at their input."""

from __future__ import annotations

import pytest

from mixadapters.routers import build_router

EXPERTS = ["a", "b"]


@pytest.mark.parametrize("weights", [[0.75, 0.25], {"a": 0.75, "b": 0.25}, {"b": 0.25, "a": 0.75}])
def test_constant_weights_are_given_in_order_or_by_name(weights) -> None:
    assert build_router({"kind": "constant", "weights": weights}, 4, EXPERTS).constant() == [0.75, 0.25]


@pytest.mark.parametrize(
    ("weights", "remedy"),
    [
        ({"law": 0.5}, r"add \['code'\], 0 for no weight"),
        ({"law": 0.5, "codes": 0.5}, r"add \['code'\], 0 for no weight and take out \['codes'\]. Did you mean 'code'"),
        ({"law": 0.5, "code": 0.2, "c": 0.3}, r"take out \['c'\].$"),
        ([0.5], "give 2, or a dict"),
    ],
)
def test_constant_weights_of_other_experts_are_refused(weights, remedy) -> None:
    with pytest.raises(ValueError, match=rf"must have one entry for each expert of \['law', 'code'\]: .*{remedy}"):
        build_router({"kind": "constant", "weights": weights}, 4, ["law", "code"])


@pytest.mark.parametrize("weights", [3, "ab", 0.5])
def test_weights_that_are_no_list_and_no_dict_are_refused(weights: object) -> None:
    with pytest.raises(ValueError, match=rf"weights={weights!r} must be a list of numbers"):
        build_router({"kind": "constant", "weights": weights}, 4, EXPERTS)
