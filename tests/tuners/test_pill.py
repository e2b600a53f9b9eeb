"""PILL: experts by modality, a gate on attention values, and what says which modality a token has."""

from __future__ import annotations

import copy
import inspect
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from adapted import gradients
from peft import PeftModel, get_peft_model
from processes import Process
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn import functional as F
from transformers import (
    CLIPVisionConfig,
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2AudioConfig,
    Qwen2AudioForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    StaticCache,
    ViTConfig,
    ViTModel,
)

from mixadapters import MixDAConfig, PILLConfig, StageCallback
from mixadapters.tuners import pill as folder
from mixadapters.tuners.pill import ImageInputs
from mixadapters.tuners.pill.model import ValueGate

transformers.logging.set_verbosity_error()
pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning:transformers"),
    pytest.mark.filterwarnings("ignore::UserWarning:peft"),
]
CLOSE = {"atol": 2e-5, "rtol": 2e-5}
EXACT = {"atol": 1e-12, "rtol": 1e-12}
DECODERS = ["llama", "mistral", "qwen2", "qwen3", "gemma3", "mixtral", "opt", "gpt2"]
THREE = ["text", "image", "audio"]
TOKEN = {"image": [90], "audio": [91, 92]}  # tokens that stand for images and sounds
SETTINGS = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}


@pytest.fixture(scope="session")
def tiny(tiny: Any) -> Any:
    """Models of two layers, a first and a last one, where a test asks for no more."""
    return partial(tiny, layers=2)


def pill(base: nn.Module, random: bool = True, **config: Any) -> PeftModel:
    """A model with PILL in eval mode; with `random` weights that make a difference."""
    model = get_peft_model(base, PILLConfig(**{"r": 4, "task_type": "CAUSAL_LM", **config}))
    return randomize(model).eval() if random else model.eval()


def randomize(model: nn.Module, seed: int = 0) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "adapters." in name:
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.copy_(noise * parameter.shape[-1] ** -0.5)
    return model


def mixed(inputs: dict[str, Tensor], *rows: list[int]) -> Tensor:
    """Modality ids (B, T) that begin with `rows`, the rest being text."""
    ids = torch.zeros_like(inputs["input_ids"])
    for b, row in enumerate(rows[: len(ids)]):
        ids[b, : len(row)] = torch.tensor(row)
    return ids


def gates(model: nn.Module) -> list[ValueGate]:
    return [m for m in model.modules() if isinstance(m, ValueGate)]


def values_of(model: nn.Module, layer: int = 0) -> list[Tensor]:
    """Filled with what the value projection of a layer gives, at each forward."""
    seen: list[Tensor] = []
    projection = model.get_base_model().model.layers[layer].self_attn.v_proj
    projection.register_forward_hook(lambda m, args, y: seen.append(y.detach()))
    return seen


# --- the start ----------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("kind", DECODERS)
def test_t01_text_alone_is_the_base_model_at_the_start(tiny, tiny_inputs, kind) -> None:
    inputs = tiny_inputs(kind, padding="right")
    expected = tiny(kind)(**inputs).logits
    model = pill(tiny(kind), random=False, modalities=THREE, attention_adapter="per_modality")
    assert torch.equal(model(**inputs, modality_ids=mixed(inputs)).logits, expected)
    by_tokens = pill(tiny(kind), random=False, modalities=THREE, token_ids={"image": [2], "audio": [3]})
    assert torch.equal(by_tokens(**inputs).logits, expected)


@torch.no_grad()
@pytest.mark.parametrize("kind", DECODERS)
def test_t02_gate_one_starts_as_the_base_model_for_all_modalities(tiny, tiny_inputs, kind) -> None:
    inputs = tiny_inputs(kind)
    model = pill(tiny(kind), random=False, modalities=THREE, gate_init="one")
    ids = mixed(inputs, [0, 1, 1, 2, 0], [2, 2, 0, 1, 1])
    assert torch.equal(model(**inputs, modality_ids=ids).logits, tiny(kind)(**inputs).logits)


@torch.no_grad()
def test_t03_gate_zero_erases_the_values_of_images_and_no_others(tiny, tiny_inputs) -> None:
    inputs = tiny_inputs("llama")
    model = pill(tiny("llama"), random=False)
    values = values_of(model)
    expected = model(**inputs, modality_ids=mixed(inputs)).logits
    ids = mixed(inputs, [0, 1, 1], [0, 0, 1, 1])
    logits = model(**inputs, modality_ids=ids).logits
    assert (values[1][ids == 1] == 0).all()
    assert torch.equal(values[1][ids == 0], values[0][ids == 0])
    # The keys of images keep their share of attention: "the base model is preserved" holds for text alone.
    assert (logits[0, 3:] - expected[0, 3:]).abs().max() > 1e-3


def test_layer_computes_the_formulas(tiny, tiny_inputs) -> None:
    model = pill(tiny("llama"), modalities=THREE, last_layer_experts=True)
    layer, inputs, seen = model.get_base_model().model.layers[-1], tiny_inputs("llama"), {}
    ids = mixed(inputs, [0, 1, 1, 2, 0], [2, 0, -1, 1])
    for name in ("input_layernorm", "post_attention_layernorm", "self_attn.v_proj"):
        module = layer.get_submodule(name)
        module.base_layer.register_forward_hook(lambda m, a, y, n=name: seen.update({f"{n} frozen": (a[0], y)}))
        module.register_forward_hook(lambda m, a, y, n=name: seen.update({n: y}))
    model(**inputs, modality_ids=ids)

    def glu(expert: nn.Module, z: Tensor) -> Tensor:
        return expert.up(F.silu(expert.gate(z)) * expert.down(z))

    n = seen["input_layernorm frozen"][1]
    shared = layer.input_layernorm.adapters["default"].attention.bank.experts["shared"]
    torch.testing.assert_close(seen["input_layernorm"], n + glu(shared, n), **CLOSE)
    u, v = seen["self_attn.v_proj frozen"]
    assert u is seen["input_layernorm"]
    expected = v.clone()
    for number, name in ((1, "image"), (2, "audio")):
        g = layer.self_attn.v_proj.adapters["default"].gates[name](u).tanh()  # (B, T, 2 KV heads)
        gated = (v.unflatten(-1, (2, 8)) * g.unsqueeze(-1)).flatten(-2)
        expected = torch.where((ids == number).unsqueeze(-1), gated, expected)
    torch.testing.assert_close(seen["self_attn.v_proj"], expected, **CLOSE)
    m = seen["post_attention_layernorm frozen"][1]
    experts = layer.post_attention_layernorm.adapters["default"].ffn.bank.experts
    expected = m.clone()
    for number, name in enumerate(THREE):
        expected += (ids == number).unsqueeze(-1) * glu(experts[name], m)
    torch.testing.assert_close(seen["post_attention_layernorm"], expected, **CLOSE)


# --- what says the modality, under a cache and in generation ------------------------------------------------------


@torch.no_grad()
def test_t04_decoding_token_by_token_is_the_whole_forward(tiny, tiny_inputs) -> None:
    model = pill(tiny("llama").double(), modalities=THREE, attention_adapter="per_modality")
    inputs = tiny_inputs("llama", batch=2, length=9)
    ids = mixed(inputs, [0, 1, 1, 0, 2, 2], [1, 1, 0, 2])
    whole = model(**inputs, modality_ids=ids).logits
    cache, steps = DynamicCache(), []
    for t in range(9):
        given = ids[:, : t + 1] if t % 2 else ids[:, t : t + 1]  # of the sequence so far, or of this token
        step = inputs["input_ids"][:, t : t + 1]
        steps.append(model(input_ids=step, past_key_values=cache, modality_ids=given).logits)
    torch.testing.assert_close(torch.cat(steps, 1), whole, **EXACT)


