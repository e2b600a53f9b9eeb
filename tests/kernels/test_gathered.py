"""Sequences that name their experts: by products that torch differentiates itself where nothing else is asked."""

from __future__ import annotations

import random

import pytest
import torch
from problems import WIDE, drawn
from torch import Tensor

from mixadapters.kernels import adapter_backend, constant, gathered, lowrank, registration

EXPERTS, RANK = 3, 2
BY_EXPERT = ("w_down", "w_up", "b_down", "b_up", "w_gate", "b_gate", "scale")


def draw(seed: int, dtype: torch.dtype = torch.float64, slots: int | None = None) -> dict:
    """Sequences, each with experts of its own, long enough for `gathered.plain` in training."""
    chance, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    slots = slots or chance.randint(1, 2)
    run = round(slots * RANK / gathered.KEPT)
    numbers = torch.randint(0, EXPERTS, (chance.randint(1, 5), slots), generator=generator)
    if slots == 1 and chance.random() < 0.4:  # in order
        numbers = torch.arange(EXPERTS).unsqueeze(1)
    given = drawn(chance, generator, numbers, run, EXPERTS, RANK, dtype)
    if chance.random() < 0.5:  # as packed weights are
        given["w_up"] = given["w_up"].t().contiguous().t()
    for name in ("base", "x"):
        if name in given and chance.random() < 0.3:  # as a part of a wider tensor
            given[name] = torch.cat([given[name], given[name]], dim=1)[:, : given[name].shape[1]]
    return given


def outcome(given: dict, backend: str) -> dict[str, Tensor]:
    """y, and the gradient of every float argument."""
    leaves = {k: v.clone().requires_grad_() for k, v in given.items() if isinstance(v, Tensor) and k != "indices"}
    with adapter_backend(backend):
        y = lowrank(**{**given, **leaves})
    gradient = torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view_as(y)
    found = torch.autograd.grad(y, list(leaves.values()), gradient, materialize_grads=True)
    return {"y": y.detach(), **dict(zip(leaves, found, strict=True))}


def by_operator(given: dict, backend: str = "gathered") -> bool:
    """Whether the operation's own function stands in the graph of a training call."""
    x = given["x"].clone().requires_grad_()
    with adapter_backend(backend):
        y = lowrank(**{**given, "x": x})  # to be kept: a graph lives no longer than its output
    names, waiting = set(), [y.grad_fn]
    while waiting:
        node = waiting.pop()
        names.add(type(node).__name__)
        waiting += [after for after, _ in node.next_functions if after is not None]
    return f"{registration._Lowrank.__name__}Backward" in names


@pytest.mark.parametrize("known", [False, True])
def test_output_and_gradients_are_those_of_the_definition(known) -> None:
    for seed in range(60):
        given = draw(seed)
        if known:
            given["indices"] = constant(given["indices"])
        assert not by_operator(given), seed
        expected, found = outcome(given, "reference"), outcome(given, "gathered")
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, msg=lambda m, at=(seed, name): f"{at}: {m}")
        with torch.no_grad(), adapter_backend("gathered"):
            assert torch.equal(lowrank(**given), found["y"]), seed


def test_a_broken_expert_touches_nothing_of_the_others() -> None:
    for seed in range(60):
        given, broken = draw(seed, torch.float32), seed % EXPERTS
        rows = (given["indices"] != broken).all(1)
        sound = outcome(given, "gathered")
        for name in [n for n in BY_EXPERT if n in given]:
            own = given[name].clone()
            by_expert = own.t() if name == "w_up" else own
            by_expert.unflatten(0, (EXPERTS, -1))[broken].fill_((torch.inf, torch.nan)[seed % 2])
            found = outcome({**given, name: own}, "gathered")
            for what in ("y", "x"):
                assert torch.equal(found[what][rows], sound[what][rows]), (seed, name, what)
            # An expert gets gradients from the rows that chose it, and those of other experts are not among them.
            others = [e for e in range(EXPERTS) if (given["indices"] == e).any(1).le(rows).all()]
            for what in [n for n in BY_EXPERT if n in given]:
                now, before = (t[what].t() if what == "w_up" else t[what] for t in (found, sound))
                now, before = (t.unflatten(0, (EXPERTS, -1))[others] for t in (now, before))
                assert torch.equal(now[before.isfinite()], before[before.isfinite()]), (seed, name, what)


def test_a_broken_row_touches_its_own_sequence_alone() -> None:
    for seed in range(20):
        given = draw(seed, torch.float32)
        rows = torch.arange(len(given["x"])) >= given["run"]
        sound = outcome(given, "gathered")
        x = given["x"].clone()
        x[0] = torch.nan
        found = outcome({**given, "x": x}, "gathered")
        assert torch.equal(found["y"][rows], sound["y"][rows])
        apart = [e for e in range(EXPERTS) if not (given["indices"][0] == e).any()]
        down, before = (of["w_down"].unflatten(0, (EXPERTS, -1))[apart] for of in (found, sound))
        assert torch.equal(down, before)


