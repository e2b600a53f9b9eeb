"""Trees: leaves, splits, sparsity, and a permutation that is searched and made hard."""

from __future__ import annotations

import math
from itertools import permutations
from typing import Any

import pytest
import torch
from torch import Tensor

from mixadapters.core.context import ForwardContext
from mixadapters.core.routing import Routing
from mixadapters.routers import build_router
from mixadapters.routers.permutation import Permutation
from mixadapters.routers.tree import smooth_step

TOKENS = torch.randn(2, 10, 6, generator=torch.Generator().manual_seed(1))


def make(experts: int = 5, spread: float = 1.0, **options: Any) -> Any:
    torch.manual_seed(0)
    router = build_router({"kind": "tree", **options}, 6, [f"e{i}" for i in range(experts)]).eval()
    with torch.no_grad():
        router.splits.weight.normal_(std=spread)
        router.output.weight.normal_()
    return router


def run(router: Any) -> Routing:
    return router(TOKENS, ForwardContext())


def naive(router: Any, x: Tensor) -> Tensor:
    """(E,) the weights of one row (d,), leaf by leaf."""
    x = x / (x.square().mean() + torch.finfo(x.dtype).eps).sqrt()
    count = len(router.experts)
    splits = (router.splits.weight @ x).view(router.k, count - 1)
    leaves = (router.output.weight @ x + router.output.bias).view(router.k, count)
    terms = torch.zeros(router.k, count)
    for tree in range(router.k):
        for leaf in range(count):
            node, chance = count + leaf, torch.tensor(1.0)
            while node > 1:
                to_the_left = smooth_step(splits[tree, node // 2 - 1], router.gamma)
                chance = chance * (to_the_left if node % 2 == 0 else 1 - to_the_left)
                node //= 2
            terms[tree, leaf] = leaves[tree, leaf].exp() * (chance if chance >= 1e-5 else 0)
    return terms.sum(0) / terms.sum()


@pytest.mark.parametrize("experts", [2, 3, 5, 8])
@pytest.mark.parametrize("gamma", [1.0, 10.0])
def test_weights_equal_a_walk_through_the_trees(experts, gamma) -> None:
    router = make(experts, k=3, gamma=gamma)
    routing = run(router)
    dense = torch.zeros(20, experts).scatter_add(1, routing.indices.clamp_min(0), routing.weights)
    for row, x in enumerate(TOKENS.flatten(0, 1)):
        torch.testing.assert_close(dense[row], naive(router, x))


@pytest.mark.parametrize("experts", range(2, 17))
def test_the_leaves_of_a_tree_sum_to_one(experts) -> None:
    reached = make(experts, gamma=5.0).reached(torch.randn(50, 2, experts - 1))
    assert reached.shape == (50, 2, experts)
    torch.testing.assert_close(reached.sum(-1), torch.ones(50, 2))
    assert (reached >= 0).all()


def test_saturated_trees_use_at_most_one_expert_each_and_stay_differentiable() -> None:
    router = make(8, spread=100.0, k=3)
    routing = run(router)
    assert ((routing.indices >= 0).sum(1) <= 3).all()
    torch.testing.assert_close(routing.weights.sum(1), torch.ones(20))
    routing.weights[:, 0].sum().backward()
    assert router.output.weight.grad.any()


def test_a_new_router_is_dense() -> None:
    torch.manual_seed(0)
    router = build_router("tree", 6, list("abcde")).eval()
    assert ((run(router).indices >= 0).sum(1) == 5).all()


@pytest.mark.parametrize("gamma", [0.5, 1.0, 10.0])
def test_smooth_step_has_a_continuous_derivative(gamma) -> None:
    ends = torch.tensor([-gamma / 2, gamma / 2], dtype=torch.float64)
    assert smooth_step(ends, gamma).tolist() == [0, 1]
    assert smooth_step(torch.tensor([-1e3, 0.0, 1e3]), gamma).tolist() == [0, 0.5, 1]
    z = torch.linspace(-gamma, gamma, 4001, dtype=torch.float64, requires_grad=True)
    smooth_step(z, gamma).sum().backward()
    assert float(z.grad.diff().abs().max()) < 0.01 / gamma  # no jump
    finite = (smooth_step(z + 1e-6, gamma) - smooth_step(z - 1e-6, gamma)) / 2e-6
    torch.testing.assert_close(z.grad, finite.detach(), atol=1e-5, rtol=1e-5)


def test_entropy_is_that_of_the_leaves_and_makes_splits_saturate() -> None:
    router = make(5, spread=0.1, gamma=4.0, entropy_coef=1.0).train()
    routing = run(router)
    reached = router.reached(router.parts(routing.logits)[0])
    expected = -(reached * reached.log()).sum((1, 2)).mean()
    torch.testing.assert_close(router.losses(routing, None)["entropy"][0], expected)
    optimizer = torch.optim.Adam(router.parameters(), 0.1)
    for _ in range(80):
        optimizer.zero_grad()
        router.losses(run(router), None)["entropy"][0].backward()
        optimizer.step()
    assert (run(router).indices >= 0).sum(1).float().mean() < 3


def test_z_loss_is_that_of_the_softmax_over_all_leaves() -> None:
    router = make(5, k=3, z_coef=1.0)
    routing = run(router)
    leaves = routing.logits[:, router.splits.out_features :]
    torch.testing.assert_close(router.losses(routing, None)["z"][0], leaves.logsumexp(1).square().mean())


def test_trees_cannot_gain_or_lose_experts() -> None:
    with pytest.raises(ValueError, match="TreeRouter: its trees have as many leaves as there are experts"):
        make().add_expert("new", 0.1)
    with pytest.raises(ValueError, match=r"a tree needs two arms at least, and has \['e0'\]"):
        make(1)
    with pytest.raises(ValueError, match="gamma=0 must be a finite number, above 0"):
        make(gamma=0)


# --- the permutation ---------------------------------------------------------------------------------------------


def test_rows_and_columns_of_a_soft_permutation_sum_to_one() -> None:
    torch.manual_seed(0)
    permutation = Permutation(6)
    permutation.tau, permutation.iterations = 0.05, 150
    matrix = permutation.matrix()
    torch.testing.assert_close(matrix.sum(0), torch.ones(6), atol=1e-4, rtol=0)
    torch.testing.assert_close(matrix.sum(1), torch.ones(6), atol=1e-4, rtol=0)
    assert permutation.entropy() > 0


def test_entropy_of_a_permutation_is_that_of_its_rows_and_of_its_columns() -> None:
    permutation = Permutation(6)
    with torch.no_grad():
        permutation.weight.zero_()  # every arm goes everywhere alike
    torch.testing.assert_close(permutation.entropy(), torch.tensor(2 * 6 * math.log(6)))


def test_hardening_takes_the_best_permutation() -> None:
    torch.manual_seed(0)
    for _ in range(5):
        permutation = Permutation(4)
        permutation.tau = 0.05
        matrix = permutation.matrix().detach()
        best = max(permutations(range(4)), key=lambda p: sum(float(matrix[i, p[i]]) for i in range(4)))
        permutation.harden()
        assert permutation.order.tolist() == list(best)
        scores = torch.randn(3, 4)
        hard = torch.nn.functional.one_hot(permutation.order, 4).float()
        torch.testing.assert_close(permutation(scores), scores @ hard)


def test_a_permutation_is_learned_made_hard_and_saved() -> None:
    router = make(4, gamma=10.0, learn_permutation=True).train()
    router.permutation.tau = 0.1
    losses = router.losses(run(router), None)
    value, weight = losses["permutation"]
    assert (value > 0, weight) == (True, 1e-4)
    run(router).weights[:, 0].sum().backward()
    assert router.permutation.weight.grad.any()
    router.permutation.harden()
    assert "permutation" not in router.losses(run(router), None)
    other = make(4, gamma=10.0, learn_permutation=True)
    other.load_state_dict(router.state_dict())
    assert other.permutation.hard
    assert torch.equal(run(other.eval()).weights, run(router.eval()).weights)
    assert not math.isnan(float(run(other).weights.sum()))


def test_permuting_experts_and_gate_together_changes_nothing() -> None:
    router, plain = make(4, gamma=10.0, learn_permutation=True), make(4, gamma=10.0)
    plain.load_state_dict(router.state_dict(), strict=False)
    router.permutation.harden()
    values = torch.randn(4)
    moved = values[router.permutation.order.argsort()]  # expert e lies where its arm goes
    one, other = run(router), run(plain)
    outputs = [(r.weights * v[r.indices.clamp_min(0)]).sum(1) for r, v in ((one, moved), (other, values))]
    torch.testing.assert_close(*outputs)


@pytest.mark.parametrize("kind", ["tree", "hash"])
def test_verbs_refuse_before_anything_changes(kind, tiny) -> None:
    from peft import get_peft_model

    from mixadapters.tuners.mixda import MixDAConfig
    from mixadapters.tuners.moa import MoAConfig

    moa = get_peft_model(tiny("llama"), MoAConfig(experts=["a", "b"], r=2, router=kind)).base_model
    mixda = get_peft_model(tiny("llama"), MixDAConfig(domains=["a", "b"], r=2, router=kind)).base_model
    for verb in (moa.add_expert, moa.remove_expert, mixda.add_domain, mixda.remove_domain):
        with pytest.raises(ValueError, match=r"(Tree|Hash)Router cannot: .*make a new router"):
            verb("c" if "add" in verb.__name__ else "a")
    assert list(moa.peft_config["default"].experts) == list(mixda.peft_config["default"].domains) == ["a", "b"]
    for tuner in (moa, mixda):
        assert all(mixture.bank.names == ["a", "b"] for mixture in tuner.mixtures().values())
