"""The tables of a run on a GPU show what the run found, what failed in it and what it left out."""

from __future__ import annotations

import importlib.util
from pathlib import Path

PATH = Path(__file__).parents[2] / "kernels" / "bench" / "tables.py"


def made(content: dict) -> str:
    spec = importlib.util.spec_from_file_location("bench_tables", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.tables(content)


def test_everything_that_a_run_wrote_is_in_its_tables() -> None:
    case = {"failed": {}, "bytes": 1}
    text = made({
        "about": {"device": "one GPU", "torch": "2.13"},
        "numerics": [
            {"label": "runs", "passed": True, "worst": "x", "errors": {"x": 2e-7}, "bit_identical": "100 of 100"},
            {"label": "sorted", "passed": False, "worst": "y", "errors": {"y": 0.5}, "bit_identical": "9 of 100"},
            {"label": "broken", "error": "RuntimeError: a | b"},
        ],
        "results": [
            {"label": "prefill", "ms": {"ours": 0.05, "chain": 0.1}, "roof_ms": 0.04, "share_of_roof": 0.8, **case},
            {"label": "decode", "ms": {"ours": 0.3, "PEFT": 0.2}, **case, "failed": {"chain": "ValueError: wrong"}},
            {"label": "late", "error": "OutOfMemoryError"},
        ],
        "questions": [],
        "left_out": ["results: rows"],
    })  # fmt: skip
    assert text.splitlines() == [
        "device one GPU, torch 2.13",
        "",
        "| numerics |  | largest error, relative to fp64 | repeats with the same bits |",
        "|---|---|---|---|",
        "| runs | passed | 2.0e-07 (x) | 100 of 100 |",
        "| sorted | **failed** | 5.0e-01 (y) | 9 of 100 |",
        "| broken | RuntimeError: a / b |  |  |",
        "",
        "| ms | ours | chain | PEFT | of the roof |",
        "|---|---|---|---|---|",
        "| prefill | **0.05** | 0.1 |  | 80% of 0.04 |",
        "| decode | 0.3 | failed | **0.2** |  |",
        "| late |  |  |  | OutOfMemoryError |",
        "",
        "Left out, for want of time: results: rows.",
    ]
