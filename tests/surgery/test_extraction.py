"""Experts in a dense FFN: all of them are the FFN, and a router finds those that a token needs."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import save_file

from mixadapters import BottleneckConfig
from mixadapters.surgery.extraction import (
    ExtractedFFN,
    Extraction,
    balanced_groups,
    cluster,
    dense_ffns,
    extract_experts,
    plan_ffn,
    using_experts,
)


@pytest.fixture
def batches(tiny_inputs):
    return [tiny_inputs("llama", batch=4, length=16, seed=seed, padding="right") for seed in range(3)]


@pytest.mark.parametrize("kind", ["llama", "gemma3"])
@pytest.mark.parametrize("shared", [0.0, 0.25])
@torch.no_grad()
def test_all_experts_together_are_the_dense_model(tiny, batches, kind: str, shared: float) -> None:
    model = tiny(kind, num_hidden_layers=2)
    before = model(**batches[0]).logits
    found = extract_experts(model, 4, batches, shared=shared)
    assert not any(module.training for module in model.modules())
    assert torch.allclose(model(**batches[0]).logits, before, atol=2e-5)
    for plan in found.plans.values():
        sizes = [len(group) for group in plan.groups]
        assert len(plan.shared) == 48 * shared
        assert max(sizes) - min(sizes) <= 1
        assert torch.cat([*plan.groups, plan.shared]).sort().values.tolist() == list(range(48))
    with using_experts(model, 2):
        assert not torch.allclose(model(**batches[0]).logits, before, atol=1e-3)
    assert torch.allclose(model(**batches[0]).logits, before, atol=2e-5)


def planted(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens of three domains, each of which activates eight units of its own and four that all activate."""
    torch.manual_seed(seed)
    domain = torch.arange(300) % 3
    inputs = 3 * torch.nn.functional.one_hot(domain, 3).float()
    inputs = torch.cat([inputs, torch.randn(300, 5)], 1)
    active = 0.1 * torch.rand(300, 28)
    for i in range(3):
        active[domain == i, 8 * i : 8 * i + 8] += 1
    active[:, 24:] += 1
    return inputs, active, domain


def test_planted_groups_are_found_and_the_router_chooses_them() -> None:
    inputs, active, domain = planted()
    plan = plan_ffn(inputs, active, torch.ones(6, 28), domain, 3, shared=4 / 28)
    assert plan.shared.tolist() == [24, 25, 26, 27]
    assert [group.tolist() for group in plan.groups] == [list(range(8 * i, 8 * i + 8)) for i in range(3)]
    scores = inputs @ plan.router[:, :-1].t() + plan.router[:, -1]
    assert torch.equal(scores.argmax(1), domain)


def test_tokens_are_clustered_by_the_units_that_they_activate() -> None:
    _, active, domain = planted()
    found = cluster(active * (1 + torch.arange(300).view(-1, 1)), 3)  # by pattern, not by size
    assert len(set(zip(found.tolist(), domain.tolist(), strict=True))) == 3
    assert torch.equal(found, cluster(active * (1 + torch.arange(300).view(-1, 1)), 3))


def test_a_unit_that_adds_much_counts_more_than_one_that_is_merely_active() -> None:
    inputs, active, domain = planted()
    down = torch.ones(6, 28)
    down[:, 24] = 0  # active everywhere, and adds nothing
    assert plan_ffn(inputs, active, torch.ones(6, 28), domain, 3, shared=4 / 28).shared.tolist() == [24, 25, 26, 27]
    plan = plan_ffn(inputs, active, down, domain, 3, shared=4 / 28)
    assert 24 not in plan.shared
    assert torch.isfinite(plan.router).all()


def test_groups_are_balanced_where_all_prefer_one() -> None:
    groups = balanced_groups(torch.tensor([[0.9, 0.8, 0.7, 0.6, 0.5], [0.1] * 5]), torch.tensor([10, 11, 12, 13, 14]))
    assert [group.tolist() for group in groups] == [[10, 11, 12], [13, 14]]


