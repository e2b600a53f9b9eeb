"""Domains that come and go: gathered from other adapters, added, removed, saved with what they leave behind."""

from __future__ import annotations

import copy
import json
from functools import partial
from pathlib import Path
from typing import Any

import adapted
import pytest
import torch
from adapted import logits
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from mixadapters import BottleneckConfig, MixDAConfig

LAYERS_OF = {"a": [0, 2], "b": [2, 3]}  # domains differ in layers ...
RANK_OF = {"a": 3, "b": 5}  # ... and in rank


randomize = partial(adapted.randomize, trained=True, evaluation=True)


def tuner(model: nn.Module) -> Any:
    return model.base_model


def mixtures(model: nn.Module, adapter_name: str = "default") -> dict[str, Any]:
    return dict(tuner(model)._mixtures(adapter_name))


def experts(model: nn.Module, domain: str) -> dict[str, Tensor]:
    """{layer and parameter: tensor} of one domain."""
    return {
        f"{path.split('layers.')[-1].split('layer.')[-1].split('.')[0]}.{name}": p.detach()
        for path, mixture in mixtures(model).items()
        if domain in mixture.bank.experts
        for name, p in mixture.bank.experts[domain].named_parameters()
    }


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def save_mixda(tiny: Any, folder: Path, name: str, kind: str = "llama", seed: int = 0, **fields: Any) -> nn.Module:
    """A trained stage-1 adapter of type MIXDA in `folder`."""
    config = {"r": RANK_OF.get(name, 4), "domain_layers": LAYERS_OF.get(name, [1]), "task_adapter": None, **fields}
    model = get_peft_model(tiny(kind), MixDAConfig(domains=[name], **config))
    randomize(model, seed=seed + ord(name[0]), only=".bank.")
    model.save_pretrained(folder / name)
    return model


def save_bottleneck(tiny: Any, folder: Path, name: str, kind: str = "llama", head: str | None = None, **fields: Any):
    """A trained adapter of type BOTTLENECK that a mixture can gather."""
    config = {
        "r": RANK_OF.get(name, 4), "layers_to_transform": LAYERS_OF.get(name, [1]), "placement": "parallel",
        "adapter_input": "ffn_intermediate", **fields,
    }  # fmt: skip
    model = get_peft_model(tiny(kind, head), BottleneckConfig(**config))
    randomize(model, seed=ord(name[0]))
    model.save_pretrained(folder / name)
    return model


def gather(tiny: Any, domains: Any, kind: str = "llama", head: str | None = None, **fields: Any) -> nn.Module:
    return get_peft_model(tiny(kind, head), MixDAConfig(domains=domains, **fields)).eval()


# --- gathering ---------------------------------------------------------------------------------------------------


def test_domains_are_gathered_with_their_own_ranks_and_layers(tiny, tmp_path) -> None:
    one = save_mixda(tiny, tmp_path, "a")
    save_bottleneck(tiny, tmp_path, "b")
    model = gather(tiny, {"a": str(tmp_path / "a"), "b": tmp_path / "b"})
    found = {int(path.split(".")[2]): m.bank for path, m in mixtures(model).items()}
    assert {layer: bank.names for layer, bank in found.items()} == {0: ["a"], 2: ["a", "b"], 3: ["b"]}
    assert {name: e.rank for name, e in found[2].experts.items()} == RANK_OF
    assert same(experts(model, "a"), experts(one, "a"))


@pytest.mark.parametrize("save", [save_mixda, save_bottleneck])
def test_gathered_domain_computes_what_its_source_computed(tiny, tiny_inputs, tmp_path, save) -> None:
    inputs = tiny_inputs("llama", padding="right")
    source = save(tiny, tmp_path, "a")
    if save is save_mixda:
        inputs["domain_ids"] = torch.tensor([0, 0])
    expected = logits(source, inputs)
    assert not torch.allclose(expected, logits(tiny("llama"), tiny_inputs("llama", padding="right")), atol=1e-2)
    save_bottleneck(tiny, tmp_path, "b")
    model = gather(tiny, {"b": str(tmp_path / "b"), "a": str(tmp_path / "a")})
    ids = tuner(model).domain_ids(["a", "a"])
    assert torch.equal(ids, torch.tensor([1, 1]))
    found = logits(model, {**tiny_inputs("llama", padding="right"), "domain_ids": ids})
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    base = logits(tiny("llama"), tiny_inputs("llama", padding="right"))
    none = {**tiny_inputs("llama", padding="right"), "domain_ids": tuner(model).domain_ids(["__base__", "__base__"])}
    assert torch.equal(logits(model, none), base)


