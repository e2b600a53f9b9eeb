"""Merging: doubles are found, aligned and merged exactly; LoRA as products; the router stays."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from moe_bases import batch, logits, moe
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F

from mixadapters import MixDAConfig, MoAConfig
from mixadapters.core.bank import Weights
from mixadapters.surgery import expert_layers, prune_experts, record_usage
from mixadapters.surgery.averaging import aligned, merge_lora, merge_neurons
from mixadapters.surgery.grouping import grouped, spectral_clusters
from mixadapters.surgery.merging import merge_experts
from mixadapters.surgery.overspecification import overspecification_report, same_cells
from mixadapters.surgery.usage import ExpertUsage
from mixadapters.surgery.view import expert_output

BATCH = batch()
CONFIGS: dict[str, dict[str, Any]] = {
    "lora": {"target_modules": ["down_proj"]},
    "bottleneck": {"expert_type": "bottleneck"},
    "glu": {"expert_type": "glu"},
}


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def moa(tiny: Any, kind: str = "lora", **options: Any) -> Any:
    config = MoAConfig(**{"num_experts": 4, "r": 3, **CONFIGS[kind], **options})
    model = get_peft_model(tiny("llama", num_hidden_layers=2), config)
    for seed, (name, parameter) in enumerate(model.named_parameters()):
        if "moa_" in name:
            parameter.data.copy_(drawn(*parameter.shape, seed=seed) * 0.5)
    return model.eval()


def used(model: nn.Module, inputs: dict[str, Tensor], **options: Any) -> ExpertUsage:
    with torch.no_grad(), record_usage(model, **options) as usage:
        model(**inputs)
    return usage


def double(layer: Any, e: int, other: int) -> None:
    """Make an expert the same function as another, written differently: other neurons, or other factors."""
    weights = layer.weights(other)
    rank = weights.down.shape[0]
    if layer.activation == "identity":
        mix = torch.eye(rank) * 2 + drawn(rank, rank, seed=7) * 0.3
        down = mix @ weights.down
        layer.set_weights(e, weights._replace(down=down, up=weights.up @ torch.linalg.inv(mix)))
        return
    order = torch.randperm(rank, generator=torch.Generator().manual_seed(5))
    moved = {
        n: getattr(weights, n)[order] for n in ("down", "b_down", "gate", "b_gate") if getattr(weights, n) is not None
    }
    layer.set_weights(e, weights._replace(up=weights.up[:, order], **moved))


def like_router_rows(layer: Any, e: int, other: int) -> None:
    router = layer.mixture.router
    router.output.weight.data[e] = router.output.weight[other] * 0.9
    router.output.bias.data[e] = router.output.bias[other]


@pytest.mark.parametrize("kind", sorted(CONFIGS))
@torch.no_grad()
def test_doubles_that_are_written_differently_are_found_and_merged_exactly(
    kind: str, tiny: Any, tiny_inputs: Any, tmp_path: Any
) -> None:
    model, inputs = moa(tiny, kind), tiny_inputs("llama", batch=4)
    for layer in expert_layers(model):
        double(layer, 3, 0)
        like_router_rows(layer, 3, 0)
    before, usage = model(**inputs).logits, used(model, inputs)
    for found in usage.layers.values():
        found.tokens = torch.tensor([5, 4, 3, 1])
    whole = copy.deepcopy(model)
    told = merge_experts(model, usage, 3, similarity="output", dry_run=True)
    assert torch.equal(model(**inputs).logits, before)
    done = merge_experts(model, usage, 3, similarity="output")
    assert told.layers == done.layers
    assert done.counts == (8, 6)
    assert [part.expert_map for part in done.layers] == [(0, 1, 2, 0)] * 2
    assert max(part.error for part in done.layers) < 1e-9
    torch.testing.assert_close(model(**inputs).logits, before, rtol=1e-4, atol=1e-5)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny("llama", num_hidden_layers=2), tmp_path).eval()
    torch.testing.assert_close(again(**inputs).logits, model(**inputs).logits, rtol=1e-5, atol=1e-6)
    assert [len(layer.names) for layer in expert_layers(again)] == [3, 3]
    first = done.layers[0].key  # a group takes what its members took
    mass, told_mass = used(again, inputs)[first].mass, used(whole, inputs)[first].mass
    torch.testing.assert_close(mass, torch.stack([told_mass[0] + told_mass[3], told_mass[1], told_mass[2]]))


@torch.no_grad()
def test_a_router_made_of_weights_stays_as_it_is_where_experts_are_merged_or_leave(
    tiny: Any, tiny_inputs: Any
) -> None:
    model, inputs = moa(tiny, router="arrow"), tiny_inputs("llama")
    model.base_model.fit_router()

    def directions() -> list[Tensor]:
        return [layer.mixture.router.output.weight.clone() for layer in expert_layers(model)]  # type: ignore[attr-defined]

    before = directions()
    groups = {layer.key: [["expert0", "expert3"]] for layer in expert_layers(model)}
    merge_experts(model, used(model, inputs), groups)
    assert all(map(torch.equal, directions(), before))
    merged = model(**inputs).logits
    prune_experts(model, used(model, inputs), 3, preserve_mass=True)  # nobody leaves
    assert torch.equal(model(**inputs).logits, merged)
    model.base_model.add_expert("later")
    rows = [layer.mixture.router.output.weight for layer in expert_layers(model)]  # type: ignore[attr-defined]
    gone = [layer.mixture.stands for layer in expert_layers(model)]  # type: ignore[attr-defined]
    assert all(len(stands) == 1 for stands in gone)
    for row, old, stands in zip(rows, before, gone, strict=True):
        place = int(next(iter(stands)).removeprefix("expert"))
        assert torch.equal(row[place], old[place])


def test_lora_is_merged_as_a_product_and_a_mean_of_factors_is_something_else() -> None:
    """Factors A and GA of one product: their products agree, the mean of their factors does not."""
    first = Weights(drawn(3, 8), drawn(6, 3, seed=1), scale=2.0)
    mix = torch.eye(3) * 3 + drawn(3, 3, seed=2)
    second = Weights(mix @ first.down, first.up @ torch.linalg.inv(mix), scale=2.0)
    merged = merge_lora([first, second], [0.3, 0.7], first)
    torch.testing.assert_close(2.0 * merged.up @ merged.down, 2.0 * first.up @ first.down, rtol=1e-5, atol=1e-5)
    down, up = (first.down + second.down) / 2, (first.up + second.up) / 2
    off = (up @ down - first.up @ first.down).norm() / (first.up @ first.down).norm()
    assert off > 0.05
    third = Weights(drawn(5, 8, seed=3), drawn(6, 5, seed=4), scale=0.5)  # of another rank
    merged = merge_lora([first, third], [0.5, 0.5], first)
    mean = (2.0 * first.up @ first.down + 0.5 * third.up @ third.down) / 2
    left, values, right = torch.linalg.svd(mean)
    best = left[:, :3] * values[:3] @ right[:3]
    torch.testing.assert_close(2.0 * merged.up @ merged.down, best, rtol=1e-4, atol=1e-5)


def test_alignment_finds_a_permutation_and_changes_nothing_else() -> None:
    down, up, gate = drawn(7, 8), drawn(6, 7, seed=1), drawn(7, 8, seed=4)
    b_down, b_up, b_gate = drawn(7, seed=2), drawn(6, seed=3), drawn(7, seed=5)
    expert = Weights(down, up, b_down, b_up, gate, b_gate)
    order = torch.randperm(7, generator=torch.Generator().manual_seed(6))
    other = Weights(down[order], up[:, order], b_down[order], b_up, gate[order], b_gate[order])
    found = aligned(other, expert)
    assert torch.equal(found.down, expert.down)
    assert torch.equal(found.up, expert.up)
    assert found.b_gate is not None
    assert torch.equal(found.b_gate, b_gate)
    merged = merge_neurons([expert, other], [0.5, 0.5], expert)
    torch.testing.assert_close(merged.down, expert.down)
    naive = merge_neurons([expert, other], [0.5, 0.5], expert, align=False)
    assert not torch.allclose(naive.down, expert.down, atol=0.1)


def with_everything(rank: int, seed: int, glu: bool, scale: float) -> Weights:
    """An expert from 8 to 6 with biases and a LayerNorm."""
    parts = [drawn(*shape, seed=seed + i) for i, shape in enumerate([(rank, 8), (6, rank), (rank,), (6,), (rank, 8),
                                                                     (rank,), (8,), (8,)])]  # fmt: skip
    down, up, b_down, b_up, gate, b_gate, weight, shift = (part.double() for part in parts)
    return Weights(down, up, b_down, b_up, gate if glu else None, b_gate if glu else None, (weight, shift), scale)


def test_linear_experts_with_norms_and_biases_become_their_mean() -> None:
    x, scales = drawn(5, 8, seed=9).double(), (2.0, 0.5)
    experts = [with_everything(rank, 10 * rank, glu=False, scale=s) for rank, s in zip((2, 4), scales, strict=True)]
    like = with_everything(6, 90, glu=False, scale=4.0)  # of a rank that holds both
    merged = merge_lora(experts, [0.25, 0.75], like)
    outputs = [expert_output(weights, "identity", x) for weights in experts]
    torch.testing.assert_close(expert_output(merged, "identity", x), 0.25 * outputs[0] + 0.75 * outputs[1])
    assert merged.scale == 4.0


@pytest.mark.parametrize("glu", [False, True])
def test_an_expert_and_itself_in_another_order_become_itself(glu: bool) -> None:
    x, expert = drawn(5, 8, seed=9).double(), with_everything(7, 3, glu, scale=3.0)
    other = in_order(expert, torch.randperm(7, generator=torch.Generator().manual_seed(6)))
    merged = merge_neurons([expert, other], [0.4, 0.6], expert)
    torch.testing.assert_close(expert_output(merged, "gelu", x), expert_output(expert, "gelu", x))


def in_order(expert: Weights, order: Tensor) -> Weights:
    moved = {n: getattr(expert, n)[order] for n in ("down", "b_down", "gate", "b_gate")
             if getattr(expert, n) is not None}  # fmt: skip
    return expert._replace(up=expert.up[:, order], **moved)


@pytest.mark.parametrize("told_apart_by", ["down", "up", "b_down", "gate", "b_gate"])
def test_neurons_are_aligned_by_all_that_they_read_and_write(told_apart_by: str) -> None:
    same = {
        n: torch.ones_like(t)
        for n, t in with_everything(7, 3, True, 1.0)._asdict().items()
        if n not in ("norm", "scale")
    }
    expert = Weights(**{**same, told_apart_by: getattr(with_everything(7, 3, True, 1.0), told_apart_by)})
    other = in_order(expert, torch.randperm(7, generator=torch.Generator().manual_seed(6)))
    assert torch.equal(getattr(aligned(other, expert), told_apart_by), getattr(expert, told_apart_by))


@torch.no_grad()
def test_members_have_equal_parts_where_nobody_uses_them_or_use_shall_not_count(tiny: Any, tiny_inputs: Any) -> None:
    for tokens, weight in (([0, 0, 5], "usage"), ([3, 1, 5], "uniform")):
        model = moa(tiny, num_experts=3, r=8)
        usage = used(model, tiny_inputs("llama"))
        for layer in expert_layers(model):
            usage[layer.key].tokens = torch.tensor(tokens)
            for e in range(2):  # of rank 2: a mean of two has room
                layer.set_weights(e, layer.weights(e)._replace(down=F.pad(layer.weights(e).down[:2], (0, 0, 0, 6))))
        layer = expert_layers(model)[0]
        mean = sum(layer.weights(e).up @ layer.weights(e).down for e in range(2)) / 2
        groups = {layer.key: [["expert0", "expert1"]] for layer in expert_layers(model)}
        merge_experts(model, usage, groups, weight=weight)  # type: ignore[arg-type]
        merged = expert_layers(model)[0].weights(0)
        torch.testing.assert_close(merged.up @ merged.down, mean, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_errors_are_means_over_experts_by_their_use(tiny: Any, tiny_inputs: Any) -> None:
    model = moa(tiny, num_experts=3)
    usage = used(model, tiny_inputs("llama"))
    layers = expert_layers(model)
    for layer in layers:
        usage[layer.key].tokens = torch.tensor([6, 3, 1])
    rows = {layer.key: drawn(20, layer.width, seed=3) for layer in layers}
    before = [layers[0].run(e, rows[layers[0].key]) for e in range(3)]
    groups = {layer.key: [["expert0", "expert1"]] for layer in layers}
    done = merge_experts(model, usage, groups, inputs=rows)
    after = expert_layers(model)[0].run(0, rows[layers[0].key])

    def error(new: Tensor, old: Tensor) -> float:
        return float((new - old).square().sum() / old.square().sum())

    expected = 0.6 * error(after, before[0]) + 0.3 * error(after, before[1])
    assert done.layers[0].error == pytest.approx(expected, rel=1e-4)
    assert done.layers[0].dominant_error == pytest.approx(0.3 * error(before[0], before[1]), rel=1e-4)


@torch.no_grad()
def test_a_dry_run_on_a_base_changes_no_bit() -> None:
    model = moe("mixtral")
    usage, before = used(model, BATCH), copy.deepcopy(model.state_dict())
    told = merge_experts(model, usage, 2, similarity="weight", dry_run=True)
    assert max(part.error for part in told.layers) > 0.1
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@torch.no_grad()
def test_a_mean_that_the_expert_which_stands_cannot_hold_is_refused(
    tiny: Any, tiny_inputs: Any, tmp_path: Any
) -> None:
    """Such as that of biases, where it has none: they would be lost."""
    for name, fields in (("plain", {}), ("biased", {"lora_bias": True}), ("nothing", {"lora_alpha": 0})):
        lora = LoraConfig(r=2, target_modules=["down_proj"], init_lora_weights=False, **fields)
        get_peft_model(tiny("llama", num_hidden_layers=2), lora).save_pretrained(tmp_path / name)
    inputs = tiny_inputs("llama")
    for stands, other, said in (
        ("plain", "biased", "has no bias, and .*biased"),
        ("nothing", "plain", "a scale of 0"),
    ):
        config = MoAConfig(experts={name: tmp_path / name for name in (stands, other)}, router="softmax")
        model = get_peft_model(tiny("llama", num_hidden_layers=2), config).eval()
        usage, before = used(model, inputs), logits(model, inputs)
        for layer in expert_layers(model):
            usage[layer.key].tokens = torch.tensor([5, 1])
        groups = {layer.key: [[stands, other]] for layer in expert_layers(model)}
        with pytest.raises(ValueError, match=said):
            merge_experts(model, usage, groups)
        assert torch.equal(logits(model, inputs), before)
        merge_experts(model, usage, groups, weight="dominant")


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss", "qwen2_moe"])
@torch.no_grad()
def test_the_experts_of_a_base_are_merged_too(kind: str) -> None:
    model = moe(kind)
    for layer in expert_layers(model):
        weights = layer.weights(0)
        order = torch.randperm(len(weights.down), generator=torch.Generator().manual_seed(3))
        moved = {
            n: getattr(weights, n)[order]
            for n in ("down", "b_down", "gate", "b_gate")
            if getattr(weights, n) is not None
        }
        layer.set_weights(4, weights._replace(up=weights.up[:, order], **moved))
    before, usage = logits(model, BATCH), used(model, BATCH)
    done = merge_experts(model, usage, 5, similarity="weight")
    assert done.counts[1] == sum(len(layer.names) for layer in expert_layers(model)) == 5 * len(done.layers)
    apart = [part for part in done.layers if part.expert_map[0] != part.expert_map[4]]
    if not apart:
        torch.testing.assert_close(logits(model, BATCH), before, rtol=1e-4, atol=1e-5)
    assert all(part.error < 1e-9 for part in done.layers if part not in apart)
    prune_experts(model, used(model, BATCH), 3)
    assert all(len(layer.names) == 3 for layer in expert_layers(model))
    assert logits(model, BATCH).isfinite().all()


@torch.no_grad()
def test_as_many_groups_as_experts_change_nothing_and_the_baseline_keeps_the_dominant(
    tiny: Any, tiny_inputs: Any
) -> None:
    model, inputs = moa(tiny), tiny_inputs("llama", batch=4)
    before, usage = model(**inputs).logits, used(model, inputs)
    whole = merge_experts(model, usage, 4)
    assert all(part.expert_map == (0, 1, 2, 3) and part.error == part.dominant_error == 0 for part in whole.layers)
    assert torch.equal(model(**inputs).logits, before)
    merged = merge_experts(copy.deepcopy(model), usage, 2)
    kept = [layer.weights(e).up.clone() for layer in expert_layers(model) for e in range(4)]
    baseline = merge_experts(model, usage, 2, weight="dominant")
    for one, other in zip(merged.layers, baseline.layers, strict=True):
        assert one.expert_map == other.expert_map
        assert other.error == pytest.approx(other.dominant_error) == pytest.approx(one.dominant_error)
        assert one.error < one.dominant_error  # the mean of a pair is nearer to both than one is to the other
    assert "dominant" in str(merged)
    held = [layer.weights(e).up for layer in expert_layers(model) for e in range(2)]
    assert all(any(torch.equal(weights, other) for other in kept) for weights in held)


@torch.no_grad()
def test_usage_weighs_the_members(tiny: Any, tiny_inputs: Any) -> None:
    model = moa(tiny, num_experts=2)
    usage = used(model, tiny_inputs("llama"))
    for found in usage.layers.values():
        found.tokens = torch.tensor([3, 1])
    layer = expert_layers(model)[0]
    first, second = (layer.weights(e).up @ layer.weights(e).down for e in range(2))
    scale = float(layer.weights(0).scale)
    merge_experts(model, usage, 1)
    merged = expert_layers(model)[0].weights(0)
    mean = (3 * first + second) / 4
    left, values, right = torch.linalg.svd(mean)
    best = left[:, :3] * values[:3] @ right[:3]
    torch.testing.assert_close(merged.up @ merged.down, best, rtol=1e-4, atol=1e-5)
    assert float(merged.scale) == scale


@pytest.mark.parametrize("similarity", ["router_logits", "router_weight", "weight", "output"])
def test_similar_experts_are_grouped(similarity: Any, tiny: Any, tiny_inputs: Any) -> None:
    model = moa(tiny, num_experts_per_tok=1)
    for layer in expert_layers(model):
        double(layer, 2, 0)
        like_router_rows(layer, 2, 0)
        double(layer, 3, 1)
        like_router_rows(layer, 3, 1)
    usage = used(model, tiny_inputs("llama", batch=4))
    for found in usage.layers.values():
        found.tokens = torch.tensor([5, 4, 1, 1])
    for grouping in ("dominant", "spectral"):
        done = merge_experts(model, usage, 2, similarity=similarity, grouping=grouping, dry_run=True)
        assert [part.expert_map for part in done.layers] == [(0, 1, 0, 1)] * 2


def test_spectral_clusters_gather_a_blob_that_the_most_used_would_part() -> None:
    """Two experts of one blob are used most: those who stay are these, and clusters are the blobs."""
    angles = torch.tensor([0.0, 0.2, 0.1, 1.4, 1.5, 1.6])
    alike = torch.cos(angles - angles.unsqueeze(1)).double()
    assert sorted(map(sorted, spectral_clusters(alike, 2))) == [[0, 1, 2], [3, 4, 5]]
    assert sorted(map(sorted, spectral_clusters(alike, 6))) == [[e] for e in range(6)]
    assert spectral_clusters(torch.ones(4, 4).double(), 1) == [[0, 1, 2, 3]]
    assert len(spectral_clusters(torch.ones(4, 4).double(), 3)) == 3
    used = torch.tensor([9.0, 8, 1, 1, 2, 1])
    assert grouped(alike[:, [0, 1]], [0, 1], "dominant", used) == [0, 1, 0, 1, 1, 1]
    assert grouped(alike, [0, 1], "spectral", used) == [0, 0, 0, 4, 4, 4]


@pytest.mark.parametrize("seed", [2, 4])
def test_nobody_is_a_neighbour_of_himself_in_the_graph_of_clusters(seed: int) -> None:
    points = F.normalize(torch.randn(6, 3, generator=torch.Generator().manual_seed(seed)).double(), dim=1)
    alike = points @ points.T
    graph = torch.zeros(6, 6).double()
    for i in range(6):
        for j in range(6):
            if i != j:
                graph[i, j] = (1 + alike[i, j]) / 2
    degrees = graph.sum(1)
    for i in range(6):
        for j in range(6):
            graph[i, j] /= (degrees[i] * degrees[j]).sqrt()
    rows = F.normalize(torch.linalg.eigh(graph).eigenvectors[:, 3:], dim=1)
    assert spectral_clusters(alike, 3) == same_cells(torch.cdist(rows, rows), float("inf"), 3)


def test_groups_by_name_are_merged_and_no_others(tiny: Any, tiny_inputs: Any) -> None:
    """What `overspecification_report` finds, or a user says; the most used of a group stands for it."""
    model, inputs = moa(tiny, num_experts_per_tok=1), tiny_inputs("llama", batch=4)
    first, second = expert_layers(model)
    double(second, 3, 1)
    found = overspecification_report(model, [inputs], tolerance=1e-6)
    assert found.groups == {second.key: (("expert1", "expert3"),)}
    usage = used(model, inputs)
    usage[second.key].tokens = torch.tensor([5, 1, 1, 4])
    before = logits(model, inputs)
    done = merge_experts(model, usage, found.groups)
    assert [part.expert_map for part in done.layers] == [(0, 1, 2, 3), (0, 3, 2, 3)]
    assert done.layers[1].error < 1e-6
    torch.testing.assert_close(logits(model, inputs), before, rtol=1e-4, atol=1e-5)
    assert [len(layer.names) for layer in expert_layers(model)] == [4, 3]
    usage = used(model, inputs)
    for groups, options, said in (
        ({"nowhere": [["expert0"]]}, {}, "groups names the layer 'nowhere'"),
        ({first.key: [["expert0", "expert9"]]}, {}, "a group is a list of names"),
        ({first.key: [["expert0"], ["expert0"]]}, {}, "each in one group"),
        ({first.key: ["expert0"]}, {}, "a group is a list of names"),
        ({first.key: [["expert0"]]}, {"scope": "global"}, "these have nothing to decide"),
        ({first.key: [["expert0"]]}, {"similarity": "weight"}, "these have nothing to decide"),
    ):
        with pytest.raises(ValueError, match=said):
            merge_experts(model, usage, groups, **options)


def test_a_merge_that_is_refused_at_a_later_layer_has_changed_none(tiny: Any, tiny_inputs: Any) -> None:
    model, inputs = moa(tiny, "glu"), tiny_inputs("llama")
    second = expert_layers(model)[1]
    weights = second.weights(0)
    wider = {n: torch.cat([getattr(weights, n)] * 2) for n in ("down", "gate", "b_down", "b_gate")
             if getattr(weights, n) is not None}  # fmt: skip
    second.set_weights(0, weights._replace(**wider, up=torch.cat([weights.up / 2] * 2, 1)))
    usage, before = used(model, inputs), logits(model, inputs)
    with pytest.raises(ValueError, match="have different widths"):
        merge_experts(model, usage, 1)
    assert torch.equal(logits(model, inputs), before)
    assert [len(layer.names) for layer in expert_layers(model)] == [4, 4]


def test_what_cannot_be_merged_is_refused(tiny: Any, tiny_inputs: Any) -> None:
    model, inputs = moa(tiny), tiny_inputs("llama")
    usage = used(model, inputs, samples=0)
    for options, said in (
        ({"groups": 0}, "1 or more"),
        ({"groups": 2}, "no logits to compare"),
        ({"groups": 2, "similarity": "logits"}, "Did you mean 'router_logits'"),
        ({"groups": 2, "weight": "mean"}, "is unknown"),
        ({"groups": 2, "grouping": "spectrum"}, "Did you mean 'spectral'"),
        ({"groups": 2, "similarity": "output", "inputs": {}}, "give rows"),
    ):
        with pytest.raises(ValueError, match=said):
            merge_experts(model, usage, **options)  # type: ignore[arg-type]
    config = MixDAConfig(domains=["law", "code"], domain_layers=[0])
    domains = get_peft_model(tiny("llama", num_hidden_layers=2), config).eval()
    with pytest.raises(ValueError, match="share_experts: adapter 'default' is of type MIXDA"):
        merge_experts(domains, used(domains, inputs), 1, similarity="output")
    assert expert_layers(domains)[0].names == ("law", "code")


def test_an_expert_of_another_rank_is_written_and_saved(tiny: Any, tiny_inputs: Any, tmp_path: Any) -> None:
    model, inputs = moa(tiny), tiny_inputs("llama")
    layer: Any = expert_layers(model)[1]
    weights = layer.weights(2)
    wide = weights._replace(down=torch.cat([weights.down, drawn(2, layer.width)]),
                            up=torch.cat([weights.up, torch.zeros(len(weights.up), 2)], 1))  # fmt: skip
    with torch.no_grad():
        before = model(**inputs).logits
        layer.set_weights(2, wide)
        torch.testing.assert_close(model(**inputs).logits, before, rtol=1e-5, atol=1e-6)
        model.save_pretrained(tmp_path)
        again = PeftModel.from_pretrained(tiny("llama", num_hidden_layers=2), tmp_path).eval()
        torch.testing.assert_close(again(**inputs).logits, before, rtol=1e-5, atol=1e-6)
    assert expert_layers(again)[1].weights(2).down.shape[0] == 5
