"""Images for models of text: any encoder, placeholders, normalisation, and batches that keep images whole."""

from __future__ import annotations

import copy
import importlib
import json
import shutil
import warnings
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from peft import PeftModel, get_peft_model
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import CLIPImageProcessorPil, PreTrainedTokenizerFast

from mixadapters import PILLConfig
from mixadapters.tuners.pill import ImageInputs, ImageTextCollator
from mixadapters.tuners.pill.inputs import warn_of_projector

transformers.logging.set_verbosity_error()
pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning:transformers"),
    pytest.mark.filterwarnings("ignore::UserWarning:peft"),
]
SMALL = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
         "image_size": 16, "patch_size": 4}  # fmt: skip
ENCODERS = {  # kind -> tokens before the patches
    "CLIPVisionConfig": 1,
    "SiglipVisionConfig": 0,
    "ViTConfig": 1,
    "Dinov2Config": 1,
    "Dinov2WithRegistersConfig": 5,
}


def encoder(kind: str = "CLIPVisionConfig") -> nn.Module:
    torch.manual_seed(0)
    return transformers.AutoModel.from_config(getattr(transformers, kind)(**SMALL)).eval()


def attached(tiny: Any, kind: str = "CLIPVisionConfig", **options: Any) -> tuple[nn.Module, ImageInputs]:
    base = tiny("llama")
    return base, ImageInputs.attach(base, encoder(kind), **options)


def prompt(images: ImageInputs, *counts: int, length: int | None = None) -> Tensor:
    """(B, T) ids with so many images in each row, and words between them."""
    n, rows = images.tokens_per_image, []
    for count in counts:
        row = [7]
        for i in range(count):
            row += [images.token_id] * n + [8 + i]
        rows.append(row)
    width = length or max(map(len, rows))
    return torch.tensor([row + [9] * (width - len(row)) for row in rows])


# --- the encoder and the projector --------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("kind", ENCODERS)
def test_patches_of_any_encoder_become_tokens(tiny, kind) -> None:
    pixels = torch.randn(3, 3, 16, 16)
    _, images = attached(tiny, kind)
    assert images.tokens_per_image == 16
    states = encoder(kind)(pixel_values=pixels).last_hidden_state
    assert states.shape[1] == 16 + ENCODERS[kind]
    torch.testing.assert_close(images.encode(pixels), states[:, ENCODERS[kind] :])
    _, pooled = attached(tiny, kind, grid=2)
    corner = states[:, ENCODERS[kind] :].unflatten(1, (4, 4))[:, 2:, :2].mean((1, 2))  # lower left
    torch.testing.assert_close(pooled.encode(pixels)[:, 2], corner)
    _, deep = attached(tiny, kind, layer=-2)
    hidden = encoder(kind)(pixel_values=pixels, output_hidden_states=True).hidden_states[-2]
    torch.testing.assert_close(deep.encode(pixels), hidden[:, ENCODERS[kind] :])


@torch.no_grad()
def test_images_stand_where_their_placeholders_are(tiny) -> None:
    base, images = attached(tiny, grid=1)
    pixels = torch.randn(3, 3, 16, 16)
    ids = prompt(images, 1, 0, 2)
    embeddings = images.embed(ids, pixels)
    tokens = images.projector(images.encode(pixels))
    table = base.get_input_embeddings()
    expected = table(ids.clamp_max(95))
    expected[0, 1], expected[2, 1], expected[2, 3] = tokens[0, 0], tokens[1, 0], tokens[2, 0]
    torch.testing.assert_close(embeddings, expected)
    plain = tiny("llama")
    torch.testing.assert_close(base(input_ids=ids, pixel_values=pixels).logits, plain(inputs_embeds=expected).logits)
    torch.testing.assert_close(base(ids, pixel_values=pixels).logits, plain(inputs_embeds=expected).logits)
    text = prompt(images, 0, 0, length=4)
    assert torch.equal(base(input_ids=text).logits, plain(input_ids=text).logits)


