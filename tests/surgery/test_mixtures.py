"""Our mixtures as layers of experts: what is seen of them behind every router, and what they weigh."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from mixadapters import ROUTERS, MixDAConfig, MoAConfig
from mixadapters.core.bank import Weights
from mixadapters.surgery.compressing import compress_experts
from mixadapters.surgery.function import expert_norms
from mixadapters.surgery.layers import expert_layers
from mixadapters.surgery.mixtures import MixtureExperts, _Outputs
from mixadapters.surgery.pruning import prune_experts
from mixadapters.surgery.reporting import report
from mixadapters.surgery.tuning import tune_experts
from mixadapters.surgery.usage import ExpertUsage, LayerUsage, _Seen, record_usage
from mixadapters.surgery.view import Routed, expert_output

ROUTED = sorted(name for name in ROUTERS if not name.startswith("toy_") and name not in ("single", "modality"))
OPTIONS: dict[str, dict[str, Any]] = {"top_p": {"p": 0.8}, "tree": {"gamma": 10.0}}
ENCODERS = ("expert_choice",)  # refused in causal models


def randomised(model: nn.Module) -> nn.Module:
    """With adapters that do something."""
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if "moa_" in name or "mixda_" in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model.eval()


def moa(tiny: Any, router: str = "top_k", kind: str = "llama", **options: Any) -> Any:
    spec = {"kind": router, **OPTIONS.get(router, {})}
    scope = {"router_scope": "model"} if router == "counts" else {}
    config = MoAConfig(**{
        "num_experts": 4, "r": 3, "router": spec, "target_modules": ["down_proj"] if kind == "llama" else
        r".*layer\.\d+\.output\.dense", **scope, **options})  # fmt: skip
    model = get_peft_model(tiny(kind, num_hidden_layers=2), config)
    if router == "counts":
        texts = {f"expert{i}": [list(range(5 + 20 * i, 30 + 20 * i))] for i in range(4)}
        model.base_model.fit_gate(texts, general=[list(range(5, 90))])
    randomised(model)
    if router == "arrow":
        model.base_model.fit_router()
    return model


def hand_count(model: Any, inputs: dict[str, Tensor]) -> dict[str, dict[str, Any]]:
    """By path, from what the op is given: tokens, mass and saliency of each expert, padding left out."""
    real, found = inputs["attention_mask"].bool().flatten(), {}
    for layer in expert_layers(model):
        mixture: Any = layer.mixture  # type: ignore[attr-defined]

        def look(source: Tensor, context: Any, mixture: Any = mixture, path: str = layer.path) -> Any:
            routing = type(mixture).dispatch(mixture, source, context)
            bank, tokens = mixture.bank, source.flatten(0, -2)
            count = len(bank.names)
            sums = found[path] = {"tokens": [0] * count, "mass": [0.0] * count, "saliency": [0.0] * count}
            every = bank.weights(None)
            for row in real.nonzero().flatten().tolist():
                chosen = range(count) if routing.indices is None else routing.indices[row].tolist()
                for slot, e in enumerate(chosen):
                    if e >= 0:
                        weight = 1.0 if routing.weights is None else float(routing.weights[row, slot])
                        output = F.linear(F.linear(tokens[row], every[e].down), every[e].up) * every[e].scale
                        sums["tokens"][e] += 1
                        sums["mass"][e] += weight
                        sums["saliency"][e] += weight * float(output.norm())
            return routing

        mixture.__dict__["dispatch"] = look
    model(**inputs)
    for layer in expert_layers(model):
        del layer.mixture.__dict__["dispatch"]  # type: ignore[attr-defined]
    return found


@pytest.mark.parametrize("router", ROUTED)
@torch.no_grad()
def test_usage_is_a_hand_count(router: str, tiny: Any, tiny_inputs: Any) -> None:
    kind = "bert" if router in ENCODERS else "llama"
    model = moa(tiny, router, kind)
    inputs = tiny_inputs(kind, padding="right")
    if router == "task":
        inputs["expert_ids"] = torch.tensor([2, 0])
    plain = model(**inputs).logits
    with record_usage(model, samples=5) as usage:
        recorded = model(**inputs).logits
        copy.deepcopy(model)(**inputs)  # is another model, and not watched
    assert torch.equal(plain, recorded)
    found = hand_count(model, inputs)
    assert len(found) == len(usage.layers) == 2
    for layer in expert_layers(model):
        mine, hand = usage[layer.key], found[layer.path]
        assert mine.names == layer.names == ("expert0", "expert1", "expert2", "expert3")
        assert mine.tokens.tolist() == hand["tokens"]
        torch.testing.assert_close(mine.mass.tolist(), hand["mass"], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(mine.saliency.tolist(), hand["saliency"], rtol=1e-4, atol=1e-5)
        assert int(mine.rows) == int(inputs["attention_mask"].sum())
        assert mine.logits.shape == (5, 4)
        assert sum(hand["tokens"])


def test_experts_without_weights_here_and_shared_ones_are_none_of_a_layer(tiny: Any, tiny_inputs: Any) -> None:
    """One router for the whole model numbers all experts, of which each layer has some."""
    config = MoAConfig(
        num_experts={"0": 2, "1": 4}, r=3, n_shared_experts=1, router_scope="model", target_modules=["down_proj"]
    )
    model = randomised(get_peft_model(tiny("llama", num_hidden_layers=2), config))
    first, second = expert_layers(model)
    assert (first.names, len(second.names)) == (("expert0", "expert1"), 4)
    assert second.router == first.router == first.key != second.key
    inputs = tiny_inputs("llama")
    with record_usage(model) as usage:
        model(**inputs)
    assert int(usage[second.key].tokens.sum()) == 2 * 14
    assert usage[first.key].tokens.tolist() == usage[second.key].tokens.tolist()[:2]


def test_labels_part_a_usage_and_sum_to_it(tiny: Any, tiny_inputs: Any) -> None:
    model, inputs = moa(tiny), tiny_inputs("llama", padding="left")
    with record_usage(model, labels=["law", "code"]) as usage:
        model(**inputs)
        usage.labels = ["code", "code"]
        model(**inputs)
    law, code = usage.by_label["law"], usage.by_label["code"]
    lengths = inputs["attention_mask"].sum(1).tolist()
    for key, whole in usage.layers.items():
        assert int(law[key].rows) == lengths[0]
        assert int(code[key].rows) == lengths[0] + 2 * lengths[1]
        both = law[key] + code[key]
        for name in ("tokens", "mass", "saliency", "pairs", "rows", "entropy"):
            torch.testing.assert_close(getattr(both, name), getattr(whole, name))
    with record_usage(model, labels=["law"]), pytest.raises(ValueError, match="labels"):
        model(**inputs)
    with pytest.raises(ValueError, match="list of strings"), record_usage(model, labels="law"):  # type: ignore[arg-type]
        pass
    with record_usage(model) as usage:
        usage.labels = "ab"
        with pytest.raises(ValueError, match="list of strings"):
            model(**inputs)


def test_two_usages_add_and_a_file_brings_them_back(tiny: Any, tiny_inputs: Any, tmp_path: Any) -> None:
    model, halves = moa(tiny), [tiny_inputs("llama", seed=seed) for seed in (1, 2)]
    parts = []
    for half in halves:
        with record_usage(model, labels=["a", "b"], samples=9) as usage:
            model(**half)
        parts.append(usage)
    with record_usage(model, labels=["a", "b"], samples=9) as whole:
        for half in halves:
            model(**half)
    total = parts[0] + parts[1]
    for key, layer in whole.layers.items():
        for name in ("tokens", "mass", "saliency", "pairs", "rows", "entropy"):
            torch.testing.assert_close(getattr(total[key], name), getattr(layer, name))
        assert len(total[key].logits) == 9
    whole.save(tmp_path / "usage.safetensors")
    loaded = ExpertUsage.load(tmp_path / "usage.safetensors")
    assert list(loaded.by_label) == ["a", "b"]
    for usage, again in ((whole, loaded), (whole.by_label["b"], loaded.by_label["b"])):
        for key, layer in usage.layers.items():
            assert again[key].names == layer.names
            assert all(torch.equal(getattr(again[key], n), getattr(layer, n)) for n in ("tokens", "logits", "pairs"))
    (tmp_path / "broken").write_bytes(b"\x00" * 40)
    with pytest.raises(ValueError, match=r"no file that ExpertUsage\.save has written"):
        ExpertUsage.load(tmp_path / "broken")


@pytest.mark.parametrize(
    ("other", "told"),
    [
        ({"r": 4}, "by 3, and here it is llama: .* by 4"),
        ({"hidden_size": 48, "r": 3}, r"and here it is llama: \d+ to 48"),
    ],
)
def test_a_usage_of_another_model_with_equal_names_is_refused(
    tiny: Any, tiny_inputs: Any, tmp_path: Any, other: dict[str, int], told: str
) -> None:
    """Whose layers and experts have the same names: other ranks, other widths."""
    model, inputs = moa(tiny), tiny_inputs("llama")
    with torch.no_grad(), record_usage(model) as usage:
        model(**inputs)
    usage.save(tmp_path / "usage")
    usage = ExpertUsage.load(tmp_path / "usage")
    prune_experts(model, usage, 2, dry_run=True)
    options = dict(other)
    rank, sizes = options.pop("r"), options
    config = MoAConfig(num_experts=4, r=rank, target_modules=["down_proj"], init_weights=False)
    stranger = get_peft_model(tiny("llama", num_hidden_layers=2, **sizes), config)
    assert [layer.names for layer in expert_layers(stranger)] == [u.names for u in usage.layers.values()]
    for verb in (lambda: prune_experts(stranger, usage, 2), lambda: report(stranger, usage)):
        with pytest.raises(ValueError, match=rf"{told}.*: it was recorded in another model"):
            verb()
    with torch.no_grad(), record_usage(stranger) as theirs:
        stranger(**inputs)
    with pytest.raises(ValueError, match="they are of different models"):
        usage + theirs


def test_a_file_of_before_models_were_told_apart_is_read(tiny: Any, tiny_inputs: Any, tmp_path: Any) -> None:
    model = moa(tiny)
    with torch.no_grad(), record_usage(model) as usage:
        model(**tiny_inputs("llama"))
    usage.save(tmp_path / "new")
    with safe_open(str(tmp_path / "new"), "pt") as opened:
        tensors, told = {key: opened.get_tensor(key) for key in opened.keys()}, opened.metadata()  # noqa: SIM118
    said = [{k: v for k, v in entry.items() if k not in ("form", "units")} for entry in json.loads(told["layers"])]
    save_file(tensors, tmp_path / "old", metadata={"mixadapters_usage": "1", "layers": json.dumps(said)})
    old = ExpertUsage.load(tmp_path / "old")
    assert prune_experts(model, old, 2, dry_run=True) == prune_experts(model, usage, 2, dry_run=True)
    both = old + usage
    assert next(iter(both.layers.values())).form.startswith("llama: ")
    save_file(tensors, tmp_path / "odd", metadata={"mixadapters_usage": "2", "layers": json.dumps(said)})
    with pytest.raises(ValueError, match="is no layer"):
        ExpertUsage.load(tmp_path / "odd")


def test_generation_is_recorded_token_by_token(tiny: Any, tiny_inputs: Any) -> None:
    model, inputs = moa(tiny), tiny_inputs("llama", padding="left")
    with record_usage(model, labels=["a", "b"]) as usage:
        made = model.generate(**inputs, max_new_tokens=4, min_new_tokens=4, num_beams=2, do_sample=False)
    rows = int(inputs["attention_mask"].sum()) * 2 + 3 * 4  # beams read the prompt twice; the last token is not read
    assert made.shape[1] == inputs["input_ids"].shape[1] + 4
    assert {int(layer.rows) for layer in usage.layers.values()} == {rows}
    assert sum(int(one.layers[key].rows) for one in usage.by_label.values() for key in list(one.layers)[:1]) == rows


def test_rows_of_other_adapters_do_not_count(tiny: Any, tiny_inputs: Any) -> None:
    model, inputs = moa(tiny), tiny_inputs("llama")
    model.add_adapter("other", MoAConfig(num_experts=2, r=3, target_modules=["down_proj"]))
    with record_usage(model) as usage:
        model(**inputs, adapter_names=["other", "default"])
    assert all(int(layer.rows) == 7 for layer in usage.layers.values())
    assert {layer.adapter for layer in usage.layers.values()} == {"default", "other"}
    with pytest.raises(ValueError, match=r"adapter='third' is unknown; have \['default', 'other'\]"):
        expert_layers(model, "third")
    plain = get_peft_model(tiny("llama"), LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(ValueError, match=r"adapter='default': the model's adapters are of \['LORA'\].*MoAConfig"):
        expert_layers(plain, "default")
    with pytest.raises(ValueError, match="no routed experts"), record_usage(model, adapter=""):
        pass


@pytest.mark.parametrize("kind", ["lora", "bottleneck", "glu"])
def test_weights_say_what_an_expert_does_and_are_written_in_place(kind: str, tiny: Any, tiny_inputs: Any) -> None:
    model, inputs = (
        moa(tiny, expert_type=kind, target_modules=None if kind != "lora" else ["down_proj"]),
        tiny_inputs("llama"),
    )
    layer: Any = expert_layers(model)[0]
    x, before = torch.randn(3, layer.width), model(**inputs).logits
    weights, output = layer.weights(1), layer.run(1, torch.ones(3, layer.width))
    torch.testing.assert_close(layer.run(1, x), expert_output(weights, layer.activation, x))
    layer.set_weights(1, weights._replace(scale=2 * weights.scale))
    torch.testing.assert_close(layer.run(1, torch.ones(3, layer.width)), 2 * output)
    layer.set_weights(1, layer.weights(1)._replace(scale=0.5 * weights.scale))
    torch.testing.assert_close(model(**inputs).logits, before)
    with pytest.raises(ValueError, match="do not fit the experts"):
        layer.set_weights(1, weights._replace(up=weights.up[:-1]))


@pytest.mark.parametrize("parts", ["plain", "biases", "gated", "norm"])
def test_norms_are_those_of_the_outputs(parts: str) -> None:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    every = []
    for e in range(3):
        weights = Weights(draw(4, 8), draw(9, 4), scale=torch.tensor([-0.5 - e]) if e else 2.0)
        if parts != "plain":
            weights = weights._replace(b_down=draw(4), b_up=draw(9) if e else None)
        if parts == "gated":
            weights = weights._replace(gate=draw(4, 8), b_gate=draw(4))
        if parts == "norm":
            weights = weights._replace(norm=(draw(8), draw(8)))
        every.append(weights)
    x = draw(5, 8)
    found = expert_norms(every, "gelu", x)
    for e, weights in enumerate(every):
        torch.testing.assert_close(found[:, e], expert_output(weights, "gelu", x).norm(dim=-1), rtol=1e-4, atol=1e-5)


def test_domains_of_mixda_are_layers_too(tiny: Any, tiny_inputs: Any) -> None:
    config = MixDAConfig(domains=["law", "code"], domain_layers=[0, 1])
    model = randomised(get_peft_model(tiny("llama", num_hidden_layers=2), config))
    layers = expert_layers(model)
    assert all(isinstance(layer, MixtureExperts) and layer.names == ("law", "code") for layer in layers)
    with record_usage(model) as usage:
        model(**tiny_inputs("llama", padding="right"))
    assert all(layer.tokens.tolist() == [int(layer.rows)] * 2 for layer in usage.layers.values())


@torch.no_grad()
def test_experts_of_a_merged_adapter_are_neither_watched_nor_written(tiny: Any, tiny_inputs: Any) -> None:
    """The frozen layer computes what they did: all of it would be without effect, until they are unmerged."""
    config = MoAConfig(num_experts=3, r=2, target_modules=["down_proj"], router="constant")
    model: Any = randomised(get_peft_model(tiny("llama", num_hidden_layers=2), config))
    inputs = tiny_inputs("llama")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.merge_adapter()
    layer = expert_layers(model)[0]

    def recorded() -> None:
        with record_usage(model):
            model(**inputs)

    def tuned() -> None:
        with tune_experts(model, off=[(layer.key, 0)]):
            model(**inputs)

    for verb in (
        recorded, tuned, lambda: layer.set_weights(0, layer.weights(1)),
        lambda: compress_experts(model, [inputs], method="lowrank_sparse"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=r"adapter 'default' is merged into .*: unmerge it first"):
            verb()
    model.unmerge_adapter()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    recorded()
    tuned()


def test_layers_of_one_router_lose_the_experts_that_one_of_them_loses(tiny: Any) -> None:
    config = MoAConfig(num_experts=4, r=2, target_modules=["down_proj"], router_scope="model")
    model = randomised(get_peft_model(tiny("llama", num_hidden_layers=2), config))
    expert_layers(model)[0].keep([0, 2, 3])
    assert [layer.names for layer in expert_layers(model)] == [("expert0", "expert2", "expert3")] * 2


@pytest.mark.parametrize(
    ("fields", "competes"),
    [({}, True), ({"norm_topk_prob": True}, False), ({"router": {"kind": "top_k", "scoring_func": "sigmoid"}}, False)],
)
def test_experts_compete_where_what_one_gets_the_others_lack(
    fields: dict[str, Any], competes: bool, tiny: Any
) -> None:
    config = MoAConfig(num_experts=4, r=2, target_modules=["down_proj"], **{"router": "top_k", **fields})
    model = get_peft_model(tiny("llama", num_hidden_layers=2), config)
    assert [layer.competes for layer in expert_layers(model)] == [competes] * 2


def test_slots_without_an_expert_have_no_norm(tiny: Any) -> None:
    config = MoAConfig(num_experts=3, r=2, target_modules=["down_proj"])
    layer: Any = expert_layers(randomised(get_peft_model(tiny("llama", num_hidden_layers=2), config)))[0]
    read, indices = torch.randn(4, layer.width), torch.tensor([[0, -1], [-1, 2], [1, 0], [-1, -1]])
    found = _Outputs(layer, read, indices)
    torch.testing.assert_close(found.norms(), found.outputs().norm(dim=-1), rtol=1e-4, atol=1e-6)
    assert bool((found.norms() > 0).eq(indices >= 0).all())


def test_what_is_taken_away_counts_as_what_is_added() -> None:
    usage, weights = LayerUsage.empty("layer", "", ["a", "b"]), torch.tensor([[-0.5], [2.0]])
    routed = Routed(torch.zeros(2, 4), torch.tensor([[0], [1]]), weights, None, None, None, lambda: torch.ones(2, 1))
    usage.add(_Seen(routed), None, torch.rand(2).double())
    assert usage.saliency.tolist() == [0.5, 2.0]
    assert usage.mass.tolist() == [-0.5, 2.0]


def test_a_sum_of_usages_keeps_as_many_rows_as_the_larger_one() -> None:
    parts = []
    for samples in (8, 3):
        part = LayerUsage.empty("layer", "", ["a"], samples)
        part._sample(torch.randn(20, 1), torch.rand(20).double())
        parts.append(part)
    for one, other in (parts, parts[::-1]):
        whole = one + other
        assert whole.samples == 8
        assert len(whole.logits) == 8
