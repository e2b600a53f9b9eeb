"""What moves with the steps of a training, inside transformers' Trainer and in a loop of one's own."""

from __future__ import annotations

import math
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from processes import run_together
from runs import arguments, rows
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback

from mixadapters import (
    BalanceBiasCallback,
    BottleneckConfig,
    ExpertSpawnCallback,
    MixDAConfig,
    MoAConfig,
    PermutationSearchCallback,
    RouterScheduleCallback,
    StageCallback,
)
from mixadapters.routers.schedules import check_schedules, value_at

TARGETS = ["q_proj", "down_proj"]


@pytest.fixture(scope="session")
def tiny(tiny: Any) -> Any:
    """Models of two layers, a first and a last one, where a test asks for no more."""
    return partial(tiny, layers=2)


def moa(base: nn.Module, **fields: Any) -> nn.Module:
    return get_peft_model(base, MoAConfig(**{"num_experts": 4, "r": 2, "target_modules": TARGETS, **fields}))


def routers(model: nn.Module) -> list[Any]:
    return list(model.base_model.routers_of("default"))


class Seen(TrainerCallback):
    """Notes something of the model in each training step."""

    def __init__(self, look: Any) -> None:
        self.look, self.values = look, []

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        self.values.append(self.look(model))


# --- schedules ----------------------------------------------------------------------------------------------------


def test_values_between_points_are_linear_and_constant_outside() -> None:
    points = [[0.25, 2.0], [0.5, 1.0], [1.0, 0.5]]
    progress = [0, 0.25, 0.375, 0.5, 0.75, 1]
    assert [value_at("temperature", points, p) for p in progress] == [2.0, 2.0, 1.5, 1.0, 0.75, 0.5]


def test_two_points_of_one_progress_are_a_jump() -> None:
    """As AdaMoE's coefficient: 0.02 in the first half, 1e-4 in the second."""
    points = [[0, 0.02], [0.5, 0.02], [0.5, 1e-4]]
    assert [value_at("balance_coef", points, p) for p in (0, 0.49, 0.5, 1)] == [0.02, 0.02, 1e-4, 1e-4]


def test_options_that_are_whole_numbers_are_rounded() -> None:
    values = [value_at("k", [[0, 8], [1, 2]], p / 6) for p in range(7)]
    assert values == [8, 7, 6, 5, 4, 3, 2]
    assert all(type(value) is int for value in values)
    assert type(value_at("k", [[0, 8], [1, 2]], 0.3)) is int