@torch.no_grad()
def test_each_row_is_as_alone_with_any_number_of_images(tiny) -> None:
    base, images = attached(tiny, grid=2)
    model = get_peft_model(
        base, PILLConfig(r=4, token_ids=images.token_ids, init_weights=False, modules_to_save=["projector"])
    ).eval()
    pixels = torch.randn(4, 3, 16, 16)
    ids = prompt(images, 3, 0, 1)
    together = model(input_ids=ids, pixel_values=pixels).logits
    for row, (start, end) in enumerate(((0, 3), (3, 3), (3, 4))):
        own = {"pixel_values": pixels[start:end]} if end > start else {}
        torch.testing.assert_close(model(input_ids=ids[row : row + 1], **own).logits[0], together[row])


def test_encoder_sees_real_images_only_and_stays_frozen(tiny, monkeypatch) -> None:
    base, images = attached(tiny, grid=1)
    keys = set(tiny("llama").state_dict())
    assert set(base.state_dict()) - keys == {"images.projector.weight"}
    assert not any(p.requires_grad for p in images.encoder.parameters())
    seen: list[int] = []
    images.encoder.register_forward_hook(
        lambda m, args, kwargs, out: seen.append(kwargs["pixel_values"].shape[0]), with_kwargs=True
    )
    base.train()
    assert not images.encoder.training
    base(input_ids=prompt(images, 1, 0, 1), pixel_values=torch.randn(2, 3, 16, 16))
    output = base(input_ids=prompt(images, 0, 0)).logits
    assert seen == [2]
    output.sum().backward()
    assert (images.projector.weight.grad == 0).all()  # not None
    base.double()
    assert next(images.encoder.parameters()).dtype == torch.float64


@torch.no_grad()
def test_batches_that_do_not_fit_are_refused(tiny) -> None:
    base, images = attached(tiny, grid=2)
    pixels = torch.randn(2, 3, 16, 16)
    ids = prompt(images, 1, 1)
    base(input_ids=ids, pixel_values=pixels)
    for wrong, given in ((ids, pixels[:1]), (ids[:, :4], pixels), (prompt(images, 2, 1), pixels), (ids, None)):
        with pytest.raises(ValueError, match=r"placeholders .* do not fit"):
            base(input_ids=wrong, pixel_values=given)
    for wrong in ((2, 3, 8, 8), (2, 1, 16, 16), (3, 16, 16), (2, 1, 3, 16, 16)):
        with pytest.raises(ValueError, match="with 3 channels and 16 x 16; use the encoder's own image processor"):
            base(input_ids=ids, pixel_values=torch.randn(*wrong))
    with pytest.raises(ValueError, match=r"pixel_values are torch\.uint8, not what .* give what its own"):
        base(input_ids=ids, pixel_values=torch.zeros(2, 3, 16, 16, dtype=torch.uint8))
    with pytest.raises(ValueError, match="pixel_values need input_ids"):
        base(inputs_embeds=torch.randn(2, 6, 32), pixel_values=pixels)
    with pytest.raises(ValueError, match="has a module 'images' already"):
        ImageInputs.attach(base, encoder())
    with pytest.raises(ValueError, match=r"has adapters already.*attach ImageInputs to the base model, before"):
        ImageInputs.attach(get_peft_model(tiny("llama"), PILLConfig(r=4, token_ids={"image": [5]})), encoder())
    with pytest.raises(ValueError, match="is no vision encoder"):
        ImageInputs.attach(tiny("llama"), tiny("bert"))
    for options, message in (
        ({"grid": 5}, "grid=5 must be an integer, at least 1, at most 4"),
        ({"grid": 1.5}, "grid=1.5 must be"),
        ({"token_id": -1}, "token_id=-1 must be an integer, at least 0"),
        ({"token_id": True}, "token_id=True must be"),
        ({"layer": 9}, "layer=9 must be an integer, at least -"),
    ):
        with pytest.raises(ValueError, match=message):
            ImageInputs.attach(tiny("llama"), encoder(), **options)


