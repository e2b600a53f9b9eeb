"""What calls are expected to cost: what is counted, the table, and who is the cheapest."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from mixadapters.kernels import backends, costs
from mixadapters.kernels.problem import Problem

EVERY = list(product(costs.BACKENDS, (False, True), (False, True)))  # backend, half precision, training


def shape(slots=1, experts=8, rank=16, width=512, run=1, half=False, training=False, onednn=False) -> costs.Shape:
    return costs.Shape(slots, experts, experts * rank, width, run, half, training, onednn)


def problem(rows: int, of: costs.Shape) -> Problem:
    """Every expert is chosen as often as any other."""
    indices = torch.arange(rows // of.run * of.slots).view(-1, of.slots).remainder(of.experts)
    return Problem(
        torch.randn(rows, of.width), torch.randn(of.total_rank, of.width), torch.randn(of.width, of.total_rank),
        (of.total_rank // of.experts,) * of.experts, indices=indices.repeat_interleave(of.run, 0),
        base=torch.randn(rows, of.width), run=of.run, act="identity",
    )  # fmt: skip


@pytest.mark.parametrize("run", [1, 16])
@pytest.mark.parametrize("name", ["segments", "dense"])  # torch does not count products that are added in place
def test_multiplications_are_those_of_the_backend(name: str, run: int) -> None:
    of = shape(slots=2 if run == 1 else 1, run=run)
    with FlopCounterMode(display=False) as counter:
        backends.module(name).forward(problem(128, of), False)
    # An operation of both products is a multiplication and an addition.
    assert costs.counts(name, of, 128)[1] * 4e6 == counter.get_total_flops()


@pytest.mark.parametrize("name", ["segments", "grouped", "gathered"])
def test_weights_that_are_read_are_those_met_and_in_training_all_have_gradients(name: str) -> None:
    read, trained = (costs.counts(name, shape(experts=64, training=training), 4)[4] for training in (False, True))
    assert trained == 64 * 16 * 512 / 1e6
    assert 0 < read < 4 / 64 * trained  # two of four rows may meet in one expert


@pytest.mark.parametrize("name", costs.BACKENDS)
def test_slots_are_summed_where_a_row_has_several(name: str) -> None:
    assert [costs.counts(name, shape(slots=slots), 3000)[5] for slots in (1, 2, 4)] == [0, 6, 12]


@pytest.mark.parametrize(("half", "rows"), [(False, 2**13), (True, 2**14)])
def test_what_grouped_gathers_is_mapped_anew_once_it_is_large(half: bool, rows: int) -> None:
    """Rows of width 1024 that fill just what memory keeps, and one more."""
    for more, mapped in ((0, 0.0), (1, (rows + 1) * 1.024)):
        counted = costs.counts("grouped", shape(width=1024, half=half), rows + more)
        assert counted[-1] == pytest.approx(mapped)
        assert counted[-4] == pytest.approx((rows + more) * 1.024)


def test_grouped_asks_every_expert_and_multiplies_for_those_that_have_rows() -> None:
    for rows, met in ((1, 1), (2, 2 - 1 / 8), (10_000, 8)):
        assert costs.counts("grouped", shape(experts=8), rows)[-3:-1] == (8, pytest.approx(met))


def test_dense_weights_every_hidden_value_where_a_row_has_several_experts() -> None:
    weighted = [costs.counts("dense", shape(experts=8, rank=16, slots=slots), 1000)[-1] for slots in (1, 2, 4)]
    assert weighted == [0, 128, 128]


def test_sequences_save_gathered_its_call_where_plain_products_run_them() -> None:
    def called(**fields: int) -> float:
        return costs.counts("gathered", shape(**fields), 1024)[-1]

    assert [called(run=run) for run in (1, 2, 1024)] == [1, 0, 0]
    assert [called(run=run, training=True) for run in (1, 64, 128)] == [1, 1, 0]  # rank 16
    assert [called(run=run, slots=2, training=True) for run in (128, 256)] == [1, 0]
    assert [called(run=1024, half=True, training=training) for training in (False, True)] == [0, 1]


def test_every_count_has_a_cost_and_no_cost_is_negative() -> None:
    assert set(costs.COSTS) == set(EVERY)
    for (name, half, training), each in costs.COSTS.items():
        for run in (1, 8):
            assert len(each) == len(costs.counts(name, shape(run=run, half=half, training=training), 64))
        assert min(each) >= 0 < each[0]


@pytest.mark.parametrize(("name", "half", "training"), EVERY)
def test_more_of_anything_never_costs_less(name: str, half: bool, training: bool) -> None:
    def expected(rows: int = 256, **fields: int) -> float:
        return costs.expected(name, shape(**{"slots": 2, **fields}, half=half, training=training), rows)

    for field, values in (("rows", (16, 512, 8192)), ("width", (256, 2048)), ("rank", (8, 64)), ("slots", (1, 4))):
        times = [expected(**{field: value}) for value in values]
        assert times == sorted(times), field
    assert expected(rows=8192) > expected(rows=16)


def test_the_cheapest_of_those_that_are_left_is_taken() -> None:
    of, among = shape(experts=64), costs.BACKENDS
    ranked = sorted(among, key=lambda name: costs.expected(name, of, 512))
    for i in range(len(among)):
        assert costs.cheapest(of, 512, tuple(name for name in among if name in ranked[i:])) == ranked[i]


def test_products_that_are_too_small_for_onednn_take_longer_where_torch_is_slow() -> None:
    for name, rows, rank, slower in (
        ("dense", 2048, 64, False), ("dense", 64, 64, True), ("dense", 256, 1, True),
        ("segments", 4096, 64, False), ("segments", 256, 64, True), ("grouped", 4096, 64, True),
        ("gathered", 4096, 64, True),
    ):  # fmt: skip
        usual, slow = (costs.expected(name, shape(rank=rank, onednn=onednn), rows) for onednn in (False, True))
        assert (slow > usual) is slower, (name, rows, rank)
