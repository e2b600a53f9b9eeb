"""Pipelines of diffusers that guide in one pass, and trajectories recorded from them."""

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
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from mixadapters import AGDConfig
from mixadapters.tuners.agd import OnePass, encode_prompts, record_pipeline
from mixadapters.tuners.agd.pipeline import acts_in_second_pass

diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")
diffusers.logging.set_verbosity_error()
pytestmark = [pytest.mark.filterwarnings("ignore::UserWarning:peft"), pytest.mark.filterwarnings("ignore:.*torchao.*")]

CLOSE = {"atol": 2e-5, "rtol": 2e-5}


def clip(projected: bool = False) -> nn.Module:
    config = transformers.CLIPTextConfig(
        vocab_size=40, hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=12, projection_dim=10, bos_token_id=38, eos_token_id=39, pad_token_id=39,
    )  # fmt: skip
    return (transformers.CLIPTextModelWithProjection if projected else transformers.CLIPTextModel)(config).eval()


def tokenizer(folder: Path) -> Any:
    folder.mkdir(exist_ok=True)
    letters = [chr(c) for c in range(ord("a"), ord("s") + 1)]
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return transformers.CLIPTokenizer.from_pretrained(str(folder), model_max_length=12)


def vae() -> nn.Module:
    return diffusers.AutoencoderKL(
        latent_channels=4, block_out_channels=(8,), norm_num_groups=4, shift_factor=0.1
    ).eval()


def ddim() -> Any:
    return diffusers.DDIMScheduler(clip_sample=False, timestep_spacing="trailing")


UNET = {
    "sample_size": 8, "in_channels": 4, "out_channels": 4, "block_out_channels": (8, 16), "layers_per_block": 1,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"), "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "cross_attention_dim": 8, "attention_head_dim": 4, "norm_num_groups": 4,
}  # fmt: skip


def stable_diffusion(folder: Path) -> Any:
    torch.manual_seed(0)
    return diffusers.StableDiffusionPipeline(
        vae(), clip(), tokenizer(folder), diffusers.UNet2DConditionModel(**UNET).eval(), ddim(), None, None,
        requires_safety_checker=False,
    )  # fmt: skip


def stable_diffusion_xl(folder: Path) -> Any:
    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel(
        **{**UNET, "cross_attention_dim": 16}, addition_embed_type="text_time", addition_time_embed_dim=2,
        projection_class_embeddings_input_dim=2 * 6 + 10,
    ).eval()  # fmt: skip
    words = tokenizer(folder)
    return diffusers.StableDiffusionXLPipeline(vae(), clip(), clip(projected=True), words, words, unet, ddim())


def stable_diffusion_3(folder: Path) -> Any:
    torch.manual_seed(0)
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=2, num_attention_heads=2,
        attention_head_dim=8, joint_attention_dim=24, caption_projection_dim=16, pooled_projection_dim=20,
        pos_embed_max_size=8,
    ).eval()  # fmt: skip
    words, flow = tokenizer(folder), diffusers.FlowMatchEulerDiscreteScheduler()
    return diffusers.StableDiffusion3Pipeline(
        transformer, flow, vae(), clip(projected=True), words, clip(projected=True), words, None, None
    )


def dit(folder: Path) -> Any:
    torch.manual_seed(0)
    model = diffusers.DiTTransformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, out_channels=8, num_layers=2, num_attention_heads=2,
        attention_head_dim=8, num_embeds_ada_norm=1000,
    )  # fmt: skip
    return diffusers.DiTPipeline(model.eval(), vae(), ddim())