def test_images_at_a_token_that_the_config_does_not_name_are_refused(tiny, tmp_path) -> None:
    base, images = attached(tiny, grid=1)
    config = PILLConfig(r=4, token_ids=images.token_ids, task_type="CAUSAL_LM", modules_to_save=["projector"])
    get_peft_model(base, config).save_pretrained(tmp_path)
    other, _ = attached(tiny, grid=1, token_id=97)
    message = r"ImageInputs puts images at token 97, and token_ids=\{'image': \[96\]\} .*attach it with token_id=96"
    with pytest.raises(ValueError, match=message):
        PeftModel.from_pretrained(other, tmp_path)
    with pytest.raises(ValueError, match=message):
        get_peft_model(other, PILLConfig(r=4, token_ids=images.token_ids))
    PeftModel.from_pretrained(attached(tiny, grid=1)[0], tmp_path)


@pytest.mark.parametrize("option", [{"grid": 2}, {"layer": 0}])
def test_images_come_in_as_the_adapter_was_trained_with_them(option, tiny, tmp_path) -> None:
    def adapted(**given: Any) -> Any:
        base, images = attached(tiny, **{"grid": 1, **given})
        return get_peft_model(base, PILLConfig(r=4, token_ids=images.token_ids, modules_to_save=["projector"]))

    adapted().save_pretrained(tmp_path / "now")
    message = r"trained with images of layer=-1, tokens=1, and here ImageInputs has layer="
    with pytest.raises(ValueError, match=message):
        PeftModel.from_pretrained(attached(tiny, **{"grid": 1, **option})[0], tmp_path / "now")
    with pytest.raises(ValueError, match="front_ends="):
        adapted(**option).load_adapter(tmp_path / "now", "default")

    config = json.loads((tmp_path / "now" / "adapter_config.json").read_text())
    assert config.pop("front_ends") == {"image": {"tokens": 1, "layer": -1}}
    shutil.copytree(tmp_path / "now", tmp_path / "old")  # earlier files say nothing of it
    (tmp_path / "old" / "adapter_config.json").write_text(json.dumps(config))
    PeftModel.from_pretrained(attached(tiny, **{"grid": 1, **option})[0], tmp_path / "old")
    adapted().load_adapter(tmp_path / "old", "default")


def test_a_base_without_what_the_adapter_saw_by_is_told_what_to_attach(tiny, tmp_path) -> None:
    base, images = attached(tiny, grid=1)
    fields = {"r": 4, "token_ids": images.token_ids, "modules_to_save": ["projector"], "task_type": "CAUSAL_LM"}
    get_peft_model(base, PILLConfig(**fields)).save_pretrained(tmp_path)
    message = r"no module 'projector'.*before it is put in: ImageInputs\.attach\(model, encoder, token_id=96\)"
    with pytest.raises(ValueError, match=message):
        PeftModel.from_pretrained(tiny("llama"), tmp_path)
    with pytest.raises(ValueError, match=message):
        get_peft_model(tiny("llama"), PILLConfig(**fields))


