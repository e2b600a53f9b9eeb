"""Every backend against the definition, and the definition against a loop over single rows."""

from __future__ import annotations

import pickle
from contextlib import nullcontext

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mixadapters import kernels
from mixadapters.kernels import ACTIVATIONS, adapter_backend, costs, grouped, hashing, lowrank

FAST = ("segments", "gathered", "dense")  # run any problem on a CPU
BACKENDS = (*FAST, "reference")
WEIGHTS = ("w_down", "w_up", "b_down", "b_up", "w_gate", "b_gate", "scale")


def row_by_row(
    x, w_down, w_up, ranks, indices=None, weights=None, base=None, base_weight=None, act="gelu", dropout=0.0,
    seed=None, run=1, **optional,
):  # fmt: skip
    """The formula of `lowrank`'s docstring, one row and one slot at a time."""
    if dropout:
        mask = hashing.kept(seed, torch.arange(x.shape[0]), x.shape[1], dropout)
        x = torch.where(mask, x / (1 - dropout), 0)
    b_down, b_up, w_gate, b_gate, scale = (optional.get(n) for n in ("b_down", "b_up", "w_gate", "b_gate", "scale"))
    starts = [sum(ranks[:e]) for e in range(len(ranks))]
    rows = []
    for n in range(x.shape[0]):
        y = torch.zeros_like(w_up[:, 0])
        if base is not None:
            y = base[n] if base_weight is None else base_weight[n] * base[n]
        chosen = range(len(ranks)) if indices is None else indices[n].tolist()
        for slot, e in enumerate(chosen):
            if e < 0:
                continue
            part = slice(starts[e], starts[e] + ranks[e])
            h = w_down[part] @ x[n] + (0 if b_down is None else b_down[part])
            if w_gate is None:
                h = ACTIVATIONS[act](h)
            else:
                h = ACTIVATIONS[act](w_gate[part] @ x[n] + (0 if b_gate is None else b_gate[part])) * h
            out = w_up[:, part] @ h + (0 if b_up is None else b_up[e])
            out = out * (1 if scale is None else scale[e])
            y = y + out * (1 if weights is None else weights[n, slot])
        rows.append(y)
    return torch.stack(rows) if rows else x.new_zeros(0, w_up.shape[0])


