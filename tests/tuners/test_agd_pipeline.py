"""Pipelines of diffusers that guide in one pass."""

from __future__ import annotations

import ast
import copy
import json
import pickle
import re
import threading
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor

from mixadapters.tuners.agd import OnePass
from mixadapters.tuners.agd.pipeline import acts_in_second_pass

diffusers = pytest.importorskip("diffusers")
from tiny_pipelines import (  # noqa: E402
    PIPELINES,
    Passes,
    dit,
    draw,
    flux,
    guided,
    latent_consistency,
    stable_diffusion,
    wan,
)  # fmt: skip

CLOSE = {"atol": 2e-5, "rtol": 2e-5}
pytestmark = [pytest.mark.filterwarnings("ignore::UserWarning:peft"), pytest.mark.filterwarnings("ignore:.*torchao.*")]


@pytest.mark.parametrize("name", [name for name in PIPELINES if name not in ("sd2", "sd3.5", "pixart alpha")])
def test_one_line_guides_in_half_the_passes_and_one_line_ends_it(name, tmp_path) -> None:
    pipe = PIPELINES[name](tmp_path / "words")
    model = guided(pipe)
    base, cfg = draw(pipe, guidance_scale=1.0), draw(pipe, guidance_scale=4.0)
    passes = Passes(model.get_base_model())
    plain = type(pipe)
    with OnePass(pipe, 4.0):
        assert isinstance(pipe, plain)
        within = draw(pipe)
        assert passes.rows == [2] * 3
        repeated = draw(pipe, guidance_scale=2.0)
    assert torch.equal(within, repeated)  # the scale of the helper counts
    assert (within - base).abs().max() > 1e-4
    assert (within - cfg).abs().max() > 1e-4
    assert type(pipe) is plain
    passes.rows.clear()
    assert torch.equal(draw(pipe, guidance_scale=4.0), cfg)
    assert passes.rows == ([2] * 6 if name == "wan" else [4] * 3)  # Wan's passes are two calls

    handle = OnePass(pipe)
    assert torch.equal(draw(pipe, guidance_scale=4.0), within)
    assert torch.equal(draw(pipe, guidance_scale=1.0), base)
    handle.remove()
    assert torch.equal(draw(pipe, guidance_scale=1.0), base)


def test_scales_may_differ_by_prompt(tmp_path) -> None:
    pipe = stable_diffusion(tmp_path / "words")
    guided(pipe)
    handle = OnePass(pipe, torch.tensor([1.0, 4.0]))
    both = draw(pipe, num_images_per_prompt=2)
    handle.remove()
    base = draw(pipe, guidance_scale=1.0, num_images_per_prompt=2)
    torch.testing.assert_close(both[:2], base[:2], **CLOSE)
    assert (both[2:] - base[2:]).abs().max() > 1e-4
    with pytest.raises(ValueError, match="does not fit a batch of 1"), OnePass(pipe, [1.0, 4.0]):
        draw(pipe, ["a cab"])


# --- copies -------------------------------------------------------------------------------------------------------


def test_copy_of_a_guided_pipeline_draws_with_its_own_scheduler(tmp_path) -> None:
    pipe = stable_diffusion(tmp_path / "words")
    guided(pipe)
    other = copy.copy(pipe)
    other.scheduler = diffusers.EulerDiscreteScheduler()
    with OnePass(other, 4.0):
        expected = draw(other)
    plain = draw(other, guidance_scale=4.0)
    with OnePass(pipe, 4.0):
        own = draw(pipe)
        twin = copy.copy(pipe)
        twin.scheduler = diffusers.EulerDiscreteScheduler()
        assert torch.equal(draw(twin), expected)
        assert torch.equal(draw(pipe), own)
    assert not torch.equal(own, expected)
    assert torch.equal(draw(twin, guidance_scale=4.0), plain)  # the block has ended for both


def test_deep_copy_of_a_guided_pipeline_runs_its_own_model(tmp_path) -> None:
    pipe = stable_diffusion(tmp_path / "words")
    guided(pipe)
    with OnePass(pipe, 4.0):
        own = draw(pipe)
        twin = copy.deepcopy(pipe)
        assert torch.equal(draw(twin), own)
        with torch.no_grad():
            twin.unet.conv_in.weight.mul_(1.3)
        changed = draw(twin)
        assert torch.equal(draw(pipe), own)
    assert not torch.equal(changed, own)
    with OnePass(twin, 4.0):
        assert torch.equal(draw(twin), changed)