@torch.no_grad()
def test_t04b_a_step_needs_its_own_modality(tiny, tiny_inputs) -> None:
    model = pill(tiny("llama").double(), modalities=THREE)
    inputs = tiny_inputs("llama", batch=1)
    ids = mixed(inputs, [0, 1, 1, 0, 0, 0, 2])  # the last token is a sound
    expected = model(**inputs, modality_ids=ids).logits[:, -1]

    def step(**modality: Any) -> Tensor:
        cache = DynamicCache()
        model(input_ids=inputs["input_ids"][:, :-1], past_key_values=cache, modality_ids=ids[:, :-1])
        return model(input_ids=inputs["input_ids"][:, -1:], past_key_values=cache, **modality).logits[:, -1]

    torch.testing.assert_close(step(modality_ids=ids[:, -1:]), expected, **EXACT)
    assert (step(modality_ids=torch.zeros(1, 1, dtype=torch.long)) - expected).abs().max() > 1e-3
    with pytest.raises(ValueError, match="nothing says which tokens are text or image or audio"):
        step()
    with pytest.raises(ValueError, match="modality_ids has 3 values per row, but this forward reads 1 tokens after 6"):
        step(modality_ids=ids[:, :3])


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_t05_t06_padded_rows_are_as_alone(tiny, tiny_inputs, side) -> None:
    model = pill(tiny("llama").double())
    inputs = tiny_inputs("llama", batch=2, length=8)
    image, text = inputs["input_ids"][0], inputs["input_ids"][1, :5]
    ids = torch.tensor([0, 1, 1, 1, 0, 0, 0, 0])
    alone = model(input_ids=image[None], modality_ids=ids[None]).logits[0]
    padded = (3, 0) if side == "left" else (0, 3)
    batch = {
        "input_ids": torch.stack([image, F.pad(text, padded)]),
        "attention_mask": torch.stack([torch.ones(8), F.pad(torch.ones(5), padded)]).long(),
        "modality_ids": torch.stack([ids, F.pad(torch.zeros(5), padded, value=-1).long()]),
    }
    batch["position_ids"] = (batch["attention_mask"].cumsum(1) - 1).clamp_min(0)
    together = model(**batch).logits
    torch.testing.assert_close(together[0], alone, **EXACT)
    text_alone = model(input_ids=text[None], modality_ids=torch.zeros(1, 5).long()).logits[0]
    torch.testing.assert_close(together[1][batch["attention_mask"][1].bool()], text_alone, **EXACT)


def test_t05_left_padded_generation_is_as_alone(tiny, tiny_inputs) -> None:
    model = pill(tiny("llama"))
    inputs = tiny_inputs("llama", batch=2, length=6, padding="left")
    ids = mixed(inputs, [0, 1, 1, 0, 1, 0], [-1, 0, 0, 0, 0, 0])
    together = model.generate(**inputs, modality_ids=ids, **SETTINGS)
    alone = {name: value[1:, 1:] for name, value in inputs.items()}
    assert torch.equal(model.generate(**alone, modality_ids=ids[1:, 1:], **SETTINGS)[0], together[1, 1:])


@torch.no_grad()
def test_t07_numbers_of_modalities_are_names_only(tiny, tiny_inputs) -> None:
    inputs = tiny_inputs("llama")
    ids = mixed(inputs, [0, 1, 2, 2, 0], [2, 1, 0, 1])
    one = pill(tiny("llama"), modalities=["text", "image", "audio"])
    other = pill(tiny("llama"), modalities=["text", "audio", "image"])
    state = {n: p for n, p in one.named_parameters() if "pill_" in n}
    assert not other.load_state_dict(state, strict=False).unexpected_keys
    swapped = torch.tensor([0, 2, 1])[ids]
    torch.testing.assert_close(
        other(**inputs, modality_ids=swapped).logits, one(**inputs, modality_ids=ids).logits, **CLOSE
    )
    assert not torch.allclose(other(**inputs, modality_ids=ids).logits, one(**inputs, modality_ids=ids).logits)


@pytest.mark.parametrize(
    ("modality", "said"),
    [
        ({"modality_ids": [0, 1, 2]}, r"modality_ids=\[2\]"),
        ({"modality_ids": [0, 1, -3]}, r"modality_ids=\[-3\]"),
        ({"mm_token_type_ids": [0, 1, 3]}, r"mm_token_type_ids=\[3\] \(audio\)"),
        ({"mm_token_type_ids": [0, 1, 7]}, r"mm_token_type_ids=\[7\]"),
    ],
)
def test_t08_a_modality_that_the_config_does_not_name_raises(tiny, tiny_inputs, modality, said) -> None:
    model, inputs = pill(tiny("llama")), tiny_inputs("llama", batch=1, length=3)
    message = rf"tokens with {said}, which are not among modalities=\{{0: 'text', 1: 'image'\}}: add the modality to"
    with pytest.raises(ValueError, match=message):
        model(**inputs, **{name: torch.tensor([ids]) for name, ids in modality.items()})


@torch.no_grad()
def test_explicit_ids_come_before_token_types_and_these_before_tokens(tiny, tiny_inputs) -> None:
    model = pill(tiny("llama"), modalities=THREE, token_ids=TOKEN)
    inputs = tiny_inputs("llama", batch=1)
    inputs["input_ids"][0, 1:4] = torch.tensor([90, 91, 92])
    explicit = mixed(inputs, [0, 1, 0, 1])
    types = mixed(inputs, [0, 3, 1])  # transformers numbers audio 3
    by_explicit = model(**inputs, modality_ids=explicit).logits
    assert torch.equal(model(**inputs, modality_ids=explicit, mm_token_type_ids=types).logits, by_explicit)
    by_types = model(**inputs, mm_token_type_ids=types).logits
    assert torch.equal(by_types, model(**inputs, modality_ids=mixed(inputs, [0, 2, 1])).logits)
    by_tokens = model(**inputs).logits
    assert torch.equal(by_tokens, model(**inputs, modality_ids=mixed(inputs, [0, 1, 2, 2])).logits)
    assert not torch.equal(by_types, by_tokens)
    embeddings = model.get_input_embeddings()(inputs["input_ids"])
    with pytest.raises(ValueError, match="neither modality_ids nor mm_token_type_ids, and there are no input_ids"):
        model(inputs_embeds=embeddings)
    torch.testing.assert_close(model(inputs_embeds=embeddings, modality_ids=explicit).logits, by_explicit)


@torch.no_grad()
def test_t09_each_modality_has_its_own_experts_and_text_is_never_gated(tiny, tiny_inputs) -> None:
    inputs = tiny_inputs("llama")
    ids = mixed(inputs, [1, 1, 2, 2], [2, 0, 1])
    model = pill(tiny("llama"), modalities=THREE, attention_adapter="none", ffn_experts=[])
    values = values_of(model)
    model(**inputs, modality_ids=ids)
    model(**inputs, modality_ids=mixed(inputs))
    assert torch.equal(values[0][ids == 0], values[1][ids == 0])
    before = values[0]
    for gate in gates(model):
        gate.gates["audio"].weight.zero_()
    model(**inputs, modality_ids=ids)
    assert (values[2][ids == 2] == 0).all()
    assert torch.equal(values[2][ids < 2], before[ids < 2])
    one = pill(tiny("llama"), modalities=THREE, gate_shared=True, gate_granularity="layer", gate_modalities=["audio"])
    assert {tuple(p.shape) for gate in gates(one) for p in gate.parameters()} == {(1, 32)}
    values = values_of(one)
    one(**inputs, modality_ids=ids)
    for gate in gates(one):
        gate.open = True
    one(**inputs, modality_ids=ids)
    assert torch.equal(values[0][ids != 2], values[1][ids != 2])  # images are not among the gate's modalities
    assert not torch.equal(values[0][ids == 2], values[1][ids == 2])


