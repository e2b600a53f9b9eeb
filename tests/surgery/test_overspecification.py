"""Experts that compute the same are found, however their weights lie."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import get_peft_model
from single_experts import activation_of, make_expert, make_inputs
from torch import Tensor

from mixadapters import MoAConfig
from mixadapters.core.hooks import root_of
from mixadapters.surgery.compressing import compress_experts
from mixadapters.surgery.layers import expert_layers
from mixadapters.surgery.overspecification import (
    LayerCells,
    _Sample,
    function_distances,
    layer_cells,
    mutual_information,
    needed_places,
    overspecification_report,
    same_cells,
)
from mixadapters.surgery.view import Routed, expert_output


def rearranged(weights, form: str, seed: int, units: int = 8):
    """The same function by other weights: units in another order; of LoRA, factors times a matrix and its inverse."""
    torch.manual_seed(seed)
    if form == "lora":
        mix = torch.randn(8, 8) + 4 * torch.eye(8)
        return weights._replace(down=mix @ weights.down, up=weights.up @ torch.linalg.inv(mix))
    order = torch.randperm(units)
    parts = {
        n: getattr(weights, n)[order] for n in ("down", "gate", "b_down", "b_gate") if getattr(weights, n) is not None
    }
    return weights._replace(**parts, up=weights.up[:, order])


def expert_cells(experts: Any, inputs: Tensor, activation: str, **options: Any) -> LayerCells:
    """Of experts by their weights, named by number."""
    outputs = torch.stack([expert_output(weights, activation, inputs) for weights in experts])
    return layer_cells(outputs, [str(e) for e in range(len(experts))], **{"top_k": None, **options})


@pytest.mark.parametrize("form", ["lora", "bottleneck", "glu"])
def test_planted_duplicates_are_found_whatever_their_weights(form: str) -> None:
    a, b, c = (make_expert(form, seed=s) for s in range(3))
    experts = [a, b, rearranged(a, form, 0), c, rearranged(a, form, 1), rearranged(c, form, 2)]
    found = expert_cells(experts, make_inputs(200), activation_of(form), top_k=2)
    assert found.cells == (("0", "2", "4"), ("3", "5"), ("1",))
    assert found.duplicates == (("0", "2", "4"), ("3", "5"))
    assert found.needed_k == 5
    assert "choose top_k=5" in found.advice
    assert "5 experts in 2 groups" in found.advice


def test_distinct_experts_need_no_more_places_than_they_have() -> None:
    found = expert_cells([make_expert(seed=s) for s in range(4)], make_inputs(200), "identity", top_k=2)
    assert found.duplicates == ()
    assert found.needed_k == 2
    assert found.advice is None
    assert expert_cells([make_expert()], make_inputs(), "identity").needed_k is None


def test_distances_are_0_of_the_same_2_of_unrelated_and_4_of_opposite_outputs() -> None:
    torch.manual_seed(0)
    one = torch.randn(1000, 8)
    outputs = torch.stack([one, one.clone(), -one, torch.randn(1000, 8), torch.zeros(1000, 8), torch.zeros(1000, 8)])
    distances = function_distances(outputs)
    assert distances[0].tolist() == pytest.approx([0, 0, 4, 2, 2, 2], abs=0.1)
    assert distances[4, 5] == 0
    assert torch.equal(distances, distances.t())


def test_distances_of_large_outputs_that_are_close_do_not_cancel() -> None:
    torch.manual_seed(0)
    one = torch.randn(500, 4)
    near = one + 1e-5 * torch.randn(500, 4)
    assert float(function_distances(torch.stack([one, near]))[0, 1]) == pytest.approx(1e-10, rel=0.2)


def test_a_chain_of_near_ones_is_no_cell_where_its_ends_are_far_apart() -> None:
    places = torch.tensor([0.0, 1.0, 2.0, 3.0, 10.0])
    assert same_cells((places[:, None] - places).abs(), 1.5) == [[0, 1], [2, 3], [4]]
    assert same_cells((places[:, None] - places).abs(), 3.0) == [[0, 1, 2, 3], [4]]


@pytest.mark.parametrize(
    ("sizes", "k", "needed"), [((1, 1, 1), 2, 2), ((3, 1, 2), 1, 3), ((3, 1, 2), 2, 5), ((2,), 4, 2)]
)
def test_places_are_those_of_the_largest_cells(sizes: tuple[int, ...], k: int, needed: int) -> None:
    assert needed_places(sizes, k) == needed


def test_a_tolerance_below_0_is_refused() -> None:
    with pytest.raises(ValueError, match=r"tolerance=-0.1 must be"):
        expert_cells([make_expert()], make_inputs(), "identity", tolerance=-0.1)


def test_an_expert_whose_outputs_are_none_is_no_double() -> None:
    outputs = torch.randn(3, 4, 2)
    outputs[1, 0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"experts \['b'\] at 'here' give NaN"):
        layer_cells(outputs, "abc", top_k=2, path="here")


@pytest.fixture
def planted(tiny):
    """A base whose first block has two pairs of experts that compute the same; in the second all differ."""
    model = tiny("mixtral", num_hidden_layers=2)
    layer = expert_layers(model)[0]
    for one, other in ((0, 2), (1, 3)):
        layer.set_weights(other, rearranged(layer.weights(one), "glu", one, units=48))
    return model


def test_duplicates_in_a_model_are_found_and_told(planted, tiny_inputs) -> None:
    found = overspecification_report(planted, [tiny_inputs("mixtral", batch=4, length=16)])
    first, second = (layer.key for layer in expert_layers(planted))
    assert found.layers[first].cells == (("0", "2"), ("1", "3"))
    assert found.layers[first].needed_k == 4
    assert found.layers[second].duplicates == ()
    assert len(found.advice) == 1
    assert first in found.advice[0]
    assert found.dead == {first: (), second: ()}
    assert found.dependence.keys() == {second}
    assert found.as_dict()["layers"][first]["top_k"] == 2


@pytest.mark.parametrize("adapter", ["", "default"])
def test_a_model_whose_forward_runs_under_autocast_is_compared_and_compressed(planted, tiny_inputs, adapter) -> None:
    """As a Trainer leaves it that has trained in bfloat16: experts read another dtype than their weights have."""
    model = planted
    if adapter:
        config = MoAConfig(num_experts=4, r=3, target_modules=["q_proj"], init_weights=False)
        model = get_peft_model(planted, config)
    batch = tiny_inputs("mixtral")
    root = root_of(model)
    root.forward = torch.autocast("cpu", torch.bfloat16)(root.forward)
    layer = expert_layers(model, adapter)[0]
    with layer.watch(lambda routed: dtypes.append(routed.inputs.dtype)):
        dtypes: list[torch.dtype] = []
        model(**batch)
    found = overspecification_report(model, [batch], adapter=adapter)
    assert len(found.layers) == 2
    assert compress_experts(model, [batch], adapter=adapter, codec="packed").error > 0
    if adapter:
        assert dtypes == [torch.bfloat16]


def test_experts_that_nothing_reaches_are_told_and_padding_is_no_row(planted, tiny_inputs) -> None:
    layer = expert_layers(planted)[1]
    batch = tiny_inputs("mixtral", batch=2, length=5)
    chosen = []
    with layer.watch(lambda routed: chosen.append(routed.indices.view(2, 5, -1))):
        planted(**batch)
    batch["attention_mask"][1, 1:] = 0
    used = set(torch.cat([chosen[0][0].flatten(), chosen[0][1, 0]]).tolist())
    found = overspecification_report(planted, [batch])
    assert found.dead[layer.key] == tuple(n for e, n in enumerate(layer.names) if e not in used)


def test_what_cannot_be_reported_is_refused(planted, tiny, tiny_inputs) -> None:
    batch = tiny_inputs("mixtral")
    for call, message in (
        (lambda: overspecification_report(planted, []), "data holds no batch; give one"),
        (lambda: overspecification_report(planted, [batch], tolerance=-1), "tolerance=-1 must be"),
        (lambda: overspecification_report(planted, [batch], samples=0), "samples=0 must be"),
        (lambda: overspecification_report(tiny("llama"), [batch]), "no routed experts"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_mutual_information_is_the_entropy_of_a_copy_and_nothing_of_a_stranger() -> None:
    one = torch.tensor([0, 1, 2, 3] * 100)
    assert mutual_information(one, 7 - one) == pytest.approx(torch.tensor(4.0).log().item())
    assert mutual_information(one, one.sort().values) == pytest.approx(0)
    assert mutual_information(one, one // 2) == pytest.approx(torch.tensor(2.0).log().item())


def test_the_first_choice_of_a_row_is_an_expert_where_it_has_one() -> None:
    """A router's column whose expert has left weighs as before."""
    indices, weights = torch.tensor([[-1, 2], [1, 0], [-1, -1]]), torch.tensor([[0.9, 0.1], [0.4, 0.6], [0.7, 0.3]])
    sample = _Sample()
    sample.add(Routed(torch.zeros(3, 4), indices, weights, None, None, None), samples=8)
    assert sample.first[0].tolist() == [2, 0, -1]
