"""A cache of experts that knows its plan never loads more than one that does not; batches are whole."""

from __future__ import annotations

import random
from functools import cache as remember

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import get_peft_model

from mixadapters import MoAConfig
from mixadapters.core.routing import Routing
from mixadapters.serving.expert_cache import ExpertCache, expert_aware_batches, request_experts, token_experts

# (capacity, steps): steps need no more than fit
TRACES = st.integers(1, 5).flatmap(
    lambda capacity: st.tuples(
        st.just(capacity),
        st.lists(st.frozensets(st.integers(0, 7), max_size=capacity), max_size=30),
    )
)


def loads(capacity: int, steps, policy: str) -> int:
    """Loads over a trace, with what must hold at each step."""
    there: dict[int, str] = {}

    def load(expert: int) -> str:
        assert expert not in there
        there[expert] = str(expert)
        return there[expert]

    cache = ExpertCache(
        capacity, load, policy=policy, plan=steps if policy == "belady" else None, drop=lambda key, _: there.pop(key)
    )
    for step in steps:
        assert cache.take(step) == {expert: str(expert) for expert in step}
        assert set(step) <= set(cache.resident) == set(there)
        assert len(there) <= capacity
    assert cache.hits + cache.loads == sum(len(step) for step in steps)
    return cache.loads


def fewest_loads(capacity: int, steps) -> int:
    """By trying every choice of what to give up."""

    @remember
    def least(number: int, resident: frozenset[int]) -> int:
        if number == len(steps):
            return 0
        missing = len(steps[number] - resident)
        return missing + min(least(number + 1, kept) for kept in after(resident, steps[number]))

    def after(resident: frozenset[int], step: frozenset[int]):
        if len(resident | step) <= capacity:
            yield resident | step
            return
        for expert in resident - step:
            yield from after(resident - {expert}, step)

    return least(0, frozenset())


@settings(max_examples=60, deadline=None)
@given(TRACES)
def test_belady_loads_no_more_than_lru(trace) -> None:
    capacity, steps = trace
    assert loads(capacity, steps, "belady") <= loads(capacity, steps, "lru")


@pytest.mark.parametrize("seed", range(20))
def test_belady_equals_brute_force(seed) -> None:
    draw = random.Random(seed)
    capacity = draw.choice([2, 3])
    steps = [frozenset(draw.sample(range(6), draw.randint(1, capacity))) for _ in range(12)]
    assert loads(capacity, steps, "belady") == fewest_loads(capacity, tuple(steps))


def test_belady_is_ahead_where_experts_come_in_turn() -> None:
    """Three experts in turn and room for two: what LRU gives up is always what comes next."""
    steps = [{i % 3} for i in range(12)]
    assert loads(2, steps, "lru") == 12
    assert loads(2, steps, "belady") == 7


def test_a_plan_that_grows_is_followed_like_a_whole_one() -> None:
    draw = random.Random(3)
    steps = [{draw.randrange(6)} for _ in range(40)]
    cache = ExpertCache(3, str, policy="belady", plan=steps[:10])
    for number, step in enumerate(steps):
        if number == 9:  # before the first part has ended
            cache.extend(steps[10:])
        cache.take(step)
    assert cache.loads <= loads(3, steps, "lru")
    with pytest.raises(ValueError, match=r"step 40 asks for .* by the plan there is none"):
        cache.take({1})


def test_other_steps_than_planned_and_steps_that_do_not_fit_change_nothing() -> None:
    cache = ExpertCache(2, str, policy="belady", plan=[{1, 2}, {3}])
    with pytest.raises(ValueError, match=r"step 0 asks for \['1'\], and by the plan it needs \['1', '2'\]"):
        cache.take({1})
    with pytest.raises(ValueError, match=r"a step needs 3 experts, .* and capacity=2"):
        cache.extend([{4}, {1, 2, 3}])
    cache.take({1, 2})
    cache.take({3})
    with pytest.raises(ValueError, match="by the plan there is none"):  # of the refused extension nothing was planned
        cache.take({4})


def test_a_step_whose_loading_failed_can_be_taken_again() -> None:
    broken = [True]

    def load(expert: int) -> int:
        if broken[0] and expert == 2:
            raise OSError("the disk is gone")
        return expert

    cache = ExpertCache(2, load, policy="belady", plan=[{1, 2}, {1}])
    with pytest.raises(OSError, match="the disk is gone"):
        cache.take([1, 2])
    broken[0] = False
    assert cache.take([1, 2]) == {1: 1, 2: 2}
    assert cache.take([1]) == {1: 1}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"capacity": 0}, "capacity=0 must be an integer, at least 1"),
        ({"policy": "fifo"}, "policy='fifo' is unknown"),
        ({"policy": "belady"}, "policy='belady' needs a plan"),
        ({"plan": [{1}]}, "policy='lru' reads no plan"),
    ],
)
def test_bad_settings_are_refused(arguments, message) -> None:
    with pytest.raises(ValueError, match=message):
        ExpertCache(**{"capacity": 2, "load": str, **arguments})
    with pytest.raises(ValueError, match="policy='lru' reads no plan"):
        ExpertCache(2, str).extend([{1}])


