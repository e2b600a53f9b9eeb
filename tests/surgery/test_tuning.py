"""Experts switched off, forced on and scaled; and found by what they are used for."""

from __future__ import annotations

import copy
import re
from contextlib import suppress
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from mixadapters import MixDAConfig, MoAConfig
from mixadapters.core.routing import Routing
from mixadapters.surgery.layers import ExpertLayer, expert_layers
from mixadapters.surgery.tuning import LayerTuning, ftri, rank_by_usage, selectivity, tune_experts
from mixadapters.surgery.usage import record_usage

NAMES = ["a", "b", "c", "d"]


def moa(tiny: Any, router: Any = "top_k", **options: Any) -> Any:
    given = {"num_experts": 4, "r": 3, "target_modules": ["down_proj"], "norm_topk_prob": router == "top_k", **options}
    model = get_peft_model(tiny("llama", num_hidden_layers=2), MoAConfig(router=router, init_weights=False, **given))
    for name, parameter in model.named_parameters():
        if "moa_" in name:
            parameter.data.normal_()
    return model.eval()


def choices(model: nn.Module, inputs: dict[str, Tensor], layer: ExpertLayer) -> Tensor:
    """(N, E) weights that a layer gives to its experts."""
    found = []

    def take(routed: Any) -> None:
        weights = torch.zeros(len(routed.indices), len(layer.names))
        real = torch.where(routed.indices >= 0, routed.weights, 0)
        found.append(weights.scatter_add(1, routed.indices.clamp_min(0), real.to(weights.dtype)))

    with torch.no_grad(), layer.watch(take):
        model(**inputs)
    return found[0]


MODELS = {
    "moa": lambda tiny: moa(tiny),
    "moa_softmax": lambda tiny: moa(tiny, "softmax", num_experts_per_tok=None),
    "moa_sigmoid": lambda tiny: moa(tiny, "sigmoid", num_experts_per_tok=None),
    "mixtral": lambda tiny: tiny("mixtral", num_hidden_layers=2),
    "qwen3_moe": lambda tiny: tiny("qwen3_moe", num_hidden_layers=2),
}


# --- one layer's choices ----------------------------------------------------------------------------------------


def test_what_is_off_goes_to_the_others_of_the_row() -> None:
    indices, weights = torch.tensor([[0, 1], [2, 3], [1, -1]]), torch.tensor([[0.6, 0.4], [0.3, 0.2], [0.7, 0.0]])
    routing = LayerTuning(off=("b",))(Routing(indices, weights, selected=torch.ones(3, 5).bool()), NAMES)
    assert routing.indices.tolist() == [[0, -1], [2, 3], [-1, -1]]
    assert torch.allclose(routing.weights, torch.tensor([[1.0, 0.0], [0.3, 0.2], [0.0, 0.0]]))
    assert routing.selected.int().tolist() == [[1, 0, 0, 0, 1], [0, 0, 1, 1, 1], [0, 0, 0, 0, 1]]


def test_what_is_on_has_its_share_in_its_own_slot_or_in_that_of_the_least() -> None:
    indices = torch.tensor([[0, 1], [2, 3], [2, -1], [1, 0]], dtype=torch.int32)
    weights = torch.tensor([[0.6, 0.4], [0.3, 0.2], [0.7, 0.0], [0.5, 0.5]])
    routing = LayerTuning(on={"b": 0.9})(Routing(indices, weights), NAMES)
    assert routing.indices.tolist() == [[0, 1], [2, 1], [2, 1], [1, 0]]
    assert torch.allclose(routing.weights, torch.tensor([[0.1, 0.9], [0.05, 0.45], [0.07, 0.63], [0.9, 0.1]]))


