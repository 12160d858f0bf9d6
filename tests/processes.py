"""Real processes in a gloo group, kept for the tests of a file: to start one takes longer than a law does."""

from __future__ import annotations

import datetime
import tempfile
import traceback
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import distributed

TIMEOUT = 120


def serve(rank: int, count: int, store: str, pipe: Connection) -> None:
    """One process: run what it is sent, and send back None or the traceback."""
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=count,
        timeout=datetime.timedelta(seconds=TIMEOUT // 2),
    )
    while (task := pipe.recv()) is not None:
        law, arguments = task
        try:
            torch.manual_seed(0)
            law(rank, *arguments)
            pipe.send(None)
        except BaseException:
            pipe.send(traceback.format_exc())
    distributed.destroy_process_group()


class Processes:
    """So many processes; calling it runs a module-level function ``(rank, *arguments)`` in each of them."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._start()

    def _start(self) -> None:
        context = torch.multiprocessing.get_context("spawn")
        store = str(Path(tempfile.mkdtemp(prefix="qsam-test-ranks-")) / "store")
        self.pipes, self.processes = [], []
        for rank in range(self.count):
            ours, theirs = context.Pipe()
            process = context.Process(target=serve, args=(rank, self.count, store, theirs), daemon=True)
            process.start()
            self.pipes.append(ours)
            self.processes.append(process)

    def __call__(self, law: Callable[..., None], *arguments: Any) -> None:
        for pipe in self.pipes:
            pipe.send((law, arguments))
        failures = [self._answer(rank) for rank in range(self.count)]
        if any(failures):
            self.stop()  # their group may be out of step
            self._start()
        assert not any(failures), "\n".join(f"rank {i}:\n{text}" for i, text in enumerate(failures) if text)

    def _answer(self, rank: int) -> str | None:
        if not self.pipes[rank].poll(TIMEOUT):
            return "no answer: it waits for another process"
        try:
            answer: str | None = self.pipes[rank].recv()
        except EOFError:
            self.processes[rank].join()
            return f"it ended with exit code {self.processes[rank].exitcode}, and gave no answer"
        return answer

    def stop(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()


def running(count: int) -> Iterator[Processes]:
    """For a fixture."""
    processes = Processes(count)
    yield processes
    processes.stop()
