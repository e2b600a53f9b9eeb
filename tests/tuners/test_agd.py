"""Guidance adapters on models of diffusers and others: what they compute, and what they leave alone."""

from __future__ import annotations

import copy
import pickle
import threading
from functools import partial
from typing import Any

import adapted
import pytest
import torch
from originals import Original
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from mixadapters import AGDConfig
from mixadapters.core.layer import HookedLayer
from mixadapters.tuners.agd.layer import Trunk, waves

diffusers = pytest.importorskip("diffusers")
diffusers.logging.set_verbosity_error()
pytestmark = [pytest.mark.filterwarnings("ignore::UserWarning:peft"), pytest.mark.filterwarnings("ignore:.*torchao.*")]

KINDS = ("film", "cross_attention", "offset")
CLOSE = {"atol": 2e-5, "rtol": 2e-5}


randomize = partial(adapted.randomize, seed=0, evaluation=True)


class PlainDenoiser(nn.Module):
    """A denoiser of nobody's library: positional arguments of other names, and a tensor as output."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mixer = nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 8))

        def forward(self, h: Tensor) -> Tensor:
            return h + self.mixer(h)

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 8)
        self.labels = nn.Embedding(6, 8)
        self.blocks = nn.ModuleList(self.Block() for _ in range(2))
        self.outer = nn.Linear(8, 4)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        h = self.inner(x.flatten(2).mT.contiguous()) + self.labels(y).unsqueeze(1) + t.view(-1, 1, 1) / 1000
        for block in self.blocks:
            h = block(h)
        return self.outer(h).mT.reshape(x.shape)


def unet(**changes: Any) -> nn.Module:
    return diffusers.UNet2DConditionModel(
        **{
            "sample_size": 8, "in_channels": 4, "out_channels": 4, "block_out_channels": (8, 16),
            "layers_per_block": 1, "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"), "cross_attention_dim": 8,
            "attention_head_dim": 4, "norm_num_groups": 4, **changes,
        }
    )  # fmt: skip


def sdxl() -> nn.Module:
    return unet(
        addition_embed_type="text_time", addition_time_embed_dim=2, projection_class_embeddings_input_dim=2 * 6 + 10
    )


def dit() -> nn.Module:
    return diffusers.DiTTransformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=2, num_attention_heads=2,
        attention_head_dim=8, num_embeds_ada_norm=5,
    )  # fmt: skip


def sd3() -> nn.Module:
    return diffusers.SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=2, num_attention_heads=2,
        attention_head_dim=8, joint_attention_dim=12, caption_projection_dim=16, pooled_projection_dim=10,
        pos_embed_max_size=8,
    )  # fmt: skip


def random_weights(model: nn.Module) -> nn.Module:
    """Some of the models start as zero."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model.eval()


MODELS = {"unet": unet, "sdxl": sdxl, "dit": dit, "sd3": sd3, "plain": PlainDenoiser}
PLAIN = {"target_modules": ["mixer"], "conditions": {"timestep": "t", "class": "y"}, "num_classes": 6}


@pytest.fixture(scope="module")
def made() -> Any:
    """Factory of tiny denoisers with the same weights at every call."""
    models = {name: Original(random_weights(make())) for name, make in MODELS.items()}
    return lambda name: models[name].copy()


def inputs_of(name: str, batch: int = 3, seed: int = 0) -> dict[str, Any]:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, 4, 8, 8, generator=g)
    text, pooled = torch.randn(batch, 5, 8, generator=g), torch.randn(batch, 10, generator=g)
    if name == "plain":
        return {"x": x, "t": torch.tensor([37.0, 500.0, 999.0])[:batch], "y": torch.arange(batch)}
    if name == "dit":
        times = torch.tensor([37, 500, 999])[:batch]
        return {"hidden_states": x, "timestep": times, "class_labels": torch.arange(batch)}
    if name == "sd3":
        wide = torch.randn(batch, 5, 12, generator=g)
        times = torch.tensor([37.5, 500.25, 999.0])[:batch]
        return {"hidden_states": x, "timestep": times, "encoder_hidden_states": wide, "pooled_projections": pooled}
    inputs = {"sample": x, "timestep": 37, "encoder_hidden_states": text}
    if name == "sdxl":
        inputs["added_cond_kwargs"] = {"text_embeds": pooled, "time_ids": torch.ones(batch, 6)}
    return inputs


def run(model: nn.Module, inputs: dict[str, Any], scale: Any = None) -> Tensor:
    extra = {} if scale is None else {"guidance_scale": scale}
    with torch.no_grad():
        output = model(**inputs, **extra)
    return output if isinstance(output, Tensor) else output.sample


def adapt(model: nn.Module, name: str = "unet", **fields: Any) -> PeftModel:
    fields = {"r": 6, "max_scale": 6.0, **(PLAIN if name == "plain" else {}), **fields}
    return get_peft_model(model, AGDConfig(**fields))


