"""The operators under torch's own checks, the compiler and export."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from mixadapters.kernels import adapter_backend, costs, lowrank


def arguments(rows=12, slots=1, glu=False, experts=3, seed=0, rank=8, width=16):
    generator = torch.Generator().manual_seed(seed)

    def leaf(*shape):
        return torch.randn(*shape, generator=generator).requires_grad_()

    given = {
        "x": leaf(rows, width), "w_down": leaf(experts * rank, width), "w_up": leaf(width, experts * rank),
        "b_down": leaf(experts * rank), "b_up": leaf(experts, width), "scale": leaf(experts),
        "base": leaf(rows, width), "base_weight": leaf(rows),
    }  # fmt: skip
    if glu:
        given |= {"w_gate": leaf(experts * rank, width)}
    if slots is not None:
        given["indices"] = torch.randint(-1, experts, (rows, slots), generator=generator)
    given["weights"] = leaf(rows, experts if slots is None else slots)
    return {**given, "ranks": (rank,) * experts}


def outcome(function, given):
    """y and all gradients."""
    leaves = [v for v in given.values() if isinstance(v, Tensor) and v.is_floating_point()]
    y = function(**given)
    return [y.detach(), *torch.autograd.grad(y, leaves, torch.ones_like(y).cumsum(1))]


CASES = [("dense", None), ("dense", 2), ("segments", 1), ("segments", 2), ("grouped", 2), ("gathered", 2)]


@pytest.mark.parametrize(("backend", "slots"), CASES)
def test_operators_pass_opcheck(backend, slots) -> None:
    glu = slots == 2
    given = arguments(slots=slots, glu=glu)
    positional = (
        given["x"], given["w_down"], given["w_up"], given["ranks"], given["b_down"], given["b_up"],
        given.get("w_gate"), None, given.get("indices"), given["weights"], given["scale"], given["base"],
        given["base_weight"], "silu", 0.25, torch.tensor(3), 1, False, backend,
    )  # fmt: skip
    op = torch.ops.mixadapters.lowrank.default
    plain = [a.detach() if isinstance(a, Tensor) else a for a in positional]  # autograd is above the operators
    torch.library.opcheck(op, (*plain, True))
    torch.library.opcheck(op, (*plain, False))
    y, kept = op(*plain, True)
    needs = [True] * 4 + [True] * 1 + [glu, False, True, True]
    torch.library.opcheck(torch.ops.mixadapters.lowrank_backward.default, (torch.randn_like(y), kept, *plain, needs))


@pytest.mark.parametrize(("backend", "slots"), [("aot_eager", None), ("aot_eager", 2), ("inductor", 1)])
def test_compiled_whole_with_dynamic_rows(backend, slots, monkeypatch) -> None:
    # A graph, which knows no number of rows, would take another backend than a few rows by themselves.
    monkeypatch.setattr(costs, "SMALL", 0)
    monkeypatch.setattr(costs, "cheapest", lambda *_: "segments")
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(backend)

    def layer(**given):
        return lowrank(**given, act="silu").relu()

    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=counter)
    frames = []
    # Inductor else starts processes, and builds a program for each set of vector instructions that there is.
    with torch._inductor.config.patch({"compile_threads": 1, "cpp.vec_isa_ok": False}):
        for rows in (12, 20, 7):
            given = arguments(rows, slots, seed=rows)
            for ours, theirs in zip(outcome(compiled, given), outcome(layer, given), strict=True):
                torch.testing.assert_close(ours, theirs)
            frames.append(counter.frame_count)
    assert len(set(frames)) == 1  # nothing is compiled again
    torch._dynamo.reset()


def in_graph(
    rows: int, slots: int | None = None, *, dynamic: bool = False, experts: int = 3, backend: str | None = None,
    changed: dict[str, Any] | None = None,
) -> bool:  # fmt: skip
    """Whether a graph of so many rows has the operator, which it cannot see into."""
    torch._dynamo.reset()
    given = arguments(rows, slots, experts=experts, glu=True) | (changed or {})
    given = {k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in given.items()}
    graphs: list[Any] = []
    with adapter_backend(backend):
        compiled = torch.compile(
            lowrank, fullgraph=True, dynamic=dynamic, backend=lambda graph, _: graphs.append(graph) or graph.forward
        )
        torch.testing.assert_close(compiled(**given), lowrank(**given))
    torch._dynamo.reset()
    return any(name in graphs[0].code for name in ("mixadapters", "autograd_function_apply"))


@torch.no_grad()
@pytest.mark.parametrize("experts", [1, 3])
def test_a_graph_sees_the_products_of_few_rows_that_all_experts_run_on(experts) -> None:
    """An operator that it cannot see into costs more there. Unless rows are many, or open."""
    assert not in_graph(12, experts=experts)
    assert in_graph(65, experts=experts)
    assert in_graph(12, dynamic=True, experts=experts)
    assert in_graph(12, backend="dense", experts=experts)


@torch.no_grad()
def test_a_graph_sees_the_products_of_rows_that_choose_where_these_are_small() -> None:
    assert not in_graph(64, slots=3)
    assert in_graph(65, slots=3)
    assert not in_graph(65, slots=1)  # of rank 8: so few columns cost less one by one
    for run, hidden in ((20, False), (4000, True)):  # a run's products are large, or not
        wide = arguments(2 * run, 1, glu=True, width=128)
        runs = torch.tensor([2, -1]).repeat_interleave(run).unsqueeze(1)
        assert in_graph(2 * run, slots=1, changed=wide | {"indices": runs, "run": run}) == hidden
    with torch.enable_grad():
        assert in_graph(12, slots=1)  # sums of gradients have a fixed order in the operator alone
    assert in_graph(12, slots=1, backend="gathered")


def test_a_backend_forced_around_a_compiled_call_is_the_one_that_runs() -> None:
    """And compiling again, not a stale graph, follows when it changes."""
    torch._dynamo.reset()
    compiled = torch.compile(lowrank, fullgraph=True, backend="aot_eager")
    given = arguments(slots=2)
    for name in ("dense", "segments", "gathered", "reference"):
        with adapter_backend(name):
            for ours, theirs in zip(outcome(compiled, given), outcome(lowrank, given), strict=True):
                torch.testing.assert_close(ours, theirs)
    torch._dynamo.reset()


@pytest.mark.parametrize("slots", [None, 1])
def test_exported_with_dynamic_rows_is_one_operator(slots) -> None:
    given = arguments(slots=slots)

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.down, self.up = nn.Parameter(given["w_down"].detach()), nn.Parameter(given["w_up"].detach())

        def forward(self, x, indices, base):
            return lowrank(x, self.down, self.up, given["ranks"], indices=indices, base=base, act="gelu")

    layer = Layer()
    inputs = [given["x"].detach(), given.get("indices"), given["base"].detach()]
    rows = torch.export.Dim("rows", min=2, max=4096)
    program = torch.export.export(
        layer, tuple(inputs), dynamic_shapes=({0: rows}, None if slots is None else {0: rows}, {0: rows})
    )
    ops = [node.target for node in program.graph.nodes if "mixadapters" in str(node.target)]
    assert ops == [torch.ops.mixadapters.lowrank.default]
    more = arguments(31, slots, seed=1)
    inputs = [more["x"].detach(), more.get("indices"), more["base"].detach()]
    torch.testing.assert_close(program.module()(*inputs), layer(*inputs))


def test_who_counts_or_traces_operators_sees_them_all() -> None:
    """With nobody to look on, backends are called past torch's dispatcher."""

    class Names(TorchDispatchMode):
        def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
            seen.append(operator.name())
            return operator(*args, **(kwargs or {}))

    seen: list[str] = []
    given = {"x": torch.randn(3, 6), "w_down": torch.randn(4, 6), "w_up": torch.randn(5, 4), "ranks": (2, 2)}
    with torch.no_grad():
        alone = lowrank(**given)
        with Names():
            counted = lowrank(**given)
        torch.testing.assert_close(counted, alone)
        assert seen == ["mixadapters::lowrank"]
    seen.clear()
    trained = {**given, "x": given["x"].clone().requires_grad_()}
    expected = torch.autograd.grad(lowrank(**trained).sum(), trained["x"])
    with Names():
        assert torch.equal(torch.autograd.grad(lowrank(**trained).sum(), trained["x"])[0], expected[0])
    ours = [name for name in seen if "mixadapters" in name]
    assert ours == ["mixadapters::lowrank", "mixadapters::lowrank_backward"]
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that checks of shapes become constants
        traced = torch.jit.trace(lambda x: lowrank(**{**given, "x": x}), given["x"], check_trace=False)
    assert "mixadapters::lowrank" in str(traced.graph)
    with torch.no_grad(), FakeTensorMode() as mode:
        fake = {name: mode.from_tensor(t) if isinstance(t, torch.Tensor) else t for name, t in given.items()}
        assert lowrank(**fake).shape == (3, 5)
