"""The choice of backend: the rule, the override, what refuses, and batch invariance."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from itertools import product

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from mixadapters.kernels import adapter_backend, backends, choose_backend, costs, lowrank, products
from mixadapters.kernels.problem import Problem


def arguments(rows=64, experts=8, rank=8, width=32, slots=1, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)

    def make(*shape):
        return torch.randn(*shape, generator=generator).to(dtype)

    return {
        "x": make(rows, width), "w_down": make(experts * rank, width), "w_up": make(width, experts * rank),
        "ranks": (rank,) * experts, "base": make(rows, width), "weights": make(rows, slots),
        "indices": torch.randint(0, experts, (rows, slots), generator=generator),
    }  # fmt: skip


def rule(rows, slots, experts, rank, dtype=torch.float32, **more):
    return choose_backend(rows, slots, experts, experts * rank, dtype, **more)


def test_backend_is_forced_inside_the_block_and_restored_after_errors() -> None:
    free = rule(10_000, 1, 64, 64)
    assert free != "dense"
    with adapter_backend("dense"):
        assert rule(10_000, 1, 64, 64) == "dense"
        with adapter_backend("reference"):
            assert rule(10_000, 1, 64, 64) == "reference"
        with adapter_backend(None):
            assert rule(10_000, 1, 64, 64) == "dense"
        assert rule(10_000, 1, 64, 64) == "dense"
    with pytest.raises(KeyError), adapter_backend("dense"):
        raise KeyError
    assert rule(10_000, 1, 64, 64) == free


def test_blocks_that_overlap_take_along_what_they_brought() -> None:
    """Those of generators and threads end in any order."""

    def forced(name: str | None, **more: bool) -> Iterator[None]:
        with adapter_backend(name, **more):
            yield

    first, second, again = forced("dense"), forced("gathered", batch_invariant=True), forced("dense")
    next(first)
    next(second)
    assert backends.settings() == ("gathered", True)
    first.close()
    assert backends.settings() == ("gathered", True)
    with pytest.raises(ValueError, match=r"backend='dense' with batch_invariant=True"):
        next(again)
    second.close()
    assert backends.settings() == ("", False)

    outer, inner = forced("dense"), forced("dense")  # equal, but not the same
    next(outer)
    with adapter_backend("reference"):
        next(inner)
        inner.close()
        assert backends.settings() == ("reference", False)
    outer.close()
    assert backends.settings() == ("", False)

    begun, ended = threading.Event(), threading.Event()

    def other() -> None:
        with adapter_backend("grouped"):
            begun.set()
            ended.wait(60)

    thread = threading.Thread(target=other)
    with adapter_backend("dense"):
        thread.start()
        assert begun.wait(60)
        assert backends.settings() == ("grouped", False)
    assert backends.settings() == ("grouped", False)
    ended.set()
    thread.join()
    assert backends.settings() == ("", False)


def test_unknown_backend_is_refused_with_the_choices() -> None:
    with pytest.raises(ValueError, match=r"backend='cutlass'.*segments.*dense.*reference"), adapter_backend("cutlass"):
        pass
    assert backends.settings() == ("", False)


@pytest.mark.parametrize("pays", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rule_prefers_one_product_unless_most_of_it_is_wasted(dtype, pays, monkeypatch) -> None:
    monkeypatch.setattr(products, "_PAYS", pays)
    for training in (False, True):
        more = {"dtype": dtype, "training": training}
        assert rule(2048, 4, 4, 64, **more) == "dense"  # every expert for every row
        assert rule(2048, 1, 64, 64, **more) != "dense"
        assert rule(10**5, 2, 64, 16, **more) in ("segments", "grouped")  # copies would outweigh the rows
        assert rule(8192, 1, 64, 16, run=128, **more) in ("segments", "gathered")  # nothing has to be sorted
    assert rule(8, 1, 64, 16) == "gathered"  # decoding
    assert rule(0, 2, 0, 0) == "dense"


def test_a_small_product_of_all_experts_is_taken_whatever_it_wastes_and_gives_the_same_bits_in_training() -> None:
    for training in (False, True):
        assert rule(16, 1, 64, 4, width=200, training=training) == "dense"
        assert rule(16, 1, 64, 4, width=1024, training=training) != "dense"
        assert rule(16, 1, 64, 4, width=200, training=True, layout_fixed=True) != "dense"
    given = arguments(rows=16)
    with torch.no_grad():
        without = lowrank(**given)
    assert torch.equal(lowrank(**given | {"w_up": given["w_up"].clone().requires_grad_()}), without)


def test_rule_asks_for_the_cheapest_of_what_the_call_is(monkeypatch) -> None:
    asked = []
    monkeypatch.setattr(costs, "cheapest", lambda *given: asked.append(given) or given[2][-1])
    monkeypatch.setattr(products, "_PAYS", True)
    assert rule(2048, 4, 4, 64) == "dense"  # every expert for every row
    assert not asked
    assert rule(512, 2, 8, 4, run=4, width=96) == "dense"
    assert asked.pop() == (costs.Shape(2, 8, 32, 96, 4, False, False, True), 512, costs.BACKENDS)
    rule(512, 2, 8, 4, dtype=torch.float16, training=True)
    assert asked.pop()[0] == costs.Shape(2, 8, 32, 1024, 1, True, True, False)
    with torch.no_grad():
        lowrank(**arguments(rows=640))
        assert asked.pop() == (costs.Shape(1, 8, 64, 32, 1, False, False, True), 640, costs.BACKENDS)
        lowrank(**arguments(rows=640) | {"w_up": torch.randn(96, 64), "base": torch.randn(640, 96)})
    assert asked.pop()[0].width == 64  # of 32 in and 96 out


def test_what_the_cheapest_refuse_goes_to_the_next_that_does_not(monkeypatch) -> None:
    """As on a GPU without triton; nobody is asked twice for a problem that it takes."""
    given = arguments(rows=1000)
    with adapter_backend("reference"):
        expected = lowrank(**given)
    asked = []
    monkeypatch.setattr(costs, "cheapest", lambda shape, rows, among: asked.append(among) or among[-1])
    monkeypatch.setattr(costs, "BACKENDS", ("segments", "grouped", "gathered"))
    for name in ("grouped", "gathered"):
        monkeypatch.setattr(backends.module(name), "refuses", lambda p: "not here")
    torch.testing.assert_close(lowrank(**given), expected)
    assert asked == [costs.BACKENDS, costs.BACKENDS[:2], costs.BACKENDS[:1]]


def test_rule_leaves_out_whom_it_is_told_to_as_the_operation_does() -> None:
    """Hidden rows of 24 bytes, which grouped_mm does not take."""
    usual = {"rows": 1024, "slots": 1, "experts": 16, "rank": 6, "width": 256}
    given = arguments(rows=1024, experts=16, rank=6, width=256)
    p = Problem(given["x"], given["w_down"], given["w_up"], given["ranks"], indices=given["indices"])
    assert backends.module("grouped").refuses(p) is not None
    assert rule(**usual) == "grouped"
    runs = backends.pick(p, "", len(p.x), training=False, layout_fixed=False)
    assert rule(**usual, refused=("grouped",)) == backends.name_of(runs) != "grouped"
    for wrong in ("dense", "groped"):
        with pytest.raises(ValueError, match=f"{wrong}.*is none of those that may refuse"):
            rule(**usual, refused=(wrong,))


@pytest.mark.parametrize("usual", ["dense", "segments"])
def test_refusals_do_not_change_what_is_kept(usual, monkeypatch) -> None:
    """Also where dense would be the next after what refuses."""
    ranked = (usual, "dense", "grouped", "gathered", "segments")
    monkeypatch.setattr(costs, "cheapest", lambda shape, rows, among: next(n for n in ranked if n in among))
    shape = costs.Shape(1, 8, 64, 32, 1, False, True, False)
    for refused in ((), ("segments",), ("segments", "grouped")):
        for rows in (0, 16, costs.USUAL_ROWS):
            chosen = backends._by_costs(shape, rows, True, refused)
            assert (chosen == "dense") is (usual == "dense")


@pytest.mark.parametrize("name", ["dense", "segments", "gathered"])
def test_a_block_around_backward_alone_changes_nothing(name) -> None:
    """It runs by what has run forward, whose kept tensors another backend would misread."""

    def gradient(block: str | None) -> torch.Tensor:
        given = arguments(rows=600, experts=64)
        x = given["x"].requires_grad_()
        with FlopCounterMode(display=False):  # which looks on, so that nobody notes who ran
            y = lowrank(**given)
        with adapter_backend(block), FlopCounterMode(display=False):
            y.square().sum().backward()
        return x.grad

    assert torch.equal(gradient(name), gradient(None))


def test_rule_knows_what_is_kept_for_backward_without_the_number_of_rows() -> None:
    """A compiled graph has one layout of the kept tensors for every number of rows."""
    for slots in (1, 2, 8):
        for experts in (1, 2, 8, 64):
            for rank in (4, 16, 128):
                for run in (1, 16):
                    kept = {
                        rule(rows, slots, experts, rank, run=run, training=True, layout_fixed=True) == "dense"
                        for rows in (0, 1, 16, 256, 4096, 10**5)
                    }
                    assert len(kept) == 1


@pytest.mark.parametrize("looked_at", [False, True])
def test_backward_is_that_of_the_backend_that_ran_whoever_looks_on(looked_at, monkeypatch) -> None:
    """With nobody to look on the choice knows the number of rows, which a graph's does not; backward takes it over."""
    given, ran = arguments(rows=16), []
    monkeypatch.setattr(costs, "cheapest", lambda *_: "gathered")

    def watched(name: str, way: str) -> Callable[..., object]:
        original = getattr(backends.module(name), way)
        return lambda *args: ran.append(f"{name}.{way}") or original(*args)

    for name, way in product(("dense", "gathered"), ("forward", "backward")):
        monkeypatch.setattr(backends.module(name), way, watched(name, way))
    x = given["x"].clone().requires_grad_()
    with FlopCounterMode(display=False) if looked_at else nullcontext():
        y = lowrank(**given | {"x": x})
    y.sum().backward()  # with nobody to look on
    chosen = "gathered" if looked_at else "dense"
    assert ran == [f"{chosen}.forward", f"{chosen}.backward"]