@torch.no_grad()
@pytest.mark.parametrize("shared", [True, False])
def test_a_shared_gate_gives_images_and_audio_the_same_factor(tiny, tiny_inputs, shared) -> None:
    inputs = tiny_inputs("llama")
    model = pill(tiny("llama"), modalities=THREE, gate_shared=shared, attention_adapter="none", ffn_experts=[])
    values = values_of(model)
    for number in (1, 2):
        model(**inputs, modality_ids=torch.full_like(inputs["input_ids"], number))
    assert torch.equal(*values) is shared


def test_t10_a_batch_without_images_gives_zero_gradients_not_none(tiny, tiny_inputs) -> None:
    inputs = tiny_inputs("llama", labels="tokens")
    for experts in (None, ["image"]):
        model = pill(tiny("llama"), ffn_experts=experts).train()
        model(**inputs, modality_ids=mixed(inputs)).loss.backward()
        trained = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
        assert all(grad is not None for grad in trained.values())
        images = [grad for name, grad in trained.items() if "image" in name]
        assert images
        assert all((grad == 0).all() for grad in images)


RANK = """
import sys
import torch
import mixadapters
folder, rank = sys.argv[1], int(sys.argv[2])
torch.set_num_threads(1)
torch.distributed.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
model, batches = torch.load(f"{folder}/given", weights_only=False)
parallel = torch.nn.parallel.DistributedDataParallel(model)
for _ in range(2):
    parallel(**batches[rank]).loss.backward()
torch.save({n: p.grad / 2 for n, p in model.named_parameters() if p.requires_grad}, f"{folder}/{rank}")
"""


def small_vit(size: int = 16, **config: Any) -> ViTModel:
    fields = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    return ViTModel(ViTConfig(image_size=size, patch_size=8, **fields, **config), add_pooling_layer=False)


def with_images(base: nn.Module, **options: Any) -> tuple[nn.Module, ImageInputs]:
    torch.manual_seed(0)
    return base, ImageInputs.attach(base, small_vit(), **options)


def test_t10_ranks_with_other_modalities_train_together(tiny, tiny_inputs, tmp_path) -> None:
    base, images = with_images(tiny("llama"), grid=1)
    model = pill(base, token_ids=images.token_ids, modules_to_save=["projector"]).train()
    batches = [tiny_inputs("llama", labels="tokens", seed=s) for s in (0, 1)]
    batches[1]["input_ids"][:, 2] = images.token_id
    batches[1]["labels"] = batches[1]["labels"].masked_fill(batches[1]["input_ids"] == images.token_id, -100)
    batches[1]["pixel_values"] = torch.randn(2, 3, 16, 16)
    expected = copy.deepcopy(model)
    (sum(expected(**batch).loss for batch in batches) / 2).backward()
    torch.save((model, batches), tmp_path / "given")
    running = [Process(RANK, [str(tmp_path), str(rank)], GLOO_SOCKET_IFNAME="lo") for rank in (0, 1)]
    for process in running:
        process.finish()
    ranks = [torch.load(tmp_path / str(rank)) for rank in (0, 1)]
    for name, parameter in expected.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(ranks[0][name], ranks[1][name], msg=name)
            torch.testing.assert_close(ranks[0][name], parameter.grad, msg=name, **CLOSE)
    assert any("projector" in name and grad.any() for name, grad in ranks[0].items())


@pytest.mark.parametrize("reentrant", [False, True])
def test_t11_checkpointing_and_two_forwards_before_backward_change_nothing(tiny, tiny_inputs, reentrant) -> None:
    model, inputs = pill(tiny("llama")).train(), tiny_inputs("llama")
    first, second = mixed(inputs, [1, 1, 0, 1], [0, 1]), mixed(inputs, [0, 0, 1, 1], [1, 0, 1, 1])

    def run() -> dict[str, Tensor]:
        losses = [model(**inputs, modality_ids=ids).logits.square().mean() for ids in (first, second)]
        (losses[0] - 2 * losses[1]).backward()
        return gradients(model)

    plain = run()
    if reentrant:
        model.enable_input_require_grads()
    model.get_base_model().gradient_checkpointing_enable({"use_reentrant": reentrant})
    again = run()
    assert again.keys() == plain.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(again[name], gradient, msg=name, **CLOSE)
    assert any("gates" in name and gradient.any() for name, gradient in plain.items())


@pytest.mark.parametrize("given", ["modality_ids", "mm_token_type_ids", "tokens"])
@pytest.mark.parametrize("way", ["cached", "beams", "assisted", "static", "chunked"])
def test_t12_every_way_to_generate_is_the_one_without_cache(tiny, tiny_inputs, way, given) -> None:
    model = pill(tiny("llama"), token_ids=TOKEN | {"audio": [91]} if given == "tokens" else None, modalities=THREE)
    batch = 1 if way == "assisted" else 2
    inputs = tiny_inputs("llama", batch=batch, length=7, padding="left")
    ids = mixed(inputs, [0, 1, 1, 0, 1, 2, 0], [-1, 0, 0, 2, 1, 1, 0])
    inputs["input_ids"] = torch.where(ids > 0, ids + 89, inputs["input_ids"])
    if given != "tokens":
        inputs[given] = ids if given == "modality_ids" else ids.clamp_min(0) + (ids == 2)  # audio is 3 there
    options: dict[str, dict[str, Any]] = {
        "cached": {},
        "beams": {"num_beams": 3, "num_return_sequences": 2},
        "assisted": {"assistant_model": tiny("llama")},
        "static": {"cache_implementation": "static", "disable_compile": True},
        "chunked": {"prefill_chunk_size": 3},
    }
    reference = {k: v for k, v in options[way].items() if k.startswith("num_")}
    expected = model.generate(**inputs, **SETTINGS, **reference, use_cache=False)
    assert torch.equal(model.generate(**inputs, **SETTINGS, **options[way]), expected)
    with model.disable_adapter():
        rest = {k: v for k, v in inputs.items() if k != given}
        assert not torch.equal(model.generate(**rest, **SETTINGS, **reference), expected)


@torch.no_grad()
def test_generated_tokens_are_text(tiny, tiny_inputs) -> None:
    model, inputs = pill(tiny("llama")), tiny_inputs("llama", length=5)
    ids = mixed(inputs, [0, 1, 1, 0, 1], [1, 0, 0, 1, 1])  # the prompt ends in an image
    tokens = model.generate(**inputs, modality_ids=ids, **SETTINGS)
    logits = model(input_ids=tokens[:, :-1], modality_ids=F.pad(ids, (0, 5))).logits
    assert torch.equal(tokens[:, 5:], logits[:, 4:].argmax(-1))


@torch.no_grad()
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("given", ["modality_ids", "tokens"])
def test_compiled_forward_is_one_graph_for_any_ids(tiny, tiny_inputs, given) -> None:
    model = pill(tiny("llama", num_hidden_layers=2), token_ids={"image": [90]} if given == "tokens" else None)
    model(**tiny_inputs("llama"), modality_ids=mixed(tiny_inputs("llama")))  # weights find their place in memory
    counter = CompileCounterWithBackend("eager")
    fast = torch.compile(model, fullgraph=True, backend=counter)
    for seed in (0, 1):
        inputs = {**tiny_inputs("llama", seed=seed), "use_cache": False}
        ids = mixed(inputs, [0, 1, 1], [seed, 1])
        inputs["input_ids"] = torch.where(ids == 1, 90, inputs["input_ids"])
        if given == "modality_ids":
            inputs["modality_ids"] = ids
        torch.testing.assert_close(fast(**inputs).logits, model(**inputs).logits, **CLOSE)
    assert counter.frame_count == 1