@torch.no_grad()
def test_the_best_experts_of_a_token_err_less_than_the_worst(tiny, batches) -> None:
    model = tiny("llama", num_hidden_layers=2)
    dense = copy.deepcopy(model)
    extract_experts(model, 4, batches, top_k=2)
    x = torch.randn(50, 32)
    for path, (ffn, _) in dense_ffns(dense).items():
        extracted = model.get_submodule(path)
        expected = ffn(x)
        errors = []
        for sign in (1, -1):
            extracted.router.weight.mul_(sign)
            extracted.router.bias.mul_(sign)
            errors.append(float((extracted(x) - expected).norm()))
        assert errors[0] < errors[1]


def test_the_router_learns_though_its_weights_are_1(tiny, batches) -> None:
    model = tiny("llama", num_hidden_layers=2)
    extract_experts(model, 4, batches, top_k=2)
    model(**batches[0], labels=batches[0]["input_ids"]).loss.backward()
    for module in model.modules():
        if isinstance(module, ExtractedFFN):
            assert module.router.weight.grad.abs().sum() > 0
            assert all(p.grad is not None for p in module.bank.parameters())


@torch.no_grad()
def test_domains_give_each_expert_its_own_and_a_file_makes_it_again(tiny, batches, tmp_path) -> None:
    model, fresh = tiny("llama", num_hidden_layers=2), tiny("llama", num_hidden_layers=2)
    found = extract_experts(model, 3, {"a": batches[:1], "b": batches[1:2], "c": batches[2:]}, top_k=1)
    found.save(tmp_path / "experts.safetensors")
    Extraction.load(tmp_path / "experts.safetensors").apply(fresh, top_k=1)
    assert torch.equal(fresh(**batches[0]).logits, model(**batches[0]).logits)


def test_padding_is_no_token(tiny, batches) -> None:
    one, two = tiny("llama", num_hidden_layers=2), tiny("llama", num_hidden_layers=2)
    changed = [{**b, "input_ids": b["input_ids"].masked_fill(b["attention_mask"] == 0, 9)} for b in batches]
    plans = [extract_experts(model, 4, given).plans for model, given in ((one, batches), (two, changed))]
    for path in plans[0]:
        assert all(torch.equal(a, b) for a, b in zip(plans[0][path].groups, plans[1][path].groups, strict=True))


def overflowing(tiny):
    model = tiny("llama", num_hidden_layers=2)
    model.model.layers[0].mlp.up_proj.weight.data.fill_(torch.inf)
    return model


def test_what_cannot_be_extracted_is_refused_and_nothing_changes(tiny, batches, tmp_path) -> None:
    model = tiny("llama", num_hidden_layers=2)
    adapted = get_peft_model(tiny("llama"), BottleneckConfig())
    other = extract_experts(tiny("llama", intermediate_size=64, num_hidden_layers=2), 4, batches)
    save_file({"x": torch.zeros(2)}, tmp_path / "other.safetensors")
    padding = {**batches[0], "attention_mask": torch.zeros_like(batches[0]["attention_mask"])}
    for call, message in (
        (lambda: extract_experts(model, 1, batches), "n=1 must be"),
        (lambda: extract_experts(model, 4, batches, shared=1.0), "shared=1.0 must be"),
        (lambda: extract_experts(model, 4, batches, top_k=5), "top_k=5 must be"),
        (lambda: extract_experts(model, 4, batches, samples=3), "samples=3 must be"),
        (lambda: extract_experts(model, 4, {"a": batches}), "n=4 experts of 1 domains"),
        (lambda: extract_experts(model, 4, []), "calibration holds no batch"),
        (lambda: extract_experts(model, 4, [padding]), "no token of calibration"),
        (lambda: extract_experts(model, 4, [5]), "batch 0 of calibration=5 must be a dict"),
        (lambda: extract_experts(model, 4, batches, shared=0.99), "leave no unit for some experts of the 48 at"),
        (lambda: extract_experts(overflowing(tiny), 4, batches), "values of calibration that are NaN or infinite"),
        (lambda: extract_experts(tiny("bert"), 4, batches), "has no FFN of gate_proj"),
        (lambda: extract_experts(adapted, 4, batches), "with adapters are not known"),
        (lambda: other.apply(model), "is not for an FFN of 32 x 48"),
        (lambda: Extraction({"x": next(iter(other.plans.values()))}).apply(model), "has no FFN at 'x'"),
        (lambda: Extraction.load(tmp_path / "other.safetensors"), "holds no extraction"),
        (lambda: using_experts(model, 2).__enter__(), "has no extracted experts"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    assert not any(isinstance(module, ExtractedFFN) for module in model.modules())