@pytest.mark.parametrize(
    ("schedules", "message"),
    [
        ([[0, 1]], "must be a dict"),
        ({"temperature": []}, r"schedules\['temperature'\]=\[\] must be a list of \[progress, value\]"),
        ({"temperature": [[0, 1, 2]]}, "must be a list of"),
        ({"temperature": [[0, math.nan]]}, "both finite"),
        ({"temperature": [[0, True]]}, "both finite"),
        ({"temperature": [[-0.1, 1.0]]}, r"progress of its points is \[-0.1\]"),
        ({"temperature": [[0, 1.0], [1.5, 2.0]]}, "must rise, from 0 to 1"),
        ({"temperature": [[0.5, 1.0], [0.2, 2.0]]}, "must rise"),
        ({"temperature": [[0, 1.0], [1, 0.0]]}, "temperature=0.0 must be a finite number, above 0"),
        ({"k": [[0, 2.5]]}, "k=2.5 must be an integer, at least 1"),
        ({"temprature": [[0, 1.0]]}, r"no option 'temprature' that may change.*Did you mean 'temperature'"),
        ({"hidden": [[0, 1.0]]}, "no option 'hidden' that may change"),
    ],
)
def test_what_is_no_schedule_is_refused_when_it_is_made(schedules: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_schedules(schedules, ("temperature", "k"))
    if "may change" not in message:  # of which router is not known yet
        with pytest.raises(ValueError, match=message):
            RouterScheduleCallback(schedules)
    if isinstance(schedules, dict):
        with pytest.raises(ValueError, match=r"schedules|temperature|k=2.5"):
            MoAConfig(schedules=schedules)


def test_a_value_that_no_router_takes_is_refused_before_the_run(tiny: Any, tmp_path: Path) -> None:
    model = moa(tiny("llama"))
    for schedules, message in (
        ({"k": [[0, 4], [1, 9]]}, r"schedules\['k'\]: k=9 is more than the 4 arms"),
        ({"bias_update_rate": [[0, 0.1]]}, "made without a bias"),
        ({"max_experts": [[0, 2]]}, "no option 'max_experts'"),
    ):
        with pytest.raises(ValueError, match=message):
            Trainer(model=model, args=arguments(tmp_path), callbacks=[RouterScheduleCallback(schedules)])
        assert model.peft_config["default"].schedules == {}
    with pytest.raises(ValueError, match="k=9 is more than the 4 arms"):
        moa(tiny("llama"), schedules={"k": [[0, 9]]})
    learned = moa(tiny("llama"), router={"kind": "top_k", "activation": "gelu", "learnable_temperature": True})
    with pytest.raises(ValueError, match="learnable_temperature=True trains it"):
        learned.base_model.set_schedules({"temperature": [[0, 2.0]]})


def test_layers_with_fewer_experts_choose_among_those_they_have(tiny: Any) -> None:
    model = moa(tiny("llama", layers=3), num_experts={"0-1": 2, "2": 4}, schedules={"k": [[0, 4], [1, 1]]})
    for done, chosen in ((0.0, {2, 4}), (0.4, {2, 3}), (1.0, {1})):
        model.base_model.set_progress(done)
        assert {router.k for router in routers(model)} == chosen


@pytest.mark.parametrize("callback", ["schedule", "stage"])
@pytest.mark.parametrize("given", ["config", "callback"])
def test_options_follow_the_progress_of_the_run(callback: str, given: str, tiny: Any, tmp_path: Path) -> None:
    schedules = {"temperature": [[0, 2.0], [0.5, 0.5]], "k": [[0, 4], [1, 1]], "balance_coef": [[0.5, 0.1], [0.5, 0]]}
    model = moa(tiny("llama"), **({"schedules": schedules} if given == "config" else {}))
    seen = Seen(lambda m: [(r.temperature, r.k, r.balance_coef) for r in routers(m)])
    callbacks: list[Any] = [RouterScheduleCallback(schedules if given == "callback" else None)]
    if callback == "stage":
        callbacks = [*(callbacks if given == "callback" else []), StageCallback("all")]
    Trainer(model=model, args=arguments(tmp_path), train_dataset=rows(), callbacks=[*callbacks, seen]).train()
    assert all(len(set(step)) == 1 for step in seen.values)
    steps = [step[0] for step in seen.values]
    assert [t for t, _, _ in steps] == pytest.approx([2.0, 1.5, 1.0, 0.5, 0.5, 0.5])
    assert [k for _, k, _ in steps] == [4, 4, 3, 2, 2, 2]  # 3.5 and 2.5 are rounded to even numbers
    assert [b for _, _, b in steps] == [0.1, 0.1, 0.1, 0, 0, 0]


def test_routers_with_a_schedule_of_their_own_are_told(tiny: Any, tmp_path: Path) -> None:
    model = moa(tiny("llama"), router={"kind": "dense_to_sparse", "duration": 0.5})
    seen = Seen(lambda m: routers(m)[0].temperature)
    callbacks = [RouterScheduleCallback(), seen]
    Trainer(model=model, args=arguments(tmp_path), train_dataset=rows(), callbacks=callbacks).train()
    assert seen.values == pytest.approx([2.0, 2 - 1.7 / 3, 2 - 3.4 / 3, 0.3, 0.3, 0.3])


def test_a_schedule_of_what_a_recurrent_router_is_based_on(tiny: Any, tmp_path: Path) -> None:
    router = {"kind": "recurrent", "width": 4, "base": {"kind": "top_k", "k": 3}}
    model = moa(tiny("llama"), router=router, num_experts_per_tok=2, schedules={"k": [[0, 3], [1, 1]]})
    model.base_model.set_progress(1.0)
    assert {r.base.k for r in routers(model)} == {1}
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny("llama"), tmp_path)
    assert {r.base.k for r in routers(again)} == {1}
    with pytest.raises(ValueError, match="no option 'p' that may change"):
        model.base_model.set_schedules({"p": [[0, 0.5]]})