@pytest.mark.parametrize("gate", ["softmax", "sigmoid"])
@pytest.mark.parametrize("combine", ["delta", "convex"])
def test_order_of_domains_does_not_matter(tiny, tiny_inputs, tmp_path, gate, combine) -> None:
    inputs = tiny_inputs("llama", padding="right")
    for name in "ab":
        save_mixda(tiny, tmp_path, name, combine=combine)
    fields = {"gate": gate, "combine": combine, "task_adapter": None}
    paths = {name: str(tmp_path / name) for name in "ab"}
    one = gather(tiny, paths, **fields)
    other = gather(tiny, dict(reversed(paths.items())), **fields)
    randomize(one, only="router")
    for path, mixture in mixtures(one).items():
        ours, theirs = mixture.router, mixtures(other)[path].router
        assert set(ours.arms) == set(theirs.arms)
        order = [ours.arms.index(arm) for arm in theirs.arms]
        theirs.output.weight.data.copy_(ours.output.weight[order])
        theirs.output.bias.data.copy_(ours.output.bias[order])
    assert list(tuner(one).peft_config["default"].domains) == ["a", "b"]
    assert list(tuner(other).peft_config["default"].domains) == ["b", "a"]
    torch.testing.assert_close(logits(one, inputs), logits(other, inputs), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(logits(one, inputs), logits(tiny("llama"), inputs), atol=1e-2)


def test_one_of_several_domains_is_taken_by_its_name(tiny, tmp_path) -> None:
    source = get_peft_model(tiny("llama"), MixDAConfig(domains=["x", "y"], domain_layers=[1, 3], task_adapter=None))
    randomize(source, only=".bank.")
    source.save_pretrained(tmp_path)
    model = gather(tiny, {"y": str(tmp_path)})
    assert same(experts(model, "y"), experts(source, "y"))
    assert not same(experts(model, "y"), experts(source, "x"))
    with pytest.raises(ValueError, match=r"domains\['z'\].*has no domain 'z'; it has \['x', 'y'\]"):
        gather(tiny, {"z": str(tmp_path)})


def test_only_domain_of_a_source_may_take_another_name(tiny, tmp_path) -> None:
    source = save_mixda(tiny, tmp_path, "a")
    model = gather(tiny, {"renamed": str(tmp_path / "a")})
    assert same(experts(model, "renamed"), experts(source, "a"))


def test_new_and_gathered_domains_mix(tiny, tiny_inputs, tmp_path) -> None:
    source = save_mixda(tiny, tmp_path, "a")
    model = gather(tiny, {"a": str(tmp_path / "a"), "new": None}, r=7, domain_layers=[0, 1])
    assert same(experts(model, "a"), experts(source, "a"))
    assert {path.split(".")[2]: m.bank.names for path, m in mixtures(model).items()} == {
        "0": ["a", "new"], "1": ["new"], "2": ["a"],
    }  # fmt: skip
    ids = tuner(model).domain_ids(["new", "new"])
    inputs = tiny_inputs("llama")
    assert torch.equal(logits(model, {**inputs, "domain_ids": ids}), logits(tiny("llama"), inputs))


def test_domain_of_a_backbone_fits_a_model_with_a_head(tiny, tiny_inputs, tmp_path) -> None:
    """Stage 1 without a head (a contrastive loss, say), stage 2 with one: the paths differ by a prefix."""
    source = save_bottleneck(tiny, tmp_path, "a", "bert", "base")
    model = gather(tiny, {"a": str(tmp_path / "a")}, "bert", "sequence_classification")
    found = experts(model, "a")
    assert found.keys() == {f"{i}.{p}" for i in (0, 2) for p in ("down.weight", "down.bias", "up.weight", "up.bias")}
    for name, parameter in source.named_parameters():
        if ".experts.adapter." in name:
            layer, rest = name.split("layer.")[1].split(".", 1)[0], name.split(".experts.adapter.")[1]
            assert torch.equal(found[f"{layer}.{rest}"], parameter)
    back = gather(tiny, {"a": str(save_of(model, tmp_path / "back"))}, "bert", "base")
    assert same(experts(back, "a"), found)


def save_of(model: nn.Module, folder: Path) -> Path:
    model.save_pretrained(folder)
    return folder


def test_gathered_mixture_saves_whole_and_needs_its_sources_no_more(tiny, tiny_inputs, tmp_path) -> None:
    inputs = tiny_inputs("llama", padding="right")
    for name in "ab":
        save_mixda(tiny, tmp_path, name)
    model = gather(tiny, {"b": str(tmp_path / "b"), "a": str(tmp_path / "a")})
    randomize(model)
    expected = logits(model, inputs)
    model.save_pretrained(tmp_path / "mixture")
    for name in "ab":
        for file in (tmp_path / name).iterdir():
            file.unlink()
        (tmp_path / name).rmdir()
    loaded = PeftModel.from_pretrained(tiny("llama"), tmp_path / "mixture")
    assert torch.equal(logits(loaded, inputs), expected)
    assert list(tuner(loaded).peft_config["default"].domains) == ["b", "a"]  # although JSON is sorted
    assert torch.equal(tuner(loaded).domain_ids(["b", "a"]), torch.tensor([0, 1]))


def test_order_of_domains_survives_sorted_json(tiny, tiny_inputs, tmp_path) -> None:
    inputs = tiny_inputs("llama")
    model = gather(tiny, ["z", "m", "a"], domain_layers=[1, 2])
    randomize(model)
    model.save_pretrained(tmp_path)
    assert list(json.loads((tmp_path / "adapter_config.json").read_text())["domains"]) == ["a", "m", "z"]
    loaded = PeftModel.from_pretrained(tiny("llama"), tmp_path)
    ids = tuner(loaded).domain_ids(["z", "a"])
    assert torch.equal(ids, tuner(model).domain_ids(["z", "a"]))
    for extra in ({}, {"domain_ids": ids}):
        assert torch.equal(logits(loaded, {**inputs, **extra}), logits(model, {**inputs, **extra}))


def test_one_config_gathers_for_several_models(tiny, tmp_path) -> None:
    """As in a loop over seeds: the second model must not get empty domains of the right shape."""
    save_mixda(tiny, tmp_path, "a")
    config = MixDAConfig(domains={"a": str(tmp_path / "a")})
    one, other = (get_peft_model(tiny("llama"), config) for _ in range(2))
    assert same(experts(one, "a"), experts(other, "a"))
    assert any(tensor.abs().max() > 0 for name, tensor in experts(other, "a").items() if "up.weight" in name)


def test_revision_of_a_source_reaches_the_hub(tiny, tmp_path, monkeypatch) -> None:
    from mixadapters.tuners import sources as module

    save_mixda(tiny, tmp_path, "a")
    asked = []
    for owner, verb in ((module.PeftConfig, "from_pretrained"), (module, "load_peft_weights")):
        real = getattr(owner, verb)

        def spy(source: str, *, revision: Any, real: Any = real, **options: Any) -> Any:
            asked.append((source, revision))
            return real(str(tmp_path / "a"), **options)

        monkeypatch.setattr(owner, verb, spy)
    gather(tiny, {"a": {"source": "user/name", "revision": "v2"}})
    assert asked == [("user/name", "v2")] * 2


def test_gathered_domains_are_frozen_in_the_task_stage_and_train_in_the_domain_stage(tiny, tmp_path) -> None:
    save_mixda(tiny, tmp_path, "a")
    model = gather(tiny, {"a": str(tmp_path / "a")})
    for stage, inside in (("task", (".router.", ".task.")), ("domain", (".bank.experts.a.",))):
        tuner(model).set_stage(stage)
        trained = [n for n, p in model.named_parameters() if p.requires_grad]
        assert all(any(part in name for part in inside) for name in trained)
        assert all(any(part in name for name in trained) for part in inside)


# --- what cannot be gathered -------------------------------------------------------------------------------------


def test_source_that_is_no_folder_is_an_error(tiny, tmp_path) -> None:
    with pytest.raises(ValueError, match=r"domains\['a'\].*cannot be read as an adapter folder or hub id"):
        gather(tiny, {"a": str(tmp_path / "missing")})
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"domains\['a'\].*cannot be read"):
        gather(tiny, {"a": str(tmp_path / "empty")})


