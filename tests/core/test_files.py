"""Files of adapters: complete or not saved, whole or refused; and nothing of the base model is theirs to change."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from accelerate import cpu_offload
from huggingface_hub import ModelCard
from peft import (
    LoraConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    load_peft_weights,
    set_peft_model_state_dict,
)
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from mixadapters import BottleneckConfig, MixDAConfig, MoAConfig, MoSAConfig, PILLConfig
from mixadapters.core.files import not_finite

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
TASK = {"task_type": "CAUSAL_LM", "init_weights": False}
CONFIGS: dict[str, Any] = {
    "bottleneck": lambda **more: BottleneckConfig(r=4, **TASK, **more),
    "mixda": lambda **more: MixDAConfig(domains=["b", "a"], r=4, task_r=3, **TASK, **more),
    "mosa": lambda **more: MoSAConfig(r=4, num_experts=2, split="both", **TASK, **more),
    "pill": lambda **more: PILLConfig(r=4, **TASK, **more),
    "moa": lambda **more: MoAConfig(experts=["b", "a"], r=4, **TASK, **more),
}
every = pytest.mark.parametrize("kind", CONFIGS)
IDS = torch.arange(5, 13)[None]
Q = "model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="session")
def tiny(tiny: Any) -> Any:
    """Models of three layers where a test asks for no more: MixDA adapts two of them by default."""
    return partial(tiny, layers=3)


@torch.no_grad()
def logits(model: nn.Module, kind: str) -> Tensor:
    return model.eval()(input_ids=IDS, **({"modality_ids": torch.zeros_like(IDS)} if kind == "pill" else {})).logits


def saved(tiny: Any, folder: Path, kind: str = "mixda", **more: Any) -> Any:
    model = get_peft_model(tiny("llama"), CONFIGS[kind](**more))
    model.save_pretrained(folder)
    return model


def change_config(folder: Path, **fields: Any) -> None:
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**config, **fields}))


def change_weights(folder: Path, **added: Any) -> None:
    save_file({**load_file(folder / WEIGHTS), **added}, folder / WEIGHTS)


def refused(tiny: Any, folder: Path, message: str) -> None:
    """By both loaders, and neither changes the model."""
    for load in (lambda base: PeftModel.from_pretrained(base, folder), lambda base: base.load_adapter(str(folder))):
        base = tiny("llama")
        before = {key: tensor.clone() for key, tensor in base.state_dict().items()}
        with pytest.raises(ValueError, match=message):
            load(base)
        after = base.state_dict()
        assert before.keys() == after.keys()
        assert all(torch.equal(before[key], after[key]) for key in before)


# --- what belongs together ----------------------------------------------------------------------------------------


@every
def test_a_config_knows_its_weights(kind: str, tiny: Any, tmp_path: Path) -> None:
    model = saved(tiny, tmp_path, kind, modules_to_save=["lm_head"])
    again = PeftModel.from_pretrained(tiny("llama"), tmp_path)
    assert torch.equal(logits(again, kind), logits(model, kind))
    again.save_pretrained(tmp_path / "again")
    first, second = (json.loads((folder / CONFIG).read_text()) for folder in (tmp_path, tmp_path / "again"))
    assert first["digest"] == second["digest"]
    key = next(key for key in load_file(tmp_path / WEIGHTS) if key.endswith("lm_head.weight"))
    change_weights(tmp_path, **{key: load_file(tmp_path / WEIGHTS)[key] + 1})
    refused(tiny, tmp_path, "is not what adapter_config.json was saved with")
    change_config(tmp_path, digest=None)  # as older files are
    PeftModel.from_pretrained(tiny("llama"), tmp_path)


def test_new_weights_under_an_old_config_are_noticed(tiny: Any, tmp_path: Path) -> None:
    saved(tiny, tmp_path)
    old = (tmp_path / CONFIG).read_bytes()
    torch.manual_seed(1)
    saved(tiny, tmp_path)
    (tmp_path / CONFIG).write_bytes(old)  # as a kill between the two files leaves them
    refused(tiny, tmp_path, "is not what adapter_config.json was saved with")
    model = get_peft_model(tiny("llama"), CONFIGS["mixda"]())
    with pytest.raises(ValueError, match=r"is not what adapter_config.json was saved with"):
        model.load_adapter(tmp_path, "default")


def test_transformers_own_save_writes_a_digest_too(tiny: Any, tmp_path: Path) -> None:
    model = tiny("llama")
    model.add_adapter(CONFIGS["mixda"]())
    for _ in range(2):  # the second time over the files of the first
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "mixda_adapters" in name:
                    parameter.add_(0.01)
        model.save_pretrained(tmp_path)
        assert json.loads((tmp_path / CONFIG).read_text())["digest"]
        again = tiny("llama")
        again.load_adapter(str(tmp_path))
        assert torch.equal(logits(again, "mixda"), logits(model, "mixda"))


def test_an_incomplete_state_is_not_saved(tiny: Any, tmp_path: Path) -> None:
    model = get_peft_model(tiny("llama"), CONFIGS["mixda"]())
    state = model.state_dict()
    gone = next(key for key in state if ".router." in key)
    state.pop(gone)
    with pytest.raises(ValueError, match=r"cannot be saved: 1 of its weights are missing"):
        model.save_pretrained(tmp_path, state_dict=state)
    assert not (tmp_path / WEIGHTS).exists()
    empty = get_peft_model(tiny("llama").to("meta"), CONFIGS["mixda"]())
    with pytest.raises(ValueError, match="is on the meta device and holds nothing"):
        empty.save_pretrained(tmp_path)


def test_a_config_is_written_in_one_step(tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(tiny, tmp_path)
    before = (tmp_path / CONFIG).read_bytes()

    def killed(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("os.replace", killed)
    with pytest.raises(KeyboardInterrupt):
        CONFIGS["mixda"]().save_pretrained(str(tmp_path))
    assert (tmp_path / CONFIG).read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["README.md", CONFIG, WEIGHTS]


def test_a_head_named_by_the_end_of_its_name_is_in_the_digest(tiny: Any, tmp_path: Path) -> None:
    model = saved(tiny, tmp_path, modules_to_save=["head"])
    assert torch.equal(logits(PeftModel.from_pretrained(tiny("llama"), tmp_path), "mixda"), logits(model, "mixda"))
    key = "base_model.model.lm_head.weight"
    change_weights(tmp_path, **{key: load_file(tmp_path / WEIGHTS)[key] + 1})
    refused(tiny, tmp_path, "is not what adapter_config.json was saved with")


def test_weights_that_are_set_by_hand_are_those_of_their_config(tiny: Any, tmp_path: Path) -> None:
    saved(tiny, tmp_path)
    key = next(iter(load_file(tmp_path / WEIGHTS)))
    change_weights(tmp_path, **{key: load_file(tmp_path / WEIGHTS)[key] + 1})
    model = get_peft_model(tiny("llama"), CONFIGS["mixda"]())
    before = logits(model, "mixda")
    with pytest.raises(ValueError, match=r"is not what adapter_config.json was saved with"):
        set_peft_model_state_dict(model, peft.load_peft_weights(tmp_path))
    assert torch.equal(logits(model, "mixda"), before)


def test_weights_of_an_earlier_save_beside_those_of_the_last_are_named(tiny: Any, tmp_path: Path) -> None:
    saved(tiny, tmp_path)
    torch.manual_seed(1)
    model = get_peft_model(tiny("llama"), CONFIGS["mixda"]())
    model.save_pretrained(tmp_path, safe_serialization=False)
    refused(tiny, tmp_path, f"is of an earlier save than .*adapter_model.bin.*: delete {WEIGHTS}")
    (tmp_path / WEIGHTS).unlink()
    assert torch.equal(logits(PeftModel.from_pretrained(tiny("llama"), tmp_path), "mixda"), logits(model, "mixda"))


# --- files of strangers -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("digest", [True, False])
@pytest.mark.parametrize(
    "key",
    [
        f"base_model.model.{Q}.weight", f"base_model.model.{Q}.base_layer.weight",
        "base_model.model.model.norm.weight",
        "base_model.model.lm_head.base_layer.base_layer.weight", "nothing", "base_model.model.x.lora_A.weight",
        "base_model.model.model.layers.1.mlp.down_proj.base_layer.weight",
        "base_model.model.model.layers.1.mlp.down_proj.mixda_adapters.other.weight",
    ],
)  # fmt: skip
def test_no_file_touches_a_frozen_weight(key: str, digest: bool, tiny: Any, tmp_path: Path) -> None:
    saved(tiny, tmp_path)
    if not digest:
        change_config(tmp_path, digest=None)
    change_weights(tmp_path, **{key: torch.ones(64, 64)})
    refused(tiny, tmp_path, "has no place for|does not begin with")
    model = get_peft_model(tiny("llama"), CONFIGS["mixda"]())
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match="has no place for"):
        set_peft_model_state_dict(model, load_peft_weights(tmp_path))
    assert all(torch.equal(before[key], tensor) for key, tensor in model.state_dict().items())


def test_a_width_that_the_file_does_not_have_takes_no_memory(tiny: Any, tmp_path: Path) -> None:
    for kind in ("bottleneck", "mosa", "pill"):
        saved(tiny, tmp_path / kind, kind)
        change_config(tmp_path / kind, r=10**12)  # terabytes, if they were asked for
        refused(tiny, tmp_path / kind, "asks for rank 1000000000000 at .* the file's widest weight has")
    saved(tiny, tmp_path / "mixda")
    domains = json.loads((tmp_path / "mixda" / CONFIG).read_text())["domains"]
    domains["a"]["ranks"] = dict.fromkeys(domains["a"]["ranks"], 10**12)
    change_config(tmp_path / "mixda", domains=domains)
    refused(tiny, tmp_path / "mixda", r"in the file and \(.*1000000000000")


def test_a_few_bytes_that_claim_a_large_weight_take_no_memory(tiny: Any, tmp_path: Path) -> None:
    """A pickle may say that every entry of a tensor is the same one."""
    saved(tiny, tmp_path, "bottleneck")
    weights = load_file(tmp_path / WEIGHTS)
    (tmp_path / WEIGHTS).unlink()
    key = next(key for key in weights if key.endswith("down.weight"))
    width = weights[key].shape[1]
    for claimed in (torch.zeros(1).expand(10**9, width), torch.zeros(width).expand(2, width)):
        torch.save({**weights, key: claimed}, tmp_path / "adapter_model.bin")
        refused(tiny, tmp_path, rf"down\.weight' is \({len(claimed)}, {width}\) of fewer entries")


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64])
def test_numbers_of_another_kind_are_not_cut_to_fit(dtype: torch.dtype, tiny: Any, tmp_path: Path) -> None:
    saved(tiny, tmp_path, "bottleneck")
    change_config(tmp_path, digest=None)
    key = next(key for key in load_file(tmp_path / WEIGHTS) if key.endswith("up.weight"))
    change_weights(tmp_path, **{key: load_file(tmp_path / WEIGHTS)[key].to(dtype)})
    refused(tiny, tmp_path, r"up.weight' is of (I64|BOOL|C64) in the file, where the model has real numbers")
    model = get_peft_model(tiny("llama"), CONFIGS["bottleneck"]())
    with pytest.raises(ValueError, match=f"up.weight' is of {dtype} in the file"):
        set_peft_model_state_dict(model, load_file(tmp_path / WEIGHTS))


@pytest.mark.parametrize("value", [torch.nan, -torch.inf])
def test_weights_that_are_not_finite_are_named_and_loaded(value: float, tiny: Any, tmp_path: Path) -> None:
    saved(tiny, tmp_path, "moa")
    change_config(tmp_path, digest=None)
    weights = load_file(tmp_path / WEIGHTS)
    first, other, *_ = sorted(key for key in weights if "experts.a" in key)
    weights[first][0], weights[other][0] = value, value
    change_weights(tmp_path, **weights)
    with pytest.warns(UserWarning, match=f"{tmp_path}: '{first}' and 1 more weights hold NaN or infinite values"):
        model = PeftModel.from_pretrained(tiny("llama"), tmp_path)
    loaded = get_peft_model_state_dict(model)
    assert all(torch.equal(loaded[key].nan_to_num(), tensor.nan_to_num()) for key, tensor in weights.items())
    with pytest.warns(UserWarning, match="1 more weights hold NaN"):
        tiny("llama").load_adapter(str(tmp_path))


def test_finite_weights_whose_sum_is_not_are_finite() -> None:
    large, small = torch.full((9,), 6e4, dtype=torch.float16), torch.ones(3)
    assert not large.sum().isfinite()
    both = torch.tensor([torch.inf, -torch.inf])
    narrow = torch.zeros(2, dtype=torch.uint8).view(torch.float4_e2m1fn_x2)  # has no other numbers
    given = {"large": large, "both": both, "small": small, "ints": torch.arange(3), "narrow": narrow}
    assert not_finite(given) == ("both",)


def test_a_source_in_a_file_is_not_followed_and_an_origin_names_no_local_path(tiny: Any, tmp_path: Path) -> None:
    for name in ("law", "code"):
        model = get_peft_model(tiny("llama"), MixDAConfig(domains=[name], r=4, task_adapter=None, **TASK))
        model.save_pretrained(tmp_path / "private" / name)
    sources = {name: str(tmp_path / "private" / name) for name in ("law", "code")}
    mixture = get_peft_model(tiny("llama"), MixDAConfig(domains=sources, task_adapter=None, **TASK))
    mixture.save_pretrained(tmp_path / "mixture")
    text = (tmp_path / "mixture" / CONFIG).read_text()
    assert json.loads(text)["domains"]["law"]["origin"] == "law"
    assert "private" not in text.replace(str(json.loads(text)["base_model_name_or_path"]), "")
    PeftModel.from_pretrained(tiny("llama"), tmp_path / "mixture")
    for source in (sources["law"], "somebody/else"):
        change_config(tmp_path / "mixture", domains={"law": {"source": source}, "code": {}})
        refused(tiny, tmp_path / "mixture", "names a source.*which is not followed")
        domain = {"law": {"origin": source, "ranks": {"layers.1.mlp.down_proj": 4}}}
        shown = MixDAConfig(domains=domain).to_dict()["domains"]["law"]["origin"]
        assert shown == ("law" if source == sources["law"] else source)


def test_broken_files_are_named(tiny: Any, tmp_path: Path) -> None:
    base = tiny("llama")
    source = MixDAConfig(domains={"x": str(tmp_path)}, task_adapter=None, **TASK)
    get_peft_model(tiny("llama"), MixDAConfig(domains=["x"], r=4, task_adapter=None, **TASK)).save_pretrained(tmp_path)
    whole, config = (tmp_path / WEIGHTS).read_bytes(), (tmp_path / CONFIG).read_bytes()
    broken = {
        WEIGHTS: [b"", whole[:4], whole[: len(whole) // 2], b"\xff" * 100],
        CONFIG: [b"", config[:50], b"[]", b"\xff\xfe", b"[" * 10**5],
    }
    for name, contents in broken.items():
        for content in contents:
            (tmp_path / WEIGHTS).write_bytes(whole)
            (tmp_path / CONFIG).write_bytes(config)
            (tmp_path / name).write_bytes(content)
            with pytest.raises(ValueError, match=name):
                PeftModel.from_pretrained(base, tmp_path)
            with pytest.raises(ValueError, match=name):
                get_peft_model(base, source)
    (tmp_path / CONFIG).write_bytes(config)
    (tmp_path / WEIGHTS).unlink()
    (tmp_path / "adapter_model.bin").write_bytes(b"cos\nsystem\n(S'true'\ntR.")  # a pickle that would run something
    with pytest.raises(ValueError, match=r"adapter_model.bin"):
        PeftModel.from_pretrained(base, tmp_path)
    with pytest.raises(ValueError, match=r"adapter_model.bin"):
        get_peft_model(base, source)


@pytest.mark.parametrize("content", [[torch.ones(2)], {"weight": [1.0]}, {3: torch.ones(2)}, None])
def test_a_pickle_that_holds_no_weights_by_name_is_named(content: Any, tiny: Any, tmp_path: Path) -> None:
    saved(tiny, tmp_path)
    (tmp_path / WEIGHTS).unlink()
    torch.save(content, tmp_path / "adapter_model.bin")
    refused(tiny, tmp_path, r"adapter_model.bin holds no weights by name")


def test_a_folder_without_weights_says_so(tiny: Any, tmp_path: Path) -> None:
    saved(tiny, tmp_path)
    (tmp_path / WEIGHTS).unlink()
    refused(tiny, tmp_path, r"holds adapter_config.json but no adapter_model.safetensors")


def test_two_keys_of_one_weight_are_refused(tiny: Any, tmp_path: Path) -> None:
    saved(tiny, tmp_path)
    change_config(tmp_path, digest=None)
    key, tensor = next(item for item in load_file(tmp_path / WEIGHTS).items() if "mixda_adapters." in item[0])
    change_weights(tmp_path, **{key.replace("mixda_adapters.", "mixda_adapters.default."): tensor + 1})
    model = get_peft_model(tiny("llama"), CONFIGS["mixda"]())
    before = logits(model, "mixda")
    for load in (
        lambda: model.load_adapter(tmp_path, "default"),
        lambda: set_peft_model_state_dict(model, load_peft_weights(tmp_path)),
    ):
        with pytest.raises(ValueError, match="are two keys of one weight"):
            load()
    assert torch.equal(logits(model, "mixda"), before)


def test_a_second_key_of_a_head_is_refused_by_name(tiny: Any, tmp_path: Path) -> None:
    """Over an adapter that is there PEFT writes the head's weight over it, whichever of the two was meant."""

    def made() -> Any:
        config = BottleneckConfig(r=4, modules_to_save=["classifier"], trainable_token_indices=[1])
        return get_peft_model(tiny("bert", "sequence_classification"), config)

    made().save_pretrained(tmp_path)
    digest = json.loads((tmp_path / CONFIG).read_text())["digest"]
    weights = load_file(tmp_path / WEIGHTS)
    head = next(key for key in weights if key.endswith("classifier.weight"))
    token = next(key for key in weights if key.endswith("trainable_tokens_delta"))
    for key, second in ((head, head.replace("weight", "modules_to_save.default.weight")), (token, f"{token}.default")):
        save_file({**weights, second: weights[key] + 1}, tmp_path / WEIGHTS)
        for said in (digest, None):
            change_config(tmp_path, digest=said)
            model = made()
            before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
            for load in (
                lambda model=model: model.load_adapter(tmp_path, "default"),
                lambda model=model: set_peft_model_state_dict(model, peft.load_peft_weights(tmp_path)),
            ):
                with pytest.raises(ValueError, match=f"{second!r} is no key of a file|is not what .* was saved with"):
                    load()
            assert all(torch.equal(before[key], tensor) for key, tensor in model.state_dict().items())
        with pytest.raises(ValueError, match=f"{second!r} is no key of a file"):
            made().load_adapter(tmp_path, "default")


