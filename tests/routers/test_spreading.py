"""What keeps a gate from collapsing: a least weight, and experts that are absent at times."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import Tensor

from mixadapters import MixDAConfig
from mixadapters.routers import SoftmaxGate, build_router


def weights_of(kind: str, logits: list[float], **options: Any) -> Tensor:
    router = build_router({"kind": kind, **options}, 4, ["a", "b"])
    row = torch.tensor([[*logits, *[0.0] * (len(router.arms) - len(logits))]])
    return router.weigh(row)[0]


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_no_weight_is_below_the_floor_and_the_sum_stays(kind: str) -> None:
    plain, floored = weights_of(kind, [30.0, -30.0]), weights_of(kind, [30.0, -30.0], min_weight=0.1)
    assert plain[1] < 1e-9
    assert floored.min() == pytest.approx(0.1)
    if kind == "softmax":
        assert floored.tolist() == pytest.approx([0.8, 0.1, 0.1])
    assert (weights_of(kind, [2.0, 1.0], min_weight=0.1).argsort() == weights_of(kind, [2.0, 1.0]).argsort()).all()


def test_null_arms_have_no_floor_and_a_floor_leaves_something_to_decide() -> None:
    router = build_router({"kind": "softmax", "min_weight": 0.2, "null_arms": 1}, 4, ["a", "b"])
    weights = router.weigh(torch.tensor([[0.0, -30.0, -30.0, -30.0]]))[0]
    assert weights.tolist() == pytest.approx([0.6, 0.2, 0.0, 0.2], abs=1e-6)
    router.add_expert("c", 0.1)
    with pytest.raises(
        ValueError, match=r"min_weight=0\.2 for each of 5 arms leaves nothing to decide; it must be below"
    ):
        router.add_expert("d", 0.1)
    assert router.experts == ["a", "b", "c"]
    with pytest.raises(ValueError, match=r"min_weight=0\.5 for each of 3 arms"):
        MixDAConfig(domains=["a", "b"], router={"kind": "softmax", "min_weight": 0.5})
    with pytest.raises(ValueError, match=r"expert_dropout=1\.5 must be a finite number, at least 0, less than 1"):
        MixDAConfig(domains=["a", "b"], router={"kind": "softmax", "expert_dropout": 1.5})


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
@pytest.mark.parametrize("least", [0.0, 0.05])
def test_an_expert_is_absent_from_whole_sequences_in_training_only(kind: str, least: float, tiny, tiny_inputs) -> None:
    router = {"kind": kind, "expert_dropout": 0.5, "min_weight": least}
    model = get_peft_model(tiny("llama"), MixDAConfig(domains=["a", "b"], router=router, domain_layers=[1]))
    inputs = tiny_inputs("llama", batch=32)
    seen: list[Tensor] = []

    def note(key: Any, routing: Any, mask: Any) -> None:
        if key.step == "domain":
            seen.append(routing.weights)

    model.base_model.context.observers.append(note)
    torch.manual_seed(0)
    model.train()(**inputs)
    weights = seen[-1].view(32, -1, 2)
    absent = weights == 0
    assert bool((absent.all(1) == absent.any(1)).all())  # of a sequence all tokens, or none
    assert 0.3 < absent[:, 0].float().mean() < 0.7
    both = absent[:, 0].all(1)
    assert both.any()
    if kind == "softmax":  # what an absent one would get, the others share: its equal and the frozen layer
        one = absent[:, 0, 0] & ~absent[:, 0, 1]
        torch.testing.assert_close(weights[one][..., 1], torch.full_like(weights[one][..., 1], 0.5))
    with torch.no_grad():
        model.eval()(**inputs)
    assert bool((seen[-1] > 0).all())


def test_where_there_is_no_other_arm_all_stay(forward) -> None:
    class Bare(SoftmaxGate):
        frozen_arm = False

    tokens = torch.randn(50, 1, 4)
    router = Bare(4, ["a", "b"], expert_dropout=0.9).train()
    weights = router(tokens, forward(tokens, training=True)).weights
    torch.testing.assert_close(weights.sum(1), torch.ones(50))
