"""The twelve places where a core of this kind is easily wrong without an error: one section, and one name, for each.

1 recomputation, 2 encoder-decoder, 3 mixed batches in one call, 4 inputs beyond (x, y), 5 the base's own stream,
6 computed weights and two passes, 7 auxiliary losses without a loss, 8 shared trunks, 9 composite sites, 10 gates
with state under a cache, 11 reassigned parameters, 12 packed sequences.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import adapted
import pytest
import torch
import transformers
from adapted import gradients, without_dropout
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import DynamicCache, StaticCache, Trainer, TrainingArguments

from mixadapters import BottleneckConfig, ForwardContext, MixDAConfig, MixtureModel, kernels, register
from mixadapters.core.adapter import Adapter, Site
from mixadapters.core.bank import AdapterBank
from mixadapters.core.config import MixtureConfig
from mixadapters.core.layer import HookedLayer, MixtureLayer
from mixadapters.core.mixture import Mixture
from mixadapters.core.taps import Tap
from mixadapters.routers import DomainGate, SingleRouter
from mixadapters.tuners.registration import peft_type

transformers.logging.set_verbosity_error()
pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning:transformers"),  # its verbs of checkpointing have new names
    pytest.mark.filterwarnings("ignore::UserWarning:peft"),
]
CLOSE = {"atol": 2e-5, "rtol": 2e-5}
LAYERS = 4


randomize = partial(adapted.randomize, scale=0.2, seed=0)


def adapt(base: nn.Module, *configs: Any, **named: Any) -> PeftModel:
    """A PeftModel in eval mode with one adapter per config: "default", or the names given."""
    named = {**({"default": configs[0]} if configs else {}), **named}
    (first, config), *others = named.items()
    model = get_peft_model(base, config, adapter_name=first)
    for name, config in others:
        model.add_adapter(name, config)
    model.base_model.set_adapter(list(named))
    return randomize(without_dropout(model)).eval()


def assert_same_gradients(one: dict[str, Tensor], other: dict[str, Tensor], **tolerance: float) -> None:
    assert one
    for name in one.keys() | other.keys():
        a, b = one.get(name), other.get(name)
        a, b = (torch.zeros_like(b) if a is None else a), (torch.zeros_like(a) if b is None else b)
        torch.testing.assert_close(a, b, msg=lambda m, n=name: f"{n}: {m}", **(tolerance or CLOSE))
    assert any(g.abs().max() > 1e-4 for g in one.values())


def checkpointed(model: nn.Module) -> None:
    root = model.get_base_model() if isinstance(model, PeftModel) else model
    root.gradient_checkpointing_enable({"use_reentrant": False})


def calls_of(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The arguments of every call of the op from now on."""
    calls: list[dict[str, Any]] = []
    plain = kernels.lowrank

    def counting(*args: Any, **kwargs: Any) -> Tensor:
        calls.append(kwargs)
        return plain(*args, **kwargs)

    monkeypatch.setattr(kernels, "lowrank", counting)
    return calls


def probe(output: Any, seed: int) -> Tensor:
    """A scalar of the output with a gradient everywhere."""
    logits = output.logits if hasattr(output, "logits") else output.last_hidden_state
    weight = torch.randn(logits.shape, generator=torch.Generator().manual_seed(seed))
    return (logits * weight).mean()


# --- a method of one bank per site, for what no method of the library does --------------------------------------


@dataclass
class BreaksConfig(MixtureConfig):
    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = peft_type("BREAKS")


class BreaksModel(MixtureModel):
    def build(self, config: BreaksConfig, site: Site) -> Adapter:
        bank = AdapterBank(site.in_features, site.out_features)
        bank.add("adapter", 4, config.init_weights)
        return Mixture(SingleRouter(site.in_features, ["adapter"]), bank)


register("breaks", BreaksConfig, BreaksModel)


def host(model: nn.Module, path: str, adapter: Adapter, in_features: int, out_features: int) -> MixtureLayer:
    """Put `adapter` at the module `path` of a plain model, without PEFT."""
    context = ForwardContext.of(model)
    layer = MixtureLayer(model.get_submodule(path), context, "breaks_", path, in_features, out_features)
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, layer)
    layer.add("default", adapter)
    layer.set_adapter("default")
    return layer


# --- 1 -----------------------------------------------------------------------------------------------------------

MIXDA = {"domains": ["a", "b"], "r": 3, "task_r": 2, "domain_layers": [0, 2]}
RECOMPUTED = {
    "rows of other adapters": ("llama", {"first": BottleneckConfig(r=3), "second": BottleneckConfig(r=5)}, True),
    "gates over masked sequences": (
        "bert",
        {"first": MixDAConfig(**MIXDA, gate_granularity="sequence", balance_coef=0.3, z_coef=0.1)},
        False,
    ),
    "gates over prefixes, mixed": (
        "llama",
        {
            "first": MixDAConfig(**MIXDA, gate_granularity="causal_prefix", gate_input="ffn_input"),
            "second": MixDAConfig(**MIXDA, balance_coef=0.3, activation="relu"),
        },
        True,
    ),
    "both stacks": ("t5", {"first": MixDAConfig(**MIXDA, gate_granularity="causal_prefix", entropy_coef=0.1)}, False),
}


@pytest.mark.parametrize("case", RECOMPUTED)
def test_break_01_recomputation_sees_its_own_record(tiny, tiny_inputs, case) -> None:
    kind, configs, mixed = RECOMPUTED[case]

    def run(checkpointing: bool) -> dict[str, Tensor]:
        base = tiny(kind, dropout_rate=0.0) if kind == "t5" else tiny(kind)
        model = adapt(base, **copy.deepcopy(configs)).train()
        if checkpointing:
            checkpointed(model)
        first = tiny_inputs(kind, batch=3, length=7, padding="right", seed=1)
        second = tiny_inputs(kind, batch=2, length=5, padding="left", seed=2)
        if mixed:
            first["adapter_names"], second["adapter_names"] = ["first", "second", "__base__"], ["second", "first"]
        outputs = [model(**first)]
        with model.disable_adapter(), torch.no_grad():  # the reference pass of preference training
            model(**tiny_inputs(kind, batch=4, length=6))
        outputs.append(model(**second))
        model.eval()
        with torch.no_grad():  # and an evaluation in between
            model(**tiny_inputs(kind, batch=1, length=3))
        model.train()
        sum(probe(output, seed) for seed, output in enumerate(outputs)).backward()
        return gradients(model)

    assert_same_gradients(run(True), run(False))


def test_break_01_layers_that_train_in_a_model_in_evaluation_mode(tiny, tiny_inputs) -> None:
    """Distillation keeps the base in evaluation mode, and may checkpoint all the same."""

    def run(checkpointing: bool) -> dict[str, Tensor]:
        model = adapt(tiny("llama"), first=BottleneckConfig(r=3), second=BottleneckConfig(r=5))
        if checkpointing:
            checkpointed(model)
        for layer in model.get_base_model().model.layers:
            layer.train()
        inputs = tiny_inputs("llama", batch=2)
        outputs = [model(**inputs, adapter_names=names) for names in (["first", "second"], ["second", "first"])]
        sum(probe(output, seed) for seed, output in enumerate(outputs)).backward()
        return gradients(model)

    assert_same_gradients(run(True), run(False))