def test_source_of_another_type_is_an_error(tiny, tmp_path) -> None:
    get_peft_model(tiny("llama"), LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is a LORA adapter; domains are gathered from BOTTLENECK or MIXDA"):
        gather(tiny, {"a": str(tmp_path)})


def test_source_without_weights_of_the_domain_is_an_error(tiny, tmp_path) -> None:
    from safetensors.torch import load_file, save_file

    save_mixda(tiny, tmp_path, "a", task_adapter="pfeiffer")
    file, config = tmp_path / "a" / "adapter_model.safetensors", tmp_path / "a" / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "digest": None}))  # as older versions saved
    weights = load_file(file)
    save_file({name: w for name, w in weights.items() if ".task." in name}, file)
    with pytest.raises(ValueError, match="holds no weights of a domain adapter: none of its 16 keys fits"):
        gather(tiny, {"a": str(tmp_path / "a")})
    save_file({name: w for name, w in weights.items() if not name.endswith("down.bias")}, file)
    with pytest.raises(ValueError, match=r"has \['down.weight', .*'up.weight'\] at .*, expected \['down.bias'"):
        gather(tiny, {"a": str(tmp_path / "a")})


def test_source_of_another_width_is_an_error(tiny, tmp_path) -> None:
    save_mixda(tiny, tmp_path, "a", "llama")
    with pytest.raises(ValueError, match=r"down.weight at .* is \(3, 48\) in the source, expected \(3, 64\)"):
        get_peft_model(tiny("llama", intermediate_size=64), MixDAConfig(domains={"a": str(tmp_path / "a")}))


def test_source_that_holds_no_finite_numbers_is_an_error(tiny, tmp_path) -> None:
    model = save_mixda(tiny, tmp_path, "a")
    with torch.no_grad():
        next(iter(mixtures(model).values())).bank.experts["a"].up.weight[0, 0] = float("nan")
    model.save_pretrained(tmp_path / "a")
    with pytest.raises(ValueError, match=r"up.weight at .*layers.0.mlp.down_proj' holds values that are not finite"):
        gather(tiny, {"a": str(tmp_path / "a")})


def test_source_of_other_modules_is_an_error(tiny, tmp_path) -> None:
    save_mixda(tiny, tmp_path, "a", "llama")
    with pytest.raises(ValueError, match=r"adapts 'model.layers.0.mlp.down_proj', which is no domain site of this"):
        gather(tiny, {"a": str(tmp_path / "a")}, "bert")
    with pytest.raises(ValueError, match=r"adapts 'model.layers.2.mlp.down_proj', which is no domain site"):
        get_peft_model(tiny("llama", num_hidden_layers=2), MixDAConfig(domains={"a": str(tmp_path / "a")}))


def named(model: nn.Module, name: str) -> nn.Module:
    model.config._name_or_path = model.name_or_path = name
    return model


def test_source_of_another_base_model_is_an_error_unless_allowed(tiny, tmp_path) -> None:
    source = get_peft_model(named(tiny("llama"), "org/one"), MixDAConfig(domains=["a"], domain_layers=[1]))
    source.save_pretrained(tmp_path)
    other = named(tiny("llama"), "org/two")
    with pytest.raises(
        ValueError, match=r"was trained on 'org/one', this model is 'org/two'.*'check_base_model': False"
    ):
        get_peft_model(copy.deepcopy(other), MixDAConfig(domains={"a": str(tmp_path)}))
    get_peft_model(named(tiny("llama"), "org/one"), MixDAConfig(domains={"a": str(tmp_path)}))
    model = get_peft_model(other, MixDAConfig(domains={"a": {"source": str(tmp_path), "check_base_model": False}}))
    assert same(experts(model, "a"), experts(source, "a"))


