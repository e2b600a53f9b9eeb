"""PEFT's verbs, and transformers' generate, on every method: what works for PEFT's own types works for these."""

from __future__ import annotations

import copy
import json
from functools import partial
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import (
    PeftConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from peft.helpers import disable_input_dtype_casting, rescale_adapter_scale
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mixadapters import BottleneckConfig, ForwardContext, MixDAConfig, MoSAConfig
from mixadapters.routers import DomainGate

# A mixture in every form of attachment: at linear layers, at whole blocks, before and beside the frozen layer.
KINDS = {
    "bottleneck": (BottleneckConfig, {"r": 4}),
    "parallel": (BottleneckConfig, {"r": 4, "placement": "parallel", "glu": True, "scale": "learnable"}),
    "houlsby": (BottleneckConfig, {"r": 4, "placement": "houlsby", "layer_norm": True}),
    "mixda": (MixDAConfig, {"domains": ["a", "b"], "r": 4, "task_r": 3}),
    "mixda_prefix": (MixDAConfig, {"domains": ["a", "b"], "r": 4, "gate_granularity": "causal_prefix"}),
    "mixda_convex": (MixDAConfig, {"domains": ["a", "b"], "r": 4, "combine": "convex", "adapter_input": "ffn_input"}),
}
every = pytest.mark.parametrize("kind", KINDS)
one_of_each = pytest.mark.parametrize("kind", ["bottleneck", "mixda"])


@pytest.fixture(scope="session")
def tiny(tiny: Any) -> Any:
    """Models of three layers where a test asks for no more: MixDA adapts two of them by default."""
    return partial(tiny, layers=3)


def config(kind: str, **fields: Any) -> Any:
    """A config that changes the model's output from the start."""
    cls, base = KINDS[kind]
    return cls(**{**copy.deepcopy(base), "init_weights": False, **fields})


def stir(verb: Any, *args: Any, **kwargs: Any) -> Any:
    """What `verb` does, with gates that tell tokens apart: they start constant."""
    made = verb(*args, **kwargs)
    model = made if isinstance(made, nn.Module) else verb.__self__
    with torch.no_grad():
        for gate in model.modules():
            if isinstance(gate, DomainGate) and not gate.output.weight.is_meta and not gate.output.weight.any():
                gate.output.weight.normal_()
    return made


wrap = partial(stir, get_peft_model)
inject = partial(stir, inject_adapter_in_model)


@pytest.fixture
def ids(tiny_inputs: Any) -> dict[str, Tensor]:
    return tiny_inputs("llama", batch=4)


@pytest.fixture
def base_folder(tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    tiny("llama").save_pretrained(folder)
    return folder


@torch.no_grad()
def logits(model: nn.Module, inputs: dict[str, Any], **more: Any) -> Tensor:
    return model.eval()(**inputs, **more).logits


def differ(a: Tensor, b: Tensor) -> bool:
    return not torch.allclose(a, b, atol=1e-4)


def equal(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b)


def names_of(model: nn.Module, trainable: bool = True) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad is trainable}


# --- one adapter --------------------------------------------------------------------------------------------------


@every
def test_only_the_adapter_trains(kind: str, tiny: Any, ids: Any) -> None:
    base = tiny("llama")
    frozen = {name for name, _ in base.named_parameters()}
    model = wrap(base, config(kind))
    prefix = f"{type(config(kind)).__name__.removesuffix('Config').lower()}_adapters.default."
    assert names_of(model)
    assert all(prefix in name for name in names_of(model))
    assert len(names_of(model, trainable=False)) == len(frozen)
    model(**ids, labels=ids["input_ids"]).loss.backward()
    assert all((p.grad is not None) == p.requires_grad for p in model.parameters())


@every
@pytest.mark.parametrize("task_type", [None, "CAUSAL_LM"])
def test_saved_and_loaded_under_another_name_gives_the_same_output(
    kind: str, task_type: str | None, tiny: Any, ids: Any, tmp_path: Path
) -> None:
    model = wrap(tiny("llama"), config(kind, task_type=task_type))
    expected = logits(model, ids)
    assert differ(expected, logits(tiny("llama"), ids))
    model.save_pretrained(tmp_path)
    assert "default" not in "".join(load_file(tmp_path / "adapter_model.safetensors"))
    for low_cpu_mem_usage in (False, True):
        loaded = PeftModel.from_pretrained(
            tiny("llama"), tmp_path, adapter_name="other", low_cpu_mem_usage=low_cpu_mem_usage
        )
        assert not [name for name, p in loaded.named_parameters() if p.is_meta or p.requires_grad]
        assert not [name for name, b in loaded.named_buffers() if b.is_meta]
        equal(logits(loaded, ids), expected)


@every
def test_config_survives_its_file(kind: str, tiny: Any, tmp_path: Path) -> None:
    place = "layers.1.mlp" if kind in ("parallel", "mixda_convex") else "layers.1.mlp.down_proj"
    model = wrap(tiny("llama"), config(kind, rank_pattern={place: 2}))
    model.save_pretrained(tmp_path)
    loaded = PeftConfig.from_pretrained(tmp_path)
    mine = model.peft_config["default"]
    assert type(loaded) is type(mine)
    skipped = {"inference_mode", "auto_mapping"}
    theirs = {k: v for k, v in loaded.to_dict().items() if k not in skipped}
    assert theirs == {k: v for k, v in mine.to_dict().items() if k not in skipped}


@one_of_each
@pytest.mark.parametrize(
    ("architecture", "head", "task_type", "auto"),
    [
        ("llama", "causal_lm", "CAUSAL_LM", "AutoPeftModelForCausalLM"),
        ("t5", "seq2seq_lm", "SEQ_2_SEQ_LM", "AutoPeftModelForSeq2SeqLM"),
        ("bert", "sequence_classification", "SEQ_CLS", "AutoPeftModelForSequenceClassification"),
        ("bert", "token_classification", "TOKEN_CLS", "AutoPeftModelForTokenClassification"),
        ("bert", "base", "FEATURE_EXTRACTION", "AutoPeftModelForFeatureExtraction"),
        ("bert", "masked_lm", None, "AutoPeftModel"),
    ],
)
def test_auto_classes_load_base_and_adapter(
    kind: str,
    architecture: str,
    head: str,
    task_type: str | None,
    auto: str,
    tiny: Any,
    tiny_inputs: Any,
    tmp_path: Path,
) -> None:
    tiny(architecture, head).save_pretrained(tmp_path / "base")
    base = type(tiny(architecture, head)).from_pretrained(tmp_path / "base")
    model = wrap(base, config(kind, task_type=task_type))
    inputs = tiny_inputs(architecture)
    with torch.no_grad():
        expected = model.eval()(**inputs)[0]
    model.save_pretrained(tmp_path / "adapter")
    loaded = getattr(peft, auto).from_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        equal(loaded.eval()(**inputs)[0], expected)


@every
def test_disable_adapter_gives_the_base_model_and_back(kind: str, tiny: Any, ids: Any) -> None:
    model = wrap(tiny("llama"), config(kind))
    adapted = logits(model, ids)
    with model.disable_adapter():
        assert torch.equal(logits(model, ids), logits(tiny("llama"), ids))
    assert torch.equal(logits(model, ids), adapted)


@every
def test_unload_leaves_the_base_model_as_it_was(kind: str, tiny: Any, ids: Any) -> None:
    base = tiny("llama")
    state, structure = copy.deepcopy(base.state_dict()), [(n, type(m)) for n, m in base.named_modules()]
    expected = logits(base, ids)
    unloaded = wrap(base, config(kind)).unload()
    assert unloaded is base
    assert [(n, type(m)) for n, m in base.named_modules()] == structure
    assert all(torch.equal(v, state[k]) for k, v in base.state_dict().items())
    assert ForwardContext.find(base) is None
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in base.modules())
    assert torch.equal(logits(base, ids), expected)