# --- exactness ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("kind", KINDS)
def test_starts_as_the_base_and_is_the_base_at_scale_one_trained_or_not(made, name, kind) -> None:
    inputs = inputs_of(name)
    expected = run(made(name), inputs)
    model = adapt(made(name), name, kind=kind).eval()
    assert torch.equal(run(model, inputs, 4.0), expected)
    randomize(model)
    assert torch.equal(run(model, inputs, 1.0), expected)
    assert torch.equal(run(model, inputs, torch.ones(3)), expected)
    assert torch.equal(run(model, inputs), expected)
    guided = run(model, inputs, 4.0)
    assert all((guided[row] - expected[row]).abs().max() > 1e-3 for row in range(3))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("kind", KINDS)
def test_rows_with_their_own_scales_equal_runs_apart(made, name, kind) -> None:
    model, inputs = randomize(adapt(made(name), name, kind=kind)), inputs_of(name)
    scales = torch.tensor([1.0, 2.5, 6.0])
    together = run(model, inputs, scales)
    for row, scale in enumerate(scales):
        torch.testing.assert_close(run(model, inputs, float(scale))[row], together[row], **CLOSE)
    assert torch.equal(together[0], run(made(name), inputs)[0])


def test_effect_grows_with_the_scale_by_the_gate(made) -> None:
    """Near 1 the residual is proportional to w - 1."""
    model, inputs = randomize(adapt(made("dit"))), inputs_of("dit")
    base, little, less = (run(model, inputs, w) for w in (1.0, 1.02, 1.01))
    torch.testing.assert_close(little - base, 2 * (less - base), atol=2e-4, rtol=5e-2)


def test_without_the_gate_as_in_the_paper_scale_one_differs(made) -> None:
    model, inputs = randomize(adapt(made("dit"), gate=False)), inputs_of("dit")
    base = run(made("dit"), inputs)
    assert (run(model, inputs, 1.0) - base).abs().max() > 1e-3
    assert torch.equal(run(model, inputs), base)


@pytest.mark.parametrize("scale", [torch.ones(2) * 3, torch.ones(1) * 3, torch.ones(3, 1) * 3, torch.ones(6) * 3])
def test_scales_of_another_batch_are_refused(made, scale) -> None:
    model = adapt(made("unet"))
    with pytest.raises(ValueError, match=r"guidance_scale of shape .* does not fit a batch of 3.*one for each row"):
        run(model, inputs_of("unet"), scale)


@pytest.mark.parametrize(
    "scale",
    [
        "3",
        1j,
        True,
        ["3", "4", "5"],
        [2.0, True, 3.0],
        [None] * 3,
        torch.ones(3, dtype=torch.bool),
        torch.ones(3) * 1j,
    ],
    ids=str,
)
def test_scales_that_are_no_numbers_are_refused(made, scale) -> None:
    model, inputs = randomize(adapt(made("unet"))), inputs_of("unet")
    with pytest.raises(ValueError, match=r"guidance_scale=.* must be a number, or one for each row of the batch"):
        run(model, inputs, scale)
    held = model.base_model.context.pin(guidance_scale=scale)
    with held, pytest.raises(ValueError, match=r"guidance_scale=.* must be a number, or one for each row"):
        run(model, inputs)


def test_a_scale_on_the_meta_device_is_refused(made) -> None:
    with pytest.raises(ValueError, match="guidance_scale is on the meta device and holds no values; make it on"):
        run(adapt(made("unet")), inputs_of("unet"), torch.ones(3, device="meta"))


@pytest.mark.parametrize("interval", ["200", ("200", "800"), (200,), 200, (True, 800)], ids=str)
def test_guidance_intervals_that_are_no_pair_of_numbers_are_refused(made, interval) -> None:
    model = adapt(made("unet"))
    with pytest.raises(ValueError, match=r"guidance_interval=.* must be two numbers, the least timestep to be guided"):
        model(**inputs_of("unet"), guidance_scale=3.0, guidance_interval=interval)


def test_scale_outside_the_trained_range_warns(made) -> None:
    model = randomize(adapt(made("unet"), min_scale=1.5))
    for scale in (6.5, torch.tensor([2.0, 3.0, 8.0]), 1.2):
        with pytest.warns(UserWarning, match=r"guidance_scale=.* outside the trained range \[1.5, 6.0\]"):
            run(model, inputs_of("unet"), scale)
    for scale in (1.0, 1.5, 6.0):
        run(model, inputs_of("unet"), scale)
    with pytest.raises(ValueError, match="must be finite"):
        run(model, inputs_of("unet"), float("nan"))


def test_forward_without_a_scale_takes_the_default_and_none_is_the_base(made) -> None:
    model, inputs = randomize(adapt(made("unet"), default_scale=3.0)), inputs_of("unet")
    assert torch.equal(run(model, inputs), run(model, inputs, 3.0))
    with torch.no_grad():
        assert torch.equal(model(**inputs, guidance_scale=None).sample, run(made("unet"), inputs))


# --- formulas -----------------------------------------------------------------------------------------------------


def linear(layer: nn.Linear, x: Tensor) -> Tensor:
    return x @ layer.weight.T + (0 if layer.bias is None else layer.bias)