@pytest.mark.parametrize(
    ("save", "fields", "message"),
    [
        (save_mixda, {"activation": "relu"}, "trained with activation='relu', this mixture has 'gelu'"),
        (
            save_mixda,
            {"adapter_glu": True},
            "glu=True, .* make the mixture with adapter_glu=True, or leave this source",
        ),
        (save_mixda, {"adapter_layer_norm": True}, "layer_norm=True"),
        (save_mixda, {"combine": "convex"}, "combine='convex', this mixture has 'delta'"),
        (save_mixda, {"adapter_input": "ffn_input"}, "adapter_input='ffn_input', this mixture has 'ffn_intermediate'"),
        (save_bottleneck, {"activation": "silu"}, "activation='silu', .* make the mixture with activation='silu'"),
        (save_bottleneck, {"adapter_input": "ffn_input"}, "adapter_input='ffn_input'"),
        (save_bottleneck, {"scale": 2.0}, "scale=2.0, .* no field of this mixture changes that, .* train it with 1.0"),
        (save_bottleneck, {"scale": "learnable"}, "scale=None"),
        (save_bottleneck, {"use_bias": False}, "bias=False"),
        (save_bottleneck, {"placement": "pfeiffer", "adapter_input": "ffn_input"}, "placement='pfeiffer'"),
    ],
)
def test_source_with_other_fields_is_an_error_that_names_them(tiny, tmp_path, save, fields, message) -> None:
    save(tiny, tmp_path, "a", **fields)
    with pytest.raises(ValueError, match=rf"domains\['a'\].*trained with.*{message.rpartition('trained with ')[2]}"):
        gather(tiny, {"a": str(tmp_path / "a")})


@pytest.mark.parametrize("fields", [{}, {"r": 2, "glu": True}, {"adapter_input": "ffn_input"}])
def test_a_domain_preset_is_gathered(tiny, tiny_inputs, tmp_path, fields) -> None:
    inputs = tiny_inputs("llama")
    model = get_peft_model(tiny("llama"), BottleneckConfig.domain(layers_to_transform=[1], **fields))
    randomize(model, seed=3)
    model.save_pretrained(tmp_path)
    ours = {{"glu": "adapter_glu"}.get(name, name): value for name, value in fields.items() if name != "r"}
    mixture = gather(tiny, {"a": str(tmp_path)}, task_adapter=None, **ours)
    found = logits(mixture, {**inputs, "domain_ids": mixture.base_model.domain_ids(["a"] * len(inputs["input_ids"]))})
    torch.testing.assert_close(found, logits(model, inputs), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("field", [{"placement": "pfeiffer"}, {"use_bias": False}, {"scale": "learnable"}])
def test_a_domain_preset_refuses_what_no_mixture_could_gather(field) -> None:
    with pytest.raises(ValueError, match=rf"{next(iter(field))}=.*MixDA gathers domain adapters with"):
        BottleneckConfig.domain(**field)


def test_source_with_unknown_fields_is_an_error(tiny, tmp_path) -> None:
    save_mixda(tiny, tmp_path, "a")
    path = tmp_path / "a" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "gait": "softmax"}))
    with pytest.raises(ValueError, match=r"has no field 'gait'. Did you mean 'gate'"):
        gather(tiny, {"a": str(tmp_path / "a")})


@pytest.mark.parametrize("late", [False, True])
def test_refused_gathering_leaves_the_model_as_it_was(tiny, tiny_inputs, tmp_path, late) -> None:
    save_mixda(tiny, tmp_path, "a", **({} if late else {"activation": "relu"}))
    base = tiny("llama", **({"intermediate_size": 64} if late else {}))
    keys = list(base.state_dict())
    with pytest.raises(ValueError, match="in the source, expected" if late else "activation"):
        get_peft_model(base, MixDAConfig(domains={"a": str(tmp_path / "a")}))
    assert not base._forward_pre_hooks
    assert list(base.state_dict()) == keys
    if late:
        return
    assert torch.equal(logits(base, tiny_inputs("llama")), logits(tiny("llama"), tiny_inputs("llama")))


@pytest.mark.parametrize(
    ("domains", "message"),
    [
        ("biomed", r"domains='biomed' must be a list.*write \['biomed'\]"),
        (["a", "b", "a"], "names a domain twice"),
        (["a.b"], "domains: 'a.b' is no name"),
        ([""], "'' is no name"),
        ([3], "3 is no name"),
        (["keys"], "'keys' is no name"),  # an attribute of the module that holds the experts
        (["__base__"], "'__base__' is no name"),  # what `domain_ids` calls no domain
        ({"a": {"sauce": "x"}}, r"domains\['a'\] has no entry 'sauce'.*Did you mean 'source'"),
    ],
)
def test_names_and_entries_of_domains_are_checked(domains, message) -> None:
    with pytest.raises(ValueError, match=message):
        MixDAConfig(domains=domains)


def test_domain_order_must_name_the_domains() -> None:
    with pytest.raises(ValueError, match=r"domain_order=\['a'\] must name the domains \['a', 'b'\]"):
        MixDAConfig(domains=["a", "b"], domain_order=["a"])


def test_unknown_domain_names_are_refused_with_a_suggestion(tiny) -> None:
    model = gather(tiny, ["biomed", "reviews"], domain_layers=[1])
    with pytest.raises(
        ValueError, match=r"unknown domain 'review'; have \['biomed', 'reviews'\]. Did you mean 'reviews'"
    ):
        tuner(model).domain_ids(["review"])
    with pytest.raises(ValueError, match=r"unknown domain 'bio'"):
        tuner(model).remove_domain("bio")
    for verb in (tuner(model).domain_ids, tuner(model).remove_domain, tuner(model).add_domain):
        with pytest.raises(ValueError, match="adapter_name='other' is unknown; have \\['default'\\]"):
            verb("biomed", adapter_name="other")


# --- adding ------------------------------------------------------------------------------------------------------