def test_what_is_on_does_not_take_the_slot_of_another_that_is() -> None:
    routing = Routing(torch.tensor([[0, 1], [2, 3]]), torch.tensor([[0.6, 0.4], [0.3, 0.2]]))
    tuned = LayerTuning(on={"b": 0.1, "c": 0.5})(routing, NAMES)
    assert [sorted(row) for row in tuned.indices.tolist()] == [[1, 2], [1, 2]]
    for number, share in ((1, 0.1), (2, 0.5)):
        got = (tuned.weights * (tuned.indices == number)).sum(1)
        assert torch.allclose(got, share * torch.tensor([1.0, 0.5]))


def test_several_things_at_once_keep_the_sum_but_for_scales() -> None:
    torch.manual_seed(0)
    weights = torch.rand(50, 3)
    indices = torch.stack([torch.randperm(5)[:3] for _ in range(50)])
    tuning = LayerTuning(off=("a",), on={"b": 0.5, "c": 0.2})
    routing = tuning(Routing(indices, weights), [*NAMES, "e"])
    used = torch.where(routing.indices >= 0, routing.weights, 0)
    others = (routing.indices > 2).any(1)  # without these what is on has its share, and there is nobody for the rest
    assert torch.allclose(used.sum(1), torch.where(others, 1.0, 0.7) * weights.sum(1))
    assert not (routing.indices == 0).any()
    for number, share in ((1, 0.5), (2, 0.2)):
        assert torch.allclose((used * (routing.indices == number)).sum(1), share * weights.sum(1))
    scaled = LayerTuning(scale={"b": 3.0})(Routing(indices, weights), [*NAMES, "e"])
    assert torch.allclose(scaled.weights, torch.where(indices == 1, 3 * weights, weights))


def test_rows_that_an_expert_has_left_are_nobodys_while_others_are_scaled(tiny, tiny_inputs) -> None:
    model, inputs = tiny("mixtral", num_hidden_layers=2), tiny_inputs("mixtral", batch=4)
    layers = expert_layers(model)
    for layer in layers:
        layer.keep([0, 2, 3], preserve_mass=True)

    def tokens() -> list[Tensor]:
        with torch.no_grad(), record_usage(model) as usage:
            model(**inputs)
        return [found.tokens for found in usage.layers.values()]

    before = tokens()
    assert int(before[0].sum()) < 2 * inputs["input_ids"].numel()  # some are lost
    with tune_experts(model, scale={(layer.key, 1): 1.0 for layer in layers}):
        assert all(map(torch.equal, tokens(), before))


def test_dense_routings_are_tuned_too_and_names_that_are_gone_mean_nothing() -> None:
    weights = torch.tensor([[0.4, 0.3, 0.2, 0.1]])
    tuned = LayerTuning(off=("a", "gone"), on={"d": 0.5}, scale={"c": 2.0})(Routing(weights=weights), NAMES)
    assert torch.allclose(tuned.weights, torch.tensor([[0.0, 0.3, 0.4, 0.5]]))
    equal = LayerTuning(off=("a",))(Routing(probs=weights), NAMES)
    assert torch.allclose(equal.weights, torch.tensor([[0.0, 4 / 3, 4 / 3, 4 / 3]]))


# --- models -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", MODELS)
@torch.no_grad()
def test_nothing_tuned_is_nothing_changed_and_the_end_of_the_block_undoes_it(kind: str, tiny, tiny_inputs) -> None:
    model, inputs = MODELS[kind](tiny), tiny_inputs("llama")
    before = model(**inputs).logits
    layer = expert_layers(model)[0]
    with tune_experts(model):
        assert torch.equal(model(**inputs).logits, before)
    with suppress(KeyError), tune_experts(model, off=[(layer.key, 0)], on={(layer.key, 1): 0.3}):
        assert not torch.equal(model(**inputs).logits, before)
        raise KeyError
    assert torch.equal(model(**inputs).logits, before)