@every
def test_base_weights_are_saved_and_set_through_the_wrapper(kind: str, tiny: Any) -> None:
    expected = tiny("llama").state_dict()
    model = wrap(tiny("llama"), config(kind))
    state = peft.get_base_model_state_dict(model)
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[k], v) for k, v in expected.items())
    peft.set_base_model_state_dict(model, expected)


# --- merging ------------------------------------------------------------------------------------------------------

LINEAR = {
    "bottleneck": {"activation": "identity"},
    "parallel": {"activation": "identity", "glu": False, "adapter_input": "ffn_intermediate"},
    "houlsby": {"activation": "identity", "layer_norm": False},
}


@pytest.mark.parametrize("kind", LINEAR)
def test_merged_identity_adapters_are_exact(kind: str, tiny: Any, ids: Any) -> None:
    model = wrap(tiny("llama"), config(kind, use_bias=False, **LINEAR[kind]))
    expected, before = logits(model, ids), copy.deepcopy(peft.get_base_model_state_dict(model))
    model.merge_adapter()
    torch.testing.assert_close(logits(model, ids), expected, atol=2e-5, rtol=1e-4)
    model.unmerge_adapter()
    assert all(torch.equal(v, before[k]) for k, v in peft.get_base_model_state_dict(model).items())
    merged = model.merge_and_unload(safe_merge=True)
    assert not any(isinstance(m, BaseTunerLayer) for m in merged.modules())
    torch.testing.assert_close(logits(merged, ids), expected, atol=2e-5, rtol=1e-4)


def test_merge_with_a_bias_needs_a_layer_with_one(tiny: Any, tiny_inputs: Any) -> None:
    inputs = tiny_inputs("bert")
    model = wrap(tiny("bert"), config("bottleneck", activation="identity"))
    expected = logits(model, inputs)
    torch.testing.assert_close(logits(model.merge_and_unload(), inputs), expected, atol=2e-5, rtol=1e-4)
    with pytest.raises(ValueError, match=r"it has a bias and the layer has none; train with use_bias=False"):
        wrap(tiny("llama"), config("bottleneck", activation="identity")).merge_and_unload()


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("bottleneck", "its own activation is not linear"),
        ("parallel", "is not a linear layer"),
        ("houlsby", "its own LayerNorm is not linear"),
        ("mixda", "its router depends on the input"),
    ],
)
def test_merge_is_refused_before_any_change(kind: str, reason: str, tiny: Any, ids: Any) -> None:
    fields = {"task_adapter": None} if kind == "mixda" else {}
    model = wrap(tiny("llama"), config(kind, **fields))
    expected, before = logits(model, ids), copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=reason):
        model.merge_and_unload()
    with pytest.raises(ValueError, match=reason):
        model.merge_adapter()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert torch.equal(logits(model, ids), expected)


