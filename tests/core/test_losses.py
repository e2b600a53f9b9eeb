from __future__ import annotations

from math import log

import pytest
import torch

from mixadapters.core.losses import entropy, load_balance, masked_mean, router_z

MASK = torch.tensor([True, False, True, True, False])
LOSSES = {
    "balance": load_balance,
    "z": router_z,
    "entropy": entropy,
    "mean": lambda p, m=None: masked_mean(p, m).sum(),
}


@pytest.mark.parametrize("name", LOSSES)
def test_padding_is_left_out_of_value_and_gradient(name) -> None:
    probs = torch.rand(5, 3).softmax(-1).requires_grad_()
    masked = LOSSES[name](probs, MASK)
    torch.testing.assert_close(masked, LOSSES[name](probs[MASK]))
    masked.backward()
    assert (probs.grad[~MASK] == 0).all()
    assert probs.grad[MASK].abs().max() > 0
    torch.testing.assert_close(LOSSES[name](probs, torch.ones(5, dtype=torch.bool)), LOSSES[name](probs))


@pytest.mark.parametrize("name", LOSSES)
def test_rows_of_padding_alone_are_finite(name) -> None:
    probs = torch.rand(5, 3).softmax(-1).requires_grad_()
    loss = LOSSES[name](probs, torch.zeros(5, dtype=torch.bool))
    assert loss == 0
    loss.backward()
    assert (probs.grad == 0).all()


def test_balance_is_one_when_balanced_and_the_number_of_arms_when_not() -> None:
    assert load_balance(torch.eye(4).repeat(3, 1)) == pytest.approx(1)
    assert load_balance(torch.eye(4)[:1].repeat(7, 1)) == pytest.approx(4)
    generator = torch.Generator().manual_seed(0)
    probs = torch.rand(50, 4, generator=generator).softmax(-1)
    by_hand = 4 * sum((probs.argmax(-1) == a).float().mean() * probs[:, a].mean() for a in range(4))
    torch.testing.assert_close(load_balance(probs), by_hand)


def test_balance_pushes_the_crowded_arm_down() -> None:
    probs = torch.tensor([[0.6, 0.4], [0.7, 0.3]], requires_grad=True)
    load_balance(probs).backward()
    assert (probs.grad[:, 0] > probs.grad[:, 1]).all()


def test_z_is_the_squared_log_of_the_sum() -> None:
    logits = torch.tensor([[0.0, 0.0], [1.0, 2.0]])
    expected = (log(2) ** 2 + torch.tensor([1.0, 2.0]).exp().sum().log().item() ** 2) / 2
    assert float(router_z(logits)) == pytest.approx(expected, rel=1e-5)


def test_entropy_is_in_nats_and_finite_at_certainty() -> None:
    assert float(entropy(torch.full((3, 4), 0.25))) == pytest.approx(log(4))
    certain = torch.eye(3).requires_grad_()
    assert float(entropy(certain).detach()) == pytest.approx(0, abs=1e-6)
    entropy(certain).backward()
    assert certain.grad.isfinite().all()
