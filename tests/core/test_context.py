from __future__ import annotations

import copy
import io
import re
import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import transformers
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import DynamicCache, StaticCache

from mixadapters import BottleneckConfig, ForwardContext, MixDAConfig, MoAConfig, PILLConfig
from mixadapters.core.record import Record
from mixadapters.core.streams import Stream, read_stream

transformers.logging.set_verbosity_error()
pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning:transformers"),
    pytest.mark.filterwarnings("ignore::UserWarning:peft"),
]
CLOSE = {"atol": 2e-5, "rtol": 2e-5}
MIXDA = {"domains": ["a", "b"], "r": 3, "task_r": 2, "domain_layers": [0, 1]}


@pytest.fixture(scope="session")
def tiny(tiny: Any) -> Any:
    """Models of two layers, a first and a last one, where a test asks for no more."""
    return partial(tiny, layers=2)


def adapt(base: nn.Module, config: Any, **others: Any) -> PeftModel:
    model = get_peft_model(base, config)
    for name, other in others.items():
        model.add_adapter(name, other)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "adapters." in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model.eval()


def context_of(model: PeftModel) -> ForwardContext:
    return ForwardContext.of(model.get_base_model())


class Spy:
    """An objective that counts its calls, and does what it is told."""

    takes = ("note",)

    def __init__(
        self,
        before: Callable[[ForwardContext, dict], Any] | None = None,
        after: Callable[[ForwardContext, nn.Module, Any], Any] | None = None,
        in_eval: bool = False,
    ) -> None:
        self.does_before, self.does_after, self.in_eval = before, after, in_eval
        self.calls: list[str] = []
        self.notes: list[Any] = []

    def before(self, context: ForwardContext, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        self.calls.append("before")
        self.notes.append(context.record.values.get("note"))
        assert "note" not in kwargs
        if self.does_before:
            self.does_before(context, kwargs)
        return args, kwargs

    def after(self, context: ForwardContext, module: nn.Module, output: Any) -> Any:
        self.calls.append("after")
        if self.does_after:
            self.does_after(context, module, output)
        return output


# --- one record per forward --------------------------------------------------------------------------------------


def test_each_forward_opens_a_record_and_closes_it(tiny, tiny_inputs) -> None:
    model = adapt(tiny("llama"), BottleneckConfig(r=3))
    context = context_of(model)
    during: list[Record] = []
    model.get_base_model().model.layers[0].register_forward_hook(lambda *_: during.append(context.record))
    inputs = tiny_inputs("llama", padding="left")
    model(**inputs)
    model.train()(**inputs)
    assert during[0] is not during[1]
    assert during[1] is context.record
    assert [r.training for r in during] == [False, True]
    assert [r.open for r in during] == [False, False]
    assert torch.equal(context.record.attention_mask, inputs["attention_mask"].bool())
    assert context.record.inputs.keys() >= {"input_ids", "attention_mask"}
    assert context.running is None


def test_record_names_positional_arguments(tiny, tiny_inputs) -> None:
    model = adapt(tiny("bert", "sequence_classification"), BottleneckConfig(r=3))
    inputs = tiny_inputs("bert", padding="right", labels="classes")
    model.get_base_model()(inputs["input_ids"], inputs["attention_mask"], labels=inputs["labels"])
    record = context_of(model).record
    assert record.inputs["input_ids"] is inputs["input_ids"]
    assert torch.equal(record.attention_mask, inputs["attention_mask"].bool())


def test_context_is_found_and_made_once(tiny) -> None:
    base = tiny("llama")
    assert ForwardContext.find(base) is None
    context = ForwardContext.of(base)
    assert ForwardContext.of(base) is context is ForwardContext.find(base)
    assert len(base._forward_hooks) == len(base._forward_pre_hooks) == 1
    model = adapt(base, BottleneckConfig(r=3), second=BottleneckConfig(r=2))
    assert context_of(model) is context
    assert len(base._forward_hooks) == 1


def test_detach_takes_everything_off(tiny, tiny_inputs) -> None:
    for kind in ("llama", "bert", "t5"):
        base, inputs = tiny(kind), tiny_inputs(kind)
        model = adapt(base, BottleneckConfig(r=3, placement="parallel")).train()
        base.gradient_checkpointing_enable({"use_reentrant": False})
        output = model(**inputs, labels=inputs["input_ids"]).loss
        output.backward()
        mine = [m for m in base.modules() if m._forward_hooks or m._forward_pre_hooks]
        assert len(mine) >= (2 if kind == "bert" else 1)  # the root, and BERT's taps
        functions = [m.__dict__.get("_gradient_checkpointing_func") for m in base.modules()]
        assert any(type(f).__module__.startswith("mixadapters") for f in functions)
        bare = model.unload()
        assert bare is base
        base.disable_input_require_grads()  # a hook of transformers'
        for module in base.modules():
            for name, hooks in module.__dict__.items():
                if name.startswith(("_forward_pre_hooks", "_forward_hooks")):
                    assert not hooks, (kind, name)
            assert "mixadapters" not in type(module.__dict__.get("_gradient_checkpointing_func")).__module__
        assert ForwardContext.find(base) is None
        base.requires_grad_()(**inputs, labels=inputs["input_ids"]).loss.backward()


def test_detach_leaves_the_hooks_of_others(tiny, tiny_inputs) -> None:
    base = tiny("llama")
    calls: list[str] = []
    base.register_forward_pre_hook(lambda *_: calls.append("pre"))
    base.register_forward_hook(lambda *_: calls.append("post"))
    adapt(base, BottleneckConfig(r=3)).unload()
    base(**tiny_inputs("llama"))
    assert calls == ["pre", "post"]


# --- nested forwards and errors ----------------------------------------------------------------------------------


def test_teacher_pass_inside_a_forward_has_its_own_record(tiny, tiny_inputs) -> None:
    model = adapt(tiny("llama"), MixDAConfig(**MIXDA, balance_coef=0.5))
    model.train()
    context, inputs = context_of(model), tiny_inputs("llama", labels="tokens")
    seen: dict[str, Any] = {}

    def teach(context: ForwardContext, module: nn.Module, output: Any) -> None:
        outer = context.record
        seen["losses"] = dict(outer.losses)
        with model.disable_adapter(), torch.no_grad():
            teacher = module(**{k: v for k, v in inputs.items() if k != "labels"}, note="inner").logits
        assert context.record is outer
        assert outer.open
        assert outer.losses.keys() == seen["losses"].keys()
        context.add_loss("distance", (output.logits - teacher).square().mean(), 2.0)

    spy = Spy(after=teach, in_eval=True)
    context.objectives.append(spy)
    output = model(**inputs, note="outer")
    assert spy.calls == ["before", "after"]  # not for the pass inside
    assert spy.notes == ["outer"]
    assert seen["losses"].keys() == {"balance"}
    assert context.record.losses.keys() == {"balance", "distance"}
    context.objectives.clear()
    with model.disable_adapter():
        teacher = model(**{k: v for k, v in inputs.items() if k != "labels"}).logits
    plain = model(**inputs)
    expected = plain.loss + 2 * (plain.logits - teacher).square().mean()
    torch.testing.assert_close(output.loss, expected, **CLOSE)


def test_pass_inside_a_layer_returns_to_the_rows_of_the_outer_one(tiny, tiny_inputs) -> None:
    model = adapt(tiny("llama"), BottleneckConfig(r=3), second=BottleneckConfig(r=5))
    inputs, inner = tiny_inputs("llama", batch=2), tiny_inputs("llama", batch=3, length=4)
    expected = model(**inputs, adapter_names=["second", "default"]).logits
    base = model.get_base_model()
    inside: list[Tensor] = []

    def call_again(*_: Any) -> None:
        if not inside:
            inside.append(torch.empty(0))
            inside[0] = base(**inner, adapter_names=["second"] * 3).logits

    base.model.layers[1].register_forward_pre_hook(call_again)
    assert torch.equal(model(**inputs, adapter_names=["second", "default"]).logits, expected)
    assert torch.equal(inside[0], model(**inner, adapter_names=["second"] * 3).logits)


@pytest.mark.parametrize("where", ["layer", "before", "after", "pre_hook", "nested"])
def test_error_inside_a_forward_leaves_nothing_behind(tiny, tiny_inputs, where) -> None:
    model = adapt(tiny("llama"), MixDAConfig(**MIXDA, balance_coef=0.5)).train()
    base, context = model.get_base_model(), context_of(model)
    inputs = tiny_inputs("llama", labels="tokens")
    expected = model(**inputs).loss
    spy = Spy()
    context.objectives.append(spy)
    broken = True

    def fail(*_: Any) -> None:
        if broken:
            raise KeyError("broken")

    def fail_inside(context: ForwardContext, module: nn.Module, output: Any) -> None:
        if broken:
            with pytest.raises(ValueError, match="adapter_names"):
                module(**inputs, adapter_names=["default"])
            assert context.running is not None
            fail()

    match where:
        case "layer":
            base.model.layers[1].register_forward_hook(fail)
        case "before":
            spy.does_before = fail
        case "after":
            spy.does_after = fail
        case "pre_hook":
            base.register_forward_pre_hook(fail)
        case "nested":
            spy.does_after = fail_inside
    for _ in range(2):
        with pytest.raises(KeyError, match="broken"):
            model(**inputs, note="first")
        assert context.running is None
    broken = False
    spy.calls.clear()
    spy.notes.clear()
    torch.testing.assert_close(model(**inputs, note="second").loss, expected)
    assert spy.calls == ["before", "after"]
    assert spy.notes == ["second"]
    assert context.record.parent is None
    assert torch.equal(model.eval()(**inputs).logits, model(**inputs).logits)


def test_rows_of_a_failed_call_do_not_stay(tiny, tiny_inputs) -> None:
    model = adapt(tiny("llama"), BottleneckConfig(r=3), second=BottleneckConfig(r=5))
    inputs = tiny_inputs("llama", batch=2)
    expected = model(**inputs).logits
    for names, message in ((["second"] * 3, "same as the number of inputs"), (["third"] * 2, "non-existing adapter")):
        with pytest.raises(ValueError, match=message):
            model(**inputs, adapter_names=names)
        assert torch.equal(model(**inputs).logits, expected)
    with pytest.raises(ValueError, match="same as the number of inputs"):
        model.generate(**inputs, adapter_names=["second"] * 3, max_new_tokens=1)
    assert torch.equal(model(**inputs).logits, expected)


def test_objectives_work_in_training_and_where_they_say_so_in_evaluation(tiny, tiny_inputs) -> None:
    model = adapt(tiny("llama"), BottleneckConfig(r=3))
    context, inputs = context_of(model), tiny_inputs("llama")
    training, both = Spy(), Spy(in_eval=True)
    context.objectives += [training, both]
    model(**inputs, note=1)  # taken off in either case
    model.train()(**inputs, note=2)
    assert (training.notes, both.notes) == ([2], [1, 2])
    with model.disable_adapter():
        model(**inputs, note=3)
    assert both.notes == [1, 2, 3]


# --- threads -----------------------------------------------------------------------------------------------------


def together(model: PeftModel, *jobs: Callable[[], Any]) -> list[Any]:
    """Run the jobs in threads of their own, all of them inside the first layer at the same time.

    Two threads that record gradients of one parameter can wait for each other for ever in torch 2.13, where both make
    its accumulator: one has the parameter's lock and waits for the interpreter's, the other has them the other way
    round. An accumulator that is there already is not made.
    """
    made = [p.view_as(p).grad_fn for p in model.parameters() if p.requires_grad and torch.is_grad_enabled()]
    barrier = threading.Barrier(len(jobs), timeout=60)
    results: list[Any] = [None] * len(jobs)

    def meet(*_: Any) -> None:
        barrier.wait()

    handle = model.get_base_model().model.layers[0].register_forward_pre_hook(meet)

    def run(i: int) -> None:
        try:
            results[i] = jobs[i]()
        except Exception as error:
            barrier.abort()
            results[i] = error

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(jobs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    handle.remove()
    del made
    for result in results:
        if isinstance(result, Exception):
            raise result
    return results


@pytest.mark.parametrize("through", ["peft", "base"])
def test_threads_name_their_own_adapters(tiny, tiny_inputs, through) -> None:
    model = adapt(tiny("llama"), BottleneckConfig(r=3), second=BottleneckConfig(r=5))
    batches = [tiny_inputs("llama", batch=b, length=t, seed=b) for b, t in ((2, 7), (3, 5), (1, 4))]
    names = [["second", "default"], ["__base__", "second", "second"], None]

    def job(i: int) -> Callable[[], Tensor]:
        call = model if through == "peft" else model.get_base_model()
        extra = {} if names[i] is None else {"adapter_names": names[i]}
        return lambda: call(**batches[i], **extra).logits.detach()

    expected = [job(i)() for i in range(3)]
    for _ in range(2):
        for got, want in zip(together(model, *(job(i) for i in range(3))), expected, strict=True):
            assert torch.equal(got, want)
    assert torch.equal(job(2)(), expected[2])  # nothing stays behind
    assert not context_of(model).held


def test_threads_train_with_their_own_objectives_losses_and_checkpoints(tiny, tiny_inputs) -> None:
    model = adapt(tiny("llama"), MixDAConfig(**MIXDA, balance_coef=0.5)).train()
    model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
    spy = Spy(after=lambda context, module, output: context.add_loss("size", output.logits.square().mean()))
    context_of(model).objectives.append(spy)
    batches = [tiny_inputs("llama", seed=seed, length=4 + seed, labels="tokens") for seed in (1, 2)]
    jobs = [lambda inputs=inputs: model(**inputs).loss for inputs in batches]
    expected = [job() for job in jobs]
    spy.calls.clear()
    got = together(model, *jobs)
    assert sorted(spy.calls) == ["after", "after", "before", "before"]
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other)
    grads = []
    for losses in (got, expected):
        sum(losses).backward()  # in this thread, which ran none of those forwards
        grads.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
        model.zero_grad()
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other, **CLOSE)


