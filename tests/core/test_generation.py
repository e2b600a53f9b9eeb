from __future__ import annotations

import copy
import inspect
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn
from transformers import GenerationConfig

from mixadapters import BottleneckConfig, ForwardContext, MixDAConfig
from mixadapters.core import generation


def copies_seen(model: nn.Module, **settings: Any) -> set[tuple[int, int]]:
    """(rows, copies) of the forwards inside a generation."""
    seen = set()
    context = ForwardContext.of(model)

    def look(*_: Any) -> None:
        seen.add((context.stream().batch, context.stream().copies))

    layers = [m for n, m in model.named_modules() if n.endswith(("layers.0", "encoder.block.0", "decoder.block.0"))]
    handles = [layer.register_forward_hook(look) for layer in layers]
    model.generate(input_ids=torch.ones(2, 3, dtype=torch.long), max_new_tokens=2, min_new_tokens=2, **settings)
    for handle in handles:
        handle.remove()
    return seen


def test_forwards_inside_generate_know_how_often_rows_are_repeated(tiny) -> None:
    base = tiny("llama")
    ForwardContext.of(base)
    greedy, sampled = {"do_sample": False}, {"do_sample": True}
    assert copies_seen(base, **greedy) == {(2, 1)}
    assert copies_seen(base, num_beams=3, **greedy) == {(6, 3)}
    assert copies_seen(base, num_beams=4, num_return_sequences=2, **greedy) == {(8, 4)}
    assert copies_seen(base, num_return_sequences=5, **sampled) == {(10, 5)}
    base.generation_config.num_beams = 2
    assert copies_seen(base, **greedy) == {(4, 2)}
    assert copies_seen(base, num_beams=1, **greedy) == {(2, 1)}


def test_encoder_reads_the_rows_before_they_are_repeated(tiny) -> None:
    base = tiny("t5")
    ForwardContext.of(base)
    assert copies_seen(base, num_beams=3, do_sample=False) == {(2, 1), (6, 3)}


def test_generate_fails_and_is_over(tiny) -> None:
    base = tiny("llama")
    context = ForwardContext.of(base)
    base.model.layers[0].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        base.generate(input_ids=torch.ones(2, 3, dtype=torch.long), num_beams=3, max_new_tokens=2)
    assert (context.records.thread.generates, context.records.thread.copies) == (False, 1)


def test_generate_is_wrapped_and_given_back(tiny) -> None:
    base = tiny("llama")
    signature = inspect.signature(base.generate)
    theirs = lambda *_, **__: "theirs"  # noqa: E731
    context = ForwardContext.of(base)
    assert inspect.signature(base.generate) == signature
    twin = copy.deepcopy(base)
    assert twin.generate.model is twin
    assert twin.generate.context is ForwardContext.of(twin) is not context
    context.detach(base)
    assert not {"generate", "_expand_inputs_for_generation"} & base.__dict__.keys()
    base.generate = theirs
    assert ForwardContext.of(base) is not context
    assert base.generate() == "theirs"
    ForwardContext.of(base).detach(base)
    assert base.generate is theirs


def test_prompt_of_a_generation_is_what_its_decoder_goes_on_from(tiny) -> None:
    model, ids, embeddings = tiny("llama"), torch.ones(2, 3, dtype=torch.long), torch.zeros(2, 5, 32)
    paged = GenerationConfig(cache_implementation="paged")
    for args, given in (((ids,), {}), ((), {"inputs": ids}), ((), {"input_ids": ids})):
        assert generation.prompt_of(model, *args, **given)["prompt_mask"].tolist() == [[True] * 3] * 2
        assert generation.prompt_of(model, *args, **given, inputs_embeds=embeddings)["prompt_mask"].shape == (2, 5)
        for packed in ({"cache_implementation": "paged"}, {"generation_config": paged}):
            assert generation.prompt_of(model, *args, **given, **packed) == {}
    assert generation.prompt_of(model, ids, paged) == {}
    assert generation.prompt_of(model, ids[0]) == {}
    assert generation.prompt_of(tiny("t5"), ids) == {}