def pixart(folder: Path) -> Any:
    """With a learned variance, as those that are published."""
    torch.manual_seed(0)
    model = diffusers.PixArtTransformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, out_channels=8, num_layers=2, num_attention_heads=3,
        attention_head_dim=8, cross_attention_dim=24, caption_channels=8,
    )  # fmt: skip
    for parameter in (model.scale_shift_table, model.proj_out.weight):
        torch.nn.init.normal_(parameter, std=0.3)
    config = transformers.T5Config(vocab_size=40, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    encoder = transformers.T5EncoderModel(config).eval()
    return diffusers.PixArtSigmaPipeline(tokenizer(folder), encoder, vae(), model.eval(), ddim())


def sana(folder: Path) -> Any:
    model = diffusers.SanaTransformer2DModel(
        sample_size=8, patch_size=1, in_channels=4, out_channels=4, num_layers=1, num_attention_heads=2,
        attention_head_dim=4, num_cross_attention_heads=2, cross_attention_head_dim=4, cross_attention_dim=8,
        caption_channels=8,
    )  # fmt: skip
    config = transformers.T5Config(vocab_size=40, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    encoder = transformers.T5EncoderModel(config).eval()
    return diffusers.SanaPipeline(tokenizer(folder), encoder, None, model, ddim())


def inpainting(folder: Path) -> Any:
    unet = diffusers.UNet2DConditionModel(**{**UNET, "in_channels": 9})
    return diffusers.StableDiffusionInpaintPipeline(
        vae(), clip(), tokenizer(folder), unet, ddim(), None, None, requires_safety_checker=False
    )


PIPELINES = {"sd": stable_diffusion, "sdxl": stable_diffusion_xl, "sd3": stable_diffusion_3, "dit": dit}


def guided(pipe: Any, std: float = 0.4, **fields: Any) -> PeftModel:
    """Adapters in the pipeline's model, as if trained."""
    model = getattr(pipe, "unet", None) or pipe.transformer
    pipe.set_progress_bar_config(disable=True)
    adapted = get_peft_model(model, AGDConfig(**{"r": 6, "max_scale": 6.0, **fields})).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "agd_adapters." in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
    return adapted


def draw(pipe: Any, what: Any = None, **options: Any) -> Tensor:
    """Images as numbers, from the same noise at every call."""
    key = "class_labels" if isinstance(pipe, diffusers.DiTPipeline) else "prompt"
    what = what or ([1, 2] if key == "class_labels" else ["a cab", "dad"])
    if key == "prompt":
        options = {"height": 8, "width": 8, **options} if not hasattr(pipe, "transformer") else options
    generator = torch.Generator().manual_seed(0)
    settings = {"num_inference_steps": 3, "output_type": "np", "generator": generator, **options}
    return torch.as_tensor(pipe(**{key: what}, **settings).images)


class Passes:
    """Counts the rows that a model is run on."""

    def __init__(self, model: nn.Module) -> None:
        self.rows: list[int] = []
        self.handle = model.register_forward_pre_hook(self.note, with_kwargs=True)

    def note(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        first = args[0] if args else kwargs["hidden_states"]
        self.rows.append(first.shape[0])


@pytest.mark.parametrize("name", PIPELINES)
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
    assert passes.rows == [4] * 3

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
        if asked & {"do_classifier_free_guidance", "do_true_cfg", "do_cfg"}:
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


def test_scale_of_the_call_that_means_no_guidance_is_the_base(tmp_path) -> None:
    pipe = stable_diffusion(tmp_path / "words")
    guided(pipe)
    base = draw(pipe, guidance_scale=0.0)
    with OnePass(pipe):
        assert torch.equal(draw(pipe, guidance_scale=0.0), base)
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
    with pytest.raises(ValueError, match="neither unet nor transformer"):
        OnePass(type("Empty", (), {"__call__": lambda self, guidance_scale: None})(), 4.0)


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


@pytest.fixture
def _fresh_compiler() -> Any:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("_fresh_compiler")
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


# --- recording ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [sana, inpainting])
def test_pipelines_that_call_their_model_otherwise_are_refused_before_anything_runs(make, tmp_path) -> None:
    pipe = make(tmp_path / "words")
    with pytest.raises(ValueError, match=rf"{type(pipe).__name__} .*knows how pipelines call .*use record\(\)"):
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
    with pytest.raises(ValueError, match=r"encode_prompt gives tensors \[\(1, 12, 8\), .*\(1, 12\)\]; known are"):
        record_pipeline(pipe, ["a cab"])


@pytest.mark.parametrize("name", [*PIPELINES, "pixart"])
def test_record_of_a_pipeline_ends_in_its_own_images(name, tmp_path) -> None:
    """States are those that the pipeline meets at that scale, and targets what it makes of its two predictions."""
    pipe = {**PIPELINES, "pixart": pixart}[name](tmp_path / "words")
    pipe.set_progress_bar_config(disable=True)
    options: dict[str, Any] = {"class_labels": [1, 2]} if name == "dit" else {"prompts": ["a cab", "dad"]}
    data = record_pipeline(
        pipe, folder=tmp_path / "data", scales=(3.0, 3.0), steps=3, dtype="float32", seed=5, **options
    )
    model = getattr(pipe, "unet", None) or pipe.transformer
    assert data.info["model_class"] == type(model).__name__
    assert len(data) == 2 * 3
    inputs: list[Tensor] = []
    outputs: list[Tensor] = []
    model.register_forward_pre_hook(
        lambda m, a, k: inputs.append((a[0] if a else k["hidden_states"])[:2].clone()), with_kwargs=True
    )
    model.register_forward_hook(lambda m, a, y: outputs.append((y[0] if isinstance(y, tuple) else y.sample)[:, :4]))
    start = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(5 << 20))
    if name == "dit":
        pipeline_noise = start

        def noise(*args: Any, **kwargs: Any) -> Tensor:
            return pipeline_noise

        import diffusers.pipelines.dit.pipeline_dit as module

        original = module.randn_tensor
        module.randn_tensor = noise
        try:
            draw(pipe, guidance_scale=3.0)
        finally:
            module.randn_tensor = original
    else:
        sizes = {"use_resolution_binning": False} if name == "pixart" else {}
        draw(pipe, guidance_scale=3.0, latents=start, **sizes)
    for step in range(3):
        for row in range(2):
            state = data[row * 3 + step]
            torch.testing.assert_close(state["sample"], inputs[step][row], atol=1e-4, rtol=1e-3)
            halves = outputs[step][row], outputs[step][row + 2]
            conditional, null = halves if name == "dit" else halves[::-1]
            target = null + 3.0 * (conditional - null)
            torch.testing.assert_close(state["target"], target, atol=1e-4, rtol=1e-3)


def test_record_needs_prompts_or_classes(tmp_path) -> None:
    pipe = stable_diffusion(tmp_path / "words")
    with pytest.raises(ValueError, match="either prompts or class_labels"):
        record_pipeline(pipe)
    with pytest.raises(ValueError, match="does not tell its null class"):
        record_pipeline(pipe, class_labels=[1])


def test_negative_prompt_of_the_teacher_is_recorded(tmp_path) -> None:
    pipe = stable_diffusion(tmp_path / "words")
    plain, other = (
        record_pipeline(pipe, ["a cab"], steps=2, dtype="float32", negative_prompt=negative)
        for negative in (None, "bad")
    )
    assert other.info["negative_prompt"] == "bad"
    assert not torch.equal(plain[0]["target"], other[0]["target"])
    assert torch.equal(plain[0]["sample"], other[0]["sample"])