def test_disabling_unmerges_first(tiny: Any, ids: Any) -> None:
    model = wrap(tiny("llama"), config("bottleneck", activation="identity", use_bias=False))
    model.merge_adapter()
    with model.disable_adapter():
        assert torch.equal(logits(model, ids), logits(tiny("llama"), ids))


# --- several adapters ---------------------------------------------------------------------------------------------


@every
def test_adapters_are_added_switched_loaded_and_deleted(kind: str, tiny: Any, ids: Any, tmp_path: Path) -> None:
    model = wrap(tiny("llama"), config(kind))
    stir(model.add_adapter, "second", config(kind))
    first = logits(model, ids)
    assert all(".default." in name for name in names_of(model))
    model.set_adapter("second")
    second = logits(model, ids)
    assert all(".second." in name for name in names_of(model))
    assert differ(first, second)
    model.save_pretrained(tmp_path)
    assert {p.name for p in tmp_path.iterdir() if p.is_dir()} == {"second"}
    keys = [set(load_file(p / "adapter_model.safetensors")) for p in (tmp_path, tmp_path / "second")]
    assert keys[0] == keys[1]  # each holds its own only
    result = model.load_adapter(tmp_path / "second", adapter_name="third", is_trainable=True)
    assert not [key for key in result.missing_keys if "third" in key]
    assert not result.unexpected_keys
    model.set_adapter("third")
    equal(logits(model, ids), second)
    model.delete_adapter("second")
    assert not [name for name, _ in model.named_parameters() if ".second." in name]
    equal(logits(model, ids), second)
    model.delete_adapter("third")
    assert model.active_adapters == ["default"]
    equal(logits(model, ids), first)
    model.delete_adapter("default")
    equal(logits(model.base_model.model, ids), logits(tiny("llama"), ids))


@every
def test_several_active_adapters_follow_one_another(kind: str, tiny: Any, ids: Any) -> None:
    model = wrap(tiny("llama"), config(kind))
    stir(model.add_adapter, "second", config(kind))
    one = logits(model, ids)
    model.set_adapter("second")
    two = logits(model, ids)
    model.base_model.set_adapter(["default", "second"])
    both = logits(model, ids)
    assert differ(both, one)
    assert differ(both, two)
    assert {name.split("_adapters.")[1].split(".")[0] for name in names_of(model)} == {"default", "second"}
    model.train()(**ids, labels=ids["input_ids"]).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    with model.disable_adapter():
        assert torch.equal(logits(model, ids), logits(tiny("llama"), ids))


@one_of_each
def test_adapters_may_differ_in_modules_and_ranks(kind: str, tiny: Any, ids: Any) -> None:
    model = wrap(tiny("llama"), config(kind))
    first = logits(model, ids)
    stir(model.add_adapter, "attention", config(kind, target_modules=["o_proj", "q_proj"], r=2))
    assert torch.equal(logits(model, ids), first)
    model.set_adapter("attention")
    assert differ(logits(model, ids), first)
    model.delete_adapter("default")
    fresh = wrap(tiny("llama"), config(kind, target_modules=["o_proj", "q_proj"], r=2))
    assert names_of(fresh) == {name.replace(".attention.", ".default.") for name in names_of(model)}


@every
def test_status_tells_type_and_state(kind: str, tiny: Any) -> None:
    model = wrap(tiny("llama"), config(kind))
    stir(model.add_adapter, "second", config(kind))
    status = model.get_model_status()
    assert status.adapter_model_type == type(model.base_model).__name__
    assert status.peft_types == {name: model.peft_config[name].peft_type.value for name in ("default", "second")}
    assert status.enabled is True
    assert status.active_adapters == ["default"]
    assert status.merged_adapters == []
    assert status.requires_grad == {"default": True, "second": False}
    assert status.available_adapters == ["default", "second"]
    assert status.trainable_params == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert status.num_adapter_layers == len(model.get_layer_status()) == len(list(model.base_model.hosts()))
    with model.disable_adapter():
        assert model.get_model_status().enabled is False


@every
def test_is_trainable_and_requires_grad_verbs(kind: str, tiny: Any, tmp_path: Path) -> None:
    wrap(tiny("llama"), config(kind)).save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(tiny("llama"), tmp_path, is_trainable=True)
    trainable = names_of(model)
    assert trainable
    model.set_requires_grad("default", requires_grad=False)
    assert not names_of(model)
    model.set_requires_grad("default")
    assert names_of(model) == trainable


def test_one_config_object_describes_adapters_of_several_models(tiny: Any, tmp_path: Path) -> None:
    given = config("mixda", task_type="CAUSAL_LM")
    models, at = [], {}
    for depth in (2, 6):
        models.append(wrap(tiny("llama", num_hidden_layers=depth), given))
        at[depth] = {n.split("layers.")[1][0] for n in names_of(models[-1]) if ".domain." in n}
    assert at == {2: {"0"}, 6: {"1", "2"}}  # a third and a half of each depth
    models[0].base_model.add_domain("c")
    assert list(models[1].peft_config["default"].domains) == ["a", "b"]
    assert models[1].peft_config["default"] is given  # as PEFT does
    for model, depth in zip(models, (2, 6), strict=True):
        model.save_pretrained(tmp_path / str(depth))
        PeftModel.from_pretrained(tiny("llama", num_hidden_layers=depth), tmp_path / str(depth))