def problem(
    seed=0, rows=5, width_in=4, width_out=3, ranks=(2, 3), slots=2, glu=False, bias=True, scale=True, base=True,
    base_weight=False, weights=True, act="gelu", routing="random", dtype=torch.float64, run=1, dropout=0.0,
):  # fmt: skip
    """Arguments of `lowrank`; every float tensor is a leaf that wants a gradient. slots None: no indices."""
    generator = torch.Generator().manual_seed(seed)

    def leaf(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()

    total, experts = sum(ranks), len(ranks)
    rows *= run
    given = {"x": leaf(rows, width_in), "w_down": leaf(total, width_in), "w_up": leaf(width_out, total)}
    if bias:
        given |= {"b_down": leaf(total), "b_up": leaf(experts, width_out)}
    if glu:
        given |= {"w_gate": leaf(total, width_in)} | ({"b_gate": leaf(total)} if bias else {})
    if scale:
        given["scale"] = leaf(experts)
    if base:
        given["base"] = leaf(rows, width_out)
        if base_weight:
            given["base_weight"] = leaf(rows)
    if slots is not None:
        indices = torch.randint(-1, experts, (rows // run, slots), generator=generator)
        if routing == "none":
            indices.fill_(-1)
        elif routing == "last":  # all the others stay empty
            indices.fill_(experts - 1)
        elif routing == "all":
            indices = torch.rand(rows // run, experts, generator=generator).argsort(1)
        elif routing == "sorted":
            indices = indices.sort(0).values
        given["indices"] = indices.repeat_interleave(run, 0)
    if weights:
        given["weights"] = leaf(rows, experts if slots is None else given["indices"].shape[1])
    if dropout:
        given |= {"dropout": dropout, "seed": torch.tensor(seed)}
    return {**given, "ranks": list(ranks), "act": act, "run": run}


def copied(given: dict) -> dict:
    return {
        k: v.detach().clone().requires_grad_(v.is_floating_point()) if isinstance(v, Tensor) else v
        for k, v in given.items()
    }


def run(given: dict, backend: str, function=lowrank):
    """Output and the gradient of every float argument by name, zeros where there is none."""
    given = copied(given)
    with adapter_backend(backend):
        y = function(**given)
    if y.requires_grad:
        generator = torch.Generator().manual_seed(1)
        y.backward(torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y.dtype))
    leaves = {k: v for k, v in given.items() if isinstance(v, Tensor) and v.is_floating_point()}
    return y.detach(), {k: torch.zeros_like(v) if v.grad is None else v.grad for k, v in leaves.items()}


def assert_same(given: dict, one: tuple, other: tuple, **tolerance) -> None:
    torch.testing.assert_close(one[0], other[0], **tolerance)
    for name in one[1]:
        torch.testing.assert_close(one[1][name], other[1][name], msg=lambda m, n=name: f"{n}: {m}", **tolerance)


@st.composite
def problems(draw, widths=None, ranks=None):
    routing = draw(st.sampled_from(["random", "sorted", "none", "last", "all", "dense"]))
    widths = st.integers(1, 6) if widths is None else widths
    if ranks is None:
        ragged = st.lists(st.one_of(st.integers(1, 17), st.just(129)), min_size=1, max_size=5)
        ranks = st.one_of(ragged, st.just([3, 3, 3]))
    return problem(
        seed=draw(st.integers(0, 2**16)),
        rows=draw(st.integers(0, 9)),
        width_in=draw(widths),
        width_out=draw(widths),
        ranks=draw(ranks),
        slots=None if routing == "dense" else draw(st.integers(1, 6)),  # more slots than experts: duplicates
        routing=routing,
        act=draw(st.sampled_from(sorted(ACTIVATIONS))),
        run=draw(st.sampled_from([1, 1, 2, 5])),
        dropout=draw(st.sampled_from([0.0, 0.0, 0.3])),
        **{name: draw(st.booleans()) for name in ("glu", "bias", "scale", "base", "base_weight", "weights")},
    )


@settings(max_examples=60, deadline=None, derandomize=True)
@given(problems())
def test_reference_is_the_formula(given) -> None:
    assert_same(given, run(given, "reference"), run(given, "reference", row_by_row))


@pytest.mark.parametrize("backend", FAST)
@settings(max_examples=120, deadline=None, derandomize=True)
@given(given=problems())
def test_backend_equals_reference_in_value_and_every_gradient(backend, given) -> None:
    assert_same(given, run(given, backend), run(given, "reference"))


@settings(max_examples=120, deadline=None, derandomize=True)
@given(problems(st.sampled_from([4, 8, 16]), st.sampled_from([[4], [8, 8], [4] * 5])))
def test_grouped_products_equal_the_reference(given) -> None:
    """Where rows are multiples of 16 bytes, in float32: grouped_mm takes nothing else."""
    given = {k: v.float() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in given.items()}
    assert_same(given, run(given, "grouped"), run(given, "reference"), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("glu", [False, True])
@pytest.mark.parametrize("slots", [None, 2])
def test_gradients_are_those_of_finite_differences(backend, glu, slots) -> None:
    given = problem(glu=glu, slots=slots, base_weight=True, ranks=(1, 2), rows=3, act="silu")
    names = [k for k, v in given.items() if isinstance(v, Tensor) and v.requires_grad]
    assert {*WEIGHTS, "x", "weights", "base", "base_weight"} - {*names} == (set() if glu else {"w_gate", "b_gate"})
    with adapter_backend(backend):
        assert torch.autograd.gradcheck(
            lambda *tensors: lowrank(**{**given, **dict(zip(names, tensors, strict=True))}),
            [given[name] for name in names],
        )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_row_without_expert_is_its_base_bit_for_bit(backend, dtype) -> None:
    given = problem(rows=8, slots=2, ranks=(3, 1, 4), dtype=dtype)
    given["indices"][::2] = -1
    given["indices"][1::2, 0] = 1
    with torch.no_grad():
        given["base"][0, 0] = -0.0  # to which adding nothing would give 0.0
        given["x"][::2] = torch.nan  # what padding holds does not matter
    y, _ = run(given, backend)
    bits = torch.int32 if dtype is torch.float32 else torch.int16
    assert torch.equal(y[::2].view(bits), given["base"][::2].detach().view(bits))
    assert (y[1::2] != given["base"][1::2]).any(1).all()
    assert y[1::2].isfinite().all()


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("ranks", [(4, 4), (3, 1)])
@pytest.mark.parametrize("slots", [1, 2])
def test_expert_that_overflows_leaves_the_rows_of_others_alone(backend, ranks, slots) -> None:
    given = problem(rows=8, ranks=ranks, slots=slots, dtype=torch.float32, act="silu")
    given["indices"] = torch.tensor([0, 1] * 4).unsqueeze(1).expand(-1, slots)
    sound, _ = run(given, backend)
    with torch.no_grad():
        given["w_down"][ranks[0] :] = 3e38
    y, gradients = run(given, backend)
    # `dense` leaves them to `segments`, where a sum is of another order.
    torch.testing.assert_close(y[::2], sound[::2], rtol=1e-5 if backend == "dense" else 0, atol=0)
    assert not y[1::2].isfinite().all()
    assert gradients["x"][::2].isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_experts_nobody_chose_get_a_zero_gradient_not_none(backend) -> None:
    given = copied(problem(rows=4, slots=1, ranks=(2, 3, 1), glu=True, routing="last"))
    with adapter_backend(backend):
        lowrank(**given).sum().backward()
    for name in ("w_down", "w_gate", "b_down"):
        assert given[name].grad is not None
        assert (given[name].grad[:5] == 0).all()
        assert (given[name].grad[5:] != 0).any()


def test_experts_nobody_chose_get_a_zero_gradient_where_grouped_mm_leaves_them_unwritten(monkeypatch) -> None:
    def unwritten(*args: Tensor, offs: Tensor) -> Tensor:
        out = torch.nn.functional.grouped_mm(*args, offs=offs)
        if out.dim() == 3:
            out[offs.diff(prepend=offs.new_zeros(1)) == 0] = torch.nan
        return out

    monkeypatch.setattr(grouped, "grouped_mm", unwritten)
    given = problem(width_in=4, width_out=4, ranks=(4, 4, 4), slots=1, routing="last", dtype=torch.float32)
    assert_same(given, run(given, "grouped"), run(given, "reference"), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("backend", [*FAST, "grouped"])
@pytest.mark.parametrize("glu", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_near_double_in_value_and_every_gradient(backend, glu, dtype) -> None:
    given = problem(rows=64, width_in=32, width_out=24, ranks=(8, 8), glu=glu, dtype=dtype, base_weight=True)
    exact = {
        k: v.detach().double() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in given.items()
    }
    for name, expected, got in zip(*_named(run(exact, "reference")), _named(run(given, backend))[1], strict=True):
        assert got.dtype == dtype
        error = (got.double() - expected).norm() / expected.norm()
        assert error < (2e-2 if dtype is torch.bfloat16 else 3e-3), name


def _named(outcome: tuple) -> tuple[list[str], list[Tensor]]:
    return ["y", *outcome[1]], [outcome[0], *outcome[1].values()]


@pytest.mark.parametrize("backend", [*FAST, "grouped"])
@pytest.mark.parametrize("slots", [None, 1, 2])
def test_two_runs_agree_in_every_bit(backend, slots) -> None:
    given = problem(rows=300, width_in=32, width_out=16, ranks=(8,) * 4, slots=slots, dtype=torch.float32)
    one, other = run(given, backend), run(given, backend)
    assert torch.equal(one[0], other[0])
    assert all(torch.equal(one[1][name], other[1][name]) for name in one[1])


@pytest.mark.parametrize("backend", [*FAST, "grouped"])
@pytest.mark.parametrize("wanted", [("w_up",), ("x",), ("weights",), ("base", "b_down"), ("scale",), ("base_weight",)])
def test_only_what_wants_a_gradient_gets_one(backend, wanted) -> None:
    given = problem(rows=8, width_in=8, width_out=8, ranks=(4, 4), base_weight=True, dtype=torch.float32)
    full = run(given, "reference")[1]
    for name, tensor in given.items():
        if isinstance(tensor, Tensor) and tensor.is_floating_point():
            tensor.requires_grad_(name in wanted)
    with adapter_backend(backend):
        y = lowrank(**given)
    y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).float())
    for name in full:
        if name in wanted:
            torch.testing.assert_close(given[name].grad, full[name], atol=1e-4, rtol=1e-4)
        else:
            assert given[name].grad is None


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("more", [{}, {"glu": True, "base_weight": True}, {"slots": None}, {"dropout": 0.3}])
def test_second_derivatives(backend, more) -> None:
    given = problem(rows=3, act="silu", **more)
    leaves = {name: t for name, t in given.items() if isinstance(t, Tensor) and t.requires_grad}

    def gradients(*tensors: Tensor) -> tuple[Tensor, ...]:
        y = lowrank(**{**given, **dict(zip(leaves, tensors, strict=True))})
        return torch.autograd.grad(y.square().sum(), tensors, create_graph=True)

    with adapter_backend(backend):
        assert torch.autograd.gradcheck(gradients, tuple(leaves.values()), fast_mode=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_of_what_is_computed_from_one_another_are_of_the_operation_alone(backend) -> None:
    """Base and weights come from the rows, as in a model: what the rows get by way of them, autograd adds, once."""
    given = problem(rows=4, width_in=3, width_out=3, act="silu", base_weight=True)
    x = given["x"].detach().requires_grad_()

    def slope(name: str) -> Tensor:
        with adapter_backend(name):
            rows = x.sin()
            y = lowrank(**{**given, "x": rows, "base": rows.exp(), "weights": rows[:, :2].cos()})
            (first,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
            return torch.autograd.grad(first.square().sum(), x)[0]

    torch.testing.assert_close(slope(backend), slope("reference"))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_many_gradients_at_a_time(backend, dtype) -> None:
    given = problem(rows=4, act="silu", dtype=dtype)
    leaves = [t for t in given.values() if isinstance(t, Tensor) and t.requires_grad]
    with adapter_backend(backend):
        y = lowrank(**given)
        many = torch.randn(3, *y.shape, dtype=y.dtype)
        found = torch.autograd.grad(y, leaves, many, is_grads_batched=True, retain_graph=True)
        for i, one in enumerate(many):
            expected = torch.autograd.grad(y, leaves, one, retain_graph=True)
            for a, b in zip(found, expected, strict=True):
                torch.testing.assert_close(a[i], b, **({} if dtype is torch.float64 else {"rtol": 0.05, "atol": 0.05}))


@pytest.mark.parametrize("backend", BACKENDS)
def test_weights_follow_the_dtype_of_the_rows_and_the_result_that_of_the_base(backend) -> None:
    given = problem(dtype=torch.float32)
    given = {**given, "x": given["x"].bfloat16()}
    with adapter_backend(backend):
        y = lowrank(**given)
        assert y.dtype == torch.float32  # that of the base
        assert lowrank(**{**given, "base": None}).dtype == torch.bfloat16
    y.sum().backward()
    assert given["w_down"].grad.dtype == torch.float32


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("more", [{}, {"slots": None}, {"slots": 1, "routing": "last"}], ids=["2", "all", "one"])
def test_a_base_of_another_dtype_than_the_rows_is_added_to(backend, more) -> None:
    given = problem(rows=64, dtype=torch.float32, **more)
    expected = row_by_row(**given)
    with adapter_backend(backend):
        y = lowrank(**{**given, "x": given["x"].bfloat16()})
    torch.testing.assert_close(y, expected, atol=0.3, rtol=0.05)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("weighted", [False, True])
def test_backend_runs_under_autocast(backend, weighted) -> None:
    given = problem(rows=6, slots=1, dtype=torch.float32, weights=weighted, scale=weighted)
    with adapter_backend(backend), torch.autocast("cpu", torch.bfloat16):
        y = lowrank(**given)
    assert y.dtype == torch.float32
    torch.testing.assert_close(y, run(given, "reference")[0], atol=0.2, rtol=0.1)


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_and_expanded_rows_are_read_right(backend) -> None:
    for slots in (None, 2):
        given = problem(rows=6, width_in=5, slots=slots)
        wide, tall = torch.randn(6, 10, dtype=torch.float64), torch.randn(5, 6, dtype=torch.float64)
        for x in (wide[:, ::2], tall.T, wide[:1, :5].expand(6, 5), wide[:, 5:]):
            with adapter_backend(backend):
                torch.testing.assert_close(
                    lowrank(**{**given, "x": x}),
                    lowrank(**{**given, "x": x.clone(memory_format=torch.contiguous_format)}),
                )
        with adapter_backend(backend):
            turned = {**given, "w_down": given["w_down"].T.contiguous().T, "w_up": given["w_up"].T.contiguous().T}
            torch.testing.assert_close(lowrank(**turned), lowrank(**given))


@pytest.mark.parametrize("backend", BACKENDS)
def test_indices_may_be_of_32_bits(backend) -> None:
    given = problem()
    with adapter_backend(backend):
        assert torch.equal(lowrank(**{**given, "indices": given["indices"].int()}), lowrank(**given))


def _gradients(given: dict) -> list[Tensor]:
    y = lowrank(**given)
    wanted = [v for v in given.values() if isinstance(v, Tensor) and v.requires_grad]
    return [y, *torch.autograd.grad(y.sum(), wanted, materialize_grads=True)]


@pytest.mark.parametrize("backend", BACKENDS)
def test_constant_indices_change_no_bit_whatever_the_experts(backend) -> None:
    """What is kept with the indices belongs to the ranks and runs of one problem, not to the next."""
    given = problem(rows=6, run=2)
    indices = given["indices"]
    promised = kernels.constant(indices.clone())
    assert kernels.constant(promised) is promised
    with adapter_backend(backend):
        for _ in range(2):
            for ranks, run in (((2, 3), 2), ((2, 3), 1), ((3, 3, 1), 2), ((4, 4), 2)):
                experts = {**problem(rows=6, run=2, ranks=ranks), "run": run}
                found = _gradients({**experts, "indices": promised})
                expected = _gradients({**experts, "indices": indices})
                assert all(map(torch.equal, found, expected))
                with torch.no_grad():
                    assert torch.equal(lowrank(**{**experts, "indices": promised}), expected[0])


@pytest.mark.parametrize("run", [1, 8])
@pytest.mark.parametrize("training", [False, True])
def test_constant_indices_that_have_run_can_be_pickled(run, training) -> None:
    """They are those of routings, which callers write to files."""
    given = problem(rows=16 // run, slots=1, run=run)
    given["indices"] = kernels.constant(given["indices"].clamp_min(0))
    with torch.set_grad_enabled(training):
        y = lowrank(**given)
        again = pickle.loads(pickle.dumps(given["indices"]))
        assert torch.equal(lowrank(**{**given, "indices": again}), y)


@pytest.mark.parametrize("cheapest", ["segments", "grouped", "gathered"])
def test_constant_indices_serve_layers_that_differ(monkeypatch, cheapest) -> None:
    """Which way a problem runs is kept with its indices: a layer next to it may be of another kind."""
    monkeypatch.setattr(costs, "SMALL", 0)
    monkeypatch.setattr(costs, "cheapest", lambda shape, rows, among: cheapest if cheapest in among else among[-1])
    indices = torch.arange(4).repeat_interleave(4).unsqueeze(1)
    promised = kernels.constant(indices.clone())
    fields = {
        "dtype": [torch.float32, torch.bfloat16, torch.float64], "width_in": [8, 5], "width_out": [8, 5],
        "dropout": [0.0, 0.5], "run": [4, 1], "ranks": [(8,) * 4, (4,) * 5, (8, 8, 8, 4)],
    }  # fmt: skip
    asked = {"name": [None, "segments", "dense"], "batch_invariant": [False, True]}
    usual = {name: values[0] for name, values in {**fields, **asked}.items()}
    alike = [{**usual, name: value} for name, values in {**fields, **asked}.items() for value in values]
    for change in (*alike, *reversed(alike)):
        given = problem(rows=16 // change["run"], slots=1, **{name: change[name] for name in fields})
        forced = change["name"] or change["batch_invariant"]
        with adapter_backend(change["name"], batch_invariant=change["batch_invariant"]) if forced else nullcontext():
            with torch.no_grad():
                assert torch.equal(*(lowrank(**{**given, "indices": i}) for i in (promised, indices))), change
            assert all(map(torch.equal, *(_gradients({**given, "indices": i}) for i in (promised, indices)))), change
    with pytest.raises(ValueError, match="indices run from 0 to 3"):
        lowrank(**{**problem(rows=16, slots=1, ranks=(8,) * 3), "indices": promised})


@pytest.mark.parametrize("backend", ["segments", "gathered"])
def test_what_is_derived_from_constant_indices_is_derived_once(backend) -> None:
    given = problem(rows=12, slots=2, weights=False, scale=False)
    promised = kernels.constant(given["indices"])
    with adapter_backend(backend), torch.no_grad():
        y = lowrank(**given)
        promised.fill_(0)  # breaks the promise: nobody looks
        assert torch.equal(lowrank(**given), y)
        assert not torch.equal(lowrank(**{**given, "indices": promised.clone()}), y)


@pytest.mark.parametrize("backend", BACKENDS)
def test_weights_may_be_computed(backend) -> None:
    """Not only leaves: a method may make its weights of others in each forward."""
    given = copied(problem())
    shared = torch.ones((), dtype=torch.float64, requires_grad=True)
    with adapter_backend(backend):
        lowrank(**{**given, "w_down": given["w_down"] * shared, "w_up": given["w_up"] + 0}).sum().backward()
    torch.testing.assert_close(shared.grad, (given["w_down"].grad * given["w_down"]).sum().detach())


# --- errors ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda g: {"act": "gleu"}, r"act='gleu'.*'gelu'"),
        (lambda g: {"ranks": [2, 2]}, r"w_down \(5, 4\).*ranks=\[2, 2\].*R = sum\(ranks\)"),
        (lambda g: {"w_up": g["w_up"][:, 1:]}, r"w_up \(3, 4\)"),
        (lambda g: {"x": g["x"][:, 1:]}, r"x \(5, 3\)"),
        (lambda g: {"x": g["x"].unsqueeze(0)}, r"x must be \(N, K\).*\(1, 5, 4\) and \(5, 2\)"),
        (lambda g: {"indices": g["indices"][1:]}, r"indices \(N, k\).*\(5, 4\) and \(4, 2\)"),
        (lambda g: {"weights": g["weights"][:, :1]}, r"weights must be \(5, 2\).*got \(5, 1\)"),
        (lambda g: {"weights": g["weights"][:, 0]}, r"weights must be \(5, 2\).*got \(5,\)"),
        (lambda g: {"indices": None, "weights": g["weights"][:, :1]}, r"weights must be \(5, 2\)"),
        (lambda g: {"scale": g["scale"][:1]}, r"scale must be \(2,\).*got \(1,\)"),
        (lambda g: {"base": g["base"][:1]}, r"base must be \(5, 3\).*got \(1, 3\)"),
        (lambda g: {"b_up": g["b_up"][0]}, r"b_up must be \(2, 3\).*got \(3,\)"),
        (lambda g: {"b_gate": g["b_down"]}, r"b_gate is given without w_gate"),
        (lambda g: {"base": None, "base_weight": g["scale"]}, r"base_weight must be \(5,\)"),
        (lambda g: {"base": None, "base_weight": g["x"][:, 0]}, r"base_weight is given without base"),
        (lambda g: {"dropout": 1.0}, r"dropout=1.0 must be at least 0 and less than 1"),
        (lambda g: {"dropout": 0.1}, r"dropout=0.1 needs a seed"),
        (lambda g: {"run": 2}, r"run=2 must be a positive divisor of the number of rows, 5"),
        (lambda g: {"indices": g["indices"] + 5}, r"indices run from 4 to 6; expected -1 .* to 1"),
        (lambda g: {"indices": g["indices"] - 1}, r"indices run from -2 to"),
    ],
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_arguments_that_do_not_fit_are_refused_by_every_backend(backend, change, message) -> None:
    given = problem()
    with adapter_backend(backend), pytest.raises(ValueError, match=message):
        lowrank(**{**given, **change(given)})


def test_package_exports_what_it_says() -> None:
    assert all(hasattr(kernels, name) for name in kernels.__all__)
    assert set(kernels.BACKENDS) == {"triton", "grouped", "segments", "gathered", "dense", "reference"}
