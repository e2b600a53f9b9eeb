"""Folders of strangers as experts and as domains: both readers refuse the same, by name, and change nothing."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mixadapters import BottleneckConfig, MixDAConfig, MoAConfig

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
LORA_READERS: dict[str, Callable[[Any], Any]] = {
    "experts": lambda source: MoAConfig(experts={"one": source}, router="softmax"),
    "domains": lambda source: MixDAConfig(domains={"one": source}, domain_type="lora"),
}
READERS: dict[str, Callable[[Any], Any]] = {
    "experts": lambda source: MoAConfig(
        experts={"one": source}, router="softmax", expert_type="bottleneck", adapter_input="ffn_intermediate"
    ),
    "domains": lambda source: MixDAConfig(domains={"one": source}),
}
SLOW = "(x+x+)+y"  # may take very long, and does not where a path has no x


def rewrite(folder: Path, **fields: Any) -> None:
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**config, **fields}))


def refused(base: nn.Module, config: Any, message: str) -> None:
    names = [name for name, _ in base.named_modules()]
    with pytest.raises(ValueError, match=r"(experts|domains)\['one'\]") as caught:
        get_peft_model(base, config)
    assert message in str(caught.value)
    assert [name for name, _ in base.named_modules()] == names


STRANGE: dict[str, tuple[dict[str, Any], str]] = {
    "not a number": ({"lora_alpha": float("nan")}, "lora_alpha=nan must be a finite number"),
    "infinite": ({"lora_alpha": float("inf")}, "lora_alpha=inf must be"),
    "beyond all floats": ({"lora_alpha": 10**400}, "lora_alpha=1000"),
    "text for a number": ({"lora_alpha": "16"}, "lora_alpha='16' must be a finite number"),
    "nothing": ({"lora_alpha": None}, "lora_alpha=None must be"),
    "truth for a number": ({"lora_alpha": True}, "lora_alpha=True must be"),
    "text for a switch": ({"use_rslora": "no"}, "use_rslora='no' must be True or False"),
    "text for a rank": ({"r": "4"}, "r='4' must be an integer"),
    "a pattern's number": (
        {"alpha_pattern": {"q_proj": float("nan")}},
        "alpha_pattern={'q_proj': nan} must be a dict",
    ),
    "a list of patterns": ({"rank_pattern": ["q_proj"]}, "rank_pattern=['q_proj'] must be a dict of strings"),
    "targets of numbers": ({"target_modules": [1]}, "target_modules={1} must be a list of strings or a string"),
    "layers as text": ({"layers_to_transform": "0"}, "layers_to_transform='0' must be"),
    "biases": ({"bias": 3}, "bias=3 must be 'none'"),
    "a base of another kind": ({"base_model_name_or_path": ["org/this"]}, "base_model_name_or_path=['org/this'] must"),
    "no expression": ({"target_modules": "((("}, "target_modules='(((' is no regular expression"),
    "slow targets": ({"target_modules": SLOW}, "can take very long"),
    "slow exclusions": ({"exclude_modules": SLOW}, "can take very long"),
    "slow ranks": ({"rank_pattern": {SLOW: 4}}, "can take very long"),
    "slow alphas": ({"alpha_pattern": {SLOW: 4}}, "can take very long"),
    "a field of a newer PEFT": ({"use_new": "yes"}, "use_new='yes', which LoraConfig of PEFT"),
    "slow layers": ({"layers_pattern": [SLOW], "layers_to_transform": [0]}, "can take very long"),
}


@pytest.mark.parametrize("reader", LORA_READERS)
@pytest.mark.parametrize("form", STRANGE)
def test_config_of_a_lora_by_which_nothing_can_be_computed_is_refused(form, reader, tiny, tmp_path) -> None:
    fields, message = STRANGE[form]
    lora = LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)
    get_peft_model(tiny("llama"), lora).save_pretrained(tmp_path)
    rewrite(tmp_path, **fields)
    base = tiny("llama")
    base.config._name_or_path = "org/this"
    refused(base, LORA_READERS[reader](str(tmp_path)), message)


@pytest.mark.parametrize("reader", LORA_READERS)
@pytest.mark.parametrize("fields", [
    {"init_lora_weights": None}, {"init_lora_weights": "Gaussian"}, {"init_lora_weights": "MiCA"},
    {"use_new": False, "merge_weights": None},
])  # fmt: skip
def test_fields_that_change_nothing_of_what_a_lora_computes_are_taken(fields, reader, tiny, tmp_path) -> None:
    lora = LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)
    get_peft_model(tiny("llama"), lora).save_pretrained(tmp_path)
    rewrite(tmp_path, **fields)
    get_peft_model(tiny("llama"), LORA_READERS[reader](str(tmp_path)))


@pytest.mark.parametrize("reader", LORA_READERS)
def test_weights_of_eight_bits_are_taken_or_refused_as_others_are(reader, tiny, tmp_path) -> None:
    lora = LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)
    get_peft_model(tiny("llama"), lora).save_pretrained(tmp_path)
    weights = {key: tensor.to(torch.float8_e4m3fn) for key, tensor in load_file(tmp_path / WEIGHTS).items()}
    save_file(weights, tmp_path / WEIGHTS, metadata={"format": "pt"})
    model = get_peft_model(tiny("llama"), LORA_READERS[reader](str(tmp_path)))
    parameters = dict(model.named_parameters())
    for key, tensor in weights.items():
        module, _, factor = key.removesuffix(".weight").rpartition(".")
        part = {"lora_A": "down", "lora_B": "up"}[factor]
        (got,) = (p for n, p in parameters.items() if n.startswith(f"{module}.") and n.endswith(f".one.{part}.weight"))
        torch.testing.assert_close(got.detach(), tensor.float(), rtol=0, atol=0)
    weights[key] = weights[key].float().fill_(float("nan")).to(torch.float8_e4m3fn)
    save_file(weights, tmp_path / WEIGHTS, metadata={"format": "pt"})
    refused(tiny("llama"), LORA_READERS[reader](str(tmp_path)), "values that are not finite")


def save_bottleneck(base: nn.Module, folder: Path, **fields: Any) -> None:
    options = {"placement": "parallel", "adapter_input": "ffn_intermediate", "init_weights": False, **fields}
    get_peft_model(base, BottleneckConfig(**options)).save_pretrained(folder)


def with_more(folder: Path, key: str, tensor: Tensor) -> None:
    """The adapter with one tensor more, as a version that kept no digest would have saved it."""
    rewrite(folder, digest=None)
    save_file({**load_file(folder / WEIGHTS), key: tensor}, folder / WEIGHTS, metadata={"format": "pt"})


PREFIX = "base_model.model.model.layers.0.mlp.down_proj."
MORE: dict[str, tuple[Callable[[nn.Module, Path], None], str]] = {
    "a head": (
        lambda base, folder: save_bottleneck(base, folder, modules_to_save=["lm_head"]), "ignore_modules_to_save",
    ),
    "tokens": (
        lambda base, folder: save_bottleneck(base, folder, trainable_token_indices=[3]), "trainable_token_indices",
    ),
    "a weight of the base": (
        lambda base, folder: (save_bottleneck(base, folder), with_more(folder, f"{PREFIX}weight", torch.ones(32, 48))),
        "holds a changed 'model.layers.0.mlp.down_proj' of the base model",
    ),
    "another expert": (
        lambda base, folder: (
            save_bottleneck(base, folder),
            with_more(folder, f"{PREFIX}bottleneck_adapters.bank.experts.other.down.bias", torch.zeros(3)),
        ),
        "experts.other.down.bias', which is no weight of a BOTTLENECK adapter",
    ),
    "what nobody knows": (
        lambda base, folder: (save_bottleneck(base, folder), with_more(folder, "more", torch.zeros(3))),
        "holds 'more', which is no weight of a BOTTLENECK adapter",
    ),
}  # fmt: skip


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("form", MORE)
def test_what_no_expert_can_have_is_not_left_out_of_it(form, reader, tiny, tmp_path) -> None:
    save, message = MORE[form]
    save(tiny("llama"), tmp_path)
    refused(tiny("llama"), READERS[reader](str(tmp_path)), message)


@pytest.mark.parametrize("reader", READERS)
def test_saved_modules_may_be_waived_by_name(reader, tiny, tiny_inputs, tmp_path) -> None:
    save_bottleneck(tiny("llama"), tmp_path, modules_to_save=["lm_head"])
    source = {"source": str(tmp_path), "ignore_modules_to_save": True}
    model = get_peft_model(tiny("llama"), READERS[reader](source)).eval()
    with torch.no_grad():
        assert not torch.equal(model(**tiny_inputs("llama")).logits, tiny("llama")(**tiny_inputs("llama")).logits)


def test_domain_of_a_mixture_is_taken_without_what_is_not_its_own(tiny, tmp_path) -> None:
    """A mixture's other domains, its gate and its task adapter are no part of a domain; its head is refused."""
    whole = MixDAConfig(domains=["one", "two"], task_adapter="pfeiffer", init_weights=False)
    get_peft_model(tiny("llama"), whole).save_pretrained(tmp_path)
    get_peft_model(tiny("llama"), READERS["domains"](str(tmp_path)))
    whole = MixDAConfig(domains=["one", "two"], task_adapter="pfeiffer", modules_to_save=["lm_head"])
    get_peft_model(tiny("llama"), whole).save_pretrained(tmp_path / "head")
    refused(tiny("llama"), READERS["domains"](str(tmp_path / "head")), "ignore_modules_to_save")