def test_adapters_made_of_one_config_object_keep_their_own(tiny: Any, ids: Any, tmp_path: Path) -> None:
    given = config("mixda")
    model = wrap(tiny("llama"), given)
    model.add_adapter("second", given)
    model.base_model.add_domain("c", adapter_name="second")
    assert list(model.peft_config["default"].domains) == ["a", "b"]
    assert list(model.peft_config["second"].domains) == ["a", "b", "c"]
    expected = logits(model, ids)
    model.save_pretrained(tmp_path)
    equal(logits(PeftModel.from_pretrained(tiny("llama"), tmp_path), ids), expected)
    PeftModel.from_pretrained(tiny("llama"), tmp_path / "second")


# --- modules_to_save ----------------------------------------------------------------------------------------------


@one_of_each
@pytest.mark.parametrize("fields", [{"task_type": "SEQ_CLS"}, {"modules_to_save": ["classifier"]}])
def test_head_is_trained_saved_and_loaded(kind: str, fields: Any, tiny: Any, tiny_inputs: Any, tmp_path: Path) -> None:
    inputs = tiny_inputs("bert", labels="classes", batch=3)
    model = wrap(tiny("bert", "sequence_classification"), config(kind, **fields))
    head = [name for name in names_of(model) if "modules_to_save.default" in name]
    assert len(head) == 2
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model.train()(**inputs).loss.backward()
    optimizer.step()
    after = dict(model.named_parameters())
    assert all(not torch.equal(before[name], after[name]) for name in head)
    expected = logits(model, inputs)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny("bert", "sequence_classification"), tmp_path)
    equal(logits(loaded, inputs), expected)
    with loaded.disable_adapter():
        equal(logits(loaded, inputs), logits(tiny("bert", "sequence_classification"), inputs))


@one_of_each
def test_token_embeddings_train_beside_the_adapter(kind: str, tiny: Any, ids: Any, tmp_path: Path) -> None:
    model = wrap(tiny("llama"), config(kind, trainable_token_indices=[5, 6]))
    delta = [p for name, p in model.named_parameters() if "trainable_tokens_delta" in name and p.requires_grad]
    assert [tuple(p.shape) for p in delta] == [(2, 32)]
    with torch.no_grad():
        delta[0].add_(1.0)
    expected = logits(model, {"input_ids": torch.tensor([[5, 6, 7]])})
    model.save_pretrained(tmp_path)
    equal(
        logits(PeftModel.from_pretrained(tiny("llama"), tmp_path), {"input_ids": torch.tensor([[5, 6, 7]])}), expected
    )


@one_of_each
@pytest.mark.parametrize("tied", [False, True])
def test_trained_tokens_of_a_vocabulary_that_has_grown_are_loaded(
    kind: str, tied: bool, tiny: Any, tmp_path: Path
) -> None:
    """PEFT saves the embeddings beside them, under keys of its own."""

    def grown() -> nn.Module:
        model = tiny("llama", tie_word_embeddings=tied)
        model.resize_token_embeddings(99)
        return model

    inputs = {"input_ids": torch.tensor([[5, 98, 7]])}
    model = wrap(grown(), config(kind, trainable_token_indices=[5, 98]))
    with torch.no_grad():
        next(p for name, p in model.named_parameters() if "trainable_tokens_delta" in name).add_(1.0)
    expected = logits(model, inputs)
    model.save_pretrained(tmp_path, save_embedding_layers=True)
    equal(logits(PeftModel.from_pretrained(grown(), tmp_path), inputs), expected)


# --- injection without a wrapper ----------------------------------------------------------------------------------


@every
def test_inject_in_model_trains_saves_and_loads(kind: str, tiny: Any, ids: Any) -> None:
    model = inject(config(kind), tiny("llama"), adapter_name="foo")
    expected = logits(model, ids)
    assert differ(expected, logits(tiny("llama"), ids))
    model.train()(**ids, labels=ids["input_ids"]).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    state = get_peft_model_state_dict(model, adapter_name="foo")
    assert state
    assert not [key for key in state if "foo" in key]
    for options in ({}, {"low_cpu_mem_usage": True}):
        other = inject(config(kind), tiny("llama"), adapter_name="bar", **options)
        result = set_peft_model_state_dict(other, state, adapter_name="bar", **options)
        assert not result.unexpected_keys
        assert not [key for key in result.missing_keys if "bar" in key]
        assert not [name for name, p in other.named_parameters() if p.is_meta]
        equal(logits(other, ids), expected)


@one_of_each
def test_inject_from_a_state_dict(kind: str, tiny: Any, ids: Any) -> None:
    model = inject(config(kind), tiny("llama"))
    state = get_peft_model_state_dict(model)
    other = inject(config(kind), tiny("llama"), state_dict=state)
    set_peft_model_state_dict(other, state)
    equal(logits(other, ids), logits(model, ids))


@every
def test_weights_are_swapped_in_place(kind: str, tiny: Any, ids: Any) -> None:
    one, two = (wrap(tiny("llama"), config(kind)) for _ in range(2))
    pointers = {name: p.data_ptr() for name, p in one.named_parameters()}
    set_peft_model_state_dict(one, get_peft_model_state_dict(two))
    assert pointers == {name: p.data_ptr() for name, p in one.named_parameters()}
    equal(logits(one, ids), logits(two, ids))