@pytest.mark.parametrize("kind", MODELS)
@torch.no_grad()
def test_an_expert_that_is_off_never_contributes(kind: str, tiny, tiny_inputs) -> None:
    model, inputs = MODELS[kind](tiny), tiny_inputs("llama", length=20)
    layer = expert_layers(model)[1]
    plain = choices(model, inputs, layer)
    off = [(layer.key, 0), (layer.path, layer.names[2])]
    with tune_experts(model, off=off):
        expected = model(**inputs).logits
        given = choices(model, inputs, layer)
        weights = layer.weights(0)
        kept = copy.deepcopy(weights)
        layer.set_weights(0, weights._replace(up=torch.randn_like(weights.up)))
        assert torch.equal(model(**inputs).logits, expected)
        layer.set_weights(0, kept)
    assert not given[:, [0, 2]].any()
    rest = plain[:, [1, 3]].sum(1) > 0
    assert rest.any()
    assert torch.allclose(given[rest].sum(1), plain[rest].sum(1), atol=1e-5)  # the others have as much more
    assert torch.equal(given[rest] > 0, (plain * torch.tensor([0, 1, 0, 1]))[rest] > 0)  # and nobody else


@pytest.mark.parametrize("kind", MODELS)
@torch.no_grad()
def test_an_expert_that_is_on_has_the_stated_share_of_every_row(kind: str, tiny, tiny_inputs) -> None:
    model, inputs = MODELS[kind](tiny), tiny_inputs("llama", length=20)
    layer = expert_layers(model)[0]
    plain = choices(model, inputs, layer)
    with tune_experts(model, on={(layer.key, 3): 0.7}):
        given = choices(model, inputs, layer)
    with layer.watch(lambda routed: None), tune_experts(model, on={(layer.key, 3): 0.7}):
        again = choices(model, inputs, layer)
    assert torch.equal(given, again)  # whoever watches from outside or inside sees what comes of it
    assert torch.allclose(given.sum(1), plain.sum(1), atol=1e-5)
    assert torch.allclose(given[:, 3], 0.7 * plain.sum(1), atol=1e-5)


@pytest.mark.parametrize("kind", ["moa", "moa_softmax", "moa_sigmoid"])
@torch.no_grad()
def test_mask_lets_the_next_expert_fill_in(kind: str, tiny, tiny_inputs) -> None:
    model, inputs = MODELS[kind](tiny), tiny_inputs("llama", length=20)
    layer = expert_layers(model)[0]
    router = layer.mixture.router
    with tune_experts(model, off=[(layer.key, 1)], mode="mask"):
        masked, given = model(**inputs).logits, choices(model, inputs, layer)
    bias = router.output.bias.clone()
    router.output.bias[1] = -1e9
    assert torch.allclose(masked, model(**inputs).logits, atol=1e-5)
    router.output.bias.copy_(bias)
    assert not given[:, 1].any()
    if kind == "moa":
        assert ((given > 0).sum(1) == 2).all()
    assert router.masked == ()


@torch.no_grad()
def test_mask_goes_before_biases_that_balance(tiny, tiny_inputs) -> None:
    model = moa(tiny, router_bias_update_rate=0.01, scoring_func="sigmoid")
    layer = expert_layers(model)[0]
    layer.mixture.router.balancing.bias[1] = 10.0
    inputs = tiny_inputs("llama")
    assert (choices(model, inputs, layer)[:, 1] > 0).all()
    with tune_experts(model, off=[(layer.key, 1)], mode="mask"):
        assert ((choices(model, inputs, layer) > 0).sum(1) == 2).all()


@torch.no_grad()
def test_blocks_may_lie_in_each_other_and_end_in_any_order(tiny, tiny_inputs) -> None:
    model, inputs = moa(tiny), tiny_inputs("llama")
    layer = expert_layers(model)[0]
    before = model(**inputs).logits
    for mode in ("zero", "mask"):
        one, two = (tune_experts(model, off=[(layer.key, e)], mode=mode) for e in (0, 1))
        one.__enter__()
        two.__enter__()
        assert not choices(model, inputs, layer)[:, :2].any()
        one.__exit__(None, None, None)
        assert not choices(model, inputs, layer)[:, 1].any()
        assert choices(model, inputs, layer)[:, 0].any()
        two.__exit__(None, None, None)
        assert torch.equal(model(**inputs).logits, before)