@torch.no_grad()
def test_static_cache_in_pieces_is_the_whole_forward(tiny, tiny_inputs) -> None:
    model, inputs = pill(tiny("llama")), tiny_inputs("llama", length=9)
    ids = mixed(inputs, [0, 1, 1, 0, 1], [1, 0, 0, 1, 1])
    expected = model(**inputs, modality_ids=F.pad(ids, (0, 0)), use_cache=False).logits
    cache = StaticCache(config=model.config, max_cache_len=12)
    with model.base_model.context.pin(modality_ids=ids[:, :5]):  # as a prompt: what follows it is text
        pieces = [
            model(input_ids=inputs["input_ids"][:, a:b], past_key_values=cache).logits
            for a, b in ((0, 4), (4, 8), (8, 9))
        ]
    torch.testing.assert_close(torch.cat(pieces, 1), expected, **CLOSE)


# --- stages -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("init", ["zero", "one"])
def test_t13_align_trains_projector_and_other_experts_under_an_open_gate(tiny, tiny_inputs, tmp_path, init) -> None:
    base, images = with_images(tiny("llama"), grid=1)
    config = {"gate_init": init, "attention_adapter": "per_modality", "modules_to_save": ["projector"]}
    model = pill(base, random=False, token_ids=images.token_ids, **config)
    inputs = tiny_inputs("llama")
    inputs["input_ids"][:, 1] = images.token_id
    inputs["pixel_values"] = torch.randn(2, 3, 16, 16)
    tuner = model.base_model
    tuner.set_stage("align")
    trained = [n for n, p in model.named_parameters() if p.requires_grad]
    assert all(".ffn.bank.experts.image." in n or "projector" in n for n in trained)
    assert {n.split(".")[-2] for n in trained} == {"down", "gate", "up", "default"}
    values = values_of(model)
    aligned = model(**inputs).logits
    frozen = values[0].clone()
    assert frozen[:, 1].any()
    with model.disable_adapter():
        model(**inputs)
    assert torch.equal(values[1][:, 2:], frozen[:, 2:])
    model.save_pretrained(tmp_path)
    again, _ = with_images(tiny("llama"), grid=1)
    loaded = PeftModel.from_pretrained(again, tmp_path).eval()
    assert loaded.peft_config["default"].stage == "align"
    assert torch.equal(loaded(**inputs).logits, aligned)  # an adapter that was only aligned keeps its gate open
    tuner.set_stage("tune")
    assert {p.requires_grad for n, p in model.named_parameters() if "adapters.default" in n} == {True}
    tuned = model(**inputs).logits
    assert torch.equal(tuned, aligned) is (init == "one")


def test_stages_are_driven_by_the_callback(tiny, tiny_inputs, tmp_path) -> None:
    model = pill(tiny("llama"), random=False)
    row = {name: value[0] for name, value in tiny_inputs("llama", labels="tokens").items()}
    row["modality_ids"] = torch.tensor([0, 1, 1, 0, 0, 0, 0])

    def trainer(stage: str, **options: Any) -> transformers.Trainer:
        arguments = transformers.TrainingArguments(
            str(tmp_path / stage), max_steps=2, learning_rate=0.1, report_to="none", use_cpu=True, disable_tqdm=True,
            dataloader_pin_memory=False, **options,
        )  # fmt: skip
        return transformers.Trainer(model, arguments, train_dataset=[row] * 8, callbacks=[StageCallback(stage)])

    with pytest.raises(ValueError, match=r"remove_unused_columns=True would drop the columns \['modality_ids'\]"):
        trainer("align")
    before = copy.deepcopy(model.state_dict())

    def changed() -> set[str]:
        return {n for n, v in model.state_dict().items() if not torch.equal(v, before[n])}

    trainer("align", remove_unused_columns=False).train()
    assert all(gate.open for gate in gates(model))
    assert changed()
    assert all(".ffn.bank.experts.image." in name for name in changed())
    trainer("tune", remove_unused_columns=False).train()
    assert not any(gate.open for gate in gates(model))
    assert {"gates", "attention"} <= {part for name in changed() for part in name.split(".")}


def test_a_config_that_begins_in_align_trains_that_stage(tiny) -> None:
    config = PILLConfig(r=4, stage="align")
    model = get_peft_model(tiny("llama"), config)
    training = {n for n, p in model.named_parameters() if p.requires_grad}
    assert training == {n for n, _ in model.named_parameters() if ".ffn.bank.experts.image." in n} != set()
    model.base_model.set_stage("tune")
    other = get_peft_model(tiny("llama"), config)  # takes the object as it was given
    assert other.base_model.stage == {"default": "align"}
    assert all(gate.open for gate in gates(other))
    assert model.peft_config["default"].stage == "tune"


def test_t14_image_expert_of_the_last_layer_learns_nothing_from_text(tiny, tiny_inputs) -> None:
    inputs = tiny_inputs("llama", batch=1, labels="tokens")
    ids = mixed(inputs, [0, 1, 1, 0, 0, 0, 0])
    text = inputs["labels"].masked_fill(F.pad(ids[:, :-1], (1, 0)) + ids > 0, -100)  # no image predicts a label
    model = pill(tiny("llama", layers=3), last_layer_experts=True).train()

    def learned(labels: Tensor) -> dict[str, bool]:
        model(**{**inputs, "labels": labels}, modality_ids=ids).loss.backward()
        return {name: bool(grad.any()) for name, grad in gradients(model).items()}

    last = ".layers.2.post_attention_layernorm.pill_adapters.default.ffn.bank.experts.image."
    assert {name for name, any_ in learned(text).items() if not any_} == {
        f"base_model.model.model{last}{part}.weight" for part in ("down", "gate", "up")
    }
    assert all(learned(inputs["labels"]).values())  # the image before the first word predicts it
    dropped = pill(tiny("llama", layers=3))
    assert not any(last in name for name, _ in dropped.named_parameters())
    assert any("layers.1.post_attention_layernorm" in n and ".image." in n for n, _ in dropped.named_parameters())
    only = pill(tiny("llama", layers=3), ffn_experts=["image"])
    layers = {n.split(".layers.")[1][0] for n, _ in only.named_parameters() if "post_attention_layernorm.pill" in n}
    assert layers == {"0", "1"}


def test_t14_first_step_trains_up_projections_and_gates_alone(tiny, tiny_inputs) -> None:
    inputs = tiny_inputs("llama", labels="tokens")
    model = pill(tiny("llama"), random=False).train()
    model(**inputs, modality_ids=mixed(inputs, [0, 1, 1], [1, 1])).loss.backward()
    learned = {name.split(".")[-2] for name, grad in gradients(model).items() if grad.any()}
    assert learned == {"up", "image"}  # gates are called by their modality


# --- saving, switching --------------------------------------------------------------------------------------------


