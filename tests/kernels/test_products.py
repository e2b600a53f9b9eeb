"""Products by oneDNN and by torch against double precision, whatever the strides and the number of rows."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mixadapters.kernels import adapter_backend, lowrank, products

SIZES = (8, 4)  # of blocks, so that few rows make many of them
STRIDES = ("rows", "columns", "wide", "tall", "offset", "step", "expanded")

needs_onednn = pytest.mark.skipif(
    products._OPERATOR is None or not torch.backends.mkldnn.is_available(), reason="torch has no such operator"
)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """oneDNN wherever the operator exists, from small products on."""
    monkeypatch.setattr(products, "_PAYS", products._OPERATOR is not None and torch.backends.mkldnn.is_available())
    monkeypatch.setattr(products, "SIZES", SIZES)
    monkeypatch.setattr(products, "LEAST", 40 / torch.get_num_threads())
    monkeypatch.setattr(products, "LEAST_INNER", 3)


@pytest.fixture
def calls(monkeypatch):
    """The shapes that went to oneDNN."""
    shapes: list[tuple[int, int, int]] = []
    multiply = products._multiply

    def counted(a, b):
        shapes.append((*a.shape, b.shape[1]))
        return multiply(a, b)

    monkeypatch.setattr(products, "_multiply", counted)
    return shapes


def matrix(
    rows: int, columns: int, strides: str = "rows", seed: int = 0, dtype: torch.dtype = torch.float32
) -> Tensor:
    generator = torch.Generator().manual_seed(seed)

    def make(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    if strides == "columns":
        return make(columns, rows).t()
    if strides == "wide":
        return make(rows, columns + 5)[:, :columns]
    if strides == "tall":
        return make(columns, rows + 3)[:, :rows].t()
    if strides == "offset":
        return make(rows * columns + 1)[1:].view(rows, columns)
    if strides == "step":
        return make(rows, 2 * columns)[:, ::2]
    if strides == "expanded":
        return make(1, columns).expand(rows, columns)
    return make(rows, columns)


def check(found: Tensor, a: Tensor, b: Tensor, plus: Tensor | float = 0.0) -> None:
    torch.testing.assert_close(found.double(), a.double() @ b.double() + plus, rtol=1e-5, atol=1e-4)
    assert found.shape == (a.shape[0], b.shape[1])


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    rows=st.one_of(st.integers(0, 5), st.integers(0, 40)), inner=st.integers(0, 12), columns=st.integers(0, 12),
    strides=st.tuples(*[st.sampled_from(STRIDES)] * 4), base=st.sampled_from(["none", "bias", "base", "out"]),
    into=st.booleans(),
)  # fmt: skip
def test_mm_is_the_product_plus_its_base(rows, inner, columns, strides, base, into) -> None:
    a, b = matrix(rows, inner, strides[0]), matrix(inner, columns, strides[1], seed=1)
    room = matrix(rows, columns, "rows" if strides[2] == "expanded" else strides[2], seed=2)  # expanded: no room
    plus = {
        "none": None, "bias": matrix(1, columns, seed=3)[0], "base": matrix(rows, columns, strides[3], seed=3),
        "out": room,
    }[base]  # fmt: skip
    out = room if into or base == "out" else None
    added = 0.0 if plus is None else plus.double()  # a copy, of what may be overwritten
    found = products.mm(a, b, plus, out=out)
    check(found, a, b, added)
    assert out is None or found is out


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    rows=st.one_of(st.integers(0, 5), st.integers(0, 40)), width=st.integers(1, 12), columns=st.integers(1, 12),
    strides=st.tuples(*[st.sampled_from(STRIDES)] * 3), add=st.booleans(),
)  # fmt: skip
def test_outer_is_the_sum_over_rows(rows, width, columns, strides, add) -> None:
    a, b = matrix(rows, width, strides[0]), matrix(rows, columns, strides[1], seed=1)
    total = matrix(width, columns, "rows" if strides[2] == "expanded" else strides[2], seed=2) if add else None
    before = 0.0 if total is None else total.double()
    found = products.outer(a, b, total)
    check(found, a.t(), b, before)
    assert total is None or found is total


@needs_onednn
@pytest.mark.parametrize(
    ("rows", "inner", "columns", "expected"),
    [
        (3, 4, 4, []),  # no block
        (4, 4, 2, []),  # too small
        (4, 2, 9, []),  # too narrow
        (4, 4, 3, [4]),
        (20, 4, 3, [8, 8, 4]),
        (20, 4, 2, [8, 8]),  # a block of 8 pays, one of 4 does not
        (21, 4, 3, [8, 8]),  # nor do these where rows are left over
        (21, 4, 5, [8, 8, 4]),
    ],
)
def test_rows_go_to_onednn_in_blocks_that_pay(rows, inner, columns, expected, calls) -> None:
    a, b = matrix(rows, inner), matrix(inner, columns, seed=1)
    check(products.mm(a, b), a, b)
    assert calls == [(size, inner, columns) for size in expected]


@needs_onednn
def test_few_shapes_reach_onednn_however_many_rows_there_are(calls) -> None:
    for rows in range(50):
        products.mm(matrix(rows, 16), matrix(16, 8))
        products.outer(matrix(rows, 16), matrix(rows, 8))
    assert set(calls) == {(8, 16, 8), (4, 16, 8), (16, 8, 8), (16, 4, 8)}


@needs_onednn
def test_more_threads_ask_for_larger_blocks(calls, monkeypatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 10**6)
    check(products.mm(matrix(8, 4), matrix(4, 4)), matrix(8, 4), matrix(4, 4))
    assert not calls


def everything(a: Tensor, b: Tensor, c: Tensor) -> list[Tensor]:
    return [products.mm(a, b), products.mm(a, b, c), products.outer(a, c), products.outer(a, c, b.clone())]


@needs_onednn
@pytest.mark.filterwarnings("ignore:TF32")  # `flags` sets that of Intel's GPUs as well
@pytest.mark.parametrize("without", ["flag", "operator", "processor", "float64", "bfloat16"])
def test_without_onednn_torch_multiplies(without, calls, monkeypatch) -> None:
    dtype = getattr(torch, without, torch.float32) if without.endswith(("64", "16")) else torch.float32
    a, b, c = (matrix(*s, seed=n, dtype=dtype) for n, s in enumerate([(21, 9), (9, 7), (21, 7)]))
    by_onednn = everything(a, b, c)
    assert bool(calls) == (dtype == torch.float32)
    calls.clear()
    if without == "flag":
        with torch.backends.mkldnn.flags(enabled=False):
            found = everything(a, b, c)
    else:
        monkeypatch.setattr(products, "_PAYS", False)
        if without == "operator":
            monkeypatch.setattr(products, "_OPERATOR", None)
        found = everything(a, b, c)
    assert not calls
    for one, other in zip(found, by_onednn, strict=True):
        torch.testing.assert_close(one, other)
    plain = [torch.mm(a, b), torch.addmm(c, a, b), torch.mm(a.t(), c), torch.addmm(b, a.t(), c)]
    for one, other in zip(found, plain, strict=True):
        assert torch.equal(one, other)


def test_module_loads_where_torch_lacks_the_operator(monkeypatch) -> None:
    class Empty:
        pass

    monkeypatch.setattr(torch.ops, "mkldnn", Empty())
    spec = importlib.util.spec_from_file_location("products_elsewhere", products.__file__)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert not module._PAYS
    a, b = matrix(2048, 64), matrix(64, 64, seed=1)
    assert torch.equal(module.mm(a, b), torch.mm(a, b))


def test_repeats_have_the_same_bits() -> None:
    a, b, c = matrix(37, 9), matrix(9, 7, seed=1), matrix(37, 7, seed=2)
    first = everything(a, b, c)
    for _ in range(5):
        for one, other in zip(everything(a, b, c), first, strict=True):
            assert torch.equal(one, other)


def test_what_is_no_number_goes_where_torch_puts_it() -> None:
    a, b = matrix(20, 8), matrix(8, 6, seed=1)
    a[1, 2], a[9, 3], a[17, 4], b[5, 1] = float("nan"), float("inf"), float("-inf"), float("nan")
    torch.testing.assert_close(products.mm(a, b), torch.mm(a, b), equal_nan=True)
    torch.testing.assert_close(products.outer(a, a), torch.mm(a.t(), a), equal_nan=True)


@needs_onednn
@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
def test_precision_is_not_below_that_of_torch(precision) -> None:
    before = torch.get_float32_matmul_precision()
    a, b = matrix(64, 256), matrix(256, 32, seed=1)
    exact = a.double() @ b.double()
    try:
        torch.set_float32_matmul_precision(precision)
        error, allowed = ((found - exact).norm() for found in (products.mm(a, b), torch.mm(a, b)))
    finally:
        torch.set_float32_matmul_precision(before)
    assert error <= 3 * allowed


@needs_onednn
@pytest.mark.parametrize("pays", [True, False], ids=["oneDNN", "torch"])
@pytest.mark.parametrize("backend", ["dense", "segments"])
@pytest.mark.parametrize("covered", [True, False], ids=["all rows have an expert", "some have none"])
def test_backends_compute_the_same_by_it_and_without(backend, covered, pays, calls, monkeypatch) -> None:
    monkeypatch.setattr(products, "_PAYS", pays)
    run, ranks = 9, (4, 4, 5)
    owners = torch.tensor([1, 0, 2, 1] if covered else [1, -1, 2, 1])
    indices = owners.repeat_interleave(run).unsqueeze(1)

    def compute(dtype: torch.dtype, name: str) -> list[Tensor]:
        leaves = [matrix(36, 16, seed=1), matrix(13, 16, seed=2), matrix(13, 12, seed=3).t(), matrix(36, 12, seed=4)]
        x, down, up, base = leaves = [leaf.to(dtype).requires_grad_() for leaf in leaves]
        with adapter_backend(name):
            y = lowrank(x, down, up, ranks, indices=indices, base=base, run=run)
        return [y, *torch.autograd.grad(y, leaves, matrix(36, 12, seed=5).to(dtype))]

    found = compute(torch.float32, backend)
    assert bool(calls) == pays
    for one, other in zip(found, compute(torch.float64, "reference"), strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=1e-4)
    none = indices[:, 0] < 0
    assert torch.equal(found[0][none], matrix(36, 12, seed=4)[none])
