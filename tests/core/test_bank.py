from __future__ import annotations

import copy
from functools import partial

import banks
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mixadapters.core.bank import AdapterBank, pack
from mixadapters.core.routing import Routing
from mixadapters.kernels import ACTIVATIONS

WIDTH_IN, WIDTH_OUT = 6, 5
bank_of = partial(banks.bank_of, width_in=WIDTH_IN, width_out=WIDTH_OUT)
FORMS = {
    "plain": {},
    "gated": {"glu": True, "activation": "silu"},
    "without bias": {"bias": False, "activation": "relu"},
    "own norm": {"layer_norm": True},
    "own norm, gated, without bias": {"layer_norm": True, "glu": True, "bias": False},
    "scaled": {"scale": 0.5},
    "learnable scale": {"scale": None, "activation": "tanh"},
    "linear": {"activation": "identity", "layer_norm": True},
}


def alone(bank: AdapterBank, name: str, x: Tensor) -> Tensor:
    """One expert, by the modules that hold its weights."""
    expert, act = bank.experts[name], ACTIVATIONS[bank.activation]
    x = x if expert.norm is None else expert.norm(x)
    h = act(expert.down(x)) if expert.gate is None else act(expert.gate(x)) * expert.down(x)
    return expert.up(h) * (bank.scale if expert.scale is None else expert.scale.weight)


@pytest.mark.parametrize("form", FORMS)
def test_bank_is_the_weighted_sum_of_its_experts(form) -> None:
    bank = bank_of(3, 1, 4, **FORMS[form])
    x, base, base_weight = torch.randn(7, WIDTH_IN), torch.randn(7, WIDTH_OUT), torch.rand(7)
    experts = torch.stack([alone(bank, name, x) for name in bank.names], dim=1)  # (N, E, M)
    weights = torch.rand(7, 3, requires_grad=True)
    torch.testing.assert_close(bank(x, Routing(weights=weights), None), (experts * weights.unsqueeze(-1)).sum(1))
    torch.testing.assert_close(
        bank(x, Routing(), None, base, base_weight), base_weight.unsqueeze(1) * base + experts.sum(1)
    )
    indices = torch.tensor([[0, 2], [1, -1], [-1, -1], [2, 2], [1, 0], [0, -1], [2, 1]])
    picked = torch.zeros(7, WIDTH_OUT)
    for n, row in enumerate(indices.tolist()):
        for slot, e in enumerate(row):
            if e >= 0:
                picked[n] += weights[n, slot] * experts[n, e]
    torch.testing.assert_close(bank(x, Routing(indices, weights[:, :2]), None), picked)
    assert torch.equal(bank(x, Routing(indices, weights[:, :2]), None, base)[2], base[2])


