"""Processes that know torch, transformers and PEFT from the start, but not this library.

To import those takes most of the time of a small process. One server does it once; each process is a fork of it.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.testing._internal.distributed.fake_pg import FakeStore

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["torch", "transformers.trainer", "transformers.generation", "peft"])


class Process:
    """A process that runs `code` as a script with these arguments, in the folder `cwd`."""

    def __init__(
        self, code: str, arguments: Sequence[str] = (), cwd: str | Path = ".", **environment: str | int
    ) -> None:
        self._folder = tempfile.TemporaryDirectory()
        self._process = _context.Process(
            target=_run, args=(code, list(arguments), str(cwd), environment, self._folder.name)
        )
        self._process.start()

    def finish(self, timeout: float = 240) -> str:
        """What it has printed. Raises RuntimeError with the end of its errors where it fails, or takes too long."""
        self._process.join(timeout)
        late = self._process.exitcode is None
        if late:
            self._process.kill()
            self._process.join()
        out, errors = ((Path(self._folder.name) / name).read_text(encoding="utf-8") for name in ("out", "errors"))
        self._folder.cleanup()
        if late or self._process.exitcode:
            raise RuntimeError(f"{f'still running after {timeout} s: ' if late else ''}{errors[-3000:]}")
        return out


def run_together(code: str, folder: str | Path, count: int = 2, timeout: float = 400) -> None:
    """Run `code` with the argument `folder` in `count` processes that torch.distributed knows by their ranks."""
    for process in start_together(code, [str(folder)], count):
        process.finish(timeout)


def start_together(code: str, arguments: Sequence[str], count: int = 2) -> list[Process]:
    """Start `code` in `count` processes that torch.distributed knows by their ranks."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    running = []
    for rank in range(count):
        own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        running.append(Process(code, arguments, **own))
    return running


@contextmanager
def one_of_two(rank: int = 0) -> Iterator[None]:
    """This process as one of two, of which the other is not there: collective calls return at once."""
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=rank, world_size=2)
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


def _run(code: str, arguments: list[str], cwd: str, environment: Mapping[str, str | int], folder: str) -> None:
    for stream, name in ((1, "out"), (2, "errors")):
        os.dup2(os.open(Path(folder) / name, os.O_WRONLY | os.O_CREAT), stream)
    sys.stdout, sys.stderr = (os.fdopen(stream, "w", encoding="utf-8", closefd=False) for stream in (1, 2))
    os.environ.update({name: str(value) for name, value in environment.items()})
    os.chdir(cwd)
    sys.argv = ["-c", *arguments]
    exec(compile(code, "<script>", "exec"), {"__name__": "__main__"})