@torch.no_grad()
def test_what_a_caller_has_decided_is_not_tuned(tiny, tiny_inputs) -> None:
    model, inputs = moa(tiny), tiny_inputs("llama")
    with model.base_model.pin_routes({"ffn/*": torch.tensor([0, 1])}):
        before = model(**inputs).logits
        with tune_experts(model, off=[(layer.key, 0) for layer in expert_layers(model)]):
            assert torch.equal(model(**inputs).logits, before)


@torch.no_grad()
def test_layers_that_share_a_router_follow_and_are_not_tuned_twice(tiny, tiny_inputs) -> None:
    model, inputs = moa(tiny, router_scope="model"), tiny_inputs("llama")
    first, second = expert_layers(model)
    with tune_experts(model, scale={(first.key, 1): 2.0}):
        given = [choices(model, inputs, layer) for layer in (first, second)]
    assert torch.allclose(given[0], given[1])
    with (
        pytest.raises(ValueError, match=r"goes by the router of .*layers\.0"),
        tune_experts(model, off=[(second.key, 1)]),
    ):
        pass


@pytest.mark.parametrize("kind", MODELS)
@torch.no_grad()
def test_a_name_alone_is_the_expert_in_every_layer(kind: str, tiny, tiny_inputs) -> None:
    model, inputs = MODELS[kind](tiny), tiny_inputs("llama")
    layers = expert_layers(model)
    names = layers[0].names
    given = [
        {"off": [names[0]], "on": {names[1]: 0.5}, "scale": {names[2]: 2.0}},
        {
            "off": [(layer.key, names[0]) for layer in layers],
            "on": {(layer.key, names[1]): 0.5 for layer in layers},
            "scale": {(layer.key, names[2]): 2.0 for layer in layers},
        },
    ]
    plain, found = model(**inputs).logits, []
    for options in given:
        with tune_experts(model, **options):
            found.append(model(**inputs).logits)
    assert torch.equal(*found)
    assert not torch.equal(found[0], plain)


@torch.no_grad()
def test_a_name_alone_is_taken_where_routers_decide_and_experts_are(tiny, tiny_inputs) -> None:
    model, inputs = moa(tiny, router_scope="model"), tiny_inputs("llama")
    with tune_experts(model, off=["expert1"]):
        given = [choices(model, inputs, layer) for layer in expert_layers(model)]
    assert len(given) == 2
    assert not any(weights[:, 1].any() for weights in given)
    uneven = moa(tiny, num_experts={"0": 2, "1": 3})
    uneven.base_model.override_experts(off=["expert2"])
    last = expert_layers(uneven)[1].path
    assert uneven.peft_config["default"].expert_overrides == {"mode": "zero", "off": [[last, "expert2"]]}


