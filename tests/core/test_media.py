"""Models that read images beside text: whose images are whose, and what decides there."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from adapted import randomize
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from seeing import IMAGE, seeing, seen
from torch import nn

from mixadapters import BottleneckConfig, MixDAConfig, MoAConfig, MoSAConfig, PILLConfig
from mixadapters.core.media import media_by_row, media_part
from mixadapters.core.streams import read_stream
from mixadapters.serving.contrast import SelfContrastLogitsProcessor

TOWER = r".*(?:vision_(?:tower|model).*(?:[qv]_proj|attn\.qkv)|visual.*(?:qkv|fc1))"
TEXT = r".*(?:language|text)_model.*self_attn.[qv]_proj"
OTHERS = ["paligemma", "internvl", "idefics3", "smolvlm", "mllama"]
UNEVEN = [[2, 0], [0, 2], [1, 3], [1, 2]]  # of the first two the images are as many as the rows


def moa(**fields: Any) -> MoAConfig:
    fields = {"target_modules": TOWER, "router": "softmax", **fields}
    return MoAConfig(num_experts=2, r=2, task_type="CAUSAL_LM", **fields)


def bottleneck() -> BottleneckConfig:
    return BottleneckConfig(r=2, target_modules=TOWER, task_type="CAUSAL_LM")


def randomized(model: nn.Module) -> Any:
    return randomize(model, evaluation=True)


def two_adapters(kind: str, make: Any) -> PeftModel:
    model = get_peft_model(seeing(kind), make())
    model.add_adapter("other", make())
    return randomized(model)


@torch.no_grad()
def by_adapter(model: PeftModel, inputs: dict[str, Any], names: list[str]) -> list[torch.Tensor]:
    """The logits (T, V) of each row, in a batch under its adapter alone."""
    rows = []
    for row, name in enumerate(names):
        model.set_adapter(name)
        rows.append(model(**inputs).logits[row])
    return rows


# --- which modules read images -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "parts"),
    [
        ("llava", {"model.vision_tower", "model.multi_modal_projector"}),
        ("paligemma", {"model.vision_tower", "model.multi_modal_projector"}),
        ("qwen2_vl", {"model.visual"}),
        ("internvl", {"model.vision_tower", "model.multi_modal_projector"}),
        ("florence2", {"model.vision_tower", "model.multi_modal_projector"}),
        ("idefics3", {"model.vision_model", "model.connector"}),
        ("smolvlm", {"model.vision_model", "model.connector"}),
        (
            "mllama",
            {"model.vision_model", "model.multi_modal_projector"}
            | {f"model.language_model.layers.1.cross_attn.{name}_proj" for name in "kv"},
        ),
    ],
)
def test_parts_that_read_images_are_found_and_the_text_is_none_of_them(kind, parts) -> None:
    model = seeing(kind)
    found = {name: media_part(name, model) for name, _ in model.named_modules() if name}
    assert set(found.values()) - {""} == parts
    for name, part in found.items():
        assert part == next((p for p in parts if name == p or name.startswith(f"{p}.")), ""), name


def test_of_clip_the_images_are_apart_from_the_text_and_other_models_have_no_such_part(tiny) -> None:
    small = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.CLIPConfig(
        text_config=small, vision_config={**small, "image_size": 16, "patch_size": 8}, projection_dim=8
    )
    model = transformers.CLIPModel(config)
    found = {media_part(name, model) for name, _ in model.named_modules() if name}
    assert found == {"", "vision_model", "visual_projection"}
    assert media_part("text_projection", model) == ""
    for kind in ("bert", "vit", "t5", "llama"):
        other = tiny(kind)
        assert {media_part(name, other) for name, _ in other.named_modules() if name} == {""}


def test_what_rows_hold_is_said_by_placeholders_or_by_one_image_for_each() -> None:
    ids = torch.tensor([[1, 90, 90, 91], [1, 90, 5, 5]])
    assert media_by_row({"input_ids": ids}, (90, 91), 2) == [[2, 1], [1, 0]]
    assert media_by_row({"inputs_embeds": torch.zeros(2, 4, 8)}, (90, 91), 2) is None
    assert media_by_row({"input_ids": ids, "pixel_values": torch.zeros(2, 3, 8, 8)}, (), 2) == [1, 1]
    assert media_by_row({"input_ids": ids, "pixel_values": torch.zeros(3, 3, 8, 8)}, (), 2) is None
    cut = {"input_ids": ids, "image_sizes": torch.tensor([[10, 20], [20, 10]])}
    assert media_by_row(cut, (90,), 2) is None


# --- whose images are whose ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llava", "qwen2_vl", "florence2", *OTHERS])
@pytest.mark.parametrize("make", [moa, bottleneck])
def test_images_go_through_the_adapter_of_their_row(kind, make) -> None:
    model = two_adapters(kind, make)
    for per_row in ([1, 1], [2, 2]):
        inputs, names = seen(kind, per_row), ["default", "other"]
        expected = by_adapter(model, inputs, names)
        with torch.no_grad():
            mixed = model(**inputs, adapter_names=names).logits
        assert not torch.allclose(expected[1], model(**inputs, adapter_names=["default"] * 2).logits[1], atol=1e-2)
        for row in range(2):
            torch.testing.assert_close(mixed[row], expected[row], rtol=1e-4, atol=1e-5)


ASKED = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "suppress_tokens": [1, 2, IMAGE, 91, 92, 93]}


@pytest.mark.parametrize("kind", ["llava", "qwen2_vl", "florence2", *OTHERS])
def test_generate_reads_the_images_of_each_row_by_its_adapter_and_none_of_the_batch_before(kind) -> None:
    """transformers reads them before the first forward."""
    model, inputs = two_adapters(kind, bottleneck), seen(kind, [1, 1])
    inputs.pop("decoder_input_ids", None)
    asked = {**ASKED, "output_logits": True, "return_dict_in_generate": True}
    alone = []
    for name in ("default", "other"):
        model.set_adapter(name)
        alone.append(model.generate(**inputs, **asked).logits[0])
    model.set_adapter("default")
    names = ["other", "default"]
    mixed = model.generate(**inputs, **asked, adapter_names=names).logits[0]
    torch.testing.assert_close(mixed, torch.stack([alone[1][0], alone[0][1]]), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(alone[0], alone[1], atol=1e-2)
    model(**inputs, adapter_names=names)
    torch.testing.assert_close(model.generate(**inputs, **asked).logits[0], alone[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["llava", "qwen2_vl", "mllama"])
def test_images_that_are_read_outside_a_forward_know_the_pinned_fields_and_none_of_a_batch_before(kind) -> None:
    """`get_image_features`, as transformers offers it, goes past the model's forward."""
    model, inputs = two_adapters(kind, bottleneck), seen(kind, [1, 1])
    images = {n: v for n, v in inputs.items() if n in ("pixel_values", "image_grid_thw") or n.startswith("aspect")}
    base = model.get_base_model()

    def read() -> torch.Tensor:
        if kind == "mllama":  # which has no such method
            return base.model.vision_model(**images).last_hidden_state
        features = base.get_image_features(**images).pooler_output
        return torch.cat(tuple(features))

    alone = {}
    for name in ("default", "other"):
        model.set_adapter(name)
        alone[name] = read()
    assert not torch.allclose(alone["default"], alone["other"], atol=1e-2)
    model.set_adapter("default")
    for names in (["other", "other"], ["other", "default"]):
        model(**inputs, adapter_names=names)
        model.generate(**inputs, **ASKED, adapter_names=names)
        assert torch.equal(read(), alone["default"])
        with pytest.raises(ValueError, match="nonsense"):  # before its first forward
            model.generate(**inputs, **ASKED, adapter_names=names, nonsense=1)
        assert torch.equal(read(), alone["default"])
    context = model.base_model.context
    for _ in range(2):
        with context.pin(adapter_names=["other", "other"]):
            torch.testing.assert_close(read(), alone["other"], rtol=1e-4, atol=1e-5)
        assert torch.equal(read(), alone["default"])
    with context.pin(adapter_names=["other", "default"]), pytest.raises(ValueError, match="nothing says how many"):
        read()
    with context.pin(adapter_names=["other"] * 3):  # as many as rows of text, whatever they hold
        torch.testing.assert_close(read(), alone["other"], rtol=1e-4, atol=1e-5)