def mlp(layers: nn.Sequential, x: Tensor) -> Tensor:
    return linear(layers[2], F.silu(linear(layers[0], x)))


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_compute_their_formulas(made, kind) -> None:
    model, inputs = randomize(adapt(made("dit"), kind=kind)), inputs_of("dit")
    block = model.get_base_model().transformer_blocks[1].attn1
    seen: dict[str, Any] = {}
    hooks = list(block._forward_hooks)
    block.register_forward_hook(lambda m, a, k, y: seen.update(x=a[0], y=y), with_kwargs=True, prepend=True)
    block.register_forward_hook(lambda m, a, k, y: seen.update(out=y), with_kwargs=True)
    assert hooks
    scale = torch.tensor([2.0, 3.0, 5.0])
    run(model, inputs, scale)
    hosts = list(model.base_model.hosts())
    trunk, adapter = hosts[0].adapters["default"].trunk, hosts[1].adapters["default"]
    parts = [
        mlp(trunk.scale, waves(scale, (50.0, 0.25))),
        mlp(trunk.timestep, waves(inputs["timestep"].float(), (2e4 * torch.pi, 2 * torch.pi))),
        trunk.classes.weight[inputs["class_labels"]],
    ]

    def norm(h: Tensor) -> Tensor:
        return (h - h.mean(-1, keepdim=True)) / (h.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()

    x = seen["x"]
    if kind == "film":
        gamma, beta = linear(adapter.film, F.silu(norm(sum(parts)))).unsqueeze(1).chunk(2, -1)
        g = linear(adapter.up, F.silu(linear(adapter.down, x) * (1 + gamma) + beta))
    elif kind == "offset":
        g = linear(adapter.up, norm(F.relu(linear(adapter.down, sum(parts))))).unsqueeze(1)
    else:
        key, value = linear(adapter.key_value, norm(torch.stack(parts, 1))).chunk(2, -1)
        weights = (linear(adapter.query, x) @ key.mT / 6**0.5).softmax(-1)
        g = linear(adapter.up, weights @ value)
    phi = (scale - 1).view(-1, 1, 1) / 2.5
    torch.testing.assert_close(seen["out"], seen["y"] + phi * g, **CLOSE)


@pytest.mark.parametrize("kind", KINDS)
def test_padded_tokens_of_a_prompt_do_not_count(made, kind) -> None:
    model, inputs = randomize(adapt(made("unet"), kind=kind)), inputs_of("unet")
    mask = torch.tensor([[1, 1, 1, 0, 0]] * 3)
    seen = []
    trunk = next(m for m in model.modules() if isinstance(m, Trunk))
    trunk.register_forward_hook(lambda m, a, out: seen.append(out))
    other = copy.deepcopy(inputs)
    other["encoder_hidden_states"][:, 3:] = 9.0
    for given in (inputs, other):
        run(model, {**given, "encoder_attention_mask": mask}, 3.0)
    torch.testing.assert_close(seen[0].summary, seen[1].summary)
    run(model, {**other, "encoder_attention_mask": torch.ones_like(mask)}, 3.0)
    run(model, {**inputs, "encoder_attention_mask": torch.ones_like(mask)}, 3.0)
    parts = [f.tokens if kind == "cross_attention" else f.summary for f in seen[2:]]
    assert (parts[0] - parts[1]).abs().max() > 1e-2  # it is the mask that leaves them out
    if kind == "cross_attention":
        assert seen[0].mask.tolist() == [[True] * 5 + [False] * 2] * 3
        assert all(outputs_equal(model, inputs, other, mask))


def outputs_equal(model: nn.Module, inputs: dict[str, Any], other: dict[str, Any], mask: Tensor) -> list[bool]:
    """Whether each adapter adds the same for two prompts that differ only in padding."""
    deltas: list[list[Tensor]] = []
    for given in (inputs, other):
        found: list[Tensor] = []
        hooks = [
            h.adapters["default"].up.register_forward_hook(lambda m, a, y, found=found: found.append(y))
            for h in model.base_model.hosts()
        ]
        run(model, {**given, "encoder_attention_mask": mask}, 3.0)
        for hook in hooks:
            hook.remove()
        deltas.append(found)
    # later blocks may differ, as the model itself adds a finite bias at padding
    return [torch.allclose(deltas[0][0], deltas[1][0], atol=1e-5)]


def test_features_of_the_scale_are_smooth_and_survive_half_precision(made) -> None:
    def likeness(a: float, b: float) -> float:
        one, other = (waves(torch.tensor([w]), (50.0, 0.25)) for w in (a, b))
        return F.cosine_similarity(one, other).item()

    assert likeness(4, 4.001) > 0.999
    assert likeness(4, 4.02) > 0.9
    assert likeness(4, 5.1) < likeness(4, 4.02)
    model = randomize(adapt(made("dit"))).to(torch.bfloat16)
    seen = []
    next(m for m in model.modules() if isinstance(m, Trunk)).register_forward_hook(lambda m, a, out: seen.append(out))
    inputs = {**inputs_of("dit"), "hidden_states": inputs_of("dit")["hidden_states"].bfloat16()}
    for scale in (4.0, 4.001):
        run(model, inputs, scale)
    assert seen[0].summary.dtype == torch.float32
    assert not torch.equal(seen[0].summary, seen[1].summary)


# --- where adapters sit, and what they read -----------------------------------------------------------------------


def test_every_cross_attention_of_a_unet_takes_an_adapter() -> None:
    blocks = ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",), ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3
    with torch.device("meta"):
        sd = unet(
            block_out_channels=(320, 640, 1280, 1280), layers_per_block=2, down_block_types=blocks[0],
            up_block_types=blocks[1], cross_attention_dim=1024, attention_head_dim=(5, 10, 20, 20), norm_num_groups=32,
        )  # fmt: skip
        hosts = list(get_peft_model(sd, AGDConfig(r=8)).base_model.hosts())
    assert len(hosts) == 16
    assert sorted({h.out_features for h in hosts}) == [320, 640, 1280]
    assert sum(h.path.startswith("up_blocks") for h in hosts) == 9


def share(model: PeftModel) -> float:
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return trained / (sum(p.numel() for p in model.parameters()) - trained)


def test_share_of_trained_parameters_is_about_two_percent() -> None:
    with torch.device("meta"):
        big = unet(
            sample_size=128, block_out_channels=(320, 640, 1280), layers_per_block=2,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), cross_attention_dim=2048,
            attention_head_dim=(5, 10, 20), transformer_layers_per_block=(1, 2, 10), use_linear_projection=True,
            norm_num_groups=32, addition_embed_type="text_time", addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=2816,
        )  # fmt: skip
        dit_xl = diffusers.DiTTransformer2DModel()
        models = get_peft_model(big, AGDConfig(r=256)), get_peft_model(dit_xl, AGDConfig(r=160))
    assert [sum(1 for _ in m.base_model.hosts()) for m in models] == [70, 28]
    assert models[0].peft_config["default"].pooled_width == 1280
    for model in models:
        assert 0.015 < share(model) < 0.025