def test_other_pipelines_of_the_class_are_left_alone(tmp_path) -> None:
    pipe, other = (stable_diffusion(tmp_path / "words") for _ in range(2))
    for each in (pipe, other):
        guided(each)
    expected, plain = draw(other, guidance_scale=4.0), type(pipe)
    with OnePass(pipe, 2.0):
        assert type(pipe) is type(other) is plain
        assert torch.equal(draw(other, guidance_scale=4.0), expected)
        with OnePass(other, 4.0):
            pass
        assert not torch.equal(draw(pipe), draw(other))
    pipe.save_pretrained(tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "model_index.json").read_text())["_class_name"] == plain.__name__


def test_class_that_calls_its_parent_is_guided_once(tmp_path) -> None:
    class Child(diffusers.StableDiffusionPipeline):
        def __call__(self, *args: Any, guidance_scale: float = 7.5, **kwargs: Any) -> Any:
            return super().__call__(*args, guidance_scale=guidance_scale, **kwargs)

    pipe = stable_diffusion(tmp_path / "words")
    guided(pipe)
    with OnePass(pipe, None):
        expected = draw(pipe, guidance_scale=4.0)
    child = Child(**pipe.components, requires_safety_checker=False)
    child.set_progress_bar_config(disable=True)
    with OnePass(child):
        assert torch.equal(draw(child, guidance_scale=4.0), expected)


def test_guided_pipeline_is_guided_where_it_is_unpickled(tmp_path) -> None:
    pipe = dit(tmp_path)
    guided(pipe)
    with OnePass(pipe, 4.0):
        expected, stored = draw(pipe), pickle.dumps(pipe)
    plain = type(pipe)
    plain.__call__ = plain.__call__.__wrapped__  # as in a process that has met no OnePass
    assert torch.equal(draw(pickle.loads(stored)), expected)


def test_threads_draw_with_copies_each_at_its_scale(tmp_path) -> None:
    pipe = stable_diffusion(tmp_path / "words")
    guided(pipe)
    with OnePass(pipe):
        expected = {scale: draw(pipe, guidance_scale=scale) for scale in (2.0, 3.0, 5.0)}
        found: dict[float, list[Tensor]] = defaultdict(list)

        def work(scale: float) -> None:
            twin = copy.copy(pipe)
            twin.scheduler = copy.deepcopy(pipe.scheduler)
            twin.tokenizer = copy.deepcopy(pipe.tokenizer)  # it notes padding for a call, and cannot be shared
            found[scale] = [draw(twin, guidance_scale=scale) for _ in range(3)]

        threads = [threading.Thread(target=work, args=(scale,)) for scale in expected]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for scale, images in expected.items():
        assert [torch.equal(images, other) for other in found[scale]] == [True] * 3


# --- what belongs to a second pass --------------------------------------------------------------------------------

SECOND = {
    "sd": {"guidance_rescale": 0.7},
    "sdxl": {
        "guidance_rescale": 0.7,
        "negative_original_size": (4, 4),
        "negative_target_size": (4, 4),
        "negative_crops_coords_top_left": (2, 0),
        "negative_prompt_2": "bad",
        "negative_pooled_prompt_embeds": torch.ones(2, 10),
    },
    "sd3": {"skip_guidance_layers": [0], "skip_layer_guidance_scale": 1.0, "negative_prompt_3": ["", "bad"]},
}


@pytest.mark.parametrize(
    ("name", "argument", "value"), [(name, *item) for name, given in SECOND.items() for item in given.items()]
)
def test_what_acts_in_a_second_pass_alone_is_refused_by_name(name, argument, value, tmp_path) -> None:
    pipe = PIPELINES[name](tmp_path / "words")
    guided(pipe)
    with OnePass(pipe, 4.0), pytest.raises(ValueError, match=rf"\['{argument}'\] would do nothing.*two_passes"):
        draw(pipe, **{argument: value})


