"""Requests that choose their adapter by what they are about."""

from __future__ import annotations

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from mixadapters import BottleneckConfig
from mixadapters.serving import CompositionRouter, PooledStates

KINDS = ("law", "code", "chemistry")


def clusters(count: int, width: int = 6, seed: int = 0) -> tuple[torch.Tensor, list[str]]:
    """Features around one corner for each kind."""
    draw = torch.Generator().manual_seed(seed)
    kinds = [KINDS[i % 3] for i in range(count)]
    centres = 4 * torch.eye(width)[[KINDS.index(kind) for kind in kinds]]
    return centres + 0.5 * torch.randn(count, width, generator=draw), kinds


def fitted(classifier: str = "logistic", **options) -> CompositionRouter:
    return CompositionRouter(lambda **_: None, classifier=classifier, **options).fit_features(*clusters(60))


@pytest.fixture(scope="module")
def adapted(tiny):
    """A decoder with two adapters that change what it says."""
    model = get_peft_model(tiny("llama"), config := BottleneckConfig(r=4, init_weights=False), "law")
    model.add_adapter("code", config)
    return model.eval()


@pytest.mark.parametrize("classifier", ["logistic", "knn"])
def test_samples_of_known_categories_get_their_adapter(classifier) -> None:
    router = fitted(classifier, mapping={"law": "l", "code": "c", "chemistry": "__base__"})
    features, kinds = clusters(30, seed=1)
    assert router.choose(features) == [{"law": "l", "code": "c", "chemistry": "__base__"}[kind] for kind in kinds]
    probs = router.probabilities(features)
    assert torch.allclose(probs.sum(1), torch.ones(30))
    router.map_to({"law": "a", "code": "a", "chemistry": "b"})
    assert set(router.choose(features)) == {"a", "b"}


@pytest.mark.parametrize("classifier", ["logistic", "knn"])
def test_a_sample_between_categories_falls_back(classifier) -> None:
    router = fitted(classifier, max_entropy=0.5, fallback="general", neighbours=9)
    between = torch.eye(6)[:3].mean(0, keepdim=True) * 4
    assert router.choose(between) == ["general"]
    assert float(router.entropy(between)) > 0.5
    router.max_entropy = 1.0
    assert router.choose(between)[0] in KINDS


@pytest.mark.parametrize("keep", [0.0, 0.5, 0.9, 0.95, 1.0])
def test_calibration_keeps_the_share_that_was_asked(keep) -> None:
    features, _ = clusters(40, seed=2)
    router = fitted(fallback="general")
    assert router.calibrate(features, keep) == router.max_entropy
    kept = sum(name != "general" for name in router.choose(features)) / 40
    assert keep <= kept <= keep + 1 / 40


def test_a_mixed_batch_is_what_each_request_alone_would_be(adapted, tiny_inputs) -> None:
    inputs = tiny_inputs("llama", batch=5, length=6, padding="left")
    embed = PooledStates(adapted, batch_size=2)
    router = CompositionRouter(embed, {"even": "law", "odd": "code", "third": "__base__"})
    router.fit(**inputs, categories=["even", "odd", "third", "odd", "even"])
    names = router(**inputs)
    assert names == ["law", "code", "__base__", "code", "law"]
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    together = adapted.generate(**inputs, adapter_names=names, **options)
    for row, name in enumerate(names):
        real = inputs["attention_mask"][row].bool()
        one = {key: value[row : row + 1, real] for key, value in inputs.items()}
        assert router(**one) == [name]
        alone = adapted.generate(**one, adapter_names=[name], **options)
        assert torch.equal(together[row, -5:], alone[0, -5:])
    assert len({tuple(row) for row in together[:, -5:].tolist()}) > 2


@pytest.mark.parametrize("config", [BottleneckConfig, LoraConfig])
def test_pooled_states_are_the_bases_whatever_adapters_act(config, tiny, tiny_inputs) -> None:
    inputs = tiny_inputs("llama", batch=3, length=7, padding="left")
    base = tiny("llama")
    mask = inputs["attention_mask"].unsqueeze(-1)
    places = (inputs["attention_mask"].cumsum(1) - 1).clamp_min(0)
    hidden = base.model(**inputs, position_ids=places).last_hidden_state
    expected = (hidden * mask).sum(1) / mask.sum(1)
    options = {"init_weights": False} if config is BottleneckConfig else {"init_lora_weights": False}
    model = get_peft_model(base, config(r=4, **options)).train()
    acting = model(**inputs).logits
    embed = PooledStates(model, batch_size=2)
    torch.testing.assert_close(embed(**inputs), expected, rtol=1e-4, atol=1e-4)
    assert model.training, "the mode is put back"
    torch.testing.assert_close(model(**inputs).logits, acting)