def test_pinned_fields_hold_in_every_thread(tiny, tiny_inputs) -> None:
    """A generation that streams its text runs in a thread of its own."""
    model = adapt(tiny("llama"), MixDAConfig(**MIXDA))
    inputs = tiny_inputs("llama", batch=2)
    ids = torch.tensor([0, 1])
    expected = model(**inputs, domain_ids=ids).logits
    with context_of(model).pin(domain_ids=ids):
        assert torch.equal(together(model, lambda: model(**inputs).logits.detach())[0], expected)


# --- copies ------------------------------------------------------------------------------------------------------


def saved_and_loaded(model: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, saved_and_loaded])
@pytest.mark.parametrize("kind", ["llama", "bert", "t5"])
def test_copies_start_empty_and_work_on_their_own(tiny, tiny_inputs, copied, kind) -> None:
    config = MixDAConfig(**MIXDA, balance_coef=0.5, gate_input="ffn_input")
    model = adapt(tiny(kind), config).train()
    context, inputs = context_of(model), tiny_inputs(kind, batch=2, padding="right")
    if copied is copy.deepcopy:  # transformers' own hook for checkpoints cannot be pickled
        model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
    spy = Spy()
    context.objectives.append(spy)
    with context.pin(domain_ids=torch.tensor([0, 1])):
        model(**inputs)  # leaves tensors with a history in the record
        twin = copied(model)
    ours, theirs = context, context_of(twin)
    assert theirs is not ours
    assert not theirs.record.inputs
    assert not theirs.record.values
    assert not theirs.record.taps
    assert not theirs.held
    assert not theirs.loss_log
    assert theirs.fields == ours.fields
    assert len(theirs.objectives) == 1
    assert theirs.objectives[0] is not spy
    before = ours.record
    model.eval()
    twin.eval()
    expected = model(**inputs).logits
    assert torch.equal(twin(**inputs).logits, expected)
    assert ours.record is not before
    after = ours.record
    ids = torch.tensor([1, 0])
    assert torch.equal(twin(**inputs, domain_ids=ids).logits, model(**inputs, domain_ids=ids).logits)
    assert after is not ours.record
    kept = ours.record
    twin.train()(**inputs).logits.square().mean().backward()
    assert ours.record is kept  # the copy's layers write into the copy's context
    assert theirs.objectives[0].calls[-2:] == ["before", "after"]
    assert all(p.grad is None for p in model.parameters())
    hosts = [m.context for m in twin.modules() if hasattr(m, "context") and isinstance(m.context, ForwardContext)]
    assert all(c is theirs for c in hosts)


