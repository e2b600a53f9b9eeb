"""Every Triton kernel against a loop in fp64: output and all gradients, and what an interpreter would hide."""

from __future__ import annotations

import inspect
from functools import lru_cache, partial

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from mixadapters.kernels import ACTIVATIONS, adapter_backend, hashing, lowrank
from mixadapters.kernels.problem import Problem
from mixadapters.kernels.triton import backward, configs, forward, keeps, kernels, refuses
from mixadapters.kernels.triton.launch import record
from mixadapters.kernels.triton.plan import plan

FIELDS = ("x", "down", "up", "b_down", "b_up", "gate", "b_gate", "weights", "scale")
TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 2e-2, torch.float16: 3e-3}


def problem(
    rows=53, wide=(72, 60), ranks=(8, 3, 16, 5), slots=None, run=1, seed=0, dtype=torch.float32,
    without=("gate", "b_gate"), **rest,
) -> Problem:  # fmt: skip
    """Every field is there unless named in `without`; weights are fp32 whatever the dtype of x."""
    g = torch.Generator().manual_seed(seed)
    randn, total, num = partial(torch.randn, generator=g), sum(ranks), len(ranks)
    k, m = wide
    indices = None
    if slots is not None:
        indices = torch.randint(-1, num, (rows // run, slots), generator=g).repeat_interleave(run, 0)
    fields = {
        "x": randn(rows, k).to(dtype),
        "down": randn(total, k) / k**0.5,
        "up": randn(m, total) / max(ranks) ** 0.5,
        "b_down": randn(total),
        "b_up": randn(num, m),
        "gate": randn(total, k) / k**0.5,
        "b_gate": randn(total),
        "weights": torch.rand(rows, num if slots is None else slots, generator=g),
        "scale": torch.rand(num, generator=g) + 0.5,
        "base": randn(rows, m).to(dtype),
        "base_weight": torch.rand(rows, generator=g),
    }
    fields = {name: tensor for name, tensor in fields.items() if name not in without}
    return Problem(**fields, indices=indices, ranks=tuple(ranks), run=run, **{"act": "gelu", **rest})


def by_loop(p: Problem) -> Tensor:
    """The definition, expert by expert."""
    x = p.x
    if p.dropout:
        x = x * hashing.kept(p.seed, torch.arange(len(x)), x.shape[1], p.dropout) / (1 - p.dropout)
    y = x.new_zeros(len(x), len(p.up)) if p.base is None else p.base
    if p.base is not None and p.base_weight is not None:
        y = y * p.base_weight[:, None]
    start = 0
    for e, rank in enumerate(p.ranks):
        part = slice(start, start := start + rank)
        h = x @ p.down[part].T + (0 if p.b_down is None else p.b_down[part])
        if p.gate is None:
            h = ACTIVATIONS[p.act](h)
        else:
            h = ACTIVATIONS[p.act](x @ p.gate[part].T + (0 if p.b_gate is None else p.b_gate[part])) * h
        out = h @ p.up[:, part].T + (0 if p.b_up is None else p.b_up[e])
        if p.indices is None:
            weight = x.new_ones(len(x)) if p.weights is None else p.weights[:, e]
        else:
            hit = (p.indices == e).to(x.dtype)
            weight = (hit if p.weights is None else hit * p.weights).sum(1)
        y = y + out * weight[:, None] * (1 if p.scale is None else p.scale[e])
    return y


def in_fp64(p: Problem, grad: Tensor) -> dict[str, Tensor]:
    fields = {name: getattr(p, name) for name in (*FIELDS, "base", "base_weight")}
    leaves = {name: t.double().requires_grad_() for name, t in fields.items() if t is not None}
    y = by_loop(p._replace(**leaves))
    asked = [name for name in FIELDS if name in leaves]
    gradients = torch.autograd.grad(y, [leaves[name] for name in asked], grad.double(), materialize_grads=True)
    return {"y": y.detach(), **dict(zip(asked, gradients, strict=True))}


def by_kernels(p: Problem, grad: Tensor) -> dict[str, Tensor]:
    y, kept = forward(p, True)
    asked = frozenset(name for name in FIELDS if getattr(p, name) is not None)
    return {"y": y, **backward(p, kept, grad, asked)}


def output_gradient(p: Problem) -> Tensor:
    g = torch.Generator().manual_seed(1)
    return torch.randn(len(p.x), len(p.up), generator=g).to(p.x.dtype if p.base is None else p.base.dtype)


def assert_close(p: Problem, tolerance: float | None = None) -> None:
    grad = output_gradient(p)
    expected, found = in_fp64(p, grad), by_kernels(p, grad)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        field = getattr(p, name, None)
        if field is not None:
            assert found[name].dtype == field.dtype, name
            assert found[name].shape == field.shape, name
        error = (found[name].double() - value).abs().max() / max(1.0, value.abs().max().item())
        assert error < (tolerance or TOLERANCE[p.x.dtype]), (name, error.item())  # NaN fails too


WIDE = (128, 100, 90, 60)  # ranks that no single program holds
PLAIN = ("gate", "b_gate", "b_down", "b_up", "weights", "base_weight")
CASES = {
    "all": {},
    "all, gated": {"without": ()},
    "all, without weights": {"without": ("gate", "b_gate", "weights", "scale", "base")},
    "all, two windows": {"ranks": WIDE, "rows": 40},
    "all, two windows, gated": {"ranks": WIDE, "rows": 33, "without": ()},
    "runs": {"slots": 1, "run": 32, "rows": 160},
    "runs, lora": {"slots": 1, "run": 40, "rows": 160, "without": PLAIN, "act": "identity"},
    "runs, top 2": {"slots": 2, "run": 16, "rows": 48, "ranks": (200, 190, 180), "without": ()},
    "sorted": {"slots": 1, "ranks": WIDE, "rows": 150, "without": PLAIN},
    "sorted, top 2, gated": {"slots": 2, "ranks": (200, 190, 180), "rows": 40, "without": ()},
    "sorted, top 2": {"slots": 2},
    "sorted, invariant": {"slots": 1, "rows": 70, "batch_invariant": True},
    "one expert": {"ranks": (20,), "slots": 1},
}
MODES = {name: CASES[name] for name in ("all", "all, two windows", "runs", "runs, top 2", "sorted, top 2, gated")}


@pytest.mark.parametrize("case", CASES)
def test_output_and_gradients_are_those_of_the_loop(case):
    p = problem(**CASES[case])
    assert plan(p, training=True).mode == case.split(",")[0].replace("one expert", "sorted")
    assert_close(p)


@pytest.mark.parametrize("case", ["all, gated", "all, two windows", "runs", "sorted, top 2, gated"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_over_fp32_weights(case, dtype):
    assert_close(problem(**CASES[case], dtype=dtype))


def test_half_precision_weights():
    p = problem(dtype=torch.bfloat16)
    halves = {name: getattr(p, name).bfloat16() for name in FIELDS if getattr(p, name) is not None}
    assert_close(p._replace(**halves))


@pytest.mark.parametrize("act", ACTIVATIONS)
@pytest.mark.parametrize("gated", [False, True])
def test_every_activation(act, gated):
    assert_close(problem(rows=30, act=act, without=() if gated else ("gate", "b_gate")))


@pytest.mark.parametrize("rows", [1, 31, 33])
@pytest.mark.parametrize("wide", [(1, 1), (17, 130), (130, 17)])
def test_ragged_sizes(rows, wide):
    assert_close(problem(rows=rows, wide=wide, ranks=(1, 2, 7), slots=2))


@pytest.mark.parametrize("ranks", [(1,), (129,), (256,), (16, 16), (7, 129, 1)])
def test_every_rank(ranks):
    assert_close(problem(rows=20, ranks=ranks))


def test_dropout_drops_what_the_hash_says():
    p = problem(dropout=0.4, seed=3, without=())
    p = p._replace(seed=torch.tensor((5 << 32) + 0xDEADBEEF))
    assert_close(p)
    with_other_seed = forward(p._replace(seed=torch.tensor(7)), False)[0]
    assert not torch.equal(forward(p, False)[0], with_other_seed)


@pytest.mark.parametrize("case", ["runs", "sorted"])
def test_dropout_counts_rows_as_x_does(case):
    assert_close(problem(**CASES[case], dropout=0.3)._replace(seed=torch.tensor(-9)))


def test_a_seed_without_dropout_drops_nothing():
    p = problem()
    assert torch.equal(forward(p, False)[0], forward(p._replace(seed=torch.tensor(1)), False)[0])


@pytest.mark.parametrize("case", MODES)
def test_program_order_changes_no_bit(case, shuffled):
    p = problem(**MODES[case])
    grad = output_gradient(p)
    expected = by_kernels(p, grad)
    for seed in (1, 2):
        with shuffled(seed):
            found = by_kernels(p, grad)
        for name, value in expected.items():
            assert torch.equal(found[name], value), name


@pytest.mark.parametrize("case", [{"ranks": (4,)}, {"ranks": (4, 3), "slots": 1, "run": 256, "rows": 512}])
def test_weight_gradients_summed_in_parts(case, shuffled):
    p = problem(**{"rows": 256, "wide": (16, 16), **case})
    with record("cpu") as launches:
        by_kernels(p, output_gradient(p))
    assert [launch.grid[2] for launch in launches if launch.kernel is kernels.wgrad] == [2, 2, 2]
    with shuffled(1):
        assert_close(p)


@pytest.mark.parametrize("case", CASES)
def test_all_is_written_and_nothing_else(case, guarded):
    p = problem(**CASES[case])
    # By design some workspace stays unwritten: none of it may reach a result.
    for name, value in by_kernels(p, output_gradient(p)).items():
        assert value.isfinite().all(), name


@pytest.mark.parametrize("case", ["sorted, top 2", "runs", "sorted", "sorted, top 2, gated"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_without_expert_are_their_base_bit_for_bit(case, dtype):
    p = problem(**{**CASES[case], "dtype": dtype, "without": ("gate", "b_gate", "base_weight")})
    rows = slice(32, 64) if p.run > 1 else slice(10, 30)
    p.indices[rows] = -1
    p.base[rows, :3] = -0.0
    y = forward(p, False)[0]
    bits = torch.int32 if dtype == torch.float32 else torch.int16
    none = (p.indices == -1).all(1)
    assert none.sum() >= 16
    assert torch.equal(y[none].view(bits), p.base[none].view(bits))
    assert not torch.equal(y[~none], p.base[~none])


@pytest.mark.parametrize("case", ["runs", "sorted"])
def test_nobody_chose_an_expert(case):
    p = problem(**CASES[case])
    p.indices.fill_(-1)
    assert_close(p)


ROUTED = ["sorted, top 2", "runs", "sorted", "runs, top 2", "one expert"]


@lru_cache(maxsize=len(ROUTED))
def unbroken(case: str) -> tuple[Problem, Tensor, dict[str, Tensor]]:
    """A problem, the gradient of its output, and what the kernels, which take long here, make of them."""
    p = problem(**{**CASES[case], "without": ("gate", "b_gate")})
    grad = output_gradient(p)
    return p, grad, by_kernels(p, grad)


def expert_part(p: Problem, name: str, tensor: Tensor, e: int) -> Tensor:
    columns = slice(sum(p.ranks[:e]), sum(p.ranks[: e + 1]))
    if name in ("b_up", "scale"):
        return tensor[e : e + 1]
    return tensor[:, columns] if name == "up" else tensor[columns]


def assert_untouched(p: Problem, clean: dict[str, Tensor], found: dict[str, Tensor], rows: Tensor, experts: set[int]):
    """Rows (N,) and experts that have nothing to do with what is broken have the bits that they had before."""
    for name, value in clean.items():
        if name in ("y", "x"):
            assert torch.equal(found[name][rows], value[rows]), name
        elif name == "weights":
            own = rows.unsqueeze(1).expand_as(value)
            assert torch.equal(found[name][own], value[own]), name
        else:
            for e in experts:
                assert torch.equal(*(expert_part(p, name, t, e) for t in (found[name], value))), (name, e)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of 0 * inf
@pytest.mark.parametrize("case", ROUTED)
@pytest.mark.parametrize("name", ["down", "up", "b_down", "b_up", "scale"])
def test_a_broken_expert_touches_only_the_rows_that_chose_it(case, name):
    p, grad, clean = unbroken(case)
    broken, damaged = int(p.indices.max()), getattr(p, name).clone()
    expert_part(p, name, damaged, broken).fill_(float("inf"))
    found = by_kernels(p._replace(**{name: damaged}), grad)
    apart = (p.indices != broken).all(1)
    touched = {broken, *p.indices[~apart].flatten().tolist()}
    assert apart.any()
    assert not found["y"][~apart].isfinite().all()
    assert_untouched(p, clean, found, apart, set(range(len(p.ranks))) - touched)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("case", ROUTED)
@pytest.mark.parametrize("name", ["x", "gradient", "base", "weights"])
def test_a_broken_row_touches_only_the_experts_that_it_chose(case, name):
    p, grad, clean = unbroken(case)
    for row in (0, len(p.x) - 1):
        broken = (grad if name == "gradient" else getattr(p, name)).clone()
        broken[row] = float("nan")
        found = by_kernels(p, broken) if name == "gradient" else by_kernels(p._replace(**{name: broken}), grad)
        others = torch.arange(len(p.x)) != row
        assert_untouched(p, clean, found, others, set(range(len(p.ranks))) - set(p.indices[row].tolist()))


def test_experts_that_nobody_chose_get_gradients_of_zero():
    for case in ("sorted, top 2", "runs", "sorted"):
        p = problem(**CASES[case])
        p.indices[p.indices == 1] = 0
        found = by_kernels(p, output_gradient(p))
        part = slice(p.ranks[0], p.ranks[0] + p.ranks[1])
        assert not found["down"][part].any()
        assert not found["up"][:, part].any()


@pytest.mark.parametrize("case", ["runs, top 2", "sorted, top 2"])
def test_shares_of_processes_add_up_to_the_whole(case):
    """Experts of other processes are -1 to each; the gradients add up as the outputs do."""
    p = problem(**{**CASES[case], "rows": 32, "without": ("gate", "b_gate", "base", "base_weight")})
    grad = output_gradient(p)
    whole, total = by_kernels(p, grad), {}
    for e in range(len(p.ranks)):
        own = {name: expert_part(p, name, getattr(p, name), e) for name in ("down", "up", "b_down", "b_up", "scale")}
        indices = torch.where(p.indices == e, 0, -1)
        share = by_kernels(p._replace(indices=indices, ranks=(p.ranks[e],), **own), grad)
        for name in ("y", "x", "weights"):
            total[name] = total.get(name, 0) + share[name]
        for name in own:
            expected = expert_part(p, name, whole[name], e)
            torch.testing.assert_close(share[name], expected, rtol=1e-4, atol=1e-4)
    for name, value in total.items():
        torch.testing.assert_close(value, whole[name], rtol=1e-4, atol=1e-4)


def test_no_rows():
    p = problem(rows=0)
    found = by_kernels(p, output_gradient(p))
    assert found["y"].shape == (0, 60)
    assert not any(value.any() for value in found.values())


def test_layouts():
    p = problem(slots=2)
    wide = torch.zeros(53, 100)
    wide[:, 5:77] = p.x
    arena = torch.cat([p.up.t(), p.up.t()])
    stacked = torch.stack([p.down, p.down], dim=2)
    q = p._replace(
        x=wide[:, 5:77], up=arena[:32].t(), down=stacked[..., 0], base=p.base.t().contiguous().t(),
        weights=p.weights.t().contiguous().t(), indices=p.indices.to(torch.int32).t().contiguous().t(),
    )  # fmt: skip
    grad = output_gradient(p)
    expected, found = by_kernels(p, grad), by_kernels(q, grad)
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


@pytest.mark.parametrize("case", ["all, gated", "sorted, top 2, gated"])
def test_gradients_do_not_depend_on_which_are_asked_for(case):
    p = problem(**CASES[case])
    grad = output_gradient(p)
    together = by_kernels(p, grad)
    _, kept = forward(p, True)
    for name in FIELDS:
        alone = backward(p, kept, grad, frozenset([name]))
        assert alone.keys() == {name}
        assert torch.equal(alone[name], together[name]), name


@pytest.mark.parametrize("case", CASES)
def test_kept_is_what_keeps_says(case):
    p = problem(**CASES[case])
    y, kept = forward(p, True)
    assert [(t.shape, t.dtype) for t in kept] == [(t.shape, t.dtype) for t in keeps(p)]
    without, nothing = forward(p, False)
    assert nothing == ()
    torch.testing.assert_close(without, y, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize(("slots", "ranks"), [(1, (8, 8, 8, 8)), (2, (8, 8, 8, 8)), (3, WIDE), (1, WIDE)])
def test_decoding_steps(slots, ranks):
    p = problem(rows=5, slots=slots, ranks=ranks, wide=(300, 70), without=("gate", "b_gate", "base_weight"))
    y, expected = forward(p, False)[0], in_fp64(p, output_gradient(p))["y"]
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("slots", [None, 1, 2])
@pytest.mark.parametrize("ranks", [(8, 3, 16, 5), WIDE])
def test_batch_invariant_rows_do_not_depend_on_the_others(slots, ranks, rowwise):
    p = problem(rows=70, slots=slots, ranks=ranks, wide=(300, 70), batch_invariant=True)
    y = forward(p, False)[0]
    for rows in (slice(0, 1), slice(3, 40)):
        q = p._replace(**{n: getattr(p, n)[rows] for n in ("x", "weights", "base", "base_weight")})
        q = q if slots is None else q._replace(indices=p.indices[rows])
        assert torch.equal(forward(q, False)[0], y[rows])


def test_the_operation_by_this_backend():
    p = problem(slots=2, without=())
    leaves = {name: getattr(p, name).clone().requires_grad_() for name in (*FIELDS, "base", "base_weight")}

    def run(name: str) -> tuple[Tensor, ...]:
        fields = dict(leaves)
        x, down, up, gate = (fields.pop(n) for n in ("x", "down", "up", "gate"))
        with adapter_backend(name):
            y = lowrank(
                x, down, up, p.ranks, w_gate=gate, indices=p.indices, act="gelu", dropout=0.2,
                seed=torch.tensor(3), **fields,
            )  # fmt: skip
        return y, *torch.autograd.grad(y.square().sum(), list(leaves.values()))

    for found, expected in zip(run("triton"), run("reference"), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_refusals_say_why(monkeypatch):
    p = problem()
    assert refuses(p) is None
    assert "float64" in refuses(p._replace(x=p.x.double()))
    assert "257" in refuses(problem(ranks=(257,)))
    assert "60 elements apart" in refuses(p._replace(x=torch.zeros(72, 60).t()))
    assert "run=2" in refuses(p._replace(run=2))
    monkeypatch.delenv("TRITON_INTERPRET")
    assert "on cpu" in refuses(p)


def test_recorded_launches_are_not_made():
    p = problem(slots=1, ranks=WIDE)
    with record("sm_90") as launches:
        y, kept = forward(p._replace(x=p.x.to("meta"), base=p.base.to("meta")), True)
    assert y.is_meta
    assert all(t.is_meta for t in kept[:1])
    assert [launch.kernel for launch in launches] == [kernels.shrink, kernels.expand]


@pytest.mark.parametrize("case", ["all, gated", "runs", "sorted, top 2, gated"])
def test_fake_tensors_tell_what_is_kept(case):
    p = problem(**CASES[case])
    with FakeTensorMode() as mode:
        fields = {name: getattr(p, name) for name in (*FIELDS, "base", "base_weight", "indices")}
        fake = p._replace(**{name: None if t is None else mode.from_tensor(t) for name, t in fields.items()})
        told = keeps(fake)
    assert [(t.shape, t.dtype) for t in told] == [(t.shape, t.dtype) for t in forward(p, True)[1]]


def test_there_are_no_atomics():
    assert "atomic_" not in inspect.getsource(kernels)


@pytest.mark.parametrize("kernel", ["shrink", "expand", "expand_back", "wgrad"])
@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_tiles_of_every_architecture(kernel, arch):
    for dtype in (torch.float32, torch.bfloat16):
        for hidden in (1, 16, 17, 100, 256):
            for rows in (None, 1, 16, 8192):
                tiles = configs.tiles(kernel, arch, dtype, hidden, rows, 768)
                assert all(size >= 16 and size & (size - 1) == 0 for size in tiles[:3])
                assert tiles.hidden >= hidden or kernel == "wgrad"
    for programs in (1, 7, 10_000):
        parts = configs.parts(kernel, arch, programs, 24)
        assert 1 <= parts <= 24
        assert parts & (parts - 1) == 0
