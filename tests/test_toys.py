"""How much a new router and a new method need, and that three methods of other shapes fit the core as it is."""

from __future__ import annotations

import copy
import inspect
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import adapted
import pytest
import torch
import transformers
from adapted import gradients
from originals import Original
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import StaticCache

from mixadapters import ROUTERS, ForwardContext, MixtureModel, Router, kernels, register
from mixadapters.core.adapter import Adapter, Site
from mixadapters.core.bank import AdapterBank
from mixadapters.core.config import MixtureConfig
from mixadapters.core.layer import HookedLayer
from mixadapters.core.mixture import Mixture
from mixadapters.core.routing import Routing
from mixadapters.routers import build_router
from mixadapters.tuners.registration import peft_type

transformers.logging.set_verbosity_error()
pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning:transformers"),
    pytest.mark.filterwarnings("ignore::UserWarning:peft"),
]
CLOSE = {"atol": 2e-5, "rtol": 2e-5}


randomize = partial(adapted.randomize, scale=0.2, seed=0)


def assert_same_gradients(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, gradient in one.items():
        torch.testing.assert_close(gradient, other[name], msg=lambda m, n=name: f"{n}: {m}", **CLOSE)
    assert any(g.abs().max() > 1e-4 for g in one.values())


# --- a router ----------------------------------------------------------------------------------------------------


@ROUTERS.register("toy_top_k")
class TopKRouter(Router):
    """The k experts with the largest scores, weighted by their share of the probability."""

    def __init__(self, in_features: int, experts: list[str], k: int = 1) -> None:
        super().__init__(in_features, experts)
        self.k = k
        self.score = nn.Linear(in_features, len(experts), bias=False)

    def forward(self, tokens: Tensor, context: ForwardContext) -> Routing:
        probs = self.score(tokens.reshape(-1, self.in_features)).softmax(-1, dtype=torch.float32)
        weights, indices = probs.topk(self.k)
        return Routing(indices, weights.to(tokens.dtype), probs=probs)


def test_router_is_one_class_named_in_a_config() -> None:
    assert len(inspect.getsource(TopKRouter).splitlines()) <= 30
    names = ["a", "b", "c"]
    bank = AdapterBank(6, 5)
    for name in names:
        bank.add(name, 4, init_weights=False)
    router = build_router({"kind": "toy_top_k", "k": 2}, 6, names)
    mixture = Mixture(router, bank)
    x, y = torch.randn(2, 3, 6), torch.randn(2, 3, 5)
    out = mixture(x, y, ForwardContext())
    probs = router.score(x).softmax(-1)
    expected = y.clone()
    for place in ((b, t) for b in range(2) for t in range(3)):
        for e in probs[place].argsort(descending=True)[:2].tolist():
            expert = bank.experts[names[e]]
            expected[place] += probs[place][e] * expert.up(F.gelu(expert.down(x[place])))
    torch.testing.assert_close(out, expected)
    out.sum().backward()
    assert router.score.weight.grad.abs().max() > 0


# --- a method ----------------------------------------------------------------------------------------------------


@dataclass
class ToyConfig(MixtureConfig):
    stages: ClassVar[dict[str, tuple[str, ...]]] = {"experts": ("bank.*",), "router": ("router.*", "modules_to_save")}

    r: int = 4
    num_experts: int = 3
    router: str | dict[str, Any] = "toy_top_k"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = peft_type("TOY")


class ToyModel(MixtureModel):
    def roles(self, config: ToyConfig) -> tuple[str, ...]:
        return ("ffn_output",)

    def build(self, config: ToyConfig, site: Site) -> Adapter:
        names = [f"expert{i}" for i in range(config.num_experts)]
        bank = AdapterBank(site.in_features, site.out_features, activation="silu")
        for name in names:
            bank.add(name, self.rank_at(config, site.path, config.r), config.init_weights)
        return Mixture(build_router(config.router, site.in_features, names), bank, observes=True)


register("toy", ToyConfig, ToyModel)


def test_method_is_a_config_and_a_model_of_few_lines() -> None:
    assert sum(len(inspect.getsource(part).splitlines()) for part in (ToyConfig, ToyModel)) <= 40


@pytest.mark.parametrize("kind", ["llama", "bert", "t5"])
def test_method_trains_saves_loads_and_generates(tiny, tiny_inputs, tmp_path, kind) -> None:
    inputs = tiny_inputs(kind, padding="left" if kind == "llama" else "right")
    base = tiny(kind).requires_grad_(False)
    expected = base(**inputs).logits
    config = ToyConfig(router={"kind": "toy_top_k", "k": 2}, rank_pattern={r".*\.1\..*": 7})
    model = get_peft_model(base, config).eval()
    assert torch.equal(model(**inputs).logits, expected)
    ranks = {h.adapters["default"].bank.experts["expert0"].rank for h in model.base_model.hosts()}
    assert ranks == {4, 7}

    model.base_model.set_stage("router")
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained
    assert all(".router.score.weight" in n for n in trained)
    model.base_model.set_stage("experts")
    model.train()(**inputs).logits.square().mean().backward()
    assert {n.split(".bank.")[1].split(".")[2] for n in gradients(model)} == {"down", "up"}

    randomize(model).eval()
    expected = model(**inputs).logits
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny(kind), tmp_path)
    assert loaded.peft_config["default"].router == {"kind": "toy_top_k", "k": 2}
    assert torch.equal(loaded(**inputs).logits, expected)
    if kind != "bert":
        inputs.pop("decoder_input_ids", None)
        settings = {"max_new_tokens": 5, "min_new_tokens": 5, "num_beams": 2, "do_sample": False}
        generated = loaded.generate(**inputs, **settings)
        assert torch.equal(generated, model.generate(**inputs, **settings, use_cache=False))
    with pytest.raises(ValueError, match=r"unknown router 'toy_top'.*Did you mean 'toy_top_k'"):
        get_peft_model(tiny(kind), ToyConfig(router="toy_top"))