def test_choice_is_logged_once(caplog, monkeypatch) -> None:
    monkeypatch.setattr(backends, "_announced", set())
    with caplog.at_level(logging.INFO, logger=backends.logger.name):
        for _ in range(3):
            lowrank(**{**arguments(), "indices": None, "weights": None})
    assert [r.getMessage().split(" (")[0] for r in caplog.records] == ["adapters run by the dense backend"]
    assert "adapter_backend" in caplog.records[0].getMessage()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"width": 30}, r"multiples of 16 bytes, and K=30, M=30 in torch.float32"),
        ({"rank": 6}, r"multiples of 16 bytes, and rank=6"),
        ({"dtype": torch.float64}, r"knows no torch.float64"),
    ],
)
def test_a_forced_backend_that_cannot_run_says_why(change, reason) -> None:
    with adapter_backend("grouped"), pytest.raises(ValueError, match=rf"backend='grouped' cannot run this.*{reason}"):
        lowrank(**arguments(**change))


def test_grouped_refuses_experts_of_several_ranks() -> None:
    given = {**arguments(experts=2), "ranks": (4, 12)}
    with adapter_backend("grouped"), pytest.raises(ValueError, match=r"one rank, and the ranks are \[4, 12\]"):
        lowrank(**given)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("slots", "run"), [(1, 1), (2, 1), (1, 10)])
