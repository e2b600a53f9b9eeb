"""Cut base models on disk: what stock transformers loads, what we load, and strangers' folders."""

from __future__ import annotations

import copy
import json
import pickle
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from moe_bases import batch, logits, moe
from peft import get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM

from mixadapters import MoAConfig
from mixadapters.surgery import expert_layers, load_pruned, merge_experts, prune_experts, record_usage, save_pruned
from mixadapters.surgery.blocks import BaseExperts
from mixadapters.surgery.compressed import expand_compressed, load_compressed, save_compressed
from mixadapters.surgery.layouts import EXPERTS_FILE
from mixadapters.surgery.usage import ExpertUsage

BATCH = batch()
KINDS = ("mixtral", "olmoe", "deepseek_v3", "gpt_oss", "qwen3_moe", "granitemoe", "jamba", "afmoe")


def used(model: nn.Module) -> ExpertUsage:
    with torch.no_grad(), record_usage(model) as usage:
        model(**BATCH)
    return usage


@pytest.mark.parametrize("kind", KINDS)
def test_equal_counts_load_with_stock_transformers(kind: str, tmp_path: Path) -> None:
    model = moe(kind)
    prune_experts(model, used(model), 3)
    assert save_pruned(model, tmp_path / "pruned")
    assert not (tmp_path / "pruned" / EXPERTS_FILE).exists()
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "pruned").eval()
    torch.testing.assert_close(logits(stock, BATCH), logits(model, BATCH), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(
        logits(load_pruned(tmp_path / "pruned"), BATCH), logits(model, BATCH), rtol=1e-4, atol=1e-5
    )
    card = (tmp_path / "pruned" / "README.md").read_text()
    assert "library_name: transformers" in card
    assert "load_pruned" not in card


@pytest.mark.parametrize("kind", KINDS)
def test_unequal_counts_merged_experts_and_preserved_mass_load_with_ours(kind: str, tmp_path: Path) -> None:
    model = moe(kind)
    layers: list[Any] = expert_layers(model)
    layers[0].keep([5, 0, 2])
    layers[0].assign([0, 1, 1])
    if len(layers) > 1:
        layers[1].keep([1, 2, 3, 4], preserve_mass=True)
    assert not save_pruned(model, tmp_path / "cut")
    again = load_pruned(tmp_path / "cut")
    assert type(again) is type(model)
    assert [layer.names for layer in expert_layers(again)] == [layer.names for layer in layers]
    torch.testing.assert_close(logits(again, BATCH), logits(model, BATCH), rtol=1e-5, atol=1e-6)
    card = (tmp_path / "cut" / "README.md").read_text()
    assert "load_pruned" in card
    assert "stock transformers refuses" in card
    assert not save_pruned(again, tmp_path / "again")  # what is loaded can be saved
    prune_experts(again, used(again), 2)
    assert {len(layer.names) for layer in expert_layers(again)} == {2}


def test_a_cut_model_goes_through_codes_and_back(tmp_path: Path) -> None:
    model = moe("mixtral")
    first, *_ = expert_layers(model)
    first.keep([0, 2])
    save_compressed(model, tmp_path / "codes", codec="packed")
    torch.testing.assert_close(logits(load_compressed(tmp_path / "codes"), BATCH), logits(model, BATCH))
    expand_compressed(tmp_path / "codes", tmp_path / "plain")
    torch.testing.assert_close(logits(load_pruned(tmp_path / "plain"), BATCH), logits(model, BATCH))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["mixtral", "deepseek_v3"])