@torch.no_grad()
def test_t15_save_load_switch_disable_and_delete(tiny, tiny_inputs, tmp_path) -> None:
    inputs = tiny_inputs("llama", batch=1)
    base, images = with_images(tiny("llama"), grid=1)
    inputs["input_ids"][0, 1:3] = images.token_id
    inputs["pixel_values"] = torch.randn(2, 3, 16, 16)
    frozen = base(**inputs).logits
    config = {"token_ids": images.token_ids, "gate_init": "zero", "modules_to_save": ["projector"]}
    model = pill(base, **config)
    model.get_base_model().images.projector.modules_to_save["default"].weight.normal_()
    expected = model(**inputs).logits
    model.save_pretrained(tmp_path)

    loaded = PeftModel.from_pretrained(with_images(tiny("llama"), grid=1)[0], tmp_path, adapter_name="one").eval()
    assert loaded.peft_config["one"].token_ids == {"image": [96]}
    assert torch.equal(loaded(**inputs).logits, expected)
    loaded.load_adapter(tmp_path, "two")
    randomize(loaded, seed=1).set_adapter("two")
    second = loaded(**inputs).logits
    assert not torch.allclose(second, expected)
    with loaded.disable_adapter():
        assert torch.equal(loaded(**inputs).logits, frozen)
    assert torch.equal(loaded(**inputs).logits, second)
    loaded.delete_adapter("one")
    assert torch.equal(loaded(**inputs).logits, second)
    with pytest.raises(ValueError, match="cannot be merged"):
        loaded.merge_and_unload()

    (tmp_path / "other").mkdir()
    weights = safe_load(tmp_path / "adapter_model.safetensors")
    for change, message in (
        (lambda w: {k: v for k, v in w.items() if "gates" not in k}, "is missing"),
        (lambda w: {**w, **{k.replace("image", "sound"): v for k, v in w.items()}}, "no place for"),
    ):
        safe_save(change(weights), tmp_path / "other" / "adapter_model.safetensors")
        (tmp_path / "other" / "adapter_config.json").write_text((tmp_path / "adapter_config.json").read_text())
        with pytest.raises(ValueError, match=message):
            PeftModel.from_pretrained(with_images(tiny("llama"), grid=1)[0], tmp_path / "other")
    with pytest.raises(ValueError, match="projector"):
        PeftModel.from_pretrained(tiny("llama"), tmp_path)


def safe_load(path: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return load_file(path)


def safe_save(weights: dict[str, Tensor], path: Path) -> None:
    from safetensors.torch import save_file

    save_file({name: value.clone() for name, value in weights.items()}, path)


@torch.no_grad()
def test_rows_of_a_batch_choose_their_adapters(tiny, tiny_inputs) -> None:
    inputs = tiny_inputs("llama", batch=3)
    ids = mixed(inputs, [0, 1, 1], [1, 1], [0, 0, 1])
    model = pill(tiny("llama"))
    model.add_adapter("other", PILLConfig(r=6, gate_init="one", attention_adapter="none"))
    randomize(model, seed=1)
    together = model(**inputs, modality_ids=ids, adapter_names=["other", "default", "__base__"]).logits
    for row, name in enumerate(("other", "default")):
        model.set_adapter(name)
        torch.testing.assert_close(together[row], model(**inputs, modality_ids=ids).logits[row], **CLOSE)
    assert torch.equal(together[2], tiny("llama")(**inputs).logits[2])


@torch.no_grad()
@pytest.mark.parametrize("given", ["modality_ids", "tokens"])
def test_rows_of_other_adapters_may_hold_what_an_adapter_does_not_know(tiny, tiny_inputs, given) -> None:
    """A row of a clip beside one of an image: each is for an adapter that knows one of the two."""
    inputs = tiny_inputs("llama", batch=3)
    ids = mixed(inputs, [0, 1, 1], [2, 0, 2], [2, 1, 2])
    tokens = {name: TOKEN[name] for name in ("image", "audio")} if given == "tokens" else None
    inputs["input_ids"] = torch.where(ids > 0, ids + 89, inputs["input_ids"])
    fields = {"modality_ids": ids} if given == "modality_ids" else {}
    model = pill(tiny("llama"), token_ids=tokens, modalities=["text", "image"] if given == "modality_ids" else THREE)
    model.add_adapter("hears", PILLConfig(r=6, modalities=THREE, token_ids=tokens, task_type="CAUSAL_LM"))
    randomize(model, seed=1)
    together = model(**inputs, **fields, adapter_names=["default", "hears", "__base__"]).logits
    for row, name in enumerate(("default", "hears")):
        model.set_adapter(name)
        alone = {key: value[row : row + 1] for key, value in {**inputs, **fields}.items()}
        torch.testing.assert_close(together[row], model(**alone).logits[0], **CLOSE)
    assert torch.equal(together[2], tiny("llama")(**inputs).logits[2])
    if given == "modality_ids":
        with pytest.raises(ValueError, match=r"modality_ids=\[2\], which are not among"):
            model(**inputs, **fields, adapter_names=["hears", "default", "__base__"])


@pytest.mark.parametrize("change", ["switch", "disable", "stage"])
@torch.no_grad()
def test_t19_a_cache_of_other_adapters_is_refused(tiny, tiny_inputs, change) -> None:
    model, inputs = pill(tiny("llama")), tiny_inputs("llama", batch=1)
    model.add_adapter("other", PILLConfig(r=4))
    ids = mixed(inputs, [0, 1, 1])

    def fill(make: bool) -> Any:
        given = {"past_key_values": DynamicCache()} if make else {"use_cache": True}
        return model(input_ids=inputs["input_ids"], modality_ids=ids, **given).past_key_values

    def go_on(cache: Any) -> Tensor:
        ids = torch.zeros(1, 1, dtype=torch.long)
        return model(input_ids=torch.tensor([[7]]), past_key_values=cache, modality_ids=ids).logits

    go_on(fill(True))
    for make in (True, False):
        cache = fill(make)
        if change == "disable":
            with model.disable_adapter(), pytest.raises(ValueError, match="cache was filled by adapter 'default'"):
                go_on(cache)
        else:
            if change == "switch":
                model.set_adapter("other")
            else:
                model.base_model.set_stage("align")
            with pytest.raises(ValueError, match="begin with a new cache"):
                go_on(cache)
            model.set_adapter("default")
            model.base_model.set_stage("tune")
    reset = StaticCache(config=model.config, max_cache_len=12)
    model(input_ids=inputs["input_ids"], modality_ids=ids, past_key_values=reset)
    reset.reset()
    model.set_adapter("other")
    model(input_ids=inputs["input_ids"], modality_ids=ids, past_key_values=reset)


# --- architectures ------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("heads", [1, 2, 4])
def test_t16_a_factor_per_kv_head(tiny, tiny_inputs, heads) -> None:
    inputs = tiny_inputs("llama")
    model = pill(tiny("llama", num_key_value_heads=heads), random=False)
    assert all(p.shape == (heads, 32) for gate in gates(model) for p in gate.parameters())
    values = values_of(model)
    ids = mixed(inputs, [1, 1, 1], [1])
    model(**inputs, modality_ids=mixed(inputs))
    gates(model)[0].gates["image"].weight[-1] = 100.0  # saturated: plus or minus 1
    model(**inputs, modality_ids=ids)
    assert (values[1][ids == 1][:, :-8] == 0).all()
    assert torch.equal(values[1][ids == 1][:, -8:].abs(), values[0][ids == 1][:, -8:].abs())


QKV = {
    "gpt2": ("GPT2Config", {"n_embd": 32, "n_layer": 2, "n_head": 4}, "transformer.h.0.attn.c_attn"),
    "phi3": (
        "Phi3Config",
        {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "pad_token_id": 0},
        "model.layers.0.self_attn.qkv_proj",
    ),
    "gpt_neox": (
        "GPTNeoXConfig",
        {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4},
        "gpt_neox.layers.0.attention.query_key_value",
    ),
    "bloom": (
        "BloomConfig",
        {"hidden_size": 32, "n_layer": 2, "n_head": 4},
        "transformer.h.0.self_attention.query_key_value",
    ),
}  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize("kind", QKV)
def test_fused_projection_is_gated_where_its_values_lie(tiny_inputs, kind) -> None:
    config, fields, path = QKV[kind]
    base = transformers.AutoModelForCausalLM.from_config(getattr(transformers, config)(vocab_size=96, **fields))
    inputs = tiny_inputs("llama", batch=1)
    model = pill(base.eval(), random=False, ffn_experts=[], attention_adapter="none")
    fused = model.get_base_model().get_submodule(path)
    seen: dict[str, Any] = {}
    fused.register_forward_hook(lambda m, args, y: seen.update(y=y))
    out: list[Any] = []
    values = DynamicCache()
    original = values.update
    values.update = lambda k, v, *a, **kw: out.append((k, v)) or original(k, v, *a, **kw)
    model(**inputs, modality_ids=mixed(inputs), past_key_values=values)
    plain, (keys, before) = seen["y"], out[0]
    ids = mixed(inputs, [0, 1, 1])
    out.clear()
    values = DynamicCache()
    original = values.update
    values.update = lambda k, v, *a, **kw: out.append((k, v)) or original(k, v, *a, **kw)
    model(**inputs, modality_ids=ids, past_key_values=values)
    assert torch.equal(out[0][0], keys)  # (B, KV heads, T, width of a head)
    assert torch.equal(out[0][1][:, :, ids[0] == 0], before[:, :, ids[0] == 0])
    assert (out[0][1][:, :, ids[0] == 1] == 0).all()
    assert int((seen["y"] != plain).sum()) == 2 * before.shape[1] * before.shape[-1]  # two tokens, values alone


def test_blocks_in_parallel_on_one_norm_are_refused() -> None:
    def base(kind: str, **fields: Any) -> nn.Module:
        config = getattr(transformers, kind)(vocab_size=96, **fields)
        return transformers.AutoModelForCausalLM.from_config(config)

    small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    gptj = {"n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4}
    with pytest.raises(ValueError, match="'gptj' models have no module for the role 'ffn_norm'"):
        pill(base("GPTJConfig", **gptj))
    falcon = base("FalconConfig", **small, new_decoder_architecture=False, parallel_attn=True)
    with pytest.raises(ValueError, match=r"layers \[0, 1\] have no module for the role 'ffn_norm'"):
        pill(falcon, gate=False)
    only_gate = pill(base("GPTJConfig", **gptj), attention_adapter="none", ffn_experts=[])
    assert len(gates(only_gate)) == 2
    with pytest.raises(ValueError, match="does not know where 'codegen' models keep the values"):
        pill(base("CodeGenConfig", **gptj), attention_adapter="none", ffn_experts=[])


def test_encoder_decoders_are_refused(tiny) -> None:
    with pytest.raises(ValueError, match="PILL is for decoders; T5ForConditionalGeneration has an encoder"):
        pill(tiny("t5"))


@torch.no_grad()
def test_t16_half_precision_under_autocast(tiny, tiny_inputs) -> None:
    inputs = tiny_inputs("llama", labels="tokens")
    ids = mixed(inputs, [0, 1, 1], [1, 1])
    model = pill(tiny("llama"))
    expected = model(**inputs, modality_ids=ids).logits
    with torch.autocast("cpu", torch.bfloat16):
        half = model(**inputs, modality_ids=ids).logits
    assert (half.float() - expected).abs().mean() < 0.05 * expected.abs().mean()
    base = pill(tiny("llama").bfloat16())
    assert {p.dtype for gate in gates(base) for p in gate.parameters()} == {torch.float32}
    with torch.enable_grad():
        output = base.train()(**inputs, modality_ids=ids)
        output.loss.backward()
    assert output.logits.dtype == torch.bfloat16
    assert all(p.grad.isfinite().all() for p in base.parameters() if p.requires_grad)


def test_t16_base_of_eight_bits(tiny, tiny_inputs, tmp_path) -> None:
    quantize = pytest.importorskip("torchao.quantization")
    tiny("llama").save_pretrained(tmp_path)
    config = transformers.TorchAoConfig(quantize.Int8WeightOnlyConfig())
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config, device_map="cpu")
    assert "Int8" in type(base.model.layers[0].self_attn.v_proj.weight).__name__
    inputs = tiny_inputs("llama", labels="tokens")
    model = pill(base).train()
    output = model(**inputs, modality_ids=mixed(inputs, [0, 1, 1], [1, 1]))
    output.loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
    exact = pill(tiny("llama"))(**inputs, modality_ids=mixed(inputs, [0, 1, 1], [1, 1])).logits
    assert (output.logits - exact).abs().mean() < 0.1 * exact.abs().mean()


def test_t17_preset_of_the_7b_model_has_the_papers_number_of_parameters() -> None:
    config = LlamaConfig(
        vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32
    )
    with torch.device("meta"):
        base = LlamaForCausalLM(config)
        encoder = ViTModel(ViTConfig(hidden_size=768), add_pooling_layer=False)
    images = ImageInputs.attach(base, encoder)
    model = get_peft_model(base, PILLConfig.preset("paper_7b", token_ids=images.token_ids))
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 45_088_768
    model.base_model.set_stage("align")
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 15_728_640
    dropped = get_peft_model(
        LlamaForCausalLM(LlamaConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4)),
        PILLConfig.preset("paper_7b", modules_to_save=None, last_layer_experts=False),
    )
    assert sum(p.numel() for p in dropped.parameters() if p.requires_grad) == 5 * 3 * 32 * 32 + 2 * 4 * 32


