"""Contrast with a weaker form: what must come out of it, with a cache, padding, beams, and rows of other adapters."""

from __future__ import annotations

from contextlib import ExitStack

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LogitsProcessor

from mixadapters import BottleneckConfig, MixDAConfig, MoAConfig
from mixadapters.serving import SelfContrastLogitsProcessor
from mixadapters.serving.contrast import weakened

STEPS = 5
GREEDY = {"max_new_tokens": STEPS, "min_new_tokens": STEPS, "do_sample": False}


def moa(**fields) -> MoAConfig:
    return MoAConfig(num_experts=4, r=3, init_weights=False, lora_alpha=24, **fields)


class Noted(LogitsProcessor):
    """What another processor has been given, and what it has made of it."""

    def __init__(self, inner: LogitsProcessor) -> None:
        self.inner, self.strong, self.made, self.ids = inner, [], [], []

    def __call__(self, input_ids, scores):
        self.ids.append(input_ids.clone())
        self.strong.append(scores.clone())
        self.made.append(self.inner(input_ids, scores))
        return self.made[-1]


@pytest.fixture(scope="module")
def models(tiny):
    """kind -> model: a mixture of ours, two adapters, PEFT's LoRA, and a mixture of experts of the base's own."""
    two = get_peft_model(tiny("llama"), BottleneckConfig(r=4, init_weights=False), "law")
    two.add_adapter("code", BottleneckConfig(r=4, init_weights=False))
    lora = get_peft_model(tiny("llama"), LoraConfig(r=4, init_lora_weights=False), "law")
    lora.add_adapter("code", LoraConfig(r=4, init_lora_weights=False, inference_mode=True))
    return {
        "moa": get_peft_model(tiny("llama"), moa(num_experts_per_tok=2)).eval(),
        "shared": get_peft_model(tiny("llama"), moa(router_scope="model", router="top_k")).eval(),
        "remembers": get_peft_model(tiny("llama"), moa(granularity="causal_prefix")).eval(),
        "mixda": get_peft_model(tiny("llama"), MixDAConfig(domains=["a", "b"], r=3, init_weights=False)).eval(),
        "two": two.eval(),
        "lora": lora.eval(),
        "gpt2": get_peft_model(tiny("gpt2"), BottleneckConfig(r=4, init_weights=False)).eval(),
        "mixtral": tiny("mixtral").eval(),
        "qwen3_moe": tiny("qwen3_moe").eval(),
    }


FORMS = [
    ("moa", {"rank": 2}),
    ("moa", {"experts": ["expert3", 0]}),
    ("moa", {"adapters_off": True}),
    ("shared", {"rank": 1}),
    ("remembers", {"rank": 3}),
    ("mixda", {"rank": 2}),
    ("two", {"adapter": "code"}),
    ("lora", {"adapters_off": True}),
    ("lora", {"adapter": "code"}),
    ("gpt2", {"adapters_off": True}),  # whose positions are absolute
    ("mixtral", {"rank": 3}),
    ("qwen3_moe", {"experts": [1]}),
]
IDS = [f"{kind}-{next(iter(weak))}" for kind, weak in FORMS]


def generate(model, inputs, processor, **options):
    noted = Noted(processor)
    with torch.no_grad():
        sequences = model.generate(**inputs, logits_processor=[noted], **{**GREEDY, **options})
    return sequences, noted


def weak_logits(model, weak, ids, mask):
    """By a forward over the whole, without a cache."""
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    with torch.no_grad(), weakened(model, weak)(len(ids)):
        return model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False).logits[:, -1]


