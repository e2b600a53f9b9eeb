"""What callers of the operation rely on: experts that stand for several, or are on other processes, or are views."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mixadapters.kernels import Few, adapter_backend, backends, dense, lowrank, segments
from mixadapters.kernels.problem import Problem

BACKENDS = tuple(name for name in backends.BACKENDS if name != "triton")  # see interpreted/test_triton.py for that
EXPERTS, RANK, WIDTH, ROWS = 4, 4, 8, 12
OF_EXPERTS = {"w_down": RANK, "b_down": RANK, "w_gate": RANK, "b_up": 1, "scale": 1}  # rows of each expert


def arguments(columns: Tensor, run: int = 1) -> dict:
    """Gated experts and the weights of their slots, for rows that choose `columns` (ROWS, k)."""
    generator = torch.Generator().manual_seed(0)

    def leaf(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).requires_grad_()

    total = EXPERTS * RANK
    return {
        "x": leaf(ROWS, WIDTH), "w_down": leaf(total, WIDTH), "w_up": leaf(WIDTH, total), "ranks": (RANK,) * EXPERTS,
        "b_down": leaf(total), "b_up": leaf(EXPERTS, WIDTH), "w_gate": leaf(total, WIDTH), "scale": leaf(EXPERTS),
        "base": leaf(ROWS, WIDTH), "weights": leaf(*columns.shape), "indices": columns, "run": run,
    }  # fmt: skip


def distinct(slots: int, run: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.rand(ROWS // run, EXPERTS, generator=generator).argsort(1)[:, :slots].repeat_interleave(run, 0)


def experts(given: dict, numbers: list[int]) -> dict:
    """Those experts alone."""
    part = {name: given[name].unflatten(0, (EXPERTS, -1))[numbers].flatten(0, 1) for name in OF_EXPERTS}
    part["w_up"] = given["w_up"].unflatten(1, (EXPERTS, RANK))[:, numbers].flatten(1)
    return {**given, **part, "ranks": (RANK,) * len(numbers)}


def outcome(y: Tensor, given: dict) -> dict[str, Tensor]:
    """y and the gradients of all that wants one."""
    leaves = {name: t for name, t in given.items() if isinstance(t, Tensor) and t.requires_grad}
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(2))
    return {"y": y.detach(), **dict(zip(leaves, torch.autograd.grad(y, list(leaves.values()), grad), strict=True))}


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    for name, value in one.items():
        torch.testing.assert_close(value, other[name], rtol=1e-4, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_expert_that_stands_for_several_has_all_their_weights(backend) -> None:
    """Experts were merged, the router was not: several of its columns are one expert, perhaps in one row."""
    stands = torch.tensor([0, 1, 0, 0])
    columns = distinct(3)
    merged = [0, 1]
    given = arguments(columns)
    with adapter_backend(backend):
        found = outcome(lowrank(**{**experts(given, merged), "indices": stands[columns]}), given)
        table = torch.zeros(ROWS, len(merged)).scatter_add(1, stands[columns], given["weights"])
        expected = outcome(lowrank(**{**experts(given, merged), "indices": None, "weights": table}), given)
    assert (stands[columns].sort(1).values.diff(dim=1) == 0).any()  # some rows name one twice
    assert_same(found, expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("run", [1, 3])
def test_shares_of_processes_add_up_to_the_whole(backend, run) -> None:
    """Each process has some experts; those of others are -1 to it. Every gradient adds up as well."""
    columns = distinct(2, run)
    given = arguments(columns, run)
    total = None
    with adapter_backend(backend):
        whole = outcome(lowrank(**given), given)
        for numbers in ([0, 2], [1, 3]):
            place = torch.full((EXPERTS,), -1)
            place[numbers] = torch.arange(len(numbers))
            share = {**experts(given, numbers), "indices": place[columns]}
            y = lowrank(**share | {"base": given["base"] if total is None else None})
            total = y if total is None else total + y
    assert_same(outcome(total, given), whole)


def test_a_few_rows_with_experts_of_other_processes_are_left_to_the_operation() -> None:
    given = arguments(distinct(2))
    held = {name: given[name] for name in ("ranks", "w_down", "w_up", "b_down", "b_up", "w_gate", "scale")}
    call = {name: given[name] for name in ("x", "weights", "base")}
    with torch.no_grad():
        few = Few("gelu", held)
        assert few(**call, indices=given["indices"], base_weight=None, run=1) is not None
        absent = given["indices"].masked_fill(given["indices"] == 3, -1)
        assert few(**call, indices=absent, base_weight=None, run=1) is None


class Copies(TorchDispatchMode):
    """Names the operators that make a tensor of this size or more."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size, self.made = size, []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        found = operator(*args, **(kwargs or {}))
        given = {t.untyped_storage().data_ptr() for t in args if isinstance(t, Tensor)}
        for t in found if isinstance(found, (list, tuple)) else (found,):
            if isinstance(t, Tensor) and t.numel() >= self.size and t.untyped_storage().data_ptr() not in given:
                self.made.append(operator.name())
        return found


@pytest.mark.parametrize("backend", [segments, dense])
@pytest.mark.parametrize("transposed", [False, True])
def test_gated_experts_are_read_where_they_lie(backend, transposed) -> None:
    """Gate and up projections of mixture-of-experts layers are halves of one tensor, (2, R, K) or transposed."""
    rows, rank, width = 3, 64, 32
    fused = torch.randn(width, 2 * rank).t() if transposed else torch.randn(2 * rank, width)
    p = Problem(
        torch.randn(rows, width), fused[rank:], torch.randn(rank, width).t(), (rank // 2,) * 2, gate=fused[:rank],
        indices=torch.tensor([[0], [1], [1]]), base=torch.randn(rows, width), act="silu",
    )  # fmt: skip
    with torch.no_grad(), Copies(rank * width) as copies:
        y = backend.forward(p, False)[0]
    assert not copies.made
    apart = p.x @ fused.t()
    h = torch.nn.functional.silu(apart[:, :rank]) * apart[:, rank:]
    h = h * torch.tensor([[1, 0], [0, 1], [0, 1]]).repeat_interleave(rank // 2, 1)
    torch.testing.assert_close(y, p.base + h @ p.up.t(), rtol=1e-4, atol=1e-4)