def test_keys_of_a_head_without_the_prefix_are_named(tiny: Any, tmp_path: Path) -> None:
    saved(tiny, tmp_path, modules_to_save=["lm_head"])
    change_config(tmp_path, digest=None)
    state = load_file(tmp_path / WEIGHTS)
    save_file({key.removeprefix("base_model.model."): tensor for key, tensor in state.items()}, tmp_path / WEIGHTS)
    with pytest.raises(ValueError, match=r"lm_head.weight'.* is missing.*begins with 'base_model.model.'"):
        PeftModel.from_pretrained(tiny("llama"), tmp_path)
    model = get_peft_model(tiny("llama"), CONFIGS["mixda"](modules_to_save=["lm_head"]))
    with pytest.raises(ValueError, match=r"lm_head.weight'.* is missing.*begins with 'base_model.model.'"):
        model.load_adapter(tmp_path, "default")


def test_a_source_must_have_all_the_layers_of_its_config(tiny: Any, tmp_path: Path) -> None:
    config = MixDAConfig(domains=["x"], r=4, domain_layers=[0, 1], task_adapter=None, **TASK)
    get_peft_model(tiny("llama"), config).save_pretrained(tmp_path)
    change_config(tmp_path, digest=None)
    state = load_file(tmp_path / WEIGHTS)
    save_file({key: tensor for key, tensor in state.items() if "layers.0." not in key}, tmp_path / WEIGHTS)
    with pytest.raises(ValueError, match=r"lacks the weights of \['model.layers.0.mlp.down_proj'\]"):
        get_peft_model(tiny("llama"), MixDAConfig(domains={"x": str(tmp_path)}, task_adapter=None, **TASK))