def test_a_part_that_peft_copies_stays_in_its_model(tiny, tiny_inputs) -> None:
    """Saved modules are copies: taps on them keep what the layers of this model read."""
    config = MixDAConfig(**MIXDA, gate_input="ffn_input", modules_to_save=["gate_proj"])
    model, inputs = adapt(tiny("llama"), config).eval(), tiny_inputs("llama")
    plain = adapt(tiny("llama"), MixDAConfig(**MIXDA, gate_input="ffn_input")).eval()
    torch.testing.assert_close(model(**inputs).logits, plain(**inputs).logits)
    twin = copy.deepcopy(model)
    assert torch.equal(twin(**inputs).logits, model(**inputs).logits)
    assert context_of(twin) is not context_of(model)


# --- fields that hold over several forwards ----------------------------------------------------------------------


def test_pin_holds_nests_and_lets_go(tiny, tiny_inputs) -> None:
    model = adapt(tiny("llama"), MixDAConfig(**MIXDA))
    context, inputs = context_of(model), tiny_inputs("llama", batch=2)
    free = model(**inputs).logits
    first, second = (model(**inputs, domain_ids=torch.tensor(ids)).logits for ids in ([0, 1], [1, -1]))
    assert not torch.equal(first, second)
    with context.pin(domain_ids=torch.tensor([0, 1])):
        assert torch.equal(model(**inputs).logits, first)
        with context.pin(domain_ids=torch.tensor([1, -1])):
            assert torch.equal(model(**inputs).logits, second)
        assert torch.equal(model(**inputs).logits, first)
        # What a call says goes before what is pinned.
        assert torch.equal(model(**inputs, domain_ids=torch.tensor([1, -1])).logits, second)
    with pytest.raises(KeyError, match="inside"), context.pin(domain_ids=torch.tensor([0, 1])):
        raise KeyError("inside")
    assert torch.equal(model(**inputs).logits, free)


