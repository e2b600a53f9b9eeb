"""The private pieces of PEFT, and of libraries around it, that mixadapters relies on: one test each, which fails with
the piece's name where a new version changes it."""

from __future__ import annotations

import enum
import inspect
import re
from contextlib import contextmanager
from typing import Any

import peft
import pytest
import torch
import transformers
from peft import PeftConfig, get_peft_model, get_peft_model_state_dict
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners import tuners_utils
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper, ModulesToSaveWrapper, load_peft_weights, register_peft_method
from peft.utils import other as peft_other
from peft.utils import quantization_utils as quantization
from peft.utils.peft_types import PeftType
from torch import nn

from mixadapters import BottleneckConfig

# owner, name, kind, parameters by name (in order; ours pass or accept them so)
CALLABLES: list[tuple[Any, str, type, list[str]]] = [
    (BaseTuner, "inject_adapter", type(lambda: 0), ["self", "model", "adapter_name"]),
    (
        BaseTuner,
        "_create_and_replace",
        type(lambda: 0),
        ["self", "peft_config", "adapter_name", "target", "target_name", "parent", "current_key", "parameter_name"],
    ),
    (BaseTuner, "_prepare_adapter_config", type(lambda: 0), ["self", "peft_config", "model_config"]),
    (BaseTuner, "_check_target_module_exists", staticmethod, ["peft_config", "key"]),
    (BaseTuner, "_replace_module", type(lambda: 0), ["self", "parent", "child_name", "new_module", "child"]),
    (
        BaseTuner,
        "_unload_and_optionally_merge",
        type(lambda: 0),
        ["self", "merge", "progressbar", "safe_merge", "adapter_names"],
    ),
    (BaseTuner, "_check_merge_allowed", type(lambda: 0), ["self"]),
    (BaseTuner, "_remove_adapter_name_from_key", classmethod, ["key", "adapter_name"]),
    (
        BaseTuner,
        "_remap_adapter_state_dict_for_load",
        classmethod,
        ["model", "config", "adapter_name", "state_dict"],
    ),
    (BaseTuner, "set_adapter", type(lambda: 0), ["self", "adapter_name", "inference_mode"]),
    (BaseTuner, "delete_adapter", type(lambda: 0), ["self", "adapter_name"]),
    (BaseTuner, "enable_adapter_layers", type(lambda: 0), ["self"]),
    (BaseTuner, "get_model_config", staticmethod, ["model"]),
    (BaseTunerLayer, "get_base_layer", type(lambda: 0), ["self"]),
    (BaseTunerLayer, "get_base_weight", type(lambda: 0), ["self"]),
    (BaseTunerLayer, "set_base_weight", type(lambda: 0), ["self", "weight_data"]),
    (BaseTunerLayer, "_get_available_adapters", type(lambda: 0), ["self"]),
    (BaseTunerLayer, "set_adapter", type(lambda: 0), ["self", "adapter_names", "inference_mode"]),
    (BaseTunerLayer, "_get_base_layer_device_and_dtype", type(lambda: 0), ["self", "base_layer"]),
    (BaseTunerLayer, "_move_adapter_to_device_of_base_layer", type(lambda: 0), ["self", "adapter_name", "device"]),
    (BaseTunerLayer, "merge", type(lambda: 0), ["self", "safe_merge", "adapter_names"]),
    (BaseTunerLayer, "unmerge", type(lambda: 0), ["self"]),
    (tuners_utils, "check_adapters_to_merge", type(lambda: 0), ["module", "adapter_names"]),
    (tuners_utils, "_maybe_include_all_linear_layers", type(lambda: 0), ["peft_config", "model"]),
    (tuners_utils, "check_target_module_exists", type(lambda: 0), ["config", "key"]),
    (peft_other, "get_pattern_key", type(lambda: 0), ["pattern_keys", "key_to_match"]),
    (quantization, "resolve_quantization_backend", type(lambda: 0), ["base_layer", "kwargs"]),
    (quantization, "get_quantization_kwargs", type(lambda: 0), ["model"]),
    (AuxiliaryTrainingWrapper, "_get_available_adapters", type(lambda: 0), ["self"]),
    (PeftConfig, "check_kwargs", classmethod, ["kwargs"]),
    (PeftConfig, "save_pretrained", type(lambda: 0), ["self", "save_directory", "kwargs"]),
    (
        peft.peft_model,
        "get_alora_offsets_for_forward",
        type(lambda: 0),
        ["model", "input_ids", "inputs_embeds", "kwargs"],
    ),
    (peft.peft_model, "get_alora_offsets_for_generate", type(lambda: 0), ["model", "args", "kwargs"]),
    (peft.PeftModel, "_enable_peft_forward_hooks", type(lambda: 0), ["self", "args", "kwargs"]),
]


