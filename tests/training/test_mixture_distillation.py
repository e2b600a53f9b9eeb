"""A mixture into one adapter: for good, and for a domain at a time."""

from __future__ import annotations

from contextlib import suppress
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from mixadapters import BottleneckConfig, MixDAConfig, MoAConfig
from mixadapters.kernels import adapter_backend
from mixadapters.training.mixture_distillation import (
    Episode,
    MeanAggregator,
    MixtureDistiller,
    MixtureTeacher,
    TransformerAggregator,
    distil_mixture,
    text_states,
    token_states,
)


@pytest.fixture(scope="module")
def teacher(tiny) -> MixtureTeacher:
    config = MoAConfig(
        experts=["law", "code", "math"], r=4, target_modules=["down_proj"], init_weights=False, train_experts=True
    )
    model = get_peft_model(tiny("llama", num_hidden_layers=2), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "moa_" in name:
                parameter.normal_(std=0.2)
    return MixtureTeacher(model.eval())


@pytest.fixture
def student(tiny):
    config = BottleneckConfig(r=8, init_weights=False, task_type="CAUSAL_LM")
    return get_peft_model(tiny("llama", num_hidden_layers=2), config).eval()


@pytest.fixture
def batch(tiny_inputs):
    return tiny_inputs("llama", batch=3, length=8, padding="left")


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


# --- the teacher ------------------------------------------------------------------------------------------------


def test_each_expert_alone_is_the_model_with_every_row_on_it(teacher, batch) -> None:
    found = teacher.experts(batch)
    assert found.shape == (int(batch["attention_mask"].sum()), 3, 32)
    for number in range(3):
        with teacher.tuner.pin_routes({"ffn/*": torch.full((3,), number)}), torch.no_grad():
            pinned = teacher.model(**batch, output_hidden_states=True).hidden_states[-1]
        assert torch.equal(found[:, number], pinned[batch["attention_mask"].bool()])
    assert not torch.equal(found[:, 0], found[:, 1])
    assert not found.requires_grad


def test_the_mixture_as_it_is_is_its_own_forward(teacher, batch) -> None:
    with torch.no_grad():
        states = teacher.model(**batch, output_hidden_states=True).hidden_states[-1]
    assert torch.equal(teacher.routed(batch), states[batch["attention_mask"].bool()])
    mean = text_states(teacher.model, batch)
    assert torch.allclose(mean[2], states[2][batch["attention_mask"][2].bool()].mean(0), atol=1e-6)
    whole = {"input_ids": batch["input_ids"]}
    assert text_states(teacher.model, whole).shape == (3, 32)
    assert token_states(teacher.model, whole).shape == (24, 32)


def test_a_model_without_a_mixture_is_no_teacher(student, tiny) -> None:
    for model in (student, tiny("llama")):
        with pytest.raises(ValueError, match="has no mixture"):
            MixtureTeacher(model)


# --- aggregators ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [MeanAggregator(), TransformerAggregator(32, 4).eval()])
def test_an_expert_that_is_left_out_does_not_count(kind: nn.Module) -> None:
    features = torch.randn(5, 3, 32)
    changed = features.clone()
    changed[:, 1] += 1
    assert torch.equal(kind(features, 1), kind(changed, 1))
    assert not torch.allclose(kind(features), kind(changed))
    assert torch.allclose(kind(features), kind(features[:, [2, 0, 1]]), atol=1e-5)  # they are a set


def test_the_mean_of_one_expert_is_that_expert() -> None:
    features = torch.randn(5, 1, 8)
    assert torch.equal(MeanAggregator()(features), features[:, 0])


# --- adapting ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("aggregator", ["mean", "router", "transformer"])
def test_steps_bring_the_student_nearer_and_leave_it_as_it_was(teacher, student, batch, aggregator: str) -> None:
    before = state(student)
    distiller = MixtureDistiller(teacher, student, aggregator, inner_lr=0.3, steps=3, heads=4)
    parameters = distiller.adapt(batch)
    target = distiller.target(batch).detach()
    names = sorted(parameters)
    errors = [
        float((distiller._call(given, lambda m: token_states(m, batch)) - target).square().mean())
        for given in ({n: dict(student.named_parameters())[n] for n in names}, parameters)
    ]
    assert errors[1] < errors[0]
    assert all(torch.equal(before[name], tensor) for name, tensor in student.state_dict().items())
    again = distiller.adapt(batch)
    assert all(torch.equal(parameters[name], again[name]) for name in names)  # each call begins anew


def test_no_steps_are_the_student_itself(teacher, student, batch) -> None:
    distiller = MixtureDistiller(teacher, student, steps=0)
    with torch.no_grad():
        assert torch.equal(distiller.predict(batch, distiller.adapt(batch)).logits, student(**batch).logits)


def test_inside_the_block_the_student_is_adapted_and_after_it_as_before(teacher, student, batch, tiny_inputs) -> None:
    distiller = MixtureDistiller(teacher, student, inner_lr=0.3)
    other = tiny_inputs("llama", seed=5)
    with torch.no_grad():
        plain, expected = student(**other).logits, distiller.predict(other, distiller.adapt(batch)).logits
        with suppress(KeyError), distiller.adapted(batch) as model:
            assert torch.allclose(model(**other).logits, expected, atol=1e-6)
            assert not torch.allclose(expected, plain)
            raise KeyError
        assert torch.equal(student(**other).logits, plain)


def test_one_step_is_the_gradient_of_the_distance(teacher, student, batch) -> None:
    distiller = MixtureDistiller(teacher, student, inner_lr=0.5)
    parameters = distiller.adapt(batch)
    (token_states(student, batch) - teacher.experts(batch).mean(1)).square().mean().backward()
    for name, parameter in distiller.own_parameters().items():
        assert torch.allclose(parameters[name], parameter.detach() - 0.5 * parameter.grad, atol=1e-6)


class Line(nn.Module):
    """y = a x + b, whose feature is y."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = (nn.Parameter(torch.tensor(v, dtype=torch.float64)) for v in (0.7, -0.3))

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Any:
        y = torch.tanh(self.a * x) + self.b
        return SimpleNamespace(y=y, loss=None if labels is None else (y - labels).pow(4).mean())


class Weighed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor([0.2, 0.8], dtype=torch.float64))

    def forward(self, features: Tensor, left_out: int | None = None) -> Tensor:
        return (features * self.w.view(1, 2, 1)).sum(1)


def test_second_order_gradients_are_those_of_finite_differences() -> None:
    x, labels = torch.linspace(-1, 1, 5, dtype=torch.float64).view(-1, 1), torch.ones(5, 1, dtype=torch.float64)
    student, aggregator = Line(), Weighed()
    teacher = SimpleNamespace(experts=lambda batch: torch.stack([batch["x"].sin(), batch["x"] ** 2], 1))
    distiller = MixtureDistiller(
        teacher, student, aggregator, inner_lr=0.3, steps=2, features=lambda model, batch: model(**batch).y
    )

    def outer(create_graph: bool = False) -> Tensor:
        parameters = distiller.adapt({"x": x}, create_graph=create_graph)
        return distiller.predict({"x": x, "labels": labels}, parameters).loss

    outer(create_graph=True).backward()
    for parameter in (student.a, student.b, aggregator.w):
        for i in range(parameter.numel()):
            entry, found = parameter.data.view(-1), []
            for step in (1e-5, -1e-5):
                entry[i] += step
                found.append(float(outer()))
                entry[i] -= step
            expected = (found[0] - found[1]) / 2e-5
            assert float(parameter.grad.view(-1)[i]) == pytest.approx(expected, rel=1e-5, abs=1e-9)


def test_second_order_gradients_reach_through_a_model_with_an_adapter(teacher, student, batch) -> None:
    distiller = MixtureDistiller(teacher, student, TransformerAggregator(32, 4, dropout=0.0), inner_lr=0.3)
    labelled = {**batch, "labels": batch["input_ids"]}
    parameters = distiller.adapt(batch, create_graph=True, left_out=1)
    with adapter_backend("reference"), sdpa_kernel(SDPBackend.MATH):
        distiller.predict(labelled, parameters).loss.backward()
    name, weight = next((n, p) for n, p in distiller.own_parameters().items() if n.endswith("up.weight"))
    slope, found = weight.grad[0, 0], []
    assert any(p.grad is not None and p.grad.any() for p in distiller.aggregator.parameters())
    assert not any(p.grad is not None for p in teacher.model.parameters())
    for step in (1e-2, -1e-2):
        with torch.no_grad():
            weight[0, 0] += step
        found.append(float(distiller.predict(labelled, distiller.adapt(batch, left_out=1)).loss))
        with torch.no_grad():
            weight[0, 0] -= step
    assert name
    assert float(slope) == pytest.approx((found[0] - found[1]) / 2e-2, rel=0.1, abs=2e-3)


def test_meta_fit_trains_student_and_aggregator_for_what_comes_after_adapting(teacher, student, tiny_inputs) -> None:
    episodes = []
    for seed in range(2):
        query = tiny_inputs("llama", seed=seed, labels="tokens")
        episodes.append(Episode(tiny_inputs("llama", seed=seed), query, expert=seed))
    distiller = MixtureDistiller(teacher, student, "transformer", inner_lr=0.1, heads=4)
    base = {n: p.clone() for n, p in student.named_parameters() if not p.requires_grad}
    losses = distiller.meta_fit(episodes * 6, lr=1e-2)
    assert len(losses) == 12
    assert sum(losses[-2:]) < 0.9 * sum(losses[:2])
    assert all(torch.equal(base[n], p) for n, p in student.named_parameters() if not p.requires_grad)


# --- one adapter ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("aggregator", ["mean", "router"])
def test_one_adapter_learns_what_the_mixture_says(teacher, student, tiny_inputs, aggregator: str) -> None:
    batches = [tiny_inputs("llama", seed=seed, padding="right") for seed in range(4)]
    losses = distil_mixture(teacher, student, batches * 10, aggregator=aggregator, lr=5e-3)
    assert sum(losses[-4:]) < 0.6 * sum(losses[:4])


def test_the_student_may_be_a_lora_of_peft_and_the_mixture_one_of_domains(tiny, tiny_inputs) -> None:
    mixture = get_peft_model(tiny("llama", num_hidden_layers=2), MixDAConfig(domains=["a", "b"], init_weights=False))
    student = get_peft_model(tiny("llama", num_hidden_layers=2), LoraConfig(r=8, target_modules=["down_proj"]))
    batches = [tiny_inputs("llama", seed=seed) for seed in range(2)]
    losses = distil_mixture(MixtureTeacher(mixture), student, batches * 10, aggregator="mean", lr=1e-2)
    assert losses[-1] < losses[1]


def test_what_cannot_be_distilled_is_refused(teacher, student, batch, tiny) -> None:
    frozen = tiny("llama", num_hidden_layers=2).requires_grad_(False)
    alone = SimpleNamespace(experts=lambda batch: torch.zeros(3, 1, 32))
    for call, message in (
        (lambda: MixtureDistiller(teacher, student, "median"), "aggregator='median' is unknown"),
        (lambda: MixtureDistiller(teacher, student, None), "aggregator=None is unknown"),
        (lambda: MixtureDistiller(teacher, student, heads=0), "heads=0 must be"),
        (lambda: MixtureDistiller(teacher, student).meta_fit([], lr=float("nan")), "lr=nan must be"),
        (lambda: MixtureDistiller(teacher, student).meta_fit([], aggregator_lr=-1), "aggregator_lr=-1 must be"),
        (lambda: MixtureDistiller(teacher, student, inner_lr=0), "inner_lr=0 must be"),
        (lambda: MixtureDistiller(teacher, student, steps=-1), "steps=-1 must be"),
        (lambda: MixtureDistiller(teacher, frozen), "no parameter of the student requires a gradient"),
        (lambda: MixtureDistiller(teacher, student, "router").target(batch, 1), "no expert can be left out"),
        (lambda: MixtureDistiller(alone, student).target(batch, 0), "nothing would be left"),
        (lambda: TransformerAggregator(32, 5), "heads=5 does not divide"),
        (lambda: distil_mixture(teacher, student, [batch], aggregator="transformer"), "has learned nothing"),
        (lambda: distil_mixture(teacher, student, [batch], lr=-1), "lr=-1 must be"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