# --- what PEFT saves beside ---------------------------------------------------------------------------------------


@every
@pytest.mark.parametrize("whole", [False, True])
def test_embeddings_that_peft_saves_come_back(
    kind: str, whole: bool, tiny: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tiny("llama").save_pretrained(tmp_path / "base")

    def base(seed: int) -> nn.Module:
        torch.manual_seed(seed)  # new rows are drawn anew
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        model.resize_token_embeddings(model.config.vocab_size + 2)
        return model

    more = {"modules_to_save": ["embed_tokens", "lm_head"]} if whole else {}
    model = get_peft_model(base(1), CONFIGS[kind](**more))
    model.save_pretrained(tmp_path / "adapter")  # PEFT sees that the vocabulary has grown
    again = PeftModel.from_pretrained(base(2), tmp_path / "adapter")
    assert "brings embeddings, which replace those of the base model" in caplog.text
    assert torch.equal(logits(again, kind), logits(model, kind))
    again.load_adapter(tmp_path / "adapter", "default", is_trainable=True)  # as Trainer resumes
    assert torch.equal(logits(again, kind), logits(model, kind))
    tokens = get_peft_model(base(1), CONFIGS[kind](trainable_token_indices=[3, 5]))
    tokens.save_pretrained(tmp_path / "tokens", save_embedding_layers=False)
    PeftModel.from_pretrained(base(1), tmp_path / "tokens")


def test_trained_tokens_that_two_tied_tables_share_may_come_twice(tiny: Any, tmp_path: Path) -> None:
    """So PEFT writes them where it saves embeddings too. What differs is no copy."""

    def load() -> PeftModel:
        return PeftModel.from_pretrained(tiny("llama", tie_word_embeddings=True), tmp_path)

    config = CONFIGS["bottleneck"](trainable_token_indices=[3, 5])
    get_peft_model(tiny("llama", tie_word_embeddings=True), config).save_pretrained(tmp_path)
    weights = load_file(tmp_path / WEIGHTS)
    (key,) = (key for key in weights if key.endswith("trainable_tokens_delta"))
    twin = key.replace("model.embed_tokens", "lm_head")
    up = next(key for key in weights if key.endswith("up.weight"))
    change_weights(tmp_path, **{twin: weights[key].clone()})
    state = load().state_dict()
    assert torch.equal(state[f"{key}.default"], weights[key])
    change_weights(tmp_path, **{up: weights[up] + 1})
    with pytest.raises(ValueError, match=r"is not what adapter_config\.json was saved with"):
        load()
    change_config(tmp_path, digest=None)
    change_weights(tmp_path, **{twin: weights[key] + 1})
    with pytest.raises(ValueError, match=r"lm_head\.token_adapter"):
        load()


# --- over an adapter that is there --------------------------------------------------------------------------------


def test_weights_saved_in_another_order_of_domains_are_refused(tiny: Any, tmp_path: Path) -> None:
    saved(tiny, tmp_path)  # b, a
    other = get_peft_model(tiny("llama"), MixDAConfig(domains=["a", "b"], r=4, task_r=3, **TASK))
    before = logits(other, "mixda")
    with pytest.raises(ValueError, match=r"domain_order=\['b', 'a'\] in the file, \['a', 'b'\] here"):
        other.load_adapter(tmp_path, "default", is_trainable=True)
    with pytest.raises(ValueError, match=r"domain_order=\['b', 'a'\] in the file, \['a', 'b'\] here"):
        set_peft_model_state_dict(other, peft.load_peft_weights(tmp_path))
    assert torch.equal(logits(other, "mixda"), before)
    for training in ({"balance_coef": 0.1, "gate_dropout": 0.1}, {"z_coef": 0.1, "entropy_coef": 0.1}):  # may differ
        get_peft_model(tiny("llama"), CONFIGS["mixda"](**training)).load_adapter(tmp_path, "default")


@pytest.mark.parametrize(
    ("kind", "given", "field", "order"),
    [
        ("mixda", {}, "domain_order", ["a", "b"]),
        ("mixda", {}, "domain_order", None),
        ("pill", {"modalities": ["text", "image", "audio"]}, "modalities", ["text", "audio", "image"]),
        ("moa", {}, "expert_order", ["a", "b"]),
        ("moa", {}, "expert_order", None),
    ],
)
def test_an_order_that_was_changed_in_a_file_is_refused(kind, given, field, order, tiny: Any, tmp_path: Path) -> None:
    model = saved(tiny, tmp_path, kind, **given)
    config = json.loads((tmp_path / CONFIG).read_text())
    change_config(tmp_path, **{field: order})
    refused(tiny, tmp_path, rf"{field}=.* is not what the weights were saved with.*take `digest` out")
    same = get_peft_model(tiny("llama"), CONFIGS[kind](**given))
    with pytest.raises(ValueError, match=f"{field}="):
        set_peft_model_state_dict(same, peft.load_peft_weights(tmp_path))
    # As earlier versions saved it, whose digest is that of the weights alone.
    change_config(tmp_path, **{field: config[field], "digest": config["digest"].split()[0]})
    assert torch.equal(logits(PeftModel.from_pretrained(tiny("llama"), tmp_path), kind), logits(model, kind))


def test_options_of_a_router_that_are_for_training_may_differ(tiny: Any, tmp_path: Path) -> None:
    router = {"kind": "softmax", "temperature": 2.0}
    get_peft_model(tiny("llama"), CONFIGS["mixda"](router=router)).save_pretrained(tmp_path)
    same = get_peft_model(tiny("llama"), CONFIGS["mixda"](router={**router, "balance_coef": 0.1}))
    same.load_adapter(tmp_path, "default")
    other = get_peft_model(tiny("llama"), CONFIGS["mixda"](router={**router, "temperature": 1.0}))
    with pytest.raises(ValueError, match=r"router=.*'temperature': 2.0.* in the file"):
        other.load_adapter(tmp_path, "default")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (BottleneckConfig(r=3, **TASK), r"is \(4,.*\) in the file and \(3,.*\) in this model"),
        (BottleneckConfig(r=4, activation="relu", **TASK), "activation='gelu' in the file, 'relu' here"),
        (BottleneckConfig(r=4, scale=0.5, **TASK), "scale=1.0 in the file, 0.5 here"),
        (MixDAConfig(domains=["a"], r=4, **TASK), "it is a BottleneckConfig"),
    ],
)
def test_another_config_than_that_of_the_file_is_one_sentence(
    config: Any, message: str, tiny: Any, tmp_path: Path
) -> None:
    saved(tiny, tmp_path, "bottleneck")
    model = get_peft_model(tiny("llama"), config)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        model.load_adapter(tmp_path, "default")
    assert all(torch.equal(before[key], tensor) for key, tensor in model.state_dict().items())