def trained(tiny: Any, gate: str = "softmax", combine: str = "delta", names: str = "ab", **fields: Any) -> nn.Module:
    config = {"domain_layers": [1, 2], "r": 4, **fields}
    return randomize(gather(tiny, list(names), gate=gate, combine=combine, **config))


def weights_by_arm(model: nn.Module, inputs: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """Per mixture: arm -> (N,) weight; "kept" is the frozen output's own."""
    found, handles = [], []
    for mixture in mixtures(model).values():

        def note(module: nn.Module, args: tuple, routing: Any) -> None:
            seen = dict(zip(module.experts, routing.weights.unbind(1), strict=True))
            found.append(seen if routing.base_weight is None else {**seen, "kept": routing.base_weight})

        handles.append(mixture.router.register_forward_hook(note))
    logits(model, inputs)
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("gate", ["softmax", "sigmoid"])
def test_adding_a_new_domain_leaves_the_output_as_it_was(tiny, tiny_inputs, gate) -> None:
    inputs = tiny_inputs("llama", padding="right")
    model = trained(tiny, gate)
    before, old = logits(model, inputs), {name: experts(model, name) for name in "ab"}
    tuner(model).add_domain("c", r=6)
    assert all(mixture.bank.names == ["a", "b", "c"] for mixture in mixtures(model).values())
    assert all(mixture.bank.experts["c"].rank == 6 for mixture in mixtures(model).values())
    torch.testing.assert_close(logits(model, inputs), before, atol=1e-6, rtol=1e-5)
    assert all(same(experts(model, name), old[name]) for name in "ab")


@pytest.mark.parametrize("combine", ["delta", "convex"])
@pytest.mark.parametrize("gate", ["softmax", "sigmoid"])
@pytest.mark.parametrize("share", [0.05, 0.4])
def test_adding_a_domain_changes_no_weight_of_the_others(tiny, tiny_inputs, gate, combine, share) -> None:
    inputs = tiny_inputs("llama", padding="right")
    model = trained(tiny, gate, combine, domain_layers=[1])
    (before,) = weights_by_arm(model, inputs)
    tuner(model).add_domain("c", share=share)
    (after,) = weights_by_arm(model, inputs)
    for name in "ab":
        torch.testing.assert_close(after[name], before[name])
    if gate == "sigmoid":
        torch.testing.assert_close(after["c"], torch.full_like(after["c"], share))
    else:
        frozen = before["kept"] if combine == "convex" else 1 - before["a"] - before["b"]
        torch.testing.assert_close(after["c"], share * frozen, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("task_adapter", ["pfeiffer", None])
@pytest.mark.parametrize("gate", ["softmax", "sigmoid"])
def test_domain_added_where_there_was_no_gate_starts_at_its_share(
    tiny, tiny_inputs, tmp_path, gate, task_adapter
) -> None:
    save_mixda(tiny, tmp_path, "a")  # layers 0 and 2
    inputs = tiny_inputs("llama")
    model = trained(tiny, gate, names="b", domain_layers=[2], task_adapter=task_adapter)
    before = weights_by_arm(model, inputs)
    tuner(model).add_domain("a", str(tmp_path / "a"), share=0.07)
    assert {path.split(".")[2]: m.bank.names for path, m in mixtures(model).items()} == {"0": ["a"], "2": ["b", "a"]}
    by_layer = dict(zip(mixtures(model), weights_by_arm(model, inputs), strict=True))
    found = by_layer["model.layers.0.mlp.down_proj"]["a"]
    torch.testing.assert_close(found, torch.full_like(found, 0.07))
    assert before[0]["b"].shape == by_layer["model.layers.2.mlp.down_proj"]["b"].shape


@pytest.mark.parametrize("task_adapter", ["pfeiffer", None])
@pytest.mark.parametrize("save", [save_mixda, save_bottleneck])
def test_trained_domain_is_added_with_its_own_rank_and_layers(tiny, tiny_inputs, tmp_path, save, task_adapter) -> None:
    source = save(tiny, tmp_path, "b")  # layers 2 and 3
    inputs = tiny_inputs("llama", padding="right")
    model = trained(tiny, names="a", domain_layers=[0, 2], task_adapter=task_adapter)
    base_rows = {**inputs, "domain_ids": torch.tensor([0, -1])}
    before = logits(model, base_rows)
    tuner(model).add_domain("b", str(tmp_path / "b"))
    assert {int(p.split(".")[2]): m.bank.names for p, m in mixtures(model).items()} == {
        0: ["a"], 2: ["a", "b"], 3: ["b"],
    }  # fmt: skip
    torch.testing.assert_close(logits(model, base_rows), before)
    if task_adapter is None:
        ids = tuner(model).domain_ids(["b", "b"])
        own = {**inputs, "domain_ids": torch.tensor([0, 0])} if save is save_mixda else inputs
        found = logits(model, {**inputs, "domain_ids": ids})
        torch.testing.assert_close(found, logits(source, own), atol=1e-5, rtol=1e-5)


def test_added_domain_trains_and_nothing_else_moves(tiny, tiny_inputs) -> None:
    inputs = tiny_inputs("llama", labels="tokens")
    model = trained(tiny, "softmax")
    tuner(model).set_stage("domain")
    tuner(model).add_domain("c")
    assert {p.requires_grad for n, p in model.named_parameters() if ".experts.c." in n} == {True}
    for name, parameter in model.named_parameters():
        if ".experts.a." in name or ".experts.b." in name:
            parameter.requires_grad_(False)
    old = {n: p.detach().clone() for n, p in model.named_parameters() if ".experts.c." not in n}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2)
    model.train()
    ids = tuner(model).domain_ids(["c", "c"])
    losses = []
    for _ in range(15):
        loss = model(**inputs, domain_ids=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.02
    assert all(torch.equal(p, old[n]) for n, p in model.named_parameters() if n in old)


@pytest.mark.parametrize("stage", ["domain", "task"])
def test_stage_holds_after_domains_come_and_go(tiny, stage) -> None:
    model = trained(tiny)
    tuner(model).set_stage(stage)
    tuner(model).add_domain("c")
    tuner(model).remove_domain("a")
    parts = {"domain": [".domain.bank."], "task": [".domain.router.", ".task."]}[stage]
    for name, parameter in model.named_parameters():
        if "mixda_adapters" in name:
            assert parameter.requires_grad == any(part in name for part in parts), name


def test_adapter_loaded_for_inference_stays_frozen_when_domains_come(tiny, tmp_path) -> None:
    trained(tiny).save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(tiny("llama"), tmp_path)
    tuner(model).add_domain("c")
    assert not any(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("task_adapter", ["pfeiffer", None])
def test_added_domain_has_the_dtype_of_the_others(tiny, tiny_inputs, tmp_path, task_adapter) -> None:
    save_mixda(tiny, tmp_path, "a")
    for dtype, autocast in ((torch.bfloat16, True), (torch.bfloat16, False)):
        base = tiny("llama").to(dtype)
        config = MixDAConfig(domains=["b"], domain_layers=[2], task_adapter=task_adapter)
        model = get_peft_model(base, config, autocast_adapter_dtype=autocast)
        before = {n: p for n, p in model.named_parameters() if ".experts.b." in n}
        tuner(model).add_domain("a", str(tmp_path / "a"))
        tuner(model).add_domain("c")
        found = {p.dtype for n, p in model.named_parameters() if "mixda_adapters" in n}
        assert found == {torch.float32 if autocast else torch.bfloat16}
        after = dict(model.named_parameters())
        assert all(after[n] is p for n, p in before.items())
        assert logits(model, tiny_inputs("llama")).isfinite().all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "a"}, r"domain 'a' exists already; have \['a', 'b'\]"),
        ({"name": "c", "share": 0.0}, "share=0.0 must be a finite number, above 0, less than 1"),
        ({"name": "c", "share": 1.0}, "share=1.0 must be a finite number, above 0, less than 1"),
        ({"name": "c.d"}, "domains: 'c.d' is no name"),
        ({"name": "c", "source": "nowhere-at-all"}, "cannot be read"),
        ({"name": "c", "share": "much"}, "share='much' must be a finite number, above 0, less than 1"),
        ({"name": "c", "r": 0}, "`r` should be a positive integer"),
        ({"name": "c", "source": "nowhere-at-all", "r": 3}, "r=3: a source brings its own rank"),
    ],
)
def test_refused_addition_leaves_the_mixture_as_it_was(tiny, tiny_inputs, arguments, message) -> None:
    inputs = tiny_inputs("llama")
    model = trained(tiny)
    before, keys = logits(model, inputs), set(model.state_dict())
    with pytest.raises(ValueError, match=message):
        tuner(model).add_domain(**arguments)
    assert set(model.state_dict()) == keys
    assert list(tuner(model).peft_config["default"].domains) == ["a", "b"]
    assert tuner(model).peft_config["default"].domain_order == ["a", "b"]
    assert torch.equal(logits(model, inputs), before)


