"""LoRA folders as experts: each is what PEFT makes of it, to rounding, or is refused with the field and the remedy."""

from __future__ import annotations

import json
import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from adapted import logits
from huggingface_hub.errors import EntryNotFoundError
from peft import LoraConfig, PeftModel, VeraConfig, XLoraConfig, get_peft_model
from processes import Process
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mixadapters import BottleneckConfig, MixDAConfig, MoAConfig
from mixadapters.tuners.lora import _alpha
from mixadapters.tuners.moa.sources import MOE_PEFT

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(scope="session")
def tiny(tiny: Any) -> Any:
    """Models of two layers, a first and a last one, where a test asks for no more."""
    return partial(tiny, layers=2)


def save_lora(base: nn.Module, folder: Path, **fields: Any) -> nn.Module:
    """A trained LoRA of PEFT in `folder`, and the model that it is in."""
    model = get_peft_model(base, LoraConfig(**fields))
    generator = torch.Generator().manual_seed(sum(map(ord, folder.name)))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "lora_A" not in name:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.2)
    model.save_pretrained(folder)
    return model.eval()


def gather(base: nn.Module, experts: dict[str, Any], **fields: Any) -> nn.Module:
    return get_peft_model(base, MoAConfig(experts=experts, router="softmax", **fields)).eval()


def by_expert(model: nn.Module, name: str, inputs: dict[str, Tensor]) -> Tensor:
    rows = len(next(iter(inputs.values())))
    return logits(model, inputs, expert_ids=model.base_model.expert_ids([name] * rows))


