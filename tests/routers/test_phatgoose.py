"""PHATGOOSE: gate vectors trained one at a time, and standardized together."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from mixadapters.core.bank import AdapterBank
from mixadapters.core.mixture import Mixture
from mixadapters.core.routes import HardRoutes
from mixadapters.core.routing import Routing, RoutingKey
from mixadapters.routers import build_router

NAMES, D = ["a", "b", "c"], 12
TOKENS = torch.randn(3, 5, D, generator=torch.Generator().manual_seed(1))


def mixture(**options: Any) -> Mixture:
    bank = AdapterBank(D, D)
    for name in NAMES:
        bank.add(name, 2)
    made = Mixture(
        build_router({"kind": "phatgoose", **options}, D, NAMES), bank, hard_routes=HardRoutes("expert_ids", range(3))
    )
    made.key = RoutingKey("default", "ffn", 0, "site")
    return made


def standard(x: Tensor) -> Tensor:
    return (x - x.mean()) / x.std(unbiased=False)


def test_numbers_of_the_batch_weigh_by_their_own_gate_and_train_it_alone(forward) -> None:
    routed = mixture()
    torch.manual_seed(0)
    with torch.no_grad():
        routed.router.output.weight.normal_()
    ids = torch.tensor([1, -1, 1])
    routing = routed.route(TOKENS, forward(TOKENS, training=True, expert_ids=ids))
    assert torch.equal(routing.indices.view(3, 5), ids.unsqueeze(1).expand(-1, 5))
    expected = (TOKENS @ routed.router.output.weight[1]).sigmoid()
    torch.testing.assert_close(routing.weights.view(3, 5)[[0, 2]], expected[[0, 2]])
    (routing.weights * (routing.indices >= 0)).sum().backward()
    grad = routed.router.output.weight.grad
    assert grad[1].any()
    assert not grad[[0, 2]].any()


def test_a_new_gate_weighs_its_expert_by_a_half(forward) -> None:
    routing = mixture().route(TOKENS, forward(TOKENS, expert_ids=torch.tensor([0, 1, 2])))
    assert (routing.weights == 0.5).all()


def test_without_numbers_standardized_scores_decide(forward) -> None:
    routed = mixture(k=2)
    torch.manual_seed(0)
    with torch.no_grad():
        routed.router.output.weight.normal_()
        routed.router.output.weight[1] *= 1e-3  # of which standardizing knows nothing
    routing: Routing = routed.route(TOKENS, forward(TOKENS))
    for row, x in enumerate(TOKENS.flatten(0, 1)):
        scores = torch.stack([standard(x) @ standard(v) / D**0.5 for v in routed.router.output.weight])
        values, order = scores.topk(2)
        assert routing.indices[row].tolist() == order.tolist()
        torch.testing.assert_close(routing.weights[row], values.softmax(0))


def test_experts_without_a_trained_gate_are_never_chosen(forward) -> None:
    routed = mixture(k=2)
    assert (routed.route(TOKENS, forward(TOKENS)).indices == -1).all()
    with torch.no_grad():
        routed.router.output.weight[2].normal_()
    routing = routed.route(TOKENS, forward(TOKENS))
    assert (routing.indices.sort(1).values == torch.tensor([-1, 2])).all()
    torch.testing.assert_close(routing.weights.sum(1), torch.ones(15))


def test_rows_of_others_do_not_reach_its_gradients(forward) -> None:
    routed, tokens = mixture(), TOKENS.clone()
    tokens[0] = torch.nan
    context = forward(tokens, training=True, expert_ids=torch.tensor([1, 1, 1]))
    context.record.own_rows = torch.arange(15) >= 5
    routing = routed.route(tokens, context)
    torch.where(context.record.own_rows, routing.weights[:, 0], 0.0).sum().backward()
    assert routed.router.output.weight.grad.isfinite().all()
    assert routed.router.output.weight.grad[1].any()


def test_it_says_what_it_reads() -> None:
    router = build_router("phatgoose", D, NAMES)
    assert (router.fields, router.scopes) == (("expert_ids",), {"module"})
    with pytest.raises(ValueError, match="PhatgooseRouter takes no argument 'hidden'"):
        build_router({"kind": "phatgoose", "hidden": [3]}, D, NAMES)