def test_states_in_memory_are_set_as_before(tiny: Any) -> None:
    one, two = (get_peft_model(tiny("llama"), CONFIGS["mixda"]()) for _ in range(2))
    set_peft_model_state_dict(two, get_peft_model_state_dict(one))
    assert torch.equal(logits(two, "mixda"), logits(one, "mixda"))


def test_states_in_memory_know_what_they_are_of(tiny: Any, tmp_path: Path) -> None:
    """Domains in another order would swap the gate's arms; a pickle holds plain weights."""
    one, two = (
        get_peft_model(tiny("llama"), MixDAConfig(domains=names, r=4, **TASK))
        for names in (["law", "code"], ["code", "law"])
    )
    # By its module: a name that was taken from it before this library came is that of PEFT alone.
    weights, before = peft.get_peft_model_state_dict(one), logits(two, "mixda")
    with pytest.raises(ValueError, match=r"an adapter 'default'.*domain_order=.* in the file"):
        set_peft_model_state_dict(two, weights)
    assert torch.equal(logits(two, "mixda"), before)
    torch.save(weights, tmp_path / "weights.pt")
    again = torch.load(tmp_path / "weights.pt", weights_only=True)
    assert list(again) == list(weights)
    assert all(torch.equal(again[key], tensor) for key, tensor in weights.items())