def test_rule_of_the_second_pass_may_be_ignored_or_followed(tmp_path) -> None:
    pipe = stable_diffusion(tmp_path / "words")
    model = guided(pipe)
    with model.disable_adapter():
        plain = draw(pipe, guidance_scale=4.0, guidance_rescale=0.7)
    with OnePass(pipe, 4.0):
        expected = draw(pipe, guidance_rescale=0.0)
    with OnePass(pipe, 4.0, negative_prompts="two_passes"):
        assert torch.equal(draw(pipe, guidance_rescale=0.7), plain)
        assert torch.equal(draw(pipe), expected)
    with (
        OnePass(pipe, 4.0, negative_prompts="ignore"),
        pytest.warns(UserWarning, match=r"\['guidance_rescale'\] are ignored"),
    ):
        assert torch.equal(draw(pipe, guidance_rescale=0.7), expected)
    with (
        OnePass(pipe, [4.0, 2.0], negative_prompts="two_passes"),
        pytest.raises(ValueError, match=r"two passes, for \['guidance_rescale'\], take one number"),
    ):
        draw(pipe, guidance_rescale=0.7)


def test_passes_of_perturbed_attention_are_refused_unless_they_are_off(tmp_path) -> None:
    """They act by default, and around a prediction whose adapters would act in them too."""
    plain = stable_diffusion(tmp_path / "words")
    guided(plain)
    with OnePass(plain, 4.0):
        expected = draw(plain)
    pipe = diffusers.StableDiffusionPAGPipeline(
        **plain.components, requires_safety_checker=False, pag_applied_layers="mid"
    )
    pipe.set_progress_bar_config(disable=True)
    with OnePass(pipe, 4.0):
        with pytest.raises(ValueError, match=r"\['pag_scale'\] would do nothing.*by default, pass pag_scale=0\)"):
            draw(pipe)
        assert torch.equal(draw(pipe, pag_scale=0.0), expected)
    with OnePass(pipe, 4.0, negative_prompts="ignore"), pytest.warns(UserWarning, match="'pag_scale'"):
        assert torch.equal(draw(pipe, pag_scale=2.0), expected)


def under_guidance(node: Any, guided: bool = False) -> Iterator[tuple[str, bool]]:
    """(name that is read, whether in a branch of classifier-free guidance) in code of a pipeline."""

    def name_of(node: Any) -> str | None:
        if isinstance(node, ast.Name):
            return node.id
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self":
            return node.attr.removeprefix("_")
        return None

    if isinstance(node, (ast.If, ast.IfExp)):
        asked = {name_of(part) for part in ast.walk(node.test)} - {None}
        if asked & PASSES:
            yield from ((str(name), True) for name in asked)
            for part in node.body if isinstance(node.body, list) else [node.body]:
                yield from under_guidance(part, True)
            for part in node.orelse if isinstance(node.orelse, list) else [node.orelse]:
                yield from under_guidance(part, guided)
            return
    if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "check_inputs":
        return
    if (
        isinstance(node, ast.Assign)
        and isinstance(node.targets[0], ast.Attribute)
        and isinstance(node.value, ast.Name)
    ):
        return  # self._guidance_rescale = guidance_rescale
    if (name := name_of(node)) is not None:
        yield name, guided
    for part in ast.iter_child_nodes(node):
        yield from under_guidance(part, guided)


PASSES = {
    "do_classifier_free_guidance", "do_true_cfg", "do_cfg", "do_perturbed_attention_guidance",
    "do_self_attention_guidance", "do_spatio_temporal_guidance",
}  # fmt: skip
CALL = re.compile(r"^    def __call__\(.*?(?=^    def |^    @|^@|^class |^def |\Z)", re.M | re.S)