@pytest.mark.parametrize(
    ("owner", "name", "kind", "parameters"),
    [pytest.param(*row, id=f"{row[0].__name__.rpartition('.')[2]}.{row[1]}") for row in CALLABLES],
)
def test_callable_has_its_name_kind_and_parameters(owner: Any, name: str, kind: type, parameters: list[str]) -> None:
    assert hasattr(owner, name), f"PEFT {peft.__version__} has no {owner.__name__}.{name}"
    assert isinstance(inspect.getattr_static(owner, name), kind), f"{name} is no longer a {kind.__name__}"
    given = list(inspect.signature(getattr(owner, name)).parameters)
    assert given[: len(parameters)] == parameters, f"{name} now takes {given}"


@pytest.mark.parametrize("name", ["merged", "disable_adapters", "active_adapters"])
def test_property_of_tuner_layers(name: str) -> None:
    assert isinstance(inspect.getattr_static(BaseTunerLayer, name), property), name


@pytest.mark.parametrize(
    "name", ["adapter_layer_names", "merged_adapters", "_disable_adapters", "_active_adapter", "quantization_backend"]
)
def test_attribute_of_tuner_layers(name: str) -> None:
    assert hasattr(BaseTunerLayer, name), name


# --- registration -------------------------------------------------------------------------------------------------


def test_peft_type_is_a_string_enum_with_the_internals_of_cpython() -> None:
    assert issubclass(PeftType, str)
    assert issubclass(PeftType, enum.Enum)
    assert isinstance(PeftType._member_names_, list)
    assert isinstance(PeftType._member_map_, dict)
    assert isinstance(PeftType._value2member_map_, dict)
    assert PeftType._member_map_["LORA"]._name_ == PeftType._member_map_["LORA"]._value_ == "LORA"
    assert PeftType.LORA._sort_order_ == PeftType._member_names_.index("LORA")


@pytest.mark.parametrize("name", ["BOTTLENECK", "MIXDA"])
def test_peft_type_takes_our_members(name: str) -> None:
    member = PeftType[name]
    assert PeftType(name) is getattr(PeftType, name) is member
    assert member in list(PeftType)
    assert member == name
    assert hash(member) == hash(name)
    assert member.value == name


@pytest.mark.parametrize(
    "table",
    [
        pytest.param(PEFT_TYPE_TO_CONFIG_MAPPING, id="PEFT_TYPE_TO_CONFIG_MAPPING"),
        pytest.param(PEFT_TYPE_TO_TUNER_MAPPING, id="PEFT_TYPE_TO_TUNER_MAPPING"),
        pytest.param(PEFT_TYPE_TO_PREFIX_MAPPING, id="PEFT_TYPE_TO_PREFIX_MAPPING"),
    ],
)
def test_mapping_table_is_a_mutable_dict_by_type(table: dict) -> None:
    assert isinstance(table, dict)
    assert {PeftType.LORA, PeftType["BOTTLENECK"], PeftType["MIXDA"]} <= set(table)
    assert "LORA" in table  # saved configs say it as a string