# --- files that do not fit ----------------------------------------------------------------------------------------


@pytest.fixture(params=["bottleneck", "mixda"])
def folder(request: pytest.FixtureRequest, tiny: Any, tmp_path: Path) -> Path:
    wrap(tiny("llama"), config(request.param)).save_pretrained(tmp_path)
    return tmp_path


def rewrite(folder: Path, change: Any) -> None:
    path = folder / "adapter_model.safetensors"
    save_file(change(load_file(path)), path)


def test_a_file_without_any_weight_is_an_error(folder: Path, tiny: Any) -> None:
    rewrite(folder, lambda state: {"something.else": torch.zeros(1)})
    with pytest.raises(
        ValueError, match=r"holds 0 weights of this adapter; it has 'something.else'|holds 0 of \d+ weights"
    ):
        PeftModel.from_pretrained(tiny("llama"), folder)


def test_a_missing_weight_is_an_error_that_names_it(folder: Path, tiny: Any) -> None:
    gone: list[str] = []

    def change(state: dict) -> dict:
        gone.append(sorted(state)[3])
        del state[gone[0]]
        return state

    rewrite(folder, change)
    for low_cpu_mem_usage in (False, True):
        with pytest.raises(ValueError, match=r"is missing. Was it saved from another base model") as error:
            PeftModel.from_pretrained(tiny("llama"), folder, low_cpu_mem_usage=low_cpu_mem_usage)
        assert gone[0].split("_adapters.")[1] in str(error.value)


def test_a_weight_left_over_is_an_error_that_names_it(folder: Path, tiny: Any) -> None:
    def change(state: dict) -> dict:
        key = next(k for k in sorted(state) if ".down.weight" in k)
        state[key.replace(".down.", ".sideways.")] = state[key].clone()
        return state

    rewrite(folder, change)
    with pytest.raises(ValueError, match=r"has no place for, such as .*sideways"):
        PeftModel.from_pretrained(tiny("llama"), folder)


def test_weights_of_more_layers_are_an_error(folder: Path, tiny: Any) -> None:
    with pytest.raises(ValueError, match=r"has no place for|which take no domain adapters"):
        PeftModel.from_pretrained(tiny("llama", layers=2), folder)


def test_weights_of_another_rank_are_an_error(folder: Path, tiny: Any) -> None:
    rewrite(folder, lambda state: {k: v[:1].clone() if ".down.weight" in k else v for k, v in state.items()})
    with pytest.raises(ValueError, match=r"down.weight' is \(1, \d+\) in the file and \(\d+, \d+\) in this model"):
        PeftModel.from_pretrained(tiny("llama"), folder)


def test_an_unknown_field_of_a_saved_config_is_an_error(folder: Path, tiny: Any) -> None:
    path = folder / "adapter_config.json"
    saved = json.loads(path.read_text())
    path.write_text(json.dumps({**saved, "activatoin": "gelu"}))
    with pytest.raises(ValueError, match=r"no field 'activatoin'. Did you mean 'activation'"):
        PeftModel.from_pretrained(tiny("llama"), folder)
    path.write_text(json.dumps({**saved, "format_version": 99}))
    with pytest.raises(ValueError, match="format_version=99 is newer"):
        PeftModel.from_pretrained(tiny("llama"), folder)


# --- generate -----------------------------------------------------------------------------------------------------


@every
@pytest.mark.parametrize(("task_type", "beams"), [("CAUSAL_LM", 1), (None, 3)])
def test_generate_with_and_without_cache_agree(
    kind: str, task_type: str | None, beams: int, tiny: Any, tiny_inputs: Any
) -> None:
    inputs = tiny_inputs("llama", batch=2, length=5, padding="left")
    model = wrap(tiny("llama"), config(kind, task_type=task_type)).eval()
    options = {"max_new_tokens": 5, "num_beams": beams, "do_sample": False}
    cached = model.generate(**inputs, **options, use_cache=True)
    assert torch.equal(cached, model.generate(**inputs, **options, use_cache=False))
    assert not torch.equal(cached, tiny("llama").generate(**inputs, **options))


@one_of_each
def test_generate_of_an_encoder_decoder(kind: str, tiny: Any, tiny_inputs: Any) -> None:
    inputs = tiny_inputs("t5", length=5, padding="right")
    inputs.pop("decoder_input_ids")
    model = wrap(tiny("t5"), config(kind, task_type="SEQ_2_SEQ_LM")).eval()
    for beams in (1, 2):
        options = {"max_new_tokens": 4, "num_beams": beams}
        assert torch.equal(model.generate(**inputs, **options), model.generate(**inputs, **options, use_cache=False))


