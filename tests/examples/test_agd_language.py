"""The study of guidance in language models, on tiny sizes."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def example() -> Any:
    sys.path.insert(0, str(ROOT / "examples" / "studies"))
    try:
        import agd_language

        yield agd_language
    finally:
        sys.path.remove(str(ROOT / "examples" / "studies"))


def test_study_of_language_compares_its_arms_on_texts_held_out(example, tmp_path) -> None:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=24, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
    )  # fmt: skip
    base = transformers.LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in base.parameters():
            parameter.mul_(10)  # so that a prompt matters
    base.save_pretrained(tmp_path / "model")
    report = example.main(
        example.Arguments(
            str(tmp_path / "model"), str(tmp_path / "out"), texts=40, held_out=8, length=12, prompts=[2, 6], steps=4,
            batch_size=8, width=4,
        )
    )  # fmt: skip
    assert [run["arm"] for run in report["runs"]] == list(example.ARMS)
    adapters, _, whole, _ = (run["trained"] for run in report["runs"])
    assert adapters < report["weights"] < whole
    for run in report["runs"]:
        assert all(0 < run["errors"][scale] < 1.5 for scale in ("1.5", "2", "3"))
    saved = json.loads((tmp_path / "out" / "results.json").read_text())
    assert saved["runs"] == report["runs"]
    assert len((tmp_path / "out" / "table.md").read_text().splitlines()) == 2 + len(example.ARMS)
    with pytest.raises(ValueError, match=r"arms=\['adapters'\] are unknown"):
        example.main(example.Arguments(str(tmp_path / "model"), str(tmp_path / "out"), arms=["adapters"]))


def test_prompts_end_within_their_bounds(example) -> None:
    ends = example.prompts_of(torch.zeros(200, 9), 2, 5, seed=0).sum(1)
    assert set(ends.tolist()) == {2, 3, 4, 5}
