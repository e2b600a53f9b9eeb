"""Trajectories that are recorded from pipelines of diffusers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from mixadapters.tuners.agd import TrajectoryCollator, encode_prompts, record_pipeline

diffusers = pytest.importorskip("diffusers")
from tiny_pipelines import (  # noqa: E402
    PIPELINES,
    draw,
    flux,
    inpainting,
    latent_consistency,
    pixart,
    stable_diffusion,
    wan,
)  # fmt: skip

pytestmark = [pytest.mark.filterwarnings("ignore::UserWarning:peft"), pytest.mark.filterwarnings("ignore:.*torchao.*")]


def two_models(folder: Any) -> Any:
    pipe = wan(folder)
    pipe.register_modules(transformer_2=pipe.transformer)
    return pipe


def a_timestep_for_each_token(folder: Any) -> Any:
    pipe = wan(folder)
    pipe.register_to_config(expand_timesteps=True)
    return pipe


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (inpainting, r"StableDiffusionInpaintPipeline .*knows how pipelines call .*use record\(\)"),
        (two_models, "WanPipeline has a second denoiser, transformer_2"),
        (a_timestep_for_each_token, r"gives every token a timestep of its own .*use record\(\)"),
        (flux, "^FluxTransformer2DModel embeds the guidance scale itself, so there is no second pass to distil$"),
        (latent_consistency, "^UNet2DConditionModel embeds the guidance scale itself, so there is no second pass"),
    ],
)
def test_pipelines_that_cannot_be_recorded_are_refused_before_anything_runs(make, message, tmp_path) -> None:
    pipe = make(tmp_path / "words")
    with pytest.raises(ValueError, match=message):
        record_pipeline(pipe, ["a cab"], tmp_path / "data")
    assert not (tmp_path / "data").exists()


def test_models_that_read_the_size_are_given_it(tmp_path) -> None:
    pipe = pixart(tmp_path / "words")
    assert set(encode_prompts(pipe, ["a cab"])[0]) == {"encoder_hidden_states", "encoder_attention_mask"}
    pipe.transformer.use_additional_conditions = True  # as in models of 1024 pixels
    conditions, unconditional = encode_prompts(pipe, ["a cab", "dad"])
    assert conditions["added_cond_kwargs.resolution"].tolist() == [[8.0, 8.0]] * 2
    assert conditions["added_cond_kwargs.aspect_ratio"].tolist() == [[1.0]] * 2
    assert set(unconditional) == {"encoder_hidden_states", "encoder_attention_mask"}


def test_encoders_that_give_something_else_are_refused(tmp_path, monkeypatch) -> None:
    pipe = stable_diffusion(tmp_path / "words")
    given = torch.ones(1, 12, 8), torch.ones(1, 12, 8), torch.ones(1, 12).long(), torch.ones(1, 12).long()
    monkeypatch.setattr(pipe, "encode_prompt", lambda prompt, **options: given)
    with pytest.raises(ValueError, match=r"encode_prompt gives \[\(1, 12, 8\), .*\(1, 12\)\], not what its model is"):
        record_pipeline(pipe, ["a cab"])


def given_noise(pipe: Any, noise: Tensor, monkeypatch: Any) -> dict[str, Any]:
    """Options of a call that starts from this noise."""
    if not isinstance(pipe, diffusers.DiTPipeline):
        return {"latents": noise}
    monkeypatch.setattr("diffusers.pipelines.dit.pipeline_dit.randn_tensor", lambda *args, **kwargs: noise)
    return {}


@pytest.mark.parametrize("name", PIPELINES)
def test_record_is_of_the_states_that_the_pipeline_meets(name, tmp_path, monkeypatch) -> None:
    """And its targets are what the pipeline makes of its two predictions; the model, called with a batch of the
    record, says what it said there."""
    pipe = PIPELINES[name](tmp_path / "words")
    pipe.set_progress_bar_config(disable=True)
    options: dict[str, Any] = {"class_labels": [1, 2]} if name == "dit" else {"prompts": ["a cab", "dad"]}
    if name == "wan":
        options["shape"] = (4, 2, 8, 8)
    data = record_pipeline(
        pipe, folder=tmp_path / "data", scales=(3.0, 3.0), steps=3, dtype="float32", seed=5, **options
    )
    model = getattr(pipe, "unet", None) or pipe.transformer
    assert data.info["model_class"] == type(model).__name__
    assert len(data) == 2 * 3
    inputs: list[Tensor] = []
    outputs: list[Tensor] = []
    times: list[float] = []

    def see(module: Any, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        inputs.append((args[0] if args else kwargs["hidden_states"])[:2].clone())
        outputs.append((output[0] if isinstance(output, tuple) else output.sample)[:, :4])
        times.append(float(torch.as_tensor(args[1] if len(args) > 1 else kwargs["timestep"]).flatten()[0]))

    handle = model.register_forward_hook(see, with_kwargs=True)
    noise = torch.randn(2, *options.get("shape", (4, 8, 8)), generator=torch.Generator().manual_seed(5 << 20))
    draw(pipe, guidance_scale=3.0, **given_noise(pipe, noise, monkeypatch))
    handle.remove()
    if name == "wan":  # two calls, the conditional first
        inputs, times = inputs[::2], times[::2]
        outputs = [torch.cat(pair[::-1]) for pair in zip(outputs[::2], outputs[1::2], strict=True)]
    batch = TrajectoryCollator(model)([data[step] for step in range(3)])
    own = {key: value for key, value in batch.items() if key not in ("target", "guidance_scale")}
    with torch.no_grad():
        conditional_again = model(**own, return_dict=False)[0][:, :4]
    for step in range(3):
        halves = outputs[step].chunk(2)
        conditional, null = halves if name == "dit" else halves[::-1]
        for row in range(2):
            state = data[row * 3 + step]
            torch.testing.assert_close(state["sample"], inputs[step][row], atol=1e-4, rtol=1e-3)
            target = null[row] + 3.0 * (conditional[row] - null[row])
            torch.testing.assert_close(state["target"], target, atol=1e-4, rtol=1e-3)
            assert float(state["timestep"]) == pytest.approx(times[step], rel=1e-6)
        torch.testing.assert_close(conditional_again[step], conditional[0], atol=1e-4, rtol=1e-3)


def test_record_needs_prompts_or_classes(tmp_path) -> None:
    pipe = stable_diffusion(tmp_path / "words")
    with pytest.raises(ValueError, match="either prompts or class_labels"):
        record_pipeline(pipe)
    with pytest.raises(ValueError, match="does not tell its null class"):
        record_pipeline(pipe, class_labels=[1])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"prompts": "a cab"}, "prompts='a cab': give a list"),
        ({"prompts": []}, r"prompts=\[\]: give a list of one or several"),
        ({"prompts": ["a", 3]}, "prompts holds 3, which is no text"),
        ({"prompts": ["a"], "negative_prompt": [3]}, "negative_prompt holds 3, which is no text"),
        ({"class_labels": [1], "negative_prompt": "bad"}, "negative_prompt='bad' belongs to prompts"),
    ],
)
def test_prompts_that_are_none_are_refused(given, message, tmp_path) -> None:
    """One string is no list of its letters."""
    pipe = PIPELINES["dit" if "class_labels" in given else "sd"](tmp_path / "words")
    with pytest.raises(ValueError, match=message):
        record_pipeline(pipe, steps=2, **given)


def test_negative_prompt_of_the_teacher_is_recorded(tmp_path) -> None:
    pipe = stable_diffusion(tmp_path / "words")
    plain, other = (
        record_pipeline(pipe, ["a cab"], steps=2, dtype="float32", negative_prompt=negative)
        for negative in (None, "bad")
    )
    assert other.info["negative_prompt"] == "bad"
    assert not torch.equal(plain[0]["target"], other[0]["target"])
    assert torch.equal(plain[0]["sample"], other[0]["sample"])