FORMS: dict[str, tuple[str, dict[str, Any]]] = {
    "attention": ("llama", {"r": 4, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"]}),
    "all linears, rsLoRA, patterns": (
        "llama",
        {"r": 8, "use_rslora": True, "target_modules": "all-linear", "rank_pattern": {"up_proj": 3},
         "alpha_pattern": {"layers.1.self_attn.q_proj": 5}},
    ),
    "some layers, bias of its own": (
        "llama", {"r": 16, "target_modules": ["down_proj"], "layers_to_transform": [1], "lora_bias": True},
    ),
    "biases of the base": ("opt", {"r": 4, "lora_alpha": 6, "target_modules": ["fc1", "q_proj"], "bias": "lora_only"}),
    "Conv1D": ("gpt2", {"r": 4, "target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
    "both stacks": ("t5", {"r": 4, "target_modules": ["q", "v", "wo"]}),
    "encoder": ("bert", {"r": 4, "target_modules": ["query", "dense"]}),
    "MoE": ("qwen3_moe", {"r": 4, "target_modules": ["q_proj", "o_proj"]}),
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_routed_to_one_expert_the_mixture_is_pefts_lora(form, tiny, tiny_inputs, tmp_path) -> None:
    kind, fields = FORMS[form]
    inputs = tiny_inputs(kind)
    plain = logits(tiny(kind), inputs)
    expected = logits(save_lora(tiny(kind), tmp_path / "one", **fields), inputs)
    other = {"r": 2, "target_modules": fields["target_modules"]}
    alone = logits(save_lora(tiny(kind), tmp_path / "two", **other), inputs)
    model = gather(tiny(kind), {"one": tmp_path / "one", "two": str(tmp_path / "two")})
    torch.testing.assert_close(by_expert(model, "one", inputs), expected, rtol=1e-5, atol=2e-5)
    torch.testing.assert_close(by_expert(model, "two", inputs), alone, rtol=1e-5, atol=2e-5)
    torch.testing.assert_close(by_expert(model, "__base__", inputs), plain, rtol=0, atol=0)
    assert (expected - plain).abs().max() > 0.05


@pytest.mark.parametrize("weights", [{"one": 0.7, "two": -0.2}, [0.7, -0.2]])
def test_constant_weights_are_those_of_experts_wherever_they_lie(weights, tiny, tiny_inputs, tmp_path) -> None:
    """One adapts q_proj, the other v_proj and, with the first, o_proj: the model is the base plus the weighted two."""
    base, inputs = tiny("llama"), tiny_inputs("llama")
    targets, saved = {"one": ["q_proj", "o_proj"], "two": ["v_proj", "o_proj"]}, {}
    for name, places in targets.items():
        saved[name] = save_lora(tiny("llama"), tmp_path / name, r=2, lora_alpha=16, target_modules=places)
    with torch.no_grad():
        for name, weight in (("one", 0.7), ("two", -0.2)):
            for path, module in saved[name].named_modules():
                if hasattr(module, "get_delta_weight"):
                    base.get_submodule(path.removeprefix("base_model.model.")).weight += weight * (
                        module.get_delta_weight("default")
                    )
    router, folders = {"kind": "constant", "weights": weights}, {name: tmp_path / name for name in targets}
    model = get_peft_model(tiny("llama"), MoAConfig(experts=folders, router=router)).eval()
    expected = logits(base, inputs)
    torch.testing.assert_close(logits(model, inputs), expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(logits(tiny("llama"), inputs), expected, atol=1e-2)
    model.save_pretrained(tmp_path / "mixed")
    again = PeftModel.from_pretrained(tiny("llama"), tmp_path / "mixed").eval()
    torch.testing.assert_close(logits(again.merge_and_unload(), inputs), expected, rtol=1e-4, atol=1e-5)
    for wrong, remedy in (({"one": 1.0}, r"add \['two'\]"), ([1.0], "give 2")):
        config = MoAConfig(experts=folders, router={"kind": "constant", "weights": wrong})
        with pytest.raises(ValueError, match=rf"each expert of \['one', 'two'\]: .*{remedy}"):
            get_peft_model(tiny("llama"), config)


def test_constant_weights_are_those_of_the_pieces_of_experts(tiny) -> None:
    weights = {"expert0_0": 0.1, "expert0_1": 0.2, "expert1_0": 0.3, "expert1_1": 0.4}
    for given in (weights, list(weights.values())):
        config = MoAConfig(
            num_experts=2, r=2, segments=2, target_modules=["q_proj"], router={"kind": "constant", "weights": given}
        )
        model = get_peft_model(tiny("llama", num_hidden_layers=1), config)
        ((_, mixture),) = model.base_model._mixtures("default")
        assert mixture.router.constant() == pytest.approx([0.1, 0.2, 0.3, 0.4])


def test_groups_of_experts_are_those_of_a_layer_where_experts_differ(tiny, tmp_path) -> None:
    for name, places in (("one", ["q_proj"]), ("two", ["q_proj", "v_proj"]), ("three", ["v_proj"])):
        save_lora(tiny("llama"), tmp_path / name, r=2, target_modules=places)
    router = {"kind": "softmax", "balance_coef": 0.1, "balance_groups": [["one", "two"], ["three"]]}
    folders = {name: tmp_path / name for name in ("one", "two", "three")}
    model = get_peft_model(tiny("llama"), MoAConfig(experts=folders, router=router))
    groups = {path.rpartition(".")[2]: m.router.balance_groups for path, m in model.base_model._mixtures("default")}
    assert groups == {"q_proj": [["one", "two"]], "v_proj": [["two"], ["three"]]}
    for wrong in ([["one"], ["three"]], [["one", "two"], ["three", "four"]]):
        router["balance_groups"] = wrong
        with pytest.raises(ValueError, match="must hold each expert"):
            get_peft_model(tiny("llama"), MoAConfig(experts=folders, router=router))


def test_fields_of_new_experts_are_said_to_do_nothing_for_gathered_ones(tiny, tmp_path) -> None:
    save_lora(tiny("llama"), tmp_path / "one", r=2, lora_alpha=6, target_modules=["q_proj"])
    fields = {"r": 4, "lora_alpha": 32, "use_rslora": True}
    with pytest.warns(UserWarning, match=r"r=4, lora_alpha=32, use_rslora=True: gathered experts keep .*add_expert"):
        model = gather(tiny("llama"), {"one": tmp_path / "one"}, **fields)
    entry = model.peft_config["default"].experts["one"]
    assert set(entry["ranks"].values()) == {2}
    assert set(entry["scales"].values()) == {3.0}
    model.base_model.add_expert("two")  # what they are for
    assert {
        mixture.bank.experts["two"].down.weight.shape[0] for _, mixture in model.base_model._mixtures("default")
    } == {4}
    model.save_pretrained(tmp_path / "mixed")
    PeftModel.from_pretrained(tiny("llama"), tmp_path / "mixed")  # which says nothing: the field has been of use
    gather(tiny("llama"), {"one": tmp_path / "one", "new": {}}, **fields)
    gather(tiny("llama"), {"one": tmp_path / "one"}, n_shared_experts=1, **fields)
    for name in ("rank_pattern", "alpha_pattern"):
        with pytest.warns(UserWarning, match=rf"^{name}="):
            gather(tiny("llama"), {"one": tmp_path / "one"}, **{name: {"q_proj": 4}})


def test_pointwise_convolution_is_a_linear_layer(tmp_path) -> None:
    torch.manual_seed(0)

    def base() -> nn.Module:
        torch.manual_seed(3)
        return nn.Sequential(nn.Conv1d(6, 5, 1), nn.Conv1d(5, 4, 1))

    lora = save_lora(base(), tmp_path / "one", r=2, target_modules=["0", "1"])
    model = get_peft_model(base(), MoAConfig(experts={"one": tmp_path / "one"}, router="constant")).eval()
    x = torch.randn(2, 6, 7)
    torch.testing.assert_close(model(x), lora(x), rtol=1e-5, atol=1e-5)


def test_folder_of_another_head_fits_the_backbone(tiny, tiny_inputs, tmp_path) -> None:
    save_lora(tiny("llama"), tmp_path / "one", r=4, target_modules=["q_proj"])
    inputs = tiny_inputs("llama")
    backbone = get_peft_model(tiny("llama", "base"), MoAConfig(experts={"one": tmp_path / "one"}, router="softmax"))
    with torch.no_grad():
        plain = tiny("llama", "base")(**inputs).last_hidden_state
        got = backbone.eval()(**inputs, expert_ids=torch.zeros(2, dtype=torch.long)).last_hidden_state
    assert (got - plain).abs().max() > 0.05


def test_factor_of_the_user_scales_one_expert(tiny, tiny_inputs, tmp_path) -> None:
    base = tiny("llama")
    save_lora(tiny("llama"), tmp_path / "one", r=4, lora_alpha=8, target_modules=["lm_head"])
    inputs = tiny_inputs("llama")
    plain = logits(base, inputs)
    whole = by_expert(gather(tiny("llama"), {"one": tmp_path / "one"}), "one", inputs) - plain
    half = gather(tiny("llama"), {"one": {"source": str(tmp_path / "one"), "scale": 0.5}})
    torch.testing.assert_close(by_expert(half, "one", inputs) - plain, whole / 2, rtol=1e-4, atol=1e-5)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "DoRA": ({"use_dora": True}, "use_dora=True"),
    "pissa": ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa'"),
    "all biases": ({"bias": "all"}, "bias='all'"),
    "heads": ({"modules_to_save": ["lm_head"]}, "ignore_modules_to_save"),
    "tokens": ({"trainable_token_indices": [3]}, "trainable_token_indices"),
    "aLoRA": ({"alora_invocation_tokens": [5], "task_type": "CAUSAL_LM"}, "alora_invocation_tokens"),
    "embeddings": ({"target_modules": ["embed_tokens"]}, "linear"),
}


@pytest.mark.parametrize("form", REFUSED)
def test_what_no_expert_can_do_is_refused_before_anything_changes(form, tiny, tmp_path) -> None:
    fields, message = REFUSED[form]
    save_lora(tiny("llama"), tmp_path / "one", **{"r": 4, "target_modules": ["q_proj"], **fields})
    base = tiny("llama")
    names = [name for name, _ in base.named_modules()]
    with pytest.raises(ValueError, match=r"experts\['one'\].*") as caught:
        gather(base, {"one": tmp_path / "one"})
    assert message in str(caught.value)
    assert [name for name, _ in base.named_modules()] == names


def test_heads_may_be_waived_by_name(tiny, tiny_inputs, tmp_path) -> None:
    save_lora(tiny("llama"), tmp_path / "one", r=4, target_modules=["q_proj"], modules_to_save=["lm_head"])
    spec = {"source": str(tmp_path / "one"), "ignore_modules_to_save": True}
    inputs = tiny_inputs("llama")
    model = gather(tiny("llama"), {"one": spec})
    assert (by_expert(model, "one", inputs) - logits(tiny("llama"), inputs)).abs().max() > 0.01


def change(folder: Path, what: str) -> None:
    weights, config = load_file(folder / WEIGHTS), json.loads((folder / "adapter_config.json").read_text())
    first = next(key for key in sorted(weights) if "lora_A" in key)
    if what == "rank":
        config["r"] = 5
    elif what == "half":
        del weights[first]
    elif what == "module":
        weights = {k: v for k, v in weights.items() if not k.startswith(first.removesuffix("lora_A.weight"))}
    elif what == "shape":
        weights[first] = torch.zeros(weights[first].shape[0], 7)
    elif what == "nan":
        weights[first][0, 0] = float("nan")
    elif what == "type":
        config["peft_type"] = "IA3"
        config = {"peft_type": "IA3", "target_modules": ["q_proj"], "feedforward_modules": []}
    elif what == "base":
        config["base_model_name_or_path"] = "org/other"
    elif what == "architecture":
        weights = {key.replace("self_attn", "attention"): tensor for key, tensor in weights.items()}
    save_file(weights, folder / WEIGHTS)
    (folder / "adapter_config.json").write_text(json.dumps(config))


CHANGED = {
    "rank": "rank 5", "half": "lora_A.weight", "module": "lacks the weights", "shape": "expected (4, 32)",
    "nan": "not finite", "type": "IA3", "base": "org/other", "architecture": "no module",
}  # fmt: skip


@pytest.mark.parametrize("what", CHANGED)
def test_files_that_are_not_whole_are_refused(what, tiny, tmp_path) -> None:
    save_lora(tiny("llama"), tmp_path / "one", r=4, target_modules=["q_proj", "v_proj"])
    change(tmp_path / "one", what)
    base = tiny("llama")
    base.config._name_or_path = "org/this"
    with pytest.raises(ValueError, match=r"experts\['one'\]") as caught:
        gather(base, {"one": str(tmp_path / "one")})
    assert CHANGED[what] in str(caught.value)


def test_modules_that_the_config_leaves_out_are_an_error(tiny, tmp_path) -> None:
    save_lora(tiny("llama"), tmp_path / "one", r=4, target_modules=["q_proj", "v_proj"])
    with pytest.raises(ValueError, match="v_proj"):
        gather(tiny("llama"), {"one": tmp_path / "one"}, target_modules=["q_proj"])


def test_layers_of_gathered_experts_are_not_chosen(tiny, tmp_path) -> None:
    """Their paths are whole names, of which PEFT does not ask for layers."""
    save_lora(tiny("llama"), tmp_path / "one", r=2, target_modules=["q_proj"])
    with pytest.raises(ValueError, match=r"layers_to_transform=\[0\]: gathered experts are taken with all layers"):
        gather(tiny("llama"), {"one": tmp_path / "one"}, layers_to_transform=[0])


def test_a_folder_of_checkpoints_is_told_from_one_of_an_adapter(tiny, tmp_path) -> None:
    """A run of Trainer leaves these."""
    for step in (5, 15):
        save_lora(tiny("llama"), tmp_path / "run" / f"checkpoint-{step}", r=2, target_modules=["q_proj"])
    with pytest.raises(ValueError, match=r"It holds \['checkpoint-15', 'checkpoint-5'\].*name one of these"):
        gather(tiny("llama"), {"one": tmp_path / "run"})


def test_kinds_are_not_mixed(tiny, tmp_path) -> None:
    get_peft_model(tiny("llama"), BottleneckConfig(placement="parallel")).save_pretrained(tmp_path / "one")
    with pytest.raises(ValueError, match="BOTTLENECK adapter; expert_type='lora'"):
        gather(tiny("llama"), {"one": tmp_path / "one"})


def save_xlora(base: nn.Module, folder: Path, *experts: Path) -> None:
    base.config.use_cache = False
    adapters = {str(i): str(expert) for i, expert in enumerate(experts)}
    get_peft_model(base, XLoraConfig(hidden_size=32, adapters=adapters, task_type="CAUSAL_LM")).save_pretrained(folder)


def test_whole_expert_of_xlora_is_the_lora_that_it_was_made_from(tiny, tiny_inputs, tmp_path) -> None:
    inputs = tiny_inputs("llama")
    lora = save_lora(tiny("llama"), tmp_path / "one", r=4, target_modules=["q_proj", "o_proj"])
    save_xlora(tiny("llama"), tmp_path / "x", tmp_path / "one")
    assert any("embed_tokens" in key for key in load_file(tmp_path / "x" / "0" / WEIGHTS))  # of the base, beside
    model = gather(tiny("llama"), {"one": tmp_path / "x" / "0"})
    torch.testing.assert_close(by_expert(model, "one", inputs), logits(lora, inputs), rtol=1e-5, atol=2e-5)


def test_expert_of_xlora_on_another_base_is_refused(tiny, tmp_path) -> None:
    save_lora(tiny("llama"), tmp_path / "one", r=4, target_modules=["q_proj"])
    other = tiny("llama")
    with torch.no_grad():
        other.lm_head.weight[0, 0] += 1
    save_xlora(other, tmp_path / "x", tmp_path / "one")
    with pytest.raises(ValueError, match=r"experts\['one'\].*a changed 'lm_head' of the base model"):
        gather(tiny("llama"), {"one": tmp_path / "x" / "0"})


def test_experts_of_xlora_that_lost_layers_are_refused_with_the_reason(tiny, tmp_path) -> None:
    for name in ("one", "two"):
        save_lora(tiny("llama"), tmp_path / name, r=4, target_modules=["q_proj"])
    save_xlora(tiny("llama"), tmp_path / "x", tmp_path / "one", tmp_path / "two")
    with pytest.raises(ValueError, match=r"lacks the weights of \['model.layers.1.self_attn.q_proj'\].*X-LoRA saves"):
        gather(tiny("llama"), {"one": tmp_path / "x" / "0"})
    with pytest.raises(ValueError, match=r"gather the LoRA folders that it routes among"):
        gather(tiny("llama"), {"one": tmp_path / "x"})


@pytest.mark.parametrize(
    ("saved", "expert_type", "message"),
    [
        (LoraConfig(r=2, target_modules=["down_proj"]), "bottleneck", "a LORA .* leave expert_type at 'lora'"),
        (BottleneckConfig(r=2), "lora", "a BOTTLENECK .*say expert_type='bottleneck', or 'glu'"),
        (MoAConfig(num_experts=2, r=2, target_modules=["down_proj"]), "lora", r"a MOA .*\(export_expert\)"),
        (MixDAConfig(domains=["law"], r=2), "bottleneck", r"a MIXDA .*\(export_domain\)"),
        (VeraConfig(r=2, target_modules=["down_proj"]), "lora", "a VERA .*gathers LORA adapters$"),
    ],
    ids=lambda value: getattr(value, "peft_type", None),
)
def test_sources_of_another_type_are_refused_with_a_way_out(saved, expert_type, message, tiny, tmp_path) -> None:
    get_peft_model(tiny("llama"), saved).save_pretrained(tmp_path)
    config = MoAConfig(experts={"one": str(tmp_path)}, expert_type=expert_type)
    with pytest.raises(ValueError, match=rf"experts\['one'\].* is {message}"):
        get_peft_model(tiny("llama"), config)


@pytest.mark.parametrize(("kind", "remedy"), MOE_PEFT.items())
def test_mixtures_of_moe_peft_are_refused_by_name(kind, remedy, tiny, tmp_path) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": kind, "num_experts": 2}))
    torch.save({"mola.layers.0.self_attn.q_proj.moe_gate.weight": torch.zeros(2, 32)}, tmp_path / "adapter_model.bin")
    with pytest.raises(ValueError, match=rf"experts\['one'\].* is a {kind} adapter") as caught:
        gather(tiny("llama"), {"one": tmp_path})
    assert str(caught.value).endswith(remedy)


@pytest.fixture
def hub(tmp_path, monkeypatch) -> list[tuple[str, str, Any]]:
    """What is asked of the hub, which has the folders of tmp_path / "hub" / revision."""
    asked: list[tuple[str, str, Any]] = []

    def download(repo: str, filename: str, *, revision: Any = None, **_: Any) -> str:
        asked.append((repo, filename, revision))
        file = tmp_path / "hub" / str(revision or "main") / repo / filename
        if not file.is_file():
            raise EntryNotFoundError(f"{repo} has no {filename}")
        return str(file)

    def exists(repo_id: str, filename: str, *, revision: Any = None, **_: Any) -> bool:
        return (tmp_path / "hub" / str(revision or "main") / repo_id / filename).is_file()

    for module in ("mixadapters.core.files", "peft.config", "peft.utils.save_and_load"):
        monkeypatch.setattr(f"{module}.hf_hub_download", download)
    monkeypatch.setattr("peft.utils.save_and_load.file_exists", exists)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    return asked


def test_hub_ids_are_downloaded_by_name_and_revision(hub, tiny, tiny_inputs, tmp_path) -> None:
    inputs = tiny_inputs("llama")
    lora = save_lora(tiny("llama"), tmp_path / "hub" / "v2" / "user" / "law", r=4, target_modules=["q_proj"])
    spec = {"source": "user/law", "revision": "v2"}
    model = gather(tiny("llama"), {"law": spec})
    torch.testing.assert_close(by_expert(model, "law", inputs), logits(lora, inputs), rtol=1e-5, atol=2e-5)
    assert {name for _, name, _ in hub} == {"adapter_config.json", WEIGHTS}  # neither a pickle nor code
    assert {(repo, revision) for repo, _, revision in hub} == {("user/law", "v2")}
    assert spec == {"source": "user/law", "revision": "v2"}
    model.save_pretrained(tmp_path / "whole")
    asked = len(hub)
    again = PeftModel.from_pretrained(tiny("llama"), tmp_path / "whole")
    assert torch.equal(by_expert(again, "law", inputs), by_expert(model, "law", inputs))
    assert len(hub) == asked  # the mixture stands on its own


def test_a_misspelt_folder_is_told_without_asking_the_hub(hub, tiny, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    save_lora(tiny("llama"), tmp_path / "runs" / "law", r=4, target_modules=["q_proj"])
    save_lora(tiny("llama"), tmp_path / "law", r=4, target_modules=["q_proj"])
    for source in ("lwa", "runs/lwa", "./runs/lwa"):
        with pytest.raises(ValueError, match=rf"'{source}' .*there is no such folder\. Did you mean 'law'"):
            gather(tiny("llama"), {"law": source})
    assert hub == []


def test_hub_ids_that_are_not_there_are_an_error_that_names_them(hub, tiny, tmp_path) -> None:
    save_lora(tiny("llama"), tmp_path / "hub" / "main" / "user" / "law", r=4, target_modules=["q_proj"])
    (tmp_path / "hub" / "main" / "user" / "law" / WEIGHTS).unlink()
    for source in ("user/other", "user/law"):
        with pytest.raises(
            ValueError, match=rf"experts\['law'\]: '{source}' cannot be read as an adapter folder or hub"
        ):
            gather(tiny("llama"), {"law": source})


def test_a_scale_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match=r"experts\['one'\]: scale=0"):
        MoAConfig(experts={"one": {"source": "user/law", "scale": 0}})


@pytest.mark.parametrize("glu", [False, True])
def test_bottleneck_adapters_are_gathered_too(glu, tiny, tiny_inputs, tmp_path) -> None:
    inputs = tiny_inputs("llama")
    lone = get_peft_model(tiny("llama"), BottleneckConfig(r=3, placement="parallel", glu=glu, init_weights=False))
    lone.save_pretrained(tmp_path / "one")
    model = gather(tiny("llama"), {"one": tmp_path / "one"}, expert_type="glu" if glu else "bottleneck")
    torch.testing.assert_close(by_expert(model, "one", inputs), logits(lone.eval(), inputs), rtol=1e-5, atol=1e-5)


def test_experts_may_be_cut_into_segments(tiny, tiny_inputs, tmp_path) -> None:
    inputs = tiny_inputs("llama")
    fields = {"r": 8, "target_modules": ["q_proj", "up_proj"], "lora_bias": True}
    expected = logits(save_lora(tiny("llama"), tmp_path / "one", **fields), inputs)
    config = {"segments": 4, "router": {"kind": "constant", "weights": [1.0] * 4}}
    model = get_peft_model(tiny("llama"), MoAConfig(experts={"one": tmp_path / "one"}, **config)).eval()
    torch.testing.assert_close(logits(model, inputs), expected, rtol=1e-5, atol=2e-5)
    with pytest.raises(ValueError, match="segments=3"):
        get_peft_model(tiny("llama"), MoAConfig(experts={"one": tmp_path / "one"}, segments=3, router="softmax"))


# --- back -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pad", [False, True])
def test_exported_expert_is_stock_lora(pad, tiny, tiny_inputs, tmp_path) -> None:
    inputs = tiny_inputs("llama")
    fields = {"r": 8, "use_rslora": True, "target_modules": "all-linear", "rank_pattern": {"up_proj": 3}}
    lora = save_lora(tiny("llama"), tmp_path / "one", **fields)
    save_lora(tiny("llama"), tmp_path / "two", r=2, target_modules=["q_proj"], lora_bias=True)
    model = gather(tiny("llama"), {"one": tmp_path / "one", "two": tmp_path / "two"})
    for name in ("one", "two"):
        model.base_model.export_expert(name, tmp_path / f"{name}-back", pad_ranks=pad)
    back = PeftModel.from_pretrained(tiny("llama"), tmp_path / "one-back").eval()
    torch.testing.assert_close(logits(back, inputs), logits(lora, inputs), rtol=1e-5, atol=1e-5)
    assert json.loads((tmp_path / "one-back" / "adapter_config.json").read_text())["peft_type"] == "LORA"
    again = gather(tiny("llama"), {"one": tmp_path / "one-back", "two": tmp_path / "two-back"})
    for name in ("one", "two"):
        # With padding the sums run over more terms, of zeros.
        close = 1e-5 if pad else 0
        torch.testing.assert_close(
            by_expert(again, name, inputs), by_expert(model, name, inputs), rtol=close, atol=close
        )
    if pad:
        ranks = {t.shape[0] for k, t in load_file(tmp_path / "one-back" / WEIGHTS).items() if "lora_A" in k}
        assert ranks == {8}
        saved = json.loads((tmp_path / "one-back" / "adapter_config.json").read_text())
        assert (saved["r"], saved["lora_alpha"]) == (8, 8)  # all that a server reads
        assert saved["rank_pattern"] == saved["alpha_pattern"] == {}
        # What vLLM's and SGLang's readers ask beside: these files, these keys, and none of LoRA's variants.
        assert {path.name for path in (tmp_path / "one-back").iterdir()} >= {"adapter_config.json", WEIGHTS}
        assert not any(key.endswith(".bias") for key in load_file(tmp_path / "one-back" / WEIGHTS))
        assert all(
            re.fullmatch(r"base_model\.model\..+\.lora_[AB]\.weight", key)
            for key in load_file(tmp_path / "one-back" / WEIGHTS)
        )
        assert isinstance(saved["target_modules"], (list, str))
        assert saved["target_modules"]
        assert not any(saved[name] for name in ("use_rslora", "use_dora", "modules_to_save", "lora_bias"))


def read_as_servers_do(folder: Path, layers: int) -> dict[str, torch.Tensor]:
    """What vLLM and SGLang make of a folder: {fused linear: what is added to its weight}, or they fail.

    They read `r`, `lora_alpha` and `target_modules` of the config, keys of two forms, and stack the factors of q, k
    and v by the key of q, those of gate and up by that of gate (SGLang srt/lora/{lora,lora_config,utils}.py, vLLM
    vllm/lora/{peft_helper,utils}.py, both of 2026).
    """
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["peft_type"].lower() == "lora"
    assert isinstance(config["target_modules"], list)  # as a string SGLang takes shorthands alone
    assert not any(
        config[name] for name in ("use_dora", "use_rslora", "modules_to_save", "rank_pattern", "alpha_pattern")
    )
    assert config["bias"] == "none"
    scale, found = config["lora_alpha"] / config["r"], {}
    weights = load_file(folder / WEIGHTS)
    assert {key.split(".")[-3] for key in weights} == {name.split(".")[-1] for name in config["target_modules"]}
    for key in weights:
        assert re.fullmatch(rf"base_model\.model\.model\.layers\.[0-{layers - 1}]\.\w+\.\w+\.lora_[AB]\.weight", key)
        assert weights[key].shape["lora_B" in key] == config["r"]
    for key, factor in weights.items():
        path, name = key.removesuffix(".lora_A.weight").rsplit(".", 1) if "lora_A" in key else (None, None)
        group = {"q_proj": ("q_proj", "k_proj", "v_proj"), "gate_proj": ("gate_proj", "up_proj")}.get(name, (name,))
        if path is None or name in ("k_proj", "v_proj", "up_proj"):
            continue  # with the first of its group, without which nothing reads it
        deltas = [weights[f"{path}.{n}.lora_B.weight"] @ weights[f"{path}.{n}.lora_A.weight"] for n in group]
        found[f"{path}.{'+'.join(group)}"] = scale * torch.cat(deltas)
        assert factor.dtype == torch.float32
    return found


@pytest.mark.parametrize("modules", [["q_proj"], ["v_proj", "up_proj"], ["down_proj"]])
def test_exported_expert_is_all_there_as_servers_read_it(modules: list[str], tiny, tmp_path) -> None:
    fields = {"r": 4, "lora_alpha": 6, "target_modules": modules, "rank_pattern": {modules[0]: 3}}
    lora = save_lora(tiny("llama"), tmp_path / "one", **fields)
    model = gather(tiny("llama"), {"one": tmp_path / "one"})
    model.base_model.export_expert("one", tmp_path / "back", pad_ranks=True)
    served = read_as_servers_do(tmp_path / "back", lora.config.num_hidden_layers)
    own = {name: m for name, m in lora.base_model.model.named_modules() if hasattr(m, "get_delta_weight")}
    left = set(own)
    for fused, delta in served.items():
        parent, _, names = fused.removeprefix("base_model.model.").rpartition(".")
        paths = [f"{parent}.{name}" for name in names.split("+")]
        blank = [
            torch.zeros_like(lora.base_model.model.get_submodule(p).weight) if p not in own else None for p in paths
        ]
        wanted = [own[p].get_delta_weight("default") if b is None else b for p, b in zip(paths, blank, strict=True)]
        torch.testing.assert_close(delta, torch.cat(wanted))
        left -= set(paths)
    assert not left


def test_scale_of_an_exported_expert_is_the_same_to_the_last_bit() -> None:
    for rank in range(1, 129):
        for alpha in (*range(1, 129), 0.1, 0.3, 1.7):
            scale = alpha / rank
            assert _alpha(scale, rank) / rank == scale
    assert (_alpha(0.5, 8), type(_alpha(0.5, 8))) == (4, int)  # as people write it


SCRIPT = """
import sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
folder, ids = sys.argv[1], torch.arange(5, 12).unsqueeze(0)
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder + "/base"), folder + "/back")
torch.save(model.eval()(ids).logits.detach(), folder + "/logits.pt")
assert not [name for name in sys.modules if name.startswith("mixadapters")]
"""


@pytest.mark.slow
def test_exported_expert_loads_where_this_library_is_not(tiny, tmp_path) -> None:
    base = tiny("llama")
    base.save_pretrained(tmp_path / "base")
    lora = save_lora(tiny("llama"), tmp_path / "one", r=4, target_modules=["q_proj", "up_proj"])
    gather(base, {"one": tmp_path / "one"}).base_model.export_expert("one", tmp_path / "back")
    Process(SCRIPT, [str(tmp_path)]).finish()
    expected = logits(lora, {"input_ids": torch.arange(5, 12).unsqueeze(0)})
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), expected, rtol=1e-5, atol=1e-5)