def test_refused_source_leaves_the_mixture_as_it_was(tiny, tiny_inputs, tmp_path) -> None:
    """The shape is found out late, when the weights are copied."""
    inputs = tiny_inputs("llama")
    wide = get_peft_model(
        tiny("llama", intermediate_size=64), MixDAConfig(domains=["c"], domain_layers=[0, 2], task_adapter=None)
    )
    wide.save_pretrained(tmp_path)
    model = trained(tiny)
    before, keys = logits(model, inputs), set(model.state_dict())
    with pytest.raises(ValueError, match=r"down.weight at .* is \(\d, 64\) in the source, expected \(\d, 48\)"):
        tuner(model).add_domain("c", str(tmp_path))
    assert set(model.state_dict()) == keys
    assert list(tuner(model).peft_config["default"].domains) == ["a", "b"]
    assert torch.equal(logits(model, inputs), before)


class Named(nn.Module):
    """A model whose modules are called as the parts of an expert are."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(self.down(x).tanh())


def test_added_domain_sits_in_the_model_and_not_in_other_experts() -> None:
    model = get_peft_model(Named(), MixDAConfig(domains=["a"], target_modules=["down", "up"], r=2))
    x = torch.randn(3, 4, 6)
    expected = randomize(model)(x)
    tuner(model).add_domain("b")
    assert {host.path for host in tuner(model).hosts()} == {"down", "up"}
    assert all(mixture.bank.names == ["a", "b"] for mixture in mixtures(model).values())
    torch.testing.assert_close(model(x), expected)


# --- removing ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("combine", ["delta", "convex"])
@pytest.mark.parametrize("gate", ["softmax", "sigmoid"])
def test_removing_a_domain_changes_no_weight_of_the_others(tiny, tiny_inputs, gate, combine) -> None:
    inputs = tiny_inputs("llama", padding="right")
    model = trained(tiny, gate, combine, "abc", domain_layers=[1])
    (before,) = weights_by_arm(model, inputs)
    kept = {name: experts(model, name) for name in "ac"}
    tuner(model).remove_domain("b")
    (after,) = weights_by_arm(model, inputs)
    for name in "ac":
        torch.testing.assert_close(after[name], before[name])
        assert same(experts(model, name), kept[name])
    if combine == "convex":
        lost = before["b"] if gate == "softmax" else 0  # a sigmoid's weights were never shares
        torch.testing.assert_close(after["kept"], before["kept"] + lost)
    assert {name.split(".experts.")[1][0] for name in model.state_dict() if ".experts." in name} == {"a", "c"}


def test_removing_a_domain_with_renormalize_shares_its_mass(tiny, tiny_inputs) -> None:
    inputs = tiny_inputs("llama", padding="right")
    model = trained(tiny, "softmax", "convex", "abc", domain_layers=[1])
    (before,) = weights_by_arm(model, inputs)
    tuner(model).remove_domain("b", renormalize=True)
    (after,) = weights_by_arm(model, inputs)
    for name in ("a", "c", "kept"):
        torch.testing.assert_close(after[name], before[name] / (1 - before["b"]), atol=1e-5, rtol=1e-4)
    assert tuner(model).peft_config["default"].null_arms == {}


@pytest.mark.parametrize("gate", ["softmax", "sigmoid"])
def test_removing_what_was_added_restores_the_output(tiny, tiny_inputs, gate) -> None:
    inputs = tiny_inputs("llama", padding="right")
    model = trained(tiny, gate, "convex")
    before = logits(model, inputs)
    tuner(model).add_domain("c")
    if gate == "softmax":
        assert not torch.allclose(logits(model, inputs), before, atol=1e-4)  # convex: c stands for a zero output
    tuner(model).remove_domain("c")
    if gate == "softmax":
        torch.testing.assert_close(logits(model, inputs), before, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize("combine", ["delta", "convex"])
@pytest.mark.parametrize("gate", ["softmax", "sigmoid"])
def test_mixture_loads_as_saved_after_domains_came_and_went(
    tiny, tiny_inputs, tmp_path, gate, combine, renormalize
) -> None:
    inputs = tiny_inputs("llama", padding="right")
    model = trained(tiny, gate, combine, "zmb", domain_layers=[1, 2])
    tuner(model).remove_domain("m", renormalize=renormalize)
    tuner(model).add_domain("a", r=2)
    tuner(model).remove_domain("z", renormalize=renormalize)
    randomize(model, seed=5)
    expected = logits(model, inputs)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["domain_order"] == ["b", "a"]
    assert sorted(config["null_arms"].values()) == ([] if renormalize or gate == "sigmoid" else [2, 2])
    loaded = PeftModel.from_pretrained(tiny("llama"), tmp_path)
    assert torch.equal(logits(loaded, inputs), expected)
    tuner(loaded).add_domain("later")
    tuner(loaded).remove_domain("b")
    logits(loaded, inputs)


@pytest.mark.parametrize("task_adapter", ["pfeiffer", None])
def test_removing_all_domains_leaves_the_task_adapter_and_base(tiny, tiny_inputs, tmp_path, task_adapter) -> None:
    inputs = tiny_inputs("llama", padding="right")
    model = trained(tiny, task_adapter=task_adapter)
    none = {**inputs, "domain_ids": torch.tensor([-1, -1])}
    without = logits(model, none)
    for name in "ab":
        tuner(model).remove_domain(name)
    assert mixtures(model) == {}
    assert tuner(model).peft_config["default"].domains == {}
    assert tuner(model).peft_config["default"].null_arms == {}
    assert torch.equal(logits(model, inputs), without)
    assert torch.equal(logits(model, inputs), logits(tiny("llama"), inputs)) == (task_adapter is None)
    model.save_pretrained(tmp_path)
    if task_adapter is not None:
        assert torch.equal(logits(PeftModel.from_pretrained(tiny("llama"), tmp_path), inputs), without)
    tuner(model).add_domain("c")
    assert torch.equal(logits(model, inputs), without)
    randomize(model)
    assert not torch.allclose(logits(model, inputs), without, atol=1e-3)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny("llama"), tmp_path)
    assert torch.equal(logits(loaded, inputs), logits(model, inputs))


@pytest.mark.parametrize("stage", ["domain", "task"])
def test_removing_all_domains_works_in_any_stage(tiny, tiny_inputs, stage) -> None:
    model = trained(tiny)
    tuner(model).set_stage(stage)
    for name in "ab":
        tuner(model).remove_domain(name)
    tuner(model).add_domain("c")
    part = {"domain": ".domain.bank.", "task": ".task."}[stage]
    assert {p.requires_grad for n, p in model.named_parameters() if part in n} == {True}


def test_domain_ids_follow_the_domains_that_are_left(tiny, tiny_inputs) -> None:
    inputs = tiny_inputs("llama")
    model = trained(tiny, names="abc", task_adapter=None)
    expected = logits(model, {**inputs, "domain_ids": tuner(model).domain_ids(["b", "c"])})
    tuner(model).remove_domain("a")
    ids = tuner(model).domain_ids(["b", "c"])
    assert ids.tolist() == [0, 1]
    torch.testing.assert_close(logits(model, {**inputs, "domain_ids": ids}), expected, atol=1e-6, rtol=1e-5)
    with pytest.raises(ValueError, match="must lie between -1"):
        logits(model, {**inputs, "domain_ids": torch.tensor([0, 2])})


def test_domain_missing_at_a_layer_weighs_nothing_there(tiny, tiny_inputs, tmp_path) -> None:
    """Its arm is not in the softmax: the others and the frozen layer share the whole."""
    for name in "ab":
        save_mixda(tiny, tmp_path, name)
    model = gather(tiny, {name: str(tmp_path / name) for name in "ab"}, task_adapter=None)
    randomize(model, only="router")
    by_layer = {path.split(".")[2]: m.router for path, m in mixtures(model).items()}
    assert {layer: router.arms for layer, router in by_layer.items()} == {
        "0": ["a", "frozen"], "2": ["a", "b", "frozen"], "3": ["b", "frozen"],
    }  # fmt: skip
    inputs = {**tiny_inputs("llama"), "domain_ids": torch.tensor([0, 0])}
    only_a = gather(tiny, {"a": str(tmp_path / "a")}, task_adapter=None)
    torch.testing.assert_close(logits(model, inputs), logits(only_a, inputs), atol=1e-6, rtol=1e-5)


def test_several_mixtures_in_a_model_keep_their_own_domains(tiny, tiny_inputs) -> None:
    inputs = tiny_inputs("llama")
    model = trained(tiny, names="ab")
    model.add_adapter("second", MixDAConfig(domains=["x"], domain_layers=[0, 1], r=2))
    model.set_adapter("second")
    randomize(model, seed=9)
    second = logits(model, inputs)
    tuner(model).add_domain("c", adapter_name="default")
    tuner(model).remove_domain("a", adapter_name="default")
    torch.testing.assert_close(logits(model, inputs), second)
    assert list(tuner(model).peft_config["second"].domains) == ["x"]
    assert tuner(model).domain_ids(["x"], adapter_name="second").tolist() == [0]


# --- copies, and where new domains lie ----------------------------------------------------------------------------


@pytest.mark.parametrize("gate", ["softmax", "counts"])
def test_a_domain_like_another_begins_as_that_and_goes_its_own_way(tiny, tiny_inputs, tmp_path, gate) -> None:
    sources = {name: save_path(tiny, tmp_path, name) for name in "ab"}
    model = get_peft_model(tiny("llama"), MixDAConfig(domains=sources, router=gate)).eval()
    texts = {"a": [[5, 6]], "b": [[7, 8]]}
    if gate == "counts":
        tuner(model).fit_gate(texts, [[9, 10]])
    tuner(model).add_domain("c", like="b")
    if gate == "counts":
        tuner(model).fit_gate({"c": [[11, 12]]})
    assert same(experts(model, "c"), experts(model, "b"))
    entries = tuner(model).config_of("default").domains
    assert entries["c"] == {"ranks": entries["b"]["ranks"]}
    inputs = tiny_inputs("llama")
    alone = [logits(model, {**inputs, "domain_ids": tuner(model).domain_ids([name] * 2)}) for name in "bc"]
    torch.testing.assert_close(alone[0], alone[1])
    with torch.no_grad():
        for mixture in mixtures(model).values():
            for parameter in mixture.bank.experts["c"].parameters() if "c" in mixture.bank.experts else ():
                parameter.add_(0.1)
    assert not same(experts(model, "c"), experts(model, "b"))
    model.save_pretrained(tmp_path / "mixture")
    loaded = PeftModel.from_pretrained(tiny("llama"), tmp_path / "mixture")
    assert same(experts(loaded, "c"), experts(model, "c"))
    assert same(experts(loaded, "b"), experts(model, "b"))


def save_path(tiny: Any, folder: Path, name: str) -> str:
    save_mixda(tiny, folder, name)
    return str(folder / name)


def test_a_new_domain_lies_where_the_others_do_unless_layers_are_named(tiny, tmp_path) -> None:
    sources = {name: save_path(tiny, tmp_path, name) for name in "ab"}
    for layers, expected in ((None, {"0", "2", "3"}), ([1], {"1"})):
        model = get_peft_model(tiny("llama"), MixDAConfig(domains=dict(sources), domain_layers=layers))
        tuner(model).add_domain("c")
        assert {key.partition(".")[0] for key in experts(model, "c")} == expected


def test_widths_of_new_domains_are_said_to_do_nothing_for_gathered_ones(tiny, tmp_path) -> None:
    """They are for those that come later, which may be meant; a domain that is new beside them has them."""
    source = save_path(tiny, tmp_path, "a")
    for fields, said in (({"r": 3}, "r=3"), ({"reduction_factor": 8}, "reduction_factor=8")):
        with pytest.warns(UserWarning, match=rf"^{said}: gathered domains keep the ranks .* that add_domain makes"):
            model = get_peft_model(tiny("llama"), MixDAConfig(domains={"a": source}, **fields))
        tuner(model).add_domain("c")
        model.save_pretrained(tmp_path / said)
        PeftModel.from_pretrained(tiny("llama"), tmp_path / said)  # of a file they are not said
    get_peft_model(tiny("llama"), MixDAConfig(domains={"a": source, "new": None}, r=3))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"like": "bb"}, "like='bb': unknown domain; have .*Did you mean 'b'"),
        ({"like": "b", "r": 4}, "like='b' and r=4"),
        ({"like": "b", "source": "folder"}, "like='b' and source='folder'"),
    ],
)
def test_a_copy_of_nothing_or_of_two_things_is_refused(tiny, arguments, message) -> None:
    model = get_peft_model(tiny("llama"), MixDAConfig(domains=["a", "b"], r=4))
    with pytest.raises(ValueError, match=message):
        tuner(model).add_domain("c", **arguments)
    assert list(tuner(model).config_of("default").domains) == ["a", "b"]


def test_convex_refuses_a_domain_that_was_trained_as_a_change(tiny, tmp_path) -> None:
    model = get_peft_model(tiny("llama"), BottleneckConfig.domain(r=4))
    model.save_pretrained(tmp_path / "delta")
    config = MixDAConfig(domains={"law": str(tmp_path / "delta")}, combine="convex")
    base = tiny("llama")
    with pytest.raises(ValueError, match=r"trained with combine='delta', this mixture has 'convex'"):
        get_peft_model(base, config)
    assert not [name for name, _ in base.named_modules() if "adapters" in name]