def test_break_01_reentrant_recomputation_with_an_auxiliary_loss_is_refused(tiny, tiny_inputs) -> None:
    model = adapt(tiny("bert"), MixDAConfig(**MIXDA, balance_coef=0.3)).train()
    model.get_base_model().gradient_checkpointing_enable({"use_reentrant": True})
    model.enable_input_require_grads()
    with pytest.raises(ValueError, match=r"'balance'.*use_reentrant.*False"):
        model(**tiny_inputs("bert"))


# --- 2 -----------------------------------------------------------------------------------------------------------


def gate_masks(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Tensor | None, tuple[int, ...]]]:
    """(stack, mask, shape of the tokens) of every gate that runs from now on."""
    seen: list[tuple[str, Tensor | None, tuple[int, ...]]] = []
    plain = DomainGate.forward

    def spying(self, tokens, context):
        seen.append((self.stack, context.stream(self.stack).mask, tuple(tokens.shape)))
        return plain(self, tokens, context)

    monkeypatch.setattr(DomainGate, "forward", spying)
    return seen


@pytest.mark.parametrize("kind", ["t5", "bart"])
@pytest.mark.parametrize("beams", [1, 3])
def test_break_02_encoder_that_runs_before_any_root_forward(tiny, tiny_inputs, monkeypatch, kind, beams) -> None:
    model = adapt(tiny(kind), MixDAConfig(**MIXDA, gate_granularity="causal_prefix", task_adapter="houlsby"))
    inputs = tiny_inputs(kind, batch=3, length=6, padding="right")
    inputs.pop("decoder_input_ids")
    settings = {"max_new_tokens": 4, "min_new_tokens": 4, "num_beams": beams, "do_sample": False}
    seen = gate_masks(monkeypatch)
    together = model.generate(**inputs, **settings)
    assert {stack for stack, _, _ in seen} == {"encoder", "decoder"}
    assert seen[0][0] == "encoder"
    for stack, mask, shape in seen:
        if stack == "encoder":
            assert torch.equal(mask, inputs["attention_mask"].bool())
        else:
            assert shape[0] == 3 * beams
            assert mask is None or mask.shape == shape[:2]
    for row, mask in enumerate(inputs["attention_mask"]):
        alone = {k: v[row : row + 1, : int(mask.sum())] for k, v in inputs.items()}
        assert torch.equal(model.generate(**alone, **settings)[0], together[row])


def test_break_02_stacks_have_their_own_masks_in_a_forward(tiny, tiny_inputs, monkeypatch) -> None:
    model = adapt(tiny("t5"), MixDAConfig(**MIXDA))
    inputs = tiny_inputs("t5", batch=2, length=6, padding="right")
    decoder_mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    inputs["decoder_input_ids"] = inputs["decoder_input_ids"][:, :4]
    seen = gate_masks(monkeypatch)
    model(**inputs, decoder_attention_mask=decoder_mask)
    masks = {stack: mask for stack, mask, _ in seen}
    assert torch.equal(masks["encoder"], inputs["attention_mask"].bool())
    assert torch.equal(masks["decoder"], decoder_mask.bool())


def test_break_02_rows_name_their_adapters_in_both_stacks(tiny, tiny_inputs) -> None:
    model = adapt(tiny("t5"), first=BottleneckConfig(r=3), second=BottleneckConfig(r=5))
    inputs = tiny_inputs("t5", batch=3, length=6)
    inputs.pop("decoder_input_ids")
    settings = {"max_new_tokens": 4, "min_new_tokens": 4, "num_beams": 2, "do_sample": False}
    names = ["second", "first", "__base__"]
    together = model.generate(**inputs, **settings, adapter_names=names)
    for row, name in enumerate(names):
        alone = {k: v[row : row + 1] for k, v in inputs.items()}
        if name == "__base__":
            with model.disable_adapter():
                assert torch.equal(model.generate(**alone, **settings)[0], together[row])
        else:
            model.set_adapter(name)
            assert torch.equal(model.generate(**alone, **settings)[0], together[row])


# --- 3 -----------------------------------------------------------------------------------------------------------

MIXED = {
    # case: (adapters, calls of the op per forward of four layers)
    "ranks": ({"first": BottleneckConfig(r=3), "second": BottleneckConfig(r=7, scale=0.5)}, LAYERS),
    "learnable scale and own norm": (
        {
            "first": BottleneckConfig(r=3, layer_norm=True, scale="learnable"),
            "second": BottleneckConfig(r=7, layer_norm=True, scale=2.0),
        },
        LAYERS,
    ),
    "kinds": ({"first": BottleneckConfig(r=3, glu=True), "second": BottleneckConfig(r=7, use_bias=False)}, 2 * LAYERS),
    "layers": ({"first": BottleneckConfig(r=3, layers_to_transform=[0]), "second": BottleneckConfig(r=7)}, LAYERS),
    "chains": (
        {
            "first": MixDAConfig(**MIXDA, gate_granularity="causal_prefix"),
            "second": MixDAConfig(domains=["a", "b", "c"], r=5, task_r=3, domain_layers=[0, 1], gate="sigmoid"),
        },
        LAYERS + 3,  # tasks everywhere, domains in layers 0, 1 and 2
    ),
    "chains of different length": (
        {
            "first": MixDAConfig(**MIXDA, combine="convex", gate_input="ffn_input"),
            "second": MixDAConfig(domains=["a"], r=5, task_adapter=None, domain_layers=[0, 1]),
        },
        LAYERS + 3,
    ),
    "chains of different kinds": (
        {
            "first": MixDAConfig(**MIXDA, adapter_glu=True),
            "second": MixDAConfig(**MIXDA, activation="relu", task_activation="tanh"),
        },
        LAYERS * 2 + 4,
    ),
}
NAMES = ["second", "first", "__base__", "first", "second"]


def mixed_model(tiny, case: str) -> PeftModel:
    return adapt(tiny("llama"), **copy.deepcopy(MIXED[case][0]))


@pytest.mark.parametrize("case", MIXED)
def test_break_03_mixed_batch_is_one_call_per_kind_and_equals_its_rows(tiny, tiny_inputs, monkeypatch, case) -> None:
    model = mixed_model(tiny, case)
    inputs = tiny_inputs("llama", batch=5, length=6, padding="left")
    calls = calls_of(monkeypatch)
    with torch.no_grad():
        together = model(**inputs, adapter_names=NAMES).logits
        assert len(calls) == MIXED[case][1]
        with model.disable_adapter():
            base = model(**inputs).logits
        assert torch.equal(together[2], base[2])
        for name in ("first", "second"):
            model.set_adapter(name)
            alone = model(**inputs).logits
            for row in (i for i, n in enumerate(NAMES) if n == name):
                real = inputs["attention_mask"][row].bool()
                torch.testing.assert_close(together[row][real], alone[row][real], **CLOSE)
                assert (alone[row] - base[row]).abs().max() > 1e-2