@pytest.mark.parametrize(("kind", "weak"), FORMS, ids=IDS)
def test_the_contrast_is_the_formula_with_a_cached_weak_form(kind, weak, models, tiny_inputs) -> None:
    """Prompts of different lengths, padded on the left; the reference computes the weak form anew, without a cache."""
    inputs = tiny_inputs("llama", batch=3, length=6, padding="left")
    model = models[kind]
    _, noted = generate(model, inputs, SelfContrastLogitsProcessor(model, weak, alpha=0.05, beta=0.7))
    assert len(noted.ids) == STEPS
    differs = 0.0
    for ids, strong, made in zip(noted.ids, noted.strong, noted.made, strict=True):
        mask = torch.nn.functional.pad(inputs["attention_mask"], (0, ids.shape[1] - 6), value=1)
        found = weak_logits(model, weak, ids, mask)
        differs = max(differs, float((found - strong).abs().max()))
        found = found.masked_fill(strong == -torch.inf, -torch.inf)  # the end, which may not come yet
        expected = 1.7 * strong.log_softmax(-1) - 0.7 * found.log_softmax(-1)
        kept = strong.softmax(-1) >= 0.05 * strong.softmax(-1).amax(-1, keepdim=True)
        assert torch.equal(made > -torch.inf, kept)
        shifted = made - strong.logsumexp(-1, keepdim=True)
        torch.testing.assert_close(shifted[kept], expected[kept], rtol=1e-3, atol=2e-3)
    assert differs > 0.05, "the weak form is another one"


@pytest.mark.parametrize(("kind", "weak"), [FORMS[0], FORMS[4], FORMS[10]], ids=["ours", "remembers", "base"])
def test_cached_equals_recomputed_under_beams(kind, weak, models, tiny_inputs) -> None:
    """Where the strong form keeps no cache, the weak form is computed anew at each step: nothing is to be followed."""
    inputs = tiny_inputs("llama", batch=2, length=5, padding="left")
    model = models[kind]
    options = {"num_beams": 3, "num_return_sequences": 2, "renormalize_logits": True}
    cached, noted = generate(model, inputs, SelfContrastLogitsProcessor(model, weak), **options)
    anew, reference = generate(model, inputs, SelfContrastLogitsProcessor(model, weak), use_cache=False, **options)
    assert torch.equal(cached, anew)
    for made, expected in zip(noted.made, reference.made, strict=True):
        torch.testing.assert_close(made, expected, rtol=1e-3, atol=2e-3)
    moved = any(bool((after[:, :-1] != before).any()) for before, after in zip(noted.ids, noted.ids[1:], strict=False))
    assert moved, "no beam has moved, so this says nothing"


def test_beta_zero_is_greedy(models, tiny_inputs) -> None:
    inputs = tiny_inputs("llama", padding="left")
    model = models["moa"]
    plain = model.generate(**inputs, **GREEDY)
    found, noted = generate(model, inputs, SelfContrastLogitsProcessor(model, {"rank": 2}, beta=0.0))
    assert torch.equal(found, plain)
    for strong, made in zip(noted.strong, noted.made, strict=True):
        kept = made > -torch.inf
        assert torch.equal(made[kept], strong[kept])
        assert 0 < kept.sum() < kept.numel()


def test_alpha_one_leaves_the_strong_forms_choice_alone(models, tiny_inputs) -> None:
    inputs = tiny_inputs("llama", padding="left")
    model = models["moa"]
    processor = SelfContrastLogitsProcessor(model, {"rank": 4}, alpha=1.0, beta=9.0)
    found, noted = generate(model, inputs, processor)
    assert torch.equal(found, model.generate(**inputs, **GREEDY))
    assert all((made > -torch.inf).sum() == len(made) for made in noted.made)


def test_a_weak_form_that_is_the_strong_one_changes_no_logit(tiny, tiny_inputs, models) -> None:
    inputs = tiny_inputs("llama", padding="left")
    one = get_peft_model(tiny("llama"), moa(num_experts_per_tok=1, norm_topk_prob=True)).eval()
    for model, weak in [(one, {"rank": 1}), (models["two"], {"adapter": "law"})]:
        _, noted = generate(model, inputs, SelfContrastLogitsProcessor(model, weak, beta=0.9))
        for strong, made in zip(noted.strong, noted.made, strict=True):
            kept = made > -torch.inf
            torch.testing.assert_close(made[kept], strong[kept], rtol=1e-4, atol=1e-4)


def test_rows_of_other_adapters_are_contrasted_each_with_its_own(tiny, tiny_inputs) -> None:
    model = get_peft_model(tiny("llama"), moa(), "law")
    model.add_adapter("code", moa())
    model.eval()
    inputs = tiny_inputs("llama", batch=3, length=5)
    names = ["law", "__base__", "code"]
    together, _ = generate(model, inputs, SelfContrastLogitsProcessor(model, {"rank": 2}), adapter_names=names)
    for row, name in enumerate(names):
        one = {key: value[row : row + 1] for key, value in inputs.items()}
        alone, _ = generate(model, one, SelfContrastLogitsProcessor(model, {"rank": 2}), adapter_names=[name])
        assert torch.equal(together[row], alone[0])


