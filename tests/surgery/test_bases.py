"""Every row of the table of MoE base models, on a tiny model: what is seen of it, and what is cut."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from moe_bases import EXPERTS, RANK, WIDTH, batch, forced_off, logits, moe
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.nn import functional as F

from mixadapters.kernels import ACTIVATIONS
from mixadapters.surgery.bases import BASES
from mixadapters.surgery.blocks import BaseExperts, _check_columns
from mixadapters.surgery.layers import expert_layers
from mixadapters.surgery.usage import record_usage
from mixadapters.surgery.view import Routed, expert_output
from mixadapters.surgery.watching import joined_logits

KINDS = sorted(BASES)
# One of each form in which experts and routers lie.
FORMS = (
    "mixtral",
    "gpt_oss",
    "openai_privacy_filter",
    "aria_text",
    "nemotron_h",
    "deepseek_v3",
    "afmoe",
    "ernie4_5_moe",
)
BATCH = batch()
OWN = {"relu2": lambda x: F.relu(x).square()}


def layers_of(model: Any) -> list[BaseExperts]:
    return expert_layers(model)  # type: ignore[return-value]


def output_of(layer: BaseExperts, e: int, x: Tensor) -> Tensor:
    """An expert, from its weights alone."""
    weights, kind = layer.weights(e), layer.activation
    if kind != "gpt_oss":
        return expert_output(weights, kind, x) if kind in ACTIVATIONS else (
            F.linear(OWN[kind](F.linear(x, weights.down)), weights.up))  # fmt: skip
    assert weights.gate is not None
    gate = F.linear(x, weights.gate, weights.b_gate).clamp(max=7.0)
    up = F.linear(x, weights.down, weights.b_down).clamp(-7.0, 7.0)
    return F.linear((up + 1) * gate * torch.sigmoid(1.702 * gate), weights.up, weights.b_up)


@pytest.mark.parametrize("kind", KINDS)
def test_usage_is_a_hand_count(kind: str) -> None:
    """Counts, masses and saliencies, from what the router gave; padding left out; outputs untouched."""
    model = moe(kind)
    layers, seen = layers_of(model), {}
    handles = [layer.gate.register_forward_hook(lambda m, a, out, k=layer.key: seen.update({k: out}))
               for layer in layers]  # fmt: skip
    inputs: dict[str, Tensor] = {}
    handles += [layer.experts.register_forward_pre_hook(lambda m, a, k=layer.key: inputs.update({k: a[0]}))
                for layer in layers]  # fmt: skip
    plain = logits(model, BATCH)
    [handle.remove() for handle in handles]
    with record_usage(model, samples=8) as usage:
        recorded = logits(model, BATCH)
    torch.testing.assert_close(recorded, plain, rtol=1e-5, atol=1e-5)
    real = BATCH["attention_mask"].bool().flatten().nonzero().flatten().tolist()
    assert layers
    for layer in layers:
        _, weights, indices = seen[layer.key]
        found, tokens, mass, saliency = usage[layer.key], [0] * EXPERTS, [0.0] * EXPERTS, [0.0] * EXPERTS
        for row in real:
            for e, weight in zip(indices[row].tolist(), weights[row].tolist(), strict=True):
                tokens[e] += 1
                mass[e] += weight
                saliency[e] += weight * float(output_of(layer, e, inputs[layer.key][row : row + 1]).norm())
        assert found.tokens.tolist() == tokens
        assert sum(tokens) == 2 * len(real)
        torch.testing.assert_close(found.mass.tolist(), mass, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found.saliency.tolist(), saliency, rtol=1e-4, atol=1e-4)
        assert int(found.rows) == len(real)
        assert int(found.pairs.sum()) == 4 * len(real)
        assert found.logits.shape == (8, EXPERTS)
        logits_given = seen[layer.key][0].reshape(-1, EXPERTS).float()
        assert all(any(torch.allclose(row, other, atol=1e-4) for other in logits_given[real]) for row in found.logits)


@pytest.mark.parametrize("kind", KINDS)
def test_all_experts_kept_is_the_identity_and_order_means_nothing(kind: str) -> None:
    model = moe(kind)
    plain = logits(model, BATCH)
    for layer in layers_of(model):
        layer.keep(range(EXPERTS))
    assert torch.equal(logits(model, BATCH), plain)
    for layer in layers_of(model):
        layer.keep([3, 1, 0, 5, 2, 4])
    torch.testing.assert_close(logits(model, BATCH), plain, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_pruned_model_is_the_whole_one_with_these_experts_forced_off(kind: str) -> None:
    whole, pruned, kept = moe(kind), moe(kind), [0, 2, 3, 5]
    routers = [layer.block.get_parameter(layer.base.rows[0]) for layer in layers_of(whole)]
    with forced_off(routers, [1, 4]):
        expected = logits(whole, BATCH)
    for layer in layers_of(pruned):
        layer.keep(kept)
        assert layer.names == ("0", "1", "2", "3")
        assert layer.map is None
    torch.testing.assert_close(logits(pruned, BATCH), expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(expected, logits(whole, BATCH), atol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_with_their_mass_preserved_pruned_experts_do_nothing_and_others_change_nothing(kind: str) -> None:
    whole, pruned = moe(kind), moe(kind)
    for layer in layers_of(whole):
        for name, tensor in layer.experts.named_parameters():
            if name.startswith("down_proj"):
                tensor.data[[1, 4]] = 0.0
    for layer in layers_of(pruned):
        layer.keep([0, 2, 3, 5], preserve_mass=True)
        rows = layer.router_rows()
        assert rows is not None
        assert rows.shape[0] == len(layer.names) == 4
    torch.testing.assert_close(logits(pruned, BATCH), logits(whole, BATCH), rtol=1e-5, atol=1e-5)
    with record_usage(pruned) as usage:
        logits(pruned, BATCH)
    with record_usage(whole) as before:
        logits(whole, BATCH)
    assert usage[layer.key].tokens.tolist() == before[layer.key].tokens[[0, 2, 3, 5]].tolist()


@pytest.mark.parametrize("kind", FORMS)
def test_weights_are_views_and_say_what_an_expert_does(kind: str) -> None:
    model = moe(kind)
    layer = layers_of(model)[0]
    assert (layer.width, layer.top_k, layer.names) == (WIDTH, 2, tuple(map(str, range(EXPERTS))))
    x = torch.randn(5, WIDTH, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(layer.run(4, x), output_of(layer, 4, x), rtol=1e-4, atol=1e-5)
    weights, before = layer.weights(4), logits(model, BATCH)
    assert weights.down.shape == (RANK, WIDTH)
    layer.set_weights(4, weights._replace(up=weights.up * 2))
    torch.testing.assert_close(layer.run(4, x), output_of(layer, 4, x), rtol=1e-4, atol=1e-5)
    layer.set_weights(4, weights._replace(up=weights.up / 2))
    assert torch.equal(logits(model, BATCH), before)
    with pytest.raises(ValueError, match="one rank"):
        layer.set_weights(4, weights._replace(down=weights.down[1:], up=weights.up[:, 1:]))


@pytest.mark.parametrize("kind", FORMS)
def test_an_expert_that_stands_for_its_equal_changes_nothing(kind: str) -> None:
    model = moe(kind)
    for layer in layers_of(model):
        layer.set_weights(4, layer.weights(1))
    before = logits(model, BATCH)
    for layer in layers_of(model):
        layer.assign([0, 1, 2, 3, 1, 5])
        assert len(layer.names) == 5
    torch.testing.assert_close(logits(model, BATCH), before, rtol=1e-5, atol=1e-5)


def test_groups_of_experts_lose_as_many_each() -> None:
    model = moe("deepseek_v3", n_group=2, topk_group=1)
    layer = layers_of(model)[0]
    assert layer.groups == 2
    with pytest.raises(ValueError, match="chooses first among 2 groups"):
        layer.keep([0, 1, 2, 3])
    whole = moe("deepseek_v3", n_group=2, topk_group=1)
    with forced_off([layers_of(whole)[0].gate.weight], [2, 4]):
        expected = logits(whole, BATCH)
    layer.keep([0, 1, 3, 5])
    torch.testing.assert_close(logits(model, BATCH), expected, rtol=1e-4, atol=1e-5)


def test_a_router_keeps_as_many_experts_as_a_token_uses() -> None:
    layer = layers_of(moe("mixtral"))[0]
    with pytest.raises(ValueError, match="fewer than the 2 that a token uses"):
        layer.keep([3])
    with pytest.raises(ValueError, match="different numbers of its 6 experts"):
        layer.keep([3, 3])
    with pytest.raises(ValueError, match="order must be whole numbers"):
        layer.keep([0.5, 1.5, 2.5])  # type: ignore[list-item]
    assert len(layer.names) == EXPERTS


def test_a_type_outside_of_the_table_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"'llama4_text'.* is not in the table.*mixtral"):
        expert_layers(moe("llama4_text"))


@pytest.mark.parametrize("target", ["mlp.experts.gate_up_proj", "mlp.gate.weight"])
def test_experts_under_lora_are_seen_and_not_cut(target: str) -> None:
    config = LoraConfig(r=2, target_parameters=[target], target_modules=[], init_lora_weights=False)
    model = get_peft_model(moe("mixtral"), config).eval()
    plain = logits(model, BATCH)
    with record_usage(model) as usage:
        torch.testing.assert_close(logits(model, BATCH), plain, rtol=1e-5, atol=1e-5)
    layers = layers_of(model)
    assert [layer.key for layer in layers] == list(usage.layers) == [f"model.layers.{i}.mlp.experts" for i in (0, 1)]
    assert layers[0].top_k == 2
    for cut in (lambda: layers[0].keep([0, 1, 2]), lambda: layers[0].assign([0, 0, 2, 3, 4, 5])):
        with pytest.raises(
            ValueError, match=r"adapters sit on the experts at 'model.layers.0.mlp.experts', or on their"
        ):
            cut()


def test_quantized_experts_are_refused() -> None:
    model = moe("mixtral")
    experts = model.model.layers[0].mlp.experts
    experts.gate_up_proj = torch.nn.Parameter(experts.gate_up_proj.to(torch.float8_e4m3fn).view(torch.uint8), False)
    with pytest.raises(ValueError, match="load the model without quantization"):
        expert_layers(model)


def test_a_block_that_runs_again_by_checkpointing_is_counted_once() -> None:
    model = moe("mixtral").train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    with record_usage(model) as usage:
        model(**BATCH, labels=BATCH["input_ids"]).loss.backward()
    assert all(int(layer.rows) == int(BATCH["attention_mask"].sum()) for layer in usage.layers.values())
    assert model.model.layers[0].mlp.experts.down_proj.grad is not None


def test_nothing_is_left_on_a_model_that_has_been_watched() -> None:
    model = moe("mixtral")

    def hooks() -> list[int]:
        return [len(m._forward_pre_hooks) + len(m._forward_hooks) + len(m.__dict__) for m in model.modules()]

    before, seen = hooks(), []
    layer = layers_of(model)[0]

    def callback(routed: Routed) -> None:
        seen.append(routed)

    with layer.watch(callback), pytest.raises(RuntimeError):
        model(input_ids=torch.zeros(1, 3, 3))
    with layer.watch(callback, outputs=True):
        logits(model, BATCH)
    assert hooks() == before
    assert seen[-1].outputs().shape == (18, 2, WIDTH)  # type: ignore[misc]


@pytest.mark.parametrize(
    ("stay", "groups", "said"),
    [
        ([0, 1, 3, 4], 2, None), ([0, 3], 2, "keep as many of each, two or more"),
        ([0, 1, 3], 2, "keep as many of each"), ([3, 4, 0, 1], 2, "in their order"),
        ([0, 1, 2, 3, 4, 5], 6, None), ([0], 1, "fewer than the 2"), ([5, 0], 1, None),
    ],
)  # fmt: skip
def test_columns_that_stay_are_some_of_each_group_in_its_place(stay: list[int], groups: int, said: str | None) -> None:
    layer: Any = SimpleNamespace(groups=groups, top_k=2, path="layer")
    if said is None:
        _check_columns(layer, stay, 6)
        return
    with pytest.raises(ValueError, match=said):
        _check_columns(layer, stay, 6)


def test_an_expert_of_several_columns_has_the_logit_of_their_sum() -> None:
    logits = torch.tensor([[1.0, 2.0, 3.0, 9.0], [0.0, 0.0, -1.0, 9.0]])
    found = joined_logits(logits, torch.tensor([0, 0, 1, -1]), 2)
    torch.testing.assert_close(found.exp(), torch.stack([logits[:, :2].exp().sum(1), logits[:, 2].exp()], 1))


@pytest.mark.parametrize("kind", ["mixtral", "deepseek_v3"])
def test_the_distribution_of_a_router_sums_to_one(kind: str) -> None:
    model, seen = moe(kind), []
    for layer in layers_of(model):
        with torch.no_grad(), layer.watch(lambda routed: seen.append(routed.probs)):
            model(**BATCH)
    assert seen
    for probs in seen:
        torch.testing.assert_close(probs.sum(-1), torch.ones(len(probs)))


def test_a_map_that_is_not_needed_leaves_nothing_on_the_experts() -> None:
    for layer in layers_of(moe("mixtral")):
        layer.keep([0, 1, 2, 3], preserve_mass=True)
        assert layer.map is not None
        layer.settle_map(range(4))
        assert layer.map is None
        assert not layer.experts._forward_pre_hooks
        assert not layer.experts._forward_pre_hooks_with_kwargs