# --- configs and batches ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("field", ["modality_ids", "mm_token_type_ids"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bool])
def test_numbers_of_modalities_are_integers(tiny, tiny_inputs, field, dtype) -> None:
    model, inputs = pill(tiny("llama")), tiny_inputs("llama")
    ids = mixed(inputs, [0, 1]).to(dtype)
    with pytest.raises(ValueError, match=rf"{field} must be whole numbers, not {dtype}"):
        model(**inputs, **{field: ids})


@pytest.mark.parametrize("more", [1, 3])
def test_numbers_of_more_axes_than_tokens_are_refused(tiny, tiny_inputs, more) -> None:
    model, inputs = pill(tiny("llama")), tiny_inputs("llama")
    with pytest.raises(ValueError, match=r"modality_ids \(2, \d+, \d\) must be \(B, T\)"):
        model(**inputs, modality_ids=mixed(inputs).unsqueeze(-1).repeat(1, 1, more))


@pytest.mark.parametrize("wrong", [-2, 2, 1 << 40])
def test_a_number_without_modality_is_refused(tiny, tiny_inputs, wrong) -> None:
    model, inputs = pill(tiny("llama")), tiny_inputs("llama")
    with pytest.raises(
        ValueError, match=rf"modality_ids=\[{wrong}\], which are not among modalities=\{{0: 'text', 1: 'image'\}}"
    ):
        model(**inputs, modality_ids=mixed(inputs, [0, 1, wrong]))


def test_a_modality_may_be_called_shared(tiny, tiny_inputs) -> None:
    model = pill(tiny("llama"), modalities=["text", "shared"], ffn_experts=["shared"], attention_adapter="none")
    inputs = tiny_inputs("llama")
    expected = tiny("llama")(**inputs).logits
    assert torch.equal(model(**inputs, modality_ids=mixed(inputs)).logits, expected)
    assert not torch.equal(model(**inputs, modality_ids=mixed(inputs, [1], [1])).logits, expected)


def test_a_base_that_sees_begins_with_open_gates_also_without_a_token_for_images() -> None:
    base, _ = llava()
    base.config.image_token_id = None
    config = get_peft_model(base, PILLConfig(task_type="CAUSAL_LM")).peft_config["default"]
    assert (config.gate_init, config.token_ids) == ("one", None)