@pytest.mark.parametrize(
    ("name", "conditions"),
    [
        ("unet", {"timestep", "prompt", "prompt_mask"}),
        ("sdxl", {"timestep", "prompt", "prompt_mask", "pooled"}),
        ("dit", {"timestep", "class"}),
        ("sd3", {"timestep", "prompt", "pooled"}),
    ],
)
def test_adapters_read_what_the_model_is_conditioned_on(made, name, conditions) -> None:
    model, inputs = randomize(adapt(made(name))), inputs_of(name)
    assert set(model.peft_config["default"].conditions) == conditions
    seen: list[Tensor] = []
    next(m for m in model.modules() if isinstance(m, Trunk)).register_forward_hook(
        lambda m, a, out: seen.append(out.summary)
    )
    changed: dict[str, Any] = {
        "timestep": {"timestep": torch.tensor([400.0, 401.5, 402.0])},
        "class": {"class_labels": torch.tensor([3, 4, 5])},
        "prompt": {"encoder_hidden_states": inputs.get("encoder_hidden_states", torch.zeros(())) + 1},
        "pooled": {"pooled_projections": torch.ones(3, 10)},
    }
    if name == "sdxl":
        changed["pooled"] = {"added_cond_kwargs": {**inputs["added_cond_kwargs"], "text_embeds": torch.ones(3, 10)}}
    run(model, inputs, 3.0)
    for condition in conditions - {"prompt_mask"}:
        run(model, {**inputs, **changed[condition]}, 3.0)
        assert ((seen[-1] - seen[0]).abs().amax(1) > 1e-3).all(), condition


def test_missing_conditions_are_refused(made) -> None:
    model, inputs = randomize(adapt(made("dit"))), inputs_of("dit")
    inputs["class_labels"] = None
    with pytest.raises((ValueError, AttributeError, TypeError), match="class_labels"):
        model(**inputs, guidance_scale=3.0)
    with pytest.raises(ValueError, match=r"takes no 'label'; it takes \['hidden_states', 'timestep', 'class_labels'"):
        adapt(made("dit"), conditions={"class": "label"})
    with pytest.raises(ValueError, match="does not tell num_classes; pass it"):
        adapt(made("plain"), target_modules=["mixer"], conditions={"class": "y"}, num_classes=None)
    with pytest.raises(ValueError, match=r"'klass' is unknown.*Did you mean 'class'"):
        AGDConfig(conditions={"klass": "y"})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kind": "flim"}, "kind='flim' is unknown.*Did you mean 'film'"),
        ({"r": 0}, "`r` should be a positive integer"),
        ({"max_scale": 1.0}, "a range that ends above 1"),
        ({"min_scale": 7.0, "max_scale": 6.0}, "a range that ends above 1"),
        ({"default_scale": float("inf")}, "default_scale=inf must be a finite number"),
        ({"default_scale": 50.0}, "default_scale=50.0 was not trained: it must be 1, .* between min_scale=1.0 and"),
        ({"min_scale": 3.0, "default_scale": 2.0}, "default_scale=2.0 was not trained"),
        ({"r": 4, "width": 3}, "AGDConfig has no field 'width'"),
    ],
)
def test_bad_fields_are_refused(fields, message) -> None:
    with pytest.raises(ValueError, match=message):
        AGDConfig(**fields)