@pytest.mark.parametrize("done", [0.0, 0.5, 1.0])
def test_a_checkpoint_routes_as_the_model_did_when_it_was_saved(
    done: float, tiny: Any, tiny_inputs: Any, tmp_path: Path
) -> None:
    schedules = {"temperature": [[0, 3.0], [1, 0.2]], "k": [[0, 4], [1, 1]], "jitter": [[0, 0.5], [1, 0]]}
    config = MoAConfig(
        num_experts=4, r=2, target_modules=TARGETS, init_weights=False, schedules=schedules, router_temperature=2.0,
        num_experts_per_tok=3, router_init_range=1.0,
    )  # fmt: skip
    model = get_peft_model(tiny("llama"), config)
    model.base_model.set_progress(done)
    model.save_pretrained(tmp_path)
    inputs = tiny_inputs("llama")
    with torch.no_grad():
        expected = model.eval()(**inputs).logits
        again = PeftModel.from_pretrained(tiny("llama"), tmp_path).eval()
        assert torch.equal(again(**inputs).logits, expected)
        model.base_model.set_progress(0.25)  # and into a model that is elsewhere by now
        assert not torch.equal(model(**inputs).logits, expected)
        model.load_adapter(tmp_path, "default")
        assert torch.equal(model(**inputs).logits, expected)
    assert [r.k for r in routers(model)] == [r.k for r in routers(again)]
    # The config object is as it was given when another model is made with it.
    other = get_peft_model(tiny("llama"), config)
    assert {(r.temperature, r.k) for r in routers(other)} == {(2.0, 3)}


def test_an_option_without_a_schedule_still_has_to_agree(tiny: Any, tmp_path: Path) -> None:
    moa(tiny("llama"), router_temperature=2.0, schedules={"k": [[0, 2]]}).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"router_temperature=2.0 in the file, 1.0 here"):
        moa(tiny("llama"), schedules={"k": [[0, 2]]}).load_adapter(tmp_path, "default")
    with pytest.raises(ValueError, match="num_experts_per_tok=2 in the file"):
        moa(tiny("llama"), num_experts_per_tok=3).load_adapter(tmp_path, "default")