def test_a_generation_looks_for_its_prompt_only_where_adapters_act_that_ask(tiny) -> None:
    """Those of others may be many."""
    common = {"domains": ["a", "b"], "r": 4, "target_modules": ["q_proj"]}
    model = get_peft_model(tiny("llama"), MixDAConfig(**common, gate_granularity="request"), adapter_name="asks")
    model.add_adapter("not", MixDAConfig(**common))
    base = model.get_base_model()
    assert generation.reads_prompt(base)
    assert generation.reads_prompt(base, ["not", "__base__", "asks"])
    assert not generation.reads_prompt(base, ["not", "__base__"])
    model.set_adapter("not")
    assert not generation.reads_prompt(base)
    assert generation.reads_prompt(base, ["asks"])


def test_a_generation_walks_over_nothing_where_no_adapter_has_anything_to_decide(tiny, monkeypatch) -> None:
    looked: list[Any] = []
    plain = generation.reads_prompt
    monkeypatch.setattr(generation, "reads_prompt", lambda *given: looked.append(given) or plain(*given))
    ids = torch.tensor([[5, 6]])
    for config, times in ((BottleneckConfig(r=4), 0), (MixDAConfig(domains=["a"], r=4), 1)):
        get_peft_model(tiny("llama"), config).generate(input_ids=ids, max_new_tokens=1)
        assert len(looked) == times


@torch.no_grad()
def test_rows_of_a_generation_name_their_saved_modules_in_its_encoder_too(tiny) -> None:
    """The encoder runs before any forward of the root, which looks for the modules."""
    config = BottleneckConfig(r=3, init_weights=False, modules_to_save=["SelfAttention.o"])
    base = tiny("t5")
    model = get_peft_model(base, config, adapter_name="first").eval()
    for name, parameter in model.named_parameters():
        if "modules_to_save" in name:
            parameter.mul_(-3)

    def scores(**given: Any) -> Tensor:
        ids = torch.tensor([[5, 6, 7]] * 2)
        given |= {"max_new_tokens": 1, "return_dict_in_generate": True, "output_scores": True}
        return base.generate(input_ids=ids, **given).scores[0]

    adapted = scores()
    with model.disable_adapter():
        plain = scores()
    assert not torch.allclose(adapted, plain)
    torch.testing.assert_close(scores(adapter_names=["first", "__base__"]), torch.stack([adapted[0], plain[1]]))


def test_prompt_mask_of_a_caller_and_settings_of_a_name_are_left_as_given(tiny) -> None:
    base = tiny("llama")
    ids = torch.ones(2, 3, dtype=torch.long)
    context = ForwardContext.of(base)
    context.fields |= {"prompt_mask", "num_beams"}  # the second is a setting of `generate` too
    base.model.layers[0].reads_prompt = True
    masks, mask = [], torch.tensor([[1, 1, 0]] * 2)
    base.model.layers[0].register_forward_hook(lambda *_: masks.append(context.held["prompt_mask"]))
    beams = base.generate(input_ids=ids, prompt_mask=mask, num_beams=2, num_return_sequences=2, max_new_tokens=1)
    assert beams.shape[0] == 4
    assert masks[0] is mask


def test_expansion_outside_generate_is_nobodys(tiny) -> None:
    base = tiny("llama")
    context = ForwardContext.of(base)
    ids, _ = base._expand_inputs_for_generation(expand_size=3, input_ids=torch.ones(2, 3, dtype=torch.long))
    assert ids.shape[0] == 6
    assert context.records.thread.copies == 1


def test_what_is_wrapped_is_what_transformers_calls() -> None:
    from transformers.generation import GenerationMixin

    for kind in (generation.Generate, generation.Expand):
        assert callable(getattr(GenerationMixin, kind.name))
    assert "expand_size" in inspect.signature(GenerationMixin._expand_inputs_for_generation).parameters