def test_default_scale_is_one_or_was_trained() -> None:
    for fields in ({"min_scale": 3.0}, {"min_scale": 3.0, "default_scale": 12.0}, {"default_scale": 4.5}):
        assert AGDConfig(**fields).max_scale == 12.0
    # Earlier versions saved others, and warned in each forward.
    assert AGDConfig(peft_type="AGD", default_scale=50.0).default_scale == 50.0


@pytest.mark.parametrize("timestep", [37, 37.0, torch.tensor(37), torch.tensor([37]), torch.full((3,), 37.0)])
def test_timesteps_may_be_numbers_or_tensors(made, timestep) -> None:
    model, inputs = randomize(adapt(made("unet"))), inputs_of("unet")
    torch.testing.assert_close(run(model, {**inputs, "timestep": timestep}, 3.0), run(model, inputs, 3.0), **CLOSE)


def test_guidance_interval_is_a_scale_of_one_elsewhere(made) -> None:
    model, inputs = randomize(adapt(made("dit"))), inputs_of("dit")  # timesteps 37, 500, 999
    with torch.no_grad():
        within = model(**inputs, guidance_scale=4.0, guidance_interval=(100, 900)).sample
    base, guided = run(model, inputs, 1.0), run(model, inputs, 4.0)
    assert torch.equal(within[0], base[0])
    assert torch.equal(within[2], base[2])
    torch.testing.assert_close(within[1], guided[1], **CLOSE)


def test_both_ends_of_an_interval_are_guided(made) -> None:
    from mixadapters.tuners.agd import scale_at

    model, inputs = randomize(adapt(made("dit"))), inputs_of("dit")  # timesteps 37, 500, 999
    with torch.no_grad():
        ends = model(**inputs, guidance_scale=4.0, guidance_interval=(37, 500)).sample
        inner = model(**inputs, guidance_scale=4.0, guidance_interval=(37.5, 499.5)).sample
    base, guided = run(model, inputs, 1.0), run(model, inputs, 4.0)
    torch.testing.assert_close(ends[:2], guided[:2], **CLOSE)
    assert all((ends[row] - base[row]).abs().max() > 1e-3 for row in range(2))
    assert torch.equal(ends[2], base[2])
    assert torch.equal(inner, base)
    scales = scale_at(torch.full((3,), 4.0), torch.tensor([37.0, 500.0, 999.0]), (37, 500))  # of the teacher
    assert scales.tolist() == [4.0, 4.0, 1.0]


def test_timesteps_of_other_units_are_brought_to_a_thousand(made) -> None:
    inputs = inputs_of("plain")
    seen: list[Tensor] = []
    for scale, times in ((1.0, inputs["t"]), (1000.0, inputs["t"] / 1000), (1.0, inputs["t"] / 1000)):
        model = randomize(adapt(made("plain"), "plain", timestep_scale=scale))
        trunk = next(m for m in model.modules() if isinstance(m, Trunk))
        trunk.register_forward_hook(lambda m, a, out: seen.append(out.summary))
        run(model, {**inputs, "t": times}, 3.0)
    thousand, units, unscaled = seen
    torch.testing.assert_close(units, thousand, atol=1e-3, rtol=1e-3)
    assert ((unscaled - thousand).abs().amax(1) > 1e-2).all()


def test_trunk_runs_once_per_forward_and_rests_without_a_scale(made) -> None:
    model, inputs = randomize(adapt(made("unet"))), inputs_of("unet")
    trunks = [m for m in model.modules() if isinstance(m, Trunk)]
    calls: list[int] = []
    trunks[0].register_forward_hook(lambda *_: calls.append(1))
    run(model, inputs, 3.0)
    assert (len(trunks), len(calls)) == (1, 1)
    run(model, inputs)
    with model.disable_adapter():
        run(model, inputs, 3.0)
    assert len(calls) == 1


# --- beside others ------------------------------------------------------------------------------------------------


def lora(**fields: Any) -> LoraConfig:
    return LoraConfig(r=2, target_modules=["to_q", "to_k", "to_v", "to_out.0"], init_lora_weights=False, **fields)


@pytest.fixture
def lora_file(made) -> dict[str, Tensor]:
    """What a LoRA file of the UNet holds."""
    torch.manual_seed(1)
    styled = made("unet")
    styled.add_adapter(lora(), adapter_name="style")
    return {k: v.clone() for k, v in get_peft_model_state_dict(styled, adapter_name="style").items()}


def test_keys_of_the_base_stay_and_a_checkpoint_of_it_loads(made) -> None:
    for name in MODELS:
        base = made(name)
        keys = list(base.state_dict())
        model = adapt(base, name)
        assert [k for k in base.state_dict() if ".mixadapters." not in k] == keys
        missing, unexpected = base.load_state_dict(made(name).state_dict(), strict=False)
        assert not unexpected
        assert all(".mixadapters.agd_adapters.default." in k for k in missing)
        assert all(isinstance(h, HookedLayer) for h in model.base_model.hosts())


