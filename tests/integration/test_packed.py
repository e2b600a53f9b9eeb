"""Continuous batching packs the tokens of all requests into one row: right, or refused by name."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import ContinuousBatchingConfig, GenerationConfig

from mixadapters import BottleneckConfig, ForwardContext, MixDAConfig, MoAConfig, PILLConfig

transformers.logging.set_verbosity_error()
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:transformers")
PROMPTS = [[8, 6, 9], [6, 5, 14, 7, 11], [10], [7, 12, 6, 13, 7, 13, 6]]
SETTINGS = GenerationConfig(max_new_tokens=6, min_new_tokens=6, do_sample=False, pad_token_id=0)
# Unless told, the cache takes nine tenths of the machine's memory: several workers would be killed for it.
SMALL = {
    "generation_config": SETTINGS,
    "continuous_batching_config": ContinuousBatchingConfig(num_blocks=8, max_batch_tokens=64),
}


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    for thread in {t for t in threading.enumerate() if not t.daemon} - before:
        thread.join(60)  # generate_batch itself waits five seconds for its own
        assert not thread.is_alive(), thread


def adapt(base: nn.Module, config: Any) -> PeftModel:
    model = get_peft_model(base, config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "adapters." in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)
            elif parameter.dim() > 1:  # so large that tokens differ
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.4)
    return model.eval()


def mixda(**fields: Any) -> MixDAConfig:
    return MixDAConfig(domains=["a", "b"], r=3, task_type="CAUSAL_LM", init_weights=False, **fields)


def moa(**fields: Any) -> MoAConfig:
    return MoAConfig(num_experts=3, r=3, task_type="CAUSAL_LM", init_weights=False, **fields)


RIGHT = {
    "bottleneck": lambda: BottleneckConfig(r=4, task_type="CAUSAL_LM", init_weights=False),
    "token gate": mixda,
    "routers of each module": moa,
    "routers of each block": lambda: moa(router_scope="block", n_shared_experts=1),
    "a router of the model": lambda: moa(router_scope="model"),
    "tokens that name their modality": lambda: PILLConfig(
        modalities=["text", "image"], token_ids={"image": [6]}, task_type="CAUSAL_LM", init_weights=False
    ),
}


@torch.no_grad()
@pytest.mark.parametrize("config", RIGHT)
def test_packed_requests_equal_each_alone(tiny, config) -> None:
    model = adapt(tiny("llama"), RIGHT[config]())
    packed = model.generate_batch(inputs=PROMPTS, **SMALL)
    alone = [model.generate(input_ids=torch.tensor([p]), generation_config=SETTINGS)[0, len(p) :] for p in PROMPTS]
    assert [one.generated_tokens for one in packed.values()] == [one.tolist() for one in alone]
    with model.disable_adapter():
        base = [model.generate(input_ids=torch.tensor([p]), generation_config=SETTINGS)[0, len(p) :] for p in PROMPTS]
    assert any(not torch.equal(one, other) for one, other in zip(alone, base, strict=True))


def calls(model: PeftModel) -> Iterator[Any]:
    """The ways into continuous batching."""
    for root in (model, model.base_model, model.get_base_model()):
        yield lambda root=root, **more: root.generate_batch(inputs=PROMPTS, **SMALL, **more)
    yield lambda **more: model.generate(
        torch.tensor(PROMPTS[1]), generation_config=SETTINGS, cache_implementation="paged", **more
    )
    yield lambda **more: model.get_base_model().init_continuous_batching(**SMALL, **more)


@pytest.mark.parametrize("granularity", ["causal_prefix", "request"])
@pytest.mark.parametrize("kind", ["mixda", "moa", "moa by block"])
def test_gates_that_would_mix_requests_are_refused(tiny, kind, granularity) -> None:
    scope = "block" if kind == "moa by block" else "module"
    made = mixda(gate_granularity=granularity) if kind == "mixda" else moa(granularity=granularity, router_scope=scope)
    field = "gate_granularity" if kind == "mixda" else "^granularity"
    model = adapt(tiny("llama"), made)
    for call in calls(model):
        with pytest.raises(ValueError, match=f"{field}='{granularity}'.*one row.*use generate"):
            call()
    with model.disable_adapter():
        assert len(model.generate_batch(inputs=PROMPTS, **SMALL)) == len(PROMPTS)


def test_adapter_that_would_mix_requests_may_be_there_if_another_acts(tiny) -> None:
    model = adapt(tiny("llama"), mixda(gate_granularity="causal_prefix"))
    model.add_adapter("other", mixda())
    model.set_adapter("other")
    assert len(model.generate_batch(inputs=PROMPTS, **SMALL)) == len(PROMPTS)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("adapter_names", ["default"] * 4),
        ("domain_ids", torch.tensor([0, 1, 0, 1])),
        ("domain_ids", torch.tensor([0])),
        ("prompt_mask", torch.ones(4, 7)),
    ],
)
def test_fields_that_rows_say_are_refused_not_dropped(tiny, field, value) -> None:
    model = adapt(tiny("llama"), mixda())
    context = ForwardContext.of(model)
    for number, call in enumerate(calls(model)):
        with pytest.raises(ValueError, match=f"'{field}'.*one row.*use generate"), context.pin(**{field: value}):
            call()
        if number < 3:
            with pytest.raises(ValueError, match=f"'{field}'.*one row"):
                call(**{field: value})
    with pytest.raises(ValueError, match=f"'{field}'.*one row"):
        model.generate(
            torch.tensor(PROMPTS[1]), generation_config=SETTINGS, cache_implementation="paged", **{field: value}
        )


def test_modalities_that_rows_say_are_refused(tiny) -> None:
    model = adapt(tiny("llama"), RIGHT["tokens that name their modality"]())
    ids = torch.zeros(4, 7, dtype=torch.long)
    with pytest.raises(ValueError, match=r"'modality_ids'.*one row"):
        model.generate_batch(inputs=PROMPTS, **SMALL, modality_ids=ids)


@pytest.mark.parametrize("granularity", ["token", "causal_prefix"])
def test_forward_of_a_packed_row_refuses_what_a_manager_would_drop(tiny, granularity) -> None:
    """Whoever calls the model as continuous batching does."""
    base = adapt(tiny("llama"), mixda(gate_granularity=granularity)).get_base_model()
    packed = {"cache": object(), "cu_seq_lens_q": torch.tensor([0, 2, 5]), "use_cache": False}
    ids = torch.tensor([[6, 7, 8, 9, 10]])
    if granularity == "token":
        base(input_ids=ids, **packed)
        with pytest.raises(ValueError, match=r"'domain_ids'.*one row"):
            base(input_ids=ids, domain_ids=torch.tensor([0]), **packed)
    else:
        with pytest.raises(ValueError, match=r"gate_granularity='causal_prefix'.*one row"):
            base(input_ids=ids, **packed)