CHANGES = {
    "switched": lambda model, inputs: model.set_adapter("other", inference_mode=True),
    "disabled": lambda model, inputs: model.base_model.disable_adapter_layers(),
    "another batch": lambda model, inputs: model(**inputs, adapter_names=["other", "default"]),
}


@pytest.mark.parametrize("kind", ["llava", "qwen2_vl"])
@pytest.mark.parametrize("change", CHANGES)
def test_images_that_are_read_before_any_forward_are_read_again_as_they_were(kind, change) -> None:
    """Activation checkpointing runs layers of the tower again in the backward, whatever has been done since."""
    grads = []
    for checkpointing, changes in ((False, []), (True, [CHANGES[change]])):
        torch.manual_seed(0)
        model, inputs = two_adapters(kind, bottleneck), seen(kind, [1, 1])
        model.train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        images = {n: v for n, v in inputs.items() if n in ("pixel_values", "image_grid_thw")}
        features = torch.cat(tuple(model.get_base_model().get_image_features(**images).pooler_output))
        parameters = {n: p for n, p in model.named_parameters() if p.requires_grad and ".default." in n}
        with torch.no_grad():
            for make in changes:
                make(model, inputs)
        for parameter in parameters.values():  # which the change may have frozen
            parameter.requires_grad_(True)
        features.square().sum().backward()
        grads.append({name: p.grad for name, p in parameters.items() if p.grad is not None})
    plain, again = grads
    assert plain
    assert plain.keys() == again.keys()
    assert all(torch.equal(plain[name], again[name]) for name in plain)


