"""The posterior over arms against Bayes' rule by hand: forwards, losses, padding, caches, beams, and one arm alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import Tensor
from torch.nn import functional as F
from transformers import DynamicCache

from mixadapters import MixDAConfig, MoAConfig
from mixadapters.routers.posterior import PosteriorRouter

IDS = torch.tensor([[5, 9, 17, 33, 8, 12], [40, 2, 7, 7, 61, 3]])
FIELDS = {"mixda": "domain_ids", "moa": "expert_ids"}
NUMBERS = (0, 1, -1)


def adapted(tiny: Any, kind: str) -> Any:
    torch.manual_seed(7)
    config: Any = {
        "mixda": lambda: MixDAConfig(domains=["law", "code"], r=4, task_r=2),
        "moa": lambda: MoAConfig(
            experts=["law", "code"], r=4, n_shared_experts=1, target_modules=["q_proj", "v_proj"]
        ),
    }[kind]()
    model = get_peft_model(tiny("llama", "causal_lm", num_hidden_layers=2), config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".bank." in name or ".task." in name:
                parameter.normal_(std=0.3)
    return model


@pytest.fixture(scope="module", params=["mixda", "moa"])
def both(tiny, request) -> tuple[str, Any]:
    return request.param, adapted(tiny, request.param)


@torch.no_grad()
def by_hand(kind: str, model: Any, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities (B, T, V) of the mean, and weights (B, T, A), with every arm run alone."""
    field, mask = FIELDS[kind], torch.ones_like(ids)
    alone = [
        model(input_ids=ids, attention_mask=mask, **{field: torch.full((len(ids),), number)}).logits.log_softmax(-1)
        for number in NUMBERS
    ]
    mixed, weights = torch.zeros_like(alone[0]), torch.zeros(*ids.shape, len(NUMBERS))
    for b, row in enumerate(ids):
        likelihood = torch.zeros(len(NUMBERS))
        for t, token in enumerate(row):
            if t:
                likelihood += torch.stack([logs[b, t - 1, token] for logs in alone])
            weights[b, t] = likelihood.softmax(0)
            mixed[b, t] = sum(w * logs[b, t].exp() for w, logs in zip(weights[b, t], alone, strict=True)).log()
    return mixed, weights


def of(model: Any, **options: Any) -> Any:
    return model.base_model.posterior(**options)