def test_what_cannot_be_tuned_is_refused(tiny, tiny_inputs) -> None:
    model, base, tree = moa(tiny), MODELS["mixtral"](tiny), moa(tiny, "tree", num_experts_per_tok=2)
    key, base_key, tree_key = (expert_layers(m)[0].key for m in (model, base, tree))
    for call, message in (
        (
            lambda: tune_experts(model, off=[("expert0",)]),
            rf"must be \(layer, expert\), such as \('{re.escape(key)}', 'expert0'\), or the name of an expert alone",
        ),
        (lambda: tune_experts(model, off="expert1"), r"off='expert1' must be a list .* write \['expert1'\]"),
        (lambda: tune_experts(model, off=["expert9"]), r"no layer has an expert 'expert9'; .* Did you mean 'expert"),
        (lambda: tune_experts(model, on={key: 0.5}), rf"is a layer: write \('{re.escape(key)}', expert\)"),
        (lambda: tune_experts(model, off=["expert1", (key, 1)]), "names expert 'expert1' .* twice"),
        (lambda: tune_experts(model, off=[("x", 0)]), "off: 0 layers are 'x'"),
        (lambda: tune_experts(model, off=[(key, 4)]), "has no expert 4"),
        (lambda: tune_experts(model, off=[(key, "law")]), "has no expert 'law'"),
        (lambda: tune_experts(model, off=[(key, 0), (key, "expert0")]), "names expert 'expert0' .* twice"),
        (lambda: tune_experts(model, off=[(key, e) for e in range(4)]), "all experts .* would be off"),
        (lambda: tune_experts(model, off=[(key, 0)], on={(key, 0): 0.5}), "cannot be off and on"),
        (lambda: tune_experts(model, on={(key, 0): 1.5}), "must be a share"),
        (lambda: tune_experts(model, on={(key, 0): 0.6, (key, 1): 0.6}), "sum to 1.2"),
        (lambda: tune_experts(model, on={(key, e): 0.1 for e in range(3)}), "a row uses 2"),
        (lambda: tune_experts(model, scale={(key, 0): float("nan")}), "must be 0 or more"),
        (lambda: tune_experts(model, mode="none"), "mode='none' is unknown"),
        (lambda: tune_experts(base, off=[(base_key, 0)], mode="mask"), "use mode='zero'"),
        (lambda: tune_experts(tree, off=[(tree_key, 0)], mode="mask"), "use mode='zero'"),
        (lambda: tune_experts(tiny("llama")), "no routed experts"),
    ):
        with pytest.raises(ValueError, match=message), call():
            pass
    assert not any(layer.mixture.tunings for layer in expert_layers(model))


# --- in the config ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["zero", "mask"])
@torch.no_grad()
def test_overrides_are_saved_with_the_adapter_and_taken_back(mode: str, tiny, tiny_inputs, tmp_path) -> None:
    model, inputs = moa(tiny), tiny_inputs("llama")
    first, second = (layer.path for layer in expert_layers(model))
    plain = model(**inputs).logits
    given = {"off": [(first, 1)], "on": {(second, "expert2"): 0.4}, "scale": {(second, 0): 0.5}, "mode": mode}
    with tune_experts(model, **given):
        expected = model(**inputs).logits
    model.base_model.override_experts(**given)
    assert torch.equal(model(**inputs).logits, expected)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny("llama", num_hidden_layers=2), tmp_path).eval()
    assert torch.equal(loaded(**inputs).logits, expected)
    copied = copy.deepcopy(loaded)
    loaded.base_model.override_experts()
    assert torch.equal(loaded(**inputs).logits, plain)
    assert loaded.peft_config["default"].expert_overrides == {}
    assert torch.equal(copied(**inputs).logits, expected)
    copied.base_model.override_experts()
    assert torch.equal(copied(**inputs).logits, plain)


@pytest.mark.parametrize("mode", ["zero", "mask"])
@torch.no_grad()
def test_an_expert_that_leaves_leaves_the_overrides(mode: str, tiny, tiny_inputs) -> None:
    model = moa(tiny, num_experts=8, experts=["a", "b", "c"])
    first, second = (layer.path for layer in expert_layers(model))
    model.base_model.override_experts([(first, "a"), (first, "b"), (second, "a")], mode=mode)
    model.base_model.remove_expert("a")
    assert model.peft_config["default"].expert_overrides == {"mode": mode, "off": [[first, "b"]]}
    given = choices(model, tiny_inputs("llama"), expert_layers(model)[0])
    assert not given[:, 0].any()
    model.base_model.override_experts()
    assert choices(model, tiny_inputs("llama"), expert_layers(model)[0])[:, 0].any()
    assert expert_layers(model)[0].mixture.router.masked == ()