def test_gradients_of_weights_lie_as_the_weights_do() -> None:
    """That of the second factor of `bmm` does not, and would be copied."""
    rows, own = (torch.randn(3, n, 4, dtype=torch.float64, requires_grad=True) for n in (6, 2))
    of_rows, of_own = torch.autograd.grad(gathered._Mapped.apply(rows, own).sum(), (rows, own))
    assert of_rows.is_contiguous()
    assert of_own.is_contiguous()
    for wanted in ((True, True), (True, False), (False, True)):
        given = tuple(t.detach().requires_grad_(want) for t, want in zip((rows, own), wanted, strict=True))
        assert torch.autograd.gradcheck(gathered._Mapped.apply, given)
        assert torch.autograd.gradgradcheck(gathered._Mapped.apply, given)


CHANGES: dict[str, dict] = {
    "rows that choose by themselves": {"run": 1},
    "dropout": {"dropout": 0.5, "seed": torch.tensor(3)},
    "several ranks": {"ranks": (RANK - 1, RANK + 1, RANK)},
    "half precision": {},
    "no expert": {},
    "short sequences": {},
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_asks_for_more_takes_the_operation_in_training(change) -> None:
    given = draw(1, slots=1)
    assert not by_operator(given)
    new = dict(CHANGES[change])
    if change == "half precision":
        new = {k: v.bfloat16() for k, v in given.items() if isinstance(v, Tensor) and k != "indices"}
    elif change == "no expert":
        new["indices"] = given["indices"].clone()
        new["indices"][: given["run"]] = -1
    elif change == "short sequences":
        new["run"] = given["run"] // 2
    assert by_operator(given | new)


def test_short_sequences_that_name_the_experts_in_order_have_nothing_to_keep() -> None:
    given = draw(1, slots=1)
    rows = 2 * EXPERTS
    short = given | {"run": 2} | {k: given[k][:rows] for k in ("x", "base", "base_weight", "weights") if k in given}
    in_order = short | {"indices": torch.arange(EXPERTS).repeat_interleave(2).unsqueeze(1)}
    assert not by_operator(in_order)
    half = {k: v.bfloat16() for k, v in in_order.items() if isinstance(v, Tensor) and k != "indices"}
    assert by_operator(in_order | half)  # whose gradients are not added up in float32
    assert by_operator(short | {"indices": torch.arange(EXPERTS).flip(0).repeat_interleave(2).unsqueeze(1)})


@pytest.mark.parametrize("backend", ["segments", "dense"])
def test_another_backend_that_is_asked_for_runs(backend) -> None:
    assert by_operator(draw(1, slots=1), backend)


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("number", [EXPERTS, -2])
def test_a_number_of_no_expert_is_refused(number, train) -> None:
    given = draw(1, slots=1)
    given["indices"] = given["indices"].clone()
    given["indices"][: given["run"]] = number
    given["x"].requires_grad_(train)
    with adapter_backend("gathered"), pytest.raises(ValueError, match=f"expected -1 .no expert. to {EXPERTS - 1}"):
        lowrank(**given)


def test_rows_without_gradient_may_be_of_half_precision_beside_a_wide_base() -> None:
    for seed in range(20):
        given = draw(seed, torch.bfloat16)
        given |= {"base": torch.randn(len(given["x"]), WIDE[1])}
        with torch.no_grad(), adapter_backend("gathered"):
            found = lowrank(**given)
        with adapter_backend("reference"):
            torch.testing.assert_close(found, lowrank(**given), atol=0.1, rtol=0.05)
        assert found.dtype is torch.float32


def test_what_is_kept_for_gradients_stays_a_part_of_the_rows() -> None:
    """Beside x, base and hidden values: the weights of each sequence, an eighth of its rows at most."""
    run, sequences, rank, wide = 128, 6, 16, 64
    given = {
        "x": torch.randn(run * sequences, wide, requires_grad=True), "ranks": (rank,) * 3, "run": run,
        "w_down": torch.randn(3 * rank, wide, requires_grad=True),
        "w_up": torch.randn(3 * rank, wide, requires_grad=True).t(), "act": "identity",
        "indices": torch.tensor([0, 1, 0, 2, 1, 0]).repeat_interleave(run).unsqueeze(1),
        "base": torch.randn(run * sequences, wide),
    }  # fmt: skip
    kept = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.setdefault(t.data_ptr(), t), lambda t: t):
        lowrank(**given)
    inputs = {given[name].data_ptr() for name in ("x", "w_down", "w_up", "base")}
    new = sum(t.numel() for at, t in kept.items() if at not in inputs and t.is_floating_point())
    hidden = run * sequences * rank
    assert hidden <= new <= hidden + 2 * gathered.KEPT * run * sequences * wide


def test_an_output_that_was_made_without_gradients_may_be_changed_with_them() -> None:
    for seed in range(12):
        given = draw(seed, torch.float32)
        with adapter_backend("gathered"), torch.no_grad():
            y = lowrank(**given)
        more = torch.zeros(y.shape[1], requires_grad=True)
        y += more  # torch forbids it to views
        y.sum().backward()
        assert more.grad.tolist() == [len(y)] * len(more)