def test_batch_invariant_rows_are_the_same_alone_and_in_any_batch(dtype, slots, run) -> None:
    given = arguments(rows=130, slots=slots, dtype=dtype)
    given["indices"] = given["indices"][::run].repeat_interleave(run, 0)
    with adapter_backend(batch_invariant=True), torch.no_grad():
        together = lowrank(**given, run=run)
        for part in (slice(0, 1), slice(3, 5), slice(7, 70), slice(100, 130)):
            fields = {name: given[name][part] for name in ("x", "base", "weights", "indices")}
            assert torch.equal(lowrank(**{**given, **fields}), together[part])
    with adapter_backend("reference"):
        expected = lowrank(**given)
    torch.testing.assert_close(together, expected, atol=0.3 if dtype is torch.bfloat16 else 1e-4, rtol=1e-2)


@pytest.mark.parametrize("backend", ["segments", "grouped", "dense", "reference"])
def test_batch_invariance_is_refused_by_backends_that_cannot_promise_it(backend) -> None:
    message = rf"backend='{backend}' with batch_invariant=True.*'gathered'"
    with pytest.raises(ValueError, match=message), adapter_backend(backend, batch_invariant=True):
        pass
    inside = adapter_backend(backend)
    with adapter_backend(batch_invariant=True), pytest.raises(ValueError, match=message), inside:
        pass
    assert backends.settings() == ("", False)


def test_a_cpu_never_asks_for_triton(monkeypatch) -> None:
    asked = []
    monkeypatch.setattr(backends, "_has_triton", lambda: asked.append(1))
    lowrank(**arguments())
    assert not asked
