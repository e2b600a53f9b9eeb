"""The example for checkpoints of diffusers, on tiny random pipelines."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")
ROOT = Path(__file__).resolve().parents[2]
pytestmark = [pytest.mark.filterwarnings("ignore::UserWarning:peft"), pytest.mark.filterwarnings("ignore:.*torchao.*")]


@pytest.fixture(scope="module")
def example() -> Any:
    sys.path.insert(0, str(ROOT / "examples" / "studies"))
    try:
        import agd_sd

        yield agd_sd
    finally:
        sys.path.remove(str(ROOT / "examples" / "studies"))


def vae() -> Any:
    return diffusers.AutoencoderKL(latent_channels=4, block_out_channels=(8,), norm_num_groups=4)


def stable_diffusion(folder: Path) -> None:
    words = [*"abcdefghijklmnopqrs", *(f"{c}</w>" for c in "abcdefghijklmnopqrs"), "<|startoftext|>", "<|endoftext|>"]
    (folder / "words").mkdir(parents=True)
    (folder / "words" / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "words" / "merges.txt").write_text("#version: 0.2\n")
    text = transformers.CLIPTextConfig(
        vocab_size=40, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=12, bos_token_id=38, eos_token_id=39, pad_token_id=39,
    )  # fmt: skip
    unet = diffusers.UNet2DConditionModel(
        sample_size=8, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, cross_attention_dim=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), attention_head_dim=4,
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    diffusers.StableDiffusionPipeline(
        vae(), transformers.CLIPTextModel(text),
        transformers.CLIPTokenizer.from_pretrained(str(folder / "words"), model_max_length=12), unet,
        diffusers.DDIMScheduler(steps_offset=1, clip_sample=False), None, None, requires_safety_checker=False,
    ).save_pretrained(folder / "model")  # fmt: skip


def dit(folder: Path) -> None:
    model = diffusers.DiTTransformer2DModel(
        sample_size=8, in_channels=4, out_channels=8, num_layers=2, num_attention_heads=2, attention_head_dim=8
    )
    diffusers.DiTPipeline(model, vae(), diffusers.DDIMScheduler()).save_pretrained(folder / "model")


@pytest.mark.parametrize(("make", "precision"), [(stable_diffusion, "fp32"), (dit, "bf16")])
def test_records_distils_and_draws_in_one_pass(example, tmp_path, make, precision) -> None:
    torch.manual_seed(0)
    make(tmp_path)
    (tmp_path / "prompts.txt").write_text("a cab\ndad\n\na bed\nface\n")
    source = {"prompts": str(tmp_path / "prompts.txt")} if make is stable_diffusion else {"classes": 4}
    args = example.Arguments(
        model=str(tmp_path / "model"), out=str(tmp_path / "out"), precision=precision, sample_steps=4, keep=3,
        max_scale=6.0, record_batch=2, width=8, steps=3, batch_size=3, accumulate=2, held_out=1, test_scale=3.0,
        test_steps=2, **source,
    )  # fmt: skip
    report = example.main(args)
    out = tmp_path / "out"
    files = {p.name for p in (out / "trajectories").iterdir()}
    assert files == {"index.json", "00000.safetensors", "00001.safetensors"}
    assert all((out / f"{name}.png").is_file() for name in ("one_pass", "two_passes"))
    errors = [r for part in report["relative_error"].values() for r in part if r == r]
    assert errors
    assert all(0 < r < 1.5 for r in errors)
    model = getattr(diffusers.DiffusionPipeline.from_pretrained(str(tmp_path / "model")), "unet", None)
    if model is not None:
        loaded = PeftModel.from_pretrained(model, out / "adapter")
        assert loaded.peft_config["default"].teacher["model_class"] == "UNet2DConditionModel"
        assert loaded.peft_config["default"].max_scale == 6.0
