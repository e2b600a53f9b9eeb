"""A pre-gate that has learned from the routers of a mixture: its plan, and what a prefetch by the plan is worth."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import nn

from mixadapters import BottleneckConfig, MixDAConfig, MoAConfig
from mixadapters.routers import PregateRouter
from mixadapters.serving import (
    ExpertCache,
    distill_layer_pregates,
    distill_pregate,
    pregate_agreement,
    token_experts,
)

EXPERTS = 8


def batches(count: int, seed: int) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    mask = torch.tensor([[0] * 2 + [1] * 10] + [[1] * 12] * 3)
    return [
        {"input_ids": torch.randint(5, 90, (4, 12), generator=generator), "attention_mask": mask} for _ in range(count)
    ]


@pytest.fixture(scope="module")
def mixture(tiny: Any) -> Any:
    """Two layers, each with a router of its own that reads hidden states and tells tokens apart."""
    torch.manual_seed(0)
    config = MoAConfig(num_experts=EXPERTS, num_experts_per_tok=2, r=2, target_modules=["up_proj"])
    model = get_peft_model(tiny("llama", num_hidden_layers=2), config).eval()
    for layer in model.base_model.mixtures().values():
        nn.init.normal_(layer.router.output.weight, std=3.0)
    return model


@pytest.fixture(scope="module")
def gates(mixture: Any) -> tuple[PregateRouter, PregateRouter]:
    """The same pre-gate before and after it has learned."""
    torch.manual_seed(1)
    untrained = distill_pregate(mixture, batches(1, 0), lr=1e-12)
    torch.manual_seed(1)
    return untrained, distill_pregate(mixture, batches(60, 1))


def test_it_agrees_with_the_routers_better_than_untrained(mixture: Any, gates: Any) -> None:
    before, after = (pregate_agreement(gate, mixture, batches(3, 2)) for gate in gates)
    assert list(after.first) == list(after.covered) == list(mixture.base_model.mixtures())
    assert before.mean_first < 0.3
    assert before.mean_covered < 0.45
    assert after.mean_first > before.mean_first + 0.1
    assert all(after.covered[key] > before.covered[key] + 0.08 for key in after.covered)


def test_prefetches_by_its_plan_hit_as_its_agreement_says(mixture: Any, gates: Any) -> None:
    held_out = batches(2, 2)
    rates = []
    for gate in gates:
        cache: ExpertCache[Any, Any] = ExpertCache(2, str)  # of one token: what is prefetched is all that is there
        for batch in held_out:
            plans = token_experts(gate.plan(**batch), 4, batch["attention_mask"])
            needed = true_experts(mixture, batch)
            for key, rows in needed.items():
                for plan, need in zip([step for row in plans for step in row], rows, strict=True):
                    cache.prefetch({(key, expert) for expert in plan})
                    cache.take({(key, expert) for expert in need})
        rates.append(cache.hit_rate)
    covered = [pregate_agreement(gate, mixture, held_out).mean_covered for gate in gates]
    assert rates[1] > rates[0] + 0.1
    assert rates == pytest.approx(covered)


def true_experts(model: Any, batch: dict[str, torch.Tensor]) -> dict[Any, list[set[int]]]:
    """What the routers choose for the real tokens, by router."""
    found: dict[Any, list[set[int]]] = {}
    real = batch["attention_mask"].flatten().bool()

    def see(key: Any, routing: Any, mask: Any) -> None:
        found[key] = [set(row) for row in routing.indices[real].tolist()]

    model.base_model.context.observers.append(see)
    with torch.no_grad():
        model(**batch)
    model.base_model.context.observers.remove(see)
    return found


def test_a_perfect_copy_agrees_whole_and_padding_does_not_count(mixture: Any, gates: Any) -> None:
    """Routers that read tokens alone are the pre-gate itself: by token and layer, whatever the padding holds."""
    gate = gates[1]
    batch = batches(1, 3)[0]
    with mixture.base_model.pin_routes({"ffn/*": gate.plan(**batch)}):
        agreement = pregate_agreement(gate, mixture, [batch])
        other = {**batch, "input_ids": batch["input_ids"].where(batch["attention_mask"] == 1, 7)}
        again = pregate_agreement(gate, mixture, [other])
    assert set(agreement.first.values()) == set(agreement.covered.values()) == {1.0}
    assert again == agreement
    (told,) = agreement.between.values()
    assert told == pytest.approx(entropy(gate, batch))  # of the same choice the other tells all


def entropy(gate: PregateRouter, batch: dict[str, torch.Tensor]) -> float:
    first = gate.plan(**batch).probs.argmax(1)[batch["attention_mask"].flatten().bool()]
    share = first.bincount() / len(first)
    return float(-(share[share > 0] * share[share > 0].log()).sum())


@pytest.fixture(scope="module")
def heads(mixture: Any) -> Any:
    torch.manual_seed(1)
    return distill_layer_pregates(mixture, batches(60, 1))


def test_heads_of_layers_agree_better_than_one_gate_for_all(mixture: Any, gates: Any, heads: Any) -> None:
    """The layers of this mixture choose differently: one gate learns their mean."""
    one, many = (pregate_agreement(gate, mixture, batches(6, 2)) for gate in (gates[1], heads))
    assert list(many.first) == list(mixture.base_model.mixtures())
    assert all(many.first[key] > one.first[key] + 0.03 for key in many.first)
    assert many.mean_covered > one.mean_covered + 0.04


def test_heads_stand_on_one_trunk_and_are_trained_apart(mixture: Any, heads: Any) -> None:
    first, second = heads.values()
    assert first.embedding is second.embedding
    assert first.hidden is second.hidden
    assert not torch.equal(first.output.weight, second.output.weight)
    assert not any(router.training for router in heads.values())
    batch = batches(1, 3)[0]
    with mixture.base_model.pin_routes({key: router.plan(**batch) for key, router in heads.items()}):
        assert pregate_agreement(heads, mixture, [batch]).mean_first == 1.0
        crossed = dict(zip(heads, reversed(heads.values()), strict=True))
        assert pregate_agreement(crossed, mixture, [batch]).mean_first < 0.9


def test_heads_take_layers_of_other_experts(tiny: Any) -> None:
    config = MixDAConfig(
        domains={"law": {"ranks": {"layers.0.mlp.down_proj": 2}}, "news": {"ranks": {"down_proj": 2}}},
        gate_granularity="token",
    )
    model = get_peft_model(tiny("llama", num_hidden_layers=2), config)
    found = distill_layer_pregates(model, batches(1, 0), {"width": 4})
    assert [router.experts for router in found.values()] == [["law", "news"], ["news"]]
    assert pregate_agreement(found, model, batches(1, 0)).first.keys() == found.keys()
    with pytest.raises(ValueError, match="are not the mixture's"):
        pregate_agreement(dict([*found.items()][:1]), model, batches(1, 0))


def test_the_model_is_as_it_was(mixture: Any) -> None:
    mixture.train()
    before = {name: tensor.clone() for name, tensor in mixture.state_dict().items()}
    gate = distill_pregate(mixture, batches(1, 0), {"width": 4, "hidden": (), "k": 1, "granularity": "causal_prefix"})
    assert mixture.training
    assert not gate.training
    assert (gate.k, gate.granularity, tuple(gate.embedding.weight.shape)) == (1, "causal_prefix", (96, 4))
    assert all(torch.equal(tensor, before[name]) for name, tensor in mixture.state_dict().items())
    assert all(parameter.grad is None for parameter in mixture.parameters())
    mixture.eval()


def test_what_cannot_be_taught_is_said_before_anything_runs(tiny: Any, mixture: Any, gates: Any) -> None:
    with pytest.raises(ValueError, match="adapter='law' is no mixture"):
        distill_pregate(mixture, batches(1, 0), adapter="law")
    plain = get_peft_model(tiny("llama", num_hidden_layers=1), BottleneckConfig(r=2))
    with pytest.raises(ValueError, match="adapter='default' is no mixture"):
        distill_pregate(plain, batches(1, 0))
    with pytest.raises(ValueError, match="batches is empty"):
        distill_pregate(mixture, [])
    with pytest.raises(ValueError, match="batches is empty"):
        pregate_agreement(gates[0], mixture, [])
    with pytest.raises(ValueError, match="no input_ids"):
        distill_pregate(mixture, [{"inputs_embeds": torch.zeros(1, 2, 32)}])
    with pytest.raises(ValueError, match="lr=0 must be a number above 0"):
        distill_pregate(mixture, batches(1, 0), lr=0)
    for teach in (distill_pregate, distill_layer_pregates):
        with pytest.raises(ValueError, match=r"its arms .* must be the mixture's experts"):
            teach(mixture, batches(1, 0), {"null_arms": 1})
    two = get_peft_model(
        tiny("llama", num_hidden_layers=2),
        MixDAConfig(domains={"law": {"ranks": {"layers.0.mlp.down_proj": 2}}, "news": {"ranks": {"down_proj": 2}}}),
    )
    with pytest.raises(ValueError, match="one pre-gate is for all layers"):
        distill_pregate(two, batches(1, 0))