@torch.no_grad()
def test_pinned_rows_follow_the_beams(tiny, tiny_inputs) -> None:
    model = adapt(tiny("llama"), MixDAConfig(**MIXDA))
    inputs = tiny_inputs("llama", batch=2, length=5)
    settings = {
        "max_new_tokens": 4,
        "min_new_tokens": 4,
        "num_beams": 3,
        "num_return_sequences": 2,
        "do_sample": False,
    }
    context = context_of(model)
    with context.pin(domain_ids=torch.tensor([0, 1])):
        generated = model.generate(**inputs, **settings)
    for row in (0, 1):
        alone = {k: v[row : row + 1] for k, v in inputs.items()}
        with context.pin(domain_ids=torch.tensor([row])):
            assert torch.equal(model.generate(**alone, **settings), generated[2 * row : 2 * row + 2])


def test_pin_refuses_fields_that_nothing_reads(tiny) -> None:
    context = context_of(adapt(tiny("llama"), MixDAConfig(**MIXDA)))
    with pytest.raises(ValueError, match=r"\['domain_id'\].*'domain_ids'"), context.pin(domain_id=torch.tensor([0])):
        pass


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("domain_id", "domain_ids"), ("domains_ids", "domain_ids"), ("domainids", "domain_ids"),
        ("promt_mask", "prompt_mask"), ("adapter_name", "adapter_names"), ("modality_id", "modality_ids"),
        ("expert_id", "expert_ids"), ("experts_ids", "expert_ids"),
    ],
)  # fmt: skip
def test_misspelt_fields_that_a_model_would_swallow_are_refused(tiny, tiny_inputs, wrong, right) -> None:
    configs = {"modality_ids": PILLConfig(r=3, token_ids={"image": [90]}), "expert_ids": MoAConfig(num_experts=2, r=3)}
    config = configs.get(right, MixDAConfig(**MIXDA))
    model, inputs = adapt(tiny("llama"), config), tiny_inputs("llama")
    expected = model(**inputs).logits
    for call in (model, model.get_base_model()):
        with pytest.raises(ValueError, match=rf"{wrong} is no argument of the model.*Did you mean '{right}'"):
            call(**inputs, **{wrong: torch.zeros(2, dtype=torch.long)})
        # What others pass to models with **kwargs is let be, also where it is like a field.
        others = {"token_type_ids": None, "num_items_in_batch": 3, "output_router_logits": None}
        assert torch.equal(call(**inputs, **others).logits, expected)
    assert context_of(model).running is None