@pytest.mark.parametrize("width", [32, 128])
def test_down_projections_start_as_strong_at_any_width(tiny, width) -> None:
    model = pill(tiny("llama", hidden_size=width, head_dim=8), random=False, r=64)
    weights = torch.stack([p for n, p in model.named_parameters() if ".experts." in n and ".down." in n])
    assert float(weights.std()) == pytest.approx(1.28 * width**-0.5, rel=0.02)


def test_a_token_that_the_base_has_for_images_and_videos_says_nothing() -> None:
    base, inputs = llava()
    base.config.video_token_id = base.config.image_token_id
    model = get_peft_model(base, PILLConfig(task_type="CAUSAL_LM"))
    assert model.peft_config["default"].token_ids is None
    with pytest.raises(ValueError, match="token_ids is not set; pass modality_ids"):
        model(**inputs)
    model(**inputs, mm_token_type_ids=(inputs["input_ids"] == 90).long())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"modalities": ["image", "text"]}, "must begin with 'text'"),
        ({"modalities": ["text", "image", "image"]}, "name each modality once"),
        ({"modalities": ["text", "a.b"]}, "modalities: 'a.b' is no name for this"),
        ({"modalities": ["text", "keys"]}, "modalities: 'keys' is no name for this"),
        ({"ffn_experts": ["imag"]}, r"ffn_experts='imag' is unknown.*Did you mean 'image'"),
        ({"token_ids": {"audoi": [3]}}, "token_ids='audoi' is unknown.*Did you mean 'audio'"),
        ({"gate_modalities": ["text"]}, "must name modalities other than text"),
        ({"gate_modalities": []}, "for no gate set gate=False"),
        ({"token_ids": {"image": 90}}, "token_ids=.* must be a dict of strings to a list of integers"),
        ({"token_ids": {"image": []}}, "token_ids=.* has no token for 'image'"),
        ({"token_ids": {"image": [90], "audio": [7, 90]}}, "token 90 stands for 'image' and for 'audio'"),
        ({"token_ids": {"image": [90, 90]}}, "token 90 stands for 'image' and for 'image'"),
        ({"token_ids": {"image": [90.0]}}, "token_ids=.* must be a dict of strings to a list of integers"),
        ({"token_ids": {"image": [True]}}, "token_ids=.* must be a dict of strings to a list of integers"),
        ({"token_ids": {"image": [-1]}}, "-1 is no token id"),
        ({"ffn_experts": ["image", "image"]}, "ffn_experts=.* must name each modality once"),
        ({"gate_modalities": ["image", "image"]}, "gate_modalities=.* must name each modality once"),
        ({"gate_init": "half"}, "gate_init='half' is unknown"),
        ({"attention_adapter": "both"}, "attention_adapter='both' is unknown"),
        ({"stage": "alig"}, "Did you mean 'align'"),
        ({"r": 0}, "`r` should be a positive integer"),
        ({"target_modules": ["v_proj"]}, "say by sites which"),
        ({"r": 4, "rank": 3}, "has no field 'rank'"),
    ],
)
def test_bad_fields_are_refused(fields, message) -> None:
    with pytest.raises(ValueError, match=message):
        PILLConfig(**fields)


def test_tokens_beyond_the_vocabulary_need_something_in_their_place(tiny) -> None:
    with pytest.raises(ValueError, match=r"token_ids=.*\[96\] for 'image' lie beyond the vocabulary of 96 tokens"):
        pill(tiny("llama"), token_ids={"image": [95, 96]})
    pill(tiny("llama"), token_ids={"image": [95]})


def test_method_is_small() -> None:
    files = [Path(inspect.getfile(module)) for module in (folder.config, folder.model, folder)]
    lines = [line for file in files for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    assert len(lines) < 300  # with docstrings, messages and help texts


# --- vision-language models of transformers -----------------------------------------------------------------------

TEXT = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
        "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}  # fmt: skip
VISION = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}


def llava() -> tuple[nn.Module, dict[str, Tensor]]:
    vision = CLIPVisionConfig(**VISION, image_size=16, patch_size=8)
    config = LlavaConfig(vision_config=vision, text_config=LlamaConfig(**TEXT), image_token_id=90)
    ids = torch.randint(5, 90, (2, 10))
    ids[0, 1:5] = ids[1, 4:8] = 90
    return LlavaForConditionalGeneration(config), {"input_ids": ids, "pixel_values": torch.randn(2, 3, 16, 16)}


def qwen2_vl() -> tuple[nn.Module, dict[str, Tensor]]:
    text = {**TEXT, "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}}
    vision = {"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 4, "patch_size": 4, "mlp_ratio": 2}
    tokens = {"image_token_id": 90, "video_token_id": 91, "vision_start_token_id": 92, "vision_end_token_id": 93}
    config = Qwen2VLConfig(text_config=text, vision_config=vision, **tokens)
    ids = torch.randint(5, 90, (2, 10))
    ids[:, 1], ids[:, 2:6] = 92, 90
    pixels = torch.randn(2 * 16, 3 * 2 * 4 * 4)
    inputs = {"input_ids": ids, "pixel_values": pixels, "image_grid_thw": torch.tensor([[1, 4, 4]] * 2)}
    return Qwen2VLForConditionalGeneration(config), {**inputs, "mm_token_type_ids": (ids == 90).long()}


def qwen2_5_vl_with_films() -> tuple[nn.Module, dict[str, Tensor]]:
    """A picture that is wider than high, and a film of two steps in time."""
    text = {**TEXT, "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}}
    vision = {"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 4, "patch_size": 4,
              "out_hidden_size": 32, "window_size": 16, "fullatt_block_indexes": [0]}  # fmt: skip
    tokens = {"image_token_id": 90, "video_token_id": 91, "vision_start_token_id": 92, "vision_end_token_id": 93}
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision, **tokens)
    ids = torch.randint(5, 90, (1, 22))
    ids[0, [1, 10]], ids[0, [8, 19]], ids[0, 2:8], ids[0, 11:19] = 92, 93, 90, 91
    inputs = {
        "input_ids": ids, "mm_token_type_ids": (ids == 90).long() + 2 * (ids == 91),
        "pixel_values": torch.randn(4 * 6, 3 * 2 * 4 * 4), "image_grid_thw": torch.tensor([[1, 4, 6]]),
        "pixel_values_videos": torch.randn(2 * 4 * 4, 3 * 2 * 4 * 4), "video_grid_thw": torch.tensor([[2, 4, 4]]),
        "second_per_grid_ts": torch.tensor([1.0]),
    }  # fmt: skip
    return Qwen2_5_VLForConditionalGeneration(config), inputs


def qwen2_audio() -> tuple[nn.Module, dict[str, Tensor]]:
    """Clips of 40 and 24 frames of features, which are 10 and 6 tokens."""
    sound = {"d_model": 32, "encoder_layers": 1, "encoder_attention_heads": 4, "encoder_ffn_dim": 32,
             "num_mel_bins": 8, "max_source_positions": 20, "model_type": "qwen2_audio_encoder"}  # fmt: skip
    config = Qwen2AudioConfig(text_config={**TEXT, "model_type": "qwen2"}, audio_config=sound, audio_token_index=90)
    ids = torch.randint(5, 90, (2, 16))
    ids[0, 2:12] = ids[1, 4:10] = 90
    frames = torch.arange(40) < torch.tensor([[40], [24]])
    inputs = {"input_ids": ids, "input_features": torch.randn(2, 8, 40), "feature_attention_mask": frames.long()}
    return Qwen2AudioForConditionalGeneration(config), inputs


@pytest.mark.parametrize(
    ("make", "modalities", "projector"),
    [
        (llava, ["image"], "multi_modal_projector"),
        (qwen2_vl, ["image"], "merger"),
        (qwen2_5_vl_with_films, ["image", "video"], "merger"),
        (qwen2_audio, ["audio"], "multi_modal_projector"),
    ],
)
def test_multimodal_model_trains_saves_loads_and_generates(make, modalities, projector, tmp_path) -> None:
    torch.manual_seed(0)
    base, inputs = make()
    with torch.no_grad():
        for parameter in base.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.2)
    again = copy.deepcopy(base)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    expected = base.eval()(**inputs).logits
    fields = {"modalities": ["text", *modalities], "modules_to_save": [projector], "task_type": "CAUSAL_LM"}
    model = get_peft_model(base, PILLConfig(r=4, **fields)).eval()
    config = model.peft_config["default"]
    assert config.gate_init == "one"  # a model that sees already must not go blind
    assert torch.equal(model(**inputs).logits, expected)
    sites = {n.partition(".pill_")[0] for n, _ in model.named_parameters() if ".pill_" in n}
    assert len(sites) == 9
    assert all(".language_model.layers." in site for site in sites)

    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] >= 90, -100)
    losses = []
    for _ in range(8):
        loss = model.train()(**inputs, labels=labels).loss
        loss.backward()
        assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]

    # A placeholder that is generated would ask for one more picture, where the whole text is read again.
    settings = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "suppress_tokens": [90, 91]}
    logits, tokens = model.eval()(**inputs).logits, model.generate(**inputs, **settings)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(again, tmp_path).eval()
    assert torch.equal(loaded(**inputs).logits, logits)
    assert torch.equal(loaded.generate(**inputs, **settings), tokens)
    assert torch.equal(loaded.generate(**inputs, **settings, num_beams=1, use_cache=False), tokens)
    if "input_features" not in inputs:  # which transformers cannot cut
        assert torch.equal(loaded.generate(**inputs, **settings, prefill_chunk_size=4), tokens)
    kinds = (inputs["input_ids"] == 90).long() + 2 * (inputs["input_ids"] == 91)
    assert torch.equal(loaded.generate(**inputs, **settings, modality_ids=kinds), tokens)
    assert not torch.equal(loaded(**inputs, modality_ids=torch.zeros_like(kinds)).logits, logits)
    without = {k: v for k, v in inputs.items() if k in ("input_ids", "attention_mask")}
    without["input_ids"] = without["input_ids"].clamp_max(89)
    assert torch.equal(loaded.generate(**without, **settings), loaded.generate(**without, **settings, use_cache=False))