def test_lora_beside_a_mixture_is_asked_for(tiny: Any, tmp_path: Path) -> None:
    base = tiny("llama")
    lora = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    inject_adapter_in_model(lora, base, adapter_name="lora")
    model = get_peft_model(base, CONFIGS["mixda"]())
    model.save_pretrained(tmp_path)
    refused(tiny, tmp_path, "was trained beside {'lora': 'LORA'}")
    again = tiny("llama")
    inject_adapter_in_model(LoraConfig.from_pretrained(tmp_path / "lora"), again, adapter_name="lora")
    set_peft_model_state_dict(again, load_peft_weights(tmp_path / "lora"), adapter_name="lora")
    assert torch.equal(logits(PeftModel.from_pretrained(again, tmp_path), "mixda"), logits(model, "mixda"))
    change_config(tmp_path, trained_beside=None)
    PeftModel.from_pretrained(tiny("llama"), tmp_path)


# --- what would be lost or passed over ------------------------------------------------------------------------------


@pytest.mark.parametrize("part", ["model.layers.1", ""])
def test_offloaded_layers_are_refused(part: str, tiny: Any) -> None:
    """Of a model that is offloaded as a whole all weights are on the meta device, as of one that is made of shapes."""
    model = tiny("llama")
    cpu_offload(model.get_submodule(part))
    with pytest.raises(ValueError, match=rf"{part}.* is offloaded"):
        get_peft_model(model, CONFIGS["bottleneck"]())


