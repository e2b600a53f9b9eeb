"""Negative prompts in one pass: adapters that read what the second pass is conditioned on."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from mixadapters import AGDConfig
from mixadapters.tuners.agd import OnePass, TrajectoryCollator, record_pipeline
from mixadapters.tuners.agd.layer import Trunk

diffusers = pytest.importorskip("diffusers")
from tiny_pipelines import PIPELINES, Passes, dit, draw, guided, stable_diffusion, stable_diffusion_xl  # noqa: E402

pytestmark = [pytest.mark.filterwarnings("ignore::UserWarning:peft"), pytest.mark.filterwarnings("ignore:.*torchao.*")]
KINDS = ("film", "cross_attention", "offset")
WITH_NEGATIVES = [name for name in PIPELINES if name not in ("dit", "sd2", "sd3.5", "pixart alpha")]


def trunk_of(model: nn.Module) -> Trunk:
    return next(module for module in model.modules() if isinstance(module, Trunk))


def second_conditions(model: nn.Module) -> list[dict[str, Tensor]]:
    """What the trunk is told of the second pass, in the forwards to come."""
    seen: list[dict[str, Tensor]] = []
    trunk_of(model).register_forward_pre_hook(lambda module, args: seen.append(args[2]))
    return seen


@pytest.mark.parametrize("name", WITH_NEGATIVES)
def test_adapters_are_told_what_the_second_pass_of_the_pipeline_reads(name, tmp_path) -> None:
    pipe = PIPELINES[name](tmp_path / "words")
    model = guided(pipe, negative="distil")
    calls: list[dict[str, Any]] = []
    handle = model.get_base_model().register_forward_pre_hook(
        lambda module, args, kwargs: calls.append(kwargs), with_kwargs=True
    )
    options = {"negative_prompt": ["bad", "dab"], "guidance_scale": 4.0}
    with model.disable_adapter():
        draw(pipe, **options)
    handle.remove()
    seen, passes = second_conditions(model), Passes(model.get_base_model())
    with OnePass(pipe):
        found = draw(pipe, **options)
        assert passes.rows == [2] * 3
        usual = draw(pipe, guidance_scale=4.0)
        assert torch.equal(draw(pipe, **options), found)
    assert not torch.equal(found, usual)
    call = nested_get(calls[1 if name == "wan" else 0])  # Wan's passes are two calls; elsewhere the second comes first
    conditions = model.peft_config["default"].conditions
    expected = {what: call(path) for what, path in conditions.items() if what != "timestep"}
    assert set(seen[0]) == {what for what, value in expected.items() if value is not None} >= {"prompt"}
    for what, value in seen[0].items():
        torch.testing.assert_close(value, expected[what][:2].to(value.dtype))


def nested_get(arguments: dict[str, Any]) -> Any:
    """path "a.b" -> entry b of the argument a; None where there is none."""

    def get(path: str) -> Any:
        found: Any = arguments
        for part in path.split("."):
            found = None if found is None else found.get(part)
        return found

    return get


def test_embeddings_of_the_call_count_and_go_to_each_picture(tmp_path) -> None:
    pipe = stable_diffusion_xl(tmp_path / "words")
    model = guided(pipe, negative="distil")
    words, _, pooled, _ = pipe.encode_prompt(["bad", "dab"], do_classifier_free_guidance=False)
    given = {"negative_prompt_embeds": words, "negative_pooled_prompt_embeds": pooled}
    seen = second_conditions(model)
    with OnePass(pipe, [2.0, 4.0]):
        by_words = draw(pipe, negative_prompt=["bad", "dab"], num_images_per_prompt=2)
        by_embeddings = draw(pipe, num_images_per_prompt=2, **given)
        assert torch.equal(by_words, by_embeddings)
        draw(pipe)
    assert torch.equal(seen[0]["prompt"], words.repeat_interleave(2, 0))
    assert torch.equal(seen[0]["pooled"], pooled.repeat_interleave(2, 0))
    assert not seen[-1]["prompt"].any()  # without a negative prompt this pipeline has zeros


def test_what_is_no_prompt_is_refused_as_before(tmp_path) -> None:
    pipe = stable_diffusion_xl(tmp_path / "words")
    guided(pipe, negative="distil")
    with OnePass(pipe, 4.0), pytest.raises(ValueError, match=r"^\['guidance_rescale'\] would do nothing"):
        draw(pipe, negative_prompt=["bad", "dab"], guidance_rescale=0.5)
    with OnePass(pipe, 4.0), pytest.raises(ValueError, match=r"^\['negative_original_size'\] would do nothing"):
        draw(pipe, negative_original_size=(4, 4))


def test_call_that_contradicts_itself_or_says_nothing_is_refused_as_by_the_pipeline(tmp_path) -> None:
    pipe = stable_diffusion(tmp_path / "words")
    guided(pipe, negative="distil")
    embeddings = torch.zeros(2, 12, 8)
    with OnePass(pipe, 4.0):
        with pytest.raises(ValueError, match="negative_prompt and negative_prompt_embeds are given; give one of them"):
            draw(pipe, negative_prompt=["bad", "dab"], negative_prompt_embeds=embeddings)
        with pytest.raises(ValueError, match="Provide either `prompt` or `prompt_embeds`"):
            pipe(num_inference_steps=2)


def test_scale_of_a_lora_reaches_the_encoder_of_negative_prompts(tmp_path, monkeypatch) -> None:
    pipe = stable_diffusion(tmp_path / "words")
    guided(pipe, negative="distil")
    scales, plain = [], pipe.encode_prompt

    def encode(prompt: Any, *args: Any, lora_scale: float | None = None, **options: Any) -> Any:
        scales.append(lora_scale)
        return plain(prompt, *args, **options)

    encode.__signature__ = inspect.signature(plain)  # type: ignore[attr-defined]
    monkeypatch.setattr(pipe, "encode_prompt", encode)
    with OnePass(pipe, 4.0):
        draw(pipe, negative_prompt=["bad", "dab"], cross_attention_kwargs={"scale": 0.5})
    assert scales == [0.5, 0.5]


def test_beside_adapters_that_do_not_read_them_negative_prompts_are_refused(tmp_path) -> None:
    pipe = stable_diffusion(tmp_path / "words")
    model = guided(pipe, negative="distil")
    model.add_adapter("fixed", AGDConfig(r=6, max_scale=6.0))
    model.base_model.set_adapter(["default", "fixed"])
    with OnePass(pipe, 4.0):
        draw(pipe)
        with pytest.raises(ValueError, match=r"\['negative_prompt'\] would do nothing"):
            draw(pipe, negative_prompt=["bad", "dab"])


def test_pipeline_by_classes_is_guided_against_none(tmp_path) -> None:
    pipe = dit(tmp_path)
    seen = second_conditions(guided(pipe, negative="distil"))
    with OnePass(pipe, 4.0):
        draw(pipe)
    assert seen[0]["class"].tolist() == [1000, 1000]


def test_unknown_pipeline_and_guider_of_modular_ones_say_what_to_do(tmp_path) -> None:
    from mixadapters.tuners.agd import AdapterGuidance

    pipe = stable_diffusion(tmp_path / "words")
    guided(pipe, negative="distil")
    with pytest.raises(ValueError, match="of which a guider is not told; use the pipeline that is not modular"):
        AdapterGuidance(4.0).prepare_models(pipe.unet)
    pipe.unet.__class__ = type("Another", (type(pipe.unet),), {})
    with OnePass(pipe, 4.0), pytest.raises(ValueError, match="encodes them for a Another is not known"):
        draw(pipe)


# --- the model ----------------------------------------------------------------------------------------------------


def inputs(rows: int = 3) -> dict[str, Any]:
    g = torch.Generator().manual_seed(0)
    return {
        "sample": torch.randn(rows, 4, 8, 8, generator=g),
        "timestep": torch.full((rows,), 37),
        "encoder_hidden_states": torch.randn(rows, 5, 8, generator=g),
    }


def negatives(rows: int = 3, length: int = 7, seed: int = 1) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return {"encoder_hidden_states": torch.randn(rows, length, 8, generator=g)}


@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_guided_each_against_its_own(kind, tmp_path) -> None:
    model = guided(stable_diffusion(tmp_path / "words"), negative="distil", kind=kind)
    x, null = inputs(), negatives()
    with torch.no_grad():
        together = model(**x, guidance_scale=4.0, unconditional=null).sample
        for row in range(3):
            alone = model(
                **{name: value[row : row + 1] for name, value in x.items()}, guidance_scale=4.0,
                unconditional={name: value[row : row + 1] for name, value in null.items()},
            ).sample  # fmt: skip
            torch.testing.assert_close(together[row], alone[0], atol=2e-5, rtol=2e-5)
        first = {"encoder_hidden_states": null["encoder_hidden_states"][:1]}
        shared = model(**x, guidance_scale=4.0, unconditional=first).sample
        torch.testing.assert_close(shared[0], together[0], atol=2e-5, rtol=2e-5)
        assert (shared[1] - together[1]).abs().max() > 1e-4
        base = model(**x).sample  # without a scale nobody asks for the second pass
        assert torch.equal(model(**x, guidance_scale=1.0, unconditional=null).sample, base)


def test_the_two_conditions_have_embeddings_of_their_own(tmp_path) -> None:
    """Guiding from a to b is not guiding from b to a."""
    model = guided(stable_diffusion(tmp_path / "words"), negative="distil")
    seen: list[Any] = []
    trunk_of(model).register_forward_hook(lambda module, args, features: seen.append(features.summary))
    x, null = inputs(), negatives(length=5)
    with torch.no_grad():
        model(**x, guidance_scale=4.0, unconditional=null)
        model(**{**x, **null}, guidance_scale=4.0, unconditional={"encoder_hidden_states": x["encoder_hidden_states"]})
    assert (seen[0] - seen[1]).abs().max() > 1e-3


def test_padding_of_the_first_prompt_is_none_of_the_second(tmp_path) -> None:
    model = guided(stable_diffusion(tmp_path / "words"), negative="distil")
    seen = second_conditions(model)
    mask = torch.tensor([[1, 1, 1, 0, 0]]).expand(3, -1)
    with torch.no_grad():
        model(**inputs(), encoder_attention_mask=mask, guidance_scale=4.0, unconditional=negatives())
        both = {**negatives(), "encoder_attention_mask": torch.ones(3, 7)}
        model(**inputs(), encoder_attention_mask=mask, guidance_scale=4.0, unconditional=both)
    assert ["prompt_mask" in one for one in seen] == [False, True]


def test_adapters_that_read_them_are_saved_and_loaded(tmp_path) -> None:
    model = guided(stable_diffusion(tmp_path / "words"), negative="distil")
    model.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(stable_diffusion(tmp_path / "words").unet, tmp_path / "adapter").eval()
    assert again.peft_config["default"].negative == "distil"
    for each in (model, again):
        each.eval()
    with torch.no_grad():
        ours, theirs = (m(**inputs(), guidance_scale=3.0, unconditional=negatives()).sample for m in (model, again))
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    ("unconditional", "message"),
    [
        (None, r"give `unconditional`, a dict with one or several of \['encoder_hidden_states'\]"),
        (torch.ones(3, 5, 8), "give `unconditional`, a dict"),
        ({"timestep": torch.ones(3)}, "give `unconditional`, a dict"),
        ({"encoder_hidden_states": torch.ones(2, 5, 8)}, "Length of `unconditional of prompt` should be the same"),
        (
            {"encoder_hidden_states": torch.ones(3, 5, 9)},
            r"unconditional of prompt has the shape \(3, 5, 9\), and that of the first pass \(3, 5, 8\)",
        ),
        ({"encoder_hidden_states": "bad"}, "unconditional of prompt='bad' is no tensor"),
    ],
)
def test_second_conditions_that_do_not_fit_are_refused(unconditional, message, tmp_path) -> None:
    model = guided(stable_diffusion(tmp_path / "words"), negative="distil")
    with pytest.raises(ValueError, match=message):
        model(**inputs(), guidance_scale=3.0, unconditional=unconditional)


def test_model_without_conditions_has_no_second_ones() -> None:
    unet = diffusers.UNet2DModel(
        sample_size=8, block_out_channels=(8,), norm_num_groups=4, layers_per_block=1,
        down_block_types=("AttnDownBlock2D",), up_block_types=("AttnUpBlock2D",),
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"negative='distil' needs conditions .* of \['class', 'pooled', 'prompt'\]"):
        get_peft_model(unet, AGDConfig(target_modules=["to_q"], negative="distil"))


# --- records ------------------------------------------------------------------------------------------------------


def test_record_has_the_negative_prompt_of_each_trajectory(tmp_path) -> None:
    """Among them the usual one, which is not the empty one."""
    pipe = stable_diffusion_xl(tmp_path / "words")
    pipe.set_progress_bar_config(disable=True)
    prompts, negative = ["a cab", "dad", "a", "cab"], ["bad", None, "", "dab"]
    options = {"steps": 2, "dtype": "float32", "scales": (3.0, 3.0), "batch_size": 2}
    data = record_pipeline(pipe, prompts, tmp_path / "data", negative_prompt=negative, **options)
    assert data.config_fields["negative"] == "distil"
    for row, one in enumerate(negative):
        alone = record_pipeline(pipe, prompts, negative_prompt=one, **options)  # two shards, as above
        assert "negative" not in alone.config_fields
        torch.testing.assert_close(data[2 * row]["target"], alone[2 * row]["target"], atol=1e-5, rtol=1e-4)
    words = [data[2 * row]["unconditional.encoder_hidden_states"] for row in range(4)]
    assert not words[1].any()
    assert words[2].any()
    batch = TrajectoryCollator(pipe.unet)([data[0], data[5]])
    assert torch.equal(batch["unconditional"]["encoder_hidden_states"], torch.stack([words[0], words[2]]))
    assert set(batch["unconditional"]) == {"encoder_hidden_states", "added_cond_kwargs"}
    with pytest.raises(ValueError, match="negative_prompt has 1 entries for 4 prompts"):
        record_pipeline(pipe, prompts, negative_prompt=["bad"])
    with pytest.warns(UserWarning, match="negative='fixed' learns the mean"):
        get_peft_model(pipe.unet, AGDConfig(r=4, **{**data.config_fields, "max_scale": 4.0, "negative": "fixed"}))