def test_a_projector_that_is_neither_trained_nor_saved_is_warned_of(tiny) -> None:
    base, images = attached(tiny, grid=1)
    with pytest.warns(UserWarning, match=r"neither trained nor saved.*modules_to_save=\['projector'\]"):
        get_peft_model(base, PILLConfig(r=4, token_ids=images.token_ids, task_type="CAUSAL_LM"))
    base, images = attached(tiny, grid=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        for saved in ("projector", "image_inputs.projector"):
            warn_of_projector(base, [saved])


@torch.no_grad()
def test_generation_from_images_is_that_from_their_embeddings(tiny) -> None:
    base, images = attached(tiny, grid=2)
    config = PILLConfig(
        r=4, token_ids=images.token_ids, init_weights=False, task_type="CAUSAL_LM", modules_to_save=["projector"]
    )
    model = get_peft_model(base, config).eval()
    ids, pixels = prompt(images, 1, 0), torch.randn(1, 3, 16, 16)
    mask = torch.ones_like(ids)
    inputs = images.inputs(ids, pixels, attention_mask=mask)
    settings = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    tokens = model.generate(**inputs, **settings)
    whole = torch.cat([ids, tokens], 1)
    by_hand = model(input_ids=whole[:, :-1], pixel_values=pixels).logits[:, ids.shape[1] - 1 :].argmax(-1)
    assert torch.equal(tokens, by_hand)
    beams = model.generate(**inputs, **settings, num_beams=3)
    assert torch.equal(beams, model.generate(**inputs, **settings, num_beams=3, use_cache=False))


def test_copies_of_a_model_have_images_of_their_own(tiny) -> None:
    base, images = attached(tiny, grid=1)
    other = copy.deepcopy(base)
    with torch.no_grad():
        other.images.projector.weight.zero_()
        other.get_input_embeddings().weight.zero_()
    ids, pixels = prompt(images, 1), torch.randn(1, 3, 16, 16)
    assert images.embed(ids, pixels).any(-1).all()
    assert not other.images.embed(ids, pixels).any()


# --- batches ------------------------------------------------------------------------------------------------------

WORDS = ["<pad>", "<s>", "</s>", "<unk>", "what", "is", "it", "?", "a", "cat", "dog", "and", "one", "two", "three"]


def tokenizer(**options: Any) -> PreTrainedTokenizerFast:
    raw = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    names = dict(zip(("pad_token", "bos_token", "eos_token", "unk_token"), WORDS, strict=False))
    return PreTrainedTokenizerFast(tokenizer_object=raw, **names, **options)


def picture(seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (20, 12, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def processor() -> CLIPImageProcessorPil:
    return CLIPImageProcessorPil(size={"height": 16, "width": 16}, do_center_crop=False)


def collator(**options: Any) -> ImageTextCollator:
    fields = {"token_id": 99, "tokens_per_image": 4, **options}
    return ImageTextCollator(fields.pop("tokenizer", None) or tokenizer(), processor(), **fields)


def words(ids: Tensor) -> list[str]:
    return [WORDS[i] if i < len(WORDS) else "#" for i in ids.tolist()]


def test_batch_of_prompts_answers_and_images() -> None:
    rows = [
        {"prompt": "<image> what is it ?", "answer": "a cat", "images": [picture()]},
        {"prompt": "one <image> and <image> ?", "answer": "dog", "images": [picture(1), picture(2)]},
        {"prompt": "what ?", "answer": "two"},
    ]
    batch = collator()(rows)
    assert words(batch["input_ids"][0][:11]) == [*"####", "what", "is", "it", "?", "a", "cat", "</s>"]
    assert words(batch["input_ids"][1]) == ["one", *"####", "and", *"####", "?", "dog", "</s>"]
    assert batch["attention_mask"].sum(1).tolist() == [11, 13, 4]
    own = batch["labels"] != -100
    assert [words(ids[kept]) for ids, kept in zip(batch["labels"], own, strict=True)] == [
        ["a", "cat", "</s>"],
        ["dog", "</s>"],
        ["two", "</s>"],
    ]
    assert torch.equal(batch["labels"][own], batch["input_ids"][own])
    assert batch["pixel_values"].shape == (3, 3, 16, 16)
    left = collator(tokenizer=tokenizer(padding_side="left"))([{k: r[k] for k in r if k != "answer"} for r in rows])
    assert "labels" not in left
    assert words(left["input_ids"][2])[-2:] == ["what", "?"]
    assert left["attention_mask"][2].tolist() == [0] * 9 + [1, 1]
    assert "pixel_values" not in collator()(rows[2:])


def test_no_row_ends_inside_an_image(tiny) -> None:
    base, images = attached(tiny, grid=2)
    ids = torch.full((2, 6), images.token_id)
    ids[1, 2:] = 7
    with pytest.raises(ValueError, match=r"rows with \[6, 2\] placeholders .* do not fit 2 images of 4 tokens"):
        base(input_ids=ids, pixel_values=torch.randn(2, 3, 16, 16))


def test_a_row_begins_once_as_its_tokenizer_begins() -> None:
    begins = tokenizer()
    begins._tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    batch = collator(tokenizer=begins)([{"prompt": "one <image> ?", "answer": "a cat", "images": [picture()]}])
    assert words(batch["input_ids"][0]) == ["<s>", "one", *"####", "?", "a", "cat", "</s>"]


def test_images_are_normalised_as_their_encoder_expects() -> None:
    pixels = collator()([{"prompt": "<image>", "images": [picture()]}])["pixel_values"][0]
    resized = picture().resize((16, 16), Image.Resampling.BICUBIC)
    raw = torch.from_numpy(np.asarray(resized).copy()).permute(2, 0, 1) / 255
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (processor().image_mean, processor().image_std))
    torch.testing.assert_close(pixels, (raw - mean) / std, atol=1e-2, rtol=0)
    imagenet = (raw - torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)) / torch.tensor([0.229, 0.224, 0.225]).view(
        3, 1, 1
    )
    assert (pixels - imagenet).abs().max() > 0.05


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("length", range(4, 16))
def test_t18_an_image_is_whole_or_left_out_with_its_pixels(tiny, side, length) -> None:
    row = {"prompt": "one <image> two <image> ?", "images": [picture(1), picture(2)]}
    batch = collator(tokenizer=tokenizer(truncation_side=side), max_length=length)([row])
    tokens = words(batch["input_ids"][0])
    assert len(tokens) <= length
    whole = ["one", *"####", "two", *"####", "?"]
    assert tokens == (whole[: len(tokens)] if side == "right" else whole[len(whole) - len(tokens) :])
    kept = tokens.count("#") // 4
    assert tokens.count("#") % 4 == 0
    assert batch.get("pixel_values", torch.empty(0)).shape[0] == kept
    if kept == 1:
        first_or_last = picture(1 if side == "right" else 2)
        expected = processor()(images=[first_or_last], return_tensors="pt")["pixel_values"]
        assert torch.equal(batch["pixel_values"], expected)
    base, _ = attached(tiny, grid=2, token_id=99)
    base(**{name: value for name, value in batch.items() if name != "attention_mask"})


def test_t18_a_row_without_its_answer_is_refused() -> None:
    row = {"prompt": "one <image> two ?", "answer": "a cat", "images": [picture()]}
    assert words(collator(max_length=9)([row])["input_ids"][0])[-2:] == ["a", "cat"]
    with pytest.raises(ValueError, match="no token of answer='a cat' is left within max_length=7"):
        collator(max_length=7)([row])


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "what ?", "images": [0]}, "has 0 markers '<image>' for 1 images"),
        ({"prompt": "<image> <image>", "images": [0]}, "has 2 markers '<image>' for 1 images"),
        ({"prompt": "<image> ?"}, "has 1 markers '<image>' for 0 images"),
    ],
)
def test_markers_and_images_that_do_not_match_are_refused(row, message) -> None:
    with pytest.raises(ValueError, match=message):
        collator()([row])


