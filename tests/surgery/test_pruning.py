"""Pruning: what is chosen, what stays as it was, what is saved, and that nothing stale is left."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from moe_bases import EXPERTS, batch, logits, moe
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from mixadapters import MixDAConfig, MoAConfig
from mixadapters.surgery.layers import expert_layers
from mixadapters.surgery.merging import merge_experts
from mixadapters.surgery.pruning import (
    CurvePoint,
    PruneCurve,
    after_pruning,
    choose_kept,
    prune_curve,
    prune_experts,
    scores_of,
)
from mixadapters.surgery.usage import ExpertUsage, record_usage

BATCH = batch()


def randomised(model: nn.Module) -> Any:
    """With adapters that do something, each draw by the key of its parameter: the same in models that have fewer."""
    for name, parameter in model.named_parameters():
        if "moa_" in name or "mixda_" in name:
            generator = torch.Generator().manual_seed(sum(i * ord(c) for i, c in enumerate(name)))
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)
    return model.eval()


def moa(tiny: Any, **options: Any) -> Any:
    config = MoAConfig(**{"num_experts": 4, "r": 3, "target_modules": ["down_proj"], **options})
    return randomised(get_peft_model(tiny("llama", num_hidden_layers=2), config))


def used(model: nn.Module, inputs: dict[str, Tensor], **options: Any) -> ExpertUsage:
    with torch.no_grad(), record_usage(model, **options) as usage:
        model(**inputs)
    return usage


def reloaded(tiny: Any, model: Any, folder: Any) -> Any:
    """As a process that knows the folder alone has it."""
    model.save_pretrained(folder)
    return PeftModel.from_pretrained(tiny("llama", num_hidden_layers=2), folder).eval()


ROUTERS = ("top_k", "null", "softmax", "sigmoid", "top_p", "cosine", "recurrent", "arrow", "task", "dense_to_sparse")


@pytest.mark.parametrize("preserve_mass", [False, True])
@pytest.mark.parametrize("router", [*ROUTERS, "tree", "hash", "constant"])
@torch.no_grad()
def test_a_pruned_adapter_saves_loads_and_leaves_nothing_behind(
    router: str, preserve_mass: bool, tiny: Any, tiny_inputs: Any, tmp_path: Any
) -> None:
    model, inputs = moa(tiny, router=router), tiny_inputs("llama")
    if router == "arrow":
        model.base_model.fit_router()
    if router == "task":
        inputs["expert_ids"] = torch.tensor([0, 3])
    usage = used(model, inputs)
    whole = model(**inputs).logits
    assert prune_experts(model, usage, 4, preserve_mass=preserve_mass).counts == (8, 8)
    assert torch.equal(model(**inputs).logits, whole)
    if router in ("tree", "hash", "constant") and not preserve_mass:
        with pytest.raises(ValueError, match="cannot lose"):
            prune_experts(model, usage, 2)
        assert torch.equal(model(**inputs).logits, whole)
        return
    told = prune_experts(model, usage, 2, preserve_mass=preserve_mass, dry_run=True)
    assert torch.equal(model(**inputs).logits, whole)
    done = prune_experts(model, usage, 2, preserve_mass=preserve_mass)
    assert (told.layers, told.applied, done.applied) == (done.layers, False, True)
    assert done.counts == (8, 4)
    assert "prune" in str(done)
    for layer, part in zip(expert_layers(model), done.layers, strict=True):
        assert layer.names == tuple(part.names[e] for e in part.kept)
    assert done.parameters[1] * 2 == done.parameters[0]
    if router == "task":
        inputs["expert_ids"] = torch.tensor([0, -1])
    pruned = model(**inputs).logits
    again = reloaded(tiny, model, tmp_path)
    torch.testing.assert_close(again(**inputs).logits, pruned, rtol=1e-5, atol=1e-5)
    assert [layer.names for layer in expert_layers(again)] == [layer.names for layer in expert_layers(model)]
    held = {
        (key.split(".bank.")[0], key.split(".experts.")[1].split(".")[0])
        for key in again.state_dict()
        if ".bank." in key
    }
    assert len(held) == 4


@torch.no_grad()
def test_with_their_mass_preserved_pruned_experts_are_as_if_they_gave_nothing(tiny: Any, tiny_inputs: Any) -> None:
    model, inputs = moa(tiny), tiny_inputs("llama")
    usage, silent = used(model, inputs), copy.deepcopy(model)
    done = prune_experts(model, usage, 2, preserve_mass=True)
    for layer, part in zip(expert_layers(silent), done.layers, strict=True):
        for e in range(4):
            if e not in part.kept:
                layer.set_weights(e, layer.weights(e)._replace(up=torch.zeros_like(layer.weights(e).up)))
    torch.testing.assert_close(model(**inputs).logits, silent(**inputs).logits, rtol=1e-5, atol=1e-5)
    again = used(model, inputs)
    for part in done.layers:
        before = usage[part.key].tokens[list(part.kept)]
        if part.key == done.layers[0].key:  # whose inputs are the same
            assert again[part.key].tokens.tolist() == before.tolist()


@pytest.mark.parametrize("criterion", ["saliency", "router_weighted_norm", "usage", "random"])
def test_the_largest_scores_stay(criterion: Any, tiny: Any, tiny_inputs: Any) -> None:
    model = moa(tiny)
    usage = used(model, tiny_inputs("llama", batch=4))
    done = prune_experts(model, usage, factor=2, criterion=criterion, dry_run=True)
    for part in done.layers:
        found = usage[part.key]
        hand = {
            "saliency": (found.saliency / found.tokens.clamp_min(1)).tolist(),
            "router_weighted_norm": found.saliency.tolist(),
            "usage": found.tokens.double().tolist(),
        }.get(criterion, list(part.scores))
        assert list(part.scores) == pytest.approx(hand)
        assert sorted(hand)[-2:] == sorted(hand[e] for e in part.kept)
        assert part.retained == pytest.approx(sum(hand[e] for e in part.kept) / sum(hand))


def test_a_global_budget_goes_where_the_scores_are(tiny: Any, tiny_inputs: Any) -> None:
    model = moa(tiny, num_experts_per_tok=1)
    usage = used(model, tiny_inputs("llama", batch=4))
    first, second = usage.layers.values()
    first.saliency, first.tokens = torch.tensor([9.0, 1, 1, 1]).double(), torch.ones(4, dtype=torch.long)
    second.saliency, second.tokens = torch.tensor([4.0, 4, 4, 1]).double(), torch.ones(4, dtype=torch.long)
    done = prune_experts(model, usage, 2, scope="global")
    assert [part.kept for part in done.layers] == [(0,), (0, 1, 2)]
    assert [len(layer.names) for layer in expert_layers(model)] == [1, 3]


@torch.no_grad()
def test_layers_under_one_router_lose_the_same_experts(tiny: Any, tiny_inputs: Any, tmp_path: Any) -> None:
    model, inputs = moa(tiny, router_scope="model"), tiny_inputs("llama")
    done = prune_experts(model, used(model, inputs), 2)
    first, second = expert_layers(model)
    assert first.names == second.names
    assert done.counts == (8, 4)
    assert len(first.mixture.router.experts) == 2  # type: ignore[attr-defined]
    again = reloaded(tiny, model, tmp_path)
    torch.testing.assert_close(again(**inputs).logits, model(**inputs).logits)


@torch.no_grad()
def test_a_pyramid_of_experts_is_cut_saved_and_loaded(tiny: Any, tiny_inputs: Any, tmp_path: Any) -> None:
    """Layers have other numbers of experts: each keeps its own, at its own modules."""
    model, inputs = moa(tiny, num_experts={"0": 2, "1": 4}, router_scope="model"), tiny_inputs("llama")
    prune_experts(model, used(model, inputs), 3, criterion="random")
    assert [len(layer.names) for layer in expert_layers(model)] == [2, 3]
    again = reloaded(tiny, model, tmp_path)
    torch.testing.assert_close(again(**inputs).logits, model(**inputs).logits)


def test_who_keeps_all_that_are_left_changes_nothing() -> None:
    """Of columns whose mass was preserved nobody has become anything since: rows that choose them get nothing."""
    model = moe("qwen2_moe")
    prune_experts(model, used(model, BATCH), 4, preserve_mass=True)
    before = logits(model, BATCH)
    prune_experts(model, used(model, BATCH), 4)
    torch.testing.assert_close(logits(model, BATCH), before)
    prune_experts(model, used(model, BATCH), 3)
    assert [len(layer.map.numbers) for layer in expert_layers(model)] == [EXPERTS - 1] * 2  # type: ignore[attr-defined]


def test_a_usage_of_values_that_are_none_chooses_nothing() -> None:
    model = moe("mixtral")
    with torch.no_grad():
        expert_layers(model)[0].weights(1).up[0, 0] = torch.nan
    usage = used(model, BATCH)
    for criterion in ("saliency", "usage"):
        with pytest.raises(ValueError, match=r"layers.0.mlp.experts' holds NaN or infinite values"):
            prune_experts(model, usage, 4, criterion=criterion)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="holds NaN or infinite values"):
        merge_experts(model, usage, 4)


@torch.no_grad()
def test_domains_of_mixda_can_be_pruned_layer_by_layer(tiny: Any, tiny_inputs: Any, tmp_path: Any) -> None:
    config = MixDAConfig(domains=["law", "code", "bio"], domain_layers=[0, 1])
    model = randomised(get_peft_model(tiny("llama", num_hidden_layers=2), config))
    inputs = tiny_inputs("llama")
    usage = used(model, inputs)
    first, second = usage.layers.values()
    first.saliency, second.saliency = torch.tensor([3.0, 2, 1]).double(), torch.tensor([1.0, 2, 3]).double()
    prune_experts(model, usage, 2)
    assert [layer.names for layer in expert_layers(model)] == [("law", "code"), ("code", "bio")]
    again = reloaded(tiny, model, tmp_path)
    torch.testing.assert_close(again(**inputs).logits, model(**inputs).logits)
    by_number = {**inputs, "domain_ids": model.base_model.domain_ids(["bio", "code"])}
    torch.testing.assert_close(again(**by_number).logits, model(**by_number).logits)


def test_nothing_stale_is_left_after_pruning(tiny: Any, tiny_inputs: Any) -> None:
    """Stages, a new optimizer, a mixed batch, generation, and routes that are pinned by numbers."""
    model, inputs = moa(tiny), tiny_inputs("llama", labels="tokens")
    model.add_adapter("other", MoAConfig(num_experts=4, r=3, target_modules=["down_proj"]))
    randomised(model)
    tuner = model.base_model
    tuner.set_stage("router")
    with torch.no_grad():
        model(**inputs, adapter_names=["other", "default"])
        model.generate(inputs["input_ids"], max_new_tokens=2)
    usage = used(model, tiny_inputs("llama"), adapter="default")
    with tuner.pin_routes({"ffn/*": torch.tensor([0, 3])}), pytest.raises(ValueError, match="leave pin_routes first"):
        prune_experts(model, usage, 2, adapter="default")
    prune_experts(model, usage, 2)  # of the active one
    assert {len(m.bank.names) for m in tuner.mixtures("other").values()} == {4}
    names = {n for n, p in model.named_parameters() if p.requires_grad}
    assert names
    assert all(".router." in name for name in names)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    model.train()
    model(**inputs).loss.backward()
    optimizer.step()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    model.eval()
    with torch.no_grad():
        mixed = model(**inputs, adapter_names=["other", "default"]).logits
        model.set_adapter("default")
        torch.testing.assert_close(mixed[1], model(**inputs).logits[1], rtol=1e-5, atol=1e-5)
        plain = model.generate(inputs["input_ids"], max_new_tokens=3)
        assert plain.shape[1] == inputs["input_ids"].shape[1] + 3
    with pytest.raises(ValueError, match="record anew"):
        prune_experts(model, usage, 2, adapter="default")


def test_a_base_is_pruned_inside_of_peft_and_bare_alike() -> None:
    bare = moe("mixtral")
    wrapped = get_peft_model(moe("mixtral"), MoAConfig(num_experts=2, r=2, target_modules=["q_proj"]))
    usage = used(bare, BATCH)
    assert list(used(wrapped, BATCH, adapter="").layers) == list(usage.layers)
    done = prune_experts(bare, usage, 3)
    assert prune_experts(wrapped, usage, 3, adapter="").layers == done.layers
    torch.testing.assert_close(logits(wrapped, BATCH), logits(bare, BATCH))
    assert bare.config.num_local_experts == bare.num_experts == 3
    assert bare.model.layers[0].mlp.gate.num_experts == 3


@pytest.mark.parametrize("kind", ["olmoe", "mixtral"])
def test_where_weights_compete_the_growth_is_told(kind: str) -> None:
    model = moe(kind)
    usage = used(model, BATCH)
    plain = prune_experts(model, usage, 4, dry_run=True)
    assert all((part.growth is not None) == (kind == "olmoe") for part in plain.layers)
    assert all(part.growth is None for part in prune_experts(model, usage, 4, preserve_mass=True, dry_run=True).layers)
    if kind == "olmoe":
        part = plain.layers[0]
        probs = usage[part.key].logits.double().softmax(-1)
        rows = [row for row in probs if set(row.topk(2).indices.tolist()) <= set(part.kept)]
        factors = [1 / float(row[list(part.kept)].sum()) for row in rows]
        assert part.growth == pytest.approx((sum(factors) / len(factors), max(factors)))
        assert part.growth[1] > 1


def test_a_curve_cuts_a_copy_step_by_step() -> None:
    model = moe("mixtral")
    usage, before = used(model, BATCH), logits(model, BATCH)
    curve = prune_curve(model, usage, lambda m: float((logits(m, BATCH) - before).square().mean()), keeps=[4, 2])
    assert [(point.keep, point.experts) for point in curve.points] == [(EXPERTS, 12), (4, 8), (2, 4)]
    assert curve.points[0].value == 0 < curve.points[1].value
    assert curve.threshold(curve.points[1].value).keep in (2, 4)
    assert curve.threshold(0.0).keep == EXPERTS
    assert torch.equal(logits(model, BATCH), before)
    direct = copy.deepcopy(model)
    prune_experts(direct, usage, 2)
    assert curve.points[2].value == pytest.approx(float((logits(direct, BATCH) - before).square().mean()), rel=1e-4)


def test_scores_of_nothing_choose_nothing(tiny: Any, tiny_inputs: Any) -> None:
    model = get_peft_model(tiny("llama"), MoAConfig(num_experts=4, r=3, target_modules=["down_proj"])).eval()
    usage = used(model, tiny_inputs("llama"))
    for criterion in ("saliency", "router_weighted_norm"):
        with pytest.raises(ValueError, match=r"every expert of .* scores 0"):
            prune_experts(model, usage, 2, criterion=criterion, dry_run=True)  # type: ignore[arg-type]
    done = prune_experts(model, usage, 2, criterion="usage", dry_run=True)
    assert all(len(layer.kept) == 2 for layer in done.layers)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "give one of the two"),
        ({"keep": 2, "factor": 2}, "give one of the two"),
        ({"keep": 0}, "keep=0 must be an integer, at least 1"),
        ({"keep": 9}, "no layer has more than 6"),
        ({"keep": 1}, "fewer than the 2 that a token uses"),
        ({"factor": 0.5}, "a number, 1 or more"),
        ({"keep": 2, "criterion": "salience"}, "Did you mean 'saliency'"),
        ({"keep": 2, "scope": "model"}, r"one of \['layer', 'global'\]"),
        ({"keep": 2, "usage": None}, "record_usage"),
        ({"keep": 2, "usage": ExpertUsage()}, "has nothing of"),
        ({"keep": 2, "usage": {}}, r"usage=\{\} must be an ExpertUsage, as record_usage gives it"),
    ],
)
def test_what_cannot_be_done_is_refused_before_anything_changes(options: dict[str, Any], said: str) -> None:
    model = moe("mixtral")
    usage = options.pop("usage", used(model, BATCH))
    before = logits(model, BATCH)
    with pytest.raises(ValueError, match=said):
        prune_experts(model, usage, **options)
    assert torch.equal(logits(model, BATCH), before)


# --- what stays, of scores by hand --------------------------------------------------------------------------------


def some(key: str, names: str, router: str = "", **about: int) -> Any:
    """A layer as far as choosing goes."""
    return SimpleNamespace(key=key, names=tuple(names), router=router or key, **{"groups": 1, "top_k": 1, **about})


def kept_of(layers: list[Any], scores: list[list[float]], *how: Any) -> list[list[int]]:
    given = {layer.key: torch.tensor(found).double() for layer, found in zip(layers, scores, strict=True)}
    return list(choose_kept(layers, given, *how).values())


def test_blocks_of_a_router_keep_as_many_each_rounded_up() -> None:
    assert kept_of([some("l", "abcdef", groups=2)], [[6, 5, 4, 3, 2, 1]], 3, None, "layer") == [[0, 1, 3, 4]]


def test_a_factor_keeps_the_quotient_rounded_up() -> None:
    assert kept_of([some("l", "abcde")], [[5, 4, 3, 2, 1]], None, 2, "layer") == [[0, 1, 2]]
    assert kept_of([some("l", "abcd")], [[5, 4, 3, 2]], None, 1.5, "layer") == [[0, 1, 2]]


def test_a_global_budget_is_dealt_by_shares_and_leaves_what_a_token_uses() -> None:
    scores = [[9000.0, 1000, 1000, 1000], [4, 4, 4, 1]]
    for top_k, expected in ((1, [[0], [0, 1, 2]]), (2, [[0, 1], [0, 1]])):
        layers = [some("first", "abcd", top_k=top_k), some("second", "abcd", top_k=top_k)]
        found = kept_of(layers, scores, 2, None, "global")
        assert [len(kept) for kept in found] == [len(kept) for kept in expected]
        assert found[0][0] == 0


def test_a_layer_none_of_whose_experts_stay_by_their_router_keeps_its_best() -> None:
    layers = [some("first", "ab", "r"), some("second", "cd", "r")]
    assert kept_of(layers, [[9, 1], [1, 3]], 1, None, "layer") == [[0], [1]]


def test_layers_are_drawn_for_apart_and_those_of_one_router_together() -> None:
    first, second, other = some("a", "abcd", "r"), some("b", "abcd", "r"), some("c", "abcd", "s")
    drawn = [scores_of(layer, None, "random", seed).tolist() for layer in (first, second, other) for seed in (0, 1)]
    assert drawn[0] == drawn[2]
    assert drawn[0] != drawn[4]
    assert drawn[0] != drawn[1]


def test_a_curve_ends_where_the_first_point_is_worse() -> None:
    values = [0.9, 0.88, 0.5, 0.95]
    points = tuple(CurvePoint(8 - i, 8 - i, 0, value) for i, value in enumerate(values))
    assert PruneCurve("usage", points, higher_is_better=True).threshold(0.05).keep == 7
    losses = tuple(CurvePoint(8 - i, 8 - i, 0, 1 - value) for i, value in enumerate(values))
    assert PruneCurve("usage", losses, higher_is_better=False).threshold(0.05).keep == 7


def test_what_was_recorded_of_those_who_stay_is_kept_by_label_too(tiny: Any, tiny_inputs: Any) -> None:
    model = moa(tiny)
    usage = used(model, tiny_inputs("llama", batch=4), labels=["a", "b", "a", "b"])
    result = prune_experts(model, usage, 2)
    for before, after in ((usage, after_pruning(usage, result)),
                          (usage.by_label["a"], after_pruning(usage, result).by_label["a"])):  # fmt: skip
        for part in result.layers:
            old, new, kept = before[part.key], after[part.key], list(part.kept)
            assert new.names == tuple(part.names[e] for e in kept)
            for name in ("tokens", "mass", "saliency"):
                assert torch.equal(getattr(new, name), getattr(old, name)[kept])
            assert torch.equal(new.pairs, old.pairs[kept][:, kept])
            assert torch.equal(new.logits, old.logits[:, kept])