def test_register_peft_method_fills_the_three_tables() -> None:
    parameters = inspect.signature(register_peft_method).parameters
    assert {"name", "config_cls", "model_cls", "prefix"} <= set(parameters)
    assert PEFT_TYPE_TO_CONFIG_MAPPING["BOTTLENECK"] is BottleneckConfig
    assert PEFT_TYPE_TO_PREFIX_MAPPING["BOTTLENECK"] == "bottleneck_"
    assert PEFT_TYPE_TO_TUNER_MAPPING["BOTTLENECK"].prefix == "bottleneck_"


def test_register_peft_method_raises_key_error_for_a_known_type() -> None:
    with pytest.raises(KeyError, match="bottleneck"):
        register_peft_method(name="bottleneck", config_cls=BottleneckConfig, model_cls=object, prefix="bottleneck_")


# --- how PEFT calls a tuner ---------------------------------------------------------------------------------------


class Spy:
    """Notes the calls that PEFT makes on a tuner class."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, tuner: type) -> None:
        self.calls: list[tuple[str, tuple, dict]] = []
        self.monkeypatch, self.tuner = monkeypatch, tuner

    def watch(self, name: str) -> None:
        static = inspect.getattr_static(self.tuner, name)
        plain = not isinstance(static, (staticmethod, classmethod))
        before = getattr(self.tuner, name)

        def noted(*args: Any, **kwargs: Any) -> Any:
            self.calls.append((name, args[1:] if plain else args, kwargs))
            return before(*args, **kwargs)

        self.monkeypatch.setattr(self.tuner, name, noted if plain else staticmethod(noted))

    def of(self, name: str) -> list[tuple[tuple, dict]]:
        return [(args, kwargs) for called, args, kwargs in self.calls if called == name]


@pytest.fixture
def spy(monkeypatch: pytest.MonkeyPatch) -> Spy:
    return Spy(monkeypatch, PEFT_TYPE_TO_TUNER_MAPPING["BOTTLENECK"])


def test_inject_adapter_prepares_the_config_then_walks_the_modules(spy: Spy, tiny: Any) -> None:
    for name in ("_prepare_adapter_config", "_check_target_module_exists", "_create_and_replace"):
        spy.watch(name)
    get_peft_model(tiny("llama"), BottleneckConfig())
    order = list(dict.fromkeys(name for name, *_ in spy.calls))
    assert order == ["_prepare_adapter_config", "_check_target_module_exists", "_create_and_replace"]
    (config, model_config), _ = spy.of("_prepare_adapter_config")[0]
    assert model_config["model_type"] == "llama"
    assert len(spy.of("_create_and_replace")) == 4
    for (given, adapter_name, _target, target_name, _parent), kwargs in spy.of("_create_and_replace"):
        assert given is config
        assert adapter_name == "default"
        assert kwargs.pop("current_key").endswith(target_name)
        assert not kwargs


def test_inject_adapter_runs_for_every_adapter(spy: Spy, tiny: Any) -> None:
    spy.watch("inject_adapter")
    model = get_peft_model(tiny("llama"), BottleneckConfig())
    model.add_adapter("second", BottleneckConfig())
    assert [args[1] for args, _ in spy.of("inject_adapter")] == ["default", "second"]


def test_inject_adapter_skips_what_lies_inside_a_tuner_layer(tiny: Any) -> None:
    model = get_peft_model(tiny("llama"), BottleneckConfig(target_modules=["down_proj"]))
    model.add_adapter("second", BottleneckConfig(target_modules=r".*\.down(_proj)?"))  # an expert has a `down`
    assert not [name for name in model.base_model.targeted_module_names if "bottleneck_adapters" in name]
    with pytest.raises(ValueError, match="no module of the model is called 'down'"):
        model.add_adapter("third", BottleneckConfig(target_modules=["down_proj", "down"]))


def test_enable_peft_forward_hooks_is_entered_with_the_forward_arguments(
    monkeypatch: pytest.MonkeyPatch, tiny: Any, tiny_inputs: Any
) -> None:
    seen = []
    tuner = PEFT_TYPE_TO_TUNER_MAPPING["BOTTLENECK"]

    @contextmanager
    def hooks(self: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append((len(args), set(kwargs)))
        yield

    monkeypatch.setattr(tuner, "_enable_peft_forward_hooks", hooks)
    inputs = tiny_inputs("llama")
    for task_type in (None, "CAUSAL_LM"):
        model = get_peft_model(tiny("llama"), BottleneckConfig(task_type=task_type)).eval()
        model(**inputs, adapter_names=["default"] * 2)  # taken off before it reaches the base model
        assert "adapter_names" in seen.pop()[1]
        model.generate(**inputs, adapter_names=["default"] * 2, max_new_tokens=1)
        assert {"adapter_names", "max_new_tokens"} <= seen[0][1]
        seen.clear()
        with model.disable_adapter():
            model(**inputs)
        assert not seen


def test_save_pretrained_writes_the_card_before_the_config(
    monkeypatch: pytest.MonkeyPatch, tiny: Any, tmp_path: Any
) -> None:
    cards = []

    def save(self: Any, save_directory: Any, **kwargs: Any) -> None:
        cards.append((tmp_path / "README.md").is_file())
        assert set(kwargs) <= {"auto_mapping_dict"}

    monkeypatch.setattr(BottleneckConfig, "save_pretrained", save)
    get_peft_model(tiny("llama"), BottleneckConfig()).save_pretrained(tmp_path)
    assert cards == [True]


def test_from_pretrained_checks_the_keys_of_a_config_by_check_kwargs(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    BottleneckConfig().save_pretrained(tmp_path)
    given = []

    def check(**kwargs: Any) -> dict[str, Any]:
        given.append(kwargs)
        return kwargs

    monkeypatch.setattr(BottleneckConfig, "check_kwargs", staticmethod(check))
    BottleneckConfig.from_pretrained(str(tmp_path))
    assert given[0]["peft_type"] == "BOTTLENECK"


def test_merge_is_checked_before_any_layer_is_touched(spy: Spy, tiny: Any) -> None:
    spy.watch("_check_merge_allowed")
    spy.watch("_replace_module")
    model = get_peft_model(tiny("llama"), BottleneckConfig(activation="identity", use_bias=False))
    model.merge_and_unload()
    assert [name for name, *_ in spy.calls][:2] == ["_check_merge_allowed", "_replace_module"]
    assert len(spy.of("_replace_module")) == 4
    (parent, child_name, new_module, child), _ = spy.of("_replace_module")[0]
    assert isinstance(child, BaseTunerLayer)
    assert new_module is child.get_base_layer()
    assert getattr(parent, child_name) is new_module


def test_keys_are_stripped_of_the_adapter_name_by_the_tuner(spy: Spy, tiny: Any) -> None:
    model = get_peft_model(tiny("llama"), BottleneckConfig())
    spy.watch("_remove_adapter_name_from_key")
    state = get_peft_model_state_dict(model)
    assert len({args[0] for args, _ in spy.of("_remove_adapter_name_from_key")}) == len(state) > 0
    assert all(args[1] == "default" for args, _ in spy.of("_remove_adapter_name_from_key"))


# --- helpers ------------------------------------------------------------------------------------------------------


def test_check_target_module_exists_says_yes_with_true_or_a_match() -> None:
    check = tuners_utils.check_target_module_exists
    assert check(BottleneckConfig(target_modules=["up_proj"]), "layers.0.mlp.up_proj") is True
    assert isinstance(check(BottleneckConfig(target_modules=r".*\.up_proj"), "layers.0.mlp.up_proj"), re.Match)
    assert not check(BottleneckConfig(target_modules=["up_proj"]), "layers.0.mlp.down_proj")
    excluded = BottleneckConfig(target_modules=["up_proj"], exclude_modules=["up_proj"])
    assert not check(excluded, "layers.0.mlp.up_proj")


def test_get_pattern_key_prefers_a_match_and_falls_back_to_the_key() -> None:
    assert peft_other.get_pattern_key(["layers.1.up_proj"], "model.layers.1.up_proj") == "layers.1.up_proj"
    assert peft_other.get_pattern_key(["layers.1.up_proj"], "model.layers.2.up_proj") == "model.layers.2.up_proj"


def test_check_adapters_to_merge_leaves_out_what_is_merged() -> None:
    layer = type("Layer", (BaseTunerLayer,), {"active_adapters": ["a", "b"], "merged_adapters": ["a"]})()
    with pytest.warns(UserWarning, match="Already following adapters were merged"):
        assert tuners_utils.check_adapters_to_merge(layer) == ["b"]


def test_resolve_quantization_backend_is_none_for_plain_layers(tiny: Any) -> None:
    options = quantization.get_quantization_kwargs(tiny("llama"))
    assert isinstance(options, dict)
    assert quantization.resolve_quantization_backend(nn.Linear(2, 2), **options) is None


def test_quantization_backend_reads_and_writes_base_weights() -> None:
    backend = quantization.QuantizationBackend
    assert list(inspect.signature(backend.get_base_weight).parameters)[1:] == ["base_layer"]
    assert list(inspect.signature(backend.set_base_weight).parameters)[2:] == ["weight_data"]


def test_auxiliary_training_wrapper_keeps_parameters_under_the_adapter_name() -> None:
    wrapper = ModulesToSaveWrapper(nn.Linear(2, 2), "default")
    assert isinstance(wrapper, AuxiliaryTrainingWrapper)
    assert wrapper._get_available_adapters() == {"default"}
    names = [name for name, _ in wrapper.named_parameters() if ".default." in f".{name}"]
    assert names == ["modules_to_save.default.weight", "modules_to_save.default.bias"]


def test_auxiliary_training_wrapper_takes_adapter_names_in_its_forward() -> None:
    wrapper = ModulesToSaveWrapper(nn.Linear(2, 2), "default").eval()
    assert wrapper(torch.zeros(3, 2), adapter_names=["default", "__base__", "default"]).shape == (3, 2)


def test_load_peft_weights_takes_device_and_revision(tiny: Any, tmp_path: Any) -> None:
    get_peft_model(tiny("llama"), BottleneckConfig()).save_pretrained(tmp_path)
    assert load_peft_weights(str(tmp_path), device="cpu", revision=None)


@pytest.mark.parametrize("name", ["peft_type", "base_model_name_or_path", "revision", "task_type", "inference_mode"])
def test_field_of_every_config(name: str) -> None:
    assert name in PeftConfig.__dataclass_fields__, name


# --- transformers -------------------------------------------------------------------------------------------------


def test_transformers_sets_the_checkpoint_function_on_layers(tiny: Any) -> None:
    model = tiny("llama")
    model.gradient_checkpointing_enable({"use_reentrant": False})
    layers = [m for m in model.modules() if hasattr(m, "gradient_checkpointing")]
    assert layers
    assert all(callable(layer.__dict__["_gradient_checkpointing_func"]) for layer in layers)


def test_transformers_deletes_adapters_by_the_lower_case_type_and_an_underscore() -> None:
    source = inspect.getsource(transformers.integrations.PeftAdapterMixin.delete_adapter)
    assert 'f"{self.peft_config[adapter_name].peft_type.value.lower()}_"' in source


def test_loss_mapping_tells_which_losses_shift_their_labels(tiny: Any) -> None:
    from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss

    assert LOSS_MAPPING[tiny("llama").loss_type] is ForCausalLMLoss
    assert LOSS_MAPPING.get(getattr(tiny("bert"), "loss_type", None)) is not ForCausalLMLoss


def test_cache_counts_its_tokens() -> None:
    assert transformers.DynamicCache().get_seq_length() == 0
    for name in ("reorder_cache", "batch_repeat_interleave", "batch_select_indices", "crop", "reset"):
        assert callable(getattr(transformers.DynamicCache, name)), name