def test_what_was_loaded_in_16_bits_comes_back_bit_for_bit(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """Also through codes. A model that is cast is rounded where transformers loads float32, without surgery too."""
    moe(kind).save_pretrained(tmp_path / "whole")
    model = type(moe(kind)).from_pretrained(tmp_path / "whole", dtype=dtype).eval()  # type: ignore[attr-defined]
    expert_layers(model)[0].keep([5, 0, 2])
    save_pruned(model, tmp_path / "cut")
    save_compressed(model, tmp_path / "codes", codec="packed")
    for again in (load_pruned(tmp_path / "cut"), load_compressed(tmp_path / "codes").eval()):
        assert {p.dtype for p in again.parameters()} == {dtype}
        assert torch.equal(logits(again, BATCH), logits(model, BATCH))
    cast = moe(kind).to(dtype)
    cast.save_pretrained(tmp_path / "cast")  # type: ignore[operator]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "cast")
    assert {name: value.dtype for name, value in loaded.named_buffers()} != {
        name: value.dtype for name, value in cast.named_buffers()
    }


def test_weights_that_are_no_numbers_are_said(tmp_path: Path) -> None:
    model = moe("mixtral")
    with torch.no_grad():
        model.lm_head.weight[0, 0] = torch.nan
    save_pruned(model, tmp_path / "cut")
    with pytest.warns(UserWarning, match=r"cut'?: 'lm_head.weight' hold NaN or infinite values"):
        load_pruned(tmp_path / "cut")


@pytest.mark.parametrize("how", ["copied", "pickled", "loaded"])
def test_what_a_trainer_saves_of_an_uneven_base_can_be_read(how: str, tmp_path: Path) -> None:
    """Its own `save_pretrained`, also of a copy, a pickle, a loaded one, and once more where it has become even."""
    model = moe("mixtral")
    layers = expert_layers(model)
    layers[0].keep([0, 2])
    model.save_pretrained(tmp_path / "cut")
    make = {"copied": copy.deepcopy, "pickled": lambda m: pickle.loads(pickle.dumps(m))}
    again = load_pruned(tmp_path / "cut") if how == "loaded" else make[how](model)
    layers[0].set_weights(0, layers[0].weights(1))  # of the first model alone
    again.save_pretrained(tmp_path / "again")
    torch.testing.assert_close(logits(load_pruned(tmp_path / "again"), BATCH), logits(again, BATCH))
    assert "load_pruned" in (tmp_path / "again" / "README.md").read_text()
    with pytest.raises(ValueError, match="push_to_hub=True would leave out"):
        again.save_pretrained(tmp_path / "more", push_to_hub=True)
    expert_layers(again)[1].keep([3, 4])
    again.save_pretrained(tmp_path / "again")
    assert not (tmp_path / "again" / EXPERTS_FILE).exists()
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "again").eval()
    torch.testing.assert_close(logits(stock, BATCH), logits(again, BATCH), rtol=1e-5, atol=1e-6)


def test_weights_that_are_cut_short_are_refused(tmp_path: Path) -> None:
    save_pruned(moe("mixtral"), tmp_path / "pruned")
    file = tmp_path / "pruned" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(ValueError, match="its weights are not whole"):
        load_pruned(tmp_path / "pruned")
    file.unlink()  # as in a folder of codes
    with pytest.raises(ValueError, match=r"has no weights that save_pruned writes \(load_compressed reads codes\)"):
        load_pruned(tmp_path / "pruned")


def test_stock_transformers_refuses_unequal_counts_aloud(tmp_path: Path) -> None:
    model = moe("gpt_oss")
    expert_layers(model)[0].keep([0, 1, 2])
    save_pruned(model, tmp_path / "cut")
    with pytest.raises(RuntimeError, match="mismatch"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "cut")


def test_the_loss_of_routers_is_refused_where_layers_have_other_numbers_of_experts(tmp_path: Path) -> None:
    """transformers joins the logits of all layers. Of layers that have as many, and after a merge, it goes on."""
    labels = {**batch(), "labels": batch()["input_ids"]}
    model = moe("mixtral")
    merge_experts(model, used(model), 3)
    assert model(**labels, output_router_logits=True).loss.isfinite()
    for layer, kept in zip(expert_layers(model := moe("mixtral"), ""), ([0, 1, 2], [1, 2, 3, 4]), strict=True):
        layer.keep(kept)
    assert model(**labels).loss.isfinite()
    save_pruned(model, tmp_path / "cut")
    for uneven in (model, copy.deepcopy(model), load_pruned(tmp_path / "cut")):
        with pytest.raises(ValueError, match=r"output_router_logits=True: the layers have 3 and 4 experts now"):
            uneven(**labels, output_router_logits=True)
        uneven.config.output_router_logits = True
        with pytest.raises(ValueError, match=r"output_router_logits=True"):
            uneven(**labels)
        assert uneven(**labels, output_router_logits=False).loss.isfinite()


