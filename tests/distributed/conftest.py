"""What the runs of two processes have come to, as a table at the end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
TABLE: dict[tuple[str, str], dict[str, str]] = {}  # (cell, engine) -> loop -> what came of it


def launch(engine: str, script: str, *arguments: str, processes: int = 2, timeout: float = 300) -> str:
    """Run a script of this folder by `accelerate launch`, and return what it says. Never longer than `timeout` s.

    Raises:
        AssertionError: it fails, or takes longer.
    """
    command = [
        str(Path(sys.executable).parent / "accelerate"), "launch", "--main_process_port", "0", "--config_file",
        str(ROOT / "examples/accelerate" / f"{engine}.yaml"), "--num_processes", str(processes),
        str(Path(__file__).parent / script), *arguments,
    ]  # fmt: skip
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    process = subprocess.Popen(
        command, env=environment, cwd=ROOT, text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    try:
        said, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        said = f"{process.communicate()[0]}\nstill running after {timeout} s"
        raise AssertionError(said[-3000:]) from None
    assert process.returncode == 0, said[-3000:]
    return said


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if not TABLE:
        return
    engines: Sequence[str] = list(dict.fromkeys(engine for _, engine in TABLE))
    cells = list(dict.fromkeys(cell for cell, _ in TABLE))
    terminalreporter.section("two processes against one: largest difference of a weight, by Trainer / by accelerate")
    width = max(map(len, cells))
    terminalreporter.write_line(" " * width + "".join(f"{engine:>20}" for engine in engines))
    for cell in cells:
        entries = (" / ".join(TABLE.get((cell, engine), {}).values()) for engine in engines)
        terminalreporter.write_line(cell.ljust(width) + "".join(f"{entry:>20}" for entry in entries))


@pytest.fixture(scope="session")
def table() -> dict[tuple[str, str], dict[str, str]]:
    return TABLE
