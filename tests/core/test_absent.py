"""What a config names and the model does not have is refused by name, and the model is as it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from mixadapters import BottleneckConfig, MixDAConfig, MoSAConfig

CONFIGS = {
    "bottleneck": lambda **given: BottleneckConfig(**{"r": 3, **given}),
    "mixda": lambda **given: MixDAConfig(domains=["a"], **given),
    "mosa": lambda **given: MoSAConfig(**{"r": 4, **given}),
}
ABSENT = [
    ({"layers_to_transform": []}, r"layers_to_transform=\[\] names no layer"),
    ({"layers_to_transform": [0, 99]}, r"layers_to_transform=\[0, 99\]: the model has no layers \[99\]"),
    ({"modules_to_save": ["lm_hed"]}, r"no module of the model is called 'lm_hed'. Did you mean 'lm_head'"),
    ({"target_modules": r".*\.down_prj"}, r"target_modules='.*down_prj' matches no module of the model"),
    ({"target_modules": ["down_prj"]}, "no module of the model is called 'down_prj'. Did you mean 'down_proj'"),
    ({"target_modules": []}, r"target_modules=\[\] names no module"),
    ({"exclude_modules": r".*\.down_prj"}, "exclude_modules='.*down_prj' matches no module of the model"),
    ({"exclude_modules": ["down_prj"]}, "exclude_modules=.*called 'down_prj'. Did you mean 'down_proj'"),
    ({"exclude_modules": ["layers.1"]}, r"'layers.1' holds 'model.layers.1.*, which takes an adapter still"),
    ({"rank_pattern": {"down_prj": 2}}, "rank_pattern=.*'down_prj' matches no module that takes an adapter; those"),
    ({"rank_pattern": {"q_proj": 2}}, "rank_pattern=.*'q_proj' matches no module that takes an adapter"),
    ({"trainable_token_indices": []}, r"trainable_token_indices=\[\] names no token"),
    ({"trainable_token_indices": {}}, r"trainable_token_indices=\{\} names no token"),
    ({"trainable_token_indices": {"embed_tokens": []}}, "trainable_token_indices=.* names no token"),
    ({"trainable_token_indices": [5, 5]}, r"trainable_token_indices=\[5, 5\] names a token twice"),
    ({"trainable_token_indices": [96]}, r"the embedding has rows 0 to 95, and not \[96\]"),
    ({"trainable_token_indices": {"embed_tokens": [3, 99]}}, r"the embedding has rows 0 to 95, and not \[99\]"),
]  # fmt: skip


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize(("given", "message"), ABSENT)
def test_what_a_model_does_not_have_is_refused(kind: str, given: dict[str, Any], message: str, tiny: Any) -> None:
    base = tiny("llama")
    before = list(dict(base.named_modules()))
    with pytest.raises(ValueError, match=message):
        get_peft_model(base, CONFIGS[kind](**given))
    assert list(dict(base.named_modules())) == before


@pytest.mark.parametrize("kind", ["bottleneck", "mixda"])
def test_sites_that_are_not_there_are_refused(kind: str, tiny: Any) -> None:
    for sites, message in (
        ({"ffn_output": r".*\.down_prj"}, r"sites\['ffn_output'\]='.*down_prj' matches no module.*'model.layers.0"),
        ({"ffn_output": r".*\.down_proj", "ffn_outptu": "x"}, r"there is no role 'ffn_outptu'; roles are"),
    ):
        base = tiny("llama")
        before = list(dict(base.named_modules()))
        with pytest.raises(ValueError, match=message):
            get_peft_model(base, CONFIGS[kind](sites=sites))
        assert list(dict(base.named_modules())) == before


@pytest.mark.parametrize("kind", ["bottleneck", "mixda"])
def test_what_is_there_is_taken(kind: str, tiny: Any) -> None:
    site = "model.layers.1.mlp.down_proj"
    model = get_peft_model(
        tiny("llama"),
        CONFIGS[kind](
            sites={"ffn_output": r".*\.down_proj", "attention": r".*\.self_attn"},
            exclude_modules=["layers.0.mlp.down_proj"], rank_pattern={"layers.1.mlp.down_proj": 7},
            trainable_token_indices={"embed_tokens": [0, 95]},
        ),
    )  # fmt: skip
    hosts = {host.path: host for host in model.base_model.hosts()}
    assert "model.layers.0.mlp.down_proj" not in hosts
    assert any(weight.shape[0] == 7 for weight in hosts[site].adapters.parameters() if weight.dim() == 2)
    # A second adapter of the same model names the same modules, which are wrapped by now.
    model.add_adapter("second", CONFIGS[kind](exclude_modules=["layers.0.mlp.down_proj"], rank_pattern={site: 5}))


def test_all_linear_means_all_linear_layers(tiny: Any) -> None:
    model = get_peft_model(tiny("llama"), CONFIGS["mixda"](target_modules="all-linear", task_adapter=None))
    kinds = {host.path.rpartition(".")[2] for host in model.base_model.hosts()}
    assert kinds == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def test_files_that_name_more_than_they_use_load(tiny: Any, tmp_path: Path) -> None:
    """An earlier version saved such configs; the keys and shapes of a file say what it is."""
    model = get_peft_model(tiny("llama"), CONFIGS["bottleneck"](init_weights=False, trainable_token_indices=[5, 6]))
    model.save_pretrained(tmp_path)
    config = tmp_path / "adapter_config.json"
    saved = BottleneckConfig.from_pretrained(tmp_path)
    saved.exclude_modules, saved.rank_pattern, saved.digest = ["nothing"], {"nothing": 3}, None
    saved.trainable_token_indices = [5, 5]
    assert saved.sites is not None
    saved.save_pretrained(tmp_path)
    assert "nothing" in config.read_text()
    weights = load_file(tmp_path / "adapter_model.safetensors")
    save_file(weights, tmp_path / "adapter_model.safetensors")
    loaded = PeftModel.from_pretrained(tiny("llama"), tmp_path)
    key = next(key for key in weights if key.endswith("up.weight"))
    inside = key.replace("bottleneck_adapters.", "bottleneck_adapters.default.")
    assert torch.equal(dict(loaded.named_parameters())[inside], weights[key])


def test_a_config_that_one_model_has_filled_in_serves_another_adapter(tiny) -> None:
    """GPT-2 has a role for cross-attention in the table, and here no module for it."""
    config = BottleneckConfig(r=2, placement="houlsby")
    model = get_peft_model(tiny("gpt2"), config)
    model.add_adapter("other", config)
    assert set(model.peft_config) == {"default", "other"}


@pytest.mark.parametrize("kind", ["base", "masked_lm"])
def test_a_task_of_models_that_generate_is_refused_for_encoders(tiny, kind) -> None:
    encoder = tiny("bert", kind)
    with pytest.raises(
        ValueError, match=r"task_type='CAUSAL_LM' is of models that generate text, and Bert.* does not"
    ):
        get_peft_model(encoder, CONFIGS["bottleneck"](task_type="CAUSAL_LM"))
    get_peft_model(encoder, CONFIGS["bottleneck"](task_type="FEATURE_EXTRACTION"))