@every
@pytest.mark.parametrize(
    ("task_type", "options"),
    [(None, {}), ("CAUSAL_LM", {"num_beams": 2}), (None, {"num_beams": 2, "num_return_sequences": 2})],
)
def test_generate_with_adapter_names_equals_each_row_alone(
    kind: str, task_type: str | None, options: dict, tiny: Any, ids: Any
) -> None:
    model = wrap(tiny("llama"), config(kind, task_type=task_type)).eval()
    stir(model.add_adapter, "second", config(kind, task_type=task_type))
    model.eval()
    options = {**options, "max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}
    names = ["second", "__base__", "default", "second"]
    mixed = model.generate(**ids, adapter_names=names, **options)
    per_row = options.get("num_return_sequences", 1)
    for row, name in enumerate(names):
        alone = {k: v[row : row + 1] for k, v in ids.items()}
        if name == "__base__":
            with model.disable_adapter():
                expected = model.generate(**alone, **options)
        else:
            model.set_adapter(name)
            expected = model.generate(**alone, **options)
        assert torch.equal(mixed[row * per_row : (row + 1) * per_row], expected)


# --- adapter_names ------------------------------------------------------------------------------------------------


@every
@pytest.mark.parametrize("task_type", [None, "CAUSAL_LM"])
def test_adapter_names_equal_each_row_alone(kind: str, task_type: str | None, tiny: Any, ids: Any) -> None:
    model = wrap(tiny("llama"), config(kind, task_type=task_type))
    stir(model.add_adapter, "second", config(kind, task_type=task_type))
    names = ["second", "__base__", "default", "second"]
    mixed = logits(model, ids, adapter_names=names)
    for row, name in enumerate(names):
        if name == "__base__":
            with model.disable_adapter():
                expected = logits(model, ids)
        else:
            model.set_adapter(name)
            expected = logits(model, ids)
        torch.testing.assert_close(mixed[row], expected[row], atol=1e-5, rtol=1e-4)


@one_of_each
def test_a_failing_forward_with_adapter_names_leaves_nothing_behind(kind: str, tiny: Any, ids: Any) -> None:
    model = wrap(tiny("llama"), config(kind, task_type="CAUSAL_LM"))
    expected, names = logits(model, ids), ["default", "__base__", "default", "default"]
    hooks = {name: (len(m._forward_hooks), len(m._forward_pre_hooks)) for name, m in model.named_modules()}
    context = model.base_model.context
    with pytest.raises(ValueError, match="non-existing adapter"):
        model(**ids, adapter_names=["default"] * 3 + ["nobody"])
    with pytest.raises(ValueError, match="Length of `adapter_names`"):
        model(**ids, adapter_names=["default"] * 3)
    with pytest.raises(ValueError, match="Length of `adapter_names`"):
        model.generate(**ids, adapter_names=["default"] * 3, max_new_tokens=1)
    broken = model.base_model.model.lm_head.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(**ids, adapter_names=names)
    broken.remove()
    assert context.held == {}
    assert not context.record.open
    assert hooks == {name: (len(m._forward_hooks), len(m._forward_pre_hooks)) for name, m in model.named_modules()}
    assert torch.equal(logits(model, ids), expected)
    mixed = logits(model, ids, adapter_names=names)
    torch.testing.assert_close(mixed[0], expected[0], atol=1e-5, rtol=1e-4)
    assert differ(mixed[1], expected[1])


@one_of_each
def test_adapter_names_train_each_row_in_its_own_adapter(kind: str, tiny: Any, ids: Any) -> None:
    model = wrap(tiny("llama"), config(kind, task_type="CAUSAL_LM"))
    stir(model.add_adapter, "second", config(kind, task_type="CAUSAL_LM"))
    model.base_model.set_adapter(["default", "second"])
    model.train()(**ids, labels=ids["input_ids"], adapter_names=["default", "__base__"] * 2).loss.backward()
    grads = {n: p.grad is not None and bool(p.grad.any()) for n, p in model.named_parameters() if p.requires_grad}
    assert any(got for name, got in grads.items() if ".default." in name)
    assert not any(got for name, got in grads.items() if ".second." in name)


@one_of_each
def test_a_failing_forward_leaves_no_adapter_names_with_the_head(kind: str, tiny: Any, tiny_inputs: Any) -> None:
    inputs = tiny_inputs("bert", batch=2)
    model = wrap(tiny("bert", "sequence_classification"), config(kind, task_type="SEQ_CLS"))
    expected = logits(model, inputs)
    broken = model.base_model.model.bert.pooler.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(**inputs, adapter_names=["default", "__base__"])
    broken.remove()
    assert torch.equal(logits(model, inputs), expected)


@one_of_each
def test_adapter_names_choose_the_head_too(kind: str, tiny: Any, tiny_inputs: Any) -> None:
    inputs = tiny_inputs("bert", batch=3)
    model = wrap(tiny("bert", "sequence_classification"), config(kind, task_type="SEQ_CLS"))
    stir(model.add_adapter, "second", config(kind, task_type="SEQ_CLS"))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "modules_to_save.second" in name:
                p.add_(1.0)
    mixed = logits(model, inputs, adapter_names=["default", "second", "__base__"])
    first = logits(model, inputs)
    model.set_adapter("second")
    second = logits(model, inputs)
    with model.disable_adapter():
        base = logits(model, inputs)
    expected = torch.stack([first[0], second[1], base[2]])
    torch.testing.assert_close(mixed, expected, atol=1e-5, rtol=1e-4)


# --- stages -------------------------------------------------------------------------------------------------------


def trained(model: nn.Module) -> set[str]:
    return {name.split("_adapters.")[-1].split("default.")[-1].split(".")[0] for name in names_of(model)}


def test_stages_of_mixda_choose_what_trains(tiny: Any) -> None:
    model = wrap(tiny("bert", "sequence_classification"), config("mixda", task_type="SEQ_CLS"))
    every_name = names_of(model)
    model.base_model.set_stage("domain")
    domain = names_of(model)
    assert domain
    assert all(".default.domain.bank." in name for name in domain)
    model.base_model.set_stage("task")
    task = names_of(model)
    assert task
    assert all(
        ".default.domain.router." in n or ".default.task." in n or ".modules_to_save.default." in n for n in task
    )
    assert domain | task == every_name
    assert not domain & task


def test_stages_of_a_bottleneck_differ_in_the_head(tiny: Any) -> None:
    model = wrap(tiny("bert", "sequence_classification"), config("bottleneck", task_type="SEQ_CLS"))
    every_name = names_of(model)
    model.base_model.set_stage("domain")
    assert {name for name in every_name if "modules_to_save" in name} == every_name - names_of(model)
    model.base_model.set_stage("task")
    assert names_of(model) == every_name


def test_unknown_stages_and_adapters_are_refused(tiny: Any) -> None:
    model = wrap(tiny("bert"), config("mixda"))
    before = names_of(model)
    with pytest.raises(
        ValueError, match=r"stage='domian' is unknown; have \['domain', 'task'\]. Did you mean 'domain'"
    ):
        model.base_model.set_stage("domian")
    with pytest.raises(ValueError, match=r"adapter_name='other' is unknown; have \['default'\]"):
        model.base_model.set_stage("domain", "other")
    assert names_of(model) == before


@pytest.mark.parametrize("stage", ["domain", "task"])
def test_a_stage_survives_switching_and_disabling(stage: str, tiny: Any, tiny_inputs: Any) -> None:
    model = wrap(tiny("bert", "sequence_classification"), config("mixda", task_type="SEQ_CLS"))
    model.base_model.set_stage(stage)
    expected = names_of(model)
    with model.disable_adapter():
        model(**tiny_inputs("bert"))
    assert names_of(model) == expected
    stir(model.add_adapter, "second", config("mixda", task_type="SEQ_CLS"))
    assert names_of(model) == expected
    model.set_adapter("second")
    assert not names_of(model) & expected
    model.set_adapter("default")
    assert names_of(model) == expected
    model.base_model.disable_adapter_layers()
    model.base_model.enable_adapter_layers()
    assert names_of(model) == expected
    model.set_adapter("default", inference_mode=True)
    assert not names_of(model)


def test_a_stage_is_forgotten_with_its_adapter(tiny: Any) -> None:
    model = wrap(tiny("bert"), config("mixda"))
    model.base_model.set_stage("domain")
    stir(model.add_adapter, "second", config("mixda"))
    model.delete_adapter("default")
    stir(model.add_adapter, "default", config("mixda"))
    model.set_adapter("default")
    assert trained(model) == {"domain", "task"}


def test_a_stage_without_parameters_is_refused_and_changes_nothing(tiny: Any) -> None:
    model = wrap(tiny("bert"), config("mixda"))
    model.base_model.remove_domain("a")
    model.base_model.remove_domain("b")
    before = names_of(model)
    with pytest.raises(ValueError, match="trains nothing"):
        model.base_model.set_stage("domain")
    assert names_of(model) == before


# --- dtypes -------------------------------------------------------------------------------------------------------


@every
def test_adapters_of_a_bf16_base_are_fp32_unless_told_otherwise(kind: str, tiny: Any, ids: Any) -> None:
    for autocast, dtype in ((True, torch.float32), (False, torch.bfloat16)):
        model = wrap(tiny("llama").bfloat16(), config(kind), autocast_adapter_dtype=autocast)
        assert {p.dtype for p in model.parameters() if p.requires_grad} == {dtype}
        output = model.train()(**ids, labels=ids["input_ids"])
        assert output.logits.dtype == torch.bfloat16
        output.loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


@one_of_each
def test_a_bf16_adapter_is_saved_and_loaded_as_it_is(kind: str, tiny: Any, ids: Any, tmp_path: Path) -> None:
    model = wrap(tiny("llama").bfloat16(), config(kind), autocast_adapter_dtype=False)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny("llama").bfloat16(), tmp_path, autocast_adapter_dtype=False)
    assert torch.equal(logits(loaded, ids), logits(model, ids))


