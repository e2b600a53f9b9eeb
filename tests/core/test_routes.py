"""A routing is published, seen by observers, and set by pins."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from adapted import logits
from peft import get_peft_model
from torch import Tensor, nn

from mixadapters import BottleneckConfig, MixDAConfig
from mixadapters.core.routing import NO_LAYER, Routing, RoutingKey, find_routing
from mixadapters.core.sites import find_architecture, sublayer_of

FIELDS: dict[str, Any] = {
    "domains": ["a", "b"],
    "r": 3,
    "domain_layers": [0, 1],
    "task_adapter": None,
    "init_weights": False,
}


def adapted(tiny: Any, kind: str = "llama", **fields: Any) -> nn.Module:
    model = get_peft_model(tiny(kind), MixDAConfig(**{**FIELDS, **fields}))
    with torch.no_grad():
        for parameter in (p for m in model.base_model.mixtures().values() for p in m.router.parameters()):
            parameter.normal_()
    return model.eval()


def observed(model: nn.Module) -> list[tuple[RoutingKey, Routing, Tensor | None]]:
    """What observers are told from now on."""
    seen: list[tuple[RoutingKey, Routing, Tensor | None]] = []
    model.base_model.context.observers.append(lambda *told: seen.append(told))
    return seen


# --- published ---------------------------------------------------------------------------------------------------


def test_a_routing_is_published_under_adapter_sublayer_and_layer(tiny, tiny_inputs) -> None:
    model, inputs = adapted(tiny), tiny_inputs("llama", padding="right")
    routed: list[Tensor] = []
    for mixture in model.base_model.mixtures().values():
        mixture.router.register_forward_hook(lambda module, args, routing: routed.append(routing.weights))
    model(**inputs)
    context = model.base_model.context
    assert [key[:3] for key in context.record.routings] == [("default", "ffn", 0), ("default", "ffn", 1)]
    for layer in (0, 1):
        assert torch.equal(context.routing(RoutingKey("default", "ffn", layer)).weights, routed[layer])
    with pytest.raises(RuntimeError, match=r"no routing has been published under adapter 'default', ffn, layer 7"):
        context.routing(RoutingKey("default", "ffn", 7))


def test_a_short_key_that_means_several_routings_is_refused() -> None:
    routings = {RoutingKey("default", "attention", 3, path): Routing() for path in ("q", "v")}
    with pytest.raises(RuntimeError, match=r"several routings have been published under .*'q'.*'v'"):
        find_routing(routings, RoutingKey("default", "attention", 3))
    assert find_routing(routings, RoutingKey("default", "attention", 3, "v")) == Routing()


@pytest.mark.parametrize(
    ("kind", "path", "group"),
    [
        ("llama", "model.layers.1.self_attn.k_proj", "attention"),
        ("llama", "model.layers.1.mlp.up_proj", "ffn"),
        ("bert", "bert.encoder.layer.1.output.dense", "ffn"),
        ("bert", "bert.encoder.layer.1.attention.output.dense", "attention"),
        ("bert", "bert.encoder.layer.1.crossattention.self.key", "cross_attention"),
        ("t5", "decoder.block.0.layer.1.EncDecAttention.k", "cross_attention"),
        ("t5", "decoder.block.0.layer.2.DenseReluDense.wi", "ffn"),
        ("bart", "model.decoder.layers.1.encoder_attn.k_proj", "cross_attention"),
        ("bart", "model.decoder.layers.1.fc1", "ffn"),
        ("gpt2", "transformer.h.0.attn.c_attn", "attention"),
        ("gpt2", "lm_head", ""),
        (None, "blocks.0.cross_attn.to_k", "cross_attention"),
    ],
)
def test_modules_named_by_the_user_know_their_sublayer(kind, path, group) -> None:
    assert sublayer_of(path, None if kind is None else find_architecture(kind)) == group


def test_sites_know_adapter_sublayer_and_layer(tiny) -> None:
    model = get_peft_model(tiny("llama"), BottleneckConfig(placement="houlsby", r=2), adapter_name="one")
    keys = {host.adapters["one"].key[:3] for host in model.base_model.hosts()}
    assert keys == {("one", group, layer) for group in ("attention", "ffn") for layer in range(4)}
    outside = get_peft_model(tiny("llama"), BottleneckConfig(target_modules=["lm_head"], r=2))
    assert next(outside.base_model.hosts()).adapters["default"].key[:3] == ("default", "", NO_LAYER)


def test_a_layer_that_runs_again_finds_the_same_routing(tiny, tiny_inputs) -> None:
    model, inputs = adapted(tiny), tiny_inputs("llama", padding="right", labels="tokens")
    context = model.base_model.context
    runs: list[tuple[bool, int, Tensor]] = []
    for key, mixture in model.base_model.mixtures().items():

        def after(module: nn.Module, args: Any, routing: Routing, key: RoutingKey = key) -> None:
            runs.append((context.record.closed, key.layer, routing.weights.detach()))
            if context.record.closed:
                assert torch.equal(context.routing(key).weights, routing.weights)

        mixture.router.register_forward_hook(after)
    model.train()
    model.base_model.model.gradient_checkpointing_enable({"use_reentrant": False})
    model.base_model.model.enable_input_require_grads()
    seen = observed(model)
    model(**inputs).loss.backward()
    assert [run[:2] for run in runs] == [(False, 0), (False, 1), (True, 1), (True, 0)]
    assert len(seen) == 2  # a layer that runs again tells nothing new


# --- observed ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [False, True])
def test_observers_see_every_routing_with_the_rows_that_count(tiny, tiny_inputs, training) -> None:
    model, inputs = adapted(tiny), tiny_inputs("llama", padding="right")
    seen = observed(model.train(training))
    model(**inputs)
    assert [key.layer for key, _, _ in seen] == [0, 1]
    for key, routing, mask in seen:
        published = model.base_model.context.record.routings[key]
        assert torch.equal(routing.probs, published.probs)
        assert routing.arms == ("a", "b", "frozen")
        assert torch.equal(mask, inputs["attention_mask"].flatten().bool())


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_observers_see_every_step_of_generate(tiny, tiny_inputs, kind) -> None:
    model, inputs = adapted(tiny, kind), tiny_inputs(kind)
    inputs.pop("decoder_input_ids", None)
    seen = observed(model)
    model.generate(**inputs, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    steps = 2 * 3 + (2 if kind == "t5" else 0)  # the encoder of `generate` runs before any forward of the whole model
    assert len(seen) == steps


def test_observers_see_the_rows_of_each_adapter_of_a_mixed_batch(tiny, tiny_inputs) -> None:
    model, inputs = adapted(tiny, domain_layers=[0]), tiny_inputs("llama", batch=3)
    model.add_adapter("other", MixDAConfig(**{**FIELDS, "domain_layers": [0]}))
    seen = observed(model.eval())
    model(**inputs, adapter_names=["other", "__base__", "default"])
    length = inputs["input_ids"].shape[1]
    rows = {key.adapter: mask.view(3, length).all(1).tolist() for key, _, mask in seen}
    assert rows == {"default": [False, False, True], "other": [True, False, False]}


def test_observers_see_routers_that_have_nothing_to_decide(tiny, tiny_inputs) -> None:
    model = get_peft_model(tiny("llama"), BottleneckConfig(r=2)).eval()
    seen = observed(model)
    model(**tiny_inputs("llama"))
    assert [key[:3] for key, _, _ in seen] == [("default", "ffn", layer) for layer in range(4)]
    assert model.base_model.context.record.routings == {}


def test_a_copy_of_the_model_has_no_observers(tiny, tiny_inputs) -> None:
    model = adapted(tiny)
    seen = observed(model)
    copy.deepcopy(model)(**tiny_inputs("llama"))
    assert seen == []
    pickle.dumps(model.base_model.context)


# --- pinned ------------------------------------------------------------------------------------------------------


def test_a_pinned_routing_replaces_what_the_router_decides(tiny, tiny_inputs) -> None:
    model, inputs = adapted(tiny), tiny_inputs("llama", batch=3)
    plain = logits(model, inputs)
    published = dict(model.base_model.context.record.routings)
    other = {**inputs, "input_ids": inputs["input_ids"].flip(0)}
    with model.base_model.pin_routes(published):
        assert torch.equal(logits(model, inputs), plain)
        logits(model, other)
        pinned = model.base_model.context.record.routings
        assert all(torch.equal(pinned[key].weights, routing.weights) for key, routing in published.items())
    assert torch.equal(logits(model, inputs), plain)


def test_a_pinned_function_changes_what_the_router_decides(tiny, tiny_inputs) -> None:
    model, inputs = adapted(tiny), tiny_inputs("llama")
    seen: list[Routing] = []

    def first_alone(routing: Routing) -> Routing:
        seen.append(routing)
        return Routing(torch.zeros(14, 1, dtype=torch.long), torch.ones(14, 1))

    with model.base_model.pin_routes({"ffn/*": first_alone}):
        changed = logits(model, inputs)
    with model.base_model.pin_routes({"ffn/*": torch.zeros(2, dtype=torch.long)}):
        assert torch.equal(changed, logits(model, inputs))
    assert all(routing.probs is not None for routing in seen)
    assert len(seen) == len(model.base_model.mixtures())
    with (
        model.base_model.pin_routes({"ffn/*": lambda routing: routing.probs}),
        pytest.raises(ValueError, match="returned Tensor; return a Routing"),
    ):
        model(**inputs)


def test_numbers_of_experts_pin_rows_tokens_and_slots_alike(tiny, tiny_inputs) -> None:
    model, inputs = adapted(tiny), tiny_inputs("llama", batch=3)
    by_row = torch.tensor([1, -1, 0])
    length = inputs["input_ids"].shape[1]
    by_token = by_row.unsqueeze(1).expand(3, length)
    expected = logits(model, {**inputs, "domain_ids": by_row})
    tuner = model.base_model
    for routes in (
        {"ffn/*": by_row},
        {"*": by_token},
        {"ffn/0": by_token.reshape(-1), "ffn/1": by_token.reshape(-1, 1)},
        {RoutingKey("default", "ffn", 0): by_row, ("default", "ffn", 1): Routing(by_token.reshape(-1, 1))},
    ):
        with tuner.pin_routes(routes):
            torch.testing.assert_close(logits(model, inputs), expected, atol=1e-6, rtol=1e-5)


def test_a_key_goes_before_a_pattern_and_a_block_inside_before_one_outside(tiny, tiny_inputs) -> None:
    model, inputs = adapted(tiny, domain_layers=[0]), tiny_inputs("llama", batch=2)
    tuner = model.base_model

    def chosen() -> list[int]:
        logits(model, inputs)
        return next(iter(tuner.context.record.routings.values())).indices[:, 0].view(2, -1)[:, 0].tolist()

    ones, zeros = torch.tensor([1, 1]), torch.tensor([0, 0])
    with tuner.pin_routes({RoutingKey("default", "ffn", 0): ones, "ffn/*": zeros}):
        assert chosen() == [1, 1]
        with tuner.pin_routes({"*/0": zeros}):
            assert chosen() == [0, 0]
        assert chosen() == [1, 1]


def test_pins_of_blocks_outside_hold_where_a_block_inside_says_nothing(tiny, tiny_inputs) -> None:
    model, inputs = adapted(tiny), tiny_inputs("llama", batch=2)
    tuner, ones, zeros = model.base_model, torch.tensor([1, 1]), torch.tensor([0, 0])
    with tuner.pin_routes({"*": ones}), tuner.pin_routes({"ffn/0": zeros}):
        logits(model, inputs)
    assert [int(r.indices.max()) for r in tuner.context.record.routings.values()] == [0, 1]


def test_pinned_rows_follow_the_beams_of_generate(tiny, tiny_inputs) -> None:
    model, inputs = adapted(tiny), tiny_inputs("llama", batch=2)
    settings = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "num_beams": 2}
    ids = torch.tensor([1, 0])
    with model.base_model.context.pin(domain_ids=ids):
        expected = model.generate(**inputs, **settings)
    assert not torch.equal(expected, model.generate(**inputs, **settings))
    with model.base_model.pin_routes({"*": ids}):
        assert torch.equal(model.generate(**inputs, **settings), expected)


def test_a_pinned_route_holds_where_a_layer_runs_again(tiny, tiny_inputs) -> None:
    model, inputs = adapted(tiny), tiny_inputs("llama", labels="tokens")
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.base_model.model.gradient_checkpointing_enable({"use_reentrant": False})
            model.base_model.model.enable_input_require_grads()
        model.zero_grad()
        with model.base_model.pin_routes({"*": torch.zeros(len(inputs["input_ids"]), dtype=torch.long)}):
            loss = model.train()(**inputs).loss
        loss.backward()  # outside the block
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient)


@pytest.mark.parametrize(
    ("routes", "message"),
    [
        ({"fnn/*": torch.tensor([0])}, r"no router at 'fnn/\*'; there are \['ffn/0', 'ffn/1'\]"),
        ({RoutingKey("other", "ffn", 0): torch.tensor([0])}, "no router at RoutingKey"),
        ({"*": torch.tensor([0, 2])}, r"adapter 'default', ffn, layer 0 .* indices between 0 and 2.*0 to 1"),
        ({"*": torch.tensor([0.0])}, r"must be whole numbers, not torch.float32"),
        ({"*": torch.tensor([True])}, "must be whole numbers, not torch.bool"),
        ({"*": [0, 1]}, "is a list: pin a Routing, a tensor of numbers"),
        ({"*": Routing(weights=torch.ones(6, 3))}, "weighs 3 experts, but there are 2"),
    ],
)
def test_pins_that_fit_no_router_are_refused_by_name(tiny, routes, message) -> None:
    with pytest.raises(ValueError, match=message), adapted(tiny).base_model.pin_routes(routes):
        raise AssertionError("entered")


@pytest.mark.parametrize(
    ("pin", "message"),
    [
        (Routing(weights=torch.ones(5, 2)), r"layer 0 .* has weights for 5 rows, but this forward has \d+"),
        (torch.tensor([0, 1]), r"layer 0 .* is \(2,\), but this forward has \d+ rows, of a batch of 3"),
        (torch.zeros(3, 2, dtype=torch.long), r"layer 0 .* is \(3, 2\)"),
    ],
)
def test_a_pin_of_another_number_of_rows_is_refused_by_name(tiny, tiny_inputs, pin, message) -> None:
    model, inputs = adapted(tiny), tiny_inputs("llama", batch=3)
    with model.base_model.pin_routes({"ffn/*": pin}), pytest.raises(ValueError, match=message):
        model(**inputs)


# --- with the compiler -------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("fresh_compiler")
def test_publishing_leaves_one_graph_and_the_routing_can_be_read(tiny, tiny_inputs) -> None:
    model = adapted(tiny, "llama")
    inputs = {**tiny_inputs("llama", batch=2), "use_cache": False}
    expected = logits(model, inputs)
    routings = dict(model.base_model.context.record.routings)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(logits(compiled, inputs), expected, atol=1e-5, rtol=1e-4)
    found = model.base_model.context.record.routings
    assert found.keys() == routings.keys()
    for key, routing in routings.items():
        torch.testing.assert_close(found[key].weights, routing.weights)


@torch.no_grad()
def test_generation_goes_on_with_the_number_of_a_rows_last_token(tiny, tiny_inputs) -> None:
    model, ids = adapted(tiny), tiny_inputs("llama", batch=2)["input_ids"]
    by_token = torch.zeros_like(ids)
    by_token[:, -2:] = torch.tensor([[1], [-1]])
    seen = observed(model)
    model.generate(input_ids=ids, domain_ids=by_token, max_new_tokens=3, do_sample=False, num_beams=2)
    steps = [routing.indices.view(2, 2, -1)[:, 0] for key, routing, _ in seen if key.layer == 1]
    assert steps[0].tolist() == by_token.tolist()
    assert [step.flatten().tolist() for step in steps[1:]] == [[1, -1]] * 2


@torch.no_grad()
def test_numbers_by_token_are_no_numbers_of_two_texts(tiny, tiny_inputs) -> None:
    """A decoder would read those of the tokens that its encoder has at the same places."""
    model, inputs = adapted(tiny, "t5"), tiny_inputs("t5", batch=2)
    by_token = torch.ones_like(inputs["input_ids"])
    ids = inputs["input_ids"]
    for call in (model, lambda **given: model.generate(input_ids=ids, max_new_tokens=2, domain_ids=by_token)):
        with pytest.raises(ValueError, match=r"domain_ids has one number for each token.*for each row, \(B,\)"):
            call(**inputs, domain_ids=by_token)
    assert model.generate(input_ids=ids, max_new_tokens=2, domain_ids=[0, 1]).shape[0] == 2


@pytest.mark.parametrize("by", ["row", "token"])
@torch.no_grad()
def test_rows_of_other_adapters_may_have_numbers_that_an_adapter_has_not(tiny, tiny_inputs, by) -> None:
    model = adapted(tiny)
    model.add_adapter("more", MixDAConfig(**{**FIELDS, "domains": ["a", "b", "c", "d", "e"]}))
    inputs = tiny_inputs("llama", batch=3)
    numbers = torch.tensor([1, 4, 7])
    if by == "token":
        numbers = numbers[:, None].expand_as(inputs["input_ids"])
    together = logits(model, inputs, adapter_names=["default", "more", "__base__"], domain_ids=numbers)
    for row, name in enumerate(("default", "more")):
        model.set_adapter(name)
        alone = {key: value[row : row + 1] for key, value in inputs.items()}
        expected = logits(model, alone, domain_ids=numbers[row : row + 1])
        torch.testing.assert_close(together[row], expected[0], rtol=1e-5, atol=1e-5)
    assert torch.equal(together[2], logits(tiny("llama"), inputs)[2])
    with pytest.raises(ValueError, match=r"domain_ids=\[4\] must lie between -1 \(none\) and 1"):
        logits(model, inputs, adapter_names=["more", "default", "__base__"], domain_ids=numbers)
