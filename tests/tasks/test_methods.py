"""Methods of one comparison train as much as was asked for, and only what they name."""

from __future__ import annotations

import json

import pytest
from transformers import TrainingArguments

from mixadapters.tasks import get_task
from mixadapters.tasks.methods import HEAD, Method, trainable
from mixadapters.tasks.models import Base

SIZED = ("lora", "bottleneck", "mixda_untuned")


@pytest.mark.parametrize("kind", ["encoder", "decoder"])
@pytest.mark.parametrize("name", SIZED)
def test_trainable_sizes_are_equal_up_to_half_a_rank(request, tmp_path, kind, name) -> None:
    base = Base(str(request.getfixturevalue(kind)), get_task("fever"))
    model, callbacks, settings = Method(name, 1500, 2, {}).build(base)
    for callback in callbacks:
        arguments = TrainingArguments(str(tmp_path), remove_unused_columns=False)
        callback.on_init_end(arguments, None, None, model=model)
    if settings["rank"] > 1:
        per_rank = 2 * (16 + 16) * (2 if name == "lora" else 1) + 4
        assert abs(trainable(model) - 1500) <= per_rank / 2
    assert trainable(model, head=True) == (16 * 2 + 2 if kind == "encoder" else 0)


@pytest.mark.parametrize(
    ("name", "trains"), [("probe", {HEAD}), ("lora", {HEAD, "lora_A", "lora_B"}), ("bottleneck", {HEAD, "bank"})]
)
def test_only_the_method_trains(encoder, name, trains) -> None:
    model, _, _ = Method(name, 1500, 2, {}).build(Base(str(encoder), get_task("imdb")))
    for parameter, value in model.named_parameters():
        assert value.requires_grad == (bool(trains & set(parameter.split("."))) and "original_module" not in parameter)


def test_full_tuning_trains_everything(encoder) -> None:
    model, _, _ = Method("full", 1, None, {}).build(Base(str(encoder), get_task("imdb")))
    assert all(p.requires_grad for p in model.parameters())


def test_any_config_of_peft_is_a_method(encoder, tmp_path) -> None:
    file = tmp_path / "ia3.json"
    settings = {"peft_type": "IA3", "target_modules": ["value"], "feedforward_modules": []}
    file.write_text(json.dumps(settings))
    model, _, found = Method(str(file), 1, None, {}).build(Base(str(encoder), get_task("imdb")))
    assert found == settings
    assert trainable(model) == 3 * 16


@pytest.mark.parametrize(
    ("kind", "name", "parameters", "message"),
    [
        ("encoder", "lora", 10, "parameters=10 is too small: with rank 1 there are 128"),
        ("encoder", "frozen", 10, "method 'frozen' with an encoder is a random head; take 'probe'"),
        ("decoder", "probe", 10, "method 'probe' trains a head, and a decoder has none; take 'frozen'"),
    ],
)
def test_what_cannot_be_compared_is_refused(request, kind, name, parameters, message) -> None:
    base = Base(str(request.getfixturevalue(kind)), get_task("fever"))
    with pytest.raises(ValueError, match=message):
        Method(name, parameters, 2, {}).build(base)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "cannot be read as JSON"),
        ("[]", "must be an object with a peft_type, got None; have .*LORA"),
        ('{"peft_type": "LORRA"}', "must be an object with a peft_type, got 'LORRA'"),
        ('{"peft_type": ["LORA"]}', "must be an object with a peft_type, got "),
    ],
)
def test_a_config_that_is_none_is_named(tmp_path, content, message) -> None:
    (tmp_path / "mine.json").write_text(content)
    with pytest.raises(ValueError, match=rf"method '.*mine\.json' {message}"):
        Method(str(tmp_path / "mine.json"), 1, None, {})


def test_an_unknown_method_names_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"method 'mixdaa' is unknown; .*Did you mean 'mixda'"):
        Method("mixdaa", 1, None, {})