def test_method_mixes_its_adapters_in_a_batch(tiny, tiny_inputs, monkeypatch) -> None:
    model = get_peft_model(tiny("llama"), ToyConfig(), adapter_name="first")
    model.add_adapter("second", ToyConfig(num_experts=2, r=6, router={"kind": "toy_top_k", "k": 2}))
    randomize(model).eval()
    inputs = tiny_inputs("llama", batch=3)
    calls: list[int] = []
    plain = kernels.lowrank
    monkeypatch.setattr(kernels, "lowrank", lambda *a, **k: calls.append(1) or plain(*a, **k))
    together = model(**inputs, adapter_names=["second", "first", "__base__"]).logits
    assert len(calls) == 4
    for row, name in enumerate(("second", "first")):
        model.set_adapter(name)
        torch.testing.assert_close(together[row], model(**inputs).logits[row], **CLOSE)


# --- hard routing by modality, a gate on attention values --------------------------------------------------------


def modality_ids(context: ForwardContext) -> Tensor:
    """(B, T) ids of the tokens of this forward: a prompt's ids, cut by the cache, repeated for beams; then text, 0."""
    ids, stream = context.record.values["modality_ids"], context.stream()
    padded = F.pad(ids.repeat_interleave(stream.batch // ids.shape[0], 0), (0, 1))
    position = torch.arange(stream.length) + stream.past
    return padded.index_select(1, position.clamp_max(ids.shape[1]))


@ROUTERS.register("toy_modality")
class ModalityRouter(Router):
    def forward(self, tokens: Tensor, context: ForwardContext) -> Routing:
        return Routing(modality_ids(context).reshape(-1, 1))


class ValueGate(Adapter):
    """Scales the values of tokens that are no text, head by head, by a tanh that starts at zero."""

    def __init__(self, in_features: int, heads: int) -> None:
        super().__init__()
        self.gate = nn.Linear(in_features, heads, bias=False)
        nn.init.zeros_(self.gate.weight)

    def forward(self, x: Tensor, y: Tensor, context: ForwardContext) -> Tensor:
        gate = self.gate(x).tanh().repeat_interleave(y.shape[-1] // self.gate.out_features, dim=-1)
        return torch.where(modality_ids(context).unsqueeze(-1) > 0, y * gate, y)


@dataclass
class ModalityConfig(MixtureConfig):
    stages: ClassVar[dict[str, tuple[str, ...]]] = {"align": ("bank.experts.image.*",), "tune": ("*",)}
    needs: ClassVar[frozenset[str]] = frozenset({"modality_ids"})

    r: int = 4
    modalities: tuple[str, ...] = ("text", "image")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = peft_type("MODALITY")


class ModalityModel(MixtureModel):
    fields = ("modality_ids",)

    def roles(self, config: ModalityConfig) -> tuple[str, ...]:
        return ("attention_norm", "ffn_norm", "value")

    def build(self, config: ModalityConfig, site: Site) -> Adapter:
        if site.role == "value":
            return ValueGate(site.in_features, self.model.config.num_key_value_heads)
        kind, names = ("toy_modality", config.modalities) if site.role == "ffn_norm" else ("single", ["all"])
        bank = AdapterBank(site.in_features, site.out_features, activation="silu", glu=True, bias=False)
        for name in names:
            bank.add(name, config.r, config.init_weights)
        return Mixture(build_router(kind, site.in_features, list(names)), bank, "sequential")


register("modality", ModalityConfig, ModalityModel)


def modality_model(tiny, **config: Any) -> PeftModel:
    return get_peft_model(tiny("llama"), ModalityConfig(**config)).eval()


def test_modality_method_starts_as_the_base_on_text_and_erases_the_values_of_images(tiny, tiny_inputs) -> None:
    inputs = tiny_inputs("llama")
    expected = tiny("llama")(**inputs).logits
    model = modality_model(tiny)
    text = torch.zeros_like(inputs["input_ids"])
    assert torch.equal(model(**inputs, modality_ids=text).logits, expected)
    images = text.clone()
    images[:, 2:4] = 1
    values: list[Tensor] = []
    projection = model.get_base_model().model.layers[0].self_attn.v_proj
    projection.register_forward_hook(lambda m, args, y: values.append(y))
    model(**inputs, modality_ids=text)
    model(**inputs, modality_ids=images)
    assert (values[1][:, 2:4] == 0).all()
    assert torch.equal(values[1][:, :2], values[0][:, :2])


def test_modality_method_computes_its_formulas(tiny, tiny_inputs) -> None:
    model = randomize(modality_model(tiny))
    layer = model.get_base_model().model.layers[1]
    inputs, seen = tiny_inputs("llama"), {}
    ids = torch.tensor([[0, 1, 1, 0, 0, 0, 0], [0, 0, 0, 1, 1, 1, 0]])
    for name in ("input_layernorm", "post_attention_layernorm", "self_attn.v_proj"):
        module = layer.get_submodule(name)
        module.base_layer.register_forward_hook(lambda m, a, y, n=name: seen.update({f"{n} frozen": (a[0], y)}))
        module.register_forward_hook(lambda m, a, y, n=name: seen.update({n: y}))
    model(**inputs, modality_ids=ids)

    def glu(expert: nn.Module, z: Tensor) -> Tensor:
        return expert.up(F.silu(expert.gate(z)) * expert.down(z))

    norm = layer.input_layernorm.adapters["default"].bank.experts["all"]
    n = seen["input_layernorm frozen"][1]
    torch.testing.assert_close(seen["input_layernorm"], n + glu(norm, n), **CLOSE)
    u, v = seen["self_attn.v_proj frozen"]
    torch.testing.assert_close(u, seen["input_layernorm"])
    gate = layer.self_attn.v_proj.adapters["default"].gate(u).tanh().repeat_interleave(8, -1)
    torch.testing.assert_close(seen["self_attn.v_proj"], torch.where(ids.bool().unsqueeze(-1), v * gate, v), **CLOSE)
    experts = layer.post_attention_layernorm.adapters["default"].bank.experts
    m = seen["post_attention_layernorm frozen"][1]
    chosen = torch.where(ids.bool().unsqueeze(-1), glu(experts["image"], m), glu(experts["text"], m))
    torch.testing.assert_close(seen["post_attention_layernorm"], m + chosen, **CLOSE)


@torch.no_grad()
@pytest.mark.parametrize("static", [False, True])
def test_modality_of_a_prompt_is_pinned_over_a_generation(tiny, tiny_inputs, static) -> None:
    model = randomize(modality_model(tiny))
    context = model.base_model.context
    inputs = tiny_inputs("llama", batch=2, length=6, padding="left")
    ids = torch.tensor([[0, 1, 1, 0, 1, 0], [0, 0, 1, 1, 0, 0]])
    settings = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    settings |= {"cache_implementation": "static", "disable_compile": True} if static else {"num_beams": 2}
    with context.pin(modality_ids=ids):
        generated = model.generate(**inputs, **settings)
        again = model.generate(**inputs, **{**settings, "use_cache": False, "cache_implementation": None})
    assert torch.equal(generated, again)
    with context.pin(modality_ids=torch.zeros_like(ids)):
        assert not torch.equal(model.generate(**inputs, **settings), generated)
    alone = {k: v[1:, 1:] for k, v in inputs.items()}
    with context.pin(modality_ids=ids[1:, 1:]):
        assert torch.equal(model.generate(**alone, **settings)[0], generated[1, 1:])
    cache = StaticCache(config=model.config, max_cache_len=12)
    tokens = generated[:, :9]
    mask = F.pad(inputs["attention_mask"], (0, 3), value=1)
    expected = model(input_ids=tokens, attention_mask=mask, modality_ids=F.pad(ids, (0, 3)), use_cache=False).logits
    with context.pin(modality_ids=ids):
        pieces = [
            model(input_ids=tokens[:, a:b], attention_mask=mask[:, :b], past_key_values=cache).logits
            for a, b in ((0, 4), (4, 8), (8, 9))
        ]
    torch.testing.assert_close(torch.cat(pieces, 1)[1, 1:], expected[1, 1:], **CLOSE)


def test_modality_method_trains_under_checkpointing_and_refuses_to_merge(tiny, tiny_inputs) -> None:
    model = randomize(modality_model(tiny)).train()
    inputs = tiny_inputs("llama")
    first, second = torch.randint(0, 2, (2, 2, 7))

    def run() -> dict[str, Tensor]:
        losses = [model(**inputs, modality_ids=ids).logits.square().mean() for ids in (first, second)]
        (losses[0] - losses[1]).backward()
        return gradients(model)

    plain = run()
    model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
    assert_same_gradients(run(), plain)
    with pytest.raises(ValueError, match="cannot be merged: ValueGate is not a linear map"):
        model.merge_and_unload()


# --- one delta, its entries dealt to owners, one owner drawn per forward -----------------------------------------


class Split(Adapter):
    """W0 + D * (owner == i) for the drawn owner i in training, W0 + D / N in evaluation; here W0 = 0, D = up."""

    def __init__(self, site: Site, config: SplitConfig) -> None:
        super().__init__()
        self.down = nn.Linear(site.in_features, config.r, bias=False)
        self.up = nn.Linear(config.r, site.out_features, bias=False)
        if config.init_weights:
            nn.init.zeros_(self.up.weight)
        entries = self.up.weight.numel()
        order = torch.randperm(entries, generator=torch.Generator().manual_seed(config.seed)).argsort()
        owner = order * config.num_experts // entries
        self.register_buffer("owner", owner.view_as(self.up.weight).to(torch.uint8))
        self.register_buffer("draws", torch.zeros((), dtype=torch.long))
        self.seed, self.num_experts = config.seed, config.num_experts

    def prepare(self, context: ForwardContext) -> None:
        if context.record.training:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + int(self.draws))
            drawn = torch.randint(self.num_experts, (), generator=generator)
            context.record.shared[f"owner {id(self)}"] = drawn
            self.draws += 1

    def weight(self, drawn: Tensor | None) -> Tensor:
        up = self.up.weight
        return up / self.num_experts if drawn is None else up * (self.owner == drawn)

    def forward(self, x: Tensor, y: Tensor, context: ForwardContext) -> Tensor:
        up = self.weight(context.record.shared.get(f"owner {id(self)}"))
        out = kernels.lowrank(
            x.reshape(-1, x.shape[-1]), self.down.weight, up, [up.shape[1]], base=y.reshape(-1, y.shape[-1]),
            act="identity",
        )  # fmt: skip
        return out.view_as(y)

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return weight + self.weight(None) @ self.down.weight, bias


@dataclass
class SplitConfig(MixtureConfig):
    r: int = 4
    num_experts: int = 3
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = peft_type("SPLIT")


class SplitModel(MixtureModel):
    def roles(self, config: SplitConfig) -> tuple[str, ...]:
        return ("ffn_output",)

    def build(self, config: SplitConfig, site: Site) -> Adapter:
        return Split(site, config)


register("split", SplitConfig, SplitModel)


def split_model(tiny, **config: Any) -> PeftModel:
    return randomize(get_peft_model(tiny("llama"), SplitConfig(**config)))


def splits(model: nn.Module) -> list[Split]:
    return [m for m in model.modules() if isinstance(m, Split)]


def test_split_method_deals_every_entry_once(tiny) -> None:
    adapters = splits(split_model(tiny))
    assert adapters
    for adapter in adapters:
        sizes = torch.bincount(adapter.owner.flatten().long(), minlength=3)
        assert sizes.sum() == adapter.up.weight.numel()
        assert sizes.max() - sizes.min() <= 1


def test_split_method_draws_once_per_forward_and_trains_the_drawn_part(tiny, tiny_inputs) -> None:
    model = split_model(tiny).train()
    inputs = tiny_inputs("llama")

    def run(seed_of_draws: int) -> dict[str, Tensor]:
        for adapter in splits(model):
            adapter.draws.fill_(seed_of_draws)
        outputs = [model(**inputs).logits for _ in range(2)]
        assert all(int(adapter.draws) == seed_of_draws + 2 for adapter in splits(model))
        (outputs[0].square().mean() - outputs[1].mean()).backward()
        assert all(int(adapter.draws) == seed_of_draws + 2 for adapter in splits(model))  # none in backward
        return gradients(model)

    plain = [run(seed) for seed in (0, 7)]
    model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
    for seed, expected in zip((0, 7), plain, strict=True):
        assert_same_gradients(run(seed), expected)

    model(**inputs).logits.square().mean().backward()
    record = model.base_model.context.record
    assert splits(model)
    for adapter in splits(model):
        drawn = record.shared[f"owner {id(adapter)}"]
        assert (adapter.up.weight.grad[adapter.owner != drawn] == 0).all()
        assert (adapter.up.weight.grad[adapter.owner == drawn] != 0).any()


def test_split_method_evaluates_its_mean_and_merges_exactly(tiny, tiny_inputs) -> None:
    model = split_model(tiny).double().eval()
    inputs = tiny_inputs("llama")
    expected = model(**inputs).logits
    assert torch.equal(model(**inputs).logits, expected)
    adapter, x = splits(model)[0], torch.randn(5, 48, dtype=torch.double)
    outputs = [x @ adapter.down.weight.T @ adapter.weight(torch.tensor(i)).T for i in range(3)]
    mean = x @ adapter.down.weight.T @ adapter.weight(None).T
    torch.testing.assert_close(sum(outputs) / 3, mean, atol=1e-12, rtol=1e-12)
    merged = copy.deepcopy(model).merge_and_unload()
    torch.testing.assert_close(merged(**inputs).logits, expected, atol=1e-10, rtol=1e-10)
    model.merge_adapter()
    torch.testing.assert_close(model(**inputs).logits, expected, atol=1e-10, rtol=1e-10)
    model.unmerge_adapter()
    assert torch.equal(model(**inputs).logits, expected)


def test_split_method_resumes_its_draws(tiny, tiny_inputs, tmp_path) -> None:
    model, inputs = split_model(tiny).train(), tiny_inputs("llama")
    for _ in range(3):
        model(**inputs)
    model.save_pretrained(tmp_path)
    expected = [model(**inputs).logits for _ in range(4)]
    assert any(not torch.equal(expected[0], other) for other in expected[1:])
    resumed = PeftModel.from_pretrained(tiny("llama"), tmp_path, is_trainable=True).train()
    for logits in expected:
        assert torch.equal(resumed(**inputs).logits, logits)


# --- a residual that depends on the guidance scale and the timestep ----------------------------------------------


class Trunk(nn.Module):
    """Features of (guidance scale, timestep), (B, h), for all sites."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(2, width), nn.SiLU(), nn.Linear(width, width))
        self.evaluated = 0

    def forward(self, scale: Tensor, timestep: Tensor) -> Tensor:
        self.evaluated += 1
        return self.layers(torch.stack([scale.log(), timestep / 1000], dim=-1))


class Guidance(Adapter):
    """y + (w - 1) * up(silu(down(x) + shift(trunk))). The adapter at the first site owns the trunk."""

    def __init__(self, width: int, config: GuidanceConfig, first: Guidance | None) -> None:
        super().__init__()
        self.__dict__["first"] = first or self  # no child: one owner of the trunk's parameters
        self.trunk = Trunk(config.r) if first is None else None
        self.down, self.shift = nn.Linear(width, config.r), nn.Linear(config.r, config.r)
        self.up = nn.Linear(config.r, width)

    def key(self) -> str:
        return f"guidance {id(self.__dict__['first'])}"

    def prepare(self, context: ForwardContext) -> None:
        if self.trunk is not None:
            batch, record = context.stream().batch, context.record
            scale = torch.as_tensor(record.values.get("guidance_scale", 1.0)).float().expand(batch)
            timestep = torch.as_tensor(record.inputs["timestep"]).float().expand(batch)
            record.shared[self.key()] = scale, self.trunk(scale, timestep)

    def forward(self, x: Tensor, y: Tensor, context: ForwardContext) -> Tensor:
        scale, features = context.record.shared[self.key()]
        hidden = F.silu(self.down(x) + self.shift(features).unsqueeze(1))
        return y + (scale - 1).view(-1, 1, 1) * self.up(hidden)


@dataclass
class GuidanceConfig(MixtureConfig):
    r: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = peft_type("GUIDANCE")


class GuidanceModel(MixtureModel):
    fields = ("guidance_scale",)
    attachment = HookedLayer

    def before_injection(self, config: GuidanceConfig, adapter_name: str) -> None:
        self.__dict__["first"] = None  # no child: it is that of its site
        super().before_injection(config, adapter_name)  # may build adapters, to compare a file with them
        self.__dict__["first"] = None

    def _widths(self, config: GuidanceConfig, base: nn.Module, path: str) -> tuple[int, int]:
        width = base.to_out[0].out_features  # blocks of several widths, none of them in the model's config
        return width, width

    def build(self, config: GuidanceConfig, site: Site) -> Adapter:
        adapter = Guidance(site.out_features, config, self.__dict__["first"])
        self.__dict__["first"] = self.__dict__["first"] or adapter
        return adapter


register("guidance", GuidanceConfig, GuidanceModel)


@pytest.fixture(scope="module")
def unet():
    """Factory of tiny denoisers with cross-attention of two widths."""
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    made = diffusers.UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(8, 16), layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"), cross_attention_dim=8, attention_head_dim=4,
        norm_num_groups=4,
    ).eval()  # fmt: skip
    return Original(made).copy


def denoiser_inputs(batch: int = 2) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    return {
        "sample": torch.randn(batch, 4, 8, 8, generator=generator),
        "timestep": 37,
        "encoder_hidden_states": torch.randn(batch, 5, 8, generator=generator),
    }


def test_guidance_method_is_the_base_at_scale_one_and_conditions_rows_apart(unet) -> None:
    base, inputs = unet(), denoiser_inputs()
    keys, expected = list(base.state_dict()), base(**inputs).sample
    model = randomize(get_peft_model(base, GuidanceConfig(target_modules=["attn2"]))).eval()
    hosts = list(model.base_model.hosts())
    assert {h.out_features for h in hosts} == {8, 16}
    assert [k for k in base.state_dict() if ".mixadapters." not in k] == keys
    assert sum("trunk" in k for k in base.state_dict()) == 4
    assert torch.equal(model(**inputs, guidance_scale=torch.ones(2)).sample, expected)
    assert torch.equal(model(**inputs).sample, expected)
    trunk = hosts[0].adapters["default"].trunk
    trunk.evaluated = 0
    guided = model(**inputs, guidance_scale=torch.tensor([4.0, 1.0])).sample
    assert trunk.evaluated == 1
    assert (guided[0] - expected[0]).abs().max() > 1e-3
    torch.testing.assert_close(guided[1], expected[1], **CLOSE)
    positional = base(*inputs.values(), guidance_scale=4.0).sample
    torch.testing.assert_close(positional[0], guided[0], **CLOSE)
    with model.base_model.context.pin(guidance_scale=4.0):  # a pipeline does not know the argument
        torch.testing.assert_close(base(**inputs).sample[0], guided[0], **CLOSE)


def test_guidance_method_trains_in_evaluation_mode_under_checkpointing(unet) -> None:
    model = randomize(get_peft_model(unet(), GuidanceConfig(target_modules=["attn2"]))).eval()
    inputs = denoiser_inputs()
    trunk = next(m for m in model.modules() if isinstance(m, Trunk))

    def run() -> dict[str, Tensor]:
        trunk.evaluated = 0
        outputs = [model(**inputs, guidance_scale=torch.tensor(w)).sample for w in ([2.0, 3.0], [5.0, 1.5])]
        with model.disable_adapter(), torch.no_grad():  # the teacher is the same model
            teacher = model(**inputs).sample
        sum(F.mse_loss(output, teacher * i) for i, output in enumerate(outputs)).backward()
        assert trunk.evaluated == 2
        return gradients(model)

    plain = run()
    assert any("trunk" in name for name in plain)
    model.get_base_model().enable_gradient_checkpointing()
    assert_same_gradients(run(), plain)


def test_guidance_method_saves_loads_and_leaves(unet, tmp_path) -> None:
    inputs = denoiser_inputs()
    base = unet()
    keys, expected = list(base.state_dict()), base(**inputs).sample
    model = randomize(get_peft_model(base, GuidanceConfig(target_modules=["attn2"]))).eval()
    guided = model(**inputs, guidance_scale=3.0).sample
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(unet(), tmp_path)
    assert torch.equal(loaded(**inputs, guidance_scale=3.0).sample, guided)
    both = PeftModel.from_pretrained(unet(), tmp_path, adapter_name="one")
    both.load_adapter(tmp_path, adapter_name="two")  # a trunk of its own
    assert sum(isinstance(m, Trunk) for m in both.modules()) == 2
    both.set_adapter("two")
    assert torch.equal(both(**inputs, guidance_scale=3.0).sample, guided)
    bare = model.unload()
    assert list(bare.state_dict()) == keys
    assert torch.equal(bare(**inputs).sample, expected)


@pytest.mark.parametrize("targets", [["to_q"], r"up_blocks.*to_(q|v)", r".*attn2\.to_out\.0"])
def test_guidance_method_lives_beside_the_styles_of_diffusers(unet, targets) -> None:
    inputs = denoiser_inputs()
    base = unet()
    model = randomize(get_peft_model(base, GuidanceConfig(target_modules=["attn2"]))).eval()
    guided = base(**inputs, guidance_scale=3.0).sample
    base.add_adapter(LoraConfig(r=2, target_modules=targets, init_lora_weights=False), adapter_name="style")
    styled = base(**inputs, guidance_scale=3.0).sample
    assert (styled - guided).abs().max() > 1e-4
    base.set_adapters(["style"], weights=[0.0])
    torch.testing.assert_close(base(**inputs, guidance_scale=3.0).sample, guided, **CLOSE)
    base.set_adapters(["style"], weights=[1.0])
    torch.testing.assert_close(base(**inputs, guidance_scale=3.0).sample, styled, **CLOSE)
    assert all(h.active_adapters == ["default"] for h in model.base_model.hosts())
    base.unload_lora()
    assert not any(type(m).__module__.startswith("peft.tuners.lora") for m in base.modules())
    assert torch.equal(base(**inputs, guidance_scale=3.0).sample, guided)


def test_toys_of_the_other_methods_are_small() -> None:
    lengths = {
        "modality": (modality_ids, ModalityRouter, ValueGate, ModalityConfig, ModalityModel),
        "split": (Split, SplitConfig, SplitModel),
        "guidance": (Trunk, Guidance, GuidanceConfig, GuidanceModel),
    }
    for name, parts in lengths.items():
        assert sum(len(inspect.getsource(part).splitlines()) for part in parts) <= 80, name