def test_tokens_of_a_modality_that_the_config_leaves_out_raise() -> None:
    base, inputs = qwen2_vl()  # has a token for videos
    model = pill(base)
    inputs["input_ids"][0, -1] = 91
    del inputs["mm_token_type_ids"]
    with pytest.raises(ValueError, match=r"input_ids=\[91\] \(video\), which are not among modalities"):
        model(**{k: v for k, v in inputs.items() if k == "input_ids"})


# --- learning -----------------------------------------------------------------------------------------------------


def test_t20_an_answer_that_only_the_image_tells_is_learned(tiny) -> None:
    """Two kinds of images behind a frozen random encoder and a frozen random model; chance is one half."""
    generator = torch.Generator().manual_seed(0)
    kinds = torch.randn(2, 3, 16, 16, generator=generator)

    def batch(rows: int) -> tuple[dict[str, Tensor], Tensor]:
        kind = torch.randint(2, (rows,), generator=generator)
        question = torch.randint(5, 30, (rows, 3), generator=generator)
        image = torch.full((rows, 1), images.token_id)
        ids = torch.cat([image, question, torch.full((rows, 1), 3)], 1)
        pixels = kinds[kind] + 0.3 * torch.randn(rows, 3, 16, 16, generator=generator)
        return {"input_ids": ids, "pixel_values": pixels}, kind

    def accuracy(config: dict[str, Any], blind: bool = False) -> float:
        model = get_peft_model(
            base, PILLConfig(r=8, token_ids=images.token_ids, modules_to_save=["projector"], **config)
        )
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        for step in range(61):
            inputs, kind = batch(32 if step < 60 else 200)
            if blind:
                inputs = {"input_ids": inputs["input_ids"][:, 1:]}
            logits = model(**inputs).logits[:, -1, 40:42]
            loss = F.cross_entropy(logits, kind)
            if step < 60:
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
        model.unload()
        return (logits.argmax(-1) == kind).float().mean().item()

    base, images = with_images(tiny("llama", num_hidden_layers=2), grid=1)
    assert accuracy({"gate_init": "one"}) > 0.95
    assert accuracy({"gate": False}) > 0.95
    assert accuracy({"gate_init": "zero"}) > 0.9
    assert accuracy({"gate": False}, blind=True) < 0.65


@pytest.mark.parametrize("init", ["one", "zero"])
def test_t20_what_only_the_values_of_an_image_tell_is_learned(tiny, init) -> None:
    """Without experts, and where all keys are alike, nothing else brings the image to the answer."""
    generator = torch.Generator().manual_seed(0)
    base, images = with_images(tiny("llama", num_hidden_layers=1), grid=1)
    with torch.no_grad():
        base.model.layers[0].self_attn.k_proj.weight.zero_()
    model = get_peft_model(base, PILLConfig(
        r=8, token_ids=images.token_ids, modules_to_save=["projector"], gate_init=init, attention_adapter="none",
        ffn_experts=[],
    ))  # fmt: skip
    kinds, values = torch.randn(2, 3, 16, 16, generator=generator), values_of(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    opened = []
    for step in range(61):
        kind = torch.randint(2, (32 if step < 60 else 200,), generator=generator)
        question = torch.randint(5, 30, (len(kind), 4), generator=generator)
        ids = torch.cat([torch.full((len(kind), 1), images.token_id), question], 1)
        logits = model(input_ids=ids, pixel_values=kinds[kind]).logits[:, -1, 40:42]
        opened.append(values[-1][:, 0].detach().abs().mean())  # of the images
        if step < 60:
            F.cross_entropy(logits, kind).backward()
            optimizer.step()
            optimizer.zero_grad()
    assert (logits.argmax(-1) == kind).float().mean() > 0.95
    # Zero erases images at the start and opens for what helps; of text no value has been touched.
    assert (opened[0] == 0) == (init == "zero")
    assert opened[-1] > 0
    with model.disable_adapter():
        model(input_ids=ids, pixel_values=kinds[kind])
    plain, gated = values[-1], values[-2]
    assert torch.equal(gated[:, 1:], plain[:, 1:])


def test_gate_zero_starves_the_projector_at_the_start() -> None:
    """Values of images are erased, so that only their keys tell the projector anything."""
    ids = torch.randint(5, 90, (2, 8))
    ids[:, 1] = 96
    labels = ids.index_fill(1, torch.arange(3), -100)  # the image predicts no label
    sizes = {}
    for init in ("zero", "one"):
        torch.manual_seed(0)
        base, images = with_images(LlamaForCausalLM(LlamaConfig(**TEXT)), grid=1)
        model = pill(base, random=False, token_ids=images.token_ids, gate_init=init, modules_to_save=["projector"])
        model.train()(input_ids=ids, pixel_values=torch.ones(2, 3, 16, 16), labels=labels).loss.backward()
        sizes[init] = gradients(model)["base_model.model.images.projector.modules_to_save.default.weight"].norm()
    assert 0 < sizes["zero"] < 0.1 * sizes["one"]


def test_caches_of_other_methods_are_not_checked(tiny, tiny_inputs) -> None:
    model = get_peft_model(tiny("llama"), MixDAConfig(domains=["a"], r=4)).eval()
    cache = model(**tiny_inputs("llama"), use_cache=True).past_key_values
    with model.disable_adapter():
        model(input_ids=torch.tensor([[7], [7]]), past_key_values=cache)