def test_lora_file_loaded_afterwards_loads_whole(made, lora_file) -> None:
    inputs = inputs_of("unet")
    plain = made("unet")
    plain.load_lora_adapter(dict(lora_file), prefix=None, adapter_name="style")
    expected = run(plain, inputs)
    base = made("unet")
    model = randomize(adapt(base))
    guided = run(base, inputs, 4.0)
    base.load_lora_adapter(dict(lora_file), prefix=None, adapter_name="style")
    assert sum("lora_" in name for name, _ in base.named_parameters()) == len(lora_file) == 112
    assert torch.equal(run(base, inputs, 1.0), expected)
    both = run(base, inputs, 4.0)
    assert (both - guided).abs().max() > 1e-3
    assert (both - expected).abs().max() > 1e-3

    # Verbs of diffusers for its own adapters.
    base.set_adapters(["style"], weights=[0.0])
    torch.testing.assert_close(run(base, inputs, 4.0), guided, **CLOSE)
    base.set_adapters(["style"], weights=[1.0])
    torch.testing.assert_close(run(base, inputs, 4.0), both, **CLOSE)
    base.fuse_lora()
    torch.testing.assert_close(run(base, inputs, 4.0), both, atol=1e-4, rtol=1e-4)
    base.unfuse_lora()
    base.delete_adapters("style")
    assert all(h.active_adapters == ["default"] for h in model.base_model.hosts())
    torch.testing.assert_close(run(base, inputs, 4.0), guided, atol=1e-4, rtol=1e-4)


def test_adapters_on_a_model_that_has_a_lora_read_its_stream(made, lora_file) -> None:
    inputs = inputs_of("unet")
    styled = made("unet")
    styled.load_lora_adapter(dict(lora_file), prefix=None, adapter_name="style")
    expected = run(styled, inputs)
    model = randomize(adapt(styled))
    assert torch.equal(run(styled, inputs, 1.0), expected)
    other = made("unet")
    randomize(adapt(other))
    other.load_lora_adapter(dict(lora_file), prefix=None, adapter_name="style")
    torch.testing.assert_close(run(styled, inputs, 4.0), run(other, inputs, 4.0), **CLOSE)
    assert {h.in_features for h in model.base_model.hosts()} == {8, 16}


def test_other_attention_processors_do_not_disturb(made) -> None:
    """As loading an IP-Adapter does: it puts its own processors in place of the model's."""
    from diffusers.models.attention_processor import AttnProcessor

    base, inputs = made("unet"), inputs_of("unet")
    model = randomize(adapt(base))
    guided = run(base, inputs, 4.0)
    base.set_attn_processor(AttnProcessor())
    torch.testing.assert_close(run(base, inputs, 4.0), guided, **CLOSE)
    assert torch.equal(run(base, inputs, 1.0), run(model, inputs))


def test_residuals_of_a_controlnet_pass_through(made) -> None:
    base, inputs = made("unet"), inputs_of("unet")
    residual = torch.randn(3, 16, 4, 4)
    expected = run(base, {**inputs, "mid_block_additional_residual": residual})
    model = randomize(adapt(base))
    assert torch.equal(run(model, {**inputs, "mid_block_additional_residual": residual}, 1.0), expected)
    assert (run(model, {**inputs, "mid_block_additional_residual": residual}, 3.0) - expected).abs().max() > 1e-3


def test_controlnet_is_made_from_a_copy_without_the_adapters(made) -> None:
    """As the documentation says: diffusers loads the state of whole blocks, adapters and all."""
    expected = diffusers.ControlNetModel.from_unet(made("unet"), conditioning_channels=3).state_dict()
    model = randomize(adapt(made("unet")))
    with pytest.raises(RuntimeError, match=r"Unexpected key.*agd_adapters"):
        diffusers.ControlNetModel.from_unet(model.get_base_model())
    found = diffusers.ControlNetModel.from_unet(copy.deepcopy(model).unload(), conditioning_channels=3).state_dict()
    assert found.keys() == expected.keys()
    shared = [key for key in expected if key.startswith(("conv_in", "time_embedding", "down_blocks", "mid_block"))]
    assert shared
    assert all(torch.equal(found[key], expected[key]) for key in shared)
    assert not torch.equal(run(model, inputs_of("unet"), 4.0), run(made("unet"), inputs_of("unet")))


@pytest.mark.parametrize("name", MODELS)
def test_unloading_restores_the_model_bit_for_bit(made, name) -> None:
    base, inputs = made(name), inputs_of(name)
    keys, expected = list(base.state_dict()), run(base, inputs)
    model = randomize(adapt(base, name))
    assert not torch.equal(run(model, inputs, 4.0), expected)
    bare = model.unload()
    assert bare is base
    assert list(bare.state_dict()) == keys
    assert torch.equal(run(bare, inputs), expected)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in bare.modules())
    with pytest.raises(ValueError, match="cannot merge"):
        adapt(made(name), name).merge_and_unload()