def test_a_schedule_where_nothing_follows_one_is_refused(tiny: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'default' has no schedule to follow"):
        Trainer(model=moa(tiny("llama")), args=arguments(tmp_path), callbacks=[RouterScheduleCallback()])
    other = get_peft_model(tiny("llama"), MixDAConfig(domains=["a", "b"], r=2))
    with pytest.raises(ValueError, match="MIXDA adapter, whose config keeps no schedules"):
        Trainer(model=other, args=arguments(tmp_path), callbacks=[RouterScheduleCallback({"temperature": [[0, 1]]})])
    with pytest.raises(ValueError, match=r"done=1.5 must be a number from 0 to 1"):
        other.base_model.set_progress(1.5)
    with pytest.raises(ValueError, match="adapter_name='b' is unknown"):
        other.base_model.set_progress(0.5, "b")


# --- biases -------------------------------------------------------------------------------------------------------


def balanced(base: nn.Module, rate: float = 0.25, **fields: Any) -> nn.Module:
    fields = {"router_bias_update_rate": rate, "router_init_range": 0.5, "num_experts_per_tok": 1, **fields}
    return moa(base, **fields)


@pytest.mark.parametrize("callback", [lambda: StageCallback("all"), BalanceBiasCallback])
@pytest.mark.parametrize("accumulated", [1, 3])
def test_biases_move_once_in_each_step_of_the_optimizer(
    accumulated: int, callback: Any, tiny: Any, tmp_path: Path
) -> None:
    """By the sign of mean load - load, of all micro-batches of the step."""
    model = balanced(tiny("llama"))
    expected = [torch.zeros(4) for _ in routers(model)]
    counted: list[Tensor] = []

    class Counts(TrainerCallback):
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            counts = [router.balancing.counts.clone() for router in routers(model)]
            counted.extend(counts)
            for bias, count in zip(expected, counts, strict=True):
                bias += 0.25 * (count.float().mean() - count).sign()

    options = arguments(tmp_path, max_steps=3, gradient_accumulation_steps=accumulated)
    Trainer(model=model, args=options, train_dataset=rows(), callbacks=[Counts(), callback()]).train()
    assert {int(count.sum()) for count in counted} == {4 * 6 * accumulated}
    for router, bias in zip(routers(model), expected, strict=True):
        assert torch.equal(router.balancing.bias, bias)
        assert bool(bias.any())
        assert not bool(router.balancing.counts.any())


BIASED = {"router_bias_update_rate": 0.1, "schedules": {"balance_coef": [[0, 0.1], [0.5, 0]]}}
TREE = {"router": {"kind": "tree", "learn_permutation": True}}


@pytest.mark.parametrize(
    ("make", "fields"),
    [
        (BalanceBiasCallback, BIASED),
        (RouterScheduleCallback, BIASED),
        (partial(StageCallback, "all"), BIASED),
        (PermutationSearchCallback, TREE),
        (partial(ExpertSpawnCallback, 1, 2), {"num_experts": 1}),
    ],
    ids=["bias", "schedules", "stage", "permutation", "spawn"],
)
def test_a_callback_means_what_is_active_when_each_trainer_is_made_with_it(
    make: Any, fields: dict[str, Any], tiny: Any, tmp_path: Path
) -> None:
    """In one model two adapters are trained one after the other, with the same callback."""
    model = moa(tiny("llama", num_hidden_layers=1), **fields)
    model.add_adapter("other", model.peft_config["default"])
    callback, named = make(), make(adapter_name="default")
    for active in ("default", "other", "default"):
        model.set_adapter(active)
        Trainer(model=model, args=arguments(tmp_path), callbacks=[callback, named])
        assert callback.adapter_name == active
        assert named.adapter_name == "default"


def test_a_bias_that_nobody_has_is_refused(tiny: Any, tmp_path: Path) -> None:
    for model in (moa(tiny("llama")), get_peft_model(tiny("llama"), BottleneckConfig(r=2))):
        with pytest.raises(ValueError, match="no router of adapter 'default' balances by a bias: set router_bias"):
            Trainer(model=model, args=arguments(tmp_path), callbacks=[BalanceBiasCallback()])


WORKER = """
import os, sys, tempfile
import torch
from peft import get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments
from mixadapters import BalanceBiasCallback, MoAConfig

torch.set_num_threads(1)
folder, rank = sys.argv[1], int(os.environ["RANK"])
torch.manual_seed(0)
base = LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                                    num_attention_heads=4))
options = {"router_bias_update_rate": 0.25, "router_init_range": 0.5, "num_experts_per_tok": 1}
model = get_peft_model(base, MoAConfig(num_experts=4, r=2, target_modules=["q_proj"], **options))
ids = torch.randint(5, 64, (16, 6), generator=torch.Generator().manual_seed(1))
rows = [{"input_ids": i, "attention_mask": torch.ones_like(i), "labels": i.clone()} for i in ids]
counts, biases = [], []

class Look(TrainerCallback):
    def on_pre_optimizer_step(self, *_, **__):
        counts.append([r.balancing.counts.clone() for r in model.base_model.routers_of("default")])
    def on_step_end(self, *_, **__):
        biases.append([r.balancing.bias.clone() for r in model.base_model.routers_of("default")])

arguments = TrainingArguments(
    tempfile.mkdtemp(), max_steps=2, per_device_train_batch_size=2, gradient_accumulation_steps=2, use_cpu=True,
    ddp_backend="gloo", report_to=[], save_strategy="no", disable_tqdm=True, train_sampling_strategy="sequential",
)
assert arguments.world_size == 2
Trainer(model=model, args=arguments, train_dataset=rows, callbacks=[Look(), BalanceBiasCallback()]).train()
torch.save({"counts": counts, "biases": biases}, f"{folder}/{rank}")
"""


@pytest.mark.slow
def test_biases_move_by_the_rows_of_all_processes(tmp_path: Path) -> None:
    run_together(WORKER, tmp_path)
    both = [torch.load(tmp_path / str(rank), weights_only=True) for rank in range(2)]
    biases = [torch.zeros(4) for _ in range(2)]
    alone = 0
    for step in range(2):
        for layer in range(2):
            ours, theirs = (found["counts"][step][layer] for found in both)
            assert int(ours.sum()) == int(theirs.sum()) == 2 * 2 * 6  # of two micro-batches, in each process
            count = (ours + theirs).float()
            biases[layer] += 0.25 * (count.mean() - count).sign()
            alone += not torch.equal((count.mean() - count).sign(), (ours.float().mean() - ours).sign())
            for found in both:
                assert torch.equal(found["biases"][step][layer], biases[layer])
    assert alone  # one process would have moved them otherwise


# --- permutations -------------------------------------------------------------------------------------------------


def searching(base: nn.Module, **fields: Any) -> nn.Module:
    router = {"kind": "tree", "learn_permutation": True}
    return moa(base, router=router, num_experts_per_tok=2, target_modules=["q_proj"], **fields)


def test_a_permutation_is_searched_and_then_hard(tiny: Any, tmp_path: Path) -> None:
    model = searching(tiny("llama"))
    seen = Seen(lambda m: [(r.permutation.tau, r.permutation.iterations, r.permutation.hard) for r in routers(m)])
    callbacks = [PermutationSearchCallback(0.5, tau=(1e-2, 1e-4), iterations=(5, 20)), seen]
    Trainer(model=model, args=arguments(tmp_path, max_steps=8), train_dataset=rows(), callbacks=callbacks).train()
    steps = [step[0] for step in seen.values]
    assert all(len(set(step)) == 1 for step in seen.values)
    assert [t for t, _, _ in steps] == pytest.approx([1e-2 * 10 ** (-i / 2) for i in range(4)] + [1e-4] * 4)
    assert [i for _, i, _ in steps] == [5, 7, 10, 14, 20, 20, 20, 20]
    assert [hard for _, _, hard in steps] == [False] * 4 + [True] * 4
    for router in routers(model):
        assert sorted(router.permutation.order.tolist()) == list(range(4))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fraction": 0.0}, "fraction=0.0 must be a finite number, above 0, less than 1"),
        ({"fraction": math.nan}, "fraction=nan"),
        ({"tau": (1e-3, 0.0)}, "tau="),
        ({"tau": (1e-3,)}, "tau="),
        ({"tau": 1e-3}, "tau=0.001 must be two"),
        ({"iterations": 5}, "iterations=5 must be two"),
        ({"iterations": (20, 0)}, "iterations="),
        ({"iterations": (20.0, 30)}, "iterations="),
    ],
)
def test_numbers_of_a_search_are_checked_when_it_is_made(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PermutationSearchCallback(**options)


def test_a_search_where_no_router_learns_a_permutation_is_refused(tiny: Any, tmp_path: Path) -> None:
    model = moa(tiny("llama"), router={"kind": "tree"}, num_experts_per_tok=2)
    with pytest.raises(ValueError, match="no router of adapter 'default' learns a permutation"):
        Trainer(model=model, args=arguments(tmp_path), callbacks=[PermutationSearchCallback()])


# --- nobody trains without them unknowingly -----------------------------------------------------------------------

WAITING = {
    "update_biases": ({"router_bias_update_rate": 0.1}, "a bias that balances .* add BalanceBiasCallback"),
    "set_progress": ({"schedules": {"k": [[0, 2], [1, 1]]}}, "options that follow .* add RouterScheduleCallback"),
    "search_permutation": (
        {"router": {"kind": "tree", "learn_permutation": True}}, "a permutation .* add PermutationSearchCallback",
    ),
}  # fmt: skip


@pytest.mark.parametrize("verb", WAITING)
def test_a_loop_that_moves_nothing_is_warned_once_a_run(verb: str, tiny: Any, tiny_inputs: Any) -> None:
    fields, message = WAITING[verb]
    model = moa(tiny("llama"), **fields).train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    inputs = tiny_inputs("llama", labels="tokens")

    def step() -> list[str]:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(2):
                model(**inputs).loss.backward()
            optimizer.step()
        return [str(w.message) for w in caught if "nobody moves it" in str(w.message)]

    assert step() == []  # nothing has been left out yet
    with pytest.warns(UserWarning, match=rf"adapter 'default' has {message} to the Trainer; in a loop .*{verb}\("):
        model(**inputs)
    assert step() == []
    model.base_model.context.steps.ended("default")
    assert step() == []
    call = getattr(model.base_model, verb)
    call(*(() if verb == "update_biases" else (0.5,)))
    assert step() == []


def test_a_trainer_without_a_callback_is_warned_and_one_with_a_stage_is_not(tiny: Any, tmp_path: Path) -> None:
    model = balanced(tiny("llama"), schedules={"temperature": [[0, 1.0], [1, 0.5]]})
    plain = Trainer(model=model, args=arguments(tmp_path, max_steps=2), train_dataset=rows())
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*nobody moves it")
        staged = Trainer(
            model=model, args=arguments(tmp_path, max_steps=2), train_dataset=rows(), callbacks=[StageCallback("all")]
        )
        staged.train()
    with pytest.warns(UserWarning, match="nobody moves it") as caught:
        plain.train()
    assert sum("nobody moves it" in str(w.message) for w in caught) == 2  # biases and options, once each


# --- resumed ------------------------------------------------------------------------------------------------------

RESUMED: dict[str, tuple[dict[str, Any], Any]] = {
    "everything": (
        {
            "router_bias_update_rate": 0.05,
            "router_jitter_noise": 0.1,
            "schedules": {"temperature": [[0, 2.0], [1, 0.5]], "k": [[0, 4], [0.5, 1]], "jitter": [[0, 0.2], [1, 0]]},
        },
        lambda: [StageCallback("all")],
    ),
    "by callbacks": (
        {"router_bias_update_rate": 0.05},
        lambda: [RouterScheduleCallback({"balance_coef": [[0, 0.1], [0.5, 0]]}), BalanceBiasCallback()],
    ),
    "a temperature that falls": ({"router": {"kind": "dense_to_sparse"}}, lambda: [RouterScheduleCallback()]),
    "a search that goes on": (
        {"router": {"kind": "tree", "learn_permutation": True}},
        lambda: [PermutationSearchCallback(0.8, tau=(1e-2, 1e-3), iterations=(3, 9))],
    ),
    "a search that has ended": (
        {"router": {"kind": "tree", "learn_permutation": True}},
        lambda: [PermutationSearchCallback(0.3, tau=(1e-2, 1e-3), iterations=(3, 9))],
    ),
}


@pytest.mark.parametrize("case", RESUMED)
def test_a_resumed_run_is_the_uninterrupted_one_bit_by_bit(case: str, tiny: Any, tmp_path: Path) -> None:
    fields, callbacks = RESUMED[case]

    def run(folder: Path, resume: str | None) -> tuple[dict[str, Tensor], dict[str, Any]]:
        torch.manual_seed(0 if resume is None else 1)
        model = moa(tiny("llama"), **fields)
        trainer = Trainer(
            model=model, args=arguments(folder, save_strategy="steps", save_steps=3), train_dataset=rows(),
            callbacks=callbacks(),
        )  # fmt: skip
        trainer.train(resume_from_checkpoint=resume)
        return {k: v.clone() for k, v in model.state_dict().items()}, model.peft_config["default"].to_dict()

    full, config = run(tmp_path / "full", None)
    resumed, again = run(tmp_path / "resumed", str(tmp_path / "full" / "checkpoint-3"))
    assert full.keys() == resumed.keys()
    assert [name for name, value in full.items() if not torch.equal(resumed[name], value)] == []
    assert {k: v for k, v in again.items() if k != "digest"} == {k: v for k, v in config.items() if k != "digest"}
    if "router_bias_update_rate" in fields:
        assert any(bool(value.any()) for name, value in full.items() if name.endswith("balancing.bias"))