@pytest.mark.parametrize("case", MIXED)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_break_03_mixed_batch_trains_each_adapter_on_its_rows(tiny, tiny_inputs, case, checkpointing) -> None:
    model = mixed_model(tiny, case).train()
    if checkpointing:
        checkpointed(model)
    inputs = tiny_inputs("llama", batch=5, length=6)
    weight = torch.randn(5, 6, 96)
    (model(**inputs, adapter_names=NAMES).logits * weight).mean().backward()
    together = gradients(model)
    for name in ("first", "second"):
        model.set_adapter(name)
        rows = torch.tensor([n == name for n in NAMES]).view(-1, 1, 1)
        (model(**inputs).logits * weight * rows).mean().backward()
    separate = gradients(model)
    assert_same_gradients(together, separate, atol=1e-5, rtol=1e-4)


def test_break_03_losses_of_a_gate_leave_out_the_rows_of_others(tiny, tiny_inputs) -> None:
    coefs = {"balance_coef": 0.7, "z_coef": 0.3, "entropy_coef": 0.2}
    model = adapt(tiny("llama"), first=MixDAConfig(**MIXDA, **coefs), second=MixDAConfig(**MIXDA, **coefs)).train()
    inputs = tiny_inputs("llama", batch=4, length=6, padding="right")
    names = ["first", "second", "__base__", "first"]
    context = model.base_model.context
    model(**inputs, adapter_names=names)
    together = {name: float(loss.detach()) for name, loss in context.record.losses.items()}
    separate: dict[str, float] = {}
    for adapter in ("first", "second"):
        model.set_adapter(adapter)
        rows = [i for i, name in enumerate(names) if name == adapter]
        # Layers above the first read what the adapter itself made of its rows, so these can be run alone.
        model(**{k: v[rows] for k, v in inputs.items()})
        for name, loss in context.record.losses.items():
            separate[name] = separate.get(name, 0.0) + float(loss.detach())
    assert together.keys() == separate.keys() == {"balance", "z", "entropy"}
    assert together == pytest.approx(separate, rel=1e-4)


# --- 4 -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("checkpointing", [False, True])
def test_break_04_tap_gives_the_input_of_another_module(tiny, tiny_inputs, checkpointing) -> None:
    """BERT has no FFN module: an adapter of its input sits at the last linear and taps the first."""
    config = BottleneckConfig(r=3, placement="parallel", layers_to_transform=[1])
    model = adapt(tiny("bert"), config, other=copy.deepcopy(config)).train()
    model.set_adapter("default")
    if checkpointing:
        checkpointed(model)
    layer = model.get_base_model().bert.encoder.layer[1]
    seen: dict[str, Tensor] = {}
    layer.intermediate.dense.register_forward_pre_hook(lambda m, args: seen.update(tapped=args[0]))
    layer.output.dense.base_layer.register_forward_hook(lambda m, args, y: seen.update(frozen=y))
    layer.output.dense.register_forward_hook(lambda m, args, y: seen.update(adapted=y))
    probe(model(**tiny_inputs("bert")), 0).backward()
    expert = layer.output.dense.adapters["default"].bank.experts["adapter"]
    delta = expert.up(F.gelu(expert.down(seen["tapped"])))
    torch.testing.assert_close(seen["adapted"], seen["frozen"] + delta, **CLOSE)
    hooks = layer.intermediate.dense._forward_pre_hooks.values()
    assert sum(isinstance(getattr(hook, "__self__", None), Tap) for hook in hooks) == 1  # for both adapters
    if checkpointing:
        with_checkpoints = gradients(model)
        model.get_base_model().gradient_checkpointing_disable()
        probe(model(**tiny_inputs("bert")), 0).backward()
        assert_same_gradients(with_checkpoints, gradients(model))


def test_break_04_tap_of_a_module_that_has_not_run_is_an_error(tiny, tiny_inputs) -> None:
    model = tiny("bert")
    bank = AdapterBank(32, 32)
    bank.add("adapter", 3)
    mixture = Mixture(SingleRouter(32, ["adapter"]), bank, tap="bert.encoder.layer.1.intermediate.dense")
    host(model, "bert.encoder.layer.0.output.dense", mixture, 48, 32)
    with pytest.raises(RuntimeError, match=r"'bert\.encoder\.layer\.1\.intermediate\.dense' has not run"):
        model(**tiny_inputs("bert"))


# --- 5 -----------------------------------------------------------------------------------------------------------


def layer_list(model: nn.Module, kind: str) -> nn.ModuleList:
    paths = {"bert": "bert.encoder.layer", "llama": "model.layers", "gpt2": "transformer.h"}
    return model.get_submodule(paths[kind])


