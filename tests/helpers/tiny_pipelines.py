"""Tiny pipelines of diffusers with random weights, and guidance adapters in them."""

from __future__ import annotations

import inspect
import json
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from mixadapters import AGDConfig

diffusers.logging.set_verbosity_error()


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


def t5(width: int = 8) -> nn.Module:
    config = transformers.T5Config(vocab_size=40, d_model=width, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    return transformers.T5EncoderModel(config).eval()


def flow() -> Any:
    return diffusers.FlowMatchEulerDiscreteScheduler()


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


def stable_diffusion_2(folder: Path) -> Any:
    """Predicts velocity, and projects by linear layers, as Stable Diffusion 2.1."""
    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel(**UNET, use_linear_projection=True).eval()
    scheduler = diffusers.DDIMScheduler(clip_sample=False, prediction_type="v_prediction")
    return diffusers.StableDiffusionPipeline(
        vae(), clip(), tokenizer(folder), unet, scheduler, None, None, requires_safety_checker=False
    )


def stable_diffusion_xl(folder: Path) -> Any:
    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel(
        **{**UNET, "cross_attention_dim": 16}, addition_embed_type="text_time", addition_time_embed_dim=2,
        projection_class_embeddings_input_dim=2 * 6 + 10,
    ).eval()  # fmt: skip
    words = tokenizer(folder)
    return diffusers.StableDiffusionXLPipeline(vae(), clip(), clip(projected=True), words, words, unet, ddim())


def stable_diffusion_3(folder: Path, **options: Any) -> Any:
    torch.manual_seed(0)
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=2, num_attention_heads=2,
        attention_head_dim=8, joint_attention_dim=24, caption_projection_dim=16, pooled_projection_dim=20,
        pos_embed_max_size=8, **options,
    ).eval()  # fmt: skip
    words = tokenizer(folder)
    return diffusers.StableDiffusion3Pipeline(
        transformer, flow(), vae(), clip(projected=True), words, clip(projected=True), words, None, None
    )


def dit(folder: Path) -> Any:
    torch.manual_seed(0)
    model = diffusers.DiTTransformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, out_channels=8, num_layers=2, num_attention_heads=2,
        attention_head_dim=8, num_embeds_ada_norm=1000,
    )  # fmt: skip
    return diffusers.DiTPipeline(model.eval(), vae(), ddim())


def pixart(folder: Path, alpha: bool = False) -> Any:
    """With a learned variance, as those that are published."""
    torch.manual_seed(0)
    model = diffusers.PixArtTransformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, out_channels=8, num_layers=2, num_attention_heads=3,
        attention_head_dim=8, cross_attention_dim=24, caption_channels=8,
    )  # fmt: skip
    for parameter in (model.scale_shift_table, model.proj_out.weight):
        torch.nn.init.normal_(parameter, std=0.3)
    kind = diffusers.PixArtAlphaPipeline if alpha else diffusers.PixArtSigmaPipeline
    return kind(tokenizer(folder), t5(), vae(), model.eval(), ddim())


def sana(folder: Path) -> Any:
    torch.manual_seed(0)
    model = diffusers.SanaTransformer2DModel(
        sample_size=8, patch_size=1, in_channels=4, out_channels=4, num_layers=1, num_attention_heads=2,
        attention_head_dim=4, num_cross_attention_heads=2, cross_attention_head_dim=4, cross_attention_dim=8,
        caption_channels=8, timestep_scale=0.5,
    )  # fmt: skip
    return diffusers.SanaPipeline(tokenizer(folder), t5(), None, model.eval(), flow())


def aura_flow(folder: Path) -> Any:
    torch.manual_seed(0)
    model = diffusers.AuraFlowTransformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_mmdit_layers=1, num_single_dit_layers=1,
        attention_head_dim=8, num_attention_heads=2, joint_attention_dim=8, caption_projection_dim=16,
        pos_embed_max_size=16,
    )  # fmt: skip
    return diffusers.AuraFlowPipeline(tokenizer(folder), t5(), vae(), model.eval(), flow())