@pytest.mark.parametrize("verb", ["remove", "keep", "share"])
@torch.no_grad()
def test_experts_that_are_off_are_not_left_alone(verb: str, tiny, tiny_inputs, tmp_path) -> None:
    """A mixture whose experts are all off at a layer is refused when it is loaded."""
    model = moa(tiny, num_experts=8, experts=["a", "b"])
    tuner, (first, second) = model.base_model, (layer.path for layer in expert_layers(model))
    verbs: dict[str, Any] = {
        "remove": lambda: tuner.remove_expert("b"),
        "keep": lambda: tuner.keep_experts({first: ["a", "b"], second: ["a"]}),
        "share": lambda: tuner.share_experts({second: {"b": "a"}}),
    }
    tuner.override_experts([(second, "a")])
    before = model(**tiny_inputs("llama")).logits
    with pytest.raises(ValueError, match=rf"would leave '{second}' to \['a'\], which override_experts has switched"):
        verbs[verb]()
    assert torch.equal(model(**tiny_inputs("llama")).logits, before)
    assert model.peft_config["default"].all_names() == ["a", "b"]
    tuner.override_experts([(first, "b")])
    verbs[verb]()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny("llama", num_hidden_layers=2), tmp_path).eval()
    assert torch.equal(loaded(**tiny_inputs("llama")).logits, model(**tiny_inputs("llama")).logits)


@torch.no_grad()
def test_the_last_expert_of_a_layer_may_go_while_others_are_off_elsewhere(tiny, tiny_inputs) -> None:
    model = moa(tiny, num_experts=8, experts=["a", "b"])
    tuner, (first, second) = model.base_model, (layer.path for layer in expert_layers(model))
    tuner.keep_experts({second: ["a"]})
    tuner.override_experts([(first, "a")])
    tuner.remove_expert("a")
    assert [layer.path for layer in expert_layers(model)] == [first]
    assert torch.isfinite(model(**tiny_inputs("llama")).logits).all()


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ([], "expert_overrides"),
        ({"of": []}, r"and nothing else, such as \{'off': \[\['model.layers.0.mlp.down_proj', 'law'\]\]\}"),
        ({"mode": "max"}, "is unknown"),
        ({"off": [["x"]]}, r"must be a list of \[module, expert\], such as \[\['model.*', 'law'\]\]"),
        ({"off": [[7]]}, r"must be a list of \[module, expert\]"),
        ({"on": [["x", "a", "1"]]}, r"must be a list of \[module, expert, number\]"),
        ({"scale": [["x", "a", float("inf")]]}, "expert_overrides"),
        ({"off": [["x", "a"]]}, "off: 0 layers are 'x'"),
    ],
)
def test_overrides_of_a_config_that_mean_nothing_are_refused(said: Any, message: str, tiny) -> None:
    base = tiny("llama", num_hidden_layers=2)
    before = [name for name, _ in base.named_modules()]
    with pytest.raises(ValueError, match=message):
        get_peft_model(base, MoAConfig(num_experts=2, target_modules=["down_proj"], expert_overrides=said))
    assert [name for name, _ in base.named_modules()] == before


# --- which experts ----------------------------------------------------------------------------------------------


@torch.no_grad()
def test_ftri_ranks_by_what_each_kind_of_text_uses(tiny, tiny_inputs) -> None:
    model = moa(tiny)
    one, other = ([tiny_inputs("llama", length=20, seed=s)] for s in (0, 1))
    for score in ("count", "weight"):
        ranked = ftri(model, one, other, score)
        expected = {}
        for layer in expert_layers(model):
            given = [choices(model, batches[0], layer) for batches in (one, other)]
            rates = [((g > 0) if score == "count" else g).double().mean(0) for g in given]
            expected |= {(layer.key, n): d for n, d in zip(layer.names, (rates[0] - rates[1]).tolist(), strict=True)}
        assert {r[:2]: r.difference for r in ranked} == pytest.approx(expected, abs=1e-6)
        assert [r.difference for r in ranked] == sorted((r.difference for r in ranked), reverse=True)
    with tune_experts(model, off=ranked[:1]):  # places as they are
        layer = next(layer for layer in expert_layers(model) if layer.key == ranked[0].layer)
        assert not choices(model, one[0], layer)[:, layer.names.index(ranked[0].expert)].any()