def test_fields_are_taken_off_the_forward_of_the_base(tiny, tiny_inputs) -> None:
    base = tiny("bert")
    model = adapt(base, MixDAConfig(**MIXDA))
    seen: list[dict] = []
    base.bert.register_forward_pre_hook(lambda m, a, k: seen.append(k), with_kwargs=True)
    model(**tiny_inputs("bert"), domain_ids=torch.tensor([0, 1]), prompt_mask=torch.ones(2, 7))
    assert seen[0].keys() >= {"attention_mask"}
    assert not {"domain_ids", "prompt_mask"} & seen[0].keys()


@torch.no_grad()
@pytest.mark.parametrize(("kind", "backbone"), [("bert", "bert"), ("llama", "model"), ("gpt2", "transformer")])
def test_model_called_without_its_head_reads_its_own_arguments(tiny, tiny_inputs, kind, backbone) -> None:
    """Not those of the forward before."""
    granularity = "sequence" if kind == "bert" else "causal_prefix"
    config = MixDAConfig(**MIXDA, gate_granularity=granularity)
    model = adapt(tiny(kind), config, second=copy.deepcopy(config))
    part = getattr(model.get_base_model(), backbone)
    inputs, other = (tiny_inputs(kind, padding=side) for side in ("right", "left"))
    expected = part(**inputs).last_hidden_state
    assert torch.equal(context_of(model).record.attention_mask, inputs["attention_mask"].bool())
    head_runs = model(**inputs, output_hidden_states=True).hidden_states[-1]
    torch.testing.assert_close(expected, head_runs, **CLOSE)
    model(**other, adapter_names=["second", "__base__"])
    mask = {"attention_mask": inputs["attention_mask"]}
    assert torch.equal(part(**inputs).last_hidden_state, expected)
    assert torch.equal(part(inputs["input_ids"], **mask).last_hidden_state, expected)
    ids = torch.tensor([0, 1])
    with context_of(model).pin(domain_ids=ids):
        pinned = part(**inputs).last_hidden_state
    assert torch.equal(pinned, model(**inputs, domain_ids=ids, output_hidden_states=True).hidden_states[-1])


def test_rows_repeat_fields_for_tokens_and_beams() -> None:
    context = ForwardContext()
    context.record.values.update(domain_ids=[3, 5])
    for batch, copies, count, expected in (
        (2, 1, 2, [3, 5]),
        (2, 1, 6, [3, 3, 3, 5, 5, 5]),  # tokens
        (4, 2, 4, [3, 3, 5, 5]),  # beams
        (4, 2, 8, [3, 3, 3, 3, 5, 5, 5, 5]),
        (0, 1, 2, [3, 5]),  # nothing is known of the forward
    ):
        context.record.streams[""] = Stream(batch, copies=copies)
        assert context.rows("domain_ids", count).tolist() == expected
    assert context.rows("other", 6) is None
    for batch, copies, count, message in (
        (4, 1, 4, "2 and 4"),
        (2, 1, 5, "2 and 2"),
        (2, 2, 2, "2 and 1"),
        (0, 1, 4, "2 and 4"),
    ):
        context.record.streams[""] = Stream(batch, copies=copies)
        with pytest.raises(ValueError, match=rf"Length of `domain_ids`.*{message}"):
            context.rows("domain_ids", count)