@pytest.mark.parametrize("form", FORMS)
def test_every_parameter_gets_the_gradient_of_its_expert(form) -> None:
    bank = bank_of(3, 2, **FORMS[form])
    twin = copy.deepcopy(bank)
    x, weights = torch.randn(4, WIDTH_IN), torch.rand(4, 2)
    bank(x, Routing(weights=weights), None).square().sum().backward()
    out = sum(alone(twin, name, x) * weights[:, [i]] for i, name in enumerate(twin.names))
    out.square().sum().backward()
    for (name, one), other in zip(bank.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, msg=lambda m, n=name: f"{n}: {m}", atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("form", FORMS)
def test_banks_of_one_kind_run_as_one(form) -> None:
    """Experts are numbered through; scales may differ, learnable or not."""
    first, second = bank_of(3, **FORMS[form]), bank_of(2, 5, seed=1, **FORMS[form])
    if form in ("scaled", "learnable scale"):
        second.scale = 3.0
        for expert in second.experts.values():
            expert.scale = None
    x, base = torch.randn(4, WIDTH_IN), torch.randn(4, WIDTH_OUT)
    routing, packed = Routing(torch.tensor([[0], [1], [2], [-1]])), pack([first, second], None)
    out = packed(x, routing, base)
    experts = [(first, "expert0"), (second, "expert0"), (second, "expert1")]
    expected = [base[n] + alone(bank, name, x[n]) for n, (bank, name) in enumerate(experts)]
    torch.testing.assert_close(out, torch.stack([*expected, base[3]]))


@pytest.mark.parametrize("form", FORMS)
def test_new_experts_are_zero_unless_told_otherwise(form) -> None:
    bank = AdapterBank(WIDTH_IN, WIDTH_OUT, **FORMS[form])
    x, base = torch.randn(3, WIDTH_IN), torch.randn(3, WIDTH_OUT)
    bank.add("zero", 4)
    assert torch.equal(bank(x, Routing(), None, base), base)
    bank.add("random", 4, init_weights=False)
    assert (bank(x, Routing(), None, base) - base).abs().max() > 1e-3
    if bank.bias:
        down = bank.experts["zero"].down.bias
        assert (down == 0).all()


def test_experts_come_and_go_by_name() -> None:
    bank = AdapterBank(WIDTH_IN, WIDTH_OUT)
    for name, rank in (("a", 2), ("b", 3), ("c", 4)):
        bank.add(name, rank, init_weights=False)
    x = torch.randn(2, WIDTH_IN)
    expected = alone(bank, "a", x) + alone(bank, "c", x)
    bank.remove("b")
    assert bank.names == ["a", "c"]
    torch.testing.assert_close(bank(x, Routing(), None), expected)
    with pytest.raises(ValueError, match=r"'a' exists already; have \['a', 'c'\]"):
        bank.add("a", 2)
    with pytest.raises(ValueError, match=r"`r` should be a positive integer value but the value passed is 0"):
        bank.add("d", 0)
    assert "d" not in bank.experts


def test_keys_are_those_of_the_file_format() -> None:
    bank = AdapterBank(WIDTH_IN, WIDTH_OUT, glu=True, layer_norm=True, scale=None)
    bank.add("biomed", 2)
    parts = {"down.weight", "down.bias", "up.weight", "up.bias", "gate.weight", "gate.bias"}
    parts |= {"norm.weight", "norm.bias", "scale.weight"}
    assert set(bank.state_dict()) == {f"experts.biomed.{part}" for part in parts}
    assert bank.state_dict()["experts.biomed.down.weight"].shape == (2, WIDTH_IN)
    assert bank.state_dict()["experts.biomed.up.weight"].shape == (WIDTH_OUT, 2)


def test_kind_tells_apart_what_cannot_run_in_one_call() -> None:
    kinds = [bank_of(2, **form).kind for form in FORMS.values()]
    assert bank_of(2, 7, scale=3.0).kind == bank_of(5).kind == kinds[0]
    assert len(set(kinds)) == len(FORMS) - 1  # "scaled" is "plain"


def test_norm_without_statistics_of_its_own_is_folded_exactly() -> None:
    bank = bank_of(3, layer_norm=True, bias=False)
    x = torch.randn(4, WIDTH_IN)
    expert = bank.experts["expert0"]
    by_hand = expert.up(F.gelu(expert.down(nn.LayerNorm(WIDTH_IN)(x) * expert.norm.weight + expert.norm.bias)))
    torch.testing.assert_close(bank(x, Routing(), None), by_hand)


@pytest.mark.parametrize("form", ["plain", "own norm", "own norm, gated, without bias"])
def test_dropout_is_on_what_every_kind_of_expert_reads(form) -> None:
    bank = bank_of(3, 2, **FORMS[form])
    x = torch.randn(4, WIDTH_IN)
    torch.manual_seed(0)
    one, other = (bank(x, Routing(), None, dropout=0.5) for _ in range(2))
    assert not torch.equal(one, other)
    assert torch.equal(bank(x, Routing(), None), bank(x, Routing(), None))
    if bank.layer_norm:  # as if the rows had been dropped before
        torch.manual_seed(0)
        torch.testing.assert_close(one, bank(F.dropout(x, 0.5), Routing(), None))