GOOD = {"prompt": "what ?", "answer": "a cat"}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"answer": "a cat"}, r"row 1 .*columns \['answer'\] has prompt=None.*remove_unused_columns=False"),
        ({"prompt": ["what"]}, r"row 1 .*prompt=\['what'\], not a string"),
        ({"prompt": "what", "answer": 1}, "row 1 .*answer=1, not a string"),
        ({"prompt": "what \ud83d ?"}, r"row 1 .*half of a surrogate pair at character 5"),
        ({"prompt": "<image>", "images": picture()}, r"row 1 .*images=.*give a list, of one image too: \[image\]"),
        ({"prompt": "<image>", "images": np.zeros((1, 8, 8, 3))}, "(?s)row 1 .*, of type ndarray; give a list"),
        ({"prompt": "<image>", "images": "cat.png"}, "row 1 .*images='cat.png', of type str; give a list"),
        ({"prompt": "<image>", "images": [None]}, "row 1 .*with None in it"),
        ({"prompt": "<image>", "images": [3]}, "row 1 .*has an image that CLIPImageProcessorPil does not take, 3"),
        ({"prompt": "<image>", "images": [{"path": "a"}]}, "row 1 .*does not take.*convert"),
        ({"prompt": ""}, "row 1 .*no token of prompt='' is left"),
        (["what ?"], r"row 1 of the batch is \['what \?'\], a list; a row maps columns"),
        ("what ?", "row 1 of the batch is 'what .'"),
    ],
)
def test_a_bad_row_is_named_with_its_column_and_a_remedy(row, message) -> None:
    with pytest.raises(ValueError, match=message):
        collator()([GOOD, row])