def test_diffusers_adds_the_adapter_itself(made) -> None:
    base, inputs = made("unet"), inputs_of("unet")
    expected = run(base, inputs)
    base.add_adapter(AGDConfig(r=6), adapter_name="guide")
    randomize(base)
    guided = run(base, inputs, 4.0)
    assert (guided - expected).abs().max() > 1e-3
    assert base.active_adapters() == ["guide"]
    base.disable_adapters()
    assert torch.equal(run(base, inputs, 4.0), expected)
    base.enable_adapters()
    assert torch.equal(run(base, inputs, 4.0), guided)
    weights = get_peft_model_state_dict(base, adapter_name="guide")
    other = made("unet")
    other.add_adapter(AGDConfig(r=6), adapter_name="guide")
    result = set_peft_model_state_dict(other, weights, adapter_name="guide")
    assert not result.unexpected_keys
    assert torch.equal(run(other, inputs, 4.0), guided)
    base.delete_adapters("guide")
    assert torch.equal(run(base, inputs), expected)


def test_two_adapters_take_turns_and_share_a_batch(made) -> None:
    model, inputs = adapt(made("dit")), inputs_of("dit")
    model.add_adapter("other", AGDConfig(r=4, kind="offset"))
    randomize(model)
    alone = {}
    for name in ("default", "other"):
        model.set_adapter(name)
        alone[name] = run(model, inputs, 4.0)
    assert (alone["default"] - alone["other"]).abs().max() > 1e-3
    with torch.no_grad():
        mixed = model(**inputs, guidance_scale=4.0, adapter_names=["default", "__base__", "other"]).sample
    torch.testing.assert_close(mixed[0], alone["default"][0], **CLOSE)
    assert torch.equal(mixed[1], run(made("dit"), inputs)[1])
    torch.testing.assert_close(mixed[2], alone["other"][2], **CLOSE)


# --- files --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_file_holds_the_adapters_and_what_they_were_made_for(made, name, tmp_path) -> None:
    inputs = inputs_of(name)
    teacher = {"rule": "classifier_free", "plan": {"scales": [1, 6]}}
    model = randomize(adapt(made(name), name, teacher=teacher))
    guided = run(model, inputs, 4.0)
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "adapter_model.safetensors")
    assert all(".agd_adapters." in key for key in stored)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert sum(value.numel() for value in stored.values()) == trained
    loaded = PeftModel.from_pretrained(made(name), tmp_path)
    assert torch.equal(run(loaded, inputs, 4.0), guided)
    config = loaded.peft_config["default"]
    assert config.teacher == teacher
    assert config.base_class == type(made(name)).__name__
    assert (config.min_scale, config.max_scale) == (1.0, 6.0)


def test_adapter_loads_on_other_weights_of_its_class_and_on_no_other_class(made, tmp_path) -> None:
    randomize(adapt(made("unet"))).save_pretrained(tmp_path)
    derived, inputs = random_weights(unet()), inputs_of("unet")
    with torch.no_grad():
        derived.conv_in.weight.mul_(1.5)
    expected = run(derived, inputs)
    model = PeftModel.from_pretrained(derived, tmp_path)
    assert torch.equal(run(model, inputs, 1.0), expected)
    assert (run(model, inputs, 4.0) - expected).abs().max() > 1e-3
    with pytest.raises(ValueError, match=r"base_class='UNet2DConditionModel'.*not for a 'DiTTransformer2DModel'"):
        PeftModel.from_pretrained(made("dit"), tmp_path)


def test_one_config_serves_several_models(made) -> None:
    config = AGDConfig(r=6)
    first, second = get_peft_model(made("unet"), config), get_peft_model(made("dit"), config)
    assert first.peft_config["default"].base_class == "UNet2DConditionModel"
    assert second.peft_config["default"].base_class == "DiTTransformer2DModel"


# --- copies, precision, memory, threads ---------------------------------------------------------------------------


def test_copies_and_pickles_have_adapters_and_trunk_of_their_own(made) -> None:
    model, inputs = randomize(adapt(made("unet"))), inputs_of("unet")
    guided = run(model, inputs, 4.0)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(run(twin, inputs, 4.0), guided)
        randomize(twin, seed=1)
        assert not torch.equal(run(twin, inputs, 4.0), guided)
        assert torch.equal(run(model, inputs, 4.0), guided)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cast_adapters", [False, True])
def test_half_precision_bases_run_with_adapters_of_either_precision(made, dtype, kind, cast_adapters) -> None:
    inputs = inputs_of("dit")
    exact = run(randomize(adapt(made("dit"), kind=kind)), inputs, 4.0)
    base = made("dit").to(dtype)
    model = randomize(adapt(base, kind=kind))
    assert all(p.dtype == torch.float32 for n, p in model.named_parameters() if "agd_" in n)
    if cast_adapters:
        model.to(dtype)
    inputs = {**inputs, "hidden_states": inputs["hidden_states"].to(dtype)}
    out = run(model, inputs, 4.0)
    assert out.dtype == dtype
    assert (out.float() - exact).abs().max() < 0.1 * exact.abs().max()
    assert torch.equal(run(model, inputs, 1.0), run(made("dit").to(dtype), inputs))