def test_rows_that_all_have_places_for_as_many_images_may_use_fewer_of_them() -> None:
    model, inputs, names = two_adapters("mllama", bottleneck), seen("mllama", [1, 2]), ["default", "other"]
    expected = by_adapter(model, inputs, names)
    mixed = model(**inputs, adapter_names=names).logits
    for row in range(2):
        torch.testing.assert_close(mixed[row], expected[row], rtol=1e-4, atol=1e-5)


METHODS = {
    "bottleneck": BottleneckConfig, "mixda": lambda **fields: MixDAConfig(domain_layers=[0, 1], **fields),
    "pill": PILLConfig, "moa": lambda **fields: MoAConfig(target_modules=["q_proj", "v_proj"], **fields),
}  # fmt: skip


@pytest.mark.parametrize("kind", OTHERS)
@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_generates_and_comes_back_from_its_folder(kind, method, tmp_path) -> None:
    fields: dict[str, Any] = {"layers_to_transform": [0, 2]} if (kind, method) == ("mllama", "pill") else {}
    config = METHODS[method](r=2, init_weights=False, task_type="CAUSAL_LM", **fields)
    inputs, base = seen(kind, [2, 1]), seeing(kind)
    plain = base(**inputs).logits
    model = get_peft_model(base, config)
    model.train()(**inputs, labels=inputs["input_ids"].masked_fill(inputs["input_ids"] >= IMAGE, -100)).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    logits, tokens = randomized(model)(**inputs).logits, model.generate(**inputs, **ASKED)
    assert not torch.allclose(logits, plain, atol=1e-2)
    if kind != "paligemma":  # without a cache its attention sees the new tokens from all before
        assert torch.equal(model.generate(**inputs, **ASKED, use_cache=False), tokens)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(seeing(kind), tmp_path).eval()
    assert torch.equal(again(**inputs).logits, logits)
    with again.disable_adapter():
        assert torch.equal(again(**inputs).logits, plain)


@pytest.mark.parametrize("kind", ["llava", "qwen2_vl", "internvl", "idefics3", "florence2"])
@pytest.mark.parametrize("make", [moa, bottleneck])
@pytest.mark.parametrize("per_row", UNEVEN)
def test_rows_of_different_numbers_of_images_are_refused_where_they_name_different_adapters(
    kind, make, per_row
) -> None:
    model, inputs = two_adapters(kind, make), seen(kind, per_row)
    with pytest.raises(
        ValueError, match=r"adapter_names differs from row to row.*vis.*reads images.*different number"
    ):
        model(**inputs, adapter_names=["default", "other"])
    expected = by_adapter(model, inputs, ["other", "other"])
    with torch.no_grad():
        mixed = model(**inputs, adapter_names=["other", "other"]).logits
    torch.testing.assert_close(mixed, torch.stack(expected), rtol=1e-4, atol=1e-5)