@one_of_each
def test_autocast_trains(kind: str, tiny: Any, ids: Any) -> None:
    model = wrap(tiny("llama"), config(kind)).train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(**ids, labels=ids["input_ids"]).loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


@every
def test_copies_are_independent(kind: str, tiny: Any, ids: Any) -> None:
    model = wrap(tiny("llama"), config(kind))
    expected = logits(model, ids)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.zero_()
    equal(logits(twin, ids), expected)
    assert ForwardContext.find(twin.base_model.model) is not ForwardContext.find(model.base_model.model)


# --- stages and merges --------------------------------------------------------------------------------------------


def staged(tiny: Any) -> Any:
    """Two mixtures with heads; "default" is in the stage of its domains, "other" in that of the task."""
    model = get_peft_model(tiny("bert", "sequence_classification"), MixDAConfig(domains=["x"], task_type="SEQ_CLS"))
    model.add_adapter("other", MixDAConfig(domains=["y"], task_type="SEQ_CLS"))
    model.base_model.set_stage("domain", "default")
    model.base_model.set_stage("task", "other")
    model.set_adapter("default")
    return model


VERBS: dict[str, Any] = {
    "set_adapter": lambda model: (model.set_adapter("other"), model.set_adapter("default")),
    "disable and enable": lambda model: (
        model.base_model.disable_adapter_layers(), model.base_model.enable_adapter_layers(),
    ),
    "disable_adapter": lambda model: model.disable_adapter().__enter__() and None,
    "set_requires_grad": lambda model: model.set_requires_grad(["default", "other"]),
    "add_adapter": lambda model: model.add_adapter("third", MixDAConfig(domains=["z"], task_type="SEQ_CLS")),
    "delete_adapter": lambda model: (model.set_adapter("other"), model.delete_adapter("default")),
    "delete another": lambda model: (model.set_adapter("default"), model.delete_adapter("other")),
    "of the layers": lambda model: [
        (layer.set_adapter("other"), layer.enable_adapters(False), layer.enable_adapters(True))
        for layer in model.base_model.hosts()
    ],
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:Adapter default was active")
@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_keeps_the_stage_of_every_adapter(verb: str, tiny: Any) -> None:
    model = staged(tiny)
    VERBS[verb](model)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and ".default." in name:
            assert ".domain.bank." in name
        if parameter.requires_grad and ".other." in name:
            assert ".domain.bank." not in name


@pytest.mark.parametrize("merge", ["merge_adapter", "merge_and_unload"])
@pytest.mark.parametrize("safe", [False, True])
def test_a_merge_into_a_shared_weight_is_refused_before_any_change(merge: str, safe: bool, tiny: Any) -> None:
    tied = {"llama": ("lm_head", "model.embed_tokens"), "gpt2": ("lm_head", "transformer.wte")}
    for kind, (head, embeddings) in tied.items():
        config = MoSAConfig(base="lora", target_modules=[head], init_weights=False, task_type="CAUSAL_LM")
        model = get_peft_model(tiny(kind, tie_word_embeddings=True), config)
        before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
        with pytest.raises(ValueError, match=f"cannot merge at '{head}'.*{embeddings}"):
            getattr(model.base_model, merge)(safe_merge=safe)
        assert all(torch.equal(before[key], tensor) for key, tensor in model.state_dict().items())


@pytest.mark.parametrize("safe", [False, True])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_merge_of_what_is_not_finite_is_refused_before_any_change(safe: bool, value: float, tiny: Any) -> None:
    config = MoSAConfig(base="lora", target_modules=["q_proj"], init_weights=False, task_type="CAUSAL_LM")
    model = get_peft_model(tiny("llama"), config)
    with torch.no_grad():
        list(model.base_model.hosts())[-1].adapters["default"].bank.experts["adapter"].up.weight[0, 0] = value
    before = {key: tensor.clone() for key, tensor in model.state_dict().items() if "base_layer" in key}
    message = (
        r"NaNs detected .* adapter default seems .* 'bank.experts.adapter.up.weight' at '.*q_proj' holds NaN or inf"
    )
    with pytest.raises(ValueError, match=message):
        model.base_model.merge_adapter(safe_merge=safe)
    assert all(torch.equal(before[key], model.state_dict()[key]) for key in before)
    assert not any(host.merged for host in model.base_model.hosts())


def test_weights_of_eight_bits_are_merged(tiny: Any) -> None:
    """Torch does not say of these whether they are finite."""
    config = BottleneckConfig(r=4, activation="identity", use_bias=False, task_type="CAUSAL_LM")
    model = get_peft_model(tiny("llama"), config).eval()
    for host in model.base_model.hosts():
        host.adapters.to(torch.float8_e4m3fn)
    model.base_model.merge_adapter()
    assert all(host.merged for host in model.base_model.hosts())


@every
def test_peft_may_switch_off_what_it_casts(kind: str, tiny: Any, ids: Any) -> None:
    """diffusers does so around each layer of a model under layerwise casting."""
    model = wrap(tiny("llama"), config(kind))
    before = logits(model, ids)
    with disable_input_dtype_casting(model):
        assert torch.equal(logits(model, ids), before)
    assert all(host.cast_input_dtype_enabled for host in model.base_model.hosts())


@one_of_each
def test_scales_of_lora_pass_over_adapters_and_are_refused_for_them(kind: str, tiny: Any, ids: Any) -> None:
    model = wrap(tiny("llama"), config(kind))
    before = logits(model, ids)
    for host in model.base_model.hosts():
        host.scale_layer(0.3)
        host.unscale_layer(0.3)
        host.unscale_layer()
        host.set_scale("style", 0.3)
        host.set_scale("default", 1.0)
        with pytest.raises(ValueError, match=r"scale=0.3 of adapter 'default' at '.*': it has no scale"):
            host.set_scale("default", 0.3)
    assert torch.equal(logits(model, ids), before)
    with (
        pytest.raises(ValueError, match="only supported for models with `LoraLayer`s"),
        rescale_adapter_scale(model, 2),
    ):
        pass


@one_of_each
def test_a_weighted_sum_of_adapters_is_refused_by_name(kind: str, tiny: Any) -> None:
    model = wrap(tiny("llama"), config(kind))
    with pytest.raises(NotImplementedError, match=r"Model has no add_weighted_adapter: .*adapter_names"):
        model.add_weighted_adapter(["default"], [1.0], "sum")
    assert list(model.peft_config) == ["default"]