def hunyuan(folder: Path) -> Any:
    """With a learned variance, and two encoders of their own lengths."""
    torch.manual_seed(0)
    model = diffusers.HunyuanDiT2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, patch_size=2, hidden_size=16, sample_size=8,
        activation_fn="gelu-approximate", num_layers=2, cross_attention_dim=8, cross_attention_dim_t5=16,
        pooled_projection_dim=10,
    ).eval()  # fmt: skip
    config = transformers.BertConfig(
        vocab_size=40, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8
    )
    words = tokenizer(folder)
    return diffusers.HunyuanDiTPipeline(
        None, transformers.BertModel(config).eval(), words, model, ddim(), None, None, False, t5(16), words
    )


def wan(folder: Path) -> Any:
    """Films of two frames."""
    torch.manual_seed(0)
    model = diffusers.WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=8, freq_dim=8, ffn_dim=8,
        num_layers=2, rope_max_seq_len=16,
    ).eval()  # fmt: skip
    return diffusers.WanPipeline(tokenizer(folder), t5(), None, flow(), model)


def flux(folder: Path) -> Any:
    model = diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=8, pooled_projection_dim=8, axes_dims_rope=(4, 4, 8), guidance_embeds=True,
    )  # fmt: skip
    return diffusers.FluxPipeline(flow(), None, None, None, None, None, model)


def latent_consistency(folder: Path) -> Any:
    unet = diffusers.UNet2DConditionModel(**UNET, time_cond_proj_dim=8)
    return diffusers.LatentConsistencyModelPipeline(
        None, clip(), tokenizer(folder), unet, diffusers.LCMScheduler(), None, None, requires_safety_checker=False
    )


def inpainting(folder: Path) -> Any:
    unet = diffusers.UNet2DConditionModel(**{**UNET, "in_channels": 9})
    return diffusers.StableDiffusionInpaintPipeline(
        vae(), clip(), tokenizer(folder), unet, ddim(), None, None, requires_safety_checker=False
    )


PIPELINES = {
    "sd": stable_diffusion,
    "sd2": stable_diffusion_2,
    "sdxl": stable_diffusion_xl,
    "sd3": stable_diffusion_3,
    "sd3.5": partial(stable_diffusion_3, dual_attention_layers=(0,), qk_norm="rms_norm"),
    "dit": dit,
    "pixart alpha": partial(pixart, alpha=True),
    "pixart sigma": pixart,
    "sana": sana,
    "aura flow": aura_flow,
    "hunyuan": hunyuan,
    "wan": wan,
}


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


def pixels_of(pipe: Any) -> int:
    """How many pixels a latent stands for, along each side."""
    return getattr(pipe, "vae_scale_factor", None) or getattr(pipe, "vae_scale_factor_spatial", 1)


def draw(pipe: Any, what: Any = None, **options: Any) -> Tensor:
    """Images as numbers, from the same noise at every call."""
    key = "class_labels" if isinstance(pipe, diffusers.DiTPipeline) else "prompt"
    what = what or ([1, 2] if key == "class_labels" else ["a cab", "dad"])
    takes, side = inspect.signature(type(pipe).__call__).parameters, 8 * pixels_of(pipe)
    settings = {
        "num_inference_steps": 3, "output_type": "np" if getattr(pipe, "vae", None) else "latent",
        "generator": torch.Generator().manual_seed(0), "height": side, "width": side, "num_frames": 5,
        "use_resolution_binning": False, **options,
    }  # fmt: skip
    absent = {"num_frames", "use_resolution_binning", *(() if key == "prompt" else ("height", "width"))} - set(takes)
    settings = {name: value for name, value in settings.items() if name not in absent}
    output = pipe(**{key: what}, **settings)
    return torch.as_tensor(output.frames if hasattr(output, "frames") else output.images)


class Passes:
    """Counts the rows that a model is run on."""

    def __init__(self, model: nn.Module) -> None:
        self.rows: list[int] = []
        self.handle = model.register_forward_pre_hook(self.note, with_kwargs=True)

    def note(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        first = args[0] if args else kwargs["hidden_states"]
        self.rows.append(first.shape[0])