def test_every_argument_that_pipelines_read_for_guidance_alone_is_known() -> None:
    """Of all pipelines of the installed diffusers that take a guidance scale, by their source."""
    found: set[str] = set()
    for path in (Path(diffusers.__file__).parent / "pipelines").rglob("pipeline_*.py"):
        for source in CALL.findall(path.read_text(encoding="utf-8")):
            call: Any = ast.parse("class Pipeline:\n" + source).body[0].body[0]
            arguments = {a.arg for a in (*call.args.args, *call.args.kwonlyargs)}
            found |= {a for a in arguments if a.startswith("negative_")}
            if "guidance_scale" in arguments:
                read = defaultdict(set)
                for statement in call.body:
                    for name, guided_only in under_guidance(statement):
                        read[name].add(guided_only)
                found |= {name for name in arguments if read[name] == {True}}
    assert {"guidance_rescale", "skip_guidance_layers", "negative_original_size"} <= found
    assert {name for name in found if not acts_in_second_pass(name)} == {"guidance_scale"}
    assert acts_in_second_pass("true_cfg_scale")
    assert not any(acts_in_second_pass(name) for name in ("control_guidance_end", "prompt_embeds", "eta", "strength"))


def test_image_embeddings_of_two_passes_are_refused(tmp_path) -> None:
    pipe = stable_diffusion(tmp_path / "words")
    guided(pipe)
    with OnePass(pipe, 4.0), pytest.raises(ValueError, match="ip_adapter_image_embeds of 4 rows for 2 prompts"):
        draw(pipe, ip_adapter_image_embeds=[torch.randn(4, 1, 10)])


def test_compiled_unet_is_found(tmp_path) -> None:
    """It has no length, and so no truth value; before it is called nothing is compiled."""
    pipe = stable_diffusion(tmp_path / "words")
    guided(pipe)
    pipe.unet = torch.compile(pipe.unet, backend="eager")
    OnePass(pipe, 4.0).remove()


def test_scale_of_the_call_that_means_no_guidance_is_the_base(tmp_path) -> None:
    pipe = stable_diffusion(tmp_path / "words")
    guided(pipe)
    base = draw(pipe, guidance_scale=0.0)
    with OnePass(pipe):
        assert torch.equal(draw(pipe, guidance_scale=0.0), base)
        for scale in (float("nan"), float("inf")):
            with pytest.raises(ValueError, match=r"^guidance_scale=(nan|inf) must be finite"):
                draw(pipe, guidance_scale=scale)
        with pytest.raises(ValueError, match="guidance_scale=None: give OnePass a scale"):
            draw(pipe, guidance_scale=None)


# --- callbacks ----------------------------------------------------------------------------------------------------