def test_usages_that_cannot_be_compared_are_refused(tiny, tiny_inputs) -> None:
    model, other = moa(tiny), moa(tiny, num_experts=3)
    usages = []
    for one in (model, other):
        with record_usage(one) as usage:
            one(**tiny_inputs("llama"))
        usages.append(usage)
    with pytest.raises(ValueError, match="of different experts"):
        rank_by_usage(*usages)
    with pytest.raises(ValueError, match="score='sum' is unknown"):
        ftri(model, [], [], "sum")
    with pytest.raises(ValueError, match="other holds no batch; give one"):
        ftri(model, [tiny_inputs("llama")], iter([]))
    with pytest.raises(ValueError, match=r"errors above 0"):
        selectivity((1.0, 2.0), (0.0, 1.0))
    assert selectivity((0.2, 6.0), (0.1, 0.2)) == pytest.approx(15)


class Domains(nn.Module):
    """Reads (N, 12): four numbers that say the domain, and eight others."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(12, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


def trained_on_domains(seed: int) -> tuple[Any, Any]:
    """A mixture that has learned a linear map for each of four domains, and what draws rows of a domain."""
    torch.manual_seed(seed)
    maps = torch.randn(4, 8, 8) / 3
    base = Domains()
    nn.init.zeros_(base.linear.weight)
    model = get_peft_model(
        base,
        MoAConfig(num_experts=4, r=8, target_modules=["linear"], num_experts_per_tok=1, router_aux_loss_coef=0.05),
    )

    def draw(domain: Tensor) -> tuple[Tensor, Tensor]:
        read = torch.randn(len(domain), 8)
        code = 2 * torch.nn.functional.one_hot(domain, 4).float()
        return torch.cat([code, read], 1), torch.einsum("nij,nj->ni", maps[domain], read)

    optimizer = torch.optim.Adam((p for p in model.parameters() if p.requires_grad), lr=0.01)
    for _ in range(150):
        x, y = draw(torch.randint(4, (128,)))
        context = model.base_model.context
        loss = (model(x) - y).square().mean() + sum(context.record.losses.values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval(), draw


@pytest.mark.slow
def test_the_expert_that_ftri_finds_is_more_selective_than_one_at_random() -> None:
    ours, others = [], []
    for seed in range(3):
        model, draw = trained_on_domains(seed)
        rows = [draw(torch.full((200,), domain)) for domain in range(4)]

        def errors() -> list[float]:
            with torch.no_grad():
                return [float((model(x) - y).square().mean()) for x, y in rows]  # noqa: B023

        before = errors()
        ranked = ftri(model, [{"x": rows[0][0]}], [{"x": x} for x, _ in rows[1:]])
        found = {}
        for place in ranked:
            with tune_experts(model, off=[place]):
                after = errors()
            found[place.expert] = selectivity((before[0], after[0]), (sum(before[1:]), sum(after[1:])))
        ours.append(found[ranked[0].expert])
        others.append(sum(found.values()) / len(found))
    assert all(one > other for one, other in zip(ours, others, strict=True)), (ours, others)


def test_a_mixture_whose_config_keeps_nothing_is_tuned_in_blocks(tiny, tiny_inputs) -> None:
    model = get_peft_model(
        tiny("llama", num_hidden_layers=2), MixDAConfig(domains=["law", "code"], init_weights=False)
    )
    model.eval()
    inputs = tiny_inputs("llama")
    layer = expert_layers(model)[0]
    with tune_experts(model, off=[(layer.key, "law")]):
        assert not choices(model, inputs, layer)[:, 0].any()
