"""Mixtures of very many experts: what it takes to build, save and load one grows as their number."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from peft import PeftModel, get_peft_model

from mixadapters import MixDAConfig, MoAConfig

COUNTS = (20, 60, 100)  # as far from each other: of work that is proportional, the differences are the same
LIMITS = {"build": 1.02, "save": 1.02, "load": 1.15}  # torch's load_state_dict looks for each child's keys among all
CONFIGS: dict[str, Callable[[list[str]], Any]] = {
    "mixda": lambda names: MixDAConfig(domains=names, r=1, domain_layers=[0], task_adapter=None),
    "moa": lambda names: MoAConfig(experts=names, r=1, target_modules=["layers.0.mlp.down_proj"]),
}


def calls_of(run: Callable[[], Any]) -> tuple[int, Any]:
    """How many functions `run` calls, and its result: a measure of work on which a busy machine has no say."""
    count = 0

    def note(frame: Any, event: str, argument: Any) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        result = run()
    finally:
        sys.setprofile(before)
    return count, result


@pytest.mark.parametrize("kind", CONFIGS)
def test_the_hundredth_expert_takes_no_more_work_than_the_first(kind: str, tiny: Any, tmp_path: Path) -> None:
    work: dict[str, list[int]] = {"build": [], "save": [], "load": []}
    for count in (2, *COUNTS):  # the first warms caches
        names = [f"n{i}" for i in range(count)]
        folder, base, other = tmp_path / str(count), tiny("llama"), tiny("llama")
        build, model = calls_of(lambda base=base, names=names: get_peft_model(base, CONFIGS[kind](names)))
        save, _ = calls_of(lambda model=model, folder=folder: model.save_pretrained(folder))
        load, _ = calls_of(lambda other=other, folder=folder: PeftModel.from_pretrained(other, folder))
        for step, done in (("build", build), ("save", save), ("load", load)):
            work[step].append(done)
    for step, (_, few, more, many) in work.items():
        assert many - more < LIMITS[step] * (more - few), (step, few, more, many)