@pytest.mark.parametrize(("kind", "padding"), [("bert", "right"), ("t5", "right"), ("gpt2", "left")])
def test_pooled_states_do_not_depend_on_the_batch(kind, padding, tiny, tiny_inputs) -> None:
    inputs = tiny_inputs(kind, batch=4, length=7, padding=padding)
    inputs = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    embed = PooledStates(tiny(kind), batch_size=3)
    together = embed(**inputs)
    for row in range(4):
        alone = embed(**{name: value[row : row + 1] for name, value in inputs.items()})
        torch.testing.assert_close(together[row : row + 1], alone, rtol=1e-4, atol=1e-4)


def test_a_saved_router_chooses_as_before(tmp_path) -> None:
    router = fitted("knn", mapping={name: name[0] for name in KINDS}, max_entropy=0.4, fallback="x", neighbours=7)
    router.save(tmp_path)
    again = CompositionRouter.load(tmp_path, router.embed)
    features, _ = clusters(50, seed=5)
    features[::7] = features.mean(0)
    assert again.choose(features) == router.choose(features)
    assert "x" in again.choose(features)
    assert torch.equal(again.probabilities(features), router.probabilities(features))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda config, _: config.update(format=2), "format must be 1"),
        (lambda config, _: config.update(classifier="pickle"), "classifier='pickle' is unknown"),
        (lambda config, _: config.update(code="os"), r"unknown fields \['code'\]"),
        (lambda config, _: config.update(categories=["law"]), "labels must be numbers of the 1 categories"),
        (lambda config, _: config.update(categories="law"), "categories='law' must be a list"),
        (lambda _, weights: weights.update(labels=weights["labels"][:-1]), r"features must be \(N, d\)"),
        (lambda _, weights: weights.update(features=weights["features"] * torch.inf), "not all finite"),
        (lambda _, weights: weights.pop("labels"), "must hold features and labels"),
        (lambda _, weights: weights.clear(), "composition.safetensors is missing"),
    ],
)
def test_files_that_no_router_wrote_are_refused(change, message, tmp_path) -> None:
    fitted().save(tmp_path)
    settings, features = tmp_path / "composition.json", tmp_path / "composition.safetensors"
    config, weights = json.loads(settings.read_text()), load_file(features)
    change(config, weights)
    settings.write_text(json.dumps(config))
    features.unlink()
    if weights:
        save_file(weights, features)
    with pytest.raises(ValueError, match=rf"composition.json cannot be loaded: .*{message}"):
        CompositionRouter.load(tmp_path, lambda **_: None)


def test_a_folder_without_a_router_is_named(tmp_path) -> None:
    with pytest.raises(ValueError, match=r"nothing/composition.json is missing: name a folder"):
        CompositionRouter.load(tmp_path / "nothing", lambda **_: None)


def test_what_cannot_be_learned_or_chosen_is_refused(adapted, tiny_inputs) -> None:
    features, kinds = clusters(12)
    for arguments, message in [
        ({"classifier": "tree"}, "classifier='tree' is unknown"),
        ({"neighbours": 0}, "neighbours=0 must be"),
        ({"max_entropy": 2.0}, "max_entropy=2.0 must be"),
        ({"fallback": ""}, "fallback='' must be"),
        ({"mapping": {"law": 3}}, "mapping=.* must be category"),
    ]:
        with pytest.raises(ValueError, match=message):
            CompositionRouter(lambda **_: None, **arguments)
    router = CompositionRouter(lambda **_: None, {"law": "l", "code": "c"})
    with pytest.raises(ValueError, match="call fit first"):
        router.choose(features)
    with pytest.raises(ValueError, match="call fit first"):
        router.save("nowhere")
    with pytest.raises(ValueError, match=r"the mapping has no adapter for \['chemistry'\]"):
        router.fit_features(features, kinds)
    with pytest.raises(ValueError, match="12 names, one for each sample"):
        router.fit_features(features, kinds[:-1])
    with pytest.raises(ValueError, match="give two or more"):
        router.fit_features(features, ["law"] * 12)
    with pytest.raises(ValueError, match="neighbours=20 are more than the 12 samples"):
        fitted("knn", neighbours=20).fit_features(features, kinds)
    with pytest.raises(ValueError, match=r"features \(12, 5\) must be \(N, 6\)"):
        fitted().choose(features[:, :5])
    with pytest.raises(ValueError, match="has no adapter for"):
        fitted().map_to({"law": "l"})
    with pytest.raises(ValueError, match="batch_size=0 must be"):
        PooledStates(adapted, 0)
    with pytest.raises(ValueError, match=r"attention_mask \(2, 3\) must be \(2, 7\)"):
        PooledStates(adapted)(tiny_inputs("llama")["input_ids"], torch.ones(2, 3))