def test_lora_of_peft_and_saved_modules_beside_ours_read_the_images_of_their_rows() -> None:
    base = seeing("llava")
    inject_adapter_in_model(LoraConfig(r=2, target_modules=TOWER, init_lora_weights=False), base, "lora")
    text = r".*language_model.*q_proj"
    model = get_peft_model(base, moa(target_modules=text, modules_to_save=["linear_1"])).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name or "lora_" in name:
                parameter.normal_(std=0.3)
        inputs = seen("llava", [1, 1])
        alone = [model(**inputs, adapter_names=[name] * 2).logits for name in ("lora", "default")]
        mixed = model(**inputs, adapter_names=["lora", "default"]).logits
        for row in range(2):
            torch.testing.assert_close(mixed[row], alone[row][row], rtol=1e-4, atol=1e-5)
            assert not torch.allclose(mixed[row], alone[1 - row][row], atol=1e-2)
        inputs = seen("llava", [2, 0])
        with pytest.raises(ValueError, match=r"adapter_names differs.*'model\.vision_tower'"):
            model(**inputs, adapter_names=["lora", "default"])
        saved = get_peft_model(seeing("llava"), moa(target_modules=text, modules_to_save=["linear_1"])).eval()
        with pytest.raises(ValueError, match=r"adapter_names differs.*'model\.multi_modal_projector'"):
            saved(**inputs, adapter_names=["default", "__base__"])


def test_experts_by_number_go_to_the_images_of_their_row() -> None:
    model, numbers = randomized(get_peft_model(seeing("llava"), moa())), torch.tensor([0, 1])
    with torch.no_grad():
        inputs = seen("llava", [1, 1])
        mixed = model(**inputs, expert_ids=numbers).logits
        for row in range(2):
            alone = model(**inputs, expert_ids=torch.tensor([row, row])).logits[row]
            torch.testing.assert_close(mixed[row], alone, rtol=1e-4, atol=1e-5)
        with pytest.raises(ValueError, match="expert_ids differs from row to row"):
            model(**seen("llava", [2, 0]), expert_ids=numbers)


@pytest.mark.parametrize(
    ("kind", "per_row"), [("llava", [1, 1]), ("llava", [2, 0]), ("smolvlm", [2, 1]), ("mllama", [2, 1])]
)
def test_what_repeats_rows_refuses_images_that_would_not_follow_them(kind, per_row) -> None:
    """Different numbers of images do where each row has a place for as many."""
    inputs, text = seen(kind, per_row), r".*(?:language|text)_model.*q_proj"
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    split = get_peft_model(seeing(kind), MoSAConfig(base="lora", r=2, target_modules=text, task_type="CAUSAL_LM"))
    split.train()
    model = randomized(get_peft_model(seeing(kind), moa(target_modules=text)))
    with torch.no_grad(), model.base_model.posterior():
        if per_row == [2, 0]:
            with pytest.raises(ValueError, match=r"the posterior repeats the rows.*different numbers of images"):
                model(**inputs)
        else:
            both = model(**inputs).logits
            for row in range(2):
                alone = model(**{name: value[row : row + 1] for name, value in inputs.items()}).logits[0]
                torch.testing.assert_close(both[row], alone, rtol=1e-4, atol=1e-4)
    if per_row == [2, 0]:
        with pytest.raises(ValueError, match=r"consistency of MoSA repeats.*different numbers.*consistency=0"):
            split(**inputs, labels=labels)
    else:
        split(**inputs, labels=labels).loss.backward()


def test_self_contrast_refuses_images_that_the_weak_form_would_not_see() -> None:
    model = randomized(get_peft_model(seeing("llava"), moa(target_modules=r".*language_model.*q_proj")))
    contrast = SelfContrastLogitsProcessor(model, {"adapters_off": True})
    asked = {"max_new_tokens": 2, "do_sample": False, "pad_token_id": 0, "suppress_tokens": [IMAGE]}
    with pytest.raises(ValueError, match="self-contrast is for text alone"):
        model.generate(**seen("llava", [1, 1]), **asked, logits_processor=[contrast])
    ids = torch.randint(5, 80, (2, 6))
    model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **asked, logits_processor=[contrast])


# --- what decides there --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "router",
    [
        *({"kind": "softmax", "granularity": name} for name in ("sequence", "causal_prefix", "request")),
        {"kind": "expert_choice"}, {"kind": "hash"}, {"kind": "pregate", "granularity": "token"},
        {"kind": "recurrent", "base": {"kind": "softmax", "granularity": "causal_prefix"}},
    ],
    ids=str,
)  # fmt: skip
def test_routers_that_decide_by_sequences_or_by_the_text_are_refused_where_images_are_read(router) -> None:
    base = seeing("llava")
    said = r"at 'model\.vision_tower\..*reads images or sounds.*exclude_modules='\.\*model"
    with pytest.raises(ValueError, match=said):
        get_peft_model(base, moa(router=router))
    assert not base._forward_pre_hooks
    scope = {"router_scope": "model"} if router["kind"] == "pregate" else {}
    left = moa(router=router, target_modules="all-linear", exclude_modules=r".*(?:vision_tower|projector).*", **scope)
    if router["kind"] != "expert_choice" and router.get("granularity") != "sequence":  # which no causal model takes
        get_peft_model(seeing("llava"), left)(**seen("llava", [1, 1]))