@pytest.mark.parametrize("kind", ["bert", "llama", "gpt2"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_break_05_observing_leaves_the_stream_and_stops_early(tiny, tiny_inputs, kind, checkpointing) -> None:
    model = adapt(tiny(kind), BottleneckConfig(r=3, layers_to_transform=[0, 2])).train()
    root, context = model.get_base_model(), model.base_model.context
    inputs = tiny_inputs(kind, batch=2, length=6, padding="right")
    layers = layer_list(root, kind)
    streams: list[list[Tensor]] = [[] for _ in layers]
    head_runs: list[int] = []
    for seen, layer in zip(streams, layers, strict=True):
        layer.register_forward_hook(
            lambda m, a, y, seen=seen: seen.append((y[0] if isinstance(y, tuple) else y).detach())
        )
    root.get_output_embeddings().register_forward_hook(lambda *_: head_runs.append(1))
    with model.disable_adapter():
        model(**inputs)
    frozen = [seen.pop() for seen in streams]
    head_runs.clear()
    if checkpointing:
        checkpointed(model)
    deltas = context.observe(root, **inputs)
    assert [len(seen) for seen in streams] == [1, 1, 1, 0]
    assert all(torch.equal(seen[0], frozen[i]) for i, seen in enumerate(streams[:3]))
    assert not head_runs
    assert len(layer_list(root, kind)) == LAYERS
    assert [tuple(d.shape) for d in deltas] == [(2, 6, 32)] * 2
    sum(d.square().mean() for d in deltas).backward()
    assert len(deltas) == 2  # layers that run again report nothing more
    with_layers = gradients(model)
    assert len(with_layers) == 8  # two adapters of two linears with biases
    root.gradient_checkpointing_disable()
    sum(d.square().mean() for d in context.observe(root, **inputs)).backward()
    assert_same_gradients(with_layers, gradients(model))


def test_break_05_observed_delta_is_what_the_adapter_adds(tiny, tiny_inputs) -> None:
    model = adapt(tiny("llama"), MixDAConfig(**MIXDA, adapter_input="ffn_input")).train()
    context, root = model.base_model.context, model.get_base_model()
    inputs = tiny_inputs("llama")
    seen: list[tuple[Tensor, Tensor]] = []
    mlp = root.model.layers[0].mlp
    with model.disable_adapter():
        handle = mlp.register_forward_hook(lambda m, args, y: seen.append((args[0], y)))
        model(**inputs)
        handle.remove()
    x, _ = seen[0]
    deltas = context.observe(root, **inputs)
    assert len(deltas) == 4  # two domains in two layers; the task adapter has nothing to tell
    for expert, delta in zip(mlp.adapters["default"].domain.bank.experts.values(), deltas[:2], strict=True):
        torch.testing.assert_close(delta, expert.up(F.gelu(expert.down(x))), **CLOSE)


def test_break_05_observing_both_stacks_stops_each_early(tiny, tiny_inputs) -> None:
    model = adapt(tiny("t5"), BottleneckConfig(r=3, layers_to_transform=[1])).train()
    root = model.get_base_model()
    runs: dict[str, list[int]] = {"encoder": [], "decoder": []}
    for stack, seen in runs.items():
        for i, block in enumerate(getattr(root, stack).block):
            block.register_forward_hook(lambda *_, i=i, seen=seen: seen.append(i))
    inputs = tiny_inputs("t5")
    inputs.pop("decoder_input_ids")
    deltas = model.base_model.context.observe(root, **inputs)
    assert runs == {"encoder": [0, 1], "decoder": [0, 1]}
    assert len(deltas) == 2


def test_break_05_layers_are_restored_after_an_error(tiny, tiny_inputs) -> None:
    model = adapt(tiny("bert"), BottleneckConfig(r=3, layers_to_transform=[0])).train()
    root, context = model.get_base_model(), model.base_model.context
    inputs = tiny_inputs("bert")
    before = model.eval()(**inputs).logits

    def fail(*_: Any) -> None:
        raise KeyError("broken")

    handle = root.bert.encoder.layer[0].register_forward_hook(fail)
    with pytest.raises(KeyError, match="broken"):
        context.observe(root, **inputs)
    handle.remove()
    assert len(root.bert.encoder.layer) == LAYERS
    assert torch.equal(model(**inputs).logits, before)
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="no trainable adapter"):
        context.observe(root, **inputs)


# --- 6 -----------------------------------------------------------------------------------------------------------


class Dealt(Adapter):
    """One pair of projections; the entries of the second are dealt to two owners. A row uses one owner's part."""

    def __init__(self, width_in: int, width_out: int, rank: int) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(width_in, rank, bias=False), nn.Linear(rank, width_out, bias=False)
        self.register_buffer("owner", torch.randint(0, 2, (width_out, rank)))

    def forward(self, x: Tensor, y: Tensor, context: ForwardContext) -> Tensor:
        tokens, rank = x.reshape(-1, x.shape[-1]), self.up.in_features
        owner = context.rows("owner", tokens.shape[0])
        out = kernels.lowrank(
            tokens, self.down.weight.repeat(2, 1),
            torch.cat([self.up.weight * (self.owner == i) for i in (0, 1)], dim=1), [rank, rank],
            indices=owner.unsqueeze(1), base=y.reshape(-1, y.shape[-1]), act="tanh",
        )  # fmt: skip
        return out.view_as(y)


class TwoPasses:
    """Runs every row twice, once per owner; the task's loss on the first pass, a consistency loss between both."""

    takes: ClassVar[tuple[str, ...]] = ("labels",)

    def before(self, context: ForwardContext, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        # Row by row, not batch after batch: fields of single sequences then follow by themselves.
        twice = {
            k: v.repeat_interleave(2, 0) if isinstance(v, Tensor) and v.dim() > 0 else v for k, v in kwargs.items()
        }
        context.record.values["owner"] = torch.tensor([0, 1]).repeat(len(kwargs["input_ids"]))
        return args, twice

    def after(self, context: ForwardContext, module: nn.Module, output: Any) -> Any:
        first, second = output.logits[::2], output.logits[1::2]
        context.set_loss(F.cross_entropy(first, context.record.values["labels"]))
        context.add_loss("consistency", consistency(first, second), 0.5)
        output.logits = first
        return output


def consistency(one: Tensor, other: Tensor) -> Tensor:
    return F.kl_div(one.log_softmax(-1), other.softmax(-1), reduction="batchmean")


@pytest.mark.parametrize("checkpointing", [False, True])
def test_break_06_computed_weights_and_two_passes_in_one_forward(tiny, tiny_inputs, checkpointing) -> None:
    model = without_dropout(tiny("bert", "sequence_classification")).requires_grad_(False).train()
    for i in range(LAYERS):
        host(model, f"bert.encoder.layer.{i}.output.dense", Dealt(48, 32, 5), 48, 32)
    randomize(model)
    context = ForwardContext.of(model)
    context.fields.add("owner")
    inputs = tiny_inputs("bert", batch=3, length=6, padding="right", labels="classes")
    labels = inputs.pop("labels")
    passes = [model(**inputs, owner=torch.full((3,), i)).logits for i in (0, 1)]
    assert (passes[0] - passes[1]).abs().max() > 1e-3
    expected = F.cross_entropy(passes[0], labels) + 0.5 * consistency(*passes)
    expected.backward()
    separate = gradients(model)

    context.objectives.append(TwoPasses())
    if checkpointing:
        checkpointed(model)
    output = model(**inputs, labels=labels)
    assert output.logits.shape == (3, 3)
    torch.testing.assert_close(output.loss, expected, **CLOSE)
    output.loss.backward()
    assert_same_gradients(gradients(model), separate)
    with torch.no_grad():  # and not in evaluation
        assert model.eval()(**inputs, owner=torch.zeros(3, dtype=torch.long)).logits.shape == (3, 3)


def test_break_06_a_plain_trainer_trains_the_two_passes(tiny, tiny_inputs, tmp_path) -> None:
    model = without_dropout(tiny("bert", "sequence_classification")).requires_grad_(False)
    host(model, "bert.encoder.layer.3.output.dense", Dealt(48, 32, 5), 48, 32)
    randomize(model)
    ForwardContext.of(model).objectives.append(TwoPasses())
    inputs = tiny_inputs("bert", batch=4, length=6, labels="classes")
    rows = [{k: v[i] for k, v in inputs.items()} for i in range(4)]
    arguments = TrainingArguments(
        str(tmp_path), max_steps=8, per_device_train_batch_size=4, learning_rate=0.05, report_to=[], use_cpu=True,
        logging_steps=1, save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=rows)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.9 * losses[0]


# --- 7 -----------------------------------------------------------------------------------------------------------

GATED = {**MIXDA, "balance_coef": 0.8, "z_coef": 0.2}


class Penalty:
    """Adds the sum of squares of the trainable weights: the same for every batch."""

    takes = ()

    def __init__(self, main_scale: float = 1.0) -> None:
        self.main_scale = main_scale

    def before(self, context: ForwardContext, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        return args, kwargs

    def after(self, context: ForwardContext, module: nn.Module, output: Any) -> Any:
        squares = [p.square().sum() for p in module.parameters() if p.requires_grad]
        context.add_loss("penalty", torch.stack(squares).sum() if squares else torch.ones(()), 0.1)
        if self.main_scale != 1:
            context.scale_loss(self.main_scale)
        return output


@pytest.mark.parametrize("form", ["dict", "tuple"])
def test_break_07_losses_without_a_loss_join_the_logits(tiny, tiny_inputs, form) -> None:
    model = adapt(tiny("bert", "sequence_classification"), MixDAConfig(**GATED)).train()
    inputs = tiny_inputs("bert", batch=3, padding="right", labels="classes")
    output = model(**inputs)
    assert set(model.base_model.context.record.losses) == {"balance", "z"}
    output.loss.backward()
    with_loss = gradients(model)
    labels = inputs.pop("labels")
    logits = model(**inputs).logits if form == "dict" else model(**inputs, return_dict=False)[0]
    torch.testing.assert_close(logits, output.logits)
    F.cross_entropy(logits, labels).backward()
    assert_same_gradients(gradients(model), with_loss)
    F.cross_entropy(model(**inputs).logits.detach(), labels)  # a loss nobody calls backward on costs nothing
    assert not gradients(model)


def test_break_07_preference_training_without_labels_gets_the_losses_of_each_forward(tiny, tiny_inputs) -> None:
    model = adapt(tiny("llama"), MixDAConfig(**GATED)).train()
    chosen, rejected = (tiny_inputs("llama", seed=seed, length=5 + seed) for seed in (1, 2))
    context = model.base_model.context
    context.loss_scale = 0.25
    outputs, extra = [], []
    for inputs in (chosen, rejected):
        outputs.append(model(**inputs))
        extra.append(sum(context.record.losses.values()))
    (outputs[0].logits.mean() - outputs[1].logits.mean()).square().backward()
    attached = gradients(model)
    context.loss_scale = 0.0
    outputs, extra = [], []
    for inputs in (chosen, rejected):
        outputs.append(model(**inputs))
        extra.append(sum(context.record.losses.values()))
    ((outputs[0].logits.mean() - outputs[1].logits.mean()).square() + 0.25 * sum(extra)).backward()
    assert_same_gradients(attached, gradients(model))


def test_break_07_losses_with_nothing_to_join_are_an_error(tiny, tiny_inputs) -> None:
    model = adapt(tiny("bert", "sequence_classification"), MixDAConfig(**MIXDA)).train()
    model.base_model.context.objectives.append(Penalty())
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="neither a loss nor an output with a gradient"):
        model(**tiny_inputs("bert"))
    model.eval()
    model(**tiny_inputs("bert"))  # no losses in evaluation


def test_break_07_losses_are_left_out_of_evaluation(tiny, tiny_inputs) -> None:
    model = adapt(tiny("bert", "sequence_classification"), MixDAConfig(**GATED))
    inputs = tiny_inputs("bert", labels="classes")
    output = model(**inputs)
    torch.testing.assert_close(output.loss, F.cross_entropy(output.logits, inputs["labels"]))


@pytest.mark.parametrize("kind", ["llama", "bert", "t5"])
def test_break_07_losses_weigh_in_a_micro_batch_as_its_own_loss_does(tiny, tiny_inputs, kind) -> None:
    """Rows of different length, labels on the first position: counted as the Trainer counts them."""
    still = {"dropout_rate": 0.0} if kind == "t5" else {}
    model = adapt(tiny(kind, **still), BottleneckConfig(r=3)).train()
    model.base_model.context.objectives.append(Penalty())
    inputs = tiny_inputs(kind, batch=4, length=9, padding="right", labels="tokens")
    inputs["labels"][1, 3:] = -100
    shifted = inputs["labels"][:, 1:] if kind == "llama" else inputs["labels"]
    items, parts = (shifted != -100).sum(), (slice(0, 1), slice(1, 4))
    micro_batches = [{k: v[part] for k, v in inputs.items()} for part in parts]
    for batch in [inputs] if kind == "llama" else micro_batches:  # BERT and T5 take a mean of each micro-batch
        model(**batch).loss.backward()
    expected = gradients(model)
    for batch in micro_batches:
        model(**batch, num_items_in_batch=items).loss.backward()
    assert_same_gradients(gradients(model), expected)


@pytest.mark.parametrize("labels", ["labels", "no labels"])
def test_break_07_trainer_accumulates_to_the_gradient_of_one_batch(tiny, tiny_inputs, tmp_path, labels) -> None:
    inputs = tiny_inputs("llama", batch=4, length=6, padding="right", labels="tokens")
    rows = [{k: v[i] for k, v in inputs.items()} for i in range(4)]

    class WithoutLabels(Trainer):
        """Keeps the labels from the model and makes the loss itself, as trainers of preferences do."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.model_accepts_loss_kwargs = False

        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            inputs.pop("labels")
            return model(**inputs).logits.square().mean()

    def weights_after_one_step(batch: int, accumulated: int) -> dict[str, Tensor]:
        model = adapt(tiny("llama"), BottleneckConfig(r=3, scale=0.5))
        context = model.base_model.context
        context.objectives.append(Penalty())
        context.loss_scale = 1 / accumulated
        arguments = TrainingArguments(
            str(tmp_path), max_steps=1, per_device_train_batch_size=batch, gradient_accumulation_steps=accumulated,
            learning_rate=1.0, lr_scheduler_type="constant", max_grad_norm=0, optim="sgd", report_to=[],
            use_cpu=True, save_strategy="no", disable_tqdm=True, remove_unused_columns=False,
        )  # fmt: skip
        trainer = (Trainer if labels == "labels" else WithoutLabels)(model, arguments, train_dataset=rows)
        trainer.train()
        return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}

    one, four = weights_after_one_step(4, 1), weights_after_one_step(1, 4)
    assert_same_gradients(one, four, atol=1e-5, rtol=1e-4)

    model = adapt(tiny("llama"), BottleneckConfig(r=3, scale=0.5))  # and with no trainer
    logits = model(**inputs).logits
    loss = model.get_base_model().loss_function(logits, inputs["labels"], 96)
    loss = loss if labels == "labels" else logits.square().mean()
    trained = [p for p in model.parameters() if p.requires_grad]
    (loss + 0.1 * sum(p.square().sum() for p in trained)).backward()
    torch.optim.SGD(trained, lr=1.0).step()
    by_hand = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
    assert_same_gradients(four, by_hand, atol=1e-5, rtol=1e-4)


# --- 8 -----------------------------------------------------------------------------------------------------------


class Trunk(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(1, 6)
        self.evaluated = 0

    def forward(self, scale: Tensor) -> Tensor:
        self.evaluated += 1
        return self.linear(scale.unsqueeze(-1)).tanh()  # (B, 6)


class Conditioned(Adapter):
    """Adds what a projection of its own makes of a trunk that the first such adapter owns."""

    def __init__(self, width: int, first: Conditioned | None) -> None:
        super().__init__()
        self.trunk = Trunk() if first is None else None
        self.__dict__["owner"] = first or self  # no child: its parameters are the first one's
        self.project = nn.Linear(6, width)

    def prepare(self, context: ForwardContext) -> None:
        if self.trunk is not None:
            context.record.shared[f"trunk {id(self)}"] = self.trunk(context.record.values["strength"])

    def forward(self, x: Tensor, y: Tensor, context: ForwardContext) -> Tensor:
        shared = context.record.shared[f"trunk {id(self.__dict__['owner'])}"]
        return y + self.project(shared).unsqueeze(1)


def conditioned(tiny) -> tuple[nn.Module, Conditioned]:
    model = without_dropout(tiny("bert")).requires_grad_(False).train()
    first: Conditioned | None = None
    for i in range(LAYERS):
        adapter = Conditioned(32, first)
        first = first or adapter
        host(model, f"bert.encoder.layer.{i}.output.dense", adapter, 48, 32)
    ForwardContext.of(model).fields.add("strength")
    randomize(model)
    return model, first


@pytest.mark.parametrize("checkpointing", [False, True])
def test_break_08_shared_trunk_is_evaluated_once_per_forward(tiny, tiny_inputs, checkpointing) -> None:
    model, first = conditioned(tiny)
    inputs = tiny_inputs("bert")
    strengths = torch.tensor([0.5, -1.0]), torch.tensor([2.0, 0.1])

    def run() -> dict[str, Tensor]:
        first.trunk.evaluated = 0
        outputs = [model(**inputs, strength=strength) for strength in strengths]
        assert first.trunk.evaluated == 2
        sum(probe(output, seed) for seed, output in enumerate(outputs)).backward()
        assert first.trunk.evaluated == 2  # not again in backward
        return gradients(model)

    plain = run()
    assert any("trunk" in name for name in plain)
    if checkpointing:
        checkpointed(model)
        assert_same_gradients(run(), plain)
    twin = copy.deepcopy(model)  # its adapters share the copy's trunk
    twin_first = next(m for m in twin.modules() if isinstance(m, Conditioned))
    torch.testing.assert_close(
        model(**inputs, strength=strengths[0]).logits, twin(**inputs, strength=strengths[0]).logits
    )
    assert (twin_first.trunk.evaluated, first.trunk.evaluated) == (3, 3)


@torch.no_grad()
def test_break_08_trunk_is_ready_for_an_encoder_that_runs_before_any_root(tiny, tiny_inputs) -> None:
    model = tiny("t5")
    first: Conditioned | None = None
    for path in ("encoder.block.0.layer.1.DenseReluDense.wo", "decoder.block.0.layer.2.DenseReluDense.wo"):
        adapter = Conditioned(32, first)
        first = first or adapter
        host(model, path, adapter, 48, 32)
    context = ForwardContext.of(model)
    context.fields.add("strength")
    randomize(model, scale=1.0)
    inputs = tiny_inputs("t5", batch=2)
    inputs.pop("decoder_input_ids")
    settings = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    generated = []
    for strength in (torch.tensor([3.0]), torch.tensor([-3.0])):
        first.trunk.evaluated = 0
        with context.pin(strength=strength):
            generated.append(model.generate(**inputs, **settings))
        assert first.trunk.evaluated == 5  # the encoder, and four steps
    assert not torch.equal(*generated)


def test_break_08_trunk_rests_while_adapters_are_off(tiny, tiny_inputs) -> None:
    model, first = conditioned(tiny)
    for layer in model.modules():
        if isinstance(layer, MixtureLayer):
            layer.enable_adapters(False)
    model(**tiny_inputs("bert"))
    assert first.trunk.evaluated == 0


# --- 9 -----------------------------------------------------------------------------------------------------------


class HookedBreaksModel(BreaksModel):
    attachment = HookedLayer


@dataclass
class HookedBreaksConfig(BreaksConfig):
    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = peft_type("HOOKED_BREAKS")


register("hooked_breaks", HookedBreaksConfig, HookedBreaksModel)


def test_break_09_hooked_layer_keeps_the_keys_and_lets_foreign_verbs_pass(tiny, tiny_inputs) -> None:
    base, inputs = tiny("bert"), tiny_inputs("bert")
    keys, logits = list(base.state_dict()), base(**inputs).logits
    modules = [name for name, _ in base.named_modules()]
    config = HookedBreaksConfig(target_modules=["attention"], hidden_size=32)
    model = adapt(base, config)
    hosts = list(model.base_model.hosts())
    assert [type(h) for h in hosts] == [HookedLayer] * LAYERS

    mine = [k for k in base.state_dict() if ".mixadapters." in k]
    assert [k for k in base.state_dict() if k not in mine] == keys
    assert all(".attention.mixadapters.hooked_breaks_adapters.default." in k for k in mine)
    assert all(base.get_submodule(name) is not None for name in modules)
    assert isinstance(base.get_submodule("bert.encoder.layer.0.attention.self.query"), nn.Linear)
    adapted = model(**inputs).logits
    assert (adapted - logits).abs().max() > 1e-2

    # What other libraries call on every tuner layer, for adapters of theirs.
    for h in hosts:
        h.set_adapter(["style"])
        h.set_scale("style", 0.3)
        h.scale_layer(0.3)
        h.unscale_layer(0.3)
        h.unscale_layer()
    assert torch.equal(model(**inputs).logits, adapted)
    model.set_adapter("default")
    assert torch.equal(model(**inputs).logits, adapted)

    # Another library adapts a child by its name, and takes it away again.
    lora = LoraConfig(r=2, target_modules=["attention.self.query"], init_lora_weights=False)
    inject_adapter_in_model(lora, base, adapter_name="style")
    assert (model(**inputs).logits - adapted).abs().max() > 1e-3
    query = base.get_submodule("bert.encoder.layer.0.attention.self.query")
    assert type(query).__module__.startswith("peft.tuners.lora")
    for i in range(LAYERS):
        owner = base.get_submodule(f"bert.encoder.layer.{i}.attention.self")
        owner.query = owner.query.get_base_layer()
    assert torch.equal(model(**inputs).logits, adapted)

    with model.disable_adapter():
        assert torch.equal(model(**inputs).logits, logits)
    twin = copy.deepcopy(model)
    randomize(model, seed=1)
    assert torch.equal(twin(**inputs).logits, adapted)  # the copy's hooks are the copy's own

    bare = model.unload()
    assert bare is base
    assert list(bare.state_dict()) == keys
    assert [name for name, _ in bare.named_modules()] == modules
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in bare.modules())
    assert torch.equal(bare(**inputs).logits, logits)


def test_break_09_hooked_adapters_save_load_and_train(tiny, tiny_inputs, tmp_path) -> None:
    inputs = tiny_inputs("bert")
    model = adapt(tiny("bert"), HookedBreaksConfig(target_modules=["attention"], hidden_size=32))
    expected = model(**inputs).logits
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny("bert"), tmp_path, is_trainable=True)
    assert torch.equal(loaded(**inputs).logits, expected)
    without_dropout(loaded).train()
    probe(loaded(**inputs), 0).backward()
    plain = gradients(loaded)
    checkpointed(loaded)
    probe(loaded(**inputs), 0).backward()
    assert_same_gradients(gradients(loaded), plain)
    assert all(".hooked_breaks_adapters." in name for name in plain)


# --- 10 ----------------------------------------------------------------------------------------------------------

STATEFUL = ["causal_prefix", "request"]


def stateful(tiny, granularity: str, kind: str = "llama") -> PeftModel:
    return adapt(tiny(kind), MixDAConfig(**MIXDA, gate_granularity=granularity))


def full(model: nn.Module, ids: Tensor, prompt: int, granularity: str) -> Tensor:
    """Logits without a cache; the request is the first `prompt` tokens."""
    mask = torch.zeros_like(ids)
    mask[:, :prompt] = 1
    extra = {"prompt_mask": mask} if granularity == "request" else {}
    return model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False, **extra).logits


@torch.no_grad()
@pytest.mark.parametrize("granularity", STATEFUL)
@pytest.mark.parametrize("make", ["model", "caller", "static"])
def test_break_10_cached_decoding_equals_the_full_forward(tiny, tiny_inputs, granularity, make) -> None:
    model = stateful(tiny, granularity)
    ids = tiny_inputs("llama", batch=2, length=9)["input_ids"]
    cache = {
        "model": lambda: None,
        "caller": lambda: DynamicCache(config=model.config),
        "static": lambda: StaticCache(config=model.config, max_cache_len=16),
    }[make]()
    expected = full(model, ids, 5, granularity)
    pieces = []
    for start, end in ((0, 5), (5, 6), (6, 9)):
        output = model(
            input_ids=ids[:, start:end], attention_mask=torch.ones(2, end, dtype=torch.long), past_key_values=cache
        )
        cache = output.past_key_values
        pieces.append(output.logits)
    torch.testing.assert_close(torch.cat(pieces, 1), expected, **CLOSE)


@torch.no_grad()
@pytest.mark.parametrize("granularity", STATEFUL)
@pytest.mark.parametrize("static", [False, True])
def test_break_10_generation_of_padded_rows_equals_each_alone(tiny, tiny_inputs, granularity, static) -> None:
    model = stateful(tiny, granularity)
    inputs = tiny_inputs("llama", batch=3, length=6, padding="left")
    settings = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    if static:
        settings |= {"cache_implementation": "static", "disable_compile": True}
    together = model.generate(**inputs, **settings)[:, 6:]
    for row in range(3):
        alone = inputs["input_ids"][row : row + 1, row:]
        generated = model.generate(input_ids=alone, attention_mask=torch.ones_like(alone), **settings)
        assert torch.equal(generated[0, alone.shape[1] :], together[row])


@torch.no_grad()
def test_break_10_beams_take_their_state_along(tiny, tiny_inputs) -> None:
    model = stateful(tiny, "causal_prefix")
    inputs = tiny_inputs("llama", batch=2, length=5, padding="left")
    settings = {"max_new_tokens": 8, "min_new_tokens": 8, "num_beams": 4, "do_sample": False}
    settings |= {"return_dict_in_generate": True, "num_return_sequences": 2, "output_scores": True}
    cached, again = (model.generate(**inputs, **settings, use_cache=flag) for flag in (True, False))
    assert torch.equal(cached.sequences, again.sequences)
    torch.testing.assert_close(cached.sequences_scores, again.sequences_scores, **CLOSE)
    # The beams did change places, or nothing was tested.
    assert (cached.beam_indices[:, 1:] != cached.beam_indices[:, :-1]).any()


@torch.no_grad()
@pytest.mark.parametrize("granularity", STATEFUL)
def test_break_10_state_follows_what_is_done_to_the_cache(tiny, tiny_inputs, granularity) -> None:
    model = stateful(tiny, granularity)
    ids = tiny_inputs("llama", batch=3, length=10)["input_ids"]

    def step(tokens: Tensor, cache: Any) -> Tensor:
        return model(input_ids=tokens, past_key_values=cache).logits

    def fresh() -> DynamicCache:
        cache = DynamicCache(config=model.config)
        model(input_ids=ids[:, :6], attention_mask=torch.ones(3, 6), past_key_values=cache)
        return cache

    more = ids[:, 6:8]
    cache = fresh()
    cache.reorder_cache(torch.tensor([2, 0, 0]))
    wanted = torch.cat([ids[[2, 0, 0], :6], more], 1)
    torch.testing.assert_close(step(more, cache), full(model, wanted, 6, granularity)[:, 6:], **CLOSE)

    cache = fresh()
    step(more, cache)
    cache.crop(-2)  # a draft was refused
    other = ids[:, 8:10]
    wanted = torch.cat([ids[:, :6], other], 1)
    torch.testing.assert_close(step(other, cache), full(model, wanted, 6, granularity)[:, 6:], **CLOSE)

    cache = fresh()
    cache.batch_repeat_interleave(2)
    wanted = torch.cat([ids[:, :6], more], 1).repeat_interleave(2, 0)
    expected = full(model, wanted, 6, granularity)[:, 6:]
    torch.testing.assert_close(step(more.repeat_interleave(2, 0), cache), expected, **CLOSE)

    cache = fresh()
    cache.batch_select_indices(torch.tensor([1]))
    wanted = torch.cat([ids[1:2, :6], more[1:2]], 1)
    torch.testing.assert_close(step(more[1:2], cache), full(model, wanted, 6, granularity)[:, 6:], **CLOSE)

    cache = fresh()
    kept = copy.deepcopy(cache)  # a prompt that is used several times
    step(more, cache)
    wanted = torch.cat([ids[:, :6], other], 1)
    torch.testing.assert_close(step(other, kept), full(model, wanted, 6, granularity)[:, 6:], **CLOSE)

    cache = fresh()
    cache.crop(-6)  # emptied: the next tokens are a new prompt
    logits = model(input_ids=ids[:, 3:9], attention_mask=torch.ones(3, 6), past_key_values=cache).logits
    torch.testing.assert_close(logits, full(model, ids[:, 3:9], 6, granularity), **CLOSE)


@torch.no_grad()
@pytest.mark.parametrize("granularity", STATEFUL)
def test_break_10_static_cache_starts_anew_after_reset(tiny, tiny_inputs, granularity) -> None:
    model = stateful(tiny, granularity)
    first, second = (tiny_inputs("llama", length=6, seed=seed)["input_ids"] for seed in (1, 2))
    cache = StaticCache(config=model.config, max_cache_len=12)
    for ids in (first, second):
        cache.reset()
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), past_key_values=cache).logits
        torch.testing.assert_close(logits, full(model, ids, 6, granularity), **CLOSE)


@torch.no_grad()
def test_break_10_gates_of_two_adapters_at_one_layer_keep_apart(tiny, tiny_inputs) -> None:
    config = MixDAConfig(**MIXDA, gate_granularity="causal_prefix")
    model = adapt(tiny("llama"), first=config, second=copy.deepcopy(config))
    inputs = tiny_inputs("llama", batch=2, length=6)
    settings = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    together = model.generate(**inputs, **settings, adapter_names=["first", "second"])
    for row, name in enumerate(("first", "second")):
        model.set_adapter(name)
        alone = {k: v[row : row + 1] for k, v in inputs.items()}
        assert torch.equal(model.generate(**alone, **settings)[0], together[row])
    model.base_model.set_adapter(["first", "second"])
    ids = inputs["input_ids"]
    output = model(input_ids=ids[:, :4], attention_mask=torch.ones(2, 4))
    step = model(input_ids=ids[:, 4:], past_key_values=output.past_key_values)
    torch.testing.assert_close(step.logits, full(model, ids, 4, "causal_prefix")[:, 4:], **CLOSE)


@torch.no_grad()
@pytest.mark.parametrize("granularity", STATEFUL)
def test_break_10_layers_that_share_weights_do_not_share_state(granularity) -> None:
    torch.manual_seed(0)
    base = transformers.AlbertModel(
        transformers.AlbertConfig(
            vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
            embedding_size=16, initializer_range=0.3,
        )
    )  # fmt: skip
    config = MixDAConfig(domains=["a", "b"], r=3, domain_layers=[0], gate_granularity=granularity)
    model = adapt(base, config)
    ids = torch.randint(5, 96, (2, 6))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    evaluated = model(**inputs).last_hidden_state
    trained = model.train()(**inputs, prompt_mask=torch.ones_like(ids)).last_hidden_state
    torch.testing.assert_close(evaluated, trained, **CLOSE)


@torch.no_grad()
def test_break_10_cache_that_the_gate_has_not_seen_is_refused(tiny, tiny_inputs) -> None:
    model = stateful(tiny, "causal_prefix")
    ids = tiny_inputs("llama", length=6)["input_ids"]
    with model.disable_adapter():
        cache = model(input_ids=ids[:, :4]).past_key_values
    with pytest.raises(ValueError, match=r"has not seen.*causal_prefix.*adapters active"):
        model(input_ids=ids[:, 4:], past_key_values=cache)


# --- 11 ----------------------------------------------------------------------------------------------------------


def assert_current_weights_count(model: nn.Module, inputs: dict[str, Tensor], dtype: torch.dtype) -> None:
    """Zeroing the `up` projections as they are now makes the base model; and gradients arrive in them."""
    ups = [p for n, p in model.named_parameters() if n.endswith((".up.weight", ".up.bias")) and "adapters." in n]
    assert ups
    assert all(p.dtype == dtype for p in ups)
    adapted = model(**inputs).logits
    with model.disable_adapter():
        base = model(**inputs).logits
    assert (adapted - base).abs().max() > 1e-2
    adapted.float().square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in ups)
    kept = [p.detach().clone() for p in ups]
    with torch.no_grad():
        for p in ups:
            p.zero_()
        assert torch.equal(model(**inputs).logits, base)
        for p, value in zip(ups, kept, strict=True):
            p.copy_(value)
        assert torch.equal(model(**inputs).logits, adapted)
    model.zero_grad()


@pytest.mark.parametrize("config", [BottleneckConfig(r=3, layer_norm=True), MixDAConfig(**MIXDA)])
def test_break_11_bank_computes_with_the_weights_as_they_are(tiny, tiny_inputs, config, tmp_path) -> None:
    inputs = tiny_inputs("llama", length=5)
    model = adapt(tiny("llama"), copy.deepcopy(config))
    assert_current_weights_count(model, inputs, torch.float32)

    twin = copy.deepcopy(model)
    assert_current_weights_count(twin, inputs, torch.float32)
    expected = model(**inputs).logits
    randomize(twin, seed=3)
    assert torch.equal(model(**inputs).logits, expected)

    state = {k: v.clone() for k, v in randomize(copy.deepcopy(model), seed=4).state_dict().items()}
    model.load_state_dict(state, assign=True)
    model.requires_grad_(True)
    assert_current_weights_count(model, inputs, torch.float32)
    assert (model(**inputs).logits - expected).abs().max() > 1e-2

    for name, module in list(model.named_modules()):  # as optimizers and wrappers do
        if "adapters." in name and isinstance(module, nn.Linear):
            module.weight = nn.Parameter(module.weight.detach() * 0.5)
    assert_current_weights_count(model, inputs, torch.float32)

    model.to(torch.bfloat16)
    assert_current_weights_count(model, inputs, torch.bfloat16)
    model.base_model._cast_adapter_dtype("default", autocast_adapter_dtype=True)  # what get_peft_model does
    assert_current_weights_count(model, inputs, torch.float32)

    model.to(torch.float32).save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny("llama"), tmp_path, low_cpu_mem_usage=True, is_trainable=True).eval()
    loaded.requires_grad_(True)
    assert_current_weights_count(loaded, inputs, torch.float32)


# --- 12 ----------------------------------------------------------------------------------------------------------


def packed(tiny_inputs) -> tuple[list[Tensor], Tensor, Tensor]:
    documents = [tiny_inputs("llama", batch=1, length=n, seed=n)["input_ids"] for n in (4, 6, 3)]
    return documents, torch.cat(documents, 1), torch.cat([torch.arange(d.shape[1]) for d in documents]).unsqueeze(0)


@pytest.mark.parametrize("granularity", ["causal_prefix", "token"])
@pytest.mark.parametrize("training", [False, True])
def test_break_12_packed_sequences_equal_their_documents(tiny, tiny_inputs, granularity, training) -> None:
    model = stateful(tiny, granularity).train(training)
    documents, ids, positions = packed(tiny_inputs)
    together = model(input_ids=ids, position_ids=positions, use_cache=False).logits
    alone = [model(input_ids=d, use_cache=False).logits for d in documents]
    torch.testing.assert_close(together, torch.cat(alone, 1), **CLOSE)
    if granularity == "causal_prefix":  # without positions it is one document
        assert (model(input_ids=ids, use_cache=False).logits - together).abs().max() > 1e-2


def test_break_12_padding_is_no_new_document(tiny, tiny_inputs) -> None:
    model = stateful(tiny, "causal_prefix")
    inputs = tiny_inputs("llama", batch=2, length=6, padding="left")
    positions = (inputs["attention_mask"].cumsum(1) - 1).clamp_min(0)
    logits = model(**inputs, position_ids=positions, use_cache=False).logits
    alone = model(input_ids=inputs["input_ids"][1:, 1:], use_cache=False).logits
    torch.testing.assert_close(logits[1:, 1:], alone, **CLOSE)


def test_break_12_gates_that_would_mix_documents_refuse(tiny, tiny_inputs) -> None:
    _, ids, positions = packed(tiny_inputs)
    decoder = stateful(tiny, "request")
    with pytest.raises(ValueError, match=r"position_ids restart.*per request.*'token' or 'causal_prefix'"):
        decoder(input_ids=ids, position_ids=positions, use_cache=False)
    encoder = stateful(tiny, "sequence", "bert")
    with pytest.raises(ValueError, match=r"position_ids restart.*per sequence"):
        encoder(input_ids=ids, position_ids=positions, attention_mask=torch.ones_like(ids))
    encoder(input_ids=ids, position_ids=torch.arange(13).unsqueeze(0), attention_mask=torch.ones_like(ids))


def test_every_break_has_its_tests() -> None:
    numbered = {name.split("_")[2] for name in globals() if name.startswith("test_break_")}
    assert numbered == {f"{i:02d}" for i in range(1, 13)}
