"""One broken expert, or one broken row, touches no other: in the output and in every gradient, by every backend."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from mixadapters.kernels import adapter_backend, lowrank

BACKENDS = ("segments", "gathered", "dense", "grouped", "reference")
BROKEN = (float("inf"), float("-inf"), float("nan"), 3e38)
BY_EXPERT = ("w_down", "w_up", "b_down", "b_up", "w_gate", "b_gate", "scale")
BY_ROW = ("x", "base", "weights", "base_weight")
DRAWN = 48  # problems, among which any two choices of `draw`, and of what is broken, come together
# What wants gradients: everything, as in training, or what lies before frozen experts, with a part of these.
WANTED = (None, ("x",), ("x", "w_down"), ("x", "w_down", "w_gate"))


def draw(seed: int, *, equal: bool) -> tuple[dict, random.Random]:
    """A problem in float32 whose rows choose some of its experts."""
    chance, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    run = chance.choice([1, 1, 3])
    experts = chance.randint(2, 5)
    ranks = [4] * experts if equal else [chance.choice([1, 3, 4]) for _ in range(experts)]
    rows, slots, wide = run * chance.randint(2, 8), chance.randint(1, 3), (8, 12)
    total = sum(ranks)

    def leaf(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    indices = torch.randint(-1, experts, (rows // run, slots), generator=generator)
    given = {
        "x": leaf(rows, wide[0]), "w_down": leaf(total, wide[0]), "w_up": leaf(wide[1], total), "ranks": ranks,
        "indices": indices.repeat_interleave(run, 0), "run": run,
        "act": chance.choice(["gelu", "silu", "relu", "identity"]),
    }  # fmt: skip
    optional = {
        "b_down": (total,), "b_up": (experts, wide[1]), "w_gate": (total, wide[0]), "scale": (experts,),
        "weights": (rows, slots), "base": (rows, wide[1]),
    }  # fmt: skip
    for name, shape in optional.items():
        if chance.random() < 0.6:
            given[name] = leaf(*shape)
    if "w_gate" in given and "b_down" in given:
        given["b_gate"] = leaf(total)
    return given, chance


def outcome(
    given: dict, backend: str, out_gradient: Tensor, wanted: tuple[str, ...] | None = None
) -> dict[str, Tensor]:
    """y, and the gradients of these float arguments. None: of every one."""
    floats = {k: v for k, v in given.items() if isinstance(v, Tensor) and k != "indices"}
    leaves = {k: v.clone().requires_grad_() for k, v in floats.items() if wanted is None or k in wanted}
    with torch.enable_grad(), adapter_backend(backend):
        y = lowrank(**{**given, **leaves})
    found = torch.autograd.grad(y, list(leaves.values()), out_gradient, materialize_grads=True)
    return {"y": y.detach(), **dict(zip(leaves, found, strict=True))}


def part_of(name: str, tensor: Tensor, expert: int, ranks: list[int]) -> Tensor:
    """The view of a weight, or of its gradient, that belongs to an expert."""
    columns = slice(sum(ranks[:expert]), sum(ranks[: expert + 1]))
    if name in ("b_up", "scale"):
        return tensor[expert : expert + 1]
    return tensor[:, columns] if name == "w_up" else tensor[columns]


def plant(tensor: Tensor, chance: random.Random) -> None:
    """Something that is no finite number, or overflows, in one place or in all."""
    value = chance.choice(BROKEN)
    if chance.random() < 0.5:
        tensor.fill_(value)
    else:
        tensor.view(-1)[chance.randrange(tensor.numel())] = value


def assert_clean(
    given: dict, sound: dict[str, Tensor], found: dict[str, Tensor], experts: set[int], rows: Tensor
) -> None:
    """Experts and rows (N,) that have nothing to do with what is broken have the results that they had before."""
    slots = rows.unsqueeze(1) & True
    for name, expected in sound.items():
        if name in BY_EXPERT:
            pairs = [(part_of(name, t, e, given["ranks"]) for t in (found[name], expected)) for e in experts]
            compared = [(a, b) for a, b in pairs]
        elif name == "weights":
            compared = [(found[name].where(slots, 0), expected.where(slots, 0))]
        else:
            compared = [(found[name][rows], expected[rows])]
        for a, b in compared:
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("wanted", WANTED)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_broken_expert_touches_only_the_rows_that_chose_it(backend, wanted) -> None:
    for seed in range(DRAWN if wanted is None else DRAWN // 3):
        given, chance = draw(seed, equal=backend == "grouped")
        out_gradient = torch.randn(len(given["x"]), 12, generator=torch.Generator().manual_seed(seed))
        sound = outcome(given, backend, out_gradient, wanted)
        broken = chance.randrange(len(given["ranks"]))
        for name in [n for n in BY_EXPERT if n in given]:
            damaged = {**given, name: given[name].clone()}
            own = part_of(name, damaged[name], broken, given["ranks"])
            value = chance.choice(BROKEN)
            own[tuple(chance.randrange(size) for size in own.shape) if chance.random() < 0.5 else ...] = value
            apart = (given["indices"] != broken).all(1)
            # A row that chose it may spoil what it shares with others; those that no such row chose are free of it.
            touched = {broken, *given["indices"][~apart].flatten().tolist()}
            found = outcome(damaged, backend, out_gradient, wanted)
            assert_clean(damaged, sound, found, set(range(len(given["ranks"]))) - touched, apart)


@pytest.mark.parametrize("backend", BACKENDS)
def test_broken_rows_touch_only_the_experts_that_they_chose(backend) -> None:
    """Activations of another adapter further down, padding, and gradients of a loss that has overflowed."""
    for seed in range(DRAWN):
        given, chance = draw(seed, equal=backend == "grouped")
        out_gradient = torch.randn(len(given["x"]), 12, generator=torch.Generator().manual_seed(seed))
        sound = outcome(given, backend, out_gradient)
        row = chance.randrange(len(given["x"]))
        for name in [n for n in (*BY_ROW, "gradient") if n in given or n == "gradient"]:
            damaged = {**given, name: given[name].clone()} if name in given else given
            gradient = out_gradient.clone()
            plant((gradient if name == "gradient" else damaged[name])[row], chance)
            found = outcome(damaged, backend, gradient)
            others = torch.arange(len(given["x"])) != row
            experts = set(range(len(given["ranks"]))) - set(given["indices"][row].tolist())
            assert_clean(damaged, sound, found, experts, others)


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_broken_shows_where_it_was_chosen(backend) -> None:
    """Nothing is hidden: the rows of a broken expert are no numbers, nor are the gradients of what it shares."""
    given, _ = draw(1, equal=True)
    given = {**given, "indices": torch.arange(len(given["x"])).remainder(2).unsqueeze(1), "run": 1, "act": "gelu"}
    given.pop("weights", None)
    given["w_up"] = given["w_up"].clone()
    given["w_up"][:, : given["ranks"][0]] = float("nan")
    found = outcome(given, backend, torch.ones(len(given["x"]), 12))
    assert found["y"][::2].isnan().all()
    assert found["x"][::2].isnan().all()
    assert found["y"][1::2].isfinite().all()
    assert found["x"][1::2].isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_experts_that_nobody_chose_get_gradients_of_zero_however_broken(backend) -> None:
    given, _ = draw(2, equal=True)
    given["indices"] = given["indices"].clamp_max(0)
    last = len(given["ranks"]) - 1
    for name in [n for n in BY_EXPERT if n in given]:
        given[name] = given[name].clone()
        part_of(name, given[name], last, given["ranks"]).fill_(float("inf"))
    found = outcome(given, backend, torch.ones(len(given["x"]), 12))
    for name in [n for n in BY_EXPERT if n in given]:
        assert (part_of(name, found[name], last, given["ranks"]) == 0).all(), name


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_gate_that_is_minus_infinite_and_cut_off_touches_only_the_rows_that_chose_it(backend) -> None:
    """All hidden values are 0, and so are their gradients: nothing shows but the weight itself."""
    given, _ = draw(1, equal=True)
    experts = len(given["ranks"])
    rows = {"x": torch.ones(20, 8), "indices": torch.arange(20).remainder(experts).unsqueeze(1), "run": 1}
    plain = {name: given[name] for name in ("w_down", "w_up", "ranks")}
    given = {**plain, **rows, "act": "relu", "w_gate": torch.randn(len(given["w_down"]), 8)}
    damaged = {**given, "w_gate": given["w_gate"].clone()}
    part_of("w_gate", damaged["w_gate"], 0, given["ranks"]).fill_(-torch.inf)
    sound, found = (outcome(one, backend, torch.ones(20, 12)) for one in (given, damaged))
    assert_clean(given, sound, found, set(range(1, experts)), given["indices"][:, 0] != 0)


def test_a_broken_neighbour_changes_no_bit_where_rows_are_invariant() -> None:
    for seed in range(60):
        given, chance = draw(seed, equal=False)
        damaged = {**given, "w_up": given["w_up"].clone()}
        broken = chance.randrange(len(given["ranks"]))
        part_of("w_up", damaged["w_up"], broken, given["ranks"]).fill_(float("nan"))
        apart = (given["indices"] != broken).all(1)
        with adapter_backend(batch_invariant=True):
            assert torch.equal(lowrank(**damaged)[apart], lowrank(**given)[apart])


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_gradients_a_broken_expert_touches_only_the_rows_that_chose_it(backend) -> None:
    """Decoding: a few rows, of which `dense` weighs what they have not chosen by 0 and looks at the output."""
    with torch.no_grad(), adapter_backend(backend):
        for seed in range(60):
            given, chance = draw(seed, equal=backend == "grouped")
            sound = lowrank(**given)
            torch.testing.assert_close(sound, outcome(given, "reference", torch.ones_like(sound))["y"])
            broken = chance.randrange(len(given["ranks"]))
            apart = (given["indices"] != broken).all(1)
            for name in [n for n in BY_EXPERT if n in given]:
                damaged = {**given, name: given[name].clone()}
                part_of(name, damaged[name], broken, given["ranks"]).fill_(chance.choice(BROKEN))
                torch.testing.assert_close(lowrank(**damaged)[apart], sound[apart], rtol=1e-4, atol=1e-4)