def test_models_that_compute_no_loss_of_routers_give_the_logits_of_layers_that_differ() -> None:
    body = moe("mixtral").model
    for layer, kept in zip(expert_layers(body, ""), ([0, 1, 2], [1, 2, 3, 4]), strict=True):
        layer.keep(kept)
    given = {name: value for name, value in batch().items() if name != "labels"}
    assert [part.shape[-1] for part in body(**given, output_router_logits=True).router_logits] == [3, 4]


def test_a_merged_base_comes_back(tmp_path: Path) -> None:
    model = moe("mixtral")
    merge_experts(model, used(model), 4)
    assert not save_pruned(model, tmp_path / "merged")
    again = load_pruned(tmp_path / "merged")
    torch.testing.assert_close(logits(again, BATCH), logits(model, BATCH), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("said", "complaint"),
    [
        ("{", "does not say which experts"),
        ("[" * 100000, "does not say which experts"),
        ({"format": 2, "layers": {}}, "not of format 1"),
        ({"format": 1, "layers": {"model.layers.0.mlp.experts": 3}}, "must be a number of experts"),
        ({"format": 1, "layers": {"model.layers.0.mlp.experts": {"experts": 2, "columns": [0, 5]}}}, "do not go by 2"),
        ({"format": 1, "layers": {"model.layers.0.mlp.experts": {"experts": 1, "columns": [0]}}}, "names the layers"),
        ({"format": 1, "layers": {f"model.layers.{i}.mlp.experts": {"experts": 9, "columns": list(range(9))}
                                  for i in range(2)}}, "has 6 experts, and not 9"),
    ],
)  # fmt: skip
def test_a_strangers_folder_is_read_strictly(said: Any, complaint: str, tmp_path: Path) -> None:
    model = moe("mixtral")
    expert_layers(model)[0].keep([0, 1, 2])
    save_pruned(model, tmp_path / "cut")
    text = said if isinstance(said, str) else json.dumps(said)
    (tmp_path / "cut" / EXPERTS_FILE).write_text(text)
    with pytest.raises(ValueError, match=complaint):
        load_pruned(tmp_path / "cut")


def test_folders_that_are_no_pruned_models_are_refused(tmp_path: Path) -> None:
    model = moe("mixtral")
    expert_layers(model)[0].keep([0, 1, 2])
    save_pruned(model, tmp_path / "cut")
    with pytest.raises(ValueError, match="holds something already"):
        save_pruned(model, tmp_path / "cut")
    with pytest.raises(ValueError, match=r"has no config\.json"):
        load_pruned(tmp_path)
    with pytest.raises(ValueError, match=r"takes no \['trust_remote_code'\]"):
        load_pruned(tmp_path / "cut", trust_remote_code=True)
    config = json.loads((tmp_path / "cut" / "config.json").read_text())
    for name in ("AutoConfig", "os", "LlamaForCausalLM2"):
        (tmp_path / "cut" / "config.json").write_text(json.dumps({**config, "architectures": [name]}))
        with pytest.raises(ValueError, match="no MoE base model"):
            load_pruned(tmp_path / "cut")
    wrapped = get_peft_model(moe("mixtral"), MoAConfig(num_experts=2, r=2, target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="has adapters in it"):
        save_pruned(wrapped, tmp_path / "wrapped")
    assert not (tmp_path / "wrapped").exists()


def test_one_layer_at_a_time_is_held_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """When a layer is cut, the whole tensors of those before it are gone."""
    model = moe("mixtral", num_hidden_layers=4)
    usage, before, alive = used(model), [], []
    for layer in expert_layers(model):
        before.append(weakref.ref(layer.experts.down_proj))  # type: ignore[attr-defined]
    plain = BaseExperts.keep

    def keep(self: Any, *args: Any, **kwargs: Any) -> None:
        alive.append(sum(one() is not None for one in before))
        plain(self, *args, **kwargs)

    monkeypatch.setattr(BaseExperts, "keep", keep)
    prune_experts(model, usage, 3)
    assert alive == [4, 3, 2, 1]
