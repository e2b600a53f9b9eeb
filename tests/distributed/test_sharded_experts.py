"""Experts spread over two processes do as one process does, and send what the formulas say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from processes import run_together

WORKER = Path(__file__).with_name("sharded_experts.py")


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each process has found; what is not equal has failed in it."""
    folder = tmp_path_factory.mktemp("experts")
    run_together(WORKER.read_text(encoding="utf-8"), folder)
    return [torch.load(folder / str(rank), weights_only=True) for rank in range(2)]


def test_gradients_are_those_of_one_process_and_each_has_its_part(found: list[dict]) -> None:
    for name, mine in found[0]["gradients"].items():
        theirs = found[1]["gradients"][name]
        assert set(mine["names"]) | set(theirs["names"]) == set(mine["all"]), name  # nothing is left without gradient
        both = set(mine["names"]) & set(theirs["names"])
        experts = {key for key in mine["all"] if ".bank.experts." in key and ".task.bank." not in key}
        assert both.isdisjoint(experts), name
        assert min(mine["empty"], theirs["empty"]) > 0, name
    assert found[0]["gradients"]["moa"]["copied"] > 3


def test_a_process_without_anything_that_trains_goes_along(found: list[dict]) -> None:
    """Expert 0 of the second layer alone trains, and process 0 has it."""
    mine, theirs = (part["numbers"]["names"] for part in found)
    assert theirs == ["loss"]
    assert all(".layers.1." in name and ".expert0." in name for name in mine if name != "loss")
    assert len(mine) > 1


def test_training_in_which_experts_move_is_that_of_one_process(found: list[dict]) -> None:
    """Weights, moments, and the folder that is saved are compared in the processes."""
    mine, theirs = (part["training"] for part in found)
    assert mine["moved"] or theirs["moved"]
    assert max(mine["kept"], theirs["kept"]) < mine["whole"]  # no process keeps the moments of all experts


def test_experts_move_under_trainer_and_change_nothing(found: list[dict]) -> None:
    """Weights, losses, checkpoints, and what goes on from them are compared in the processes."""
    mine, theirs = (part["trainer"]["held"] for part in found)
    assert mine[0] != mine[-1]  # after the first deal
    experts = {name for name in found[0]["trainer"]["parameters"] if ".bank.experts." in name}
    for here, there in zip(mine, theirs, strict=True):
        assert set(here).isdisjoint(there)  # no copies
        assert {*here, *there} == experts


def test_load_is_dealt_within_a_quarter_of_even(found: list[dict]) -> None:
    for part in found:
        load = part["load"]
        assert load["zipf 0"] > 1.4
        assert load["zipf 1"] <= 1.25
        assert load["zipf 2"] <= 1.25
        assert load["tasks 0"] > 1.5
        assert load["tasks 1"] <= 1.25


def test_counted_bytes_are_those_of_the_formulas(found: list[dict]) -> None:
    for engine, said in found[0]["bytes"].items():
        print(f"{engine}: counted {said['counted']}, formula {said['formula']}")
        assert said["counted"] == said["formula"], engine


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("wrapped", "ValueError: shard_experts needs the model itself"),
        ("type", "ValueError: adapter 'default' is of type BOTTLENECK"),
        ("number", "ValueError: copies=-1 must be"),
        ("values", "have other values in process 1"),
        ("engine", "is sharded by FSDP2"),
        ("twice", "are spread over processes already"),
        ("tokens", "RuntimeError: process 1 of the expert group read other tokens than process 0"),
        ("state_dict", "use sharding.save_pretrained"),
        ("mixed", "are spread over processes, and mixed batches"),
        ("FSDP2 afterwards", "cannot be sharded by FSDP"),
    ],
)
def test_what_cannot_be_is_refused_by_name(what: str, message: str, found: list[dict]) -> None:
    for part in found:
        assert message in part["refused"][what]