def test_callback_finds_the_scale_and_changes_it_for_the_steps_that_follow(tmp_path) -> None:
    pipe = stable_diffusion(tmp_path / "words")
    guided(pipe)
    seen: list[tuple[float, bool]] = []

    def off(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        seen.append((pipe.guidance_scale, pipe.do_classifier_free_guidance))
        if step == 0:
            pipe._guidance_scale = 1.0
        return tensors

    def latents(scale: float, callback: Any = None) -> list[Tensor]:
        found: list[Tensor] = []

        def note(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            found.append(tensors["latents"].clone())
            return tensors if callback is None else callback(pipe, step, timestep, tensors)

        with OnePass(pipe, scale):
            draw(pipe, callback_on_step_end=note)
        return found

    always, never, once = latents(4.0), latents(1.0), latents(4.0, off)
    assert seen == [(4.0, True), (1.0, False), (1.0, False)]
    assert torch.equal(once[0], always[0])
    assert not torch.equal(once[1], always[1])
    # From the state after the first step on, the steps are those of the base.
    again: list[Tensor] = []

    def exchange(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        again.append(tensors["latents"].clone())
        return {"latents": always[0]} if step == 0 else tensors

    with OnePass(pipe, 1.0):
        draw(pipe, callback_on_step_end=exchange)
    assert torch.equal(again[0], never[0])
    assert torch.equal(again[1], once[1])
    assert torch.equal(again[2], once[2])


@pytest.mark.parametrize("rows", [1, 2])
def test_callback_of_diffusers_that_ends_guidance(rows, tmp_path) -> None:
    """It keeps the last row of the embeddings, since the first half belongs to the second pass, if there is one."""
    from diffusers.callbacks import SDCFGCutoffCallback

    pipe = stable_diffusion(tmp_path / "words")
    guided(pipe)
    prompts = ["a cab", "dad"][:rows]
    with OnePass(pipe, 4.0):
        always = draw(pipe, prompts)
        callback = SDCFGCutoffCallback(cutoff_step_ratio=None, cutoff_step_index=0)
        if rows == 1:
            assert not torch.equal(draw(pipe, prompts, callback_on_step_end=callback), always)
        else:
            with pytest.raises(ValueError, match="prompt_embeds of 1 rows for 2"):
                draw(pipe, prompts, callback_on_step_end=callback)
        assert torch.equal(draw(pipe, prompts), always)  # nothing of it stays


def test_callback_that_sets_what_belongs_to_a_second_pass_is_refused(tmp_path) -> None:
    pipe = stable_diffusion(tmp_path / "words")
    guided(pipe)

    def rescale(pipe: Any, *given: Any) -> Any:
        pipe._guidance_rescale = 0.5
        return given[-1]

    def negative(pipe: Any, *given: Any) -> Any:
        return {"negative_prompt_embeds": torch.zeros(2, 12, 8)}

    def wide(pipe: Any, *given: Any) -> Any:
        pipe._guidance_scale = [1.0, 2.0, 3.0]
        return given[-1]

    for callback, message in (
        (rescale, r"has set \['_guidance_rescale'\]"), (negative, "has changed negative_prompt_embeds"),
        (wide, "give a number"),
    ):  # fmt: skip
        with OnePass(pipe, 4.0), pytest.raises(ValueError, match=message):
            draw(pipe, callback_on_step_end=callback)
    with OnePass(pipe, 4.0):
        old = {"callback": lambda *_: setattr(pipe, "_guidance_scale", 1.0), "callback_steps": 1}
        assert not torch.equal(draw(pipe), draw(pipe, **old))


def test_interval_guides_at_some_timesteps(tmp_path) -> None:
    pipe = dit(tmp_path)
    guided(pipe)
    base = draw(pipe, guidance_scale=1.0)
    with OnePass(pipe, 4.0, interval=(0, 1000)):
        always = draw(pipe)
    with OnePass(pipe, 4.0, interval=(500, 700)):
        once = draw(pipe)
    with OnePass(pipe, 4.0, interval=(1500, 1700)):
        assert torch.equal(draw(pipe), base)
    assert not torch.equal(once, base)
    assert not torch.equal(once, always)


@pytest.mark.parametrize("scale", ["3", 1j, True, [True, 4.0], ["3"]], ids=str)
def test_scales_that_are_no_numbers_are_refused(scale, tmp_path) -> None:
    pipe = stable_diffusion(tmp_path / "words")
    guided(pipe)
    with pytest.raises(ValueError, match=r"^scale=.* must be a number, or one for each row of the batch"):
        OnePass(pipe, scale)
    with pytest.raises(ValueError, match=r"interval='200' must be two numbers"):
        OnePass(pipe, 3.0, interval="200")
    with OnePass(pipe), pytest.raises(ValueError, match=r"guidance_scale=.* must be a number, or one for each row"):
        draw(pipe, guidance_scale=scale)


def test_negative_prompts_are_refused_ignored_or_guided_by_two_passes(tmp_path) -> None:
    pipe = stable_diffusion(tmp_path / "words")
    model = guided(pipe, default_scale=3.0)
    with model.disable_adapter():
        plain = draw(pipe, guidance_scale=4.0, negative_prompt=["bad", "bad"])
    with OnePass(pipe, 4.0):
        expected = draw(pipe)
        assert torch.equal(draw(pipe, negative_prompt=["", ""]), expected)
        with pytest.raises(ValueError, match=r"\['negative_prompt'\].*two_passes"):
            draw(pipe, negative_prompt=["bad", "bad"])
    with (
        OnePass(pipe, 4.0, negative_prompts="ignore"),
        pytest.warns(UserWarning, match=r"\['negative_prompt'\] are ignored"),
    ):
        assert torch.equal(draw(pipe, negative_prompt=["bad", "bad"]), expected)
    passes = Passes(model.get_base_model())
    with OnePass(pipe, 4.0, negative_prompts="two_passes"):
        assert torch.equal(draw(pipe, negative_prompt=["bad", "bad"]), plain)
        assert passes.rows == [4] * 3
        assert torch.equal(draw(pipe), expected)


def test_what_cannot_be_guided_in_one_pass_is_refused(tmp_path) -> None:
    pipe = stable_diffusion(tmp_path / "words")
    with pytest.raises(ValueError, match="no active guidance adapter; load one by"):
        OnePass(pipe, 4.0)
    model = guided(pipe)
    with pytest.raises(ValueError, match="negative_prompts='drop' is unknown"):
        OnePass(pipe, 4.0, negative_prompts="drop")
    with OnePass(pipe, 4.0):
        with pytest.raises(ValueError, match="already; remove"):
            OnePass(pipe, 3.0)
        with model.disable_adapter(), pytest.raises(ValueError, match="are disabled"):
            draw(pipe)
        pipe.one_pass.scale = 9.0
        with pytest.warns(UserWarning, match="outside the trained range"):
            draw(pipe)
    pipe.unet.register_to_config(time_cond_proj_dim=8)
    with pytest.raises(ValueError, match="embeds the guidance scale itself"):
        OnePass(pipe, 4.0)
    films = wan(tmp_path / "words")
    guided(films)
    films.register_modules(transformer_2=films.transformer)
    with pytest.raises(ValueError, match="has a second denoiser, transformer_2"):
        OnePass(films, 4.0)
    with pytest.raises(ValueError, match="neither unet nor transformer"):
        OnePass(type("Empty", (), {"__call__": lambda self, guidance_scale: None})(), 4.0)


@pytest.mark.parametrize("make", [flux, latent_consistency])
def test_models_that_embed_the_scale_take_no_adapters(make, tmp_path) -> None:
    pipe = make(tmp_path / "words")
    with pytest.raises(
        ValueError, match=r"^.*Model embeds the guidance scale itself, so there is no second pass to distil$"
    ):
        guided(pipe)


def test_timesteps_reach_the_adapters_in_the_units_of_training(tmp_path) -> None:
    """Some models take the scheduler's timesteps as fractions; adapters tell 0 ... 1000 apart."""
    for name, factor in (("aura flow", 1000.0), ("sana", 2.0), ("sd3", 1.0)):
        model = guided(PIPELINES[name](tmp_path / "words"))
        assert model.peft_config["default"].timestep_scale == pytest.approx(factor)


# --- modular pipelines --------------------------------------------------------------------------------------------


def modular(pipe: Any, **guider: Any) -> Any:
    from diffusers.modular_pipelines import StableDiffusionXLAutoBlocks

    from mixadapters.tuners.agd import AdapterGuidance

    blocks = StableDiffusionXLAutoBlocks().get_workflow("text2image").init_pipeline()
    blocks.update_components(
        **{name: part for name, part in pipe.components.items() if part is not None},
        guider=AdapterGuidance(**guider),
    )
    blocks.set_progress_bar_config(disable=True)
    return blocks


def test_guider_of_a_modular_pipeline_guides_as_the_pipeline_does(tmp_path) -> None:
    pipe = PIPELINES["sdxl"](tmp_path / "words")
    model = guided(pipe)
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    options = {"height": 8, "width": 8, "num_inference_steps": 4, "output_type": "latent"}

    def expected(scale: float) -> Tensor:
        with OnePass(pipe, scale):
            return pipe("a cab", latents=noise.clone(), **options).images

    def found(**guider: Any) -> Tensor:
        return modular(pipe, **guider)(prompt="a cab", latents=noise.clone(), output="latents", **options)

    passes = Passes(model.get_base_model())
    assert torch.equal(found(guidance_scale=4.0), expected(4.0))
    assert passes.rows == [1] * 8
    base = expected(1.0)
    assert torch.equal(found(guidance_scale=4.0, stop=0.2), base)  # none of four steps
    half = found(guidance_scale=4.0, stop=0.5)
    assert not torch.equal(half, base)
    assert not torch.equal(half, expected(4.0))
    with pytest.warns(UserWarning, match="outside the trained range"):
        found(guidance_scale=9.0)
    with model.disable_adapter(), pytest.raises(ValueError, match="are disabled"):
        found(guidance_scale=4.0)


def test_guider_leaves_no_scale_behind(tmp_path) -> None:
    """Also where the forward failed, after which the guider is asked again."""
    from mixadapters.tuners.agd import AdapterGuidance

    pipe = PIPELINES["sdxl"](tmp_path / "words")
    model = guided(pipe)
    guider, pins = AdapterGuidance(4.0), model.base_model.context.records.thread.pins
    guider.prepare_models(pipe.unet)
    guider.prepare_models(pipe.unet)
    guider.cleanup_models(pipe.unet)
    assert not pins.values
    guider.disable()
    guider.prepare_models(pipe.unet)
    assert float(pins.values["guidance_scale"]) == 1.0
    guider.cleanup_models(pipe.unet)


def test_adapter_serves_another_checkpoint_and_a_lora_on_top(tmp_path) -> None:
    from peft import LoraConfig

    first = stable_diffusion(tmp_path / "words")
    guided(first).save_pretrained(tmp_path / "adapter")
    other = stable_diffusion(tmp_path / "words")
    other.set_progress_bar_config(disable=True)
    with torch.no_grad():
        other.unet.conv_in.weight.mul_(1.3)
    base = draw(other, guidance_scale=1.0)
    PeftModel.from_pretrained(other.unet, tmp_path / "adapter")
    assert torch.equal(draw(other, guidance_scale=1.0), base)
    with OnePass(other, 4.0):
        alone = draw(other)
        assert (alone - base).abs().max() > 1e-4
        other.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False), "style")
        styled = draw(other)
        assert (styled - alone).abs().max() > 1e-4
        other.set_adapters(["style"], [0.0])
        torch.testing.assert_close(draw(other), alone, **CLOSE)


def test_ip_adapter_loads_and_guides_beside_the_adapters(tmp_path) -> None:
    """Loading one replaces the processors of the cross-attention that the adapters sit on."""
    pipe = stable_diffusion(tmp_path / "words")
    width, tokens = 8, 4
    inner = [m for n, m in pipe.unet.named_modules() if n.endswith("attn2")]
    state: dict[str, Tensor] = {
        "proj.weight": torch.randn(tokens * width, 10),
        "proj.bias": torch.randn(tokens * width),
        "norm.weight": torch.ones(width),
        "norm.bias": torch.zeros(width),
    }
    layers: dict[str, Tensor] = {}
    generator = torch.Generator().manual_seed(0)
    for i, module in enumerate(inner):
        for key in ("to_k_ip", "to_v_ip"):
            layers[f"{2 * i + 1}.{key}.weight"] = torch.randn(module.inner_dim, width, generator=generator)
    guided(pipe)
    with OnePass(pipe, 4.0):
        before = draw(pipe)
    pipe.unet._load_ip_adapter_weights([{"image_proj": state, "ip_adapter": layers}])
    embeds = [torch.randn(1, 1, 10, generator=generator)]
    pipe.set_ip_adapter_scale(0.6)
    base = draw(pipe, guidance_scale=1.0, ip_adapter_image_embeds=embeds)
    with OnePass(pipe, 4.0):
        both = draw(pipe, ip_adapter_image_embeds=embeds)
        pipe.set_ip_adapter_scale(0.0)  # no picture: the guidance is what it was
        torch.testing.assert_close(draw(pipe, ip_adapter_image_embeds=embeds), before, **CLOSE)
    with OnePass(pipe, 1.0):
        pipe.set_ip_adapter_scale(0.6)
        assert torch.equal(draw(pipe, ip_adapter_image_embeds=embeds), base)
    assert (both - base).abs().max() > 1e-4
    assert (both - before).abs().max() > 1e-4


@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_pipeline_guides_without_compiling_again(tmp_path) -> None:
    from torch._dynamo.testing import CompileCounterWithBackend

    pipe = dit(tmp_path)
    guided(pipe)
    expected = {}
    for w in (2.0, 5.0):
        with OnePass(pipe, w):
            expected[w] = draw(pipe)
    counter = CompileCounterWithBackend("eager")
    pipe.transformer = torch.compile(pipe.transformer, backend=counter, fullgraph=True)
    for w in (2.0, 5.0):
        with OnePass(pipe, w):
            torch.testing.assert_close(draw(pipe), expected[w], **CLOSE)
        if w == 2.0:
            first = counter.frame_count
    assert counter.frame_count == first > 0