def test_experts_of_requests_are_those_of_their_real_tokens() -> None:
    indices = torch.tensor([[0, 1], [2, -1], [1, 0], [3, 2], [3, 4], [5, 3]])
    mask = torch.tensor([[0, 1, 1], [1, 1, 0]])
    assert request_experts(Routing(indices), 2, mask) == [{0, 1, 2}, {2, 3, 4}]
    assert token_experts(Routing(indices), 2, mask) == [[{2}, {0, 1}], [{2, 3}, {3, 4}]]
    assert request_experts(Routing(indices), 3) == [{0, 1, 2}, {0, 1, 2, 3}, {3, 4, 5}]
    with pytest.raises(ValueError, match="batch=4 does not divide the 6 rows"):
        request_experts(Routing(indices), 4)
    with pytest.raises(ValueError, match=r"mask \(2, 2\) must be \(2, 3\)"):
        request_experts(Routing(indices), 2, mask[:, :2])
    with pytest.raises(ValueError, match="weighs every expert"):
        request_experts(Routing(weights=torch.ones(6, 4)), 2)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.frozensets(st.integers(0, 9), max_size=4), max_size=25), st.integers(4, 8), st.integers(1, 6))
def test_batches_hold_every_request_once_and_few_experts(needs, max_experts, max_requests) -> None:
    batches = expert_aware_batches(needs, max_experts, max_requests)
    assert sorted(number for batch in batches for number in batch) == list(range(len(needs)))
    for batch in batches:
        assert len(frozenset().union(*(needs[number] for number in batch))) <= max_experts
        assert 1 <= len(batch) <= max_requests
    assert [batch[0] for batch in batches] == sorted(batch[0] for batch in batches)  # the oldest begins each


def test_requests_of_like_experts_share_a_batch() -> None:
    needs = [{0, 1}, {2, 3}, {0, 1}, {2, 3}, {1}, {3}]
    assert expert_aware_batches(needs, 2) == [[0, 2, 4], [1, 3, 5]]
    with pytest.raises(ValueError, match="request 1 needs 3 experts, and max_experts=2"):
        expert_aware_batches([{0}, {1, 2, 3}], 2)
    with pytest.raises(ValueError, match="max_requests=0 must be"):
        expert_aware_batches([], 2, 0)


def test_a_plan_names_the_experts_that_the_model_then_uses(tiny, tiny_inputs) -> None:
    """Nothing of the base model runs for it; the batches that are made of it give what all requests together give."""
    pregate = {"kind": "pregate", "vocab_size": 96, "k": 2}
    config = MoAConfig(num_experts=6, r=2, router_scope="model", init_weights=False, router=pregate)
    model = get_peft_model(tiny("llama"), config).eval()
    inputs = tiny_inputs("llama", batch=5, padding="left")
    ran: list[str] = []
    for name, module in model.get_base_model().named_modules():
        if "adapters" not in name:
            module.register_forward_pre_hook(lambda module, args, name=name: ran.append(name))
    router = next(iter(model.base_model.mixtures().values())).router
    needs = request_experts(router.plan(**inputs), 5, inputs["attention_mask"])
    assert not ran

    used: list[set[int]] = [set() for _ in range(5)]

    def note(key, routing, mask) -> None:
        chosen, real = routing.indices.view(5, -1, 2).tolist(), mask.view(5, -1).tolist()
        for row in range(5):
            used[row].update(e for token, counts in zip(chosen[row], real[row], strict=True) if counts for e in token)

    model.base_model.context.observers.append(note)
    with torch.no_grad():
        whole = model(**inputs).logits
    assert ran
    assert used == needs
    assert len({frozenset(need) for need in needs}) > 1
    model.base_model.context.observers.clear()
    cache = ExpertCache(6, str, policy="belady", plan=needs)
    for batch in expert_aware_batches(needs, max_experts=max(map(len, needs))):
        with torch.no_grad():
            part = model(**{name: value[batch] for name, value in inputs.items()}).logits
        real = inputs["attention_mask"][batch].bool()
        torch.testing.assert_close(part[real], whole[batch][real], rtol=1e-4, atol=1e-4)
    for need in needs:
        assert cache.take(need).keys() == need
