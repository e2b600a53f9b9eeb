"""Activations of a few values, some of which go past oneDNN, against torch's own."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch.nn import functional as F

from mixadapters.kernels import ACTIVATIONS, activated, activations
from mixadapters.kernels.activations import SMALL

SHAPES = [(1, 1, 16), (4, 1, 16), (1, 1), (3, 5), (1, 2), (0, 4), (2, SMALL // 4), (2, SMALL), (64, 128)]


@pytest.mark.parametrize("act", ACTIVATIONS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_values_are_those_of_the_activation(act: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    z = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype) * 3
    expected = ACTIVATIONS[act](z.clone())
    found = activated(act, z)
    assert found.dtype == dtype
    assert found.is_contiguous()
    torch.testing.assert_close(found, expected)


def test_values_may_lie_anywhere() -> None:
    whole = torch.randn(4, 6)
    before = whole.clone()
    for part in (whole[:, ::2], whole.t(), whole[0].expand(2, 6)):
        torch.testing.assert_close(activated("gelu", part), F.gelu(part))
    torch.testing.assert_close(activated("gelu", whole[1:3]), F.gelu(before[1:3]))
    assert torch.equal(whole[::3], before[::3])  # nothing beside the values is written over


def test_gradients_are_those_of_the_activation() -> None:
    gelu, values = partial(activated, "gelu"), torch.randn(3, 4, dtype=torch.float64)
    assert torch.autograd.gradcheck(gelu, values.clone().requires_grad_())
    torch.testing.assert_close(torch.func.vmap(gelu)(values), F.gelu(values))
    _, tangent = torch.func.jvp(gelu, (values,), (torch.ones_like(values),))
    torch.testing.assert_close(tangent, torch.func.jvp(F.gelu, (values,), (torch.ones_like(values),))[1])


def test_a_trace_serves_other_sizes() -> None:
    def gelu(values: torch.Tensor) -> torch.Tensor:
        return activated("gelu", values)

    traced = torch.jit.trace(gelu, torch.randn(2, 5), check_trace=False)
    values = torch.randn(3, 5)
    torch.testing.assert_close(traced(values.clone()), F.gelu(values))


def test_few_values_go_past_onednn_and_others_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[int, ...]] = []
    in_place = activations._gelu_in_place
    monkeypatch.setattr(activations, "_gelu_in_place", lambda z: (calls.append(z.stride()), in_place(z)))
    activated("gelu", torch.randn(2, SMALL // 2))
    assert calls == [(1, SMALL // 2)]  # not one after the other: of those oneDNN has the first word
    trained = torch.randn(2, 2, requires_grad=True)
    for others in (torch.randn(2, SMALL), torch.randn(3, 5), torch.randn(4, 4).t(), trained):
        activated("gelu", others)
    torch.func.vmap(partial(activated, "gelu"))(torch.randn(2, 4))
    torch.compile(partial(activated, "gelu"), backend="eager", fullgraph=True)(torch.randn(2, 4))
    assert len(calls) == 1
    monkeypatch.setattr(activations, "_gelu_in_place", None)  # a torch that has no such function
    assert torch.equal(activated("gelu", trained.detach()), F.gelu(trained.detach()))