def test_a_processor_serves_one_generation_after_another(models, tiny_inputs) -> None:
    model = models["moa"]
    processor = SelfContrastLogitsProcessor(model, {"rank": 2})
    for seed in (0, 1):
        inputs = tiny_inputs("llama", batch=2 + seed, length=6, seed=seed)
        again, _ = generate(model, inputs, processor)
        first, _ = generate(model, inputs, SelfContrastLogitsProcessor(model, {"rank": 2}))
        assert torch.equal(again, first)


def test_the_model_is_as_before_after_a_weak_form(models, tiny_inputs) -> None:
    inputs = tiny_inputs("llama")
    for kind, weak in FORMS:
        model = models[kind]
        before, trained = model(**inputs).logits, [p.requires_grad for p in model.parameters()]
        with ExitStack() as stack:
            stack.enter_context(weakened(model, weak)(2))
            assert not torch.equal(model(**inputs).logits, before)
        assert torch.equal(model(**inputs).logits, before)
        assert [p.requires_grad for p in model.parameters()] == trained


@pytest.mark.parametrize(
    ("kind", "arguments", "message"),
    [
        ("moa", {"weak": {"rank": 5}}, "rank=5 must be a whole number of 1 to 4"),
        ("moa", {"weak": {"rank": True}}, "rank=True must be"),
        ("moa", {"weak": {"experts": ["expert9"]}}, "'expert9' is no expert of"),
        ("moa", {"weak": {"experts": []}}, "is no expert of"),
        ("moa", {"weak": {"adapter": "defalt"}}, "adapter='defalt' is unknown.*Did you mean 'default'"),
        ("moa", {"weak": {"adapters_off": False}}, "adapters_off=False must be True"),
        ("moa", {"weak": {"top": 1}}, "must have one entry, of adapters_off"),
        ("moa", {"weak": {"rank": 1, "adapters_off": True}}, "must have one entry"),
        ("moa", {"alpha": 0.0}, "alpha=0.0 must be"),
        ("moa", {"beta": -1.0}, "beta=-1.0 must be"),
        ("two", {}, "no layer of this model chooses between experts"),
        ("mixtral", {"weak": {"rank": 5}}, "rank=5 must be a whole number of 1 to 4"),
        ("mixtral", {"weak": {"adapters_off": True}}, "needs a PEFT model"),
    ],
)
def test_what_this_model_does_not_have_is_refused(kind, arguments, message, models) -> None:
    with pytest.raises(ValueError, match=message):
        SelfContrastLogitsProcessor(models[kind], **{"weak": {"rank": 1}, **arguments})


def test_encoder_decoder_models_and_tokens_out_of_turn_are_refused(models, tiny, tiny_inputs) -> None:
    with pytest.raises(ValueError, match="needs a causal model"):
        SelfContrastLogitsProcessor(get_peft_model(tiny("t5"), moa()), {"rank": 1})
    model, inputs = models["moa"], tiny_inputs("llama")
    processor = SelfContrastLogitsProcessor(model, {"rank": 2})
    scores = model(**inputs).logits[:, -1]
    processor(inputs["input_ids"], scores)
    with pytest.raises(ValueError, match=r"got \(2, 9\) after \(2, 7\)"):
        processor(torch.nn.functional.pad(inputs["input_ids"], (0, 2), value=5), scores)
    stranger = torch.nn.functional.pad(inputs["input_ids"].flip(1), (0, 1), value=5)
    with pytest.raises(ValueError, match="row 0 goes on from none of the rows"):
        processor(stranger, scores)


def test_a_base_router_that_does_not_choose_by_its_logits_is_refused(models, tiny_inputs) -> None:
    model = models["mixtral"]
    router = model.model.layers[0].mlp.gate
    handle = router.register_forward_hook(
        lambda module, args, output: (output[0], output[1], output[2] * 0 + 1), prepend=True
    )
    try:
        with weakened(model, {"rank": 1})(2), pytest.raises(ValueError, match="does not choose by its logits alone"):
            model(**tiny_inputs("mixtral"))
    finally:
        handle.remove()
