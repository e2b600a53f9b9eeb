"""torch.compile in one graph: the same outputs and gradients as in eager mode, and nothing ignored."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from peft import get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import DynamicCache

from mixadapters import BottleneckConfig, MixDAConfig, MoAConfig
from mixadapters.routers import LearnedRouter

KINDS = {
    "bottleneck": lambda **f: BottleneckConfig(r=4, init_weights=False, **f),
    "parallel": lambda **f: BottleneckConfig(r=4, init_weights=False, placement="parallel", glu=True, **f),
    "mixda": lambda **f: MixDAConfig(domains=["a", "b"], r=4, init_weights=False, balance_coef=2.0, **f),
    "mixda_prefix": lambda **f: MixDAConfig(
        domains=["a", "b"], r=4, init_weights=False, gate_granularity="causal_prefix", z_coef=1.0, **f
    ),
    "moa": lambda **f: MoAConfig(num_experts=4, r=4, init_weights=False, router_aux_loss_coef=2.0, **f),
    "moa_softmax": lambda **f: MoAConfig(
        num_experts=4, r=4, init_weights=False, router="softmax", router_aux_loss_coef=2.0, **f
    ),
    "moa_block": lambda **f: MoAConfig(
        num_experts=4, r=4, init_weights=False, router_scope="block", router_z_loss_coef=1.0, n_shared_experts=1, **f
    ),
}
STEPPED = ("mixda", "moa_softmax")  # of these, whole trainings are compared
CLOSE = {"atol": 1e-5, "rtol": 1e-4}


pytestmark = pytest.mark.usefixtures("fresh_compiler")


@pytest.fixture
def batch(tiny_inputs: Any) -> Callable[[int], dict[str, Any]]:
    """Rows of other lengths, with labels, by seed."""
    return lambda seed: tiny_inputs("llama", batch=3, padding="left", labels="tokens", seed=seed)


def made(tiny: Any, kind: str, architecture: str = "llama", **fields: Any) -> nn.Module:
    model = get_peft_model(tiny(architecture, num_hidden_layers=1), KINDS[kind](**fields))
    with torch.no_grad():
        for gate in model.modules():
            if isinstance(gate, LearnedRouter):
                gate.output.weight.normal_()
    return model


class Outcome(NamedTuple):
    logits: Tensor
    loss: Tensor
    grads: dict[str, Tensor]


def outcome(model: nn.Module, forward: Any, inputs: dict[str, Any]) -> Outcome:
    model.zero_grad()
    output = forward(**inputs, use_cache=False)
    output.loss.backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}
    return Outcome(output.logits.detach(), output.loss.detach(), grads)


def assert_equal(compiled: Outcome, eager: Outcome) -> None:
    torch.testing.assert_close(compiled.logits, eager.logits, **CLOSE)
    torch.testing.assert_close(compiled.loss, eager.loss, **CLOSE)
    for name, grad in eager.grads.items():
        torch.testing.assert_close(compiled.grads[name], grad, msg=name, **CLOSE)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in STEPPED])
def test_outputs_and_gradients_are_those_of_eager_mode(kind: str, tiny: Any, batch: Any) -> None:
    model, inputs = made(tiny, kind).train(), batch(0)
    eager = outcome(model, model, inputs)
    assert_equal(outcome(model, torch.compile(model, backend="aot_eager", fullgraph=True), inputs), eager)
    if kind.startswith(("mixda", "moa")):  # the auxiliary loss is in it
        assert eager.loss > model.eval()(**inputs).loss + 0.1


@pytest.mark.parametrize("kind", STEPPED)
def test_steps_of_training_and_loaded_weights_are_those_of_eager_mode_and_not_each_compiled(
    kind: str, tiny: Any, batch: Any
) -> None:
    runs, ends, plain = [], [], torch.tensor(0.0)
    for compiling in (False, True):
        torch.manual_seed(0)
        model = made(tiny, kind, task_type="CAUSAL_LM" if kind == "mixda" else None)
        if not compiling:
            plain = model.eval()(**batch(0)).loss.detach()
        model.train()
        counter = CompileCounterWithBackend("aot_eager")
        forward = torch.compile(model, backend=counter, fullgraph=True) if compiling else model
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        first = {name: tensor.clone() for name, tensor in get_peft_model_state_dict(model).items()}
        steps = []
        for seed in range(4):  # other routes in every step
            steps.append(outcome(model, forward, batch(seed)))
            optimizer.step()
        ends.append({n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad})
        trained = outcome(model, forward, batch(0))
        set_peft_model_state_dict(model, first)
        steps += [trained, outcome(model, forward, batch(0))]
        assert not torch.allclose(steps[5].logits, trained.logits, atol=1e-3)
        torch.testing.assert_close(steps[5].logits, steps[0].logits, **CLOSE)
        runs.append(steps)
    assert counter.frame_count <= 2  # the first step begins the running sums of usage
    for eager, compiled in zip(*runs, strict=True):
        assert_equal(compiled, eager)
    for name, value in ends[0].items():
        torch.testing.assert_close(ends[1][name], value, msg=name, **CLOSE)
    assert runs[0][0].loss > plain + 0.1  # the auxiliary loss is in it


def test_outputs_of_an_encoder(tiny: Any, tiny_inputs: Any) -> None:
    model = made(tiny, "mixda", "bert", gate_granularity="sequence").eval()
    inputs = tiny_inputs("bert", batch=3, padding="right")
    with torch.no_grad():
        expected = model(**inputs).logits
        got = torch.compile(model, backend="aot_eager", fullgraph=True)(**inputs).logits
    torch.testing.assert_close(got, expected, **CLOSE)


class Compiled(NamedTuple):
    model: Any
    run: Any
    counter: Any
    inputs: dict[str, Any]

    def check(self, **names: Any) -> Tensor:
        """The outputs, which must be those of eager mode."""
        expected = self.model(**self.inputs, **names).logits
        torch.testing.assert_close(self.run(**self.inputs, **names).logits, expected, **CLOSE)
        return expected


def compiled_pair(kind: str, task_type: str | None, tiny: Any, tiny_inputs: Any) -> Compiled:
    """A model with two adapters. The question is when a graph is made anew."""
    model = made(tiny, kind, task_type=task_type)
    model.add_adapter("second", KINDS[kind](task_type=task_type))
    counter = CompileCounterWithBackend("eager")
    run = torch.compile(model.eval(), backend=counter, fullgraph=True)
    return Compiled(model, run, counter, {**tiny_inputs("llama", batch=3), "use_cache": False})


@torch.no_grad()
def test_adapters_that_are_switched_disabled_or_named_otherwise_are_honoured_after_compiling(
    tiny: Any, tiny_inputs: Any
) -> None:
    pair = compiled_pair("bottleneck", "CAUSAL_LM", tiny, tiny_inputs)
    for name in ("default", "second", "default"):
        pair.model.set_adapter(name)
        plain = pair.check()
    with pair.model.disable_adapter():
        assert torch.equal(pair.check(), tiny("llama", num_hidden_layers=1)(**pair.inputs).logits)
    pair.check()
    for names in (["second", "__base__", "default"], ["__base__", "default", "second"]):
        assert not torch.allclose(pair.check(adapter_names=names), plain, atol=1e-3)
    loads_without_compiling_again(pair, made(tiny, "bottleneck", task_type="CAUSAL_LM"))


def loads_without_compiling_again(pair: Compiled, other: nn.Module) -> None:
    """Weights that are loaded, those of `other`, are used by the graphs that are there."""
    before, frames = pair.check(), pair.counter.frame_count
    set_peft_model_state_dict(pair.model, get_peft_model_state_dict(other))
    loaded = pair.check()
    torch.testing.assert_close(loaded, other.eval()(**pair.inputs).logits, **CLOSE)
    assert not torch.allclose(loaded, before, atol=1e-3)
    assert pair.counter.frame_count == frames


@torch.no_grad()
@pytest.mark.parametrize("kind", ["mixda_prefix", "moa_block"])
def test_mixtures_that_are_named_or_loaded_are_honoured_after_compiling(
    kind: str, tiny: Any, tiny_inputs: Any
) -> None:
    pair = compiled_pair(kind, None, tiny, tiny_inputs)
    plain = pair.check()
    assert not torch.allclose(pair.check(adapter_names=["second", "__base__", "default"]), plain, atol=1e-3)
    loads_without_compiling_again(pair, made(tiny, kind))


def test_checkpointing_in_a_compiled_model(tiny: Any, tiny_inputs: Any) -> None:
    model = made(tiny, "moa_block").train()
    inputs = {**tiny_inputs("llama", labels="tokens"), "use_cache": False}
    grads = []
    for compiling in (False, True):
        model.zero_grad()
        if compiling:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        forward = torch.compile(model, backend="aot_eager") if compiling else model
        forward(**inputs).loss.backward()
        grads.append({n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad})
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, msg=name, **CLOSE)


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_auxiliary_losses_of_a_micro_batch_weigh_as_in_eager_mode(kind: str, tiny: Any, tiny_inputs: Any) -> None:
    """Llama divides its loss by the labels of all micro-batches, BERT does not."""
    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0} if kind == "bert" else {}
    base = tiny(kind, num_hidden_layers=1, **still)
    model = get_peft_model(base, MixDAConfig(domains=["a", "b"], r=3, init_weights=False, balance_coef=2.0)).train()
    inputs = tiny_inputs(kind, labels="tokens") | {"num_items_in_batch": torch.tensor(20.0)}
    grads = []
    for forward in (model, torch.compile(model, backend="aot_eager", fullgraph=True)):
        forward(**inputs).loss.backward()
        grads.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
        model.zero_grad(set_to_none=True)
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, msg=name, **CLOSE)


@pytest.mark.parametrize("granularity", ["causal_prefix", "request"])
def test_gates_that_remember_decode_in_one_graph(granularity: str, tiny: Any) -> None:
    """With a cache that grows; tests/core/test_context.py has the static one."""
    config = MoAConfig(num_experts=3, r=3, granularity=granularity, target_modules=["q_proj"], init_weights=False)
    model = get_peft_model(tiny("llama", num_hidden_layers=1), config).eval()
    ids = torch.randint(1, 20, (2, 6), generator=torch.Generator().manual_seed(0))

    def decoded(run: Any) -> Tensor:
        held = DynamicCache(config=model.config)
        found = [model(input_ids=ids[:, :3], past_key_values=held, use_cache=True).logits[:, -1]]
        found += [run(input_ids=ids[:, [i]], past_key_values=held, use_cache=True).logits[:, 0] for i in range(3, 6)]
        return torch.stack(found)

    with torch.no_grad():
        compiled = torch.compile(model, backend="eager", fullgraph=True)  # raises where the graph would break
        torch.testing.assert_close(decoded(compiled), decoded(model))
