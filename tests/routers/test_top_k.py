"""Top-k: ties, weights, noise, capacity, null arms, and balancing by a bias."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mixadapters.core.context import ForwardContext
from mixadapters.core.record import Record
from mixadapters.core.routing import Routing, with_distribution
from mixadapters.core.streams import Stream
from mixadapters.routers import NullRouter, TopKRouter, build_router
from mixadapters.routers.capacity import within_capacity

D, NAMES = 6, ["a", "b", "c", "d"]


def make(kind: str = "top_k", names: list[str] = NAMES, width: int = D, **options: Any) -> Any:
    torch.manual_seed(0)
    return build_router({"kind": kind, "init_range": 1.0, **options}, width, names).eval()


def context_of(tokens: Tensor, training: bool = False, mask: Tensor | None = None) -> ForwardContext:
    context = ForwardContext()
    context.enter(Record(training, True, open=True))
    context.record.streams[""] = Stream(*tokens.shape[:2], mask)
    return context


def run(router: Any, tokens: Tensor, **about: Any) -> Routing:
    return router(tokens, context_of(tokens, **about))


def logits_of(router: Any, tokens: Tensor) -> Tensor:
    return router.output(nn.functional.rms_norm(tokens, (tokens.shape[-1],))).flatten(0, 1)


TOKENS = torch.randn(3, 5, D, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("k", [1, 2, 4, None])
@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
def test_the_k_largest_are_chosen_and_weighed_by_their_scores(scoring, k) -> None:
    router = make(k=k, scoring_func=scoring, routed_scaling_factor=2.5)
    routing, logits = run(router, TOKENS), logits_of(router, TOKENS)
    scores = logits.softmax(-1) if scoring == "softmax" else logits.sigmoid()
    for row in range(15):
        order = sorted(range(4), key=lambda e: -float(scores[row, e].detach()))[: k or 4]
        assert routing.indices[row].tolist() == order
        torch.testing.assert_close(routing.weights[row], 2.5 * scores[row, order])
        assert routing.selected[row].nonzero().flatten().tolist() == sorted(order)
    torch.testing.assert_close(routing.probs.sum(1), torch.ones(15))


@pytest.mark.parametrize("options", [{}, {"norm_topk_prob": True}, {"null_arms": 2}, {"scoring_func": "sigmoid"}])
def test_without_gradients_the_routing_is_the_same_and_says_what_was_chosen(options) -> None:
    """What was chosen is then read off the indices by who asks, where these leave no arm out."""
    router = make("null" if "null_arms" in options else "top_k", k=3, **options)
    recorded = run(router, TOKENS)
    with torch.no_grad():
        found = run(router, TOKENS)
    for name in ("indices", "weights", "probs", "logits"):
        assert torch.equal(getattr(found, name), getattr(recorded, name)), name
    told = with_distribution(found, router.experts, router.arms, 15, TOKENS.device)
    assert torch.equal(told.selected, recorded.selected)


def test_a_router_of_ones_own_that_leaves_slots_empty_is_taken_at_its_word() -> None:
    class Sure(TopKRouter):
        """Of the two largest only those above a half."""

        def select(self, scores: Tensor) -> Tensor:
            found = scores.topk(2)
            return torch.where(found.values > 0.5, found.indices, -1)

    router = Sure(D, NAMES, init_range=1.0).eval()
    with torch.no_grad():
        routing = run(router, TOKENS)
    assert ((routing.indices < 0) == (routing.weights == 0)).all()
    assert (routing.indices < 0).any()


def test_a_removed_expert_leaves_normalised_weights_as_they_were() -> None:
    router = make(k=3, norm_topk_prob=True)
    before = run(router, TOKENS)
    router.remove_expert("b", renormalize=False)
    after = run(router, TOKENS)
    gone = before.indices == 1
    torch.testing.assert_close(after.weights, before.weights.masked_fill(gone, 0.0))
    assert torch.equal(after.indices < 0, gone)


def test_weights_sum_to_one_where_that_is_asked_for() -> None:
    routing = run(make(norm_topk_prob=True), TOKENS)
    torch.testing.assert_close(routing.weights.sum(1), torch.ones(15))
    assert (run(make(), TOKENS).weights.sum(1) < 1).all()


def test_a_new_router_does_not_send_all_rows_to_the_first_experts() -> None:
    torch.manual_seed(0)
    router = build_router("top_k", 32, [f"e{i}" for i in range(8)])
    assert float(router.output.weight.detach().std()) == pytest.approx(0.02, rel=0.2)
    assert not router.output.bias.any()
    tokens = torch.randn(4, 50, 32)
    chosen = run(router.eval(), tokens).indices
    assert chosen.unique().numel() == 8


def test_convex_weights_leave_the_rest_to_the_frozen_layer() -> None:
    routing = run(make(k=2, convex=True, frozen_bias=1.0), TOKENS)
    assert routing.probs.shape == (15, 5)
    torch.testing.assert_close(routing.base_weight + routing.weights.sum(1), torch.ones(15))
    frozen = ~routing.selected[:, :4].any(1)
    assert (routing.indices[routing.selected[:, 4]] < 0).any(1).all()
    assert (routing.base_weight[frozen] == 1).all()
    with pytest.raises(ValueError, match=r"convex weights sum to 1.*norm_topk_prob=True"):
        make(convex=True, norm_topk_prob=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 5}, "k=5 is more than the 4 arms; choose one of 1 to 4"),
        ({"k": 0}, "k=0 must be an integer, at least 1"),
        ({"k": True}, "k=True must be an integer, at least 1"),
        ({"scoring_func": "relu"}, "scoring_func='relu' is unknown"),
        ({"noise": -1.0}, "noise=-1.0 must be a finite number, at least 0"),
        ({"jitter": 1.0}, "jitter=1.0 must be a finite number, at least 0, less than 1"),
        ({"capacity_factor": -1}, "capacity_factor=-1 must be"),
        ({"bias_update_rate": math.inf}, "bias_update_rate=inf must be"),
        ({"norm_topk_prob": 1}, "norm_topk_prob=1 must be True or False"),
        ({"balance_groups": [["a", "b"], ["c"]]}, "balance_groups=.* must hold each expert of .* once"),
        ({"balance_groups": [["a", "b"], ["b", "c", "d"]]}, "balance_groups=.* must hold each expert"),
        ({"balance_groups": [["a", "b", "c", "d"], []]}, "balance_groups=.* must hold each expert"),
        ({"balance_groups": [["a", "b"], ["c", ["d"]]]}, "balance_groups=.* must hold each expert"),
        ({"balance_groups": 3}, "balance_groups=3 must hold each expert"),
        ({"balance_groups": [["a", "b"], "cd"]}, "balance_groups=.* must hold each expert"),
    ],
)
def test_nonsense_is_refused_by_name(options, message) -> None:
    with pytest.raises(ValueError, match=message):
        make(**options)


# --- noise -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("granularity", ["token", "request"])
@pytest.mark.parametrize("option", ["noise", "jitter"])
def test_noise_acts_in_training_alone_and_once_for_what_decides_together(option, granularity) -> None:
    router = make(granularity=granularity, **{option: 0.5})
    mask = torch.ones(3, 5, dtype=torch.bool)
    calm = run(make(granularity=granularity), TOKENS, mask=mask)
    torch.testing.assert_close(run(router, TOKENS, mask=mask).weights, calm.weights)
    router.train()
    context = context_of(TOKENS, True, mask)
    context.record.values["prompt_mask"] = mask
    one, other = router(TOKENS, context), router(TOKENS, context)
    assert not torch.equal(one.probs, other.probs)
    if granularity == "request":
        assert torch.equal(one.probs.view(3, 5, 4)[:, :1].expand(-1, 5, -1), one.probs.view(3, 5, 4))
        assert not torch.equal(one.probs[0], one.probs[5])


def test_noise_has_the_deviation_that_is_said() -> None:
    router = make(noise=2.0).train()
    tokens = TOKENS[:1, :1].expand(1, 20000, -1)
    added = run(router, tokens, training=True).probs.log() - router.eval()(tokens, context_of(tokens)).probs.log()
    differences = (added[:, 0] - added[:, 1]) / math.sqrt(2)  # a softmax knows differences alone
    assert float(differences.std()) == pytest.approx(2.0 / 4, rel=0.05)


def test_load_loss_needs_noise_and_balances_chances() -> None:
    router = make(load_coef=1.0).train()
    routing = run(router, TOKENS, training=True)
    with pytest.raises(ValueError, match=r"load_coef=1.0 needs noise above 0"):
        router.losses(routing, None)
    router = make(noise=1.0, load_coef=2.0).train()
    routing = run(router, TOKENS, training=True)
    assert routing.chances.shape == (15, 4)
    value, weight = router.losses(routing, None)["load"]
    assert (weight, bool(value > 0)) == (2.0, True)
    value.backward()
    assert router.output.weight.grad.any()
    assert run(router.eval(), TOKENS).chances is None


# --- capacity ----------------------------------------------------------------------------------------------------


def test_capacity_by_hand() -> None:
    indices = torch.tensor([[0, 1], [0, 1], [0, 2], [1, 0]])
    # k int(.75 * 4 / 3) = 2 rows each; first choices before second ones
    assert within_capacity(indices, 3, 0.75).tolist() == [[0, 1], [0, -1], [-1, 2], [1, -1]]
    ranked = within_capacity(indices, 3, 0.75, order=torch.tensor([0.1, 0.9, 0.5, 0.2]))
    assert ranked.tolist() == [[-1, -1], [0, 1], [0, 2], [1, -1]]
    mask = torch.tensor([False, True, True, True])  # int(.75 * 3 / 3) = 0, so nothing fits
    assert within_capacity(indices, 3, 0.75, mask)[1:].tolist() == [[-1, -1]] * 3
    assert within_capacity(indices, 3, 1.0, mask)[1:].tolist() == [[0, 1], [0, 2], [1, -1]]


@pytest.mark.parametrize("prioritized", [False, True])
def test_no_expert_takes_more_than_its_capacity_in_training(prioritized) -> None:
    router = make(k=2, capacity_factor=0.8, batch_prioritized=prioritized)
    nn.init.constant_(router.output.bias[:1], 4.0)  # all want the first
    full = run(router, TOKENS)
    assert (full.indices >= 0).all()  # in evaluation nothing is dropped
    limited = run(router.train(), TOKENS, training=True)
    counts = [int((limited.indices == e).sum()) for e in range(4)]
    assert max(counts) <= 2 * int(0.8 * 15 / 4)
    assert counts[0] == 2 * int(0.8 * 15 / 4)
    dropped = limited.indices < 0
    assert (limited.weights[dropped] == 0).all()
    assert torch.equal(limited.weights[~dropped], full.weights[~dropped])
    assert torch.equal(limited.selected, full.selected)  # losses see what was wanted
    if prioritized:
        best, served = full.probs.amax(1), (limited.indices == 0).any(1)
        assert float(best[~served].max()) <= float(best[served].min())


# --- balancing by a bias -----------------------------------------------------------------------------------------


def test_bias_decides_who_is_chosen_and_not_how_much() -> None:
    router, plain = make(k=1, bias_update_rate=0.1), make(k=1)
    assert torch.equal(run(router, TOKENS).weights, run(plain, TOKENS).weights)
    router.balancing.bias[3] = 5.0
    routing, scores = run(router, TOKENS), logits_of(router, TOKENS).softmax(-1)
    assert (routing.indices == 3).all()
    torch.testing.assert_close(routing.weights[:, 0], scores[:, 3])


def test_bias_moves_by_the_sign_of_the_error_of_what_training_has_counted() -> None:
    router = make(k=1, bias_update_rate=0.25, null_arms=1).train()
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [0, 0, 0, 0, 0]]).bool()
    routing = run(router, TOKENS, training=True, mask=mask)
    counts = routing.selected[mask.flatten()].sum(0)
    assert torch.equal(router.balancing.counts, counts)
    router(TOKENS, context_of(TOKENS))  # evaluation counts nothing
    again = context_of(TOKENS, True, mask)
    again.record.closed = True  # nor does a layer that runs again
    router(TOKENS, again)
    assert torch.equal(router.balancing.counts, counts)
    mean = counts[:4].float().mean()
    router.update_bias()
    assert torch.equal(router.balancing.bias[:4], 0.25 * (mean - counts[:4]).sign())
    assert router.balancing.bias[4] == 0
    assert not router.balancing.counts.any()


def test_bias_is_saved_kept_exact_and_follows_its_expert() -> None:
    router = make(k=2, bias_update_rate=1e-3)
    router.balancing.bias.copy_(torch.tensor([0.1, 0.2003, 0.3, 0.4]))
    before = router.balancing.bias.clone()
    assert "balancing.bias" in router.state_dict()
    # What is a buffer would be overwritten by the first process's in data parallelism.
    assert [name for name, _ in router.named_buffers()] == ["balancing.bias"]
    router.to(torch.bfloat16)
    assert torch.equal(router.balancing.bias, before)
    assert router.output.weight.dtype == torch.bfloat16
    router.float()
    router.reorder(["d", "a", "b", "c"])
    assert torch.equal(router.balancing.bias, before[[3, 0, 1, 2]])
    router.add_expert("e", 0.1)
    assert router.balancing.bias.tolist() == [*before[[3, 0, 1, 2]].tolist(), 0]
    router.remove_expert("a", False)
    assert torch.equal(router.balancing.bias, before.new_tensor([before[3], before[1], before[2], 0, before[0]]))
    assert router.balancing.counts.shape == (5,)


def test_counts_of_arms_that_have_moved_move_no_bias() -> None:
    router = make(k=1, bias_update_rate=0.1)
    selected = torch.tensor([[True, False, False, False]] * 3)
    router.balancing.count(selected, None)
    router.reorder(["d", "a", "b", "c"])
    router.update_bias()
    assert not router.balancing.bias.any()
    router.balancing.count(selected, None)  # of arms as they lie now
    router.update_bias()
    torch.testing.assert_close(router.balancing.bias, torch.tensor([-0.1, 0.1, 0.1, 0.1]))


@pytest.mark.parametrize(("scoring", "rate"), [("sigmoid", 0.01), ("softmax", 0.0005)])
def test_a_bias_balances_64_experts_without_a_loss(scoring, rate) -> None:
    torch.manual_seed(0)
    options = {"k": 2, "bias_update_rate": rate, "init_range": 0.2, "scoring_func": scoring}
    router = build_router({"kind": "top_k", **options}, 16, [f"e{i}" for i in range(64)]).train()
    tokens = torch.randn(1, 4096, 16) + torch.randn(16)  # they are alike, so few experts get most of them

    def spread() -> float:
        counts = run(router, tokens, training=True).selected.sum(0).float()
        return float(counts.max() / counts.mean())

    assert spread() > 5
    router.balancing.counts.zero_()  # as when they are summed over processes, in place
    for step in range(300):
        if step == 200:
            router.set_option("bias_update_rate", rate / 5)
        run(router, tokens, training=True)
        router.update_bias()
    assert spread() <= 1.2


@pytest.mark.usefixtures("fresh_compiler")
def test_counting_goes_on_under_the_compiler_and_after_a_meta_device() -> None:
    with torch.device("meta"):
        router = build_router({"kind": "top_k", "k": 2, "bias_update_rate": 0.1}, D, NAMES)
    router.load_state_dict(make(k=2, bias_update_rate=0.1).state_dict(), assign=True)
    router.train()
    # Not the Routing itself, of which graphs of torch 2.11 cannot return each.
    compiled = torch.compile(lambda *given: router(*given).weights, fullgraph=True, backend="eager")
    for step in (1, 2):
        compiled(TOKENS, context_of(TOKENS, True))
        assert int(router.balancing.counts.sum()) == step * 15 * 2
    router.update_bias()
    assert router.balancing.bias.any()


def test_a_router_without_a_bias_has_none_to_move() -> None:
    with pytest.raises(ValueError, match="bias_update_rate=0"):
        make().update_bias()
    with pytest.raises(ValueError, match="made without a bias"):
        make().set_option("bias_update_rate", 0.1)


# --- arms --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
def test_a_new_expert_gets_about_its_share(scoring) -> None:
    torch.manual_seed(0)
    router = build_router({"kind": "top_k", "k": None, "scoring_func": scoring}, D, NAMES).eval()
    router.add_expert("e", 0.2)
    weights = run(router, TOKENS).probs if scoring == "softmax" else run(router, TOKENS).weights
    place = run(router, TOKENS).indices == 4
    share = weights[:, 4] if scoring == "softmax" else weights[place]
    torch.testing.assert_close(share, torch.full((15,), 0.2), atol=0.03, rtol=0)
    assert router.output.weight[4].any()


def test_k_never_exceeds_the_arms() -> None:
    router = make(k=4)
    with pytest.raises(ValueError, match="k=4 is more than the 3 arms"):
        router.remove_expert("a", True)
    assert router.experts == NAMES
    router.set_option("k", 3)
    with pytest.raises(ValueError, match="k=5 is more than"):
        router.set_option("k", 5)
    router.remove_expert("a", True)
    assert run(router, TOKENS).indices.shape == (15, 3)


def test_groups_follow_their_experts() -> None:
    router = make(balance_groups=[["a", "b"], ["c", "d"]], balance_coef=1.0, k=1).train()
    routing = run(router, TOKENS, training=True)
    f, p = routing.selected.float().mean(0), routing.probs.mean(0)
    expected = 4 * ((f[0] + f[1]) / 2 * (p[0] + p[1]) + (f[2] + f[3]) / 2 * (p[2] + p[3]))
    torch.testing.assert_close(router.losses(routing, None)["balance"][0], expected)
    router.remove_expert("a", True)
    router.add_expert("e", 0.1)
    assert router.balance_groups == [["b"], ["c", "d"]]
    assert router.losses(run(router, TOKENS, training=True), None)["balance"][0] > 0


# --- null --------------------------------------------------------------------------------------------------------


def test_null_arms_use_no_expert() -> None:
    router = make("null", k=3, null_arms=4)
    routing = run(router, TOKENS)
    assert router.arms == [*NAMES, "null0", "null1", "null2", "null3"]
    assert torch.equal((routing.indices >= 0).sum(1), routing.selected[:, :4].sum(1))
    assert (routing.selected.sum(1) == 3).all()
    assert (routing.weights[routing.indices < 0] == 0).all()
    nn.init.constant_(router.output.bias[4:], 50.0)
    assert (run(router, TOKENS).indices == -1).all()


def test_null_without_null_arms_is_top_k() -> None:
    router, plain = make("null", null_arms=0, balance_coef=1.0), make(balance_coef=1.0)
    one, other = run(router, TOKENS), run(plain, TOKENS)
    assert torch.equal(one.indices, other.indices)
    assert torch.equal(router.losses(one, None)["balance"][0], plain.losses(other, None)["balance"][0])


def test_normalised_weights_of_null_are_of_the_true_experts() -> None:
    routing = run(make("null", k=4, null_arms=4, norm_topk_prob=True), TOKENS)
    some = (routing.indices >= 0).any(1)
    assert some.any()
    torch.testing.assert_close(routing.weights.sum(1), some.float())


def test_order_of_null_arms_changes_nothing() -> None:
    router = make("null", k=4, null_arms=4, balance_coef=1.0)
    before = run(router, TOKENS)
    order = [*range(4), 6, 4, 7, 5]
    with torch.no_grad():
        for part in (router.output.weight, router.output.bias):
            part.copy_(part[order].clone())
    after = run(router, TOKENS)
    assert torch.equal(after.indices, before.indices)
    torch.testing.assert_close(router.losses(after, None)["balance"][0], router.losses(before, None)["balance"][0])
    assert isinstance(router, NullRouter)
    assert isinstance(router, TopKRouter)


def test_losses_of_null_share_the_load_of_null_arms_and_weigh_experts_alone() -> None:
    router = make("null", k=3, null_arms=2, balance_coef=1.0, importance_coef=1.0)
    routing = run(router, TOKENS)
    f, p = routing.selected.float().mean(0), routing.probs.mean(0)
    f = torch.cat([f[:4], f[4:].mean().expand(2)])
    losses = router.losses(routing, None)
    torch.testing.assert_close(losses["balance"][0], 6 * (f * p).sum())
    torch.testing.assert_close(losses["importance"][0], p[:4].var(unbiased=False) / p[:4].mean() ** 2)


def test_random_logits_use_k_e_over_e_plus_m_experts() -> None:
    torch.manual_seed(3)
    router = build_router({"kind": "null", "k": 3, "null_arms": 4, "init_range": 1.0}, 64, NAMES).eval()
    used = (run(router, torch.randn(20, 100, 64)).indices >= 0).float().sum(1).mean()
    assert float(used) == pytest.approx(3 * 4 / 8, rel=0.05)


# --- the shortest way -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"k": 1}, {"k": None}, {"normalize": False}])
def test_the_shortest_way_gives_the_same_bits(options) -> None:
    router, tokens = make(init_range=1.0, **options).eval(), torch.randn(2, 3, D)
    with torch.no_grad():
        short, whole = router.brief(tokens), run(router, tokens)
    assert short is not None
    assert short._fields == whole._fields
    for name, one, other in zip(short._fields, short, whole, strict=True):
        assert torch.equal(one, other) if isinstance(one, Tensor) else one == other, name


OTHERWISE = [
    {"scoring_func": "sigmoid"}, {"norm_topk_prob": True}, {"routed_scaling_factor": 2.0}, {"temperature": 0.5},
    {"convex": True}, {"null_arms": 1}, {"bias_update_rate": 0.1}, {"hidden": [4]}, {"activation": "relu"},
    {"granularity": "causal_prefix"}, {"kind": "null"},
]  # fmt: skip


@pytest.mark.parametrize("options", OTHERWISE, ids=str)
def test_other_gates_do_not_take_the_shortest_way(options) -> None:
    assert make(**options).eval().brief(torch.randn(2, 3, D)) is None


def test_whoever_changes_a_gate_afterwards_is_heard() -> None:
    router, tokens = make().eval(), torch.randn(2, 3, D)
    router.masked = (NAMES[0],)
    assert router.brief(tokens) is None
    router.masked = ()
    assert router.brief(tokens) is not None
    router.set_option("temperature", 2.0)
    assert router.brief(tokens) is None
    router.set_option("temperature", 1.0)
    with router.register_forward_hook(lambda *_: None):
        assert router.brief(tokens) is None
    assert router.train().brief(tokens) is None
    assert type("Mine", (TopKRouter,), {})(D, NAMES).eval().brief(tokens) is None


def test_an_empty_group_leaves_the_balance_loss_with_its_expert() -> None:
    router = make(balance_coef=1.0, balance_groups=[["a"], ["b", "c"], ["d"]]).train()
    router.remove_expert("a", renormalize=True)
    assert router.balance_groups == [["b", "c"], ["d"]]
    routing = run(router, TOKENS, training=True)
    assert torch.isfinite(router.losses(routing, None)["balance"][0])


def test_arms_of_no_group_are_groups_of_their_own() -> None:
    router = make("null", null_arms=2, balance_coef=1.0, balance_groups=[["a", "b"], ["c", "d"]]).train()
    routing = run(router, TOKENS, training=True)
    shares, probs = routing.selected.float().mean(0), routing.probs.mean(0)
    groups = [[0, 1], [2, 3], [4], [5]]
    expected = 6 * sum(shares[group].mean() * probs[group].sum() for group in groups)
    torch.testing.assert_close(router.losses(routing, None)["balance"][0], expected)


def test_a_row_of_null_arms_alone_has_no_weight_to_norm() -> None:
    router = make("null", null_arms=2, k=1, norm_topk_prob=True)
    with torch.no_grad():
        router.output.bias[4] = 50.0
    routing = run(router, TOKENS)
    assert bool((routing.indices == -1).all())
    assert bool((routing.weights == 0).all())


def test_what_capacity_drops_is_left_to_the_frozen_layer() -> None:
    router = make(k=1, convex=True, capacity_factor=0.5).train()
    routing = run(router, TOKENS, training=True)
    dropped = (routing.indices == -1).all(1)
    assert 0 < int(dropped.sum()) < len(dropped)
    torch.testing.assert_close(routing.base_weight + routing.weights.sum(1), torch.ones(len(dropped)))
    assert bool((routing.base_weight[dropped] == 1).all())
