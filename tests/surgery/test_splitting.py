"""Parts of an expert sum to it, and make it up again."""

from __future__ import annotations

import pytest
import torch
from single_experts import FORMS, activation_of, make_expert, make_inputs
from torch.nn import functional as F

from mixadapters.core.bank import AdapterBank, Weights
from mixadapters.core.routing import Routing
from mixadapters.surgery.function import hidden_of
from mixadapters.surgery.splitting import join_experts, split_expert
from mixadapters.surgery.view import expert_output


@pytest.mark.parametrize("form", FORMS)
def test_the_function_of_an_expert_is_that_of_a_bank(form: str) -> None:
    weights, act, inputs = make_expert(form), activation_of(form), make_inputs()
    bank = AdapterBank(
        12, 10, activation=act, glu=form == "glu", bias=form != "lora", layer_norm=form == "normed", scale=None
    )
    bank.add("one", 8)
    expert = bank.experts["one"]
    state = {"scale.weight": torch.as_tensor(weights.scale).reshape(1)}
    for part, key in (("down", "down.weight"), ("up", "up.weight"), ("b_down", "down.bias"), ("b_up", "up.bias"),
                      ("gate", "gate.weight"), ("b_gate", "gate.bias")):  # fmt: skip
        if getattr(weights, part) is not None:
            state[key] = getattr(weights, part)
    if weights.norm is not None:
        state |= {"norm.weight": weights.norm[0], "norm.bias": weights.norm[1]}
    expert.load_state_dict(state)
    assert torch.allclose(expert_output(weights, act, inputs), bank(inputs, Routing(), None), atol=1e-5)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("parts", [1, 2, 8, [torch.tensor([7, 0, 3]), torch.tensor([1, 2, 4, 5, 6])]])
def test_parts_sum_to_the_expert_and_join_to_it(form: str, parts) -> None:
    weights, act, inputs = make_expert(form), activation_of(form), make_inputs()
    split = split_expert(weights, parts)
    whole = expert_output(weights, act, inputs)
    assert torch.allclose(sum(expert_output(part, act, inputs) for part in split), whole, atol=1e-6)
    assert torch.allclose(expert_output(join_experts(split), act, inputs), whole, atol=1e-6)
    assert [len(part.down) for part in split] == ([8 // parts] * parts if isinstance(parts, int) else [3, 5])


def test_equal_parts_join_to_the_weights_themselves() -> None:
    weights = make_expert("glu")
    joined = join_experts(split_expert(weights, 4))
    assert all(torch.equal(a, b) for a, b in zip(joined, weights, strict=True) if isinstance(a, torch.Tensor))


def test_experts_of_different_scales_join_by_what_they_compute() -> None:
    one, two, inputs = make_expert(), make_expert(seed=1)._replace(scale=0.5), make_inputs()
    expected = F.linear(F.linear(inputs, one.down), one.up) + 0.5 * F.linear(F.linear(inputs, two.down), two.up)
    assert torch.allclose(expert_output(join_experts([one, two]), "identity", inputs), expected, atol=1e-6)


def test_parts_that_are_none_are_refused() -> None:
    weights = make_expert()
    for parts, message in ((3, "parts=3 does not divide"), (0, "parts=0 does not divide"),
                           ([torch.arange(7)], "each of the 8 hidden units once"),
                           ([torch.arange(8), torch.arange(0)], "none may be empty")):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            split_expert(weights, parts)
    other = make_expert("bottleneck")
    for parts, message in (([], "no experts to join"), ([weights, other], "differs from"),
                           ([weights, make_expert(width=11)], "differs from"),
                           ([make_expert("normed"), make_expert("normed", seed=1)], "another LayerNorm")):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            join_experts(parts)


def test_an_activation_of_the_base_alone_is_refused() -> None:
    with pytest.raises(ValueError, match="activation='gpt_oss' belongs to the base"):
        hidden_of(Weights(torch.ones(1, 2), torch.ones(2, 1)), torch.ones(1, 2), "gpt_oss")


@pytest.mark.parametrize("form", ["normed", "glu"])
def test_experts_of_other_scales_join_to_their_sum_with_their_biases(form: str) -> None:
    whole, act, inputs = make_expert(form), activation_of(form), make_inputs()
    parts = [part._replace(scale=scale) for part, scale in zip(split_expert(whole, 2), (2.0, 0.5), strict=True)]
    assert parts[0].b_up is not None
    assert bool(parts[0].b_up.any())
    expected = sum(expert_output(part, act, inputs) for part in parts)
    assert torch.allclose(expert_output(join_experts(parts), act, inputs), expected, atol=1e-5)
