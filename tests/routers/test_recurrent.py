"""Recurrent: a GRU over layers, around any learned router, through records, checkpointing and skipped layers."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from mixadapters.core.adapter import Site
from mixadapters.routers import RecurrentRouter, TopPRouter, build_router

D, NAMES = 6, ["a", "b", "c"]


def chain(count: int = 3, seed: int = 0, **options: Any) -> list[RecurrentRouter]:
    """The routers of `count` layers."""
    torch.manual_seed(seed)
    routers: list[Any] = []
    for layer in range(count):
        first = routers[0] if routers else None
        options = {"width": 5, "init_range": 1.0, **options}
        router = build_router({"kind": "recurrent", **options}, D, NAMES, first=first)
        router.bind(Site("ffn_output", f"layers.{layer}.mlp", D, D, group="ffn", layer=layer))
        routers.append(router.eval())
    return routers


TOKENS = torch.randn(3, 2, 4, D, generator=torch.Generator().manual_seed(1))  # (layer, B, T, d)


@pytest.mark.parametrize("cell", ["gru", "rnn"])
def test_states_equal_those_of_torch(forward, cell) -> None:
    routers, context = chain(cell=cell), forward(TOKENS[0])
    reference = (nn.GRUCell if cell == "gru" else nn.RNNCell)(5, 5)
    reference.load_state_dict(routers[0].cell.state_dict())
    state = torch.zeros(8, 5)
    for router, tokens in zip(routers, TOKENS, strict=True):
        routing = router(tokens, context)
        normed = nn.functional.rms_norm(tokens, (D,)).reshape(8, D)
        state = reference(router.projection(normed), state)
        logits = router.base.output(state)
        torch.testing.assert_close(routing.probs, logits.softmax(-1))
        assert torch.equal(routing.indices, logits.topk(2).indices)


def test_a_state_ends_with_its_forward_and_rows_are_on_their_own(forward) -> None:
    routers = chain()

    def last(tokens: Tensor) -> Tensor:
        context = forward(tokens[0])
        return [router(x, context).probs for router, x in zip(routers, tokens, strict=True)][-1]

    probs = last(TOKENS)
    assert torch.equal(last(TOKENS), probs)
    order = torch.tensor([1, 0])
    torch.testing.assert_close(last(TOKENS[:, order]).view(2, 4, 3), probs.view(2, 4, 3)[order])
    torch.testing.assert_close(last(TOKENS[:, :, :2]).view(2, 2, 3), probs.view(2, 4, 3)[:, :2])
    other = TOKENS.clone()
    other[0] += 1  # what an earlier layer has read
    assert not torch.allclose(last(other), probs)


def test_layers_that_do_not_run_pass_the_state_on(forward) -> None:
    first, _, last = chain()
    context = forward(TOKENS[0])
    first(TOKENS[0], context)
    skipped = last(TOKENS[2], context).probs
    two = chain(2)
    two[1].load_state_dict(last.state_dict())
    context = forward(TOKENS[0])
    two[0].load_state_dict(first.state_dict())
    two[0](TOKENS[0], context)
    torch.testing.assert_close(two[1](TOKENS[2], context).probs, skipped)


def test_gradient_flows_from_the_last_layer_to_the_first_projection(forward) -> None:
    routers, context = chain(), forward(TOKENS[0], training=True)
    routing = [router(x, context) for router, x in zip(routers, TOKENS, strict=True)][-1]
    routing.weights[:, 0].sum().backward()
    assert routers[0].projection.weight.grad.any()
    assert routers[0].cell.weight_hh.grad.any()
    assert routers[0].base.output.weight.grad is None


def test_the_cell_is_in_the_file_once_and_follows_copies(forward) -> None:
    model = nn.ModuleList(chain())
    assert sum("weight_hh" in name for name in model.state_dict()) == 1
    assert sum("weight_hh" in name for name, _ in model.named_parameters()) == 1
    twin = copy.deepcopy(model)
    assert twin[1].__dict__["first"] is twin[0]
    with torch.no_grad():
        twin[0].cell.weight_ih.zero_()
    probs = []
    for routers in (model, twin):
        context = forward(TOKENS[0])
        probs.append([router(x, context).probs for router, x in zip(routers, TOKENS, strict=True)][-1])
    assert not torch.allclose(*probs)


def test_cross_attention_and_two_stacks_have_chains_of_their_own(forward) -> None:
    routers = chain(4)
    places = [("k_proj", "cross_attention", "decoder"), ("q_proj", "cross_attention", "decoder"),
              ("fc1", "ffn", "encoder"), ("fc1", "ffn", "decoder")]  # fmt: skip
    context = forward(TOKENS[0])
    for router, (leaf, group, stack), x in zip(routers, places, [*TOKENS, TOKENS[0]], strict=True):
        router.bind(Site("", f"layers.0.{leaf}", D, D, stack, group=group))
        normed = nn.functional.rms_norm(x, (D,)).reshape(8, D)
        alone = router.base.output(routers[0].cell(router.projection(normed), torch.zeros(8, 5)))
        torch.testing.assert_close(router(x, context).logits, alone)


@pytest.mark.parametrize("base", ["top_p", {"kind": "top_p", "p": 0.7}])
def test_it_wraps_any_learned_router_with_its_options(base) -> None:
    options = {"base": base, "balance_coef": 0.5, "max_experts": 2}
    router = build_router({"kind": "recurrent", **options}, D, NAMES, k=1, jitter=0.1)
    assert isinstance(router.base, TopPRouter)
    assert (router.base.in_features, router.base.max_experts, router.base.normalize) == (128, 2, False)
    assert (router.base.p, router.base.jitter) == (0.4 if base == "top_p" else 0.7, 0.1)
    assert router.balance_coef == router.base.balance_coef == 0.5
    router.set_option("p", 0.9)
    assert router.base.p == 0.9
    router.add_expert("d", 0.1)
    assert router.experts == router.arms == router.base.experts == ["a", "b", "c", "d"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"base": "hash"}, "base='hash' does not learn to read a state; choose one such as 'top_k'"),
        ({"base": "pregate"}, "base='pregate' does not learn"),
        ({"base": "arrow"}, "base='arrow' does not learn"),
        ({"base": "recurrent"}, "base='recurrent' does not learn"),
        ({"base": "tpo_k"}, "unknown router 'tpo_k'"),
        ({"cell": "lstm"}, "cell='lstm' is unknown"),
        ({"width": 0}, "width=0 must be an integer, at least 1"),
        ({"p": 0.5}, "RecurrentRouter takes no argument 'p'"),
        ({"base": {"kind": "top_k", "p": 1}}, "TopKRouter takes no argument 'p'"),
    ],
)
def test_nonsense_is_refused_by_name(options, message) -> None:
    with pytest.raises(ValueError, match=message):
        build_router({"kind": "recurrent", **options}, D, NAMES)


# --- in a model --------------------------------------------------------------------------------------------------


def model_of(**fields: Any) -> Any:
    from peft import get_peft_model

    from mixadapters.tuners.moa import MoAConfig

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 2}
    base = LlamaForCausalLM(LlamaConfig(vocab_size=50, num_hidden_layers=3, **sizes))
    router = {"kind": "recurrent", "width": 8, "k": 1}
    options = {"target_modules": ["up_proj", "down_proj"], "layers_to_transform": [0, 2], **fields}
    config = MoAConfig(num_experts=3, r=2, router=router, init_weights=False, task_type="CAUSAL_LM", **options)
    return get_peft_model(base, config)


IDS = torch.randint(3, 50, (2, 6), generator=torch.Generator().manual_seed(2))


def gradients(model: Any) -> dict[str, Tensor]:
    model.train()(input_ids=IDS, labels=IDS).loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if ".router." in name}


@pytest.mark.parametrize("scope", ["module", "block"])
def test_gradients_are_the_same_when_layers_run_again(scope) -> None:
    plain, again = model_of(router_scope=scope), model_of(router_scope=scope)
    again.gradient_checkpointing_enable({"use_reentrant": False})
    again.enable_input_require_grads()
    expected = gradients(plain)
    assert all(grad is not None and grad.any() for grad in expected.values())
    torch.testing.assert_close(gradients(again), expected)


def test_two_forwards_before_one_backward_keep_their_states() -> None:
    model, twin = model_of().train(), model_of().train()
    for one in (model, twin):
        one.gradient_checkpointing_enable({"use_reentrant": False})
        one.enable_input_require_grads()
    other = IDS.flip(0, 1)
    losses = [model(input_ids=ids, labels=ids).loss for ids in (IDS, other)]
    sum(losses).backward()
    for ids in (IDS, other):
        twin(input_ids=ids, labels=ids).loss.backward()
    for one, two in zip(model.parameters(), twin.parameters(), strict=True):
        if one.grad is not None:
            torch.testing.assert_close(one.grad, two.grad)


def test_reentrant_checkpointing_is_refused() -> None:
    model = model_of().train()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    model.enable_input_require_grads()
    with pytest.raises(ValueError, match=r"router 'recurrent' passes a state.*'use_reentrant': False"):
        model(input_ids=IDS, labels=IDS)


def test_decoding_with_a_cache_equals_the_whole() -> None:
    model = model_of().eval()
    with torch.no_grad():
        whole = model(input_ids=IDS).logits
        cache, pieces = None, []
        for piece in IDS.split([3, 1, 2], 1):
            out = model(input_ids=piece, past_key_values=cache, use_cache=True)
            cache, pieces = out.past_key_values, [*pieces, out.logits]
    torch.testing.assert_close(torch.cat(pieces, 1), whole)


# --- what it is for ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["recurrent", "top_k"])
def test_it_knows_what_a_later_layer_no_longer_shows(forward, kind) -> None:
    """The first layer shows of which domain a token is; the second, whose router is trained, does not."""
    torch.manual_seed(0)
    codes = torch.randn(3, D) * 2
    options = {"width": 16} if kind == "recurrent" else {}
    routers: list[Any] = []
    for _ in range(2):
        first = routers[0] if routers else None
        routers.append(build_router({"kind": kind, "k": 1, **options}, D, NAMES, first=first).train())
    optimizer = torch.optim.Adam([p for r in routers for p in r.parameters()], 0.02)
    for _ in range(150):
        domain = torch.randint(3, (8, 16))
        noise = torch.randn(2, 8, 16, D)
        context = forward(noise[0], training=True)
        routers[0](codes[domain] + noise[0], context)
        probs = routers[1](noise[1], context).probs
        loss = nn.functional.nll_loss(probs.log(), domain.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    right = (probs.argmax(1) == domain.flatten()).float().mean()
    assert right > 0.9 if kind == "recurrent" else right < 0.6
