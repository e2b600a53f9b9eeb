from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from mixadapters import BottleneckConfig, ForwardContext, MixDAConfig, MoAConfig, MoSAConfig, PILLConfig
from mixadapters.core import hooks
from mixadapters.core.hooks import RootHooks

MIXDA = {"domains": ["a", "b"], "r": 3, "task_r": 2, "domain_layers": [0, 1], "init_weights": False}


def two(base: nn.Module) -> PeftModel:
    model = get_peft_model(base, BottleneckConfig(r=3, init_weights=False), adapter_name="first")
    model.add_adapter("second", BottleneckConfig(r=3, init_weights=False))
    return model


# --- one context for a model and what wraps it -------------------------------------------------------------------


@pytest.mark.parametrize("task_type", [None, "CAUSAL_LM"])
def test_wrappers_have_the_context_of_their_model(tiny, task_type) -> None:
    base = tiny("llama")
    model = get_peft_model(base, BottleneckConfig(r=3, task_type=task_type))
    context = ForwardContext.find(base)
    assert context is not None
    for wrapper in (model, model.base_model, nn.DataParallel(model), torch.compile(model)):
        assert ForwardContext.of(wrapper) is ForwardContext.find(wrapper) is context
    assert not model._forward_pre_hooks
    assert not model.base_model._forward_pre_hooks
    assert len(base._forward_pre_hooks) == 1


def test_part_that_was_adapted_on_its_own_is_not_its_owners() -> None:
    part = nn.Linear(2, 2)
    whole = nn.Sequential(part)
    assert ForwardContext.of(part) is not ForwardContext.of(whole)


def test_models_inside_a_model_are_not_it(tiny) -> None:
    base = tiny("t5")
    context = ForwardContext.of(base)
    for part in (base.encoder, base.decoder):
        assert ForwardContext.find(part) is None
        assert ForwardContext.of(part) is not context
    assert ForwardContext.find(base) is context


def test_part_that_runs_first_leaves_none_of_the_others_out(tiny, tiny_inputs) -> None:
    base = get_peft_model(tiny("t5"), BottleneckConfig(r=3)).get_base_model().train()
    base.gradient_checkpointing_enable({"use_reentrant": False})
    blocks = [block for stack in (base.encoder, base.decoder) for block in stack.block]
    base.encoder(input_ids=torch.ones(1, 3, dtype=torch.long))
    wrapped = [isinstance(block._gradient_checkpointing_func, hooks.Checkpointed) for block in blocks]
    assert wrapped == [block in list(base.encoder.block) for block in blocks]
    base(**tiny_inputs("t5", labels="tokens"))
    assert all(isinstance(block._gradient_checkpointing_func, hooks.Checkpointed) for block in blocks)


# --- outside a forward -------------------------------------------------------------------------------------------


def by_name(part: Any, x: Tensor, model: PeftModel) -> dict[str, Tensor]:
    found = {}
    for name in ("second", "first"):
        model.set_adapter(name)
        found[name] = part(x)
    assert not torch.allclose(found["first"], found["second"], atol=1e-3)
    return found


def test_a_layer_by_itself_knows_the_pinned_fields_and_none_of_a_forward_before(tiny, tiny_inputs) -> None:
    model, inputs, x = two(tiny("llama")).eval(), tiny_inputs("llama"), torch.randn(2, 5, 32)
    context, part = model.base_model.context, model.get_base_model().model.layers[0].mlp
    alone = by_name(part, x, model)
    model(**inputs, adapter_names=["second", "second"])
    assert torch.equal(part(x), alone["first"])
    with context.pin(adapter_names=["second", "first"]):
        mixed = part(x)
        torch.testing.assert_close(mixed, torch.stack([alone["second"][0], alone["first"][1]]), rtol=1e-4, atol=1e-5)
        with pytest.raises(ValueError, match=r"`adapter_names` should be the same as the number of inputs.* 2 and 3"):
            part(torch.randn(3, 5, 32))
    assert torch.equal(part(x), alone["first"])


def test_layers_by_themselves_are_of_one_call_while_it_stays_what_it_was(tiny) -> None:
    config = MoAConfig(num_experts=2, r=2, target_modules=["down_proj"], init_weights=False)
    model, x = get_peft_model(tiny("llama"), config).eval(), torch.randn(2, 5, 32)
    context, layers = model.base_model.context, model.get_base_model().model.layers
    alone = [layer.mlp(x) for layer in layers[:2]]
    for ids in (0, 1):
        with context.pin(expert_ids=torch.tensor([ids, ids])):
            assert not torch.allclose(layers[1].mlp(x), alone[1], atol=1e-3)
        assert torch.equal(layers[0].mlp(x), alone[0])
        with context.pin(expert_ids=torch.tensor([ids, ids])):
            assert not torch.allclose(layers[1].mlp(x), alone[1], atol=1e-3)
    with torch.no_grad():
        layers[0].mlp(x)
        calm = context.record
        layers[1].mlp(x)
        assert context.record is calm
        layers[0].mlp(x)
    layers[1].mlp(x)  # which records gradients, and that one did not
    assert (context.record.grad, context.record.training) == (True, False)
    layers[1].mlp.train()(x)
    assert context.record.training