@torch.no_grad()
def test_it_is_bayes_rule_over_the_arms(both) -> None:
    kind, model = both
    expected, weights = by_hand(kind, model, IDS)
    labels = IDS.clone()
    labels[0, :3] = -100
    with of(model) as router:
        found = model(input_ids=IDS, attention_mask=torch.ones_like(IDS), labels=labels)
    torch.testing.assert_close(found.logits, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(router.weights, weights, rtol=1e-4, atol=1e-4)
    assert router.arms == ["law", "code", "frozen"]
    assert not torch.allclose(router.weights[:, -1], router.weights[:, 0], atol=0.05)  # the text has told something
    loss = F.cross_entropy(expected[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
    torch.testing.assert_close(found.loss, loss, rtol=1e-4, atol=1e-4)
    assert found.past_key_values is None
    outside = model(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits.log_softmax(-1)
    assert not torch.allclose(outside, expected, atol=1e-2)  # the mixture's own gates again


@torch.no_grad()
def test_pieces_of_a_text_with_a_cache_are_the_whole(both) -> None:
    _, model = both
    with of(model):
        whole = model(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits
        cache: Any = DynamicCache(config=model.config)
        parts = []
        for start, end in ((0, 3), (3, 4), (4, 6)):
            mask = torch.ones_like(IDS[:, :end])
            found = model(input_ids=IDS[:, start:end], attention_mask=mask, past_key_values=cache)
            cache = found.past_key_values
            parts.append(found.logits)
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_padding_on_the_left_tells_nothing(both) -> None:
    _, model = both
    ids, mask = F.pad(IDS[:, :4], (2, 0)), F.pad(torch.ones_like(IDS[:, :4]), (2, 0))
    ids[1], mask[1] = IDS[1], 1
    with of(model) as router:
        model(input_ids=IDS[:1, :4], attention_mask=torch.ones(1, 4))
        alone = router.weights
        model(input_ids=ids, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp_min(0))
    torch.testing.assert_close(router.weights[:1, 2:], alone, rtol=1e-4, atol=1e-4)


def test_greedy_tokens_are_those_by_hand(both) -> None:
    kind, model = both
    text = IDS[:1]
    for _ in range(5):
        mixed, _ = by_hand(kind, model, text)
        text = torch.cat([text, mixed[:, -1:].argmax(-1)], 1)
    with of(model):
        found = model.generate(
            input_ids=IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=5, do_sample=False, eos_token_id=None
        )
    assert found[:1].tolist() == text.tolist()


@pytest.mark.parametrize("choose_after", [None, 8])  # 8: the beams of a row choose arms of their own
@pytest.mark.parametrize(
    "how", [{"num_beams": 4, "num_return_sequences": 3}, {"do_sample": True, "num_return_sequences": 3}]
)
def test_beams_and_samples_are_those_without_a_cache(both, how, choose_after) -> None:
    _, model = both
    found = []
    for use_cache in (True, False):
        torch.manual_seed(0)
        with of(model, choose_after=choose_after):
            ids = model.generate(input_ids=IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=9,
                                 use_cache=use_cache, eos_token_id=None, **how)  # fmt: skip
        found.append(ids.tolist())
    assert found[0] == found[1]
    assert len(found[0]) == 2 * how["num_return_sequences"]


def test_after_some_tokens_one_arm_goes_on_alone(both) -> None:
    kind, model = both
    _, weights = by_hand(kind, model, IDS)
    arms = weights[:, 3].argmax(-1)
    assert len(set(arms.tolist())) == 2  # the rows differ
    rows = []
    hook = (
        model.get_base_model()
        .get_input_embeddings()
        .register_forward_hook(lambda module, args, output: rows.append(len(output)))
    )
    options = {"attention_mask": torch.ones_like(IDS), "max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    with of(model, choose_after=4):
        found = model.generate(input_ids=IDS, **options)
    hook.remove()
    assert rows == [6, 2, 2, 2]
    numbers = torch.tensor(NUMBERS)[arms]
    with model.base_model.context.pin(**{FIELDS[kind]: numbers}):
        assert found.tolist() == model.generate(input_ids=IDS, **options).tolist()


@torch.no_grad()
def test_rows_choose_when_they_are_long_enough(both) -> None:
    """The first row has two tokens less: it goes on with all arms until it has them."""
    kind, model = both
    ids, mask = IDS.clone(), torch.ones_like(IDS)
    ids[0, :2], mask[0, :2] = 0, 0
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    with of(model, choose_after=4) as router:
        model(input_ids=ids, attention_mask=mask, position_ids=positions)
        whole = router.weights
        found = []
        cache: Any = DynamicCache(config=model.config)
        for start, end in ((0, 4), (4, 5), (5, 6)):
            cache = model(input_ids=ids[:, start:end], attention_mask=mask[:, :end], past_key_values=cache,
                          position_ids=positions[:, start:end]).past_key_values  # fmt: skip
            found.append(router.weights)
    torch.testing.assert_close(torch.cat(found, 1), whole, rtol=1e-4, atol=1e-4)
    alone = whole.amax(-1) == 1
    assert alone.tolist() == [[False] * 5 + [True], [False] * 3 + [True] * 3]
    _, weights = by_hand(kind, model, IDS[1:])
    assert whole[1, 3:].argmax(-1).tolist() == [int(weights[0, 3].argmax())] * 3
    assert cache.arms == 1
    assert cache.get_batch_size() == 2


def refused(model: Any, match: str, **given: Any) -> None:
    inputs = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS), **given}
    with of(model), pytest.raises(ValueError, match=match):
        model(**{name: value for name, value in inputs.items() if value is not None})


def test_what_it_cannot_do_is_refused(both, tiny) -> None:
    kind, model = both
    filled: Any = model(input_ids=IDS, attention_mask=torch.ones_like(IDS), use_cache=True).past_key_values
    refused(model, "filled before, by one arm", past_key_values=filled, attention_mask=torch.ones(2, 12))
    refused(model, "so does the posterior", **{FIELDS[kind]: torch.tensor([0, 1])})
    refused(model, "pass input_ids", input_ids=None, inputs_embeds=torch.zeros(2, 6, 32))
    refused(model, "output_hidden_states=True", output_hidden_states=True)
    refused(model, "return_dict=False", return_dict=False)
    refused(model, "do not pack", position_ids=torch.tensor([[0, 1, 2, 0, 1, 2]] * 2))
    refused(model, "the posterior: continuous batching packs", cache=object(), cu_seq_lens_q=torch.tensor([0, 6]))
    with pytest.raises(ValueError, match="choose_after=0 must be"), of(model, choose_after=0):
        pass
    with of(model), pytest.raises(ValueError, match="open already"), of(model):
        pass
    with of(model), pytest.raises(ValueError, match="cache that grows"):
        model.generate(input_ids=IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=2,
                       cache_implementation="static")  # fmt: skip
    model.train()
    refused(model, r"call model\.eval")
    model.eval()
    assert not any(isinstance(one, PosteriorRouter) for one in model.base_model.context.objectives)


@pytest.mark.parametrize("kind", ["bert", "t5"])
def test_only_models_of_next_tokens(tiny, kind) -> None:
    model = get_peft_model(tiny(kind), MixDAConfig(domains=["law"], r=4))
    with pytest.raises(ValueError, match="predictions of the next token"), of(model):
        pass


def test_experts_neither_come_nor_go_inside_a_block(both) -> None:
    kind, model = both
    tuner = model.base_model
    names = {"mixda": ("add_domain", "remove_domain"), "moa": ("add_expert", "remove_expert")}[kind]
    with tuner.posterior():
        for verb, name in zip(names, ("new", "law"), strict=True):
            with pytest.raises(ValueError, match=rf"{verb}: a block of posterior .* leave it first"):
                getattr(tuner, verb)(name)
    pins, said = {"*": torch.tensor([0, 1])}, rf"{names[1]}: .* leave pin_routes first"
    with tuner.pin_routes(pins), pytest.raises(ValueError, match=said):
        getattr(tuner, names[1])("law")
    model(input_ids=IDS)