def test_layers_of_which_a_process_has_a_part_are_refused(tiny: Any) -> None:
    model = tiny("llama")
    model.model.layers[1].mlp.down_proj._is_hooked = True  # as tensor parallelism of transformers leaves it
    with pytest.raises(ValueError, match=r"layers.1.mlp.down_proj' is shared out by tensor parallelism"):
        get_peft_model(model, CONFIGS["bottleneck"]())
    get_peft_model(model, BottleneckConfig(target_modules=["mlp"]))


# --- the card -----------------------------------------------------------------------------------------------------


def test_trainer_keeps_the_import_line_of_the_card(tiny: Any, tmp_path: Path) -> None:
    model = get_peft_model(tiny("llama"), CONFIGS["bottleneck"]())
    trainer = Trainer(model, TrainingArguments(str(tmp_path), report_to=[], use_cpu=True))
    trainer.save_model()
    trainer.create_model_card()
    card = ModelCard.load(tmp_path / "README.md")
    assert card.text.count("import mixadapters\n") == 1
    assert "mixadapters" in card.data["tags"]


def test_names_and_revisions_make_nothing_of_the_card(tiny: Any, tmp_path: Path) -> None:
    evil = "main`\n\n# Owned\n[free](http://x.example) <img src=x> ``` -->"
    config = CONFIGS["bottleneck"](revision=evil)
    model = get_peft_model(tiny("llama"), config, adapter_name="a`](x) <b>")
    model.save_pretrained(tmp_path)
    text = ModelCard.load(tmp_path / "README.md").text
    assert "# Owned" not in [line.strip() for line in text.splitlines()]
    outside = "".join(part for i, part in enumerate(text.replace("```", "\0").split("\0")) if i % 2 == 0)
    assert "free" not in outside.split("How to load")[0]
    line = next(line for line in text.splitlines() if line.startswith("- Settings") or "revision" in line)
    assert line.count("\n") == 0


@pytest.mark.parametrize(
    ("field", "first", "said"),
    [("kind", '"kind": "top_k"', '"kind": "top_p", "kind": "top_k"'), ("r", '"r": 8', '"r": 8, "r": 8')],
)
def test_a_config_that_says_a_field_twice_says_nothing(
    field: str, first: str, said: str, tiny: Any, tmp_path: Path
) -> None:
    """Who reads it would believe the first or the last."""
    config = MoAConfig(experts=["a"], router={"kind": "top_k", "k": 1}, target_modules=["q_proj"])
    get_peft_model(tiny("llama", num_hidden_layers=1), config).save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    text = file.read_text()
    assert first in text
    file.write_text(text.replace(first, said, 1))
    with pytest.raises(ValueError, match=rf"config.json is no adapter config: a field is named twice: \['{field}'\]"):
        PeftModel.from_pretrained(tiny("llama", num_hidden_layers=1), tmp_path)