def test_an_image_of_values_that_are_no_numbers_is_named() -> None:
    class Plain:
        def __call__(self, images: list[np.ndarray], return_tensors: str) -> dict[str, Tensor]:
            return {"pixel_values": torch.stack([torch.as_tensor(image) for image in images])}

    images, row = collator(), {"prompt": "<image> ?", "answer": "a cat"}
    images.image_processor = Plain()
    good, broken = np.zeros((3, 4, 4), dtype=np.float32), np.full((3, 4, 4), np.nan, dtype=np.float32)
    assert images([{**row, "images": [good]}])["pixel_values"].shape == (1, 3, 4, 4)
    with pytest.raises(ValueError, match="row 1 of the batch has an image with values that are NaN or infinite"):
        images([{**row, "images": [good]}, {**row, "images": [broken]}])


def test_a_processor_may_give_other_arrays_than_tensors() -> None:
    images = collator()
    images.image_processor = lambda images, return_tensors: {"pixel_values": np.stack(images)}
    row = {"prompt": "<image> ?", "answer": "a cat", "images": [np.zeros((3, 4, 4), dtype=np.float32)]}
    assert images([row])["pixel_values"].shape == (1, 3, 4, 4)


def test_a_batch_without_rows_is_refused() -> None:
    with pytest.raises(ValueError, match="has no rows"):
        collator()([])


def test_columns_that_a_dataset_fills_with_none_count_as_absent() -> None:
    rows = [{"prompt": "what ?", "answer": None, "images": None}, {"prompt": "one ?", "answer": None}]
    assert "labels" not in collator()(rows)
    assert collator()(rows)["attention_mask"].sum(1).tolist() == [2, 2]


def test_an_image_needs_a_processor() -> None:
    images = collator()
    images.image_processor = None
    assert "pixel_values" not in images([GOOD])
    with pytest.raises(ValueError, match="row 0 of the batch has an image, but image_processor=None"):
        images([{"prompt": "<image>", "images": [picture()]}])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_length": 0}, "max_length=0 must be an integer, at least 1"),
        ({"max_length": 8.5}, "max_length=8.5 must be an integer"),
        ({"tokens_per_image": 0}, "tokens_per_image=0 must be an integer, at least 1"),
        ({"tokens_per_image": True}, "tokens_per_image=True must be an integer"),
        ({"token_id": -1}, "token_id=-1 must be an integer, at least 0"),
        ({"marker": ""}, "marker='' must be a text"),
    ],
)
def test_settings_of_the_collator_are_checked(options, message) -> None:
    with pytest.raises(ValueError, match=message):
        collator(**options)


def test_a_tokenizer_without_padding_is_refused() -> None:
    without = tokenizer()
    without.pad_token = None
    with pytest.raises(ValueError, match="has no pad_token"):
        collator(tokenizer=without)


def test_scripts_that_import_from_the_former_place_go_on() -> None:
    former = importlib.import_module("mixadapters.training.images")
    assert former.ImageInputs is ImageInputs
    assert former.ImageTextCollator is ImageTextCollator