def test_a_layer_by_itself_has_what_is_drawn_once_in_a_forward_drawn_anew(tiny) -> None:
    model = get_peft_model(tiny("llama"), MoSAConfig(r=4, base="lora")).train()
    part, x = model.get_base_model().model.layers[0].self_attn.q_proj, torch.randn(2, 5, 32)
    for parameter in part.parameters():
        nn.init.normal_(parameter)
    drawn = {tuple(part(x).flatten()[:4].tolist()) for _ in range(8)}
    assert len(drawn) > 1


def test_a_block_by_itself_reads_its_own_taps_and_none_of_a_forward_before(tiny, tiny_inputs) -> None:
    model = get_peft_model(tiny("llama"), MoSAConfig(r=16, base="adapter", init_weights=False)).eval()
    base, x = model.get_base_model(), torch.randn(2, 5, 32)
    places = base.model.rotary_emb(x, torch.arange(5)[None])
    alone = base.model.layers[0](x, position_embeddings=places)
    model(**tiny_inputs("llama"))
    assert torch.equal(base.model.layers[0](x, position_embeddings=places), alone)


def test_a_layer_by_itself_that_reads_tokens_first_has_as_many_rows_as_sequences() -> None:
    model = nn.Sequential(nn.Linear(6, 6))
    model = get_peft_model(model, BottleneckConfig(r=3, target_modules=["0"], init_weights=False))
    model.add_adapter("other", BottleneckConfig(r=3, target_modules=["0"], init_weights=False))
    layer, x = model.get_base_model()[0], torch.randn(3, 4, 6)
    with model.base_model.context.pin(adapter_names=["default", "other", "default"]):
        mixed = layer(x)
        layer.lies("", tokens_first=True)
        torch.testing.assert_close(layer(x.transpose(0, 1)), mixed.transpose(0, 1))


def test_a_stack_by_itself_leaves_nothing_to_the_layers_that_are_called_next(tiny, tiny_inputs) -> None:
    model, inputs, x = two(tiny("llama")).eval(), tiny_inputs("llama"), torch.randn(2, 5, 32)
    context, base = model.base_model.context, model.get_base_model()
    alone = by_name(base.model.layers[0].mlp, x, model)
    with context.pin(adapter_names=["second", "second"]):
        base.model(**inputs)
    assert torch.equal(base.model.layers[0].mlp(x), alone["first"])
    base.model.layers[1].register_forward_pre_hook(lambda *_: 1 / 0)
    with context.pin(adapter_names=["second", "second"]), pytest.raises(ZeroDivisionError):
        base.model(**inputs)
    assert torch.equal(base.model.layers[0].mlp(x), alone["first"])


def test_a_thread_without_a_forward_knows_nothing_of_that_of_another(tiny, tiny_inputs) -> None:
    model, inputs, x = two(tiny("llama")).eval(), tiny_inputs("llama"), torch.randn(2, 5, 32)
    part, seen = model.get_base_model().model.layers[0].mlp, []
    alone = by_name(part, x, model)

    def elsewhere(*_: Any) -> None:
        if not seen:
            thread = threading.Thread(target=lambda: seen.append(part(x)))
            seen.append(None)
            thread.start()
            thread.join()

    model.get_base_model().model.layers[1].register_forward_pre_hook(elsewhere)
    mixed = model(**inputs, adapter_names=["second", "second"]).logits
    assert torch.equal(seen[1], alone["first"])
    assert torch.equal(mixed, model(**inputs, adapter_names=["second", "second"]).logits)


def test_layers_by_themselves_share_what_is_decided_once_and_run_again_in_backward(tiny) -> None:
    """A router for the model decides in the first of them, anew in each call; taps are of the call."""
    config = MoAConfig(num_experts=3, r=2, router="softmax", router_scope="model", init_weights=False)
    model = get_peft_model(tiny("llama"), config).train()
    base, first, second = model.get_base_model(), torch.randn(2, 5, 32), torch.randn(1, 7, 32)
    layers = base.model.layers

    def run(x: Tensor) -> Tensor:
        places = base.model.rotary_emb(x, torch.arange(x.shape[1])[None])
        for layer in layers:
            x = layer(x, position_embeddings=places)
        return x

    plain, other = run(first), run(second)
    plain.sum().backward()
    expected = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    assert expected
    model.zero_grad()
    base.gradient_checkpointing_enable({"use_reentrant": False})
    base(input_ids=torch.ones(1, 3, dtype=torch.long))  # a forward has wrapped what runs layers again
    again = run(first)
    assert torch.equal(run(second), other)
    assert torch.equal(again, plain)
    again.sum().backward()
    for name, parameter in model.named_parameters():
        if name in expected:
            torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-5, atol=1e-6)


# --- adapters that are switched before the backward --------------------------------------------------------------