def test_routers_that_count_the_text_are_refused_where_images_are_read() -> None:
    with pytest.raises(ValueError, match=r"'model\.vision_tower' reads images or sounds"):
        get_peft_model(seeing("llava"), moa(router="counts", router_scope="model", target_modules="all-linear"))


@pytest.mark.parametrize("kind", ["llava", "qwen2_vl"])
def test_a_router_for_the_model_decides_for_the_text_and_for_each_part_that_sees_apart(kind) -> None:
    model = get_peft_model(seeing(kind), moa(target_modules="all-linear", router_scope="model"))
    scopes: dict[str, set[str]] = {}
    for host in model.base_model.hosts():
        router = host.adapters["default"].router
        leader = router.key.path if hasattr(router, "leader") else host.path
        scopes.setdefault(leader, set()).add(host.stack)
    assert all(len(stacks) == 1 for stacks in scopes.values())
    assert list(scopes.values()).count({""}) == 1
    inputs = seen(kind, [1, 2])
    randomized(model)(**inputs, labels=inputs["input_ids"]).loss.backward()


# --- positions, and what generates ---------------------------------------------------------------------------------


def test_positions_in_time_height_and_width_leave_those_in_the_text() -> None:
    ids = torch.ones(2, 5, dtype=torch.long)
    text, space = torch.arange(5).expand(2, -1), torch.zeros(3, 2, 5, dtype=torch.long)
    four = torch.cat([text[None], space])
    assert torch.equal(read_stream({"input_ids": ids, "position_ids": four}).position_ids, text)
    assert read_stream({"input_ids": ids, "position_ids": space}).position_ids is None
    assert torch.equal(read_stream({"input_ids": ids, "position_ids": text}).position_ids, text)


@pytest.mark.parametrize("kind", ["llava", "qwen2_vl", "internvl", "idefics3", "mllama"])
@pytest.mark.parametrize("granularity", ["causal_prefix", "request"])
def test_gate_that_remembers_generates_from_images_as_without_a_cache(kind, granularity) -> None:
    router = {"kind": "softmax", "granularity": granularity}
    model = randomized(get_peft_model(seeing(kind), moa(target_modules=TEXT, router=router)))
    asked = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "suppress_tokens": [1, 2, IMAGE, 91, 92, 93]}
    for per_row, beams in (([1, 2], 1), ([1, 1], 2)):
        inputs = seen(kind, per_row)
        cached = model.generate(**inputs, **asked, num_beams=beams)
        assert torch.equal(cached, model.generate(**inputs, **asked, num_beams=beams, use_cache=False))


@pytest.mark.parametrize("scope", ["module", "block", "model"])
def test_a_gate_over_the_text_is_refused_where_cross_attention_reads_images(scope) -> None:
    router = {"kind": "softmax", "granularity": "causal_prefix"}
    config = moa(target_modules=r".*language_model.*[qv]_proj", router=router, router_scope=scope)
    with pytest.raises(ValueError, match=r"layers\.1\.cross_attn\.v_proj' reads images or sounds"):
        get_peft_model(seeing("mllama"), config)


def test_lora_folders_of_cross_attention_are_routed_by_token(tmp_path) -> None:
    lora = LoraConfig(r=2, target_modules=r".*language_model.*[qv]_proj", init_lora_weights=False)
    get_peft_model(seeing("mllama"), lora).save_pretrained(tmp_path)
    model = get_peft_model(seeing("mllama"), MoAConfig(experts={"one": tmp_path}, task_type="CAUSAL_LM")).eval()
    assert model.peft_config["default"].granularity is None
    model(**seen("mllama", [1, 1]))


def test_what_generates_is_causal_though_its_attention_sees_the_whole_prompt() -> None:
    text = r".*language_model.*q_proj"
    model = get_peft_model(seeing("paligemma"), moa(router="counts", router_scope="model", target_modules=text))
    routers = [host.adapters["default"].router for host in model.base_model.hosts()]
    assert routers[0].granularity == "causal_prefix"
    with pytest.raises(ValueError, match="would see the future"):
        get_peft_model(
            seeing("paligemma"), moa(router={"kind": "softmax", "granularity": "sequence"}, target_modules=text)
        )
