from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from mixadapters.core.adapter import Adapter, Chain, Site
from mixadapters.core.context import ForwardContext


class Affine(Adapter):
    """y -> scale * y + shift * x, and what it was asked."""

    def __init__(self, scale: float, shift: float, observes: bool = False) -> None:
        super().__init__()
        self.scale, self.shift = nn.Parameter(torch.tensor(scale)), shift
        self.observes = observes
        self.asked: list[str] = []

    def forward(self, x: Tensor, y: Tensor, context: ForwardContext) -> Tensor:
        self.asked.append("forward")
        return self.scale * y + self.shift * x

    def prepare(self, context: ForwardContext) -> None:
        self.asked.append("prepare")

    def observe(self, x: Tensor, y: Tensor, context: ForwardContext) -> list[Tensor]:
        self.asked.append("observe")
        return [self.scale * y]

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return self.scale * weight + self.shift * torch.eye(len(weight)), None if bias is None else self.scale * bias


def test_chain_runs_its_stages_in_order() -> None:
    chain = Chain(first=Affine(2.0, 1.0), second=Affine(3.0, -1.0))
    x, y = torch.randn(2, 4), torch.randn(2, 4)
    context = ForwardContext()
    torch.testing.assert_close(chain(x, y, context), 3 * (2 * y + x) - x)
    chain.prepare(context)
    assert list(chain.steps) == ["first", "second"]
    assert all(step.asked == ["forward", "prepare"] for step in chain.steps.values())
    assert {name.split(".")[0] for name, _ in chain.named_parameters()} == {"first", "second"}


def test_chain_observes_where_a_stage_does() -> None:
    context, y = ForwardContext(), torch.ones(2, 4)
    silent, telling = Affine(2.0, 0.0), Affine(3.0, 0.0, observes=True)
    assert not Chain(a=silent).observes
    chain = Chain(a=silent, b=telling)
    assert chain.observes
    assert [float(d[0, 0].detach()) for d in chain.observe(y, y, context)] == [3.0]
    assert silent.asked == []


@pytest.mark.parametrize("bias", [False, True])
def test_chain_folds_what_its_stages_fold(bias) -> None:
    chain = Chain(first=Affine(2.0, 1.0), second=Affine(3.0, -1.0))
    linear, x = nn.Linear(4, 4, bias=bias), torch.randn(5, 4)
    weight, shift = chain.fold(linear.weight, linear.bias)
    torch.testing.assert_close(nn.functional.linear(x, weight, shift), chain(x, linear(x), ForwardContext()))


def test_adapter_that_is_no_linear_map_refuses_to_fold() -> None:
    with pytest.raises(ValueError, match="Adapter is not a linear map"):
        Adapter().fold(torch.eye(2), None)
    with pytest.raises(ValueError, match="not a linear map"):
        Chain(a=Affine(1.0, 0.0), b=Adapter()).fold(torch.eye(2), None)
    assert Adapter().observe(torch.ones(1), torch.ones(1), ForwardContext()) == []


def test_site_gives_its_taps_by_role() -> None:
    site = Site("ffn_output", "layer.0.output", 4, 4, taps=(("ffn_input", "layer.0.input"),))
    assert site.tap("ffn_input") == "layer.0.input"
    assert site.tap("other") is None