def gradients(model: PeftModel, inputs: dict[str, Tensor], order: Sequence[str]) -> dict[str, Tensor]:
    """Of the sum of the losses of forwards in `order`: names of adapters, or "" for none."""
    model.zero_grad()
    losses = []
    for name in order:
        if name:
            model.base_model.enable_adapter_layers()
            model.set_adapter(name)
        else:
            model.base_model.disable_adapter_layers()
        model.set_requires_grad(["first", "second"], True)
        losses.append(model(**inputs).loss)
    sum(losses).backward()
    model.base_model.enable_adapter_layers()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("order", [("first", "second"), ("first", ""), ("", "first"), ("first", "second", "first")])
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_layer_that_runs_again_sees_the_adapters_of_its_first_run(tiny, tiny_inputs, order, use_reentrant) -> None:
    model = two(tiny("llama")).train()
    base, inputs = model.get_base_model(), tiny_inputs("llama", labels="tokens")
    model.enable_input_require_grads()
    expected = gradients(model, inputs, order)
    base.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    got = gradients(model, inputs, order)
    assert got.keys() == expected.keys()
    assert got
    for name, gradient in expected.items():
        torch.testing.assert_close(got[name], gradient)


KINDS = {
    "bottleneck": lambda: BottleneckConfig(r=3, layer_norm=True, scale="learnable", init_weights=False),
    "mixda": lambda: MixDAConfig(**MIXDA),
    "mosa": lambda: MoSAConfig(r=4, consistency=0.0, init_weights=False),
    "pill": lambda: PILLConfig(r=3, token_ids={"image": [90]}, init_weights=False),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("verb", ["set_adapter", "disable_adapter_layers", "rows"])
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_adapters_that_are_frozen_before_the_backward_run_again_as_they_ran(
    tiny, tiny_inputs, kind, verb, use_reentrant
) -> None:
    """PEFT freezes what it switches off, which changes what a layer saves for the backward."""
    inputs = tiny_inputs("llama", labels="tokens")
    got = []
    for checkpointing in (False, True):
        model = get_peft_model(tiny("llama", num_hidden_layers=2), KINDS[kind](), adapter_name="first").train()
        model.add_adapter("second", KINDS[kind]())
        base = model.get_base_model()
        if checkpointing:
            base.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        embeds = base.get_input_embeddings()(inputs["input_ids"]).detach().requires_grad_()
        rows = {"adapter_names": ["first", "second"]} if verb == "rows" else {}
        kinds = {"modality_ids": inputs["input_ids"] % 2} if kind == "pill" else {}
        torch.manual_seed(0)
        others = {name: value for name, value in inputs.items() if name != "input_ids"}
        loss = model(inputs_embeds=embeds, **others, **rows, **kinds).loss
        if verb == "disable_adapter_layers":
            model.base_model.disable_adapter_layers()
        else:
            model.set_adapter("second")
        frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
        loss.backward()
        assert frozen == {name for name, p in model.named_parameters() if not p.requires_grad}
        trained = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        got.append({"inputs": embeds.grad, **trained})
    expected, checkpointed = got
    assert expected.keys() == checkpointed.keys()
    assert expected["inputs"].any()
    for name, gradient in expected.items():
        torch.testing.assert_close(checkpointed[name], gradient)


def test_first_run_counts_where_a_checkpoint_function_is_not_wrapped(tiny, tiny_inputs, monkeypatch) -> None:
    monkeypatch.setattr(RootHooks, "carry_into_checkpoints", lambda *_, **__: None)
    model = two(tiny("llama")).train()
    model.enable_input_require_grads()
    inputs = tiny_inputs("llama", labels="tokens")
    model.set_adapter("first")
    model(**inputs).loss.backward()
    name, expected = next((n, p.grad.clone()) for n, p in model.named_parameters() if p.grad is not None)
    model.zero_grad()
    model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
    loss = model(**inputs).loss
    model.set_adapter("second")
    model.set_requires_grad("first", True)
    loss.backward()
    torch.testing.assert_close(dict(model.named_parameters())[name].grad, expected)
    # Nothing of this lasts: the next forward sees what is active now.
    model.eval()
    logits = model(**inputs).logits
    model.set_adapter("first")
    assert not torch.equal(model(**inputs).logits, logits)


@pytest.mark.parametrize("verb", ["delete_adapter", "merge_adapter"])
def test_adapters_that_are_gone_before_the_backward_are_an_error(tiny, tiny_inputs, verb) -> None:
    config = {"r": 3, "activation": "identity", "init_weights": False, "target_modules": ["o_proj"]}
    config["use_bias"] = False
    model = get_peft_model(tiny("llama"), BottleneckConfig(**config), adapter_name="first").train()
    model.add_adapter("second", BottleneckConfig(**config))
    model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
    loss = model(**tiny_inputs("llama", labels="tokens")).loss
    if verb == "merge_adapter":
        model.base_model.merge_adapter(adapter_names=["first"])
    else:
        model.delete_adapter("first")
    with pytest.raises(RuntimeError, match=r"removed, merged or unmerged.*'first'.*after the backward"):
        loss.backward()