def test_gradients_under_checkpointing_are_those_without(made) -> None:
    for name in ("unet", "dit", "sd3"):
        model, inputs = randomize(adapt(made(name))), inputs_of(name)

        def gradients(model: Any = model, inputs: Any = inputs) -> dict[str, Tensor]:
            scales = [torch.tensor(w) for w in ([2.0, 3.0, 1.0], [5.0, 1.5, 2.0])]
            outputs = [model(**inputs, guidance_scale=scale).sample for scale in scales]
            (outputs[0] - 2 * outputs[1]).square().mean().backward()
            found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
            model.zero_grad()
            return found

        plain = gradients()
        model.get_base_model().enable_gradient_checkpointing()
        again = gradients()
        assert any("trunk" in key for key in plain)
        assert plain.keys() == again.keys()
        for key, value in plain.items():
            torch.testing.assert_close(again[key], value, msg=key, **CLOSE)


def test_training_leaves_the_frozen_model_without_dropout(made) -> None:
    model = adapt(made("dit")).train()
    inputs = inputs_of("dit")
    torch.manual_seed(0)
    outputs = [model(**inputs).sample for _ in range(4)]  # DiT would drop labels, in each block on its own
    assert all(torch.equal(outputs[0], other) for other in outputs[1:])
    assert all(h.training for h in model.base_model.hosts())
    assert model.get_base_model().training


def test_weights_on_the_disk_or_cpu_are_loaded_when_used(made) -> None:
    from accelerate import cpu_offload

    model, inputs = randomize(adapt(made("dit"))), inputs_of("dit")
    expected = run(model, inputs, 4.0)
    cpu_offload(model, execution_device="cpu")
    assert any(p.is_meta for n, p in model.named_parameters() if "agd_" in n)
    torch.testing.assert_close(run(model, inputs, 4.0), expected, **CLOSE)


def test_threads_have_their_own_scale(made) -> None:
    model, inputs = randomize(adapt(made("dit"))), inputs_of("dit")
    context = model.base_model.context
    scales = (2.0, 3.0, 4.0, 5.0)
    expected = {w: run(model, inputs, w) for w in scales}
    wrong: list[float] = []

    def work(w: float) -> None:
        with context.pin_in_thread(guidance_scale=w):
            for _ in range(5):
                if not torch.equal(run(model, inputs), expected[w]):
                    wrong.append(w)

    threads = [threading.Thread(target=work, args=(w,)) for w in scales]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert torch.equal(run(model, inputs), run(made("dit"), inputs))


# --- compiling ----------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_in_one_graph_and_not_again_when_the_scale_changes() -> None:
    from torch._dynamo.testing import CompileCounterWithBackend

    one_level = {"down_block_types": ("CrossAttnDownBlock2D",), "up_block_types": ("CrossAttnUpBlock2D",)}
    model = randomize(adapt(random_weights(unet(block_out_channels=(8,), **one_level))))
    inputs = inputs_of("unet")
    inputs["timestep"] = torch.tensor([37, 500, 999])
    counter = CompileCounterWithBackend("eager")
    base = model.get_base_model()
    compiled = torch.compile(base, backend=counter, fullgraph=True)
    context = model.base_model.context
    for scale in (2.0, 3.0, 5.5):
        rows = torch.full((3,), scale)
        with context.pin_in_thread(guidance_scale=rows):
            torch.testing.assert_close(run(compiled, inputs), run(base, inputs, scale), **CLOSE)
        torch.testing.assert_close(run(compiled, inputs, rows), run(base, inputs, scale), **CLOSE)
        if scale == 2.0:
            first = counter.frame_count
    assert counter.frame_count == first


@pytest.mark.usefixtures("fresh_compiler")
def test_compiling_the_repeated_blocks_alone(made) -> None:
    model, inputs = randomize(adapt(made("unet"))), inputs_of("unet")
    expected = [run(model, inputs, w) for w in (1.0, 3.0, 5.0)]
    model.get_base_model().compile_repeated_blocks(backend="eager", fullgraph=True)
    for w, output in zip((1.0, 3.0, 5.0), expected, strict=True):
        torch.testing.assert_close(run(model, inputs, w), output, **CLOSE)


def test_a_block_by_itself_has_nothing_that_guidance_could_act_by(tiny) -> None:
    model = get_peft_model(tiny("llama"), AGDConfig(r=4)).eval()
    base, x = model.get_base_model(), torch.randn(2, 5, 32)
    places = base.model.rotary_emb(x, torch.arange(5)[None])
    with (
        model.base_model.context.pin(guidance_scale=2.0),
        pytest.raises(
            ValueError, match=r"guidance_scale=2.0 acts by what the model's forward is given.*call the model"
        ),
    ):
        base.model.layers[0](x, position_embeddings=places)
    assert torch.isfinite(base.model.layers[0](x, position_embeddings=places)).all()