def test_flattened_tokens_become_sequences_again_or_an_error() -> None:
    context = ForwardContext()
    context.record.streams[""] = Stream(batch=2, length=3)
    tokens = torch.randn(2, 3, 4)
    assert context.as_sequences(tokens) is tokens
    assert torch.equal(context.as_sequences(tokens.flatten(0, 1)), tokens)
    with pytest.raises(ValueError, match=r"B=2, got \(5, 4\)"):
        context.as_sequences(torch.randn(5, 4))
    assert context.stream("encoder").batch == 2  # the only one there is


# --- losses ------------------------------------------------------------------------------------------------------


class Root(nn.Module):
    """A model whose output is a tensor, a tuple or a dictionary."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.linear, self.form = nn.Linear(3, 3), form

    def forward(self, x: Tensor) -> Any:
        y = self.linear(x)
        return {"tensor": y, "tuple": (x, y), "dict": {"other": x, "logits": y}, "none": None}[self.form]


@pytest.mark.parametrize("form", ["tensor", "tuple", "dict"])
def test_losses_join_outputs_of_any_form(form) -> None:
    root = Root(form).train()
    extra = lambda: root.linear.weight.square().sum()  # noqa: E731
    ForwardContext.of(root).objectives.append(Spy(after=lambda c, m, o: c.add_loss("size", extra(), 0.5)))
    x = torch.randn(2, 3)
    output = root(x)
    y = {"tensor": lambda: output, "tuple": lambda: output[1], "dict": lambda: output["logits"]}[form]()
    torch.testing.assert_close(y, root.linear(x))
    y.mean().backward()
    got = root.linear.weight.grad.clone()
    root.zero_grad()
    (root.linear(x).mean() + 0.5 * extra()).backward()
    torch.testing.assert_close(got, root.linear.weight.grad)
    with torch.no_grad():  # a reference pass in training mode has no gradient to carry
        root(x)


def test_forward_that_returns_nothing_is_let_be() -> None:
    root = Root("none").train()
    ForwardContext.of(root)
    assert root(torch.randn(2, 3)) is None


def test_objective_may_replace_and_weigh_the_main_loss(tiny, tiny_inputs) -> None:
    model = adapt(tiny("llama"), BottleneckConfig(r=3)).train()
    context, inputs = context_of(model), tiny_inputs("llama", labels="tokens")
    plain = model(**inputs)
    context.objectives.append(Spy(after=lambda c, m, o: (c.scale_loss(0.5), c.add_loss("more", torch.tensor(2.0), 3))))
    torch.testing.assert_close(model(**inputs).loss, plain.loss * 0.5 + 6)
    context.objectives.append(Spy(after=lambda c, m, o: c.set_loss(o.logits.mean())))
    torch.testing.assert_close(model(**inputs).loss, plain.logits.mean() * 0.5 + 6)
    inputs.pop("labels")
    torch.testing.assert_close(model(**inputs).loss, plain.logits.mean() * 0.5 + 6)
    context.objectives.pop()
    with pytest.raises(ValueError, match="no loss to weigh"):
        model(**inputs)


def test_losses_are_logged_by_name_and_late_ones_ignored() -> None:
    context = ForwardContext()
    context.add_loss("late", torch.tensor(1.0))  # no forward is open: a layer is merely run again
    assert not context.record.losses
    assert not context.loss_log
    context.enter(Record(training=True, grad=False, open=True))  # a reference pass in training mode
    context.add_loss("early", torch.tensor(1.0))
    assert not context.loss_log
    context.enter(Record(training=True, grad=True, open=True))
    context.add_loss("balance", torch.tensor(2.0), 0.5)
    context.add_loss("balance", torch.tensor(4.0), 0.25)
    assert context.record.losses["balance"] == 2
    assert context.loss_log["balance"] == (6.0, 2)  # before weighing
    context.enter(Record(training=True, grad=True, open=True))
    with torch.no_grad(), pytest.raises(ValueError, match=r"'z'.*reentrant"):
        context.add_loss("z", torch.tensor(1.0))


# --- the compiler ------------------------------------------------------------------------------------------------


def compiled(model: nn.Module) -> tuple[Any, CompileCounterWithBackend]:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    return torch.compile(model, fullgraph=True, backend=counter), counter


def test_values_of_tensors_change_without_compiling_again(tiny, tiny_inputs) -> None:
    config = MixDAConfig(**{**MIXDA, "domain_layers": [0]})
    model = adapt(tiny("llama", num_hidden_layers=1), config).requires_grad_(False)
    context = context_of(model)
    fast, counter = compiled(model)
    for seed, padding in ((0, None), (1, "left"), (2, "left")):
        inputs = tiny_inputs("llama", batch=3, seed=seed, padding=padding)
        for ids in ([0, 1, -1], [1, 1, 0]):
            extra = {"domain_ids": torch.tensor(ids), "use_cache": False}
            torch.testing.assert_close(fast(**inputs, **extra).logits, model(**inputs, **extra).logits, **CLOSE)
    assert counter.frame_count == 1
    # Pinned, they are another way into the graph: compiled once, whatever their values.
    inputs = tiny_inputs("llama", batch=3)
    for ids in ([0, 1, -1], [1, 1, 0], [0, 0, 0]):
        with context.pin(domain_ids=torch.tensor(ids)):
            torch.testing.assert_close(
                fast(**inputs, use_cache=False).logits, model(**inputs, use_cache=False).logits, **CLOSE
            )
    assert counter.frame_count == 2


@torch.no_grad()
@pytest.mark.parametrize("granularity", ["causal_prefix", "request"])
def test_compiled_steps_of_a_static_cache_are_one_graph(tiny, tiny_inputs, granularity) -> None:
    config = MixDAConfig(**{**MIXDA, "domain_layers": [0]}, gate_granularity=granularity)
    model = adapt(tiny("llama", num_hidden_layers=1), config)
    ids = tiny_inputs("llama", batch=2, length=8)["input_ids"]
    cache = StaticCache(config=model.config, max_cache_len=8)
    model(input_ids=ids[:, :6], attention_mask=torch.ones(2, 6), past_key_values=cache)
    fast, _ = compiled(model.get_base_model())
    steps = [
        fast(input_ids=ids[:, t : t + 1], attention_mask=torch.ones(2, t + 1), past_key_values=cache).logits
        for t in (6, 7)
    ]
    prompt = (torch.arange(8) < 6).expand(2, -1)
    expected = model(input_ids=ids, attention_mask=torch.ones(2, 8), prompt_mask=prompt, use_cache=False).logits
    torch.testing.assert_close(torch.cat(steps, 1), expected[:, 6:], **CLOSE)


@pytest.mark.parametrize("order", ["adapters first", "compiled first", "run first"])
def test_hooks_count_whenever_the_model_was_compiled(tiny, tiny_inputs, order) -> None:
    base = tiny("llama", num_hidden_layers=1).requires_grad_(False)
    inputs = {**tiny_inputs("llama"), "use_cache": False}
    frozen = base(**inputs).logits
    if order == "adapters first":
        adapt(base, BottleneckConfig(r=3))
        fast, _ = compiled(base)
    else:
        fast, _ = compiled(base)
        if order == "run first":
            assert torch.equal(fast(**inputs).logits, frozen)
        adapt(base, BottleneckConfig(r=3))
    adapted = base(**inputs).logits
    assert (adapted - frozen).abs().max() > 1e-2
    torch.testing.assert_close(fast(**inputs).logits, adapted, **CLOSE)


# --- what a forward reads ----------------------------------------------------------------------------------------

KEPT = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]])  # (B, T), left padding
IDS = torch.ones(2, 4, dtype=torch.long)


def four_dimensional(kept: Tensor, queries: int, columns: int, additive: bool) -> Tensor:
    """(B, 1, queries, columns) causal mask of the last `queries` of the tokens in kept (B, S)."""
    past = kept.shape[1] - queries
    position = torch.arange(columns)
    allowed = position <= torch.arange(past, kept.shape[1]).unsqueeze(1)
    real = torch.nn.functional.pad(kept.bool(), (0, columns - kept.shape[1]))
    mask = allowed & real[:, None, None, :]
    return torch.where(mask, 0.0, torch.finfo(torch.float32).min) if additive else mask


def filled(kind: str, tokens: int, tiny) -> Any:
    if kind == "none" or tokens == 0:
        return None
    model = tiny("llama")
    cache = StaticCache(config=model.config, max_cache_len=8) if kind == "static" else DynamicCache()
    model(input_ids=torch.ones(2, tokens, dtype=torch.long), past_key_values=cache)
    return cache


@pytest.mark.parametrize("cache", ["none", "dynamic", "static"])
@pytest.mark.parametrize("form", ["2D", "2D current", "4D", "4D additive", "dict", "none"])
def test_mask_is_that_of_the_tokens_of_this_forward(tiny, cache, form) -> None:
    past = 0 if cache == "none" else 3
    kept = torch.tensor([[0, 0, 1, 1, 1, 1, 0], [1, 1, 1, 1, 1, 1, 1]])[:, : past + 4]
    columns = 8 if cache == "static" else past + 4
    held = filled(cache, past, tiny)
    mask = {
        "2D": lambda: kept,
        "2D current": lambda: kept[:, past:],
        "4D": lambda: four_dimensional(kept, 4, columns, additive=False),
        "4D additive": lambda: four_dimensional(kept, 4, columns, additive=True),
        "dict": lambda: {"sliding": None, "full": four_dimensional(kept, 4, columns, additive=False)},
        "none": lambda: None,
    }[form]()
    stream = read_stream({"input_ids": IDS, "attention_mask": mask, "past_key_values": held})
    assert (stream.batch, stream.length, int(stream.past), stream.cached) == (2, 4, past, past > 0)
    if form == "none":
        assert stream.mask is None
    else:
        assert torch.equal(stream.mask, kept[:, past:].bool())


def test_length_of_a_static_cache_is_that_before_the_forward(tiny) -> None:
    cache = filled("static", 3, tiny)
    stream = read_stream({"input_ids": IDS, "past_key_values": cache})
    tiny("llama")(input_ids=IDS, past_key_values=cache)
    assert int(stream.past) == 3


def test_embeddings_images_and_foreign_masks_are_read() -> None:
    stream = read_stream({"inputs_embeds": torch.randn(2, 4, 8), "attention_mask": KEPT})
    assert (stream.batch, stream.length) == (2, 4)
    assert torch.equal(stream.mask, KEPT.bool())
    stream = read_stream({"pixel_values": torch.randn(3, 3, 8, 8)})
    assert (stream.batch, stream.length, stream.mask) == (3, None, None)
    assert read_stream({}).batch == 0
    # transformers takes one row of a mask for all; a foreign mask of four dimensions is not this stream's.
    one = read_stream({"input_ids": IDS, "attention_mask": KEPT[:1]}).mask
    assert torch.equal(one, KEPT[:1].bool().expand(len(IDS), -1))
    assert read_stream({"input_ids": IDS, "attention_mask": torch.ones(2, 1, 3, 3)}).mask is None
    assert read_stream({"input_ids": IDS, "past_key_values": object()}).cache is None


@pytest.mark.parametrize("shape", [(2, 3), (2, 5), (2, 1), (3, 4), (4, 4), (4,), ()])
def test_a_mask_that_does_not_fit_the_tokens_is_refused(shape: tuple[int, ...]) -> None:
    message = rf"attention_mask of shape {re.escape(str(shape))} does not fit 2 rows of 4 tokens; give one value"
    with pytest.raises(ValueError, match=message):
        read_stream({"input_ids": torch.ones(2, 4), "attention_mask": torch.ones(shape)})


@torch.no_grad()
@pytest.mark.parametrize("width", [6, 9])
def test_a_mask_that_does_not_fit_the_cache_is_refused(width: int, tiny, tiny_inputs) -> None:
    model = adapt(tiny("llama"), MixDAConfig(**MIXDA))
    cache = model(**tiny_inputs("llama", length=5)).past_key_values
    inputs = {"input_ids": torch.full((2, 2), 7), "past_key_values": cache}
    with pytest.raises(ValueError, match=r"does not fit 2 rows of 2 tokens after 5 in the cache"):
        model(**inputs, attention_mask=torch.ones(2, width).long())
    model(**inputs, attention_mask=torch.ones(2, 7).long())


@torch.no_grad()
def test_generation_with_a_static_cache_sees_the_padding(tiny, tiny_inputs, monkeypatch) -> None:
    """Masks of four dimensions, one dictionary of them per step."""
    model = adapt(tiny("llama"), MixDAConfig(**MIXDA))
    inputs = tiny_inputs("llama", batch=3, length=5, padding="left")
    seen: list[Stream] = []
    model.get_base_model().model.layers[0].register_forward_hook(lambda *_: seen.append(context_of(model).stream()))
    settings = {"cache_implementation": "static", "disable_compile": True}
    model.generate(**inputs, max_new_tokens=3, min_new_tokens=3, do_sample=False, **settings)
    assert [s.length for s in seen] == [5, 1, 1]
    assert [int(s.past) for s in seen] == [0, 5, 6]
    assert torch.equal(seen[0].mask, inputs["attention_mask"].bool())
    assert all(s.mask is None or s.mask.all() for s in seen[1:])


@torch.no_grad()
@pytest.mark.parametrize("way", ["no task", "transformers"])
def test_generate_of_any_kind_of_model_takes_the_fields_of_the_batch(way: str, tiny, tiny_inputs) -> None:
    """PEFT and transformers hand them on to a `generate` that refuses them, where the config names no task."""
    config = MixDAConfig(**MIXDA, init_weights=False, gate_granularity="request")
    named = get_peft_model(tiny("llama"), MixDAConfig(**{**vars(config), "task_type": "CAUSAL_LM"})).eval()
    if way == "no task":
        model = get_peft_model(tiny("llama"), config).eval()
    else:
        model = tiny("llama").eval()
        model.add_adapter(config)
    own = {name.rpartition("model.layers")[2]: p for name, p in named.named_parameters()}
    for name, parameter in model.named_parameters():
        parameter.copy_(own.get(name.rpartition("model.layers")[2], parameter))
    ids = tiny_inputs("llama", batch=3)["input_ids"]
    for fields in ({}, {"domain_ids": [0, 1, -1]}, {"adapter_names": ["default", "__base__", "default"]}):
        given = {"input_ids": ids, "max_new_tokens": 4, "do_sample": False, "use_cache": False, **fields}
        assert torch.equal(model.generate(**given), named.generate(**given))
