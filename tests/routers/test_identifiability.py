"""Which parameters of a gate data can tell apart, and the options that follow from it."""

from __future__ import annotations

import pytest
import torch

from mixadapters.core.context import ForwardContext
from mixadapters.routers import build_router, gate_identifiability

POINTS = torch.randn(60, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
NULL_DIRECTIONS = {None: 8, "relu": 2, "square": 2, "tanh": 1, "sigmoid": 1, "gelu": 1, "silu": 1}


@pytest.mark.parametrize(("activation", "expected"), NULL_DIRECTIONS.items())
@pytest.mark.parametrize("kind", ["top_k", "top_p"])
def test_null_directions_by_activation(kind, activation, expected) -> None:
    torch.manual_seed(0)
    options = {"init_range": 1.0, "activation": activation, "normalize": False, "temperature": 0.7}
    router = build_router({"kind": kind, **options}, 6, list("abcd"))
    found = gate_identifiability(router, POINTS)
    assert found.parameters == 4 * 6 + 4 + 1
    assert found.null_directions == expected
    assert found.rank == found.parameters - expected


@pytest.mark.parametrize("kind", ["softmax", "sigmoid", "top_k", "cosine", "dense_to_sparse"])
def test_an_activation_is_that_of_the_projection(kind) -> None:
    torch.manual_seed(0)
    options = {"init_range": 1.0, "activation": "tanh", "temperature": 0.5, "normalize": False}
    router = build_router({"kind": kind, **options}, 6, ["a", "b", "c"])
    with torch.no_grad():
        router.output.weight.normal_()
        router.output.bias.normal_()
    x = POINTS.float()
    features = x if kind != "cosine" else x @ router.hidden[-1].weight.t()
    plain = router.project(features, router.output.weight, None)
    torch.testing.assert_close(router.score(x), plain.tanh() / 0.5 + router.output.bias)
    torch.testing.assert_close(router.tempered(router.score(x)), router.score(x))  # once, not twice


@pytest.mark.parametrize("activation", [None, "relu", "square"])
def test_a_temperature_that_is_a_scale_of_the_weights_is_not_learned(activation) -> None:
    with pytest.raises(ValueError, match=rf"learnable_temperature=True with activation={activation!r}.*'gelu'"):
        build_router({"kind": "top_k", "activation": activation, "learnable_temperature": True}, 6, ["a", "b"])
    with pytest.raises(ValueError, match=r"activation='tan' is unknown.*Did you mean 'tanh'"):
        build_router({"kind": "top_k", "activation": "tan"}, 6, ["a", "b"])


def test_a_learned_temperature_starts_as_said_and_learns() -> None:
    torch.manual_seed(0)
    options = {"activation": "gelu", "temperature": 0.5, "init_range": 1.0}
    router = build_router({"kind": "top_k", **options, "learnable_temperature": True}, 6, ["a", "b", "c"])
    fixed = build_router({"kind": "top_k", **options}, 6, ["a", "b", "c"])
    fixed.load_state_dict(router.state_dict(), strict=False)
    x = POINTS.float().view(1, 60, 6)
    routing = router(x, ForwardContext())
    torch.testing.assert_close(routing.weights, fixed(x, ForwardContext()).weights)
    routing.weights[:, 0].sum().backward()
    assert router.log_temperature.weight.grad.any()
    with pytest.raises(ValueError, match=r"temperature=2.0 cannot be set: learnable_temperature=True trains it"):
        router.set_option("temperature", 2.0)
    fixed.set_option("temperature", 2.0)
    assert not torch.equal(fixed(x, ForwardContext()).weights, routing.weights)
